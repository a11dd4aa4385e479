"""The recipe of the paper's tables as a user runs it, on a recipe of no time; real runs that are scored later."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import make_model, make_tokenizer
from recipe_scripts import FAKE, RECIPES, load

from harness.demo_data import make_demo_data, make_math_demo_data
from harness.sweep import Sweep

TABLE = {
    "title": "A table",
    "recipe": "fake_recipe",
    "tries": {"max_test": 0},
    "columns": {"score": {"title": "score", "scale": 100, "format": ".1f"}},
    "rows": [
        {"name": "A", "options": {"learning_rate": [0.1, 0.01]}, "paper": {"score": 77.7}},
        {"name": "B", "options": {}},
    ],
    "figures": {"figure": {"kind": "tries"}},
}


@pytest.fixture
def run_paper(tmp_path, monkeypatch):
    """The recipe's `main`, with the tables and recipes of a folder of the test's."""
    pytest.importorskip("matplotlib")
    recipes = tmp_path / "recipes"
    (recipes / "paper").mkdir(parents=True)
    shutil.copy(FAKE, recipes)
    (recipes / "paper" / "small.yaml").write_text(yaml.safe_dump(TABLE, sort_keys=False))
    module = load("run_paper")
    monkeypatch.setattr(module, "RECIPES", recipes)
    monkeypatch.chdir(tmp_path)
    return module.main


def wait_for(condition, seconds=60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def results() -> dict[str, dict]:
    return {row["name"]: row for row in json.loads(Path("runs/paper/small/results.json").read_text())["rows"]}


def test_a_table_is_run_written_and_drawn(run_paper, capsys):
    assert run_paper(["small", "--size", "2"]) == 0
    folder = Path("runs/paper/small")
    table = (folder / "table.md").read_text()
    assert "| A | 52.0 |\n| A (paper) | 77.7 |\n| B | 52.0 |" in table
    assert capsys.readouterr().out == table
    assert {row["state"] for row in results().values()} == {"complete"}
    assert (folder / "figure.png").is_file()
    # By its path it is the same, and done.
    before = Path("runs/paper/small/runs/calls.txt").read_text()
    assert run_paper(["recipes/paper/small.yaml", "--size", "2"]) == 0
    assert Path("runs/paper/small/runs/calls.txt").read_text() == before


def test_some_rows_only_leave_the_others_as_they_are(run_paper):
    assert run_paper(["small", "--rows", "b"]) == 0
    assert {name: row["state"] for name, row in results().items()} == {"A": "incomplete", "B": "complete"}
    assert run_paper(["small", "--rows", "A,B", "--output_dir", "elsewhere"]) == 0
    assert run_paper(["small", "--rows", "A"]) == 0
    assert {name: row["state"] for name, row in results().items()} == {"A": "complete", "B": "complete"}


def test_a_failed_row_is_named_and_the_exit_code_is_1(run_paper, tmp_path, caplog):
    switch = tmp_path / "switch"
    switch.write_text("raise")
    table = {**TABLE, "rows": [{"name": "A", "options": {"breaks": str(switch)}}, TABLE["rows"][1]]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    shutil.copy("own.yaml", "recipes/paper/small.yaml")
    assert run_paper(["small"]) == 1
    assert "Failed: A: ValueError: it is broken" in caplog.text
    assert {name: row["state"] for name, row in results().items()} == {"A": "failed", "B": "complete"}
    switch.unlink()
    assert run_paper(["small"]) == 0
    assert {row["state"] for row in results().values()} == {"complete"}


def test_an_interrupted_table_has_what_there_is(run_paper, monkeypatch):
    start = Sweep.start

    def interrupted(self, run):
        if "0.01" in run.folder.name:
            raise KeyboardInterrupt
        start(self, run)

    monkeypatch.setattr(Sweep, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_paper(["small"])
    assert [entry["learning_rate"] for entry in results()["A"]["tries"]] == [0.1]


def test_after_the_time_limit_nothing_begins_and_what_is_left_is_said(run_paper, caplog):
    with caplog.at_level("INFO"):
        assert run_paper(["small", "--time_limit", "0"]) == 0
    assert "Left to do, by the same command: A, B" in caplog.text
    assert not Path("runs/paper/small/runs").exists()
    assert {row["state"] for row in results().values()} == {"incomplete"}


def test_a_wrong_option_stops_before_anything_is_run(run_paper):
    for argv, message in (
        (["small", "--sizes", "2"], "--sizes 2: no option"),
        (["small", "--size", "0"], "A: size=0 has to be at least 1"),
        (["small", "--rows", "C"], "no row c to run"),
        (["large"], "no table 'large'"),
        (["--size", "2", "small"], "Give the table first"),
        (["small", "--siz", "2"], "--siz 2: no option"),
    ):
        with pytest.raises(ValueError, match=message):
            run_paper(argv)
    assert not Path("runs").exists()


def test_tables_are_listed_and_reported(run_paper, capsys):
    assert run_paper([]) == 0
    assert capsys.readouterr().out == f"{'small':20} A table\n"
    assert run_paper(["small", "--report", "docs"]) == 0
    text = Path("docs/results.md").read_text()
    assert run_paper(["--report", "docs"]) == 0
    assert Path("docs/results.md").read_text() == text
    assert "## A table" in text
    assert {path.name for path in Path("docs/results").iterdir()} == {"small.json", "small.md", "small-figure.png"}


def test_a_folder_is_the_same_however_it_is_spelled(run_paper, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "model").mkdir()
    assert run_paper(["small", "--data_dir", "data", "--model", "model"]) == 0
    assert results()["A"]["options"].items() >= {"data_dir": "data", "model_name_or_path": "model"}.items()
    before = Path("runs/paper/small/runs/calls.txt").read_text()
    monkeypatch.chdir("data")
    folders = ["--data_dir", str(tmp_path / "data"), "--model_name_or_path", "../model"]
    assert run_paper(["small", *folders, "--output_dir", "../runs/paper"]) == 0
    assert (tmp_path / "runs/paper/small/runs/calls.txt").read_text() == before
    # What was not the table's own is in its title.
    assert (tmp_path / "runs/paper/small/table.md").read_text().startswith("# A table, model_name_or_path model\n")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_terminated_table_ends_its_run_too(run_paper, tmp_path):
    switch = tmp_path / "switch"
    switch.write_text("wait")
    table = {**TABLE, "rows": [{"name": "A", "options": {"breaks": str(switch)}}]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    # By a script of its own, since the recipes are the test's.
    shutil.copy(RECIPES / "run_paper.py", "recipes")
    command = [sys.executable, "recipes/run_paper.py", str(tmp_path / "own.yaml")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(RECIPES), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        pid = tmp_path / "runs/paper/own/runs/a/run/pid"
        wait_for(lambda: pid.is_file() and pid.read_text())
        process.terminate()
        assert "terminated" in process.communicate(timeout=60)[1]
    assert process.returncode == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert json.loads(Path("runs/paper/own/results.json").read_text())["rows"][0]["state"] == "incomplete"


def test_what_a_report_holds_is_not_run_again(run_paper, caplog):
    assert run_paper(["small", "--report", "docs"]) == 0
    shutil.rmtree("runs")
    with caplog.at_level("INFO"):
        assert run_paper(["small", "--known", "docs/results"]) == 0
    assert "4 runs of these rows are known from docs/results" in caplog.text
    assert not Path("runs/paper/small/runs").exists()
    assert {row["state"] for row in results().values()} == {"complete"}
    with pytest.raises(ValueError, match="no results in nowhere"):
        run_paper(["small", "--known", "nowhere"])


def test_the_tables_of_the_paper_are_listed(capsys):
    assert load("run_paper").main([]) == 0
    assert "table3               Table 3: E2E, GPT-2 medium\n" in capsys.readouterr().out


def test_an_error_of_the_user_is_one_line(tmp_path, monkeypatch):
    script = str(RECIPES / "run_paper.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "table3", "--nonsense", "1"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(script, run_name="__main__")
    # Python writes such a code to stderr, and ends with 1.
    assert exit.value.code == "run_paper: --nonsense 1: no option of run_paper or of the recipe run_e2e."


# ---- scoring later ----


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    data = make_demo_data(tmp_path_factory.mktemp("data"))
    tokenizer = make_tokenizer((data / "train.txt").read_text().splitlines(), size=500)
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama", vocab_size=len(tokenizer), eos_token_id=0, max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["e2e", pytest.param("math", marks=pytest.mark.slow)])
def test_a_run_is_scored_later_and_further_without_training_again(name, base, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_sara.tasks.e2e_metrics.coco_scores", lambda predictions, references: {})
    data = make_demo_data(tmp_path / "data") if name == "e2e" else make_math_demo_data(tmp_path / "data")
    limit, scored = {"e2e": ("max_test_mrs", "bleu"), "math": ("max_test_samples", "accuracy_AddSub")}[name]
    values = {
        "model_name_or_path": base,
        "data_dir": data,
        "output_dir": tmp_path / "run",
        "threshold": 0.2,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "warmup_steps": 1,
        "num_beams": 2,
        "max_new_tokens": 4,
        "use_cpu": True,
        **({"max_eval_samples": 4} if name == "e2e" else {"max_train_samples": 20, "val_set_size": 4}),
    }
    argv = [part for option, value in values.items() for part in (f"--{option}", str(value))]
    argv += [] if name == "e2e" else ["--test_sets", "AddSub"]
    main = load(f"run_{name}").main
    tried = main([*argv, f"--{limit}", "0"])
    assert scored not in tried
    assert not list((tmp_path / "run").glob("predictions*"))
    tensors = (tmp_path / "run" / "sara_adapter.safetensors").read_bytes()

    def trains(*args, **kwargs):
        raise AssertionError("trains again")

    monkeypatch.setattr("transformers.Trainer.training_step", trains)
    first = main([*argv, f"--{limit}", "2"])
    # With fewer at once, where there was no memory for as many.
    more = main([*argv, f"--{limit}", "3", "--generation_batch_size", "1"])
    for metrics in (first, more):
        assert 0.0 <= metrics[scored] <= 1.0
        assert metrics["eval_loss"] == pytest.approx(tried["eval_loss"])
        assert metrics["train_loss"] == pytest.approx(tried["train_loss"])
        # As of the last checkpoint, which is written a moment before the end.
        assert 0.0 < metrics["train_seconds"] <= tried["train_seconds"]
    files = [tmp_path / "run" / "predictions.jsonl", *(tmp_path / "run").glob("predictions/*.jsonl")]
    (file,) = (file for file in files if file.is_file())
    assert len(file.read_text().splitlines()) == 3
    assert (tmp_path / "run" / "sara_adapter.safetensors").read_bytes() == tensors
    # And as far as it was, it is complete.
    monkeypatch.setattr("harness.run.make_trainer", None)
    assert main([*argv, f"--{limit}", "3"]) == more
    if name == "math":
        # Another test set is not scored yet: its data are looked for.
        with pytest.raises(FileNotFoundError, match=r"SVAMP\.json"):
            main([*argv, f"--{limit}", "3", "--test_sets", "AddSub", "SVAMP"])
