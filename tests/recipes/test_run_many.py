"""The recipe that trains and serves many adapters, as a user runs it, on a tiny model."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from conftest import make_base
from datasets.utils import disable_progress_bars
from recipe_scripts import RECIPES, load, need_smollm2

from harness.demo_data import make_demo_data
from hf_sara import AdapterBank

disable_progress_bars()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_demo_data(tmp_path_factory.mktemp("data"))


def command(base, data, folder, *more) -> list[str]:
    return [
        *("--model_name_or_path", str(base), "--data_dir", str(data), "--output_dir", str(folder), "--groups", "3"),
        *("--max_steps", "5", "--eval_rows", "3", "--max_new_tokens", "4", "--rows_per_step", "2"),
        *("--disable_tqdm", "true", "--use_cpu", "true", "--threshold", "0.3", "--learning_rate", "0.3", *more),
    ]


def test_one_run_equals_a_run_for_each(base_folder, data, method, tmp_path):
    metrics = load("run_many").main(command(base_folder, data, tmp_path, "--method", method))
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["loss"]) == ["base", "one run", "one adapter for all", "a run for each"]
    assert all(len(entry["groups"]) == 3 for entry in metrics["loss"].values())
    loss = {title: entry["mean"] for title, entry in metrics["loss"].items()}
    assert loss["one run"] < loss["base"]
    assert loss["one run"] == pytest.approx(loss["a run for each"], rel=1e-4)
    assert metrics["largest difference of a number between one run and a run for each"] < 1e-4
    # One adapter for all has seen the same rows, and is another one.
    assert loss["one adapter for all"] != pytest.approx(loss["one run"], rel=1e-4)
    texts = json.loads((tmp_path / "texts.json").read_text())
    bank = AdapterBank.load(make_base(), tmp_path)
    assert bank.names == list(texts)
    assert metrics["trained numbers of an adapter"] == bank.spec.trained_parameters
    assert (tmp_path / bank.names[0] / "README.md").is_file()


def test_without_the_comparisons(base_folder, data, tmp_path):
    metrics = load("run_many").main(command(base_folder, data, tmp_path, "--compare", "false"))
    assert list(metrics["loss"]) == ["base", "one run"]
    assert set(metrics["seconds"]) == {
        "one run",
        "one batch, an adapter for each row",
        "one batch, one adapter for all rows",
    }


REFUSED = {
    "no model": (["--max_steps", "3"], "Give --model_name_or_path"),
    "too many groups": (["--groups", "400"], "The data have 24 restaurants. Give --groups 24 or fewer"),
    "too many rows held out": (["--eval_rows", "4000"], "Give --eval_rows below that"),
    "no steps": (["--max_steps", "0"], "Give --max_steps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused(case, base_folder, data, tmp_path, monkeypatch):
    more, message = REFUSED[case]
    argv = more if case == "no model" else command(base_folder, data, tmp_path, *more)
    monkeypatch.setattr(sys, "argv", ["run_many.py", *argv])
    with pytest.raises(SystemExit, match=rf"^run_many: [^\n]*{message}"):
        runpy.run_path(str(RECIPES / "run_many.py"), run_name="__main__")


@pytest.mark.slow
@pytest.mark.long
def test_the_demo_on_the_real_model(tmp_path):
    need_smollm2()
    metrics = load("run_many").main(["--demo", "--output_dir", str(tmp_path)])
    loss = {title: entry["mean"] for title, entry in metrics["loss"].items()}
    assert loss["one run"] < 0.8 * loss["base"]
    assert loss["one run"] == pytest.approx(loss["a run for each"], rel=1e-3)
