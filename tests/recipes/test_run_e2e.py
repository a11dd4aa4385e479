"""The recipes as a user runs them, on a tiny model."""

import functools
import http.server
import json
import os
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer
from peft import PeftModel
from recipe_scripts import RECIPES, load
from transformers import Trainer, TrainingArguments

from harness import e2e_task
from harness.arguments import ALL_METHODS, PEFT_METHODS, MethodArguments
from harness.base_models import load_base
from harness.bottleneck import load_bottleneck
from harness.demo_data import make_demo_data
from harness.options import RecipeError, parse_arguments
from hf_sara import SaraAdapter, SaraArguments, plan, save_plan
from hf_sara.card_text import fenced
from hf_sara.tasks import e2e


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = make_demo_data(tmp_path_factory.mktemp("data"))
    for name, lines in (("train.txt", 60), ("valid.txt", 12), ("test.txt", 9)):
        (folder / name).write_text("".join((folder / name).read_text().splitlines(keepends=True)[:lines]))
    return folder


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def base(request, data, tmp_path_factory) -> Path:
    """A tiny model with a tokenizer of its own, in a folder."""
    tokenizer = make_tokenizer((data / "train.txt").read_text().splitlines(), size=500)
    lengths = {"gpt2": {"n_positions": 256}, "llama": {"max_position_embeddings": 256}}[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make_model(request.param, vocab_size=len(tokenizer), eos_token_id=0, **lengths).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def arguments(base, data, output, *more) -> list[str]:
    values = {
        "model_name_or_path": base,
        "data_dir": data,
        "output_dir": output,
        "max_steps": 6,
        "warmup_steps": 1,
        "save_steps": 2,
        "logging_steps": 2,
        "num_beams": 3,
        "max_new_tokens": 6,
        "generation_batch_size": 2,
        "use_cpu": True,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))] + list(more)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("method", ["sara", "mo_sara"])
