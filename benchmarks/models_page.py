"""Write the page "Which models work" from the results of a run over many architectures.

    python benchmarks/models_page.py RESULTS.jsonl

Each line of the results is one architecture with one method: its class (`cls`), the method (`run`), the default sites
by kind (`sites`), and how far the model was from what it should be after each stage of a round trip, as a share of the
largest output (`load`, `merge`, `unmerge`, `peft`, `detach`), or an `error`.
"""

import argparse
import json
import textwrap
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
KEPT = Path(__file__).parent.parent / "docs" / "results" / "models.jsonl"
FARTHEST = 3e-4
STAGES = ("load", "merge", "unmerge", "peft", "detach")

NO_ATTENTION = "has no attention"
NO_LINEAR = "computes query and value with"
EXCEPTIONS = {
    **dict.fromkeys(("ConvNext", "ConvNextV2", "FocalNet", "PoolFormer"), f"{NO_ATTENTION}."),
    **dict.fromkeys(("PPLCNet", "MobileNetV2", "RegNet", "ResNet"), f"{NO_ATTENTION}, and no linear but its head."),
    "RecurrentGemma": "could not be copied after a forward pass, which the trial needs.",
    "XLNet": f"{NO_LINEAR} parameters that are no modules.",
    "SqueezeBert": f"{NO_LINEAR} convolutions.",
    "IBert": "has linears of its own kind (`QuantLinear`), which return two things.",
    "WavLM": "reads the weights of its query and value without calling the modules, so that an update has no effect.",
    "PPFormulaNet": "cannot be loaded by PEFT, with any LoRA. All else is equal.",
    "GlmOcr": "was not built: its tiny configuration is wrong.",
}


def main() -> None:
    """Read the results and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    rows = [json.loads(line) for line in parser.parse_args().results.read_text(encoding="utf-8").splitlines()]
    kept = [{key: row[key] for key in ("cls", "run", "sites", *STAGES, "error") if key in row} for row in rows]
    KEPT.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    PAGE.write_text(page(kept), encoding="utf-8")


def is_equal(row: dict[str, Any]) -> bool:
    """Whether a round trip ended where it should."""
    return "error" not in row and all(row.get(stage, 0.0) <= FARTHEST for stage in STAGES)


def page(rows: list[dict[str, Any]]) -> str:
    """The page in Markdown."""
    by_class: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_class[row["cls"]].append(row)
    equal = [name for name, found in by_class.items() if all(map(is_equal, found))]
    others = [name for name in by_class if name not in equal]
    by_sites: dict[str, list[str]] = defaultdict(list)
    for name in equal:
        by_sites[site_names(by_class[name][0]["sites"])].append(name)
    about = (
        "hf_sara adapts any `PreTrainedModel`, and by default its query and value projections. This page has the "
        f"architectures of transformers {version('transformers')} that were tried, each as a tiny random model. A "
        "round trip attaches an adapter with the default sites, trains it, loads it on a fresh copy, merges and "
        f"unmerges it, loads its LoRA with PEFT {version('peft')}, and detaches it. It is equal if every stage gives "
        "the outputs that it should, and the base has the same bits after it. SARA, Mo-SARA with three heads and "
        "Mo-SARA with one head were tried on each."
    )
    result = (
        f"**{len(equal)} of {len(by_class)} architectures are equal throughout.** The other {len(others)} are at the "
        "end, with the reasons. For those that have no default, `target_modules` names what to adapt."
    )
    lines = ["# Which models work", "", textwrap.fill(about, 119), "", textwrap.fill(result, 119), ""]
    lines += ["| adapted by default | architectures |", "|---|---|"]
    for sites, names in sorted(by_sites.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"| {sites} | {', '.join(sorted(names))} |")
    lines += ["", "## Exceptions", "", "| architecture | why |", "|---|---|"]
    lines += [f"| {name} | {reason(name)} |" for name in sorted(others)]
    lines += ["", "This page is written by `benchmarks/models_page.py` from `docs/results/models.jsonl`."]
    return "\n".join(lines) + "\n"


def site_names(kinds: dict[str, int]) -> str:
    """The ends of the names of sites, such as `q_proj` and `v_proj`."""
    ends = dict.fromkeys(end_of(kind) for kind in kinds)
    return ", ".join(f"`{end}`" for end in sorted(ends))


def end_of(kind: str) -> str:
    """The last part of a site's name, with that of its module for a slice or the linear of a wrapper."""
    parts = kind.split(".")
    return ".".join(parts[-2:]) if len(parts[-1]) == 1 or parts[-1] == "linear" else parts[-1]


def reason(name: str) -> str:
    """Why an architecture is an exception. One without a reason is an error, because the page has to explain it."""
    found = [text for start, text in EXCEPTIONS.items() if name.startswith(start)]
    if not found:
        raise SystemExit(f"{name} is an exception, and EXCEPTIONS has no reason for it.")
    return f"It {found[0]}"


if __name__ == "__main__":
    main()
