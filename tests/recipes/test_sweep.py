import json
import math
import sys
import time
from dataclasses import replace

import pytest
import yaml
from recipe_scripts import FAKE
from sweeps import SMALL, calls, errors, make_sweep, run

from harness import report, results, tables
from harness.options import RecipeError
from harness.sweep import Sweep, check_rows, load_recipe, parse_options, read_overrides, read_records, without_paths
from harness.tables import Row

ON_UNIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals that kill")

# ---- recipes ----


def test_options_come_from_the_recipes_own_parser():
    module = load_recipe(FAKE)
    assert read_overrides(module, ["--size", "3", "--learning-rate", "1e-3"]) == {
        "size": 3,
        "learning_rate": 1e-3,
    }
    for argv, wrong in ((["--sizes", "3"], "--sizes 3"), (["--config", "x.yaml"], "--config"), (["more"], "more")):
        with pytest.raises(RecipeError, match=f"{wrong}: no option of run_paper or of the recipe fake_recipe"):
            read_overrides(module, argv)
    (options,) = parse_options(module, {"learning_rate": [0.5, 0.25], "seed": [7, 8], "size": 2})
    assert (options.learning_rate, options.seed, options.size) == (0.5, 7, 2)
    check_rows([Row("fine", options={"size": 1})], module)
    for wrong, message in (({"size": 0}, "size=0 has to be"), ({"sizes": 1}, "unknown options sizes")):
        with pytest.raises(RecipeError, match=f"fast B: .*{message}"):
            check_rows([Row("fine", options={}), Row("B", "fast", wrong)], module)
    with pytest.raises(RecipeError, match="There is no recipe"):
        load_recipe("nowhere.py")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("/data/e2e", "e2e"),
        ("~/e2e", "e2e"),
        ("./e2e", "e2e"),
        ("C:\\Users\\me\\e2e", "e2e"),
        ("D:/data/e2e", "e2e"),
        ("..\\e2e", "e2e"),
        ("\\\\server\\share\\e2e", "e2e"),
        ("me/model", "me/model"),
        ("https://a.b/c", "https://a.b/c"),
        (3, 3),
    ],
)
def test_a_report_has_no_paths_of_any_system(value, name):
    assert without_paths({"data_dir": value}) == {"data_dir": name}


def test_options_of_any_language_reach_the_recipe():
    (options,) = parse_options(load_recipe(FAKE), {"data_dir": "Données/数据"})
    assert options.data_dir == "Données/数据"


# ---- runs ----


def test_learning_rates_are_tried_then_seeds_run_at_the_best_one(tmp_path):
    sweep = make_sweep(tmp_path)
    a, b, _ = sweep.table.rows
    assert (sweep.count(a), sweep.count(b)) == (6, 1)
    # Before anything is known, there are the tries only.
    assert [run.folder.name for run in sweep.runs_of(a)] == [
        f"learning_rate-{rate}_seed-3" for rate in (0.1, 0.01, 0.001)
    ]
    assert sweep.best_rate(a) is None
    assert not sweep.is_complete(a)
    assert run(sweep) == ["A", "big B"]
    assert calls(sweep) == [
        "a/learning_rate-0.1_seed-3 0",
        "a/learning_rate-0.01_seed-3 0",
        "a/learning_rate-0.001_seed-3 0",
        "a/learning_rate-0.01_seed-3 5",
        "a/learning_rate-0.01_seed-4 0",
        "a/learning_rate-0.01_seed-5 0",
        "big-b/run 5",
    ]
    assert sweep.best_rate(a) == 0.01
    assert {rate: metrics["eval_loss"] for rate, metrics in sweep.tries(a).items()} == pytest.approx(
        {0.1: 2.03, 0.01: 1.03, 0.001: 2.03}
    )
    seeds = sweep.seeds(a)
    assert {seed: metrics.get("score") for seed, metrics in seeds.items()} == {3: 0.81, 4: None, 5: None}
    # The first seed was trained in one process and scored in another.
    assert [metrics["peak_memory_bytes"] for metrics in seeds.values()] == [3 * 10**9] * 3
    assert sweep.seeds(b)[None]["score"] == 0.54
    assert all(map(sweep.is_complete, (a, b)))
    assert not errors(sweep)
    # All of it is done.
    assert run(make_sweep(tmp_path)) == ["A", "big B"]
    assert calls(sweep) == []


