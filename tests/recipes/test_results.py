import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import attach_trained, make_model, make_tokenizer
from recipe_scripts import FAKE, RECIPES
from test_sweep import SMALL, make_sweep, run

from harness import plots, report, results, tables
from harness import sweep as sweeps
from harness.base_models import load_base
from harness.demo_data import make_demo_data, make_math_demo_data
from harness.figures import _draw_lines, check_figures, draw_figures
from harness.options import RecipeError
from harness.run_folder import write_json
from harness.sweep import Sweep
from hf_sara import analysis
from hf_sara.tasks import instruct

COLUMNS = {
    "trained_parameters": {"title": "parameters", "format": ",.0f"},
    "eval_loss": {"title": "loss", "format": ".2f"},
    **SMALL["columns"],
}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Sweep:
    """A finished sweep of the fake recipe."""
    figures = {"rates": {"kind": "tries"}}
    sweep = make_sweep(
        tmp_path_factory.mktemp("sweep"), columns=COLUMNS, notes="What one has to know.", figures=figures
    )
    run(sweep)
    return sweep


# ---- results and tables ----


def test_results_hold_every_run_beside_the_papers_numbers(done):
    found = results.collect(done, {})
    a, b, printed = found["rows"]
    assert [row["state"] for row in found["rows"]] == ["complete", "complete", "printed"]
    assert [entry["learning_rate"] for entry in a["tries"]] == [0.1, 0.01, 0.001]
    assert a["learning_rate"] == 0.01
    assert [entry["seed"] for entry in a["seeds"]] == [3, 4, 5]
    assert a["options"]["learning_rate"] == [0.1, 0.01, 0.001]
    assert results.seed_values(a, "score") == [0.81]
    assert results.seed_values(a, "eval_loss") == pytest.approx([1.03, 1.04, 1.05])
    assert (a["paper"], b["paper"], printed["paper"]) == ({"score": 77.7}, {}, {"score": 11})
    assert (b["group"], b["tries"], b["error"]) == ("big", [], None)
    # What the runs ran on, each once.
    assert found["hardware"] == ["a machine"]
    assert found["versions"] == [{"torch": "1.0"}]


def test_the_table_stands_beside_the_papers(done):
    assert results.render_table(results.collect(done, {})) == (
        "|  |  | parameters | loss | score | seeds |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "|  | A | 1,000 | 1.04 ± 0.01 | 81.0 | 3 |\n"
        "|  | A (paper) | - | - | 77.7 | - |\n"
        "| big | B | 4,000 | 4.00 | 54.0 | 1 |\n"
        "| big | B (paper) | - | - | - | - |\n"
        "|  | printed (paper) | - | - | 11 | - |\n"
        "\n"
        # The parameters are a column already, and this recipe says no more of its costs.
        "|  |  | memory (GB) |\n"
        "| --- | --- | --- |\n"
        "|  | A | 3.00 |\n"
        "| big | B | 2.00 |\n"
        "\n"
        "|  |  | learning rate: evaluation loss | learning rate: evaluation loss | learning rate: evaluation loss |\n"
        "| --- | --- | --- | --- | --- |\n"
        "|  | A | 0.1: 2.030 | **0.01: 1.030** | 0.001: 2.030 |\n"
    )


def test_a_table_says_what_is_missing(tmp_path):
    switch = tmp_path / "switch"
    switch.write_text("raise")
    rows = [
        {"name": "A", "options": {"breaks": str(switch)}},
        {"name": "B", "options": {"learning_rate": [2.0, 0.1]}},
        {"name": "C", "options": {}},
    ]
    sweep = make_sweep(tmp_path, rows=rows)
    for _ in sweep.run(sweep.table.rows[:2]):
        pass
    # B's scored run is lost.
    next(sweep.run_folder.glob("b/*.scored.json")).unlink()
    found = results.write_results(sweep, {})
    assert (sweep.folder / "table.md").read_text() == (
        "# A table\n"
        "\n"
        "```bash\n"
        "python recipes/run_paper.py small\n"
        "```\n"
        "\n"
        "|  | score |\n"
        "| --- | --- |\n"
        "| A | - |\n"
        "| B | - |\n"
        "| C | - |\n"
        "\n"
        "|  | learning rate: evaluation loss | learning rate: evaluation loss |\n"
        "| --- | --- | --- |\n"
        "| B | 2: - | **0.1: 2.000** |\n"
        "\n"
        "Not finished yet: B; C.\n"
        "\n"
        "Failed: A: ValueError: it is broken\n"
    )
    assert found["rows"][0]["error"] == "ValueError: it is broken"
    # Of a file, its name alone.
    (failed,) = sweep.runs_of(sweep.table.rows[0])
    error = f"No '{tmp_path}/x.txt', see https://a/b"
    write_json(failed.beside("error.json"), {"options": failed.options, "error": error})
    assert results.collect(sweep, {})["rows"][0]["error"] == "No 'x.txt', see https://a/b"
    # A loss that is no number is none in JSON.
    assert "NaN" not in (sweep.folder / "results.json").read_text()
    assert json.loads((sweep.folder / "results.json").read_text()) == found


