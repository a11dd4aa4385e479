"""What came out of a table's runs: results as JSON and Markdown, figures, and the project's page of results."""

import inspect
import json
import logging
import math
import re
import shutil
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .. import analysis
from ..adapter import SaraAdapter
from ..storage import write_file
from . import e2e, instruct, recipe
from .paper import CRITERION, Row, Sweep, Table, parse_options, select_rows, slug, without_paths

logger = logging.getLogger(__name__)

RESULTS_FILE = "results.json"
TABLE_FILE = "table.md"
DASH = "-"
BEGIN = "<!-- {}: written by recipes/run_paper.py from here -->"
END = "<!-- {}: written by recipes/run_paper.py up to here -->"
# What every row is reported to cost, in the form of a table's columns.
COSTS = {
    "trained_parameters": {"title": "parameters", "format": ",.0f"},
    "share": {"title": "share (%)", "scale": 100, "format": ".3g"},
    "train_seconds": {"title": "training (min)", "scale": 1 / 60, "format": ".1f"},
    "peak_memory_bytes": {"title": "memory (GB)", "scale": 1e-9, "format": ".2f"},
    "peak_cuda_bytes": {"title": "GPU memory (GB)", "scale": 1e-9, "format": ".2f"},
    "adapter_bytes": {"title": "on disk (kB)", "scale": 1e-3, "format": ",.0f"},
}
HEADER = """# Results

What the recipes gave. Each part between two marks is generated from the runs; the text around them is written by hand.
"""


# ---- results ----


def collect(sweep: Sweep, given: Mapping[str, Any]) -> dict[str, Any]:
    """
    What is there of a table.

    Args:
        sweep ([`~hf_sara.tasks.paper.Sweep`]): The table's runs.
        given (`Mapping[str, Any]`): Options of the command line.

    Returns:
        `dict[str, Any]`: JSON values without a path of this machine: by row, the metrics of its tries and seeds beside
        the paper's numbers; in `runs`, all options of each run and its metrics, for [`~hf_sara.tasks.paper.Sweep`].
    """
    table = sweep.table
    title = ", ".join(
        [table.title, *(f"{name} {value}" for name, value in without_paths(given).items() if name != "data_dir")]
    )
    runs = [
        _finite({"recipe": table.recipe, "options": without_paths(run.options), "metrics": metrics})
        for row in table.rows
        if row.options is not None
        for run in sweep.runs(row)
        if (metrics := run.metrics()) is not None
    ]
    return {
        "name": table.name,
        "title": title,
        "notes": table.notes,
        "command": _command(table, given),
        "hardware": sorted({run["metrics"]["hardware"] for run in runs if "hardware" in run["metrics"]}),
        "versions": _distinct(run["metrics"]["versions"] for run in runs if "versions" in run["metrics"]),
        "columns": dict(table.columns),
        "figures": {name: dict(spec) for name, spec in table.figures.items()},
        "rows": [_collect_row(sweep, row) for row in table.rows],
        "runs": _distinct(runs),
    }


def _distinct(values: Iterable[Any]) -> list[Any]:
    """The values without those that were there before."""
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
            # Without the folders of this machine.
            "error": error and re.sub(r"(?<![\w:/])/(?:[^\s/'\"]+/)+", "", error),
            "options": without_paths(row.options),
            "tries": tries,
            "learning_rate": sweep.best_rate(row),
            "seeds": [{"seed": seed, "metrics": metrics} for seed, metrics in sweep.seeds(row).items()],
        }
    )


def _finite(value: Any) -> Any:
    """The value without the numbers that JSON does not know."""
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


def means(row: Mapping[str, Any], metric: str) -> list[float]:
    """The values of a metric over the seeds of a collected row that have it."""
    values = [seed["metrics"].get(metric) for seed in row.get("seeds", ())]
    return [value for value in values if value is not None]


# ---- tables ----


