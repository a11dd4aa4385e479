import json
import subprocess
import sys

import pytest
import torch
from conftest import attach_trained, logits, make_model, make_tokenizer, sara_arguments
from typer.testing import CliRunner

from hf_sara import plan, storage
from hf_sara.cli import app

COMMANDS = ["plan", "info", "push", "pull", "merge", "export", "generate", "cache"]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture
def base(tmp_path):
    tokenizer = make_tokenizer()
    folder = tmp_path / "base"
    make_model(vocab_size=len(tokenizer), eos_token_id=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def adapted(base, tmp_path):
    """A model with a trained adapter, which is also in a folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    attach_trained(model).save_pretrained(tmp_path / "adapter")
    return model


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys\nfrom hf_sara.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    assert "--json" in run(command, "--help").output


def test_plan(base):
    from transformers import AutoModelForCausalLM

    expected = plan(AutoModelForCausalLM.from_pretrained(base), sara_arguments())
    found = json.loads(run("plan", base, "--threshold", 0.3, "--json").stdout)
    assert [site["k"] for site in found["sites"]] == [site.k for site in expected.sites]
    assert found["trained_parameters"] == expected.trained_parameters
    text = run("plan", base, "--budget", 900, "--method", "mo_sara", "--num-heads", 2, "--layers", 1).output
    assert "model.layers.1.self_attn.q_proj" in text
    assert "layers.0" not in text


def test_info(adapted, tmp_path):
    found = json.loads(run("info", tmp_path / "adapter", "--json").stdout)
    assert found["trained_parameters"] == adapted.sara_adapter.num_parameters()
    assert found["bytes"] == storage.size_on_disk(tmp_path / "adapter")
    assert "4 sites" in run("info", tmp_path / "adapter").output


def test_what_trains_beside_the_sites_is_shown(base, tmp_path):
    options = ("--threshold", 0.3, "--modules-to-save", "norm", "--trainable-token-indices", 3)
    found = json.loads(run("plan", base, *options, "--json").stdout)
    parts = {part["name"]: (part["how"], part["trained"]) for part in found["parts"]}
    assert parts["model.norm"] == ("trained in full", 24)
    assert parts["model.embed_tokens"] == ("1 row trained", 24)
    sites = sum(site["trained"] for site in found["sites"])
    assert found["trained_parameters"] == sites + 48
    assert "model.norm" in run("plan", base, *options).output

    attach_trained(make_model("bert")).save_pretrained(tmp_path / "classifier")
    assert "classifier: trained in full, 75 trained parameters" in run("info", tmp_path / "classifier").output
    assert json.loads(run("info", tmp_path / "classifier", "--json").stdout)["parts"][0]["name"] == "classifier"


def test_generate(adapted, base, tmp_path):
    tokenizer = make_tokenizer()
    inputs = tokenizer("The quick", return_tensors="pt")
    with torch.no_grad():
        output = adapted.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    arguments = ("generate", tmp_path / "adapter", "The quick", "--base", base, "--max-new-tokens", 4, "--json")
    assert json.loads(run(*arguments).stdout)["text"] == tokenizer.decode(output, skip_special_tokens=True)


def test_merge(adapted, base, tmp_path):
    from transformers import AutoModelForCausalLM

    run("merge", tmp_path / "adapter", tmp_path / "merged", "--base", base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-5)


def test_pull_copies_a_folder_too(adapted, tmp_path):
    run("pull", tmp_path / "adapter", "--to", tmp_path / "copy")
    copied = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    assert copied == {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}


def test_export(adapted, base, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    report = json.loads(run("export", tmp_path / "adapter", tmp_path / "lora", "--base", base, "--json").stdout)
    assert report["bytes"] > 0
    lora = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), logits(adapted), rtol=0, atol=1e-5)
    assert "exact" in run("export", tmp_path / "adapter", tmp_path / "lora", "--base", base).output


def test_cache(adapted, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_SARA_CACHE", str(tmp_path / "spectra"))
    assert json.loads(run("cache", "--json").stdout)["files"] == 0
    plan(make_model(), sara_arguments())
    assert json.loads(run("cache", "--json").stdout)["files"] == 4
    run("cache", "--clear")
    assert json.loads(run("cache", "--json").stdout)["bytes"] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "no/such/model"),
        ("plan", ".", "--threshold", 2),
        ("info", "no/such/adapter"),
        ("push", "no/such/adapter", "me/x"),
        ("pull", "no/such/adapter"),
        ("merge", "no/such/adapter", "out"),
        ("export", "no/such/adapter", "out"),
        ("generate", "no/such/adapter", "text"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(arguments):
    result = run(*arguments, code=1)
    assert result.stderr.startswith("hf-sara: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_wrong_usage_is_exit_code_2():
    run("plan", code=2)
    run("nonsense", code=2)