def test_a_run_can_be_repeated_by_hand_and_leaves_its_log(tmp_path):
    sweep = make_sweep(tmp_path)
    run(sweep)
    folder = sweep.run_folder / "big-b"
    assert yaml.safe_load((folder / "run.yaml").read_text()) == {
        "size": 4,
        "output_dir": str(folder / "run"),
        "hub_model_id": "small-big-b",
    }
    assert (folder / "run.log").is_file()
    record = json.loads((folder / "run.scored.json").read_text())
    assert record["options"] == {"size": 4}
    assert record["metrics"] == json.loads((folder / "run" / "metrics.json").read_text())


def test_all_seeds_are_scored_unless_the_table_says_how_many(tmp_path):
    sweep = make_sweep(tmp_path, scored_seeds=None, rows=[{"name": "A", "options": {"seed": [1, 2]}}])
    run(sweep)
    assert calls(sweep) == ["a/seed-1 5", "a/seed-2 5"]
    assert [metrics["score"] for metrics in sweep.seeds(sweep.table.rows[0]).values()] == pytest.approx([0.61, 0.71])


def test_a_training_that_diverged_is_not_the_best(tmp_path):
    sweep = make_sweep(tmp_path, rows=[{"name": "A", "options": {"learning_rate": [2.0, 0.1]}}])
    run(sweep)
    assert math.isnan(sweep.tries(sweep.table.rows[0])[2.0]["eval_loss"])
    assert sweep.best_rate(sweep.table.rows[0]) == 0.1


def test_where_no_loss_is_a_number_no_learning_rate_is_the_best(tmp_path):
    sweep = make_sweep(tmp_path, rows=[{"name": "A", "options": {"learning_rate": [2.0, 3.0]}}])
    run(sweep)
    assert calls(sweep) == ["a/learning_rate-2.0 0", "a/learning_rate-3.0 0"]
    assert sweep.best_rate(sweep.table.rows[0]) is None
    assert not sweep.is_complete(sweep.table.rows[0])
    assert errors(sweep) == {"A": "The training diverged at each of its learning rates. Try smaller ones."}
    for tried in sweep.runs_of(sweep.table.rows[0]):
        tried.record.write_text(json.dumps({"options": tried.options, "metrics": {}}))
    assert "no evaluation loss to choose a learning rate by" in errors(sweep)["A"]


def test_a_try_that_is_no_different_from_the_run_is_not_run_twice(tmp_path):
    row = {"name": "A", "options": {"learning_rate": [0.1, 0.01], "max_test": 0}}
    sweep = make_sweep(tmp_path, rows=[row])
    run(sweep)
    assert calls(sweep) == ["a/learning_rate-0.1 0", "a/learning_rate-0.01 0"]
    assert sweep.is_complete(sweep.table.rows[0])


def test_another_row_or_rate_later_leaves_what_is_done(tmp_path):
    sweep = make_sweep(tmp_path)
    run(sweep)
    calls(sweep)
    rows = [dict(SMALL["rows"][0]), SMALL["rows"][1], {"name": "C", "options": {}}]
    rows[0]["options"] = {"learning_rate": [0.1, 0.01, 0.001, 0.02], "seed": [3, 4, 5]}
    sweep = make_sweep(tmp_path, rows=rows)
    run(sweep)
    assert calls(sweep) == ["a/learning_rate-0.02_seed-3 0", "c/run 5"]


def test_what_was_run_with_other_options_does_not_count(tmp_path):
    run(make_sweep(tmp_path))
    sweep = make_sweep(tmp_path)
    sweep.table = tables.override(sweep.table, {"size": 3})
    assert sweep.seeds(sweep.table.rows[1]) == {}
    assert not sweep.is_complete(sweep.table.rows[1])
    calls(sweep)
    run(sweep)
    assert len(calls(sweep)) == 7


