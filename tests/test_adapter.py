import copy
import pickle

import pytest
import torch
from conftest import (
    ACTIVATION_CHECKPOINTING,
    METHODS,
    VOCABULARY,
    attach_trained,
    base_state,
    logits,
    make_inputs,
    make_model,
    same_bits,
    sara_arguments,
    train,
)
from torch import nn
from transformers import CompileConfig

from hf_sara import SaraAdapter, SaraArguments
from hf_sara.contents import add_deltas
from hf_sara.methods import Delta


def effect(model, adapter) -> float:
    """How much the update changes the logits: what differences have to be measured by."""
    with adapter.disabled():
        base = logits(model)
    return float((logits(model) - base).abs().max())


def gradients(model, adapter, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model.train()
    model.zero_grad()
    model(**make_inputs(model)).loss.backward()
    model.eval()
    return {name: tensor.grad.clone() for name, tensor in adapter.trained().items()}


def hooks_of(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# ---- the contract, on every family ----


@pytest.mark.one_in(2)
def test_the_model_stays_what_it_was_and_becomes_the_base_again(family, method):
    model = make_model(family)
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    state, output, kind = base_state(model), logits(model), type(model)
    attributes = set(vars(model))
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hooks = hooks_of(model)

    adapter = attach_trained(model, method)
    assert type(model) is kind
    assert same_bits(base_state(model), state)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(adapter.trained())
    heads = {name for part in adapter.parts for name in part.trained_shapes()}
    assert all(".sara." in name for name in trained - heads)
    assert effect(model, adapter) > 1e-3
    with adapter.disabled():
        assert torch.equal(logits(model), output)
    adapter.disable()
    assert torch.equal(logits(model), output)
    adapter.enable()

    adapter.detach()
    assert same_bits(dict(model.state_dict()), state)
    assert torch.equal(logits(model), output)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == grads
    assert set(vars(model)) == attributes
    assert hooks_of(model) == hooks
    assert not any(hasattr(module, "sara") for module in model.modules())


@pytest.mark.one_in(2)
def test_every_site_computes_base_plus_update_and_leaves_the_other_columns(family, method):
    # Inside the model, in float64: a site's output is x W + b plus the update of section 2, and nothing else is.
    model = make_model(family, dtype=torch.float64)
    adapter = attach_trained(model, method)
    seen = {}
    modules = {site.module: model.get_submodule(site.module) for site in adapter.sites}
    for name, module in modules.items():
        module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: (args[0], output)}))
    logits(model)
    for name, module in modules.items():
        x, output = seen[name]
        expected = module.forward(x)
        for site in (site for site in adapter.sites if site.module == name):
            t = {key: p.detach() for key, p in adapter.delta(site).named_parameters()}
            if method == "sara":
                update = x @ t["U"] @ torch.diag(t["S"]) @ t["Vh"]
            else:
                z = x @ t["U"]
                g = torch.softmax(z @ t["gate_down"] @ t["gate_up"], dim=-1)
                update = ((z * (g @ t["S"])) @ t["Vh"]) * t["v"]
            if site.slice is None:
                expected = expected + update
            else:
                part = site.slice.view(expected)
                part += update.view(part.shape)
        assert torch.allclose(output, expected, rtol=0, atol=1e-10)
        untouched = expected == module.forward(x)
        assert torch.equal(output[untouched], expected[untouched])


@pytest.mark.one_in(2)
def test_merged_equals_live_and_unmerging_restores_the_bits(family):
    for changes in ({"method": "sara"}, {"method": "mo_sara", "num_heads": 1}):
        model = make_model(family)
        state, base = base_state(model), logits(model)
        adapter = attach_trained(model, **changes)
        live, size = logits(model), effect(model, adapter)
        adapter.merge()
        assert adapter.merged
        assert torch.allclose(logits(model), live, atol=1e-4 * max(1.0, size))
        assert float((logits(model) - base).abs().max()) > 0.5 * size
        assert not same_bits(base_state(model), state)
        adapter.unmerge()
        assert same_bits(base_state(model), state)
        assert torch.equal(logits(model), live)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "falcon_new"])
