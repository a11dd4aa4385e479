import contextlib
import json
import logging
import os
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import (
    attach_trained,
    base_state,
    edit_config,
    logits,
    make_inputs,
    make_model,
    make_tokenizer,
    same_bits,
    sara_arguments,
    train,
)
from packaging.version import Version
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import hf_sara
from hf_sara import (
    AdapterError,
    SaraAdapter,
    SaraArguments,
    export,
    export_lora,
    files,
    merge,
    merge_files,
    merge_shards,
)
from hf_sara.export import LORA_CONFIG_FILE, LORA_TENSORS_FILE

ONE_HEAD = {"method": "mo_sara", "num_heads": 1}
ONE_MATRIX = {
    "sara": {},
    "no S": {"singular_values": False},
    "zero Vh": {"zero_init_vh": True},
    "v back": ONE_HEAD,
    "v front": {**ONE_HEAD, "v_position": "front"},
    "no v": {**ONE_HEAD, "v_position": "none"},
}


@contextlib.contextmanager
def complaints():
    """What PEFT warns of and transformers logs; not how one of them is written."""
    found = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logger = transformers.logging.get_logger("transformers")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    found += [str(warning.message) for warning in caught if "deprecated" not in str(warning.message)]


def with_lora(folder, way="peft", family="llama", **changes):
    """A fresh base with the exported LoRA on it, and what was complained about on the way."""
    model = make_model(family, **changes)
    with complaints() as found:
        if way == "peft":
            model = peft.PeftModel.from_pretrained(model, folder)
        else:
            model.load_adapter(folder)
    return model.eval(), found


def saved_base(folder, family="llama", dtype=torch.float32, max_shard_size="5KB", **changes):
    """A base as files, in several of them, with a tokenizer's."""
    make_model(family, dtype=dtype, **changes).save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer.json").write_text('{"of": "the base"}')
    return folder


def saved_adapter(folder, family="llama", dtype=torch.float32, **changes):
    """A trained adapter as files, and the state of its base with the update merged in memory."""
    model = make_model(family, dtype=dtype)
    adapter = attach_trained(model, **changes)
    adapter.save_pretrained(folder)
    adapter.merge()
    return base_state(model)


def nothing_left(folder: Path) -> bool:
    """Neither the folder nor a temporary one beside it."""
    return not folder.exists() and not list(folder.parent.glob(f".{folder.name}.*"))


# ---- to LoRA ----


@pytest.mark.one_in(2)
@pytest.mark.parametrize("way", ["peft", "load_adapter"])
def test_peft_computes_what_the_adapter_does(family, way, tmp_path):
    for number, changes in enumerate(({}, ONE_HEAD)):
        folder = tmp_path / str(number)
        model = make_model(family)
        base = logits(model)
        adapter = attach_trained(model, **changes)
        if adapter.parts and way == "load_adapter" and Version(transformers.__version__) < Version("5.20"):
            pytest.skip("Before 5.20, load_adapter of transformers does not load modules that are trained in full.")
        live = logits(model)
        report = export_lora(adapter, folder)
        lora, found = with_lora(folder, way, family)
        assert not found
        assert float((live - base).abs().max()) > 1e-2
        assert torch.allclose(logits(lora, **make_inputs(model)), live, rtol=0, atol=1e-5)
        layers = {name.removeprefix("base_model.model."): m for name, m in lora.named_modules() if is_lora(m)}
        assert {name: layer.r["default"] for name, layer in layers.items()} == report.ranks
        assert all(layer.scaling["default"] == 1.0 for layer in layers.values())
        assert set(layers) == {site.module for site in adapter.sites}


def is_lora(module) -> bool:
    return isinstance(module, LoraLayer)