def render_table(results: Mapping[str, Any]) -> str:
    """
    The Markdown of collected results: a line per row, and below it what the paper prints, where it is a row of the
    paper; mean and standard deviation over seeds, where several were run; then what the rows cost, as far as that is
    no column of the table; then the learning rates that were tried.
    """
    columns = results["columns"]
    grouped = any(row["group"] for row in results["rows"])
    several = any(len(row.get("seeds", ())) > 1 for row in results["rows"])
    head = [""] * (2 if grouped else 1)
    head += [column["title"] for column in columns.values()] + (["seeds"] if several else [])
    lines = []
    for row in results["rows"]:
        names = _names(row, grouped)
        count = [str(len(row["seeds"])) if row.get("seeds") else DASH] if several else []
        if row["state"] != "printed":
            lines.append([*names, *(_cell(means(row, name), column) for name, column in columns.items()), *count])
        if row["paper"] is not None:
            printed = [str(row["paper"].get(name, DASH)) for name in columns]
            lines.append([*names[:-1], f"{row['name']} (paper)", *printed, *([DASH] if several else [])])
    parts = [_markdown(head, lines)] if lines else []
    ran = [row for row in results["rows"] if row.get("seeds")]
    costs = {name: COSTS[name] for name in COSTS if name not in columns and any(means(row, name) for row in ran)}
    if costs:
        head = [*[""] * (2 if grouped else 1), *(column["title"] for column in costs.values())]
        lines = [
            [*_names(row, grouped), *(_cell(means(row, name), column) for name, column in costs.items())]
            for row in ran
        ]
        parts.append(_markdown(head, lines))
    tried = [row for row in results["rows"] if row.get("tries")]
    if tried:
        longest = max(len(row["tries"]) for row in tried)
        head = [*[""] * (2 if grouped else 1), *["learning rate: evaluation loss"] * longest]
        parts.append(_markdown(head, [_tries(row, longest, grouped) for row in tried]))
    left = [_label(row) for row in results["rows"] if row["state"] == "incomplete"]
    parts += [f"Not finished yet: {'; '.join(left)}."] if left else []
    parts += [f"Failed: {_label(row)}: {row['error']}" for row in results["rows"] if row["state"] == "failed"]
    return "\n\n".join(parts) + "\n"


def _label(row: Mapping[str, Any]) -> str:
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
    # What does not depend on the seed, such as a count, has no spread.
    spread = statistics.stdev(values) * scale if len(set(values)) > 1 else 0.0
    return f"{mean} ± {format(spread, spec)}" if spread else mean


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


def _render_head(results: Mapping[str, Any], mark: str = "#") -> str:
    """What stands above a table: its title, what has to be known of it, and the command."""
    parts = [f"{mark} {results['title']}", results["notes"].strip(), f"```bash\n{results['command']}\n```"]
    return "\n\n".join(part for part in parts if part)


def write_results(sweep: Sweep, given: Mapping[str, Any]) -> dict[str, Any]:
    """Write results.json and table.md into the table's folder; returns what the former holds."""
    results = collect(sweep, given)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    recipe.write_json(sweep.folder / RESULTS_FILE, results)
    write_file(sweep.folder / TABLE_FILE, f"{_render_head(results)}\n\n{render_table(results)}".encode())
    return results


# ---- figures ----


def draw_figures(sweep: Sweep, module: ModuleType, results: Mapping[str, Any]) -> dict[str, str]:
    """
    Draw a table's figures into its folder, as NAME.png, as far as their runs are there, with NAME.json where they show
    other data than the rows' metrics. One that fails leaves the others. The `kind` of a figure is

    - `lines`: the metric `y` over `x`, which is a row's own, an option or a metric; a line per group. What the paper
      prints is a line too.
    - `tries`: the evaluation loss over the learning rates; a line per row.
    - `correlation`: the metric `y` of the rows of `group`, which train some layers each, over their mean rank at
      `threshold` (paper, Figures 2 and 3).
    - `ranks`: the rank of every site at `thresholds` (paper, Figures 2 and 8).
    - `routing`: the gates of a row's Mo-SARA on the first question of each test set (paper, Figure 7, appendix D), a
      file each, NAME-SET.png.

    Args:
        sweep ([`~hf_sara.tasks.paper.Sweep`]): The table's runs.
        module (`ModuleType`): The recipe.
        results (`Mapping[str, Any]`): From [`collect`].

    Returns:
        `dict[str, str]`: The errors of the figures that failed, by their names.
    """
    failed = {}
    for name, spec in sweep.table.figures.items():
        path, draw = sweep.folder / f"{name}.png", FIGURES[spec["kind"]]
        try:
            data = draw(sweep, module, results, path, **{key: spec[key] for key in spec if key != "kind"})
        except Exception as error:
            failed[name] = str(error)
            # Anything but what cannot work or is missing is a bug and shows its trace.
            expected = isinstance(error, (ValueError, OSError, ImportError))
            logger.error("The figure %s failed: %s", name, error, exc_info=not expected)
        else:
            if data is not None:
                recipe.write_json(path.with_suffix(".json"), data)
    return failed


