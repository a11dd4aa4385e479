"""An adapter that cannot be attached or loaded leaves the model as it was, wherever the failure comes."""

import pytest
import torch
from conftest import make_inputs, sara_arguments
from training import make_classifier

from hf_sara import SaraAdapter, adapter, contents, copies, storage
from hf_sara.methods.base import Delta, Method
from hf_sara.token_rows import TokenRows


class BrokenError(Exception):
    """What a test lets fail."""


def facts(model) -> list:
    """All that an adapter could leave on a model: attributes, children, hooks, flags, identities and bits."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
    kinds += ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_backward_hooks")
    modules = [
        (name, id(m), sorted(vars(m)), m.training, [list(vars(m)[kind]) for kind in kinds])
        for name, m in model.named_modules()
    ]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    found = [(name, id(t), t.requires_grad, t.dtype, t.detach().clone()) for name, t in tensors]
    return [modules, [row[:-1] for row in found], [row[-1] for row in found]]


def same(one, other) -> bool:
    return one[:2] == other[:2] and all(map(torch.equal, one[2], other[2]))


def failing(monkeypatch, owner, name, at: int) -> list:
    """Let the call number `at` of a function fail, after it has done its work, and count the calls."""
    real, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(name)
        result = real(*args, **kwargs)
        if len(calls) == at:
            raise BrokenError(name)
        return result

    monkeypatch.setattr(owner, name, call)
    return calls


# What fails, and in which call of it.
PLACES = {
    "the last update": (Method, "make_delta", 4),
    "the factors of an update": (Delta, "set_factors", 3),
    "a rank": (Method, "measure", 3),
    "an insertion": (contents, "insert_delta", 4),
    "the parts": (contents, "attach_parts", 1),
    "the hooks of the state dict": (copies, "_let_show_base", 1),
    "a trained copy": (copies.ModuleCopy, "switch", 1),
    "trained rows": (copies, "_insert", 1),
    "the switch of trained rows": (TokenRows, "switch", 1),
    "the parameters' flags": (contents, "freeze_base", 1),
    "the facts of an untrained adapter": (contents, "_fingerprint", 5),
    "the record on the model": (contents, "set_adapters", 1),
    "the count of the base": (adapter, "count_base", 1),
    "the tensors": (contents.AdapterContents, "load_state_dict", 1),
    "a tensor": (contents, "check_tensors", 1),
    "the factors": (storage.SavedAdapter, "factors_on", 1),
}
ATTACHING = PLACES.keys() - {"the tensors", "a tensor", "the factors"}
LOADING = PLACES.keys() - {"a rank"}
PARTS = {"modules_to_save": ["score"], "trainable_token_indices": [3, 7]}


@pytest.fixture(params=["fresh", pytest.param("beside another adapter", marks=pytest.mark.slow)])
def model(request):
    """A classifier with some frozen parameters, maybe with an adapter on it."""
    model = make_classifier()
    model.model.norm.requires_grad_(False)
    model.model.layers[1].train()
    if request.param != "fresh":
        SaraAdapter.attach(model, sara_arguments(modules_to_save=[]), "first")
    return model


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("place", "loads"),
    [*((place, False) for place in sorted(ATTACHING)), *((place, True) for place in sorted(LOADING))],
)
def test_a_failure_leaves_the_model_as_it_was(place, loads, model, tmp_path, monkeypatch):
    args = sara_arguments("mo_sara", **PARTS)
    SaraAdapter.attach(make_classifier(), args).save_pretrained(tmp_path)
    before = facts(model)
    failing(monkeypatch, *PLACES[place])
    action = (lambda: SaraAdapter.load(model, tmp_path)) if loads else (lambda: SaraAdapter.attach(model, args))
    with pytest.raises(BrokenError):
        action()
    assert same(facts(model), before)
    monkeypatch.undo()
    action()
    assert model.sara_adapter.name == "default"
    model(**make_inputs(model)).loss.backward()