def test_e2e_trains_decodes_scores_and_leaves_everything(method, base, data, tmp_path, monkeypatch):
    output = tmp_path / "run"
    argv = ["run_e2e.py", *arguments(base, data, output, "--method", method, "--threshold", "0.2")]
    monkeypatch.setattr(sys, "argv", argv)
    # Java is slow to start. The tests of the metrics and the demo of .ci/run have it.
    fixed = {"meteor": 0.1, "rouge_l": 0.2, "cider": 0.3}
    monkeypatch.setattr("hf_sara.tasks.e2e_metrics.coco_scores", lambda predictions, references: fixed)
    metrics = load("run_e2e").main()
    assert metrics == json.loads((output / "metrics.json").read_text())
    assert {"bleu", "nist", "meteor", "rouge_l", "cider", "eval_loss", "train_loss"} <= set(metrics)
    assert (metrics["method"], metrics["threshold"], metrics["test_mrs"]) == (method, 0.2, 3)
    assert {"trained_parameters", "share", "adapter_bytes", "peak_memory_bytes", "train_seconds"} <= set(metrics)
    predictions = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    references = json.loads((output / "references.json").read_text())
    assert [row["mr"] for row in predictions] == list(e2e.group_by_mr(e2e.load_e2e(data)["test"]))
    assert [len(group) for group in references] == [3, 3, 3]
    # The card's snippet has the first input, and the card what was decoded for it.
    card = (output / "README.md").read_text()
    assert json.dumps(predictions[0]["mr"] + "<|endoftext|>") in card
    assert fenced(predictions[0]["prediction"]) in card
    log = (output / "run.log").read_text()
    assert '"loss"' in log
    assert '"bleu"' in log
    # What lies in the folder does on a fresh base what was decoded.
    model, tokenizer = load_base(str(base))
    SaraAdapter.load(model, output)
    mrs = [row["mr"] for row in predictions]
    again = e2e_task.generate_predictions(
        model, tokenizer, mrs, tmp_path / "again.jsonl", batch_size=2, num_beams=3, max_new_tokens=6
    )
    assert again == [row["prediction"] for row in predictions]
    # Run again, it only reports.
    assert load("run_e2e").main(argv[1:]) == metrics


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
@pytest.mark.parametrize("method", ["lora", "adalora", "eva", "pissa", "dylora", "prefix", "adapter_l", "full"])
def test_e2e_runs_the_baselines_just_so(method, base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_sara.tasks.e2e_metrics.coco_scores", lambda predictions, references: {"meteor": 0.1})
    sizes = ["--lora_r", "2", "--vera_r", "4", "--num_virtual_tokens", "3", "--bottleneck_size", "4"]
    argv = arguments(base, data, tmp_path / "run", "--method", method, "--learning_rate", "0.01", *sizes)
    metrics = load("run_e2e").main(argv)
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {"bleu", "nist", "meteor", "eval_loss", "train_loss", "train_seconds"} <= set(metrics)
    assert (metrics["method"], metrics["test_mrs"]) == (method, 3)
    assert 0.0 < metrics["share"] <= 1.0
    # AdaLoRA prunes.
    assert metrics["adapter_bytes"] > 2 * metrics["trained_parameters"]
    predictions = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    # What lies in the folder does on a fresh base what was decoded.
    model, tokenizer = load_base(str(base))
    if method in PEFT_METHODS:
        model = PeftModel.from_pretrained(model, tmp_path / "run")
    elif method == "full":
        model = type(model).from_pretrained(tmp_path / "run")
    else:
        load_bottleneck(model, tmp_path / "run")
    mrs = [row["mr"] for row in predictions]
    again = e2e_task.generate_predictions(
        model, tokenizer, mrs, tmp_path / "again.jsonl", batch_size=2, num_beams=3, max_new_tokens=6
    )
    assert again == [row["prediction"] for row in predictions]
    assert load("run_e2e").main(argv) == metrics


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_e2e_takes_the_ranks_of_a_plan(base, data, tmp_path):
    save_plan(plan(base, SaraArguments(threshold=0.3)), tmp_path / "plan.json")
    argv = arguments(base, data, tmp_path / "run", "--threshold", "0.3", "--max_test_mrs", "0")
    planned = load("run_e2e").main([*argv, "--plan", str(tmp_path / "plan.json")])
    # It is the same run, with the plan or without.
    assert load("run_e2e").main(argv) == planned
    other = arguments(base, data, tmp_path / "other", "--threshold", "0.4", "--plan", str(tmp_path / "plan.json"))
    with pytest.raises(ValueError, match=r"threshold=0\.4 \(the plan has 0\.3\)"):
        load("run_e2e").main(other)


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
@pytest.mark.parametrize("method", ["sara", "prefix"])
def test_e2e_can_leave_the_decoding_out(method, base, data, tmp_path, monkeypatch):
    # Neither Java nor anything else of the scores is asked for.
    monkeypatch.setattr("hf_sara.tasks.e2e_metrics.E2EMetrics", None)
    metrics = load("run_e2e").main(arguments(base, data, tmp_path, "--method", method, "--max_test_mrs", "0"))
    assert metrics["eval_loss"] > 0.0
    assert metrics["test_mrs"] == 0
    assert not {"bleu", "meteor"} & set(metrics)
    assert not (tmp_path / "predictions.jsonl").exists()
    assert (tmp_path / "README.md").is_file()


@pytest.mark.one_in(2)
def test_e2e_goes_on_where_it_stopped_and_ends_the_same(base, data, tmp_path, monkeypatch):
    run_e2e = load("run_e2e")
    monkeypatch.setattr("hf_sara.tasks.e2e_metrics.coco_scores", lambda predictions, references: {})
    whole = run_e2e.main(arguments(base, data, tmp_path / "whole"))

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    # First in the training, then in the decoding, then in the scoring.
    save = Trainer._save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(
            Trainer,
            "_save_checkpoint",
            lambda self, *args: crash() if self.state.global_step == 4 else save(self, *args),
        )
        with pytest.raises(KeyboardInterrupt):
            run_e2e.main(arguments(base, data, tmp_path / "parts"))
    for name in ("harness.e2e_task.beam_search", "hf_sara.tasks.e2e_metrics.bleu"):
        with monkeypatch.context() as patch:
            patch.setattr(name, crash)
            with pytest.raises(KeyboardInterrupt):
                run_e2e.main(arguments(base, data, tmp_path / "parts"))
    parts = run_e2e.main(arguments(base, data, tmp_path / "parts"))
    for name in ("sara_adapter.safetensors", "predictions.jsonl", "references.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for differing in ("seconds", "train_seconds", "peak_memory_bytes"):
        assert parts.pop(differing) > 0
        assert whole.pop(differing) > 0
    assert (parts["method"], whole["method"]) == ("sara", "sara")
    for text in ("method", "hardware", "versions"):
        assert parts.pop(text) == whole.pop(text)
    assert parts == pytest.approx(whole)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_e2e_begins_at_a_given_checkpoint_and_then_goes_on_from_its_own(base, data, tmp_path, monkeypatch):
    run_e2e = load("run_e2e")
    monkeypatch.setattr("hf_sara.tasks.e2e_metrics.coco_scores", lambda predictions, references: {})
    unscored = ("--max_test_mrs", "0")
    run_e2e.main(arguments(base, data, tmp_path / "whole", "--save_total_limit", "3", *unscored))
    begin = ("--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-4"))
    steps, step = [], Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda self, *args: steps.append(self) or step(self, *args))
    run_e2e.main(arguments(base, data, tmp_path / "rest", *begin, *unscored))
    assert len(steps) == 2
    adapters = [(tmp_path / run / "sara_adapter.safetensors").read_bytes() for run in ("whole", "rest")]
    assert adapters[0] == adapters[1]
    # Scored later, by the same command: it trains no more.
    assert "bleu" in run_e2e.main(arguments(base, data, tmp_path / "rest", *begin))
    assert len(steps) == 2


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_e2e_with_other_settings_does_not_touch_a_run(base, data, tmp_path, monkeypatch):
    run_e2e = load("run_e2e")
    monkeypatch.setattr("hf_sara.tasks.e2e_metrics.coco_scores", lambda predictions, references: {})
    run_e2e.main(arguments(base, data, tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"threshold: 0.012 there, 0.3 now"):
        run_e2e.main(arguments(base, data, tmp_path, "--threshold", "0.3"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_a_run_that_could_not_begin_takes_other_settings(base, data, tmp_path):
    run_e2e = load("run_e2e")
    for folder in ("typo", "another"):
        with pytest.raises(FileNotFoundError, match=f"{folder}' has no train.txt"):
            run_e2e.main(arguments(base, data, tmp_path, "--data_dir", str(tmp_path / folder)))


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("max_eval_samples", 0, 1),
        ("max_test_mrs", -1, 0),
        ("num_beams", 0, 1),
        ("max_new_tokens", 0, 1),
        ("max_length", 0, 1),
        ("generation_batch_size", 0, 1),
        ("no_repeat_ngram_size", -1, 0),
    ],
)
def test_e2e_refuses_what_would_fail_after_the_training(name, value, least, tmp_path):
    argv = [f"--{name}", str(value), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(RecipeError, match=f"{name}={value} has to be at least {least}"):
        load("run_e2e").main(argv)
    assert not (tmp_path / "run").exists()


def test_e2e_alone_is_the_run_of_the_paper():
    run_e2e = load("run_e2e")
    kinds = [run_e2e.E2EArguments, MethodArguments, TrainingArguments]
    options, sara, training = parse_arguments(kinds, run_e2e.defaults, ["--threshold", "0.012"])
    assert options.model_name_or_path == "openai-community/gpt2-medium"
    assert options.data_dir is None
    assert (options.num_beams, options.length_penalty, options.no_repeat_ngram_size) == (10, 0.8, 4)
    assert (sara.method, sara.threshold, sara.dropout) == ("sara", 0.012, 0.0)
    assert (training.learning_rate, training.num_train_epochs, training.warmup_steps) == (8e-3, 5, 500)
    assert (training.per_device_train_batch_size, training.label_smoothing_factor) == (16, 0.1)
    assert (training.weight_decay, training.max_grad_norm, training.adam_epsilon) == (0.01, 0.0, 1e-6)
    assert (training.seed, training.lr_scheduler_type, training.max_steps) == (314, "linear", -1)
    _, sara, training = parse_arguments(kinds, run_e2e.defaults, ["--method", "mo_sara"])
    assert (sara.method, sara.threshold, sara.num_heads, training.learning_rate) == ("mo_sara", 0.5, 3, 7e-2)
    _, sara, _ = parse_arguments(kinds, run_e2e.defaults, ["--parameter_budget", "0.1%"])
    assert (sara.threshold, sara.parameter_budget) == (None, "0.1%")
    rates = {}
    for method in ALL_METHODS:
        _, chosen, training = parse_arguments(kinds, run_e2e.defaults, ["--method", method])
        rates[method] = training.learning_rate
        assert (chosen.method, chosen.dropout, training.seed) == (method, 0.0, 314)
        assert training.output_dir == f"runs/e2e-gpt2-medium-{method}"
    assert (rates["vera"], rates["prefix"], rates["series_adapter"]) == (1e-1, 3e-2, 3e-4)


def test_an_error_of_the_user_is_one_line(tmp_path, monkeypatch):
    script, data, run = (str(path) for path in (RECIPES / "run_e2e.py", tmp_path / "no", tmp_path / "run"))
    monkeypatch.setattr(sys, "argv", [script, "--data_dir", data, "--output_dir", run])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(script, run_name="__main__")
    # Python writes such a code to stderr, and ends with 1.
    assert exit.value.code == f"run_e2e: The data folder {data!r} has no train.txt, valid.txt, test.txt."


@pytest.mark.slow
def test_the_data_are_fetched_from_a_web_server(data, tmp_path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(data))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        code = (
            "from hf_sara.tasks.e2e import load_e2e\n"
            f"print({{split: len(part) for split, part in load_e2e({address!r}).items()}})\n"
            f"load_e2e({address!r} + '/elsewhere')"
        )
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_DATASETS_CACHE": str(tmp_path)}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        server.shutdown()
    assert "{'train': 60, 'validation': 12, 'test': 9}" in run.stdout
    assert "FileNotFoundError: The data cannot be had from" in run.stderr
