"""Adapters on models whose weights accelerate keeps on the CPU or on the disk between the calls."""

import copy

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from conftest import attach_trained, logits, make_inputs, make_model, sara_arguments, train
from training import make_classifier, make_trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from hf_sara import SaraAdapter, SaraArguments, export_lora, from_hub, merge, plan

CPU = torch.device("cpu")
NAMES = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
PARTS = {name: "disk" if name in ("model.layers.0", "model.norm") else "cpu" for name in NAMES}
Q_PROJ = r"model\.layers\.0\.self_attn\.q_proj"


def _dispatch(model, folder):
    return accelerate.dispatch_model(model, PARTS, main_device=CPU, offload_dir=folder, force_hooks=True)


def _preload(model, folder):
    # The hook is on the attention then, and the weights of its linears come and go with it.
    accelerate.cpu_offload(model, CPU, preload_module_classes=["LlamaAttention"])
    return model


WAYS = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, CPU),
    "cpu_offload with buffers": lambda model, folder: accelerate.cpu_offload(model, CPU, offload_buffers=True),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder, CPU),
    "dispatch_model": _dispatch,
}
SLOW_WAYS = WAYS.keys() - {"dispatch_model"}


@pytest.fixture(params=["dispatch_model", *(pytest.param(way, marks=pytest.mark.slow) for way in sorted(SLOW_WAYS))])
def offload(request, tmp_path):
    """A function that offloads a model."""

    def do(model):
        WAYS[request.param](model, str(tmp_path / "offloaded"))
        assert any(parameter.is_meta for parameter in model.parameters())
        return model

    return do


@pytest.fixture
def saved(tmp_path, method):
    """A folder with a trained adapter, and the logits of its model."""
    adapter = attach_trained(make_model(), method)
    adapter.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(adapter.model)


# ---- offloaded first ----


def test_an_offloaded_base_has_the_ranks_and_outputs_of_a_plain_one(offload, method, saved):
    folder, expected = saved
    model = offload(make_model())
    before = logits(model)
    adapter = SaraAdapter.load(model, folder)
    torch.testing.assert_close(logits(model), expected)
    assert not any(tensor.is_meta for tensor in adapter.trained().values())
    adapter.detach()
    assert torch.equal(logits(model), before)
    torch.manual_seed(0)
    found = SaraAdapter.attach(model, sara_arguments(method))
    torch.manual_seed(0)
    plain = SaraAdapter.attach(make_model(), sara_arguments(method))
    assert found.plan().table() == plain.plan().table()
    # Training gives what it gives without offloading.
    for adapter in (found, plain):
        torch.manual_seed(1)
        train(adapter)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor)
    assert any(parameter.is_meta for parameter in model.parameters())


@pytest.fixture(params=[1, 4])
def _threads(request):
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("_threads")
def test_a_budget_and_fused_projections_are_read_from_an_offloaded_base():
    # The projections of a fused module are read side by side.
    args = SaraArguments(parameter_budget=900)
    plain, found = make_model("gpt2"), make_model("gpt2")
    accelerate.cpu_offload(found, CPU)
    assert plan(found, args).table() == plan(plain, args).table()


@pytest.mark.parametrize(
    "device_map",
    [
        PARTS,
        pytest.param({"": "disk"}, marks=pytest.mark.slow),
        pytest.param({**dict.fromkeys(NAMES, "cpu"), "lm_head": "disk"}, marks=pytest.mark.slow),
    ],
)
def test_from_hub_takes_a_device_map_with_the_disk(saved, device_map, tmp_path):
    folder, expected = saved
    make_model().save_pretrained(tmp_path / "base")
    offloaded = {"device_map": device_map, "offload_folder": tmp_path / "offloaded"}
    model = from_hub(folder, base_model=tmp_path / "base", **offloaded)
    assert any(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(logits(model), expected)
    model.sara_adapter.save_pretrained(tmp_path / "again")
    SaraAdapter.load(plain := make_model(), tmp_path / "again")
    torch.testing.assert_close(logits(plain), expected)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **offloaded)
    SaraAdapter.load(base, folder)
    torch.testing.assert_close(logits(base), expected)


