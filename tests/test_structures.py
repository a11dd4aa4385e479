"""Models of many structures: what is adapted by default, and a round trip of a trained adapter on each of them."""

import copy

import pytest
import torch
from conftest import base_state, same_bits, sara_arguments, train
from structures import OTHERS, QUICK, STRUCTURES, make

from hf_sara import SaraAdapter, SaraArguments, export_lora, plan
from hf_sara.targets import find_sites

EVERY = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
VARIANTS = {
    "sara": {},
    "mo_sara": {"method": "mo_sara", "num_heads": 3},
    "one head": {"method": "mo_sara", "num_heads": 1},
}


@torch.no_grad()
def outputs(model, inputs) -> torch.Tensor:
    return model.eval()(**inputs).logits


@pytest.mark.parametrize("structure", STRUCTURES)
def test_query_and_value_are_adapted_by_default(structure):
    model, _ = make(structure)
    sites = find_sites(model, SaraArguments())
    ends = {f"{site.module.rsplit('.', 1)[-1]}.{site.label}".rstrip(".") for site in sites}
    assert ends == STRUCTURES[structure][2]
    assert not any("vision" in site.name or site.name.startswith("encoder.vit") for site in sites)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("structure", EVERY)
def test_a_trained_adapter_comes_back_on_any_structure(structure, variant, tmp_path):
    model, inputs = make(structure)
    pristine, plain = copy.deepcopy(model), outputs(model, inputs)
    torch.manual_seed(3)
    adapter = SaraAdapter.attach(model, sara_arguments(**{"threshold": 0.3, "dropout": 0.0, **VARIANTS[variant]}))
    before = base_state(model)
    train(adapter, inputs=inputs)
    assert same_bits(before, base_state(model))
    adapter.save_pretrained(tmp_path / "adapter")
    trained = outputs(model, inputs)
    assert (trained - plain).abs().max() > 1e-4
    fresh = copy.deepcopy(pristine)
    torch.manual_seed(99)
    SaraAdapter.load(fresh, tmp_path / "adapter")
    assert torch.equal(outputs(fresh, inputs), trained)
    if variant != "mo_sara":
        adapter.merge()
        assert torch.allclose(outputs(model, inputs), trained, atol=1e-4)
        adapter.unmerge()
        assert same_bits(before, base_state(model))
    adapter.detach()
    assert torch.equal(outputs(model, inputs), plain)
    assert list(model.state_dict()) == list(pristine.state_dict())


@pytest.mark.parametrize("structure", [pytest.param(name, marks=pytest.mark.slow) for name in STRUCTURES])
def test_peft_loads_the_export_of_any_structure(structure, tmp_path):
    peft = pytest.importorskip("peft")
    model, inputs = make(structure)
    pristine = copy.deepcopy(model)
    adapter = train(SaraAdapter.attach(model, sara_arguments(dropout=0.0)), inputs=inputs)
    export_lora(adapter, tmp_path)
    loaded = peft.PeftModel.from_pretrained(pristine, tmp_path).eval()
    assert torch.allclose(outputs(loaded, inputs), outputs(model, inputs), atol=1e-4)


# ---- the choice ----


def test_all_linear_leaves_out_heads_and_embeddings():
    model, _ = make("separate linears")
    sites = plan(model, SaraArguments(target_modules="all-linear", threshold=0.2)).sites
    assert len(sites) == 14
    assert not any("lm_head" in site.name for site in sites)
    model, _ = make("names of its own")
    names = {site.module.rsplit(".", 1)[-1] for site in find_sites(model, SaraArguments(target_modules="all-linear"))}
    assert names == {"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"}


def test_modules_are_excluded_by_name_and_by_pattern():
    model, _ = make("separate linears")

    def count(*names):
        return len(find_sites(model, SaraArguments(target_modules="all-linear", exclude_modules=list(names) or None)))

    assert count() == 14
    assert count("down_proj") == 12
    assert count("down_proj", "layers.0.self_attn.q_proj") == 11
    assert count(r".*\.0\..*") == 7
    assert len(find_sites(model, SaraArguments(exclude_modules="v_proj"))) == 2
    with pytest.raises(ValueError, match="exclude_modules='nothing' matches no linear module"):
        count("nothing")
    with pytest.raises(ValueError, match="excludes all of the chosen modules"):
        find_sites(model, SaraArguments(exclude_modules=["q_proj", "v_proj"]))


def test_fused_experts_are_named_where_they_are_asked_for(caplog):
    model, _ = make("fused experts")
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj .* are fused parameters of experts, several"):
        find_sites(model, SaraArguments(target_modules=["gate_up_proj"]))
    assert "fused parameters" not in caplog.text
    find_sites(model, SaraArguments(target_modules="all-linear"))
    assert "are fused parameters of experts" in caplog.text


def test_an_export_that_peft_would_mix_up_is_warned_of(tmp_path, caplog):
    model, _ = make("fused experts")
    model.model.layers[0].mlp = make("separate linears")[0].model.layers[0].mlp
    SaraAdapter.attach(model, SaraArguments(target_modules=["q_proj", "down_proj"], threshold=0.2))
    caplog.clear()
    export_lora(model, tmp_path)
    assert "PEFT takes model.layers.0.mlp.down_proj for fused experts" in caplog.text
