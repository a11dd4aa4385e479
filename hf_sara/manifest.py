"""The manifest of an adapter: everything that its files hold besides tensors, its text, and its strict reading.

A config has exactly the known fields. Its shapes are used only after they were compared with the base.
"""

import functools
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, get_type_hints

from torch import nn

from .arguments import SaraArguments
from .base_model import BaseRecord
from .files import check_digest
from .layouts import OutputSlice
from .parts import ModulePart, Part, TokenPart
from .planning import AdapterSpec
from .records import check_fields, check_shape
from .seeds import SEED_FIELDS, Seed
from .sites import PlannedSite
from .spectrum import check_threshold
from .tensor_files import BUFFER_DTYPES

logger = logging.getLogger(__name__)

# A config has about 200 bytes per site, so this is enough for forty thousand sites. There is a limit, because a parsed
# config may take 20 times as much memory.
MAX_CONFIG_BYTES = 8 * 2**20

# The fields of a config and the types of their values.
CONFIG_FIELDS = {
    "format_version": int,
    "method": str,
    "threshold": float,
    "arguments": dict,
    "dtype": str,
    "tensors_sha256": str,
    "factors_sha256": str,
    "base": dict,
    "versions": dict[str, str],
    "modules": list,
    "tokens": list,
    "sites": list,
}
SITE_FIELDS = {"name": str, "shape": list[int], "k": int, "slice": dict, "trained": bool}
MODULE_FIELDS = {
    "name": str,
    "parameters": dict[str, list[int]],
    "buffers": dict[str, list[int]],
    "dtypes": dict[str, str],
    "ties": dict[str, str],
}
TOKEN_FIELDS = {"name": str, "indices": list[int], "width": int, "trained": bool}


@dataclass(frozen=True)
class Manifest(AdapterSpec):
    """
    The description of an adapter that its files hold besides its tensors. Writing takes it, and reading returns it.

    Args:
        args ([`SaraArguments`]): The adapter's arguments.
        threshold (`float`): The threshold in force.
        sites (`list[PlannedSite]`): The sites with their ranks.
        parts (`list[ModulePart or TokenPart]`): What is trained beside the updates.
        seeds (`dict[str, Seed]`): The seeds of the frozen factors by site; empty for a method that has none.
        base ([`BaseRecord`]): The base model of the training.
        versions (`dict[str, str]`): Versions of the packages that made the adapter.
        untrained (`frozenset[str]`, *optional*): The sites whose tensors are those of their random start. A checkpoint
            keeps them, so that the training can go on with them.
    """

    seeds: dict[str, Seed]
    base: BaseRecord
    versions: dict[str, str]
    untrained: frozenset[str] = field(default=frozenset(), kw_only=True)

    @property
    def origin(self) -> str:
        """Where the adapter comes from, for an error that says that it does not fit."""
        made, here = self.versions.get("transformers"), version("transformers")
        with_other = f" It was made with transformers {made}, and this is {here}." if made and made != here else ""
        return f"It was trained on {self.base}.{with_other}"

    def warn_of_another_base(self, model: nn.Module) -> None:
        """Warn if the model is known to be another base, where a method cannot tell that from the weights."""
        there = BaseRecord.of(model)
        if not self.method.has_factors and self.base.is_other_than(there):
            logger.warning(
                "The adapter was trained on %s, and is loaded onto %s. Their weights may differ.", self.base, there
            )

    def untrained_sites(self) -> list[PlannedSite]:
        """The sites whose updates add nothing, although their tensors do not say so."""
        return [site for site in self.sites if site.name in self.untrained]


@dataclass(frozen=True)
class Config(Manifest):
    """
    A manifest as it was read, with what its text says of the tensors beside it.

    Args:
        dtype (`str`): Dtype of the trained tensors.
        tensors_sha256 (`str`): Digest of the saved tensors.
        factors_sha256 (`str`, *optional*): Digest of the frozen factors, if they are saved.
    """

    dtype: str
    tensors_sha256: str
    factors_sha256: str | None = None


def current_versions() -> dict[str, str]:
    """The versions that an adapter records: those of packages and of Python."""
    packages = {name: _version_of(name) for name in ("hf_sara", "transformers", "torch")}
    return {**packages, "python": platform.python_version()}


@functools.cache
def _version_of(package: str) -> str:
    # Each look reads a file.
    return version(package)


def config_text(manifest: Manifest, format_version: int, dtype: str, digests: Mapping[str, str]) -> str:
    """The config as JSON with one line per site, so that it is small, and people can compare two of them."""
    config: dict[str, Any] = {
        "format_version": format_version,
        "method": manifest.args.method,
        "threshold": manifest.threshold,
        "arguments": manifest.args.to_dict(),
        "dtype": dtype,
        **digests,
        "base": manifest.base.to_json(),
        "versions": manifest.versions,
    }
    records = []
    for site in manifest.sites:
        record = site_record(site)
        if site.name in manifest.untrained:
            record["trained"] = False
        if site.name in manifest.seeds:
            record.update(manifest.seeds[site.name].to_json())
        records.append(record)
    return with_sites({**config, **part_records(manifest.parts)}, records)


def site_record(site: PlannedSite) -> dict[str, Any]:
    """The record of a site in a config, or in the file of a plan."""
    record: dict[str, Any] = {"name": site.name, "shape": list(site.shape), "k": site.k}
    return record if site.slice is None else {**record, "slice": asdict(site.slice)}


def part_records(parts: Sequence[Part]) -> dict[str, Any]:
    """The records of what trains beside the updates."""
    kinds = (("modules", ModulePart), ("tokens", TokenPart))
    found = {key: [part.to_json() for part in parts if isinstance(part, kind)] for key, kind in kinds}
    return {key: records for key, records in found.items() if records}


