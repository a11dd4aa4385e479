import json
from pathlib import Path

import numpy as np
import pytest
from conftest import attach_trained, make_model, make_tokenizer
from recipe_scripts import FAKE, RECIPES
from sweeps import COLUMNS, SMALL, finished_sweep, make_sweep, run

from harness import plots, results
from harness.base_models import load_base
from harness.demo_data import make_demo_data, make_math_demo_data
from harness.figures import _draw_lines, check_figures, draw_figures
from harness.options import RecipeError
from harness.run_folder import write_json
from harness.sweep import Sweep, load_recipe, without_paths
from hf_sara import analysis
from hf_sara.tasks import instruct


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Sweep:
    return finished_sweep(tmp_path_factory.mktemp("sweep"))


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., :3]


def drawn(sweep: Sweep, module, failing=()) -> list[str]:
    """The figures of a sweep, drawn, none of them blank."""
    pytest.importorskip("matplotlib")
    sweep.folder.mkdir(parents=True, exist_ok=True)
    assert list(draw_figures(sweep, module, results.collect(sweep, {}))) == list(failing)
    names = sorted(path.name for path in sweep.folder.glob("*.png"))
    for name in names:
        image = pixels(sweep.folder / name)
        assert (image != image[0, 0]).any(axis=-1).mean() > 0.01, name
    return names


@pytest.fixture
def lines(monkeypatch):
    """What is drawn as lines."""
    seen, plot = [], plots.plot_lines

    def record(*args, **kwargs):
        figure = plot(*args, **kwargs)
        seen.append((args, figure))
        return figure

    monkeypatch.setattr(plots, "plot_lines", record)
    return seen


def test_scores_are_drawn_over_an_option_with_a_line_per_group_and_the_papers(tmp_path, lines):
    rows = [
        {"group": "one", "name": "1", "options": {"size": 1}, "paper": {"score": 55.5}},
        {"group": "one", "name": "2", "options": {"size": 2}, "paper": {}},
        {"group": "two", "name": "3", "options": {"size": 3}, "x": 1.5},
        {"group": "two", "name": "not run", "options": {"size": 4, "breaks": str(tmp_path)}},
    ]
    spec = {"kind": "lines", "x": "size", "y": "score", "xlabel": "size", "ylabel": "score (%)"}
    sweep = make_sweep(tmp_path, rows=rows, columns=COLUMNS, figures={"figure": spec})
    for _ in sweep.run(sweep.table.rows[:3]):
        pass
    assert drawn(sweep, load_recipe(FAKE)) == ["figure.png"]
    series, xlabel, ylabel = lines[0][0][:3]
    assert lines[0][0][6:] == ([], None)
    assert (xlabel, ylabel) == ("size", "score (%)")
    expected = {"one": ((1, 2), (51.0, 52.0)), "one paper": ((1,), (55.5,)), "two": ((1.5,), (53.0,))}
    assert {name: (x, pytest.approx(y)) for name, (x, y) in series.items()} == expected


def test_texts_on_the_axis_are_in_the_order_of_the_rows(tmp_path, lines):
    rows = [
        {"group": group, "name": layers, "options": {"layers": layers}}
        for group in ("one", "two")
        for layers in ("0-1", "2-3")
    ]
    spec = {"kind": "lines", "x": "layers", "y": "score", "xlabel": "layers", "ylabel": "score (%)"}
    sweep = make_sweep(tmp_path, rows=rows, figures={"figure": spec})
    for _ in sweep.run(sweep.table.rows[1:]):
        pass
    assert drawn(sweep, load_recipe(FAKE)) == ["figure.png"]
    assert lines[0][0][6:] == (["0-1", "2-3"], None)


def test_scores_are_drawn_over_a_metric(done, tmp_path, lines):
    spec = {"kind": "lines", "x": "trained_parameters", "y": "score", "xlabel": "parameters", "ylabel": "score (%)"}
    found = results.collect(done, {})
    _draw_lines(done, None, found, tmp_path / "a.png", **{k: v for k, v in spec.items() if k != "kind"})
    assert lines[0][0][0]["measured"] == ((1000,), pytest.approx((81.0,)))
    # What the place on the axis does not say.
    assert lines[0][0][6:] == ([], {"measured": ["A"], "big": ["B"]})