def check_figures(table: Table) -> None:
    """
    Whether a table's figures can be drawn, before hours of running.

    Raises:
        [`~hf_sara.tasks.recipe.RecipeError`]: If one has an unknown `kind`, or lacks what its kind needs.
    """
    for name, spec in table.figures.items():
        kind = spec.get("kind") if isinstance(spec, dict) else None
        if kind not in FIGURES:
            raise recipe.RecipeError(f"The figure {name} has kind {kind!r}. Choose from {', '.join(FIGURES)}.")
        try:
            # The first four are not the table's.
            inspect.signature(FIGURES[kind]).bind(*[None] * 4, **{key: spec[key] for key in spec if key != "kind"})
        except TypeError as error:
            raise recipe.RecipeError(f"The figure {name}, of kind {kind!r}: {error}.") from error


def _draw_lines(
    sweep: Sweep,
    module: ModuleType,
    results: Mapping[str, Any],
    path: Path,
    x: str,
    y: str,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
) -> None:
    scale = results["columns"][y].get("scale", 1)
    series: dict[str, list[tuple[Any, float]]] = defaultdict(list)
    names: dict[str, list[str]] = defaultdict(list)
    for row in results["rows"]:
        printed = row["paper"] or {}
        values, place = means(row, y), _place(row, x)
        if values and place is not None:
            series[row["group"] or "measured"].append((place, statistics.mean(values) * scale))
            names[row["group"] or "measured"].append(row["name"])
        if y in printed and printed.get(x, place) is not None:
            series[f"{row['group'] or ''} paper".strip()].append((printed.get(x, place), printed[y]))
    if series:
        lines = {name: tuple(zip(*points, strict=True)) for name, points in series.items()}
        places = [_place(row, x) for row in results["rows"]]
        # Texts stand in the order of the rows, whichever of them are done; what the place does not say, a name does.
        texts = list(dict.fromkeys(place for place in places if isinstance(place, str)))
        named = not any(row["x"] is not None or x in row.get("options", {}) for row in results["rows"])
        analysis.plot_lines(lines, xlabel, ylabel, path, results["title"], log_x, texts, names if named else None)


def _place(row: Mapping[str, Any], x: str) -> Any:
    if row["x"] is not None:
        return row["x"]
    if x in row.get("options", {}):
        return row["options"][x]
    values = means(row, x)
    return statistics.mean(values) if values else None


def _draw_tries(sweep: Sweep, module: ModuleType, results: Mapping[str, Any], path: Path) -> None:
    lines = {}
    for row in results["rows"]:
        losses = ((entry["learning_rate"], entry["metrics"].get(CRITERION)) for entry in row.get("tries", ()))
        points = sorted((rate, loss) for rate, loss in losses if loss is not None)
        if points:
            lines[_label(row)] = tuple(zip(*points, strict=True))
    if lines:
        title = f"{results['title']}: learning rates"
        figure = analysis.plot_lines(lines, "learning rate", "evaluation loss", title=title, log_x=True)
        from matplotlib.ticker import LogLocator, StrMethodFormatter

        # Powers of ten, and more where the rates span less than two: an axis needs more than one number.
        rates = [rate for line in lines.values() for rate in line[0]]
        axis = figure.axes[0].xaxis
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(rates) < 100 * min(rates) else (1,)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        figure.savefig(path)