def test_unmerging_restores_the_bits_in_every_dtype(family, dtype):
    model = make_model(family, dtype=dtype)
    adapter = SaraAdapter.attach(model, sara_arguments("sara"))
    with torch.no_grad():
        for tensor in adapter.trained().values():
            tensor.mul_(3)
    state = base_state(model)
    for _ in range(2):
        adapter.merge()
        site = adapter.sites[0]
        exact = state[f"{site.module}.weight"].float()
        exact = (exact if family == "gpt2" else exact.t()) if site.slice is None else None
        if exact is not None:
            # One rounding, of the float32 sum.
            assert torch.equal(site.weight(model), (exact + adapter.delta(site).merged()).to(dtype))
        adapter.unmerge()
        assert same_bits(base_state(model), state)


def test_detaching_a_merged_adapter_restores_the_base_bits():
    model = make_model("gpt2")
    state = base_state(model)
    adapter = attach_trained(model)
    adapter.merge()
    adapter.detach()
    assert same_bits(dict(model.state_dict()), state)


def test_many_heads_refuse_to_merge_and_change_nothing():
    model = make_model()
    state = base_state(model)
    adapter = attach_trained(model, "mo_sara")
    live = logits(model)
    with pytest.raises(ValueError, match=r"3 heads depends on the token.*num_heads=1"):
        adapter.merge()
    assert not adapter.merged
    assert same_bits(base_state(model), state)
    assert torch.equal(logits(model), live)


def test_a_sum_that_the_dtype_cannot_hold_refuses_to_merge_and_changes_nothing():
    model = make_model(dtype=torch.float16)
    adapter = SaraAdapter.attach(model, sara_arguments())
    with torch.no_grad():
        # The last site: those before it must not be merged already.
        adapter.delta(adapter.sites[-1]).U.fill_(1e6)
    state = base_state(model)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj: .*range of torch\.float16"):
        adapter.merge()
    assert same_bits(base_state(model), state)
    assert not adapter.merged


def test_a_merged_adapter_is_not_switched_or_merged_again():
    adapter = attach_trained(make_model())
    with pytest.raises(ValueError, match="is not merged"):
        adapter.unmerge()
    adapter.merge()
    for action in (adapter.enable, adapter.disable, adapter.merge):
        with pytest.raises(ValueError, match="it is merged into the weights"):
            action()
    with pytest.raises(ValueError, match="it is merged"), adapter.disabled():
        pass


# ---- several adapters ----


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_several_adapters_are_switched_on_their_own_and_add_up(family):
    # In the last layer alone, and seen at the adapted linear, what updates add is exactly additive.
    model = make_model(family, dtype=torch.float64)
    base = base_state(model)
    output = logits(model)
    one = attach_trained(model, "sara", "one", layers="1")
    other = attach_trained(model, "mo_sara", "other", layers="1")
    module = model.get_submodule(one.sites[0].module)
    seen = []
    module.register_forward_hook(lambda module, args, output: seen.append(output))

    def at_the_linear(first: bool, second: bool) -> torch.Tensor:
        (one.enable if first else one.disable)()
        (other.enable if second else other.disable)()
        logits(model)
        return seen[-1]

    none, both = at_the_linear(False, False), at_the_linear(True, True)
    a, b = at_the_linear(True, False) - none, at_the_linear(False, True) - none
    assert float(a.abs().max()) > 1e-3
    assert float(b.abs().max()) > 1e-3
    assert torch.allclose(both - none, a + b, atol=1e-12)
    assert SaraAdapter.of(model, "one") is one
    assert SaraAdapter.of(model, "other") is other
    assert SaraAdapter.of(model, "third") is None

    one.detach()
    assert model.sara_adapter is other
    assert torch.allclose(at_linear_after(model, seen) - none, b, atol=1e-12)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".sara." not in name)
    other.detach()
    # What the first one froze is free again only now.
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert same_bits(dict(model.state_dict()), base)
    assert torch.equal(logits(model), output)


