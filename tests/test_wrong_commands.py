"""Wrong command lines: each ends with one clear line, in bounded time, without a trace or an escape code."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import attach_trained, edit_config, make_model, make_tokenizer
from typer.testing import CliRunner

from hf_sara import base_files
from hf_sara.cli import app

HOSTILE = (
    "",
    " ",
    "\0",
    "\x1b[31mred",
    "[bold]x[/bold]",
    "a\nb",
    "\udcff",
    "x" * 300_000,
    "../../x",
    "https://x/y",
    "a/b/c",
)
ADAPTER_COMMANDS = {"info": (), "pull": (), "merge": ("OUT",), "export": ("OUT",), "generate": ("text",)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Bases and adapters, good and damaged, by their names in the tables below."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = make_tokenizer()
    base = make_model(vocab_size=len(tokenizer), eos_token_id=0, max_position_embeddings=64)
    base.save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    attach_trained(base).save_pretrained(home / "adapter")
    attach_trained(make_model("bert")).save_pretrained(home / "classifier")
    make_model("bert").save_pretrained(home / "bert")
    config = json.loads((home / "base" / "config.json").read_text())
    for name, damage in {**CONFIGS, **FILES}.items():
        shutil.copytree(home / "base", home / name)
        if name in FILES:
            damage(home / name)
        else:
            text = damage if isinstance(damage, str) else json.dumps({**config, **damage})
            (home / name / "config.json").write_text(text)
    for name, change in ADAPTERS.items():
        shutil.copytree(home / "adapter", home / name)
        edit_config(home / name, change)
    (home / "file").write_text("x")
    return home


def put(name: str, content: bytes):
    """Another content of a file."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def weights(change):
    """Other bytes of the weights file."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def far(folder: Path) -> None:
    """The header says that a tensor ends far behind the end of the file."""
    whole = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    for record in header.values():
        if "data_offsets" in record:
            record["data_offsets"] = [place + 2**62 for place in record["data_offsets"]]
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])


def index(content: object):
    """An index of weights files in the place of the file."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return damage


# Changes of a base's config.json, or its whole text.
CONFIGS = {
    "config-empty": "",
    "config-no-json": "{",
    "config-list": "[]",
    "config-null": "null",
    "config-deep": "[" * 100_000,
    "config-digits": '{"num_hidden_layers": ' + "9" * 5000 + "}",
    "config-no-type": "{}",
    "config-type": {"model_type": "nonsense"},
    "config-type-list": {"model_type": ["llama"]},
    "config-type-remote": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}},
    "config-other": {"model_type": "bert"},
    "config-architecture": {"architectures": ["\x1b[31mEvil"]},
    "config-architectures-number": {"architectures": 5},
    "config-architectures-none": {"architectures": None},
    "config-layers": {"num_hidden_layers": 10**9},
    "config-layers-negative": {"num_hidden_layers": -1},
    "config-layers-text": {"num_hidden_layers": "2"},
    "config-layers-none": {"num_hidden_layers": None},
    "config-labels": {"num_labels": 10**9},
    "config-inner": {"text_config": {"moe": [{"num_local_experts": 10**9}]}},
    "config-heads-zero": {"num_attention_heads": 0},
    "config-heads-text": {"num_attention_heads": "4"},
    "config-hidden": {"hidden_size": 10**18},
    "config-hidden-small": {"hidden_size": 16},
    "config-vocabulary": {"vocab_size": -5},
    "config-activation": {"hidden_act": "nonsense"},
    "config-activation-list": {"hidden_act": ["silu"]},
    "config-rope": {"rope_parameters": {"rope_type": "nonsense"}},
    "config-rope-list": {"rope_parameters": [1]},
    "config-quantized": {"quantization_config": {"quant_method": "nonsense"}},
    "config-dtype": {"dtype": "os.system"},
    "config-attention": {"attn_implementation": "nonsense"},
    "config-id2label": {"id2label": [1, 2]},
    "config-id2label-names": {"id2label": {"x": "y"}},
}
# Damages that do not matter to a plan, which needs names and shapes only, or to an adapter, which names its class.
NO_MATTER_FOR_A_PLAN = ("config-other", "config-quantized")
NO_MATTER_FOR_AN_ADAPTER = (
    *NO_MATTER_FOR_A_PLAN,
    *(name for name in CONFIGS if "architecture" in name),
    "weights-dtype",
)
# Other damages of a base.
FILES = {
    "weights-empty": weights(lambda whole: b""),
    "weights-cut": weights(lambda whole: whole[:-100]),
    "weights-cut-header": weights(lambda whole: whole[:50]),
    "weights-length": weights(lambda whole: b"\xff" * 8 + whole[8:]),
    "weights-no-json": weights(lambda whole: whole[:8] + b"x" + whole[9:]),
    "weights-dtype": weights(lambda whole: whole.replace(b'"F32"', b'"I32"')),
    "weights-far": far,
    "weights-missing": lambda folder: (folder / "model.safetensors").unlink(),
    "weights-folder": lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()),
    "index-empty": index({}),
    "index-list": index([]),
    "index-numbers": index({"weight_map": {"a": 1}}),
    "index-outside": index({"weight_map": {"a": "../base/model.safetensors"}}),
    "index-missing": index({"weight_map": {"a": "nowhere.safetensors"}}),
}
# Changes of an adapter's config.
ADAPTERS = {
    "heads": lambda c: c["arguments"].update(num_heads=int("9" * 4300)),
    "later": lambda c: c.update(format_version=99),
    "nameless": lambda c: c.update(base={**c["base"], "model_id": "x\x1b[31m"}),
    "noclass": lambda c: c["base"].update({"class": "NoSuchModel"}),
    "layers": lambda c: c["arguments"].update(layers="0-9999," * 10**5),
}