def with_sites(config: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    """A config as JSON with one line for each site."""
    lines = ["    " + json.dumps(record, separators=(",", ":")) for record in records]
    head = json.dumps(config, indent=2).removesuffix("\n}")
    return head + ',\n  "sites": [\n' + ",\n".join(lines) + "\n  ]\n}\n"


def parse_config(config: Any, format_version: int) -> Config:
    """
    The config in a parsed JSON object.

    Raises:
        `ValueError`: If a field is missing, unknown or wrong, or the config is of another format version.
    """
    check_fields("the config", config, CONFIG_FIELDS, optional={"factors_sha256", "modules", "tokens"})
    if config["format_version"] != format_version:
        raise ValueError(f"its format version is {config['format_version']}, and {format_version} belongs there")
    args = read_arguments(config["arguments"])
    method = args.resolved_method()
    if config["method"] != args.method:
        raise ValueError(f"its method {config['method']!r} is not that of its arguments")
    if config["dtype"] not in ("float32", "float64"):
        raise ValueError(f"trained tensors cannot have the dtype {config['dtype']!r}")
    check_threshold(config["threshold"])
    check_digest("its tensors_sha256", config["tensors_sha256"])
    if ("factors_sha256" in config) != method.saves_factors:
        raise ValueError("it has to have factors_sha256 if, and only if, the frozen factors are saved")
    if "factors_sha256" in config:
        check_digest("its factors_sha256", config["factors_sha256"])
    base = BaseRecord.from_json(config["base"])
    records = config["sites"]
    sites = read_sites(records, {**SITE_FIELDS, **SEED_FIELDS} if method.has_factors else SITE_FIELDS)
    seeds = {}
    if method.has_factors:
        seeds = {site.name: Seed.from_json(record, site) for site, record in zip(sites, records, strict=True)}
    found = Config(
        args=args,
        threshold=config["threshold"],
        sites=sites,
        parts=read_parts(config),
        seeds=seeds,
        untrained=frozenset(site.name for site, r in zip(sites, records, strict=True) if not r.get("trained", True)),
        base=base,
        versions=config["versions"],
        dtype=config["dtype"],
        tensors_sha256=config["tensors_sha256"],
        factors_sha256=config.get("factors_sha256"),
    )
    numbers = [len(method.trained_shapes(site.shape, site.k)) for site in sites]
    numbers += [len(part.trained_shapes()) + len(part.buffer_shapes()) for part in found.parts]
    if len(found.state_shapes()) != sum(numbers):
        raise ValueError("it gives two of its tensors one name")
    return found


def read_arguments(record: Any) -> SaraArguments:
    """The arguments in a config, or in the file of a plan."""
    hints = get_type_hints(SaraArguments)
    check_fields("its arguments", record, hints, optional=hints)
    return SaraArguments(**record)


def read_sites(records: Sequence[Any], hints: Mapping[str, Any]) -> list[PlannedSite]:
    """The sites of a config, or of the file of a plan, whose records have these fields."""
    sites = [_read_site(f"the record of site {number}", record, hints) for number, record in enumerate(records)]
    if not sites or len({site.name for site in sites}) != len(sites):
        raise ValueError("it names no sites, or one twice")
    return sites


def _read_site(what: str, record: Any, hints: Mapping[str, Any]) -> PlannedSite:
    check_fields(what, record, hints, optional={"slice", "trained", "clusters"})
    name, shape, k, part = record["name"], tuple(record["shape"]), record["k"], None
    if "slice" in record:
        check_fields(f"the slice of {name!r}", record["slice"], get_type_hints(OutputSlice))
        part = OutputSlice(**record["slice"])
    check_shape(f"site {name!r}", shape)
    if len(shape) != 2 or not 1 <= k <= min(shape):
        raise ValueError(f"site {name!r} has k={k}, which a weight of shape {shape} cannot have")
    return PlannedSite(name, name.rsplit(".", 1)[0] if part else name, shape, part, k=k)


def read_parts(config: Mapping[str, Any]) -> list[Part]:
    """The parts of a config, or of the file of a plan."""
    parts: list[Part] = []
    for number, record in enumerate(config.get("modules", [])):
        check_fields(f"the record of module {number}", record, MODULE_FIELDS, optional={"buffers", "dtypes", "ties"})
        shapes = {key: {n: tuple(s) for n, s in record.get(key, {}).items()} for key in ("parameters", "buffers")}
        dtypes = record.get("dtypes", {})
        for found in shapes.values():
            for n, shape in found.items():
                check_shape(f"{n!r} of the module {record['name']!r}", shape)
        if set(dtypes) != set(shapes["buffers"]):
            raise ValueError(f"the dtypes of the module {record['name']!r} are not those of its buffers")
        if not set(dtypes.values()) <= set(BUFFER_DTYPES):
            raise ValueError(f"the module {record['name']!r} has a buffer of a dtype that none can have: {dtypes}")
        parts.append(ModulePart(record["name"], **shapes, dtypes=dtypes, ties=record.get("ties", {})))
    for number, record in enumerate(config.get("tokens", [])):
        check_fields(f"the record of tokens {number}", record, TOKEN_FIELDS)
        indices = record["indices"]
        if not indices or indices != sorted(set(indices)) or indices[0] < 0 or record["width"] < 1:
            raise ValueError(f"the rows of {record['name']!r} are not different row numbers in rising order")
        check_shape(f"the rows of {record['name']!r}", (len(indices), record["width"]))
        parts.append(TokenPart(**{**record, "indices": tuple(indices)}))
    return parts
