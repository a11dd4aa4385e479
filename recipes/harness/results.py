"""The results of a table's runs, as JSON and as Markdown."""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_sara.files import write_file

from .run_folder import write_json
from .sweep import CRITERION, RECORDS, Sweep, without_paths
from .tables import Row, Table

RESULTS_FILE = "results.json"
TABLE_FILE = "table.md"
DASH = "-"
# The costs that are reported of every row, in the form of a table's columns.
COSTS = {
    "trained_parameters": {"title": "parameters", "format": ",.0f"},
    "share": {"title": "share (%)", "scale": 100, "format": ".3g"},
    "train_seconds": {"title": "training (min)", "scale": 1 / 60, "format": ".1f"},
    "peak_memory_bytes": {"title": "memory (GB)", "scale": 1e-9, "format": ".2f"},
    "peak_cuda_bytes": {"title": "GPU memory (GB)", "scale": 1e-9, "format": ".2f"},
    "adapter_bytes": {"title": "on disk (kB)", "scale": 1e-3, "format": ",.0f"},
}


# ---- results ----


def collect(sweep: Sweep, given: Mapping[str, Any]) -> dict[str, Any]:
    """
    Collect the results of a table, as far as its runs are finished.

    Args:
        sweep ([`~harness.sweep.Sweep`]): The table's runs.
        given (`Mapping[str, Any]`): The options of the command line.

    Returns:
        `dict[str, Any]`: JSON values without a path of this machine. `rows` has the metrics of each row's tries and
        seeds, and the paper's numbers. `runs` has the record of each run, with all options and metrics, from which
        [`~harness.sweep.Sweep`] goes on.
    """
    table = sweep.table
    title = ", ".join(
        [table.title, *(f"{name} {value}" for name, value in without_paths(given).items() if name != "data_dir")]
    )
    records = [
        _finite({"recipe": table.recipe, "options": without_paths(run.options), "metrics": metrics})
        for row in table.rows
        if row.options is not None
        for run in sweep.runs_of(row)
        if (metrics := run.metrics()) is not None
    ]
    return {
        "name": table.name,
        "title": title,
        "notes": table.notes,
        "command": _command(table, given),
        "hardware": sorted({record["metrics"]["hardware"] for record in records if "hardware" in record["metrics"]}),
        "versions": _distinct(record["metrics"]["versions"] for record in records if "versions" in record["metrics"]),
        "columns": dict(table.columns),
        "figures": {name: dict(spec) for name, spec in table.figures.items()},
        "rows": [_collect_row(sweep, row) for row in table.rows],
        RECORDS: _distinct(records),
    }


def _distinct(values: Iterable[Any]) -> list[Any]:
    """The values without repetitions, in the order in which they first appear."""
    found = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _collect_row(sweep: Sweep, row: Row) -> dict[str, Any]:
    result = {"name": row.name, "group": row.group, "x": row.x, "paper": row.paper}
    if row.options is None:
        return {**result, "state": "printed"}
    tries = [{"learning_rate": rate, "metrics": metrics} for rate, metrics in sweep.tries(row).items() if metrics]
    error = sweep.error(row)
    state = "complete" if sweep.is_complete(row) else "failed" if error else "incomplete"
    return _finite(
        {
            **result,
            "state": state,
            # The folders of this machine are cut out of the message.
            "error": error and re.sub(r"(?<![\w:/])/(?:[^\s/'\"]+/)+", "", error),
            "options": without_paths(row.options),
            "tries": tries,
            "learning_rate": sweep.best_rate(row),
            "seeds": [{"seed": seed, "metrics": metrics} for seed, metrics in sweep.seeds(row).items()],
        }
    )


