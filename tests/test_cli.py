import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import attach_trained, logits, make_model, make_tokenizer, sara_arguments
from typer.testing import CliRunner

import hf_sara
from hf_sara import plan, storage
from hf_sara.cache import cache_files
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
    first, *others = text.splitlines()
    assert "2 sites" in first
    assert "neither merged nor exported" in first
    assert "Only num_heads=1" in others[0]
    assert [line.split() for line in others[2:4]] == [["layer", "q_proj", "v_proj"], ["1", "24", "12"]]


def test_ranks_for_peft(base):
    found = json.loads(run("plan", base, "--threshold", 0.3, "--peft", "--device", "cpu").stdout)
    ranks = {
        site["site"]: site["k"] for site in json.loads(run("plan", base, "--threshold", 0.3, "--json").stdout)["sites"]
    }
    assert found == {"target_modules": list(ranks), "rank_pattern": ranks, "alpha_pattern": ranks}
    assert "device='cuda:9' is not one of this machine" in run("plan", base, "--device", "cuda:9", code=1).stderr


def test_a_plan_has_a_row_for_each_layer(tmp_path):
    make_model(num_hidden_layers=6).save_pretrained(tmp_path)
    options = ("plan", tmp_path, "--threshold", 0.3, "--target-modules", "all-linear")
    lines = run(*options).output.splitlines()
    assert "42 sites" in lines[0]
    assert len(lines) < 20
    assert run(*options, "--summary").output == lines[0] + "\n"
    assert len(json.loads(run(*options, "--json").stdout)["sites"]) == 42
    assert "sites" not in json.loads(run(*options, "--json", "--summary").stdout)


def test_a_plan_is_drawn(base, tmp_path):
    run("plan", base, "--plot", tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options",
    [
        ("--target-modules", "q_proj,k_proj"),
        ("--target-modules", "q_proj, k_proj"),
        ("--target-modules", "q_proj", "--target-modules", "k_proj"),
        ("--target-modules", r".*\.(q|k)_pro{1,2}j"),
        ("--target-modules", "all-linear", "--exclude-modules", "o_proj,v_proj,gate_proj,up_proj,down_proj"),
    ],
)
def test_a_list_is_repeated_or_has_commas(base, options):
    tokens = ("--modules-to-save", "norm,input_layernorm", "--trainable-token-indices", "3,5")
    found = json.loads(run("plan", base, *options, *tokens, "--json").stdout)
    assert {site["site"].rsplit(".")[-1] for site in found["sites"]} == {"q_proj", "k_proj"}
    how = {part["name"]: part["how"] for part in found["parts"]}
    assert how["model.norm"] == how["model.layers.0.input_layernorm"] == "trained in full"
    assert how["model.embed_tokens"] == "2 rows trained"


def test_the_version():
    assert run("--version").output == f"hf-sara {hf_sara.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "BASE", "--budget", 0.3), "--budget='0.3' is neither a count"),
        (("plan", "BASE", "--budget", 0.3), "Was '0.3%' meant?"),
        (("plan", "BASE", "--target-modules", "foo"), "--target-modules='foo' matches no linear module"),
        (("plan", "BASE", "--threshold", 2), "--threshold=2.0 has to be a number with 0 < threshold <= 1."),
        (("plan", "BASE", "--budget", 3), "or choose fewer --target-modules or layers."),
        (("plan", "target_modules/base_model"), "The model 'target_modules/base_model' cannot be read"),
        (("plan", "BASE", "--layers", "threshold=3"), "cannot read 'threshold=3'"),
        (("merge", "ADAPTER", "out"), "Give its folder or Hub id as --base."),
        (("export", "ADAPTER", "out"), "Give its folder or Hub id as --base."),
        (("export", "ADAPTER", "out", "--base", "BASE", "--max-rank", 0), "--max-rank=0 has to be at least 1"),
    ],
)
def test_an_error_names_the_option(adapted, base, tmp_path, arguments, message):
    names = {"BASE": base, "ADAPTER": tmp_path / "adapter", "out": tmp_path / "out"}
    assert message in run(*(names.get(argument, argument) for argument in arguments), code=1).stderr


def test_info(adapted, tmp_path):
    found = json.loads(run("info", tmp_path / "adapter", "--json").stdout)
    assert found["trained_parameters"] == adapted.sara_adapter.num_parameters()
    assert found["bytes"] == storage.size_on_disk(tmp_path / "adapter")
    first, *others = run("info", tmp_path / "adapter").output.splitlines()
    assert "4 sites" in first
    assert ["0", "4", "3"] in [line.split() for line in others]
    assert run("info", tmp_path / "adapter", "--summary").output == first + "\n"


def test_info_tells_heads_dropout_dtype_versions_and_settings(tmp_path):
    attach_trained(make_model(), "mo_sara", dropout=0.25).save_pretrained(tmp_path)
    (tmp_path / "training_args.json").write_text('{"learning_rate": 0.02, "max_steps": -1, "optim": "x\\u001b"}')
    text = run("info", tmp_path).output
    assert "3 heads, dropout 0.25, float32" in text
    assert f"versions: hf_sara {hf_sara.__version__}, transformers" in text
    assert "training: learning_rate 0.02, optim x\\x1b\n" in text
    found = json.loads(run("info", tmp_path, "--json").stdout)
    assert (found["heads"], found["dropout"], found["dtype"]) == (3, 0.25, "float32")
    assert found["training"]["learning_rate"] == 0.02


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b'{"learning_rate": [1]}', b"[" * 10**6, b" " * 2**21])
def test_info_tells_nothing_of_broken_settings(adapted, tmp_path, content):
    path = tmp_path / "adapter" / "training_args.json"
    path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
    assert json.loads(run("info", tmp_path / "adapter", "--json").stdout)["training"] == {}
    assert "training" not in run("info", tmp_path / "adapter").output


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
    shown = [line.split() for line in run("info", tmp_path / "classifier").output.splitlines()]
    assert ["classifier", "trained", "in", "full", "75"] in shown
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
    # AutoPeftModel finds the base by its name.
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    torch.testing.assert_close(logits(auto), logits(adapted), rtol=0, atol=1e-5)


def test_export_replaces_a_lora_only_if_it_is_told_to(adapted, base, tmp_path):
    arguments = ("export", tmp_path / "adapter", tmp_path / "lora", "--base", base)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "notes.txt").write_text("mine")
    assert "is not empty. Give another folder, or --overwrite" in run(*arguments, code=1).stderr
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["notes.txt"]
    assert "exact" in run(*arguments, "--overwrite").output
    assert (tmp_path / "lora" / "notes.txt").read_text() == "mine"


def test_cache(adapted, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_SARA_CACHE", str(tmp_path / "spectra"))
    assert json.loads(run("cache", "--json").stdout)["files"] == 0
    plan(make_model(), sara_arguments())
    assert json.loads(run("cache", "--json").stdout)["files"] == 4
    with monkeypatch.context() as patch:
        patch.setattr("hf_sara.cache.clear_cache", cache_files)
        assert "4 of 4 files in" in run("cache", "--clear", code=1).output
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


def test_what_a_code_page_lacks_is_printed_as_an_escape():
    code = "from hf_sara.errors import print_anything\nprint_anything()\nprint('é 数')"
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert done.stdout.split() == ["é".encode("cp1252"), rb"\u6570"]
