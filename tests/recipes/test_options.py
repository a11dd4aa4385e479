from dataclasses import dataclass, field

import pytest
from transformers import TrainingArguments

from harness.options import RecipeError, parse_arguments
from hf_sara import SaraArguments


@dataclass
class Options:
    data: str = field(default="none", metadata={"help": "A share of 100%% is all."})
    size: int | None = None


def parse(*argv, defaults=lambda given: {}):
    return parse_arguments([Options, SaraArguments, TrainingArguments], defaults, list(argv))


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