@pytest.mark.parametrize("way", ["peft", "load_adapter"])
def test_peft_would_complain_of_a_tensor_that_it_misses(way, tmp_path):
    attach_trained(model := make_model())
    export_lora(model, tmp_path)
    tensors = load_file(tmp_path / LORA_TENSORS_FILE)
    del tensors[next(iter(tensors))]
    save_file(tensors, tmp_path / LORA_TENSORS_FILE, metadata={"format": "pt"})
    assert with_lora(tmp_path, way)[1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "falcon_new", "bloom", "t5", "bert"])
def test_peft_merges_to_the_same_weights(family, tmp_path):
    model = make_model(family)
    adapter = attach_trained(model)
    export_lora(model, tmp_path)
    adapter.merge()
    expected = base_state(model)
    found = dict(with_lora(tmp_path, family=family)[0].merge_and_unload().state_dict())
    assert list(found) == list(expected)
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-6) for name in expected)


@pytest.mark.parametrize("changes", ONE_MATRIX.values(), ids=ONE_MATRIX)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_variant_that_is_one_matrix_can_be_exported(changes, family, tmp_path):
    model = make_model(family)
    base = logits(model)
    attach_trained(model, **changes)
    assert not torch.allclose(logits(model), base, atol=1e-2)
    export_lora(model, tmp_path)
    lora, found = with_lora(tmp_path, family=family)
    assert not found
    assert torch.allclose(logits(lora, **make_inputs(model)), logits(model), rtol=0, atol=1e-5)