def test_what_was_finished_elsewhere_is_not_run_again(tmp_path):
    options = {"learning_rate": [2.0, 0.1, 0.01], "seed": [3, 4], "data_dir": str(tmp_path / "here" / "data")}
    rows = [{"name": "A", "options": options}]
    first = make_sweep(tmp_path / "first", rows=rows)
    first_runs = first.runs_of(first.table.rows[0])
    for sought in (2.0, 0.1):
        tried = next(first_runs)
        assert tried.options["learning_rate"] == sought
        first.start(tried)
    results.write_results(first, {})
    report.write_report(first.folder.parent, tmp_path / "docs")
    records = read_records(tmp_path / "docs" / "results")
    # JSON has no word for the loss of the one that diverged.
    assert [record["metrics"]["eval_loss"] for record in records] == [None, pytest.approx(2.03)]

    options["data_dir"] = "/elsewhere/data"
    second = make_sweep(tmp_path / "second", known=records, rows=rows)
    (row,) = second.table.rows
    run(second)
    assert calls(second) == [
        "a/learning_rate-0.01_seed-3 0",
        "a/learning_rate-0.01_seed-3 5",
        "a/learning_rate-0.01_seed-4 0",
    ]
    assert second.is_complete(row)
    # Its own report has all of it, so that a third machine can go on.
    results.write_results(second, {})
    report.write_report(second.folder.parent, tmp_path / "docs")
    third = make_sweep(tmp_path / "third", known=read_records(tmp_path / "docs" / "results"), rows=rows)
    run(third)
    assert calls(third) == []
    assert third.best_rate(row) == 0.01
    assert results.collect(third, {}) == results.collect(second, {})
    # Other options are other runs, and so are those of another recipe.
    table = third.table
    third.table = tables.override(table, {"data_dir": "/elsewhere/other"})
    assert not any(third.tries(third.table.rows[0]).values())
    third.table = replace(table, recipe="another_recipe")
    assert not any(third.tries(third.table.rows[0]).values())


def test_where_nothing_was_reported_nothing_is_known(tmp_path):
    (tmp_path / "small-figure.json").write_text("{}")
    with pytest.raises(RecipeError, match="no results in"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("how", "message"),
    [("raise", "ValueError: it is broken"), pytest.param("kill", "killed by SIGKILL", marks=ON_UNIX)],
)
def test_a_failed_row_leaves_the_others_and_is_finished_by_a_second_call(how, message, tmp_path):
    switch = tmp_path / "switch"
    switch.write_text(how)
    rows = [
        {"name": "A", "options": {"breaks": str(switch), "learning_rate": [0.1, 0.01]}},
        {"name": "B", "options": {}},
    ]
    sweep = make_sweep(tmp_path, rows=rows)
    assert run(sweep) == ["A", "B"]
    assert list(errors(sweep)) == ["A"]
    assert message in errors(sweep)["A"]
    # Without its tries there is no best one to go on with.
    assert calls(sweep) == ["a/learning_rate-0.1 0", "a/learning_rate-0.01 0", "b/run 5"]
    assert [sweep.is_complete(row) for row in sweep.table.rows] == [False, True]
    switch.unlink()
    # Another process still knows of it, and that it says nothing of other options.
    sweep = make_sweep(tmp_path, rows=rows)
    assert message in errors(sweep)["A"]
    other = make_sweep(tmp_path, rows=rows)
    other.table = tables.override(other.table, {"size": 2})
    assert not errors(other)
    run(sweep)
    assert not errors(sweep)
    assert calls(sweep) == ["a/learning_rate-0.1 0", "a/learning_rate-0.01 0", "a/learning_rate-0.01 5"]
    assert all(map(sweep.is_complete, sweep.table.rows))


def test_a_failed_try_leaves_the_other_tries(tmp_path):
    sweep = make_sweep(tmp_path)
    row = sweep.table.rows[0]
    blocked = sweep.run_folder / "a" / "learning_rate-0.1_seed-3"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where the run's folder has to be")
    run(sweep)
    assert list(errors(sweep)) == ["A"]
    assert [rate for rate, metrics in sweep.tries(row).items() if metrics] == [0.01, 0.001]
    assert sweep.best_rate(row) is None
    assert sweep.seeds(row) == {}
    calls(sweep)
    blocked.unlink()
    sweep = make_sweep(tmp_path)
    run(sweep)
    assert len(calls(sweep)) == 4
    assert sweep.is_complete(row)


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch):
    sweep = make_sweep(tmp_path)
    start = Sweep.start

    def interrupted(self, run):
        if run.folder.name == "learning_rate-0.01_seed-4":
            raise KeyboardInterrupt
        start(self, run)

    monkeypatch.setattr(Sweep, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(sweep)
    assert len(calls(sweep)) == 4
    monkeypatch.setattr(Sweep, "start", start)
    run(sweep)
    assert calls(sweep) == ["a/learning_rate-0.01_seed-4 0", "a/learning_rate-0.01_seed-5 0", "big-b/run 5"]


def test_no_run_begins_after_the_deadline(tmp_path):
    sweep = make_sweep(tmp_path)
    assert run(sweep, deadline=time.monotonic()) == ["A", "big B"]
    assert calls(sweep) == []
    assert not errors(sweep)