def at_linear_after(model, seen):
    logits(model)
    return seen[-1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_adapters_that_were_trained_apart_are_loaded_side_by_side_under_names(family, tmp_path):
    alone, tensors = {}, {}
    for method in METHODS:
        model = make_model(family)
        adapter = attach_trained(model, method)
        adapter.save_pretrained(tmp_path / method)
        alone[method], tensors[method] = logits(model), adapter.state_dict()

    model = make_model(family)
    base = logits(model)
    adapters = {method: SaraAdapter.load(model, tmp_path / method, name=method) for method in METHODS}
    both = logits(model)
    assert all(float((both - output).abs().max()) > 1e-3 for output in (base, *alone.values()))
    for method, other in (("sara", "mo_sara"), ("mo_sara", "sara")):
        with adapters[other].disabled():
            assert torch.allclose(logits(model), alone[method], rtol=0, atol=1e-6)
        assert torch.equal(logits(model), both)
        # Saved from beside the other, each is itself alone.
        adapters[method].save_pretrained(tmp_path / "again" / method)
        again = SaraAdapter.load(make_model(family), tmp_path / "again" / method)
        assert again.args.method == method
        assert same_bits(again.state_dict(), tensors[method])


def test_merges_of_several_adapters_are_undone_in_reverse():
    model = make_model()
    state = base_state(model)
    one = SaraAdapter.attach(model, sara_arguments(), "one")
    other = SaraAdapter.attach(model, sara_arguments(), "other")
    live = logits(model)
    one.merge()
    other.merge()
    assert torch.allclose(logits(model), live, atol=1e-4 * float(live.abs().max()))
    with pytest.raises(ValueError, match=r"Unmerge \['other'\] first"):
        one.unmerge()
    other.unmerge()
    one.unmerge()
    assert same_bits(base_state(model), state)


def test_a_context_restores_what_was_switched_before_also_after_an_error():
    model = make_model()
    adapter = attach_trained(model)
    live = logits(model)
    with pytest.raises(RuntimeError, match="inside"), adapter.disabled():
        raise RuntimeError("inside")
    assert torch.equal(logits(model), live)
    adapter.disable()
    with adapter.disabled():
        pass
    assert not torch.equal(logits(model), live)


# ---- errors leave the model as it was ----


@pytest.mark.parametrize(
    ("arguments", "name", "message"),
    [
        ({}, "default", "already carries an adapter 'default'"),
        ({}, "a.b", "letters, digits"),
        ({}, "", "letters, digits"),
        ({"target_modules": ["nothing"]}, "new", "'nothing' matches no linear module"),
        ({"layers": "9"}, "new", r"names \[9\]"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(arguments, name, message, method):
    model = make_model()
    first = SaraAdapter.attach(model, sara_arguments(method))
    state, output, attributes = dict(model.state_dict()), logits(model), dict(vars(model))
    with pytest.raises(ValueError, match=message):
        SaraAdapter.attach(model, sara_arguments(method, **arguments), name)
    assert same_bits(dict(model.state_dict()), state)
    assert torch.equal(logits(model), output)
    assert vars(model) == attributes
    assert SaraAdapter.of(model) is first


def test_tensors_of_another_adapter_are_refused():
    adapter = attach_trained(make_model())
    tensors = adapter.state_dict()
    first = next(iter(tensors))
    for wrong, message in (
        ({name: tensor for name, tensor in tensors.items() if name != first}, f"Missing: {first}"),
        ({**tensors, "extra": torch.ones(1)}, "unexpected: extra"),
        ({**tensors, first: tensors[first][:-1]}, f"{first}: the tensor has the shape"),
        ({**tensors, first: tensors[first][:0]}, f"{first}: the tensor is empty"),
        ({**tensors, first: tensors[first] * torch.nan}, f"{first}: .*NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter.load_state_dict(wrong)
        assert same_bits(adapter.state_dict(), tensors)


# ---- what else works on the model ----


@pytest.mark.one_in(2)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_independent_and_has_its_own_handle(family, method, way):
    model = make_model(family)
    adapter = attach_trained(model, method)
    live = logits(model)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin), live)
    handle = SaraAdapter.of(twin)
    assert handle is not adapter
    assert handle.model is twin
    assert twin.sara_adapter is handle
    train(handle)
    assert not torch.equal(logits(twin), live)
    assert torch.equal(logits(model), live)
    handle.detach()
    assert not any(isinstance(module, Delta) for module in twin.modules())
    assert hooks_of(twin) == hooks_of(make_model(family))
    assert torch.equal(logits(model), live)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "t5", "bert"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(family, method, reentrant):
    model = make_model(family)
    # With dropout: recomputing has to draw the same mask.
    adapter = attach_trained(model, method, dropout=0.3)
    expected = gradients(model, adapter)
    getattr(model, f"{ACTIVATION_CHECKPOINTING}_enable")({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    found = gradients(model, adapter)
    assert all(float(tensor.abs().max()) > 0 for tensor in expected.values())
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected)


@pytest.mark.slow  # Compiling takes seconds.
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_torch_compile_without_graph_breaks_computes_the_same(family, method):
    torch.compiler.reset()
    # A compiled GPT-2 draws other dropout masks; the comparison is about the update.
    model = make_model(
        family, **({"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if family == "gpt2" else {})
    )
    adapter = attach_trained(model, method, dropout=0.0)
    # Not with labels: GPT-2's loss logs a warning, at which a full graph ends.
    inputs = {name: tensor for name, tensor in make_inputs(model).items() if name != "labels"}

    def outputs_and_gradients(model):
        model.zero_grad()
        output = model(**inputs).logits
        output.square().mean().backward()
        return output.detach(), {name: tensor.grad.clone() for name, tensor in adapter.trained().items()}

    expected, expected_gradients = outputs_and_gradients(model.train())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert SaraAdapter.of(compiled) is adapter
    found, found_gradients = outputs_and_gradients(compiled)
    assert torch.allclose(found, expected, atol=1e-4)
    for name, gradient in expected_gradients.items():
        assert torch.allclose(found_gradients[name], gradient, rtol=1e-3, atol=1e-5), name
    model.eval()
    with adapter.disabled(), torch.no_grad():
        # Switching is seen by the compiled model.
        assert torch.allclose(compiled(**inputs).logits, logits(model), atol=1e-4)


def test_compiled_decoding_is_compiled_once(method):
    model = make_model()
    attach_trained(model, method)
    ids = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(2))
    values = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    expected = model.generate(ids, **values)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    # By default, generate compiles on GPUs only.
    config._compile_all_devices = True
    for _ in range(2):
        found = model.generate(ids, cache_implementation="static", compile_config=config, **values)
        assert torch.equal(found, expected)
    assert len(graphs) == 1


@pytest.mark.slow
def test_reduced_overhead_gives_the_same(method):
    model = make_model()
    attach_trained(model, method)
    inputs = make_inputs(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.one_in(2)
def test_bfloat16_autocast_trains_float32_tensors(family, method):
    model = make_model(family)
    adapter = attach_trained(model, method)
    expected = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(logits(model).float(), expected, atol=0.15 * float(expected.abs().max()))
        found = gradients(model, adapter)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert all(torch.isfinite(tensor).all() and tensor.any() for tensor in found.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "t5", "vit"])
def test_a_pure_bfloat16_model_trains_float32_tensors(family, method):
    model = make_model(family, dtype=torch.bfloat16)
    adapter = attach_trained(model, method)
    assert {parameter.dtype for parameter in adapter.trained().values()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    assert effect(model, adapter) > 1e-3
    assert all(tensor.any() for tensor in gradients(model, adapter).values())


def test_a_cast_model_keeps_its_trained_tensors(method):
    model = make_model()
    adapter = attach_trained(model, method)
    tensors, live = adapter.state_dict(), logits(model)
    model.to(torch.bfloat16)
    assert same_bits(adapter.state_dict(), tensors)
    assert torch.allclose(logits(model).float(), live, atol=0.15 * float(live.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "falcon_new", "t5"])
def test_generate_takes_the_adapter_into_account(family, method):
    model = make_model(family)
    adapter = attach_trained(model, method)
    inputs = {name: tensor for name, tensor in make_inputs(model).items() if name != "labels"}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_scores": True}
    options["return_dict_in_generate"] = True
    found = model.generate(**inputs, **options)
    with adapter.disabled():
        base = model.generate(**inputs, **options)
    assert not torch.allclose(found.scores[0], base.scores[0])
    if family != "t5":
        # With the cache, each step computes what a whole forward pass computes.
        whole = model(input_ids=found.sequences).logits
        assert torch.allclose(found.scores[-1][:, 5:], whole[:, -2][:, 5:], atol=1e-4)
    adapter.detach()
    assert torch.equal(model.generate(**inputs, **options).sequences, base.sequences)


@pytest.mark.one_in(2)
def test_mo_sara_starts_at_the_base_and_sara_does_not(family):
    model = make_model(family)
    output = logits(model)
    adapter = SaraAdapter.attach(model, sara_arguments("mo_sara"))
    assert torch.equal(logits(model), output)
    adapter.detach()
    adapter = SaraAdapter.attach(model, sara_arguments("sara"))
    assert effect(model, adapter) > 1e-3
    adapter.detach()
    SaraAdapter.attach(model, sara_arguments("sara", zero_init_vh=True))
    assert torch.allclose(logits(model), output, atol=1e-6)


def test_the_frozen_factors_are_those_of_the_weight(family):
    model = make_model(family)
    adapter = SaraAdapter.attach(model, sara_arguments("mo_sara"))
    for site, delta in adapter.deltas():
        U, S, Vh = torch.linalg.svd(site.weight(model).double(), full_matrices=False)
        best = (U[:, : site.k] * S[: site.k]) @ Vh[: site.k]
        assert torch.allclose((delta.U.double() * S[: site.k]) @ delta.Vh.double(), best, atol=1e-5)
        assert not delta.U.requires_grad
        assert not delta.Vh.requires_grad


def test_the_start_follows_from_the_seed():
    def start(seed):
        torch.manual_seed(seed)
        return SaraAdapter.attach(make_model(), sara_arguments()).state_dict()

    assert same_bits(start(1), start(1))
    assert not same_bits(start(1), start(2))


def test_the_handle_counts_and_sums_up(method):
    model = make_model()
    adapter = SaraAdapter.attach(model, sara_arguments(method))
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert adapter.num_parameters() == count == adapter.plan().trained_parameters
    summary = adapter.summary()
    assert f"{count:,} trained parameters" in summary.splitlines()[0]
    ranks = {site.name: str(site.k) for site in adapter.sites}
    for layer in ("0", "1"):
        row = [ranks[f"model.layers.{layer}.self_attn.{kind}"] for kind in ("q_proj", "v_proj")]
        assert [layer, *row] in [line.split() for line in summary.splitlines()]
    assert model.sara_adapter is adapter
    assert "default" in repr(adapter)


def test_any_module_with_linears_can_be_adapted(method):
    model = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 7))
    x = torch.randn(3, 8)
    base = model(x)
    adapter = SaraAdapter.attach(model, SaraArguments(method=method, threshold=0.5, target_modules=["0", "2"]))
    assert len(adapter.sites) == 2
    model(x).sum().backward()
    adapter.detach()
    assert torch.equal(model(x), base)


def test_there_is_one_hook_per_linear_and_it_holds_no_state():
    model = make_model("gpt2")
    SaraAdapter.attach(model, sara_arguments(), "one")
    SaraAdapter.attach(model, sara_arguments("mo_sara"), "other")
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert hooks == [add_deltas, add_deltas]  # one c_attn in each of two layers
    assert add_deltas.__closure__ is None