# ---- adapted first ----


def test_an_adapter_that_is_offloaded_with_its_base_computes_the_same(offload, method):
    model = make_model()
    attach_trained(model, method)
    expected = logits(model)
    offload(model)
    torch.testing.assert_close(logits(model), expected)
    torch.testing.assert_close(model(**make_inputs(model)).logits, expected)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(logits(copied), expected)
    remove_hook_from_submodules(model)
    torch.testing.assert_close(logits(model), expected)


def test_an_offloaded_adapter_can_be_saved_exported_switched_and_removed(offload, method, tmp_path):
    model = make_model()
    before = logits(model)
    adapter = attach_trained(model, method)
    expected, state = logits(model), adapter.state_dict()
    offload(model)
    adapter.save_pretrained(tmp_path / "adapter")
    SaraAdapter.load(plain := make_model(), tmp_path / "adapter")
    assert torch.equal(logits(plain), expected)
    assert all(torch.equal(adapter.state_dict()[name], tensor) for name, tensor in state.items())
    if method == "sara":
        export_lora(adapter, tmp_path / "lora")
    adapter.disable()
    torch.testing.assert_close(logits(model), before)
    adapter.enable()
    torch.testing.assert_close(logits(model), expected)
    torch.testing.assert_close(logits(copy.deepcopy(model)), expected)
    adapter.load_state_dict({name: tensor * 2 for name, tensor in state.items()})
    changed = logits(model)
    assert not torch.allclose(changed, expected, atol=1e-2)
    torch.testing.assert_close(logits(SaraAdapter.load(make_model(), tmp_path / "adapter").model), expected)
    adapter.detach()
    torch.testing.assert_close(logits(model), before)
    SaraAdapter.load(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), expected)


def test_an_offloaded_adapter_trains_once_it_is_asked_for(offload, method):
    results = []
    for offloads in (False, True):
        model = make_model()
        torch.manual_seed(0)
        adapter = SaraAdapter.attach(model, sara_arguments(method))
        if offloads:
            offload(model)
        torch.manual_seed(1)
        train(adapter)
        results.append(adapter.state_dict())
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor)


def test_a_training_of_tensors_that_live_for_one_call_fails(method):
    model = make_model()
    SaraAdapter.attach(model, sara_arguments(method))
    accelerate.cpu_offload(model, CPU)
    loss = model(**make_inputs(model)).loss
    with pytest.raises(RuntimeError, match=r"_proj: accelerate has offloaded what the adapter trains"):
        loss.backward()


def test_the_trainer_trains_an_adapter_on_an_offloaded_base(method, tmp_path):
    model = _dispatch(make_model(), str(tmp_path / "offloaded"))
    trainer = make_trainer(tmp_path, method, model=model, save_strategy="no", report_to="none", max_steps=2)
    before = model.sara_adapter.state_dict()
    trainer.train()
    assert not any(torch.equal(before[name], t) for name, t in model.sara_adapter.state_dict().items())


def test_the_trainer_refuses_a_base_that_it_would_move(tmp_path):
    model = accelerate.cpu_offload(make_model(), CPU)
    with pytest.raises(ValueError, match=r"model\.embed_tokens is offloaded by accelerate, .* device_map"):
        make_trainer(tmp_path, model=model)
    assert not hasattr(model, "sara_adapter")


# ---- merging ----


def test_merging_into_offloaded_weights_is_refused(offload, tmp_path):
    model = make_model()
    adapter = attach_trained(model)
    expected = logits(model)
    offload(model)
    for action in (adapter.merge, lambda: merge(model, tmp_path / "merged")):
        with pytest.raises(ValueError, match=f"{Q_PROJ}: accelerate has offloaded the weight"):
            action()
    assert not adapter.merged
    torch.testing.assert_close(logits(model), expected)
    remove_hook_from_submodules(model)
    adapter.merge()
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    adapter.unmerge()
    torch.testing.assert_close(logits(model), expected)


