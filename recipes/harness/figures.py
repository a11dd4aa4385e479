"""The figures of a table."""

import inspect
import logging
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from hf_sara import analysis
from hf_sara.adapter import SaraAdapter

from . import plots
from .base_models import SMOLLM2, load_base
from .options import RecipeError
from .results import label_of, seed_values
from .run_folder import write_json
from .sweep import CRITERION, Sweep, parse_options
from .tables import Table, select_rows, slug

logger = logging.getLogger(__name__)


def draw_figures(sweep: Sweep, module: ModuleType, results: Mapping[str, Any]) -> dict[str, str]:
    """
    Draw the figures of a table into its folder as NAME.png, as far as the runs that they need are finished. A figure
    of other data than the rows' metrics also writes these data into NAME.json. If one figure fails, the others are
    drawn. The `kind` of a figure is one of these:

    - `lines`: the metric `y` over `x`, with a line per group and another for the numbers that the paper prints. The
      place of a row on the x axis is its own `x`, an option or a metric.
    - `tries`: the evaluation loss over the learning rates, with a line per row.
    - `correlation`: the metric `y` of the rows of `group`, which train some layers each, over the mean rank of these
      layers at `threshold` (paper, Figures 2 and 3).
    - `ranks`: the rank of every site at `thresholds` (paper, Figures 2 and 8).
    - `routing`: the gates of a row's Mo-SARA on the first question of each test set (paper, Figure 7, appendix D).
      Each test set has a file of its own, NAME-SET.png.

    Args:
        sweep ([`~harness.sweep.Sweep`]): The table's runs.
        module (`ModuleType`): The recipe.
        results (`Mapping[str, Any]`): The results from [`~harness.results.collect`].

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
            # The message of these errors is enough. Any other error is a bug, and shows its trace.
            expected = isinstance(error, (ValueError, OSError, ImportError))
            logger.error("The figure %s failed: %s", name, error, exc_info=not expected)
        else:
            if data is not None:
                write_json(path.with_suffix(".json"), data)
    return failed


def check_figures(table: Table) -> None:
    """
    Check before hours of running whether a table's figures can be drawn.

    Raises:
        [`~harness.options.RecipeError`]: If a figure has an unknown `kind`, or lacks what its kind needs.
    """
    for name, spec in table.figures.items():
        kind = spec.get("kind") if isinstance(spec, dict) else None
        if kind not in FIGURES:
            raise RecipeError(f"The figure {name} has kind {kind!r}. Choose from {', '.join(FIGURES)}.")
        try:
            # A table gives all arguments of the function but the first four.
            inspect.signature(FIGURES[kind]).bind(*[None] * 4, **{key: spec[key] for key in spec if key != "kind"})
        except TypeError as error:
            raise RecipeError(f"The figure {name}, of kind {kind!r}: {error}.") from error
        if "row" in spec and len(select_rows(table, [str(spec["row"])])) > 1:
            raise RecipeError(f"The figure {name} is of one row, and {spec['row']} is the name of several.")


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
        values, place = seed_values(row, y), _place(row, x)
        if values and place is not None:
            series[row["group"] or "measured"].append((place, statistics.mean(values) * scale))
            names[row["group"] or "measured"].append(row["name"])
        if y in printed and printed.get(x, place) is not None:
            series[f"{row['group'] or ''} paper".strip()].append((printed.get(x, place), printed[y]))
    if series:
        lines = {name: tuple(zip(*points, strict=True)) for name, points in series.items()}
        places = [_place(row, x) for row in results["rows"]]
        # Texts on the x axis are in the order of the rows, also if some rows are not run yet. Where a metric is on the
        # x axis, a point's place does not say which row it is, so its name is written beside it.
        texts = list(dict.fromkeys(place for place in places if isinstance(place, str)))
        named = not any(row["x"] is not None or x in row.get("options", {}) for row in results["rows"])
        plots.plot_lines(lines, xlabel, ylabel, path, results["title"], log_x, texts, names if named else None)


def _place(row: Mapping[str, Any], x: str) -> Any:
    if row["x"] is not None:
        return row["x"]
    if x in row.get("options", {}):
        return row["options"][x]
    values = seed_values(row, x)
    return statistics.mean(values) if values else None


def _draw_tries(sweep: Sweep, module: ModuleType, results: Mapping[str, Any], path: Path) -> None:
    lines = {}
    for row in results["rows"]:
        losses = ((entry["learning_rate"], entry["metrics"].get(CRITERION)) for entry in row.get("tries", ()))
        points = sorted((rate, loss) for rate, loss in losses if loss is not None)
        if points:
            lines[label_of(row)] = tuple(zip(*points, strict=True))
    if lines:
        title = f"{results['title']}: learning rates"
        figure = plots.plot_lines(lines, "learning rate", "evaluation loss", title=title, log_x=True)
        from matplotlib.ticker import LogLocator, StrMethodFormatter

        # The axis shows powers of ten. If the rates span less than a factor of 100, it shows more numbers, since one
        # number alone is not enough to read values.
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
    """The curves of the model that the options name, and its name."""
    args = parse_options(module, options)[0]
    name = Path(args.model_name_or_path).name
    if args.model_name_or_path != SMOLLM2 and args.gguf_file is None:
        return analysis.rank_curves(args.model_name_or_path, thresholds), name
    model, _ = load_base(args.model_name_or_path, args.gguf_file, args.dtype)
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
    rows = [row for row in results["rows"] if row["group"] == group and seed_values(row, y)]
    if len(rows) < 3:
        return None
    scale = results["columns"][y].get("scale", 1)
    scores = {row["options"]["layers"]: statistics.mean(seed_values(row, y)) * scale for row in rows}
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
    run = next(run for run in sweep.runs_of(chosen) if run.scored)
    if run.metrics_here() is None:
        # The run was finished elsewhere, so its adapter is not here.
        return None
    args = parse_options(module, run.options)[0]
    model, tokenizer = load_base(args.model_name_or_path, args.gguf_file, args.dtype)
    SaraAdapter.load(model, run.folder)
    gates = {}
    data_dir = run.folder / "data" if args.demo and not args.data_dir else args.data_dir
    for name, ids in module.make_task().first_prompts(args, data_dir, tokenizer).items():
        batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        gates[name] = analysis.routing(model, batch)
    # All questions share one colour scale, so that they can be compared.
    highest = max(found.highest for found in gates.values())
    for name, found in gates.items():
        title = f"{chosen.label}: gates on the first question of {name}"
        analysis.plot_routing(found, path.with_name(f"{path.stem}-{slug(name)}.png"), title, highest)
    return {name: found.to_dict() for name, found in gates.items()}


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
