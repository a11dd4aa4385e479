import copy
import json

import pytest
import torch
from conftest import base_state, logits, make_inputs, make_model, same_bits
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from harness import bottleneck
from harness.bottleneck import attach_bottleneck, find_bottleneck_sites, load_bottleneck, save_bottleneck
from hf_sara import AdapterError

FAMILIES = ["llama", "gpt2", "gptj"]
METHODS = ["series_adapter", "parallel_adapter"]


def attach(method, family="llama", trained=True, dropout=0.0, **choice):
    model = make_model(family)
    attach_bottleneck(model, method, find_bottleneck_sites(model, method, **choice), size=4, dropout=dropout)
    if trained:
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if ".bottleneck." in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_it_starts_with_small_weights_and_only_it_is_trained(method, family):
    base = make_model(family)
    model = attach(method, family, trained=False)
    assert type(model) is type(base)
    start = torch.cat([p.flatten() for name, p in model.named_parameters() if ".bottleneck." in name])
    assert abs(start.std() - 0.02) < 0.002
    assert abs(start.mean()) < 0.002
    kept = {name: tensor for name, tensor in model.state_dict().items() if ".bottleneck." not in name}
    assert same_bits(kept, base_state(base))
    model(**make_inputs(model)).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".bottleneck." in name)
        assert parameter.grad is None or parameter.grad.abs().max() > 0


@torch.no_grad()
def update(adapter, x):
    return torch.tanh(x @ adapter.down.weight.T) @ adapter.up.weight.T


@pytest.mark.parametrize(
    ("family", "way_in", "way_out"), [("llama", "up_proj", "down_proj"), ("gpt2", "c_fc", "c_proj")]
)
def test_a_series_adapter_changes_the_input_of_the_way_in_and_the_output_of_the_way_out(family, way_in, way_out):
    base, model = make_model(family), attach("series_adapter", family)
    block = "model.layers.0.mlp" if family == "llama" else "transformer.h.0.mlp"
    torch.manual_seed(0)
    for name, shape in ((way_in, 24), (way_out, base.get_submodule(f"{block}.{way_out}").weight.shape)):
        plain, adapted = (m.get_submodule(f"{block}.{name}") for m in (base, model))
        x = torch.randn(2, 5, shape if isinstance(shape, int) else next(s for s in shape if s != 24))
        adapter = adapted.bottleneck["series"]
        before = x + update(adapter, x) if name == way_in else x
        expected = plain(before)
        expected = expected if name == way_in else expected + update(adapter, expected)
        torch.testing.assert_close(adapted(x), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["adapter_l", "adapter_h"])
def test_the_adapters_of_houlsby_and_lin_stand_behind_a_block(method, family):
    base, model = make_model(family), attach(method, family)
    names = [
        name.rsplit(".bottleneck", 1)[0] for name, _ in model.named_modules() if name.endswith("bottleneck.series")
    ]
    assert len(names) == (2 if method == "adapter_l" else 4)
    for name in names:
        plain, adapted = base.get_submodule(name), model.get_submodule(name)
        adapter = adapted.bottleneck["series"]
        width = plain.weight.shape[0 if family == "gpt2" else 1]
        x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0))
        y = plain(x)
        into = (
            torch.nn.functional.layer_norm(y, (24,), adapter.norm.weight, adapter.norm.bias)
            if method == "adapter_l"
            else y
        )
        hidden = torch.relu(into @ adapter.down.weight.T + adapter.down.bias)
        torch.testing.assert_close(adapted(x), y + hidden @ adapter.up.weight.T + adapter.up.bias)
    blocks = {"llama": ("o_proj", "down_proj"), "gpt2": ("attn.c_proj", "mlp.c_proj"), "gptj": ("out_proj", "fc_out")}
    ends = blocks[family][1:] if method == "adapter_l" else blocks[family]
    assert all(name.endswith(ends) for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_parallel_adapter_stands_beside_query_key_and_value(family):
    base, model = make_model(family), attach("parallel_adapter", family)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    if family == "gpt2":
        plain, adapted = (m.transformer.h[1].attn.c_attn for m in (base, model))
        parts = [update(adapted.bottleneck[label], x) for label in "qkv"]
        torch.testing.assert_close(adapted(x), plain(x) + torch.cat(parts, dim=-1))
        return
    layer = "model.layers.1.self_attn" if family == "llama" else "transformer.h.1.attn"
    for name in ("q_proj", "k_proj", "v_proj"):
        plain, adapted = (m.get_submodule(f"{layer}.{name}") for m in (base, model))
        torch.testing.assert_close(adapted(x), plain(x) + update(adapted.bottleneck["whole"], x))


def test_the_series_adapter_of_llama_7b_is_2_9_percent():
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    base = sum(p.numel() for p in model.parameters())
    attach_bottleneck(model, "series_adapter", find_bottleneck_sites(model, "series_adapter"), size=256)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 32 * 3 * (4096 * 256 + 256 * 4096)
    assert round(100 * trained / (base + trained), 1) == 2.9


def test_dropout_acts_in_training_alone():
    model = attach("parallel_adapter", dropout=0.5)
    inputs = make_inputs(model)
    assert torch.equal(logits(model, **inputs), logits(model, **inputs))
    with torch.no_grad():
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_trained_tensors_are_float32_on_a_base_in_half_precision():
    model = make_model(dtype=torch.bfloat16)
    attach_bottleneck(model, "parallel_adapter", find_bottleneck_sites(model, "parallel_adapter"), size=4)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(**make_inputs(model)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("method", METHODS)
def test_it_is_saved_loaded_and_copied(method, tmp_path):
    model = attach(method, "gpt2")
    save_bottleneck(model, tmp_path)
    fresh = make_model("gpt2")
    load_bottleneck(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert all(".bottleneck." in name for name in load_file(tmp_path / bottleneck.TENSORS_FILE))


def test_what_cannot_be_loaded_is_named(tmp_path):
    save_bottleneck(attach("parallel_adapter"), tmp_path)
    with pytest.raises(AdapterError, match=r"stands at 'model.layers.0.self_attn.q_proj', which this model"):
        load_bottleneck(make_model("gpt2"), tmp_path)
    config = json.loads((tmp_path / bottleneck.CONFIG_FILE).read_text())
    (tmp_path / bottleneck.CONFIG_FILE).write_text(json.dumps({**config, "bottleneck_size": 5}))
    with pytest.raises(AdapterError, match=r"shape \(4, 24\), expected \(5, 24\)"):
        load_bottleneck(make_model(), tmp_path)
    (tmp_path / bottleneck.CONFIG_FILE).write_text(json.dumps(config))
    tensors = load_file(tmp_path / bottleneck.TENSORS_FILE)
    tensors.popitem()
    save_file(tensors, tmp_path / bottleneck.TENSORS_FILE)
    with pytest.raises(AdapterError, match=r"Missing: model\.layers"):
        load_bottleneck(make_model(), tmp_path)


def test_unknown_families_and_parts_of_linears_are_refused():
    with pytest.raises(ValueError, match="model type 'bloom', only for llama"):
        find_bottleneck_sites(make_model("bloom"), "series_adapter")
    assert find_bottleneck_sites(make_model("bloom"), "series_adapter", ["dense_h_to_4h"])
    with pytest.raises(ValueError, match=r"c_attn.q is a part of one"):
        find_bottleneck_sites(make_model("gpt2"), "series_adapter", ["c_attn.q"])