# The command lines: names of the folders above stand for the folders. Each of these is wrong once the program runs.
PLAN = [
    *(
        ("plan", name)
        for name in (*HOSTILE, "file", "adapter", "no/such", *CONFIGS, *FILES)
        if name not in NO_MATTER_FOR_A_PLAN
    ),
    *(
        ("plan", "base", "--threshold", value)
        for value in ("nan", "inf", "-inf", "1e999", "0", "-1", "1.0001", "-0.0")
    ),
    *(("plan", "base", "--method", value) for value in ("", "lora", "SARA", "[red]", "\x1b[31m")),
    *(
        ("plan", "base", "--budget", value)
        for value in (
            "",
            "0",
            "-5",
            "%",
            "0%",
            "100%",
            "nan%",
            "1e3",
            "1e999",
            "9" * 30 + "%",
            "9" * 5000,
            "5",
            "0.1%%",
        )
    ),
    ("plan", "base", "--budget", "100", "--threshold", "0.5"),
    *(("plan", "base", "--method", "mo_sara", "--num-heads", value) for value in ("0", "-1", "-" + "9" * 4000)),
    *(
        ("plan", "base", "--layers", value)
        for value in ("", "x", "-", "1-", "-1", "3-1", "7", "0-99999999", "9" * 5000, "0,,1", "1.5", "0-9999," * 5000)
    ),
    *(
        ("plan", "base", option, value)
        for option in ("--target-modules", "--exclude-modules", "--modules-to-save")
        for value in ("", "(", "[", "*", "a{9999999999999}", "nothing", "\x1b[31m", "(" * 5000, "(?P<a>x)(?P<a>y)")
    ),
    ("plan", "base", "--target-modules", "all-linear", "--target-modules", "q_proj"),
    ("plan", "base", "--exclude-modules", ".*"),
    ("plan", "base", "--modules-to-save", "none", "--modules-to-save", "norm"),
    ("plan", "base", "--modules-to-save", "q_proj"),
    *(("plan", "base", "--trainable-token-indices", value) for value in ("-1", "99999", "9" * 4000)),
    ("plan", "base", "--trainable-token-indices", "1", "--trainable-token-indices", "1"),
    ("plan", "no/such", "--revision", "\x1b[31m"),
]
LOAD = [
    *(
        (command, name, *more)
        for command, more in ADAPTER_COMMANDS.items()
        for name in (*HOSTILE, "file", "base", "heads")
    ),
    *(("info", name) for name in ("later", "nameless", "layers")),
    *(("push", name, "me/x") for name in ("", "\x1b[31m", "file", "base", "heads")),
    *(("push", "adapter", name) for name in ("a/b/c", "https://x/y", "\x1b[31m")),
    *((command, "adapter", "OUT") for command in ("merge", "export")),
    *(
        (command, "adapter", more, "--base", name)
        for command, more in (("merge", "OUT"), ("generate", "text"))
        for name in ("no/such", "file", "bert", *CONFIGS, *FILES)
        if name not in NO_MATTER_FOR_AN_ADAPTER
    ),
    ("generate", "noclass", "text", "--base", "base"),
    ("generate", "classifier", "text", "--base", "bert"),
    *(("generate", "adapter", prompt, "--base", "base") for prompt in ("", "\udcff", "fox " * 100)),
    *(("generate", "adapter", "fox", "--base", "base", "--max-new-tokens", n) for n in ("0", "-1", "64", "9" * 4000)),
    ("export", "adapter", "OUT", "--base", "base", "--max-rank", "0"),
    ("export", "adapter", "OUT", "--base", "base", "--max-rank", "-5"),
]
# These are wrong before the program runs.
USAGE = [
    (),
    ("nonsense",),
    ("\x1b[31m",),
    ("[red]x[/red]",),
    ("--\x1b[31m",),
    ("--nonsense",),
    *((command,) for command in ("plan", "info", "push", "pull", "merge", "export", "generate")),
    *((command, "x", "y", "z", "w") for command in ("plan", "info", "push", "pull", "merge", "export", "generate")),
    *(("plan", "base", "--threshold", value) for value in ("", "x", "\x1b[31m", "[red]", "0x1p-2", "1,5", "\udcff")),
    *(("plan", "base", "--num-heads", value) for value in ("", "x", "1.5", "9" * 5000, "\x1b[31m")),
    *(("plan", "base", "--trainable-token-indices", value) for value in ("x", "1.5", "9" * 5000)),
    *(("generate", "adapter", "fox", "--max-new-tokens", value) for value in ("x", "1.5", "1e9", "9" * 5000)),
    *(("export", "adapter", "OUT", "--max-rank", value) for value in ("x", "\x1b[31m")),
    *((command, "x", "--\x1b[31m") for command in ("plan", "info")),
    *((command, "x", "--nonsense") for command in ("plan", "info", "pull", "cache")),
    ("plan", "base", "--threshold"),
]


