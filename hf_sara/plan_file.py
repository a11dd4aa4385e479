"""
Plans as files: `hf-sara plan MODEL --save plan.json` reads a model once, one matrix at a time, and each training of it
takes the ranks from the file.
"""

import os
from pathlib import Path
from typing import Any

from .arguments import SaraArguments
from .files import check_digest, write_file
from .manifest import (
    MAX_CONFIG_BYTES,
    SITE_FIELDS,
    current_versions,
    part_records,
    read_arguments,
    read_parts,
    read_sites,
    site_record,
    with_sites,
)
from .planning import Plan
from .records import check_fields, read_json
from .spectrum import check_threshold

PLAN_VERSION = 1
PLAN_FIELDS = {
    "plan_version": int,
    "arguments": dict,
    "threshold": float,
    "base_parameters": int,
    "versions": dict[str, str],
    "modules": list[dict],
    "tokens": list[dict],
    "sites": list[dict],
}
PLANNED_FIELDS = {name: SITE_FIELDS[name] for name in ("name", "shape", "k", "slice")} | {"sha256": str}


def save_plan(plan: Plan, path: str | os.PathLike) -> None:
    """
    Write a plan to a JSON file of about 200 bytes per site. The digests of the weights in it say which base it is of.

    Args:
        plan ([`Plan`]): What [`plan`] returned.
        path (`str` or `os.PathLike`): The file.

    Raises:
        `ValueError`: If the plan has no digests, because an adapter's own `plan()` made it.
    """
    missing = [site.name for site in plan.sites if site.name not in plan.digests]
    if missing:
        raise ValueError(
            f"This plan does not know the weight of {missing[0]}, so it cannot be saved. Make it with hf_sara.plan."
        )
    config: dict[str, Any] = {
        "plan_version": PLAN_VERSION,
        "arguments": plan.args.to_dict(),
        "threshold": plan.threshold,
        "base_parameters": plan.base_parameters,
        "versions": current_versions(),
        **part_records(plan.parts),
    }
    records = [{**site_record(site), "sha256": plan.digests[site.name]} for site in plan.sites]
    write_file(Path(path), with_sites(config, records).encode())


def load_plan(path: str | os.PathLike) -> Plan:
    """
    Read the file of a plan.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If it is no plan, or one of another version. The message names the file.
    """
    try:
        config = read_json(Path(path), MAX_CONFIG_BYTES)
        check_fields("the plan", config, PLAN_FIELDS, optional={"modules", "tokens"})
        if config["plan_version"] != PLAN_VERSION:
            raise ValueError(f"its version is {config['plan_version']}, and this hf_sara reads {PLAN_VERSION}")
        args = read_arguments(config["arguments"])
        check_threshold(config["threshold"])
        sites = read_sites(config["sites"], PLANNED_FIELDS)
        digests = {record["name"]: record["sha256"] for record in config["sites"]}
        for name, digest in digests.items():
            check_digest(f"{name}: its sha256", digest)
        return Plan(args, config["threshold"], sites, read_parts(config), config["base_parameters"], digests)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is not the file of a plan: {error}") from error


def with_arguments(
    plan: Plan | str | os.PathLike | None, args: SaraArguments | None
) -> tuple[Plan | None, SaraArguments]:
    """A plan that may be given as its file, and the arguments, which are the plan's or the defaults if left out."""
    found = plan if plan is None or isinstance(plan, Plan) else load_plan(plan)
    return found, (found.args if found else SaraArguments()) if args is None else args
