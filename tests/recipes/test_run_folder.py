import json
import logging
from dataclasses import dataclass, field
from unittest.mock import Mock

import pytest
import torch
from conftest import make_model, make_tokenizer
from training import training_arguments
from transformers import TrainingArguments

from harness import base_models, card, run_folder
from harness.options import RecipeError, parse_arguments
from hf_sara import SaraArguments


@dataclass
class Options:
    data: str = field(default="none", metadata={"help": "A share of 100%% is all."})
    size: int | None = None


def parse(*argv, defaults=lambda given: {}):
    return parse_arguments([Options, SaraArguments, TrainingArguments], defaults, list(argv))


# ---- the command line ----


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("size: 3\nlearning_rate: 8e-3\nmethod: mo_sara\ntarget_modules: [q, v]\nbf16: false\n")
    seen = {}

    def defaults(given):
        seen.update(given)
        return {"size": 1, "data": "default", "learning_rate": 1.0, "warmup_steps": 4}

    options, sara, training = parse("--config", str(file), "--learning_rate", "0.5", defaults=defaults)
    assert (options.size, options.data) == (3, "default")
    assert (training.learning_rate, training.warmup_steps) == (0.5, 4)
    assert (sara.method, sara.target_modules) == ("mo_sara", ["q", "v"])
    assert seen["method"] == "mo_sara"
    assert "data" not in seen
    assert parse("--config", str(file))[2].learning_rate == 8e-3


def test_every_field_of_every_dataclass_is_an_option(capsys):
    from dataclasses import fields

    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for arguments in (Options, SaraArguments, TrainingArguments):
        for entry in fields(arguments):
            assert not entry.init or f"--{entry.name}" in text
    assert "0.1%" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sizes: 3", "unknown options sizes"),
        ("- 3", "has to be a mapping"),
        ("a: [", "not valid YAML"),
        (None, "cannot be read"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_an_error(content, message, tmp_path):
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(RecipeError, match=message):
        parse("--config", str(file))


@pytest.mark.parametrize("argv", [["--nonsense", "1"], ["--size", "many"], ["--method", "lora2"]])
def test_an_unknown_option_or_value_ends_with_the_usage(argv, capsys):
    with pytest.raises((SystemExit, ValueError)):
        parse(*argv)


# ---- base models ----


def test_a_model_is_loaded_with_its_tokenizer_and_a_pad_token(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    model = make_model("llama", vocab_size=len(tokenizer), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, its_tokenizer = base_models.load_base(str(tmp_path))
    assert loaded.dtype == torch.bfloat16
    assert not loaded.training
    assert its_tokenizer.pad_token == its_tokenizer.eos_token
    assert base_models.load_base(str(tmp_path), dtype="float32")[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", ["flaot32", "nn", "float32 "])
def test_a_dtype_that_does_not_exist_is_an_error(dtype):
    with pytest.raises(RecipeError, match=f"dtype='{dtype}' is unknown. Choose auto, float32"):
        base_models.load_base("nowhere", dtype=dtype)


def test_the_demo_model_says_how_to_be_installed(monkeypatch):
    monkeypatch.setattr(base_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install"):
        base_models.load_base(base_models.SMOLLM2)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bloom", "gpt_neox"])
def test_a_model_can_be_loaded_without_its_dropout(family, tmp_path):
    rates = {
        "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
        "llama": {"attention_dropout": 0.3},
        "opt": {"dropout": 0.3, "attention_dropout": 0.3},
        "bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
        "gpt_neox": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    }[family]
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    make_model(family, vocab_size=len(tokenizer), **rates).save_pretrained(tmp_path)
    ids = torch.arange(3, 15).view(2, 6)

    @torch.no_grad()
    def spread(model):
        model.train()
        return float((model(ids).logits - model(ids).logits).abs().max())

    assert spread(base_models.load_base(str(tmp_path))[0]) > 0.0
    model, _ = base_models.load_base(str(tmp_path), without_dropout=True)
    assert spread(model) == 0.0
    assert all(getattr(model.config, name) == 0.0 for name in rates)


# ---- run folders ----


def test_a_folder_takes_the_same_run_again_and_no_other(tmp_path):
    def run(learning_rate=0.1, size=1, **changes):
        args = training_arguments(tmp_path / "run", learning_rate=learning_rate, **changes)
        return run_folder.open_run(args, recipe=Options(size=size), sara=SaraArguments())

    folder = run()
    # So far there is nothing in it that could be lost.
    (folder / "data").mkdir()
    run(learning_rate=0.2, size=2)
    run()
    (folder / "checkpoint-3").mkdir()
    settings = (folder / run_folder.SETTINGS_FILE).read_text()
    # What does not change the result may change.
    assert run(logging_steps=1, save_steps=1) == folder
    with pytest.raises(RecipeError, match=r"learning_rate: 0.1 there, 0.2 now"):
        run(learning_rate=0.2)
    with pytest.raises(RecipeError, match=r"size: 1 there, 2 now"):
        run(size=2)
    assert (folder / run_folder.SETTINGS_FILE).read_text() == settings
    assert json.loads(settings)["recipe"]["size"] == 1


def test_what_is_logged_goes_to_the_file_of_the_run_that_is_open(tmp_path):
    log = logging.getLogger("hf_sara.test")
    folders = []
    for number in (1, 2):
        args = training_arguments(tmp_path / str(number))
        folders.append(run_folder.open_run(args))
        log.info("message %d", number)
    texts = [(folder / run_folder.LOG_FILE).read_text() for folder in folders]
    assert "message 1" in texts[0]
    assert "message 2" not in texts[0]
    assert "message 2" in texts[1]


def test_no_token_is_written_to_the_settings(tmp_path):
    run_folder.open_run(training_arguments(tmp_path, hub_token="hf_secretsecretsecret"))
    assert "secretsecret" not in (tmp_path / run_folder.SETTINGS_FILE).read_text()


def test_a_card_says_where_the_base_of_the_package_is(tmp_path):
    trainer, own = Mock(args=Mock(output_dir=tmp_path)), "# A card\n"
    path = tmp_path / "README.md"
    # As make_card, it keeps what stands there.
    trainer.create_model_card.side_effect = lambda **kwargs: path.exists() or path.write_text(own)
    values = {"dataset": "E2E", "dataset_id": None, "split": "test"}
    card.write_card(trainer, "someone/model", {"bleu": 0.5}, **values)
    assert path.read_text() == own
    for _ in range(2):
        card.write_card(trainer, base_models.SMOLLM2, {"bleu": 0.5}, **values)
        assert path.read_text() == f"{own}\n{card.SMOLLM2_TEXT}"
    assert trainer.create_model_card.call_args.kwargs["results"][0].metric_value == 0.5