def test_losses_are_drawn_over_learning_rates(done, tmp_path, lines):
    rows = [{"name": "A", "options": {"learning_rate": [0.001, 2.0, 0.1, 0.01]}}, SMALL["rows"][1]]
    sweep = make_sweep(tmp_path, rows=rows, figures={"rates": {"kind": "tries"}})
    assert drawn(sweep, load_recipe(FAKE)) == []
    run(sweep)
    assert drawn(sweep, load_recipe(FAKE)) == ["rates.png"]
    ((series, xlabel, ylabel), figure) = lines[0]
    # From small to large, without the one that diverged, and without rows that tried nothing.
    assert series == {"A": ((0.001, 0.01, 0.1), pytest.approx((2.0, 1.0, 2.0)))}
    assert (xlabel, ylabel) == ("learning rate", "evaluation loss")
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    figure.canvas.draw()
    labels = {label.get_text() for label in axes.get_xticklabels()}
    assert {"0.001", "0.01", "0.1"} <= labels


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny Llama of four layers with a tokenizer of its own, in a folder."""
    data = make_demo_data(tmp_path_factory.mktemp("data"))
    tokenizer = make_tokenizer((data / "train.txt").read_text().splitlines(), size=500)
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"num_hidden_layers": 4, "max_position_embeddings": 512}
    make_model("llama", vocab_size=len(tokenizer), eos_token_id=0, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_ranks_and_their_correlation_are_drawn(base, tmp_path):
    rows = [{"group": "SARA", "name": f"{layer}", "options": {"layers": f"{layer}"}} for layer in range(4)]
    rows += [{"group": "other", "name": "4", "options": {"layers": "0"}}]
    figures = {
        "ranks": {"kind": "ranks", "thresholds": [0.2, 0.6]},
        "correlation": {"kind": "correlation", "group": "SARA", "y": "score", "ylabel": "score", "threshold": 0.6},
    }
    sweep = make_sweep(tmp_path, rows=rows, figures=figures, options={"model_name_or_path": str(base)})
    module = load_recipe(FAKE)
    assert drawn(sweep, module) == ["ranks.png"]
    assert json.loads((sweep.folder / "ranks.json").read_text()) == analysis.rank_curves(base, [0.2, 0.6]).to_dict()
    run(sweep)
    assert drawn(sweep, module) == ["correlation.png", "ranks.png"]
    found = json.loads((sweep.folder / "correlation.json").read_text())
    means = analysis.rank_curves(base, [0.6]).mean_ranks(0.6)
    assert found["groups"] == ["0", "1", "2", "3"]
    assert found["ranks"] == list(means.values())
    assert found["scores"] == pytest.approx([51.0] * 4)


@pytest.mark.parametrize("recipe", ["run_e2e", "run_math"])
def test_the_gates_of_a_trained_row_are_drawn_for_each_test_set(recipe, base, tmp_path, monkeypatch):
    data = make_demo_data(tmp_path / "data") if recipe == "run_e2e" else make_math_demo_data(tmp_path / "data")
    options = {"method": "mo_sara", "num_heads": 3, "model_name_or_path": str(base), "data_dir": str(data)}
    options |= {} if recipe == "run_e2e" else {"test_sets": ["AddSub", "AQuA"]}
    sweep = make_sweep(
        tmp_path,
        recipe=recipe,
        rows=[{"name": "Mo-SARA", "options": options}],
        figures={"routing": {"kind": "routing", "row": "Mo-SARA"}},
    )
    module = load_recipe(RECIPES / f"{recipe}.py")
    assert drawn(sweep, module) == []
    # The run, without its training.
    (entry,) = sweep.runs_of(sweep.table.rows[0])
    model, tokenizer = load_base(str(base))
    attach_trained(model, "mo_sara").save_pretrained(entry.folder)
    write_json(entry.record, {"options": entry.options, "metrics": {"score": 1.0}})
    sets = {"run_e2e": ["E2E"], "run_math": ["AddSub", "AQuA"]}[recipe]
    seen, plot = [], analysis.plot_routing
    monkeypatch.setattr(analysis, "plot_routing", lambda *args: seen.append(args) or plot(*args))
    assert drawn(sweep, module) == sorted(f"routing-{name.lower()}.png" for name in sets)
    found = json.loads((sweep.folder / "routing.json").read_text())
    assert list(found) == sets
    scales = [highest for *_, highest in seen]
    assert scales == [max(analysis.Routing(**gates).highest for gates in found.values())] * len(sets)
    # Of a run that was finished elsewhere, another one's adapter that lies here says nothing.
    seen.clear()
    entry.record.unlink()
    sweep.known = [{"recipe": recipe, "options": without_paths(entry.options), "metrics": {"score": 1.0}}]
    assert sweep.is_complete(sweep.table.rows[0])
    drawn(sweep, module)
    assert not seen
    if recipe == "run_math":
        question = json.loads((data / "math" / "test" / "AddSub.json").read_text())[0]["instruction"]
        batch = tokenizer(instruct.make_prompt(question), return_tensors="pt")
        assert found["AddSub"] == analysis.routing(model, batch).to_dict()
        assert found["AddSub"] != found["AQuA"]


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        ({"kind": "pie"}, "The figure one has kind 'pie'. Choose from lines, tries"),
        ({}, "has kind None"),
        (["tries"], "has kind None"),
        ({"kind": "ranks"}, "of kind 'ranks': missing a required argument: 'thresholds'"),
        ({"kind": "tries", "x": 3}, "unexpected keyword argument 'x'"),
        ({"kind": "routing", "row": "Mo-SARA"}, "has no row mo-sara to run"),
    ],
)
def test_a_figure_that_cannot_be_drawn_is_refused_before_the_runs(figure, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        check_figures(make_sweep(tmp_path, figures={"one": figure}).table)


def test_a_figure_that_fails_is_noted_and_leaves_the_others(tmp_path):
    figures = {
        "ranks": {"kind": "ranks", "thresholds": [0.5]},
        "rates": {"kind": "tries"},
    }
    sweep = make_sweep(tmp_path, figures=figures, options={"model_name_or_path": str(tmp_path / "nowhere")})
    run(sweep)
    module = load_recipe(FAKE)
    failed = draw_figures(sweep, module, results.collect(sweep, {}))
    assert list(failed) == ["ranks"]
    assert "nowhere" in failed["ranks"]
    assert drawn(sweep, module, failing=["ranks"]) == ["rates.png"]
