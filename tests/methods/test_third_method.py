"""A method of somebody else: the classes below and one line in the registry are all that it takes."""

import json

import pytest
import torch
from conftest import logits, make_inputs, make_model, same_bits
from torch import nn
from training import make_trainer
from transformers import HfArgumentParser

from hf_sara import AdapterError, SaraAdapter, SaraArguments, export_lora, from_hub, merge, plan
from hf_sara.methods import METHODS, Delta, Method
from hf_sara.methods.products import add_product


class ScaledDirectionsDelta(Delta):
    """The update `dropout(x) U diag(S) Vh` with one trained number per frozen pair of singular vectors."""

    def reset_parameters(self, options):
        nn.init.zeros_(self.S)

    def add_update(self, x, output, dtype, linear):
        z = x.reshape(-1, x.shape[-1]) @ self.U.to(dtype)
        return add_product(output, z * self.S.to(dtype), self.Vh.to(dtype), self.slice)

    @torch.no_grad()
    def low_rank(self):
        return self.U.to(self.S.dtype), self.S, self.Vh.to(self.S.dtype)


class ScaledDirections(Method):
    """Rescales what the base weight does along its own leading singular vectors."""

    name = "scaled_directions"
    title = "Scaled directions"
    summary = "one trained number per leading singular direction of each weight."
    limit = "The update is a plain low-rank product; it can be merged."
    default_threshold = 0.6
    delta_class = ScaledDirectionsDelta
    has_factors = True

    def trained_shapes(self, shape, k):
        return {"S": (k,)}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(METHODS, ScaledDirections.name, ScaledDirections)


def attach(model) -> SaraAdapter:
    """The method on a model, trained a little."""
    adapter = SaraAdapter.attach(model, SaraArguments(method="scaled_directions", dropout=0.0))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in adapter.trained().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return adapter


def test_its_arguments_and_its_plan():
    args = SaraArguments(method="scaled_directions")
    assert args.resolved_threshold() == 0.6
    found = plan(make_model(), args)
    assert found.trained_parameters == sum(site.k for site in found.sites)
    solved = plan(make_model(), SaraArguments(method="scaled_directions", parameter_budget="20"))
    assert 0 < solved.trained_parameters <= 20
    with pytest.raises(ValueError, match="sara, mo_sara, scaled_directions"):
        SaraArguments(method="unknown")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("factors", ["recompute", "save"])
def test_it_is_saved_and_loaded(family, factors, tmp_path):
    model = make_model(family)
    base = logits(model, **make_inputs(model))
    adapter = SaraAdapter.attach(model, SaraArguments(method="scaled_directions", factors=factors))
    assert torch.equal(logits(model, **make_inputs(model)), base)
    with torch.no_grad():
        for tensor in adapter.trained().values():
            tensor.fill_(0.5)
    live = logits(model, **make_inputs(model))
    assert not torch.allclose(live, base, atol=1e-3)
    adapter.save_pretrained(tmp_path)
    fresh = make_model(family)
    SaraAdapter.load(fresh, tmp_path)
    assert torch.equal(logits(fresh, **make_inputs(fresh)), live)
    config = json.loads((tmp_path / "sara_config.json").read_text())
    assert config["method"] == "scaled_directions"
    if factors == "recompute":
        assert all(len(site["sha256"]) == 64 for site in config["sites"])
        with pytest.raises(AdapterError, match="SHA-256 differs"):
            SaraAdapter.load(make_model(family, seed=9), tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_merges_and_unmerges_to_the_bit(family, tmp_path):
    model = make_model(family)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = attach(model)
    live = logits(model, **make_inputs(model))
    adapter.merge()
    assert torch.allclose(logits(model, **make_inputs(model)), live, atol=1e-4)
    adapter.unmerge()
    merge(adapter, tmp_path / "merged")
    adapter.detach()
    assert same_bits(dict(model.state_dict()), state)
    plain = type(model).from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(plain, **make_inputs(plain)), live, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_its_export_is_what_peft_loads(family, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = attach(make_model(family))
    live = logits(adapter.model, **make_inputs(adapter.model))
    assert export_lora(adapter, tmp_path).largest_error == 0.0
    exported = peft.PeftModel.from_pretrained(make_model(family), tmp_path)
    assert torch.allclose(logits(exported, **make_inputs(exported)), live, atol=1e-4)


@pytest.mark.slow
def test_it_trains_resumes_and_writes_its_card(tmp_path):
    args = SaraArguments(method="scaled_directions", dropout=0.1)
    whole = make_trainer(tmp_path / "whole", sara_args=args)
    whole.train()
    assert any(tensor.abs().max() > 0 for tensor in whole.trained().values())
    first = make_trainer(tmp_path / "cut", sara_args=args)
    first.train()
    resumed = make_trainer(tmp_path / "cut", sara_args=args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert same_bits(resumed.sara_adapter.state_dict(), whole.sara_adapter.state_dict())
    whole.save_model()
    whole.create_model_card()
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "Scaled directions adapter" in card
    assert ScaledDirections.summary in card
    loaded = from_hub(tmp_path / "whole", base_model=make_model())
    assert loaded.sara_adapter.args.method == "scaled_directions"


class ScaledOutput(Method):
    """Multiplies a linear's output by a trained vector: no factors, no rank, and no matrix to merge."""

    name = "scaled_output"
    title = "Scaled output"
    summary = "a trained factor for each output."
    limit = "It cannot be merged."
    default_threshold = 1.0

    class ScaledOutputDelta(Delta):
        def reset_parameters(self, options):
            nn.init.zeros_(self.U)

        def add_update(self, x, output, dtype, linear):
            return output * (1 + self.U[0, 0].to(output.dtype))

    delta_class = ScaledOutputDelta

    def trained_shapes(self, shape, k):
        return {"U": (1, 1, shape[1])}


def test_a_method_of_another_kind(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, ScaledOutput.name, ScaledOutput)
    model = make_model()
    adapter = SaraAdapter.attach(model, SaraArguments(method="scaled_output"))
    with torch.no_grad():
        for tensor in adapter.trained().values():
            tensor.fill_(0.3)
    live = logits(model, **make_inputs(model))
    adapter.save_pretrained(tmp_path)
    SaraAdapter.load(fresh := make_model(), tmp_path)
    assert torch.equal(logits(fresh, **make_inputs(fresh)), live)
    for turn_into in (adapter.merge, lambda: export_lora(adapter, tmp_path / "lora")):
        with pytest.raises(ValueError, match="update of Scaled output is no matrix"):
            turn_into()


def test_the_command_line_takes_it():
    (args,) = HfArgumentParser(SaraArguments).parse_args_into_dataclasses(["--method", "scaled_directions"])
    assert args.resolved_threshold() == 0.6