def _draw_ranks(
    sweep: Sweep, module: ModuleType, results: Mapping[str, Any], path: Path, thresholds: Sequence[float]
) -> dict[str, Any]:
    curves, model = _curves(module, sweep.table.options, thresholds)
    analysis.plot_rank_curves(curves, path, f"Ranks of the query and value projections of {model}")
    return curves.to_dict()


def _curves(
    module: ModuleType, options: Mapping[str, Any], thresholds: Sequence[float]
) -> tuple[analysis.RankCurves, str]:
    """The curves of the options' model, and what it is called."""
    args = parse_options(module, options)[0]
    name = Path(args.model_name_or_path).name
    if args.model_name_or_path != recipe.SMOLLM2 and args.gguf_file is None:
        return analysis.rank_curves(args.model_name_or_path, thresholds), name
    model, _ = recipe.load_base(args.model_name_or_path, args.gguf_file, args.dtype)
    return analysis.rank_curves(model, thresholds), name


def _draw_correlation(
    sweep: Sweep,
    module: ModuleType,
    results: Mapping[str, Any],
    path: Path,
    group: str,
    y: str,
    ylabel: str,
    threshold: float,
) -> dict[str, Any] | None:
    rows = [row for row in results["rows"] if row["group"] == group and means(row, y)]
    if len(rows) < 3:
        return None
    scale = results["columns"][y].get("scale", 1)
    scores = {row["options"]["layers"]: statistics.mean(means(row, y)) * scale for row in rows}
    curves, _ = _curves(module, sweep.table.options, [threshold])
    correlation = analysis.rank_correlation(curves, scores)
    analysis.plot_correlation(
        correlation, ylabel, path, f"{group}, layers trained alone; k at threshold {threshold:g}"
    )
    return correlation.to_dict()


def _draw_routing(
    sweep: Sweep, module: ModuleType, results: Mapping[str, Any], path: Path, row: str
) -> dict[str, Any] | None:
    (chosen,) = select_rows(sweep.table, [row])
    if not sweep.is_complete(chosen):
        return None
    run = next(run for run in sweep.runs(chosen) if run.scored)
    if run.metrics_here() is None:
        # It was finished elsewhere, and its adapter is not here.
        return None
    args = parse_options(module, run.options)[0]
    model, tokenizer = recipe.load_base(args.model_name_or_path, args.gguf_file, args.dtype)
    SaraAdapter.load(model, run.folder)
    gates = {}
    data_dir = run.folder / "data" if args.demo and not args.data_dir else args.data_dir
    for name, ids in _first_questions(module, args, data_dir, tokenizer).items():
        batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        gates[name] = analysis.routing(model, batch)
    # One colour scale, so that the questions can be compared.
    highest = max(found.highest for found in gates.values())
    for name, found in gates.items():
        title = f"{chosen.label}: gates on the first question of {name}"
        analysis.plot_routing(found, path.with_name(f"{path.stem}-{slug(name)}.png"), title, highest)
    return {name: found.to_dict() for name, found in gates.items()}


def _first_questions(
    module: ModuleType, args: Any, data_dir: str | PathLike | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[int]]:
    """The token ids of the first prompt of each test set."""
    if module.__name__ == "run_e2e":
        return {"E2E": e2e.encode_prompts(tokenizer, [e2e.load_e2e(data_dir)["test"][0]["mr"]])[0]}
    task = module.make_task()
    data = task.load(data_dir, args.test_sets or task.test_sets)
    first = {name: records[0] for name, records in data.items() if name != "train"}
    prompts = {
        name: instruct.make_prompt(record["instruction"], record["input"], with_input=args.with_input)
        for name, record in first.items()
    }
    return {name: tokenizer(prompt)["input_ids"] for name, prompt in prompts.items()}


CAPTIONS = {
    "lines": "{ylabel} over {xlabel}",
    "tries": "the evaluation loss of every learning rate that was tried, with the first seed",
    "correlation": "{ylabel} of groups of layers over their mean rank k at threshold {threshold}",
    "ranks": "the rank k of every layer's projections at each threshold",
    "routing": "the gates of {row}, mean over the tokens of one question; a row per layer, a column per head",
}
FIGURES = {
    "lines": _draw_lines,
    "tries": _draw_tries,
    "correlation": _draw_correlation,
    "ranks": _draw_ranks,
    "routing": _draw_routing,
}