def _finite(value: Any) -> Any:
    """The value with `None` instead of the numbers that JSON cannot write: NaN and the infinite ones."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _command(table: Table, given: Mapping[str, Any]) -> str:
    parts = ["python recipes/run_paper.py", table.name]
    for name, value in without_paths(given).items():
        parts += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join(parts)


def seed_values(row: Mapping[str, Any], metric: str) -> list[float]:
    """The values of a metric in a collected row, one for each seed that has the metric."""
    values = [seed["metrics"].get(metric) for seed in row.get("seeds", ())]
    return [value for value in values if value is not None]


# ---- tables ----


def render_table(results: Mapping[str, Any]) -> str:
    """
    Write collected results as Markdown: the table of [`render_scores`], a table of the costs of the rows that are no
    columns of the first, and one of the learning rates that were tried.
    """
    return "\n\n".join([*_scores(results), *_costs_and_tries(results), *_unfinished(results)]) + "\n"


def render_scores(results: Mapping[str, Any]) -> str:
    """
    Write the scores of collected results as a Markdown table. It has a line for each row, with mean and standard
    deviation if several seeds were run, and below it a line with the paper's numbers if the row is one of the paper's.
    """
    return "\n\n".join([*_scores(results), *_unfinished(results)])


def _is_grouped(results: Mapping[str, Any]) -> bool:
    return any(row["group"] for row in results["rows"])


def _scores(results: Mapping[str, Any]) -> list[str]:
    columns, grouped = results["columns"], _is_grouped(results)
    several = any(len(row.get("seeds", ())) > 1 for row in results["rows"])
    head = [""] * (2 if grouped else 1)
    head += [column["title"] for column in columns.values()] + (["seeds"] if several else [])
    lines = []
    for row in results["rows"]:
        names = _names(row, grouped)
        count = [str(len(row["seeds"])) if row.get("seeds") else DASH] if several else []
        if row["state"] != "printed":
            lines.append(
                [*names, *(_cell(seed_values(row, name), column) for name, column in columns.items()), *count]
            )
        if row["paper"] is not None:
            printed = [str(row["paper"].get(name, DASH)) for name in columns]
            lines.append([*names[:-1], f"{row['name']} (paper)", *printed, *([DASH] if several else [])])
    return [markdown_table(head, lines)] if lines else []


def _costs_and_tries(results: Mapping[str, Any]) -> list[str]:
    columns, grouped, parts = results["columns"], _is_grouped(results), []
    ran = [row for row in results["rows"] if row.get("seeds")]
    costs = {name: COSTS[name] for name in COSTS if name not in columns and any(seed_values(row, name) for row in ran)}
    if costs:
        head = [*[""] * (2 if grouped else 1), *(column["title"] for column in costs.values())]
        lines = [
            [*_names(row, grouped), *(_cell(seed_values(row, name), column) for name, column in costs.items())]
            for row in ran
        ]
        parts.append(markdown_table(head, lines))
    tried = [row for row in results["rows"] if row.get("tries")]
    if tried:
        longest = max(len(row["tries"]) for row in tried)
        head = [*[""] * (2 if grouped else 1), *["learning rate: evaluation loss"] * longest]
        parts.append(markdown_table(head, [_tries(row, longest, grouped) for row in tried]))
    return parts


def _unfinished(results: Mapping[str, Any]) -> list[str]:
    left = [label_of(row) for row in results["rows"] if row["state"] == "incomplete"]
    parts = [f"Not finished yet: {'; '.join(left)}."] if left else []
    return parts + [f"Failed: {label_of(row)}: {row['error']}" for row in results["rows"] if row["state"] == "failed"]


def label_of(row: Mapping[str, Any]) -> str:
    return Row(row["name"], row["group"]).label


def _names(row: Mapping[str, Any], grouped: bool) -> list[str]:
    return [row["group"] or "", row["name"]] if grouped else [row["name"]]


def _tries(row: Mapping[str, Any], longest: int, grouped: bool) -> list[str]:
    cells = []
    for entry in row["tries"]:
        loss = entry["metrics"].get(CRITERION)
        text = f"{entry['learning_rate']:g}: {DASH if loss is None else format(loss, '.3f')}"
        cells.append(f"**{text}**" if entry["learning_rate"] == row["learning_rate"] else text)
    return [*_names(row, grouped), *cells, *[""] * (longest - len(cells))]


def _cell(values: Sequence[float], column: Mapping[str, Any]) -> str:
    if not values:
        return DASH
    scale, spec = column.get("scale", 1), column.get("format", ".3f")
    mean = format(statistics.mean(values) * scale, spec)
    # A value that does not depend on the seed, such as a count, has no deviation. Some have one that rounds to zero.
    spread = format(statistics.stdev(values) * scale if len(values) > 1 else 0.0, spec)
    return mean if spread == format(0.0, spec) else f"{mean} ± {spread}"


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


def render_head(results: Mapping[str, Any], mark: str = "#") -> str:
    """The text above a table: the title, the notes and the command."""
    parts = [f"{mark} {results['title']}", results["notes"].strip(), f"```bash\n{results['command']}\n```"]
    return "\n\n".join(part for part in parts if part)


def write_results(sweep: Sweep, given: Mapping[str, Any]) -> dict[str, Any]:
    """Write results.json and table.md into the table's folder; returns the collected results."""
    results = collect(sweep, given)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    write_json(sweep.folder / RESULTS_FILE, results)
    write_file(sweep.folder / TABLE_FILE, f"{render_head(results)}\n\n{render_table(results)}".encode())
    return results