def label(arguments) -> str:
    return ascii(" ".join(arguments))[1:61]


def run(home: Path, arguments, tmp_path: Path):
    names = {path.name: str(path) for path in home.iterdir()} | {"OUT": str(tmp_path / "out")}
    started = time.monotonic()
    result = CliRunner().invoke(app, [names.get(argument, argument) for argument in arguments])
    assert time.monotonic() - started < 20
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    assert "\x1b" not in result.output
    assert len(result.output) < 20_000
    return result


# The others run with the slow tests of tests/faults.
@pytest.mark.parametrize("arguments", (PLAN + LOAD)[::4], ids=label)
def test_a_wrong_command_ends_with_one_line(home, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(home, arguments, tmp_path)
    assert result.exit_code == 1, result.output
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("hf-sara: ")] == lines[-1:], result.stderr
    assert lines[-1].isprintable()
    # Each has been seen and given words: none is shown as a bug.
    assert "HF_SARA_TRACE" not in lines[-1]
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", USAGE[::4], ids=label)
def test_a_wrong_usage_is_exit_code_2(home, arguments, tmp_path):
    assert run(home, arguments, tmp_path).exit_code == 2


def test_a_hostile_name_is_shown_with_escapes(home, tmp_path):
    names = ("[bold red]x[/bold red]", "\x1b[31mred\x1b[0m", "a\nb\r\x07\u202e", "x" * 10**6, "[/]", "%s{0}\\")
    shutil.copytree(home / "adapter", tmp_path / "adapter")

    def rename(config):
        for name in names:
            config["sites"].append({"name": name, "shape": [24, 24], "k": 3})
        config["modules"] = [{"name": name, "parameters": {"w": [2**40, 2**20]}} for name in names]
        config["base"]["class"] = "x" * 10**6
        config["versions"]["\x1b]0;evil\x07"] = "\x1b[2J"

    edit_config(tmp_path / "adapter", rename)
    shown = run(home, ("info", str(tmp_path / "adapter")), tmp_path)
    assert shown.exit_code == 0
    for text in ("[bold red]x[/bold red]", "\\x1b[31mred\\x1b[0m", "a b", "\\u202e", "[/]", "%s{0}\\", "x [...] x"):
        assert text in shown.stdout
    assert all(line.isprintable() for line in shown.stdout.splitlines())
    printed = CliRunner().invoke(app, ["info", str(tmp_path / "adapter"), "--json"])
    assert printed.exit_code == 0
    assert json.loads(printed.stdout)["sites"][-1]["site"] == names[-1]
    assert printed.stdout.isascii()


@pytest.mark.slow
def test_a_table_of_forty_thousand_sites_takes_seconds(home, tmp_path):
    shutil.copytree(home / "adapter", tmp_path / "adapter")
    sites = [{"name": f"x{number}", "shape": [2, 2], "k": 1} for number in range(40_000)]
    edit_config(tmp_path / "adapter", lambda config: config.update(sites=sites))
    started = time.monotonic()
    assert CliRunner().invoke(app, ["info", str(tmp_path / "adapter")]).exit_code == 0
    assert time.monotonic() - started < 15