def test_the_command_and_the_options_have_no_path_of_the_machine(tmp_path):
    given = {"data_dir": str(tmp_path / "data"), "model_name_or_path": "org/model", "size": 3, "names": ["a", "b"]}
    sweep = make_sweep(tmp_path)
    sweep.table = tables.override(sweep.table, given)
    found = results.collect(sweep, given)
    assert found["command"] == (
        "python recipes/run_paper.py small --data_dir data --model_name_or_path org/model --size 3 --names a b"
    )
    assert found["rows"][0]["options"]["data_dir"] == "data"
    assert found["rows"][0]["options"]["model_name_or_path"] == "org/model"
    assert str(tmp_path) not in json.dumps(found)


# ---- figures ----


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
    assert drawn(sweep, sweeps.load_recipe(FAKE)) == ["figure.png"]
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
    assert drawn(sweep, sweeps.load_recipe(FAKE)) == ["figure.png"]
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
    assert drawn(sweep, sweeps.load_recipe(FAKE)) == []
    run(sweep)
    assert drawn(sweep, sweeps.load_recipe(FAKE)) == ["rates.png"]
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
    module = sweeps.load_recipe(FAKE)
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
    module = sweeps.load_recipe(RECIPES / f"{recipe}.py")
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
    sweep.known = [{"recipe": recipe, "options": sweeps.without_paths(entry.options), "metrics": {"score": 1.0}}]
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
    ],
)
def test_a_figure_that_cannot_be_drawn_is_refused_before_the_runs(figure, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        check_figures(make_sweep(tmp_path, figures={"one": figure}).table)


@pytest.mark.parametrize("name", tables.table_names(RECIPES / "paper"))
def test_the_figures_of_the_project_can_be_drawn(name):
    check_figures(tables.load_table(RECIPES / "paper" / f"{name}.yaml"))


def test_a_figure_that_fails_is_noted_and_leaves_the_others(tmp_path):
    figures = {
        "ranks": {"kind": "ranks", "thresholds": [0.5]},
        "rates": {"kind": "tries"},
    }
    sweep = make_sweep(tmp_path, figures=figures, options={"model_name_or_path": str(tmp_path / "nowhere")})
    run(sweep)
    module = sweeps.load_recipe(FAKE)
    failed = draw_figures(sweep, module, results.collect(sweep, {}))
    assert list(failed) == ["ranks"]
    assert "nowhere" in failed["ranks"]
    assert drawn(sweep, module, failing=["ranks"]) == ["rates.png"]


# ---- the page of results ----


def test_the_page_of_results_has_every_table_and_keeps_what_people_wrote(done, tmp_path):
    output = done.folder.parent
    results.write_results(done, {"data_dir": "/somewhere/e2e"})
    (done.folder / "ranks.json").write_text("{}")
    (done.folder / "rates.png").write_bytes(b"an image")
    other = results.collect(done, {})
    (output / "later").mkdir(exist_ok=True)
    (output / "later" / "results.json").write_text(json.dumps({**other, "name": "later", "title": "Later"}))

    page = report.write_report(output, tmp_path / "docs")
    assert page == tmp_path / "docs" / "results.md"
    text = page.read_text()
    assert text.startswith("# Results\n")
    assert re.findall("^## .*", text, re.M) == ["## Later", "## A table"]
    for part in (
        "What one has to know.",
        "run_paper.py small --data_dir e2e\n",
        "| big | B | 4,000 | 4.00 | 54.0 | 1 |",
    ):
        assert part in text
    caption = "A table: the evaluation loss of every learning rate that was tried, with the first seed."
    assert f"![{caption}](results/small-rates.png)\n\n*{caption}*" in text
    assert "On a machine. With torch 1.0. Every run: [results/small.json](results/small.json)." in text
    files = {path.name: path.read_bytes() for path in (tmp_path / "docs" / "results").iterdir()}
    assert set(files) == {"later.json", "small.json", "small-ranks.json", "small-rates.png"}
    assert files["small-rates.png"] == b"an image"
    assert json.loads(files["small.json"])["rows"] == other["rows"]
    assert b"/somewhere" not in b"".join(files.values())
    assert "/somewhere" not in text

    # A report that has runs which are not here is kept.
    fuller = json.loads(files["small.json"])
    fuller["runs"].append({"recipe": "fake_recipe", "options": {"size": 9}, "metrics": {}})
    write_json(tmp_path / "docs" / "results" / "small.json", fuller)
    with pytest.raises(RecipeError, match=r"has 1 runs that small does not have here.*--known"):
        report.write_report(output, tmp_path / "docs")
    write_json(tmp_path / "docs" / "results" / "small.json", json.loads(files["small.json"]))
    # Another table's images, and those of a figure that is no longer drawn, are none of the table's.
    for image in ("small-two-rates.png", "small-old.png"):
        (tmp_path / "docs" / "results" / image).write_bytes(b"an image")
    report.write_report(output, tmp_path / "docs")
    assert page.read_text() == text

    # A person reorders and writes; the next report only replaces the parts.
    first, second = (
        re.search(f"<!-- {name}: .*?<!-- {name}: [^>]*>", text, re.S).group() for name in ("small", "later")
    )
    page.write_text(f"# Ours\n\n{first.replace('54.0', '0.0')}\n\nB wins.\n\n{second}\n\nThe end.\n")
    report.write_report(output, tmp_path / "docs")
    assert page.read_text() == f"# Ours\n\n{first}\n\nB wins.\n\n{second}\n\nThe end.\n"


def test_without_results_there_is_nothing_to_report(tmp_path):
    with pytest.raises(RecipeError, match="no results in"):
        report.write_report(tmp_path, tmp_path / "docs")
    assert not (tmp_path / "docs").exists()
