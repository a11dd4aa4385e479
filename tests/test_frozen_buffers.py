"""The buffers of a frozen base stay as they are while an adapter trains, and those of a trained head move."""

import copy
import pickle

import pytest
import torch
from conftest import attach_trained, base_state, make_inputs, make_model, same_bits, sara_arguments, train
from structures import make
from torch import nn
from training import make_deep_head

from hf_sara import SaraAdapter


class Ranges(nn.Module):
    """Follows the range of what it sees while it trains, in place and by new tensors, as quantized models do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.zeros(1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.training:
            self.largest = torch.maximum(self.largest, x.detach().abs().max())
            self.calls += 1
        return x


def with_ranges():
    model = make_model()
    model.model.norm = nn.Sequential(model.model.norm, Ranges(), nn.BatchNorm1d(6, momentum=0.5))
    return model.eval()


def outputs(model):
    inputs = make_inputs(model)
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("adapters", [1, 2])
def test_no_buffer_of_the_base_moves_in_a_training(adapters):
    model = with_ranges()
    before, plain = base_state(model), outputs(model)
    for name in "ab"[:adapters]:
        attach_trained(model, name=name)
    assert same_bits(before, base_state(model))
    for adapter in list(model.sara_adapters.values()):
        adapter.detach()
    assert same_bits(before, model.state_dict())
    assert torch.equal(outputs(model), plain)
    # The base is what it was: it moves its buffers again when it trains.
    model.train()(**make_inputs(model))
    assert model.model.norm[1].calls == 1
    assert not torch.equal(model.model.norm[2].running_mean, before["model.norm.2.running_mean"])


def test_a_frozen_normalisation_computes_in_training_as_it_does_later():
    model = with_ranges()
    SaraAdapter.attach(model, sara_arguments(dropout=0.0))
    later = outputs(model)
    assert torch.allclose(model.train()(**make_inputs(model)).logits, later, atol=1e-6)
    norm = model.model.norm[2]
    assert not norm.training
    model.sara_adapter.detach()
    assert norm.training
    norm.eval()
    SaraAdapter.attach(model, sara_arguments())
    model.sara_adapter.detach()
    assert not norm.training


def test_copies_hold_their_buffers_too():
    model = with_ranges()
    attach_trained(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = base_state(other)
        train(other.sara_adapter)
        assert same_bits(before, base_state(other))
        other.sara_adapter.detach()
        assert "train" not in vars(other.model.norm[2])
        assert not hasattr(other.model.norm[2], "sara_mode")


def test_the_vectors_of_a_spectral_norm_stay():
    model = make_model()
    nn.utils.spectral_norm(model.model.layers[0].mlp.up_proj)
    before = base_state(model)
    attach_trained(model)
    assert any("weight_u" in name for name in before)
    assert same_bits(before, base_state(model))


def test_an_error_in_a_forward_leaves_the_buffers():
    model = with_ranges()
    SaraAdapter.attach(model, sara_arguments())
    before = base_state(model)
    model.train()
    model.model.norm[1].register_forward_pre_hook(lambda module, args: (None,))
    with pytest.raises(AttributeError):
        model(**make_inputs(model))
    assert same_bits(before, base_state(model))


def test_statistics_of_a_head_that_is_trained_move():
    model = make_deep_head()
    before = base_state(model)
    adapter = attach_trained(model)
    moved = adapter.state_dict()["classifier.1.running_mean"]
    assert not torch.equal(moved, before["classifier.1.running_mean"])
    # The base's own ones do not, also where the base computes in between.
    with adapter.disabled(), torch.no_grad():
        model.train()(**make_inputs(model))
    assert same_bits(before, base_state(model))
    model.train()(**make_inputs(model))
    assert not torch.equal(adapter.state_dict()["classifier.1.running_mean"], moved)


def test_a_real_architecture_with_statistics_keeps_them():
    model, inputs = make("statistics of batches")
    before = base_state(model)
    attach_trained(model, inputs=inputs)
    assert any("running_mean" in name for name in before)
    assert same_bits(before, base_state(model))