def in_a_process(*arguments, megabytes: int | None = None, **environment):
    """Start the program, with a limit on its memory."""
    limit = (
        ""
        if megabytes is None
        else (f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({megabytes} * 2**20,) * 2)\n")
    )
    # What the commands import is loaded first: it is the configuration that is under the limit.
    code = f"import sys, transformers, hf_sara.base_model, hf_sara.sharing\nfrom hf_sara.cli import app\n{limit}app()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config-layers", "config-labels", "config-inner", "weights-far"])
def test_a_hostile_base_takes_neither_memory_nor_time(home, name):
    process = in_a_process("plan", home / name, megabytes=6_000)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("hf-sara: ")
    assert "Memory" not in errors


@pytest.mark.slow
def test_a_reader_that_goes_away_brings_no_trace(home, tmp_path):
    shutil.copytree(home / "adapter", tmp_path / "adapter")
    sites = [{"name": f"x{number}", "shape": [2, 2], "k": 1} for number in range(20_000)]
    edit_config(tmp_path / "adapter", lambda config: config.update(sites=sites))
    process = in_a_process("info", tmp_path / "adapter")
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.wait(timeout=120)
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


def test_more_modules_than_any_model_has_are_refused(home, monkeypatch, tmp_path):
    monkeypatch.setattr(base_files, "MOST_MODULES", 20)
    for arguments in (
        ("plan", "base"),
        ("merge", "adapter", "OUT", "--base", "base"),
        ("export", "adapter", "OUT", "--base", "base"),
    ):
        result = run(home, arguments, tmp_path)
        assert result.exit_code == 1
        assert "asks for more than 20 modules" in result.stderr
    monkeypatch.undo()
    assert run(home, ("plan", "base"), tmp_path).exit_code == 0


@pytest.mark.parametrize(
    "error", [KeyError("x\ny"), RecursionError("deep"), MemoryError(), AttributeError("\x1b[31m")]
)
def test_a_bug_is_one_line_too_and_tells_how_to_see_more(home, error, monkeypatch, tmp_path):
    def fail(*_):
        raise error

    monkeypatch.setattr("hf_sara.storage.read", fail)
    result = run(home, ("info", "adapter"), tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"hf-sara: {type(error).__name__}: ")
    assert "HF_SARA_TRACE=1" in result.stderr
    assert result.stderr.count("\n") == 1
    monkeypatch.setenv("HF_SARA_TRACE", "1")
    assert CliRunner().invoke(app, ["info", str(home / "adapter")]).exception is error


def test_an_interrupt_brings_no_trace(home, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_sara.storage.read", interrupt)
    result = run(home, ("info", "adapter"), tmp_path)
    assert result.exit_code not in (0, None)


def test_generate_says_what_the_model_takes(home, tmp_path):
    result = run(home, ("generate", "adapter", "fox", "--base", "base", "--max-new-tokens", "64"), tmp_path)
    assert "--max-new-tokens is 64, and the model takes 64 tokens at most" in result.stderr
    result = run(home, ("generate", "adapter", "", "--base", "base"), tmp_path)
    assert "The prompt '' has no tokens" in result.stderr
    result = run(home, ("generate", "classifier", "text", "--base", "nowhere"), tmp_path)
    assert "is for a BertForSequenceClassification, which cannot generate text" in result.stderr
    assert (
        run(home, ("generate", "adapter", "fox", "--base", "base", "--max-new-tokens", "3"), tmp_path).exit_code == 0
    )


def test_generate_prints_all_of_the_output_of_a_model_with_an_encoder(tmp_path):
    tokenizer = make_tokenizer()
    base = make_model("t5", seed=5, vocab_size=len(tokenizer), eos_token_id=None)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    attach_trained(base).save_pretrained(tmp_path / "adapter")
    inputs = tokenizer("The quick brown fox", return_tensors="pt")
    expected = tokenizer.decode(
        base.generate(**inputs, max_new_tokens=3, do_sample=False)[0], skip_special_tokens=True
    )
    options = ["--base", str(tmp_path / "base"), "--max-new-tokens", "3", "--json"]
    result = CliRunner().invoke(app, ["generate", str(tmp_path / "adapter"), "The quick brown fox", *options])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["text"] == expected != ""


def test_there_are_many_of_them():
    assert len({*PLAN, *LOAD, *USAGE}) == len(PLAN + LOAD + USAGE) >= 120