def test_the_files_are_what_other_readers_expect(tmp_path):
    # vLLM ignores the patterns, and refuses other tensors, biases and saved modules.
    model = make_model()
    adapter = attach_trained(model, dropout=0.1)
    report = export_lora(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LORA_CONFIG_FILE, LORA_TENSORS_FILE]
    assert report.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    config = json.loads((tmp_path / LORA_CONFIG_FILE).read_text())
    assert config["r"] == config["lora_alpha"] == max(site.k for site in adapter.sites)
    assert config["rank_pattern"] == config["alpha_pattern"] == {site.name: site.k for site in adapter.sites}
    assert len(set(config["rank_pattern"].values())) > 1
    assert sorted(config["target_modules"]) == sorted(site.name for site in adapter.sites)
    assert (config["bias"], config["modules_to_save"], config["fan_in_fan_out"]) == ("none", None, False)
    assert (config["lora_dropout"], config["task_type"]) == (0.1, "CAUSAL_LM")
    with safe_open(tmp_path / LORA_TENSORS_FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(tmp_path / LORA_TENSORS_FILE)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        f"base_model.model.{site.name}.lora_{part}.weight": shape
        for site in adapter.sites
        for part, shape in (("A", (site.k, site.shape[0])), ("B", (site.shape[1], site.k)))
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("family", "task"),
    [("gpt2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("bert", None), ("vit", None)],
)
def test_the_task_follows_from_the_class(family, task, tmp_path):
    model = make_model(family)
    attach_trained(model)
    base = tmp_path / "base"
    make_model(family).save_pretrained(base)
    export_lora(model, tmp_path / "lora", base_model_name_or_path=str(base))
    assert json.loads((tmp_path / "lora" / LORA_CONFIG_FILE).read_text())["task_type"] == task
    # PEFT's own way to find base and class.
    kinds = {"CAUSAL_LM": peft.AutoPeftModelForCausalLM, "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM}
    lora = kinds.get(task, peft.AutoPeftModel).from_pretrained(tmp_path / "lora")
    assert torch.allclose(logits(lora, **make_inputs(model)), logits(model), rtol=0, atol=1e-5)


def test_the_base_is_named_where_it_is_on_the_hub(tmp_path):
    def named(**options):
        export_lora(model, tmp_path / "lora", **options)
        config = json.loads((tmp_path / "lora" / LORA_CONFIG_FILE).read_text())
        return config["base_model_name_or_path"], config["revision"]

    model = make_model()
    attach_trained(model)
    assert named() == (None, None)
    model.config._name_or_path = str(tmp_path)
    assert named() == (None, None)
    model.config._name_or_path, model.config._commit_hash = "me/base", "0123456789abcdef0123456789abcdef01234567"
    assert named() == ("me/base", "0123456789abcdef0123456789abcdef01234567")
    assert named(base_model_name_or_path="you/base") == ("you/base", None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_of_the_base_are_exported_in_float32(dtype, tmp_path):
    model = make_model("gpt2", dtype=dtype)
    adapter = attach_trained(model, **ONE_HEAD)
    export_lora(model, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / LORA_TENSORS_FILE).values()} == {torch.float32}
    merged = dense_updates(tmp_path)
    for site, delta in adapter.deltas():
        found = site.slice.view(merged[site.module], dim=0).flatten(0, 1).t()
        assert torch.allclose(found, delta.merged().float(), atol=1e-6)


def dense_updates(folder) -> dict[str, torch.Tensor]:
    """B A of every module in an exported folder, of shape (d_out, d_in)."""
    tensors = load_file(folder / LORA_TENSORS_FILE)
    names = [name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name]
    return {
        name.removeprefix("base_model.model."): tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        for name in names
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("max_rank", [1, 3, 6])
def test_a_cut_makes_the_error_that_it_reports_and_the_least_possible_one(family, max_rank, tmp_path, caplog):
    model = make_model(family)
    attach_trained(model, threshold=0.4)
    exact = export_lora(model, tmp_path / "exact")
    with caplog.at_level(logging.INFO, "hf_sara.export"):
        report = export_lora(model, tmp_path / "cut", max_rank=max_rank)
    assert str(report) in caplog.text
    whole, cut = dense_updates(tmp_path / "exact"), dense_updates(tmp_path / "cut")
    for name in whole:
        error = float((whole[name] - cut[name]).norm() / whole[name].norm())
        values = torch.linalg.svdvals(whole[name].double())
        least = float(values[max_rank:].norm() / values.norm())
        assert report.errors[name] == pytest.approx(error, abs=1e-6)
        assert report.errors[name] == pytest.approx(least, abs=1e-6)
        assert report.ranks[name] == min(max_rank, exact.ranks[name])
        assert (report.errors[name] > 0.01) == (exact.ranks[name] > max_rank)
    assert report.largest_error == max(report.errors.values())
    assert ("relative error up to" in str(report)) == (max(exact.ranks.values()) > max_rank)
    lora, found = with_lora(tmp_path / "cut", family=family)
    assert not found
    assert {layer.r["default"] for layer in lora.modules() if is_lora(layer)} == set(report.ranks.values())


def test_a_cut_that_is_wide_enough_is_exact(tmp_path):
    model = make_model("gpt2")
    attach_trained(model)
    exact = export_lora(model, tmp_path / "exact")
    wide = export_lora(model, tmp_path / "wide", max_rank=max(exact.ranks.values()))
    assert wide == exact
    assert wide.largest_error == 0.0
    assert str(wide).endswith("bytes, exact")
    assert same_bits(*(load_file(tmp_path / name / LORA_TENSORS_FILE) for name in ("exact", "wide")))


def test_an_update_of_zero_is_cut_without_error(tmp_path):
    model = make_model()
    SaraAdapter.attach(model, sara_arguments(zero_init_vh=True))
    report = export_lora(model, tmp_path, max_rank=1)
    assert report.largest_error == 0.0
    assert not any(update.any() for update in dense_updates(tmp_path).values())


def test_a_module_whose_name_is_the_end_of_another_is_told_apart(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 8)))

    x = torch.randn(3, 8)
    for number, targets in enumerate((["^0"], ["^0", r"1\.0"], [r"1\.0"])):
        model = make()
        SaraAdapter.attach(model, SaraArguments(threshold=0.9, target_modules=targets))
        folder = tmp_path / str(number)
        report = export_lora(model, folder)
        # With one rank for both, a mistaken one would fit.
        assert len(set(report.ranks.values())) == len(report.ranks) == len(targets)
        lora = peft.PeftModel.from_pretrained(make(), folder).eval()
        adapted = {name.removeprefix("base_model.model.") for name, m in lora.named_modules() if is_lora(m)}
        assert adapted == set(report.ranks)
        assert torch.allclose(lora(x), model.eval()(x), atol=1e-6)


def test_a_merged_or_disabled_adapter_exports_the_same(tmp_path):
    model = make_model()
    adapter = attach_trained(model)
    export_lora(model, tmp_path / "live")
    adapter.disable()
    export_lora(model, tmp_path / "disabled")
    adapter.enable()
    adapter.merge()
    export_lora(model, tmp_path / "merged")
    live, *others = (load_file(tmp_path / n / LORA_TENSORS_FILE) for n in ("live", "disabled", "merged"))
    assert all(same_bits(live, other) for other in others)


def test_what_cannot_be_exported_leaves_no_files(tmp_path):
    folder = tmp_path / "lora"
    model = make_model()
    with pytest.raises(ValueError, match="carries no SARA adapter"):
        export_lora(model, folder)
    several = attach_trained(model, "mo_sara")
    with pytest.raises(ValueError, match=r"3 heads depends on the token.*num_heads=1"):
        export_lora(several, folder)
    single = attach_trained(model, name="single")
    with pytest.raises(ValueError, match="carries the adapters default, single"):
        export_lora(model, folder)
    with pytest.raises(ValueError, match="max_rank=0 has to be at least 1"):
        export_lora(single, folder, max_rank=0)
    with torch.no_grad():
        single.delta(single.sites[2]).Vh[0, 0] = torch.inf
    for max_rank in (None, 1):
        with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.q_proj\.lora_B\.weight: .*NaN or infinite"):
            export_lora(single, folder, max_rank=max_rank)
    assert nothing_left(folder)


def test_exporting_needs_no_peft_and_importing_stays_light():
    source = Path(export.__file__).read_text()
    assert "import peft" not in source
    assert "from peft" not in source
    assert {"export_lora", "merge", "merge_shards", "ExportReport"} <= set(hf_sara.__all__)
    with pytest.raises(AttributeError, match="no attribute 'export_other'"):
        hf_sara.export_other  # noqa: B018


# ---- merging in memory ----


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_in_memory_leaves_a_plain_model(family, dtype):
    model = make_model(family, dtype=dtype)
    names, attributes, kind = list(model.state_dict()), set(vars(model)), type(model)
    adapter = attach_trained(model)
    adapter.merge()
    expected, output = base_state(model), logits(model)
    adapter.unmerge()
    plain = merge(model if dtype is torch.float32 else adapter)
    assert plain is model
    assert type(plain) is kind
    assert set(vars(plain)) == attributes
    assert list(plain.state_dict()) == names
    assert same_bits(dict(plain.state_dict()), expected)
    assert torch.equal(logits(plain), output)
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert not any(hasattr(module, "sara") or module._forward_hooks for module in plain.modules())
    assert plain.dtype == dtype


@pytest.mark.parametrize("changes", ONE_MATRIX.values(), ids=ONE_MATRIX)
def test_every_variant_that_is_one_matrix_can_be_merged(changes):
    model = make_model("gpt_neox")
    base = logits(model)
    attach_trained(model, **changes)
    live = logits(model)
    merge(model)
    assert float((live - base).abs().max()) > 1e-2
    assert torch.allclose(logits(model), live, rtol=0, atol=1e-5)


def test_what_cannot_be_merged_stays_as_it_was(tmp_path):
    folder = tmp_path / "merged"
    model = make_model()
    adapter = attach_trained(model, "mo_sara")
    state, live = dict(model.state_dict()), logits(model)
    for where in (None, folder):
        with pytest.raises(ValueError, match="3 heads depends on the token"):
            merge(model, where)
    other = SaraAdapter.attach(model, name="other")
    with pytest.raises(ValueError, match=r"carries the adapters \['default', 'other'\], and a plain model"):
        merge(other)
    other.detach()
    assert same_bits(dict(model.state_dict()), state)
    assert torch.equal(logits(model), live)
    assert SaraAdapter.of(model) is adapter
    assert nothing_left(folder)


def test_a_weight_that_is_tied_to_another_is_not_merged(tmp_path):
    # The embedding would change with the output layer.
    model = make_model(tie_word_embeddings=True)
    adapter = attach_trained(model, target_modules=["lm_head"])
    state = base_state(model)
    with pytest.raises(ValueError, match=r"lm_head: its weight is tied to model\.embed_tokens"):
        merge(model)
    assert same_bits(base_state(model), state)
    # A LoRA can be of it, and so can a model that is not tied.
    adapter.save_pretrained(tmp_path / "adapter")
    base = saved_base(tmp_path / "base", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"is tied to model\.embed_tokens"):
        merge_shards(base, tmp_path / "adapter", tmp_path / "merged")
    assert nothing_left(tmp_path / "merged")
    free = make_model(tie_word_embeddings=False)
    attach_trained(free, target_modules=["lm_head"])
    live = logits(free)
    assert torch.allclose(logits(merge(free)), live, atol=1e-5)


# ---- merging to files ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_new", "t5", "bert"])
def test_a_merged_folder_is_a_plain_model(family, dtype, tmp_path):
    model = make_model(family, dtype=dtype)
    plain_names = saved_names(model, tmp_path / "plain")
    adapter = attach_trained(model)
    adapter.merge()
    expected, output = base_state(model), logits(model)
    adapter.unmerge()
    state, live = dict(model.state_dict()), logits(model)
    assert merge(model, tmp_path / "merged") is model
    assert names_in(tmp_path / "merged") == plain_names
    with complaints() as found:
        again = type(model).from_pretrained(tmp_path / "merged").eval()
    assert not found
    assert again.dtype == dtype
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(same_bits({"": tensor}, {"": expected[name]}) for name, tensor in tensors.items())
    if dtype == torch.float32:
        # In half precision, what is not a weight is not what `model.to` makes it: rotary frequencies, T5's float32.
        assert same_bits(dict(again.state_dict()), expected)
        assert torch.equal(logits(again), output)
    # The model in memory has its own bits and its adapter.
    assert same_bits(dict(model.state_dict()), state)
    assert torch.equal(logits(model), live)
    assert SaraAdapter.of(model) is adapter
    assert not adapter.merged
    train(adapter)


def saved_names(model, folder) -> dict[str, list[str]]:
    model.save_pretrained(folder)
    return names_in(folder)


def names_in(folder) -> dict[str, list[str]]:
    """The files of a folder, with the tensors in them."""
    return {
        path.name: sorted(load_file(path)) if path.suffix == ".safetensors" else []
        for path in sorted(folder.iterdir())
    }


def test_a_merged_folder_can_have_several_weights_files(tmp_path):
    model = make_model("gpt2")
    attach_trained(model)
    merge(model, tmp_path / "one")
    merge(model, tmp_path / "many", max_shard_size="5KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "many"))
    assert same_bits(dict(one.state_dict()), dict(many.state_dict()))


def test_weights_are_not_overwritten_and_other_files_stay(tmp_path):
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    model = make_model()
    adapter = attach_trained(model)
    merge(model, folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert folder / "tokenizer.json" in before
    adapter.save_pretrained(tmp_path / "adapter")
    with pytest.raises(FileExistsError, match=r"merged holds model\.safetensors already\. Choose another"):
        merge(model, folder)
    with pytest.raises(FileExistsError, match="already"):
        merge_shards(folder, tmp_path / "adapter", folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert not adapter.merged


def test_a_disk_that_fails_leaves_the_model_and_no_folder(tmp_path, monkeypatch):
    model = make_model()
    adapter = attach_trained(model)
    state = dict(model.state_dict())

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        merge(model, tmp_path / "merged")
    assert nothing_left(tmp_path / "merged")
    assert not adapter.merged
    assert same_bits(dict(model.state_dict()), state)


def test_a_folder_without_all_of_its_files_is_not_taken_for_a_model(tmp_path, monkeypatch):
    attach_trained(model := make_model())
    replace, moved = os.replace, []

    def cut_off(source, target):
        if len(moved) == 2:
            raise OSError("power cut")
        moved.append(target)
        replace(source, target)

    def power_cut(*_):
        raise OSError("power cut")

    # The folder takes its place in one step.
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "rename", power_cut)
        with pytest.raises(OSError, match="power cut"):
            merge(model, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
    # Where the system cannot do that, the configuration comes last.
    (tmp_path / "merged").mkdir()
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    monkeypatch.setattr(files.os, "replace", cut_off)
    with pytest.raises(OSError, match="power cut"):
        merge(model, tmp_path / "merged")
    assert "config.json" not in {path.name for path in (tmp_path / "merged").iterdir()}


# ---- merging file by file ----


@pytest.mark.one_in(2)
@pytest.mark.parametrize("changes", [{}, ONE_HEAD], ids=["sara", "mo_sara"])
def test_files_merge_to_the_bits_of_a_merge_in_memory(family, changes, tmp_path):
    base = saved_base(tmp_path / "base", family)
    expected = saved_adapter(tmp_path / "adapter", family, **changes)
    before = {path: path.read_bytes() for path in base.iterdir()}
    merge_shards(base, tmp_path / "adapter", tmp_path / "merged")
    assert {path: path.read_bytes() for path in base.iterdir()} == before
    assert names_in(tmp_path / "merged") == names_in(base)
    assert len(list(base.glob("*.safetensors"))) > 3
    with complaints() as found:
        model = type(make_model(family)).from_pretrained(tmp_path / "merged")
    assert not found
    assert same_bits(dict(model.state_dict()), expected)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("changes", ONE_MATRIX.values(), ids=ONE_MATRIX)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_merge_in_every_dtype_and_variant(dtype, changes, tmp_path):
    base = saved_base(tmp_path / "base", "gpt2", dtype, max_shard_size="50GB")
    expected = saved_adapter(tmp_path / "adapter", "gpt2", dtype, **changes)
    merge_shards(base, tmp_path / "adapter", tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == dtype
    assert same_bits(dict(model.state_dict()), expected)


def test_files_merge_with_saved_factors_too(tmp_path):
    base = saved_base(tmp_path / "base")
    expected = saved_adapter(tmp_path / "adapter", factors="save", **ONE_HEAD)
    merge_shards(base, tmp_path / "adapter", tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert same_bits(dict(model.state_dict()), expected)


def test_all_but_the_adapted_weights_is_copied_byte_by_byte(tmp_path):
    base = saved_base(tmp_path / "base")
    (base / "README.md").write_text("The card of the base.")
    (base / "pytorch_model.bin.index.json").write_text("{}")
    saved_adapter(tmp_path / "adapter")
    merge_shards(base, tmp_path / "adapter", tmp_path / "merged")
    names = {path.name for path in base.iterdir()} - {"README.md", "pytorch_model.bin.index.json"}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names
    changed = set()
    for name in names:
        one, other = base / name, tmp_path / "merged" / name
        if name.endswith(".safetensors"):
            with safe_open(one, "pt") as a, safe_open(other, "pt") as b:
                assert a.metadata() == b.metadata()
                changed |= {key for key in a.keys() if not torch.equal(a.get_tensor(key), b.get_tensor(key))}  # noqa: SIM118
        else:
            assert one.read_bytes() == other.read_bytes()
    assert changed == {f"model.layers.{n}.self_attn.{p}_proj.weight" for n in (0, 1) for p in "qv"}


def test_only_adapted_weights_are_read_and_one_file_at_a_time(tmp_path, monkeypatch):
    base = saved_base(tmp_path / "base")
    saved_adapter(tmp_path / "adapter")
    read, is_open = [], []

    class Watched:
        def __init__(self, path, framework):
            self.path, self.file = path, safe_open(path, framework)

        def __enter__(self):
            is_open.append(self.path)
            assert len(is_open) == 1
            return self

        def __exit__(self, *error):
            is_open.remove(self.path)

        def keys(self):
            return self.file.keys()

        def get_slice(self, key):
            return self.file.get_slice(key)

        def get_tensor(self, key):
            read.append(key)
            return self.file.get_tensor(key)

    monkeypatch.setattr(merge_files, "safe_open", Watched)
    merge_shards(base, tmp_path / "adapter", tmp_path / "merged")
    assert sorted(read) == [f"model.layers.{n}.self_attn.{p}_proj.weight" for n in (0, 1) for p in "qv"]


@pytest.mark.parametrize("of_the_adapter", ["GPT2Model", "GPT2LMHeadModel"])
def test_names_of_a_checkpoint_may_have_the_models_prefix_or_not(of_the_adapter, tmp_path):
    whole = make_model("gpt2")
    inner = make_model("gpt2").transformer
    base = tmp_path / "base"
    (inner if of_the_adapter == "GPT2LMHeadModel" else whole).save_pretrained(base)
    model = whole if of_the_adapter == "GPT2LMHeadModel" else inner
    torch.manual_seed(0)
    adapter = SaraAdapter.attach(model, sara_arguments())
    adapter.save_pretrained(tmp_path / "adapter")
    merge_shards(base, tmp_path / "adapter", tmp_path / "merged")
    assert names_in(tmp_path / "merged") == names_in(base)
    merge(model)
    again = type(model).from_pretrained(tmp_path / "merged")
    assert all(torch.equal(again.get_parameter(n), p) for n, p in model.named_parameters() if "c_attn" in n)


@pytest.mark.parametrize("save_original_format", [True, False])
def test_names_that_transformers_changes_as_it_loads_are_found(save_original_format, tmp_path):
    base = tmp_path / "base"
    make_model("vit").save_pretrained(base, save_original_format=save_original_format)
    expected = saved_adapter(tmp_path / "adapter", "vit")
    names = list(load_file(base / "model.safetensors"))
    assert ("vit.layers.0.attention.q_proj.weight" in names) != save_original_format
    merge_shards(base, tmp_path / "adapter", tmp_path / "merged")
    assert list(load_file(tmp_path / "merged" / "model.safetensors")) == names
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert same_bits(dict(model.state_dict()), expected)


def test_a_merged_folder_has_the_tokenizer_of_the_adapter_where_it_has_one_of_its_own(tmp_path):
    base = tmp_path / "base"
    tokenizer = make_tokenizer()
    make_model(vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    for name in ("chat_template.jinja", "preprocessor_config.json"):
        (base / name).write_text("{}")
    model = make_model(vocab_size=len(tokenizer))
    attach_trained(model).save_pretrained(tmp_path / "adapter")
    merge_shards(base, tmp_path / "adapter", tmp_path / "of the base")
    assert (tmp_path / "of the base" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    tokenizer.add_tokens(["<star>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "source.spm").write_bytes(b"pieces")
    merge_shards(base, tmp_path / "adapter", tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json", "source.spm"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    # A template of the base does not belong to this tokenizer; a processor that nobody replaced stays.
    assert not (tmp_path / "merged" / "chat_template.jinja").exists()
    assert (tmp_path / "merged" / "preprocessor_config.json").exists()
    assert "<star>" in transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab()


# ---- file by file: what goes wrong ----


def refused(base, adapter, message, error=ValueError):
    folder = base.parent / "merged"
    with pytest.raises(error, match=message):
        merge_shards(base, adapter, folder)
    assert nothing_left(folder)


def test_files_of_another_base_are_refused(tmp_path):
    saved_adapter(tmp_path / "sara")
    saved_adapter(tmp_path / "mo_sara", **ONE_HEAD)
    attach_trained(make_model(), "mo_sara").save_pretrained(tmp_path / "heads")
    base = saved_base(tmp_path / "base")
    refused(base, tmp_path / "heads", "3 heads depends on the token")
    refused(tmp_path / "nowhere", tmp_path / "sara", "There is no base folder", FileNotFoundError)
    refused(base, tmp_path / "nowhere", "There is no adapter folder", FileNotFoundError)
    other = saved_base(tmp_path / "gpt2", "gpt2")
    refused(
        other, tmp_path / "sara", "trained on a model of type 'llama', and .* holds one of type 'gpt2'", AdapterError
    )
    wide = saved_base(tmp_path / "wide", hidden_size=32)
    refused(wide, tmp_path / "sara", r"is for a weight of shape \(24, 24\), this model's has \(32, 32\)", AdapterError)
    # Mo-SARA's factors are those of one base only, in one dtype.
    seed = saved_base(tmp_path / "seed", seed=1)
    refused(seed, tmp_path / "mo_sara", "SHA-256 differs", AdapterError)
    half = saved_base(tmp_path / "half", dtype=torch.bfloat16)
    refused(half, tmp_path / "mo_sara", "trained on a float32 base, this one is bfloat16", AdapterError)


def test_a_class_outside_of_transformers_is_refused(tmp_path):
    base = saved_base(tmp_path / "base")
    saved_adapter(tmp_path / "adapter")
    # The second is a name of transformers, but nothing that a file may call.
    for name in ("MyModel", "pipeline"):
        edit_config(tmp_path / "adapter", lambda config, name=name: config["base"].update({"class": name}))
        refused(base, tmp_path / "adapter", f"trained on a {name}, which is not a model class of transformers")


def test_damaged_files_of_the_base_are_refused(tmp_path):
    saved_adapter(tmp_path / "adapter")

    def damaged(name, change, message, error=ValueError, max_shard_size="5KB"):
        base = saved_base(tmp_path / name, max_shard_size=max_shard_size)
        change(base)
        refused(base, tmp_path / "adapter", message, error)

    def last_shard(base):
        return sorted(base.glob("*.safetensors"))[-1]

    def edit_one(change):
        def edit(base):
            tensors = load_file(base / "model.safetensors")
            change(tensors)
            save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})

        return edit

    index = "model.safetensors.index.json"
    q = "model.layers.1.self_attn.q_proj.weight"
    one = {"max_shard_size": "50GB"}
    damaged("cut", lambda b: last_shard(b).write_bytes(last_shard(b).read_bytes()[:-9]), r"\.safetensors is damaged")
    damaged("gone", lambda b: last_shard(b).unlink(), r"safetensors", FileNotFoundError)
    damaged("index", lambda b: (b / index).write_text("{}"), "not an index of weights files")
    damaged(
        "path", lambda b: (b / index).write_text('{"weight_map": {"a": "../x.safetensors"}}'), "not a file of this"
    )
    damaged("bare", lambda b: (b / index).unlink(), "has neither model.safetensors nor", FileNotFoundError)
    damaged("lack", edit_one(lambda t: t.pop(q)), f"have no tensor for {q}", **one)
    damaged("shape", edit_one(lambda t: t.update({q: t[q][1:]})), r"the file has the shape \(23, 24\)", **one)
    damaged("int8", edit_one(lambda t: t.update({q: t[q].to(torch.int8)})), "stored as I8 is quantized", **one)


def test_a_sum_that_the_dtype_cannot_hold_leaves_no_folder(tmp_path):
    base = saved_base(tmp_path / "base", dtype=torch.float16)
    model = make_model(dtype=torch.float16)
    adapter = SaraAdapter.attach(model, sara_arguments())
    with torch.no_grad():
        adapter.delta(adapter.sites[-1]).U.fill_(1e6)
    adapter.save_pretrained(tmp_path / "adapter")
    refused(base, tmp_path / "adapter", r"layers\.1\.self_attn\.v_proj: .*range of torch\.float16")