# ---- the page of results ----


def write_report(output_dir: str | PathLike, docs: str | PathLike) -> Path:
    """
    Write all results of a folder into the project's documentation: docs/results/NAME.json and the figures beside, and
    in docs/results.md a part for each table. What people wrote around these parts stays.

    Args:
        output_dir (`str` or `os.PathLike`): The folder of all tables.
        docs (`str` or `os.PathLike`): The folder of the documentation.

    Returns:
        `Path`: The page.

    Raises:
        [`~hf_sara.tasks.recipe.RecipeError`]: If there are no results, or an earlier report has runs of a table that
            these lack.
    """
    files = sorted(Path(output_dir).glob(f"*/{RESULTS_FILE}"))
    if not files:
        raise recipe.RecipeError(f"There are no results in {output_dir}. Run a table first.")
    page, folder = Path(docs, "results.md"), Path(docs, "results")
    folder.mkdir(parents=True, exist_ok=True)
    text = page.read_text(encoding="utf-8") if page.is_file() else HEADER
    for file in files:
        results = json.loads(file.read_text(encoding="utf-8"))
        name = results["name"]
        _check_nothing_is_lost(folder / f"{name}.json", results)
        recipe.write_json(folder / f"{name}.json", results)
        for path in [*file.parent.glob("*.png"), *file.parent.glob("*.json")]:
            if path.name != RESULTS_FILE:
                shutil.copyfile(path, folder / f"{name}-{path.name}")
        text = _put(text, name, _render_part(results, _images(results, folder)))
    write_file(page, text.encode())
    return page


def _check_nothing_is_lost(path: Path, results: Mapping[str, Any]) -> None:
    """Raise a [`~hf_sara.tasks.recipe.RecipeError`] if a report has runs that the results do not have."""
    before = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    there = [run["options"] for run in results["runs"]]
    lost = sum(run["options"] not in there for run in before)
    if lost:
        raise recipe.RecipeError(
            f"{path} has {lost} runs that {results['name']} does not have here. Run the table once more with --known "
            f"{path.parent}, which takes them over; or delete the file, if they are not the table's any more."
        )


def _render_part(results: Mapping[str, Any], images: Mapping[str, str]) -> str:
    name = results["name"]
    parts = [_render_head(results, "##"), render_table(results).strip()]
    for image, caption in images.items():
        parts += [f"![{caption}](results/{image})", f"*{caption}*"]
    # Baselines name PEFT's version beside the others.
    fullest = [one for one in results["versions"] if not any(one.items() < two.items() for two in results["versions"])]
    packages = [", ".join(f"{name} {version}" for name, version in found.items()) for found in fullest]
    ran = [f"On {'; '.join(results['hardware'])}."] if results["hardware"] else []
    ran += [f"With {'; '.join(packages)}."] if packages else []
    parts.append(" ".join([*ran, f"Every run: [results/{name}.json](results/{name}.json)."]))
    return "\n\n".join(parts)


def _images(results: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The captions of a table's images by their names, some perhaps of runs that were finished elsewhere."""
    captions = {}
    for figure, spec in results["figures"].items():
        caption = f"{results['title']}: {CAPTIONS[spec['kind']].format(**spec)}"
        stem = f"{results['name']}-{figure}"
        for path in [*folder.glob(f"{stem}.png"), *sorted(folder.glob(f"{stem}-*.png"))]:
            # One of several has a name behind the figure's.
            rest = path.stem.removeprefix(stem).strip("-")
            captions[path.name] = f"{caption} ({rest})." if rest else f"{caption}."
    return captions


def _put(text: str, name: str, part: str) -> str:
    """The text with a part between its marks, where they are, or at the end."""
    begin, end = BEGIN.format(name), END.format(name)
    block = f"{begin}\n\n{part}\n\n{end}"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if pattern.search(text):
        return pattern.sub(lambda _: block, text, count=1)
    return f"{text.rstrip()}\n\n{block}\n"