def test_unmerging_from_offloaded_weights_is_refused_before_the_bits_are_lost():
    model = make_model()
    before = logits(model)
    adapter = attach_trained(model)
    adapter.merge()
    merged = logits(model)
    accelerate.cpu_offload(model, CPU)
    for action in (adapter.unmerge, adapter.detach):
        with pytest.raises(ValueError, match=f"{Q_PROJ}: accelerate has offloaded the weight"):
            action()
    assert adapter.merged
    torch.testing.assert_close(logits(model), merged)
    remove_hook_from_submodules(model)
    adapter.detach()
    assert torch.equal(logits(model), before)


# ---- parts ----


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_a_head_that_is_offloaded_with_its_adapter_comes_back(way, tmp_path):
    model = make_classifier()
    adapter = attach_trained(model)
    expected = logits(model)
    WAYS[way](model, str(tmp_path / "offloaded"))
    assert model.score.weight.is_meta
    torch.testing.assert_close(logits(model), expected)
    adapter.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(model), expected)
    fresh = make_classifier()
    SaraAdapter.load(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh), expected)
    adapter.disable()
    adapter.enable()
    torch.testing.assert_close(logits(model), expected)
    adapter.detach()
    torch.testing.assert_close(logits(model), logits(make_classifier()))


def test_a_part_on_the_disk_is_refused():
    model = make_model()
    accelerate.cpu_offload(model, CPU)
    for parts, name in (({"modules_to_save": ["norm"]}, r"model\.norm"), ({"trainable_token_indices": [3]}, "embed")):
        with pytest.raises(ValueError, match=f"{name}.* is offloaded to the CPU or the disk"):
            SaraAdapter.attach(model, sara_arguments(**parts))
    assert not any(".sara." in name for name, _ in model.named_modules())


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_are_offloaded_with_their_adapter_are_refused(tied):
    model = make_model(tie_word_embeddings=tied)
    adapter = attach_trained(model, trainable_token_indices=[3, 5])
    accelerate.cpu_offload(model, CPU)
    for action in (lambda: logits(model), adapter.state_dict, adapter.detach, adapter.disable):
        with pytest.raises(ValueError, match=r"model\.embed_tokens: accelerate has offloaded it after"):
            action()


# ---- what has no values at all ----


def test_weights_that_an_outer_hook_fetches_are_refused(saved):
    model = _preload(make_model(), None)
    for action in (lambda: SaraAdapter.attach(model, sara_arguments()), lambda: SaraAdapter.load(model, saved[0])):
        with pytest.raises(ValueError, match=f"{Q_PROJ}: .* preload_module_classes"):
            action()
    assert not hasattr(model, "sara_adapter")


def test_values_are_not_loaded_into_a_model_without_values(saved):
    with torch.device("meta"):
        empty = LlamaForCausalLM(make_model().config)
    with pytest.raises(
        ValueError, match=rf"{Q_PROJ}.* is on the meta device|{Q_PROJ}: the weight is on the meta device"
    ):
        SaraAdapter.load(empty, saved[0])
    assert not hasattr(empty, "sara_adapter")
    assert not any(".sara" in name for name, _ in empty.named_modules())


def test_an_update_that_an_outer_hook_fetches_is_refused(tmp_path):
    model = make_model()
    adapter = attach_trained(model)
    expected, state = logits(model), adapter.state_dict()
    _preload(model, None)
    torch.testing.assert_close(logits(model), expected)
    for action in (adapter.trained, adapter.state_dict, lambda: adapter.save_pretrained(tmp_path), adapter.merge):
        with pytest.raises(
            ValueError, match=f"{Q_PROJ}: accelerate offloads this together with .* preload_module_classes"
        ):
            action()
    assert not any(tmp_path.iterdir())
    remove_hook_from_submodules(model)
    assert all(torch.equal(adapter.state_dict()[name], tensor) for name, tensor in state.items())
    torch.testing.assert_close(logits(model), expected)


def test_a_quantized_weight_that_accelerate_cannot_fetch_is_named(tmp_path):
    pytest.importorskip("bitsandbytes", "0.46")
    make_model().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    accelerate.cpu_offload(model, CPU)
    with pytest.raises(
        ValueError, match=f"{Q_PROJ}: accelerate has offloaded the weight of this Linear4bit, and cannot"
    ):
        SaraAdapter.attach(model, sara_arguments())
