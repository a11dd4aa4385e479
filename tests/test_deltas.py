import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_sara import SaraAdapter, SaraArguments
from hf_sara.contents import add_deltas
from hf_sara.layouts import OutputSlice
from hf_sara.methods import products
from hf_sara.sites import PlannedSite

D_IN, K = 10, 4
# d_out of the site, outputs of the module, columns of the site: a whole module, and parts of fused ones.
KINDS = {
    "linear": (9, 9, None),
    "conv1d": (9, 9, None),
    "contiguous": (6, 15, OutputSlice(groups=1, start=3, stop=9)),
    "interleaved": (6, 18, OutputSlice(groups=3, start=2, stop=4)),
    "conv1d contiguous": (6, 15, OutputSlice(groups=1, start=9, stop=15)),
}
VARIANTS = {
    "sara": {},
    "sara without S": {"singular_values": False},
    "sara with Vh from zero": {"zero_init_vh": True},
    "sara without S with Vh from zero": {"singular_values": False, "zero_init_vh": True},
    "mo_sara": {"num_heads": 3},
    "mo_sara v in front": {"num_heads": 3, "v_position": "front"},
    "mo_sara without v": {"num_heads": 3, "v_position": "none"},
    "mo_sara one head": {"num_heads": 1},
    "mo_sara one head v in front": {"num_heads": 1, "v_position": "front"},
    "mo_sara one head without v": {"num_heads": 1, "v_position": "none"},
}


def arguments(variant: str, dropout: float = 0.0) -> SaraArguments:
    return SaraArguments(method=variant.split()[0], dropout=dropout, **VARIANTS[variant])


def new_delta(args: SaraArguments, site: PlannedSite, dtype=torch.float32):
    """A delta at its start."""
    method = args.resolved_method()
    return method.delta_class(method, site, dtype, torch.device("cpu"))


def make_delta(variant: str, kind: str = "linear", dtype=torch.float64, dropout: float = 0.0):
    """A delta of which no tensor is at its start."""
    args = arguments(variant, dropout)
    d_out, _, part = KINDS[kind]
    site = PlannedSite("layer.q" if part else "layer", "layer", (D_IN, d_out), part, k=K)
    delta = new_delta(args, site, dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return delta


def section_2(variant: str, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The update on input x, as it stands in section 2 of the design."""
    args, t = arguments(variant), tensors
    if args.method == "sara":
        S = torch.diag(t["S"]) if args.singular_values else torch.eye(K, dtype=x.dtype)
        return x @ t["U"] @ S @ t["Vh"]
    front = t["v"] if args.v_position == "front" else torch.ones(D_IN, dtype=x.dtype)
    back = t["v"] if args.v_position == "back" else torch.ones(t["Vh"].shape[1], dtype=x.dtype)
    z = (x * front) @ t["U"]
    g = torch.softmax(z @ t["gate_down"] @ t["gate_up"], dim=-1) if args.num_heads > 1 else z.new_ones(len(z), 1)
    return ((z * (g @ t["S"])) @ t["Vh"]) * back


def column_numbers(kind: str) -> list[int]:
    _, width, part = KINDS[kind]
    if part is None:
        return list(range(width))
    block = width // part.groups
    return [group * block + column for group in range(part.groups) for column in range(part.start, part.stop)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_forward_and_gradients_are_those_of_the_plain_formula(variant, kind, dtype, tolerance):
    delta = make_delta(variant, kind, dtype)
    _, width, _ = KINDS[kind]
    columns = column_numbers(kind)
    module = (Conv1D(width, D_IN) if kind.startswith("conv1d") else nn.Linear(D_IN, width)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, D_IN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weights = torch.randn(3, 5, width, generator=generator, dtype=torch.float64)
    base = module(x)
    base.retain_grad()
    result = delta(x, base)
    assert result.dtype == dtype
    (result * weights.to(dtype)).sum().backward()

    wide = {name: parameter.detach().double().requires_grad_() for name, parameter in delta.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    weight = module.weight.detach().double()
    base64 = x64 @ (weight if kind.startswith("conv1d") else weight.t()) + module.bias.detach().double()
    update = torch.zeros(15, width, dtype=torch.float64)
    update[:, columns] = section_2(variant, wide, x64.view(15, D_IN))
    expected = base64 + update.view(3, 5, width)
    (expected * weights).sum().backward()

    def close(one, other):
        scale = float(other.abs().max())
        return float((one.double() - other).abs().max()) <= tolerance * max(scale, 1.0)

    assert close(result.detach(), expected.detach())
    assert close(base.grad, weights)
    assert close(x.grad, x64.grad)
    assert set(delta.trained()) == set(arguments(variant).resolved_method().trained_shapes(delta.shape, K))
    for name, parameter in delta.trained().items():
        assert float(wide[name].grad.abs().max()) > 0.01, name
        assert close(parameter.grad, wide[name].grad), name
    frozen = {name for name, _ in delta.named_parameters()} - set(delta.trained())
    assert frozen == set(arguments(variant).resolved_method().frozen_shapes(delta.shape, K))
    assert all(delta.get_parameter(name).grad is None for name in frozen)


class OneLinear(nn.Module):
    def __init__(self, bias: bool, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(5)
        self.linear = nn.Linear(D_IN, 9, bias=bias, dtype=dtype)

    def forward(self, x):
        return self.linear(x)


def attach(variant: str, dtype=torch.float64, bias: bool = False, dropout: float = 0.0, name: str = "default"):
    """A linear with an adapter of which no trained tensor is at its start."""
    model = OneLinear(bias, dtype)
    adapter = add(model, variant, dropout, name)
    return model, adapter, adapter.delta(adapter.sites[0])


def add(model, variant: str, dropout: float = 0.0, name: str = "default"):
    args = replace(arguments(variant, dropout), threshold=0.6, target_modules=["linear"])
    adapter = SaraAdapter.attach(model, args, name)
    torch.manual_seed(6)
    with torch.no_grad():
        for tensor in adapter.trained().values():
            tensor.normal_(std=0.6)
    return adapter


def results(model, x, longhand: bool = False, module: nn.Module | None = None):
    """
    Output and gradients of a model, or of a function of `module`, by the short cuts where they are open, or longhand
    without them.
    """
    module = module or model
    another = model.linear.register_forward_hook(lambda module, args, output: None) if longhand else None
    x = x.clone().requires_grad_()
    output = model(x)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((output * weights).sum(), [x, *named.values()])
    if another is not None:
        another.remove()
    return {"output": output.detach(), **dict(zip(["x", *named], found, strict=True))}


def functions(output: torch.Tensor) -> set[str]:
    """Names of our own autograd functions in an output's graph."""
    found, nodes = set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        found.add(type(node).__name__.removesuffix("Backward"))
        nodes += [one for one, _ in node.next_functions if one is not None]
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_short_cuts_give_what_the_formula_gives(variant, bias, dtype, tolerance):
    model, _, delta = attach(variant, dtype, bias)
    x = torch.randn(3, 5, D_IN, generator=torch.Generator().manual_seed(1), dtype=dtype)
    short, long = results(model, x), results(model, x, longhand=True)
    assert short.keys() == long.keys()
    for name, value in short.items():
        scale = max(float(long[name].abs().max()), 1.0)
        assert float((value - long[name]).abs().max()) <= tolerance * scale, name
        assert value.stride() == long[name].stride(), name
    # It took the short cut, if it has one: SARA's function is in the graph, Mo-SARA does not read U.
    if variant.startswith("sara"):
        assert "_LinearWithUpdate" in functions(model(x))
    else:
        assert ("_MixedUpdate" in functions(model(x))) == (variant == "mo_sara")
        nn.init.constant_(delta.U, math.nan)
        assert bool(model(x).isfinite().all()) == (not bias and "front" not in variant)


@pytest.mark.parametrize("variant", ["sara", "mo_sara"])
def test_the_short_cuts_are_closed_where_the_output_is_not_the_frozen_linears_own(variant):
    x = torch.randn(4, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    # A hook before the adapter's changes the output: with its own gradient to x, and another output to read z from.
    model, _, delta = attach(variant)
    model.linear._forward_hooks.clear()
    model.linear.register_forward_hook(
        lambda module, args, output: output + args[0].sin() @ torch.ones(D_IN, 9).double()
    )
    model.linear.register_forward_hook(add_deltas, with_kwargs=True)
    changed = results(model, x)
    wide = x.clone().requires_grad_()
    expected = delta(wide, nn.functional.linear(wide, model.linear.weight) + wide.sin().sum(1, keepdim=True))
    weights = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).view(expected.shape)
    assert torch.allclose(changed["output"], expected, atol=1e-12)
    assert torch.allclose(changed["x"], torch.autograd.grad((expected * weights).sum(), wide)[0], atol=1e-12)

    # A weight that is trained gets its gradient.
    model, _, _ = attach(variant)
    model.linear.weight.requires_grad_(True)
    assert results(model, x)["linear.weight"].abs().max() > 0

    # Dropout: the update's input is not the linear's.
    model, _, delta = attach(variant, dropout=0.5)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    assert torch.allclose(model(x), delta.eval()(dropped, nn.functional.linear(x, model.linear.weight)), atol=1e-12)

    # A second adapter stands on the first one's output; each adds what it adds alone.
    model, adapter, _ = attach(variant)
    base = nn.functional.linear(x, model.linear.weight)
    alone = model(x) - base
    second = add(model, variant, name="second")
    with adapter.disabled():
        alone = alone + model(x) - base
    assert torch.allclose(model(x) - base, alone, atol=1e-12)
    second.detach()


@pytest.mark.parametrize("variant", ["sara", "sara without S", "mo_sara"])
def test_a_gradient_of_a_gradient_is_right(variant):
    x = torch.randn(3, 2, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    model, _, delta = attach(variant)
    parameters = list(delta.trained().values())

    def penalty(*_):
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return grad.square().sum()

    assert torch.autograd.gradcheck(penalty, (x, *parameters))


# By variant, our own gradient for GPUs, which applies dropout itself.
ON_GPU = {"sara": "_LinearWithUpdate", "sara without S": "_LinearWithUpdate", "mo_sara": "_LinearWithMixture"}


@pytest.mark.parametrize("variant", ON_GPU)
@pytest.mark.parametrize("dropout", [0.4, 0.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_the_short_cut_with_dropout_has_the_same_mask_and_gradients(variant, dropout, dtype, tolerance, monkeypatch):
    """It is taken on GPUs, and here it is asked for."""
    model, _, delta = attach(variant, dtype, dropout=dropout)
    if variant == "mo_sara":
        # As in half precision, and where the linear has a bias.
        delta.inverse_sigma = None
    x = torch.randn(3, 5, D_IN, generator=torch.Generator().manual_seed(1), dtype=dtype)
    torch.manual_seed(7)
    expected = results(model, x)
    assert (ON_GPU[variant] in functions(model(x))) == (variant != "mo_sara" and not dropout)
    monkeypatch.setattr(type(delta), "drops_itself", lambda self, x, output: products.has_fixed_mask(x))
    torch.manual_seed(7)
    found = results(model, x)
    assert ON_GPU[variant] in functions(model(x))
    for name, value in found.items():
        scale = max(float(expected[name].abs().max()), 1.0)
        assert float((value - expected[name]).abs().max()) <= tolerance * scale, name
    if dtype == torch.float64:
        # A gradient of a gradient has the mask of the first one.
        parameters = list(delta.trained().values())

        def penalty(*_):
            torch.manual_seed(7)
            wide = x[0, :2].clone().requires_grad_()
            (grad,) = torch.autograd.grad(model(wide).square().sum(), wide, create_graph=True)
            return grad.square().sum()

        assert torch.autograd.gradcheck(penalty, parameters)


@pytest.mark.parametrize("variant", ["sara", "mo_sara"])
def test_the_short_cut_with_dropout_keeps_the_input_alone(variant, monkeypatch):
    model, _, delta = attach(variant, torch.float32, dropout=0.4)
    x = torch.randn(64, D_IN, requires_grad=True)

    def kept():
        """The bytes that the backward pass keeps of tensors as long as the input, each once."""
        found = {}

        def pack(tensor):
            if tensor.numel() >= x.numel():
                found[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            both = model(x) + model(x)
        del both
        return sum(found.values())

    before = kept()
    monkeypatch.setattr(type(delta), "drops_itself", lambda self, x, output: products.has_fixed_mask(x))
    # Twice what dropout has made of the input, and twice its mask; or the input, which both share. U of Mo-SARA is
    # frozen, so its input is not needed.
    assert before == (4 if variant == "sara" else 2) * x.nbytes
    assert kept() == (x.nbytes if variant == "sara" else 0)


def test_dropout_that_is_another_module_or_switched_off_is_respected(monkeypatch):
    model, _, delta = attach("sara", dropout=0.9)
    monkeypatch.setattr(products, "LARGE_ON_GPU", 0)
    x = torch.randn(4, D_IN, dtype=torch.float64, requires_grad=True, device="cpu")
    delta.dropout.eval()
    torch.testing.assert_close(model(x), model.eval()(x))


def test_torch_compile_is_not_asked_for_the_state_of_a_cuda_graph(monkeypatch):
    """It cannot put the question into its graph, so nothing asks it where our own gradients are not used anyway."""

    def ask():
        raise AssertionError("asked")

    class OnGpu:
        device = torch.device("cuda", 0)

        def numel(self):
            return 2**22

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", ask)
    with pytest.raises(AssertionError, match="asked"):
        products.can_drop_again(torch.ones(4), OnGpu(), nn.Dropout(0.5))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not products.can_drop_again(torch.ones(4), OnGpu(), nn.Dropout(0.5))
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not products.can_drop_again(torch.ones(4), OnGpu(), nn.Dropout(0.5))


@pytest.mark.parametrize("variant", ["sara", "mo_sara"])
@pytest.mark.parametrize("layout", ["transposed", "columns", "misaligned"])
@pytest.mark.parametrize("way", ["plain", "reentrant", "contiguous"])
def test_the_short_cut_leaves_inputs_whose_mask_it_could_not_draw_again(way, layout, variant, monkeypatch):
    """`contiguous`: something that keeps tensors for the backward pass elsewhere, as `save_on_cpu` does."""
    model, _, delta = attach(variant, dropout=0.4)
    delta.inverse_sigma = None
    wide = torch.randn(3, D_IN, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shape = {
        "transposed": lambda x: x.transpose(1, 2),
        "columns": lambda x: x.transpose(1, 2).contiguous().repeat(1, 1, 2)[..., :D_IN],
        "misaligned": lambda x: x.new_empty(x.numel() + 1)[1:].view(3, 4, D_IN).copy_(x.transpose(1, 2)),
    }[layout]

    def run(x):
        torch.manual_seed(7)
        x = shape(x)
        if way == "reentrant":
            return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True)
        if way == "plain":
            return model(x)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous().clone(), lambda t: t):
            return model(x)

    def gradients():
        x = wide.clone().requires_grad_()
        model.zero_grad()
        output = run(x)
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum().backward()
        return [x.grad, *(tensor.grad.clone() for tensor in delta.trained().values())]

    expected = gradients()
    monkeypatch.setattr(type(delta), "drops_itself", lambda self, x, output: products.has_fixed_mask(x))
    for one, other in zip(expected, gradients(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


def test_a_gpu_calls_our_own_gradients_for_large_outputs_only():
    small, large = (torch.empty(size, device="meta") for size in (2**22 - 1, 2**22))
    assert not products.own_gradients_pay(small)
    assert products.own_gradients_pay(large)
    assert products.own_gradients_pay(torch.empty(2))
    with torch.no_grad():
        assert not products.own_gradients_pay(large)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(3, 5, D_IN), (4, D_IN), (D_IN,), (0, D_IN)])
def test_the_output_can_be_changed_in_place(variant, bias, shape):
    """As OLMo clamps its projections."""
    model, _, _ = attach(variant, bias=bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = results(lambda x: model(x).clamp_(-0.5, 0.5), x, module=model)
    expected = results(lambda x: model(x).clamp(-0.5, 0.5), x, module=model)
    assert all(torch.allclose(found[name], value, atol=1e-12) for name, value in expected.items())


@pytest.mark.parametrize("variant", ["sara", "mo_sara"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_token_without_further_dimensions(variant, kind):
    delta, width = make_delta(variant, kind), KINDS[kind][1]
    x, output = torch.randn(D_IN, dtype=torch.float64), torch.randn(width, dtype=torch.float64)
    parameters = list(delta.trained().values())
    one = torch.autograd.grad(delta(x, output).square().sum(), parameters)
    batch = torch.autograd.grad(delta(x[None], output[None]).square().sum(), parameters)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(one, batch, strict=True))


def test_half_precision_keeps_the_router_in_full(monkeypatch):
    """Also where the trained tensors themselves were cast, as FSDP2's mixed precision does."""
    seen = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda logits, dim: seen.append(logits.dtype) or softmax(logits, dim))
    delta = make_delta("mo_sara", dtype=torch.float32)
    cast = {name: tensor.detach().to(torch.bfloat16) for name, tensor in delta.named_parameters()}
    cast = {name: tensor.requires_grad_(name in delta.trained_names) for name, tensor in cast.items()}
    x, output = torch.randn(4, D_IN).bfloat16(), torch.randn(4, 9).bfloat16()
    torch.func.functional_call(delta, cast, (x, output)).float().sum().backward()
    assert set(seen) == {torch.float32}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("variant", ["sara", "mo_sara"])
def test_a_traced_model_gives_the_same(variant):
    model, _, _ = attach(variant)
    x = torch.randn(4, 3, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(torch.jit.trace(model, x[:, :1])(x), model(x), atol=1e-12)


def examples_gradients_are_right(module, *inputs):
    """Gradients for each example, by torch.func in one go, are those that autograd gives for it alone."""
    parameters = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    def loss(parameters, *example):
        batch = tuple(tensor[None] for tensor in example)
        return torch.func.functional_call(module, parameters, batch).square().sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, *[0] * len(inputs)))(parameters, *inputs)
    for number, example in enumerate(zip(*inputs, strict=True)):
        module.zero_grad()
        module(*(tensor[None] for tensor in example)).square().sum().backward()
        for name, gradients in found.items():
            assert torch.allclose(gradients[number], module.get_parameter(name).grad, atol=1e-10), name


@pytest.mark.parametrize("variant", ["sara", "mo_sara"])
def test_torch_func_gives_the_gradients_of_each_example(variant):
    x = torch.randn(4, 3, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    examples_gradients_are_right(attach(variant)[0], x)
    outputs = torch.randn(4, 3, KINDS["contiguous"][1], generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    fused = make_delta(variant, "contiguous")
    examples_gradients_are_right(fused, x, outputs)

    # Several sets of parameters at once, on the same output.
    ensemble = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in fused.named_parameters()}
    both = torch.vmap(lambda p: torch.func.functional_call(fused, p, (x, outputs)))(ensemble)
    for number, result in enumerate(both):
        alone = torch.func.functional_call(fused, {name: p[number] for name, p in ensemble.items()}, (x, outputs))
        assert torch.allclose(result, alone, atol=1e-12)


def test_mo_sara_reads_no_output_of_a_weight_that_is_not_its_own():
    x = torch.randn(4, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model, adapter, delta = attach("mo_sara")
    base = nn.functional.linear(x, model.linear.weight)
    before = model(x)
    assert delta.inverse_sigma is not None

    merged = add(model, "sara", name="merged")
    merged.merge()
    assert delta.inverse_sigma is None
    changed = nn.functional.linear(x, model.linear.weight)
    assert not torch.allclose(changed, base)
    assert torch.allclose(model(x) - changed, before - base, atol=1e-12)
    merged.unmerge()
    merged.detach()
    assert torch.equal(model(x), before)

    # A cast rounds the weight and the factors each on its own.
    assert copy.deepcopy(model).to(torch.bfloat16).linear.sara["default"].inverse_sigma is None
    assert copy.deepcopy(model).float().linear.sara["default"].inverse_sigma is None

    # Singular values of many orders of magnitude: the small ones would be read out of the output's rounding.
    torch.manual_seed(0)
    model = OneLinear(False, torch.float32)
    U, _, Vh = torch.linalg.svd(model.linear.weight.detach(), full_matrices=False)
    model.linear.weight.data = U * torch.logspace(0, -5, 9) @ Vh
    adapter = SaraAdapter.attach(model, SaraArguments(method="mo_sara", threshold=1.0, target_modules=["linear"]))
    assert adapter.delta(adapter.sites[0]).inverse_sigma is None


@pytest.mark.parametrize("kind", ["contiguous", "interleaved"])
@pytest.mark.parametrize("variant", ["sara", "mo_sara"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_other_columns_of_a_fused_projection_keep_their_bits(variant, kind, dtype):
    delta = make_delta(variant, kind, dtype)
    output = torch.randn(7, KINDS[kind][1]).to(dtype)
    before = output.clone()
    result = delta(torch.randn(7, D_IN).to(dtype), output)
    others = [column for column in range(KINDS[kind][1]) if column not in column_numbers(kind)]
    assert torch.equal(result[:, others], before[:, others])
    assert not torch.isclose(result[:, column_numbers(kind)], before[:, column_numbers(kind)]).any(dim=0).all()
    # The base output is not written to: whoever else holds it sees what it was.
    assert torch.equal(output, before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_merged_matrix_is_the_update(variant):
    delta = make_delta(variant)
    if delta.__class__.__name__ == "MoSaraDelta" and delta.num_heads > 1:
        with pytest.raises(ValueError, match=r"with 3 heads depends on the token.*num_heads=1"):
            delta.merged()
        return
    x = torch.randn(6, D_IN, dtype=torch.float64)
    tensors = {name: parameter.detach() for name, parameter in delta.named_parameters()}
    assert torch.allclose(x @ delta.merged(), section_2(variant, tensors, x), atol=1e-12)


@pytest.mark.parametrize(
    ("variant", "count"),
    [
        ("sara", lambda m, k, d_in, d_out: k * (d_in + d_out + 1)),
        ("sara without S", lambda m, k, d_in, d_out: k * (d_in + d_out)),
        ("mo_sara", lambda m, k, d_in, d_out: m * k + k + m + d_out),
        ("mo_sara v in front", lambda m, k, d_in, d_out: m * k + k + m + d_in),
        ("mo_sara without v", lambda m, k, d_in, d_out: m * k + k + m),
        ("mo_sara one head", lambda m, k, d_in, d_out: k + d_out),
    ],
)
def test_parameter_counts(variant, count):
    delta = make_delta(variant)
    d_in, d_out = delta.shape
    expected = count(3, K, d_in, d_out)
    assert sum(parameter.numel() for parameter in delta.parameters() if parameter.requires_grad) == expected
    assert arguments(variant).resolved_method().count(delta.shape, K) == expected


def test_initialisation_is_uniform_in_one_over_the_root_of_fan_in(method):
    d_in, d_out, k = 300, 200, 150
    args = arguments(method)
    torch.manual_seed(0)
    delta = new_delta(args, PlannedSite("q", "q", (d_in, d_out), k=k))
    fan_in = {"U": d_in, "S": k, "Vh": k} if method == "sara" else {"S": k, "gate_down": k, "gate_up": 1}
    for name, size in fan_in.items():
        values, bound = getattr(delta, name).detach().flatten(), 1 / math.sqrt(size)
        assert values.abs().max() <= bound
        assert values.unique().numel() > 0.9 * values.numel()
        if values.numel() > 100:
            # Uniform and not something narrower: the ends are reached, and the spread is bound / sqrt(3).
            assert values.max() > 0.95 * bound
            assert values.min() < -0.95 * bound
            assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)
    if method == "mo_sara":
        assert not delta.v.any()
        assert delta.v.shape == (d_out,)


def test_ablations_that_start_at_zero_do():
    for variant in ("sara with Vh from zero", "sara without S with Vh from zero"):
        args = arguments(variant)
        delta = new_delta(args, PlannedSite("q", "q", (8, 9), k=3))
        assert not delta.Vh.any()
        assert delta.U.all()
        output = torch.randn(2, 9)
        assert torch.equal(delta(torch.randn(2, 8), output), output)


@pytest.mark.parametrize("variant", ["sara", "mo_sara", "mo_sara v in front"])
def test_dropout_acts_in_training_only_and_on_the_input_only(variant):
    delta = make_delta(variant, dropout=0.5)
    x = torch.randn(4, D_IN, dtype=torch.float64)
    output = torch.zeros(4, delta.shape[1], dtype=torch.float64)
    tensors = {name: parameter.detach() for name, parameter in delta.named_parameters()}
    delta.eval()
    assert torch.allclose(delta(x, output), section_2(variant, tensors, x), atol=1e-12)
    delta.train()
    torch.manual_seed(5)
    found = delta(x, output)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.5)
    assert 0 < int((dropped == 0).sum()) < x.numel()
    assert torch.allclose(found, section_2(variant, tensors, dropped), atol=1e-12)


def test_gates_sum_to_one_and_depend_on_the_token():
    delta = make_delta("mo_sara", dtype=torch.float32)
    x = torch.randn(2, 6, D_IN)
    g = delta.gates(x)
    assert g.shape == (2, 6, 3)
    assert torch.allclose(g.sum(-1), torch.ones(2, 6))
    logits = x @ delta.U @ delta.gate_down @ delta.gate_up
    assert torch.allclose(g, torch.softmax(logits, -1), atol=1e-6)
    assert not torch.allclose(g[0, 0], g[0, 1], atol=1e-3)
    assert torch.equal(make_delta("mo_sara one head", dtype=torch.float32).gates(x), torch.ones(2, 6, 1))


@pytest.mark.parametrize("variant", ["sara", "mo_sara"])
@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_trained_tensors_keep_float32_and_their_values_when_the_model_is_cast(variant, cast):
    delta = make_delta(variant, dtype=torch.float32)
    model = nn.Sequential(nn.Linear(3, 3), delta)
    before = {name: tensor.detach().clone() for name, tensor in delta.trained().items()}
    held = dict(delta.trained())
    getattr(model, cast)()
    assert model[0].weight.dtype != torch.float32
    for name, tensor in delta.trained().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])  # the very same values, not a rounded copy
        assert tensor is held[name]  # an optimizer that holds it still trains it
        assert tensor.requires_grad
    frozen = [p for p in delta.parameters() if not p.requires_grad]
    assert all(p.dtype == model[0].weight.dtype for p in frozen)
    model.to(torch.float32)
    assert torch.equal(next(iter(delta.trained().values())), next(iter(before.values())))


def test_a_float64_base_has_float64_updates():
    delta = make_delta("mo_sara", dtype=torch.float64)
    assert {parameter.dtype for parameter in delta.parameters()} == {torch.float64}
    delta = make_delta("mo_sara", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in delta.trained().values()} == {torch.float32}
    assert delta.U.dtype == delta.Vh.dtype == torch.bfloat16


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["linear", "interleaved"])
def test_half_precision_is_close_and_autocast_keeps_the_output_dtype(variant, kind):
    delta = make_delta(variant, kind, torch.float32)
    x, output = torch.randn(5, D_IN), torch.randn(5, KINDS[kind][1])
    expected = delta(x, output).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # Under autocast a linear returns bfloat16; an output in float32 stays float32.
        for out in (output, output.bfloat16()):
            found = delta(x, out)
            assert found.dtype == out.dtype
            # It is computed in bfloat16: close, not equal.
            assert not torch.equal(found.float(), expected)
            assert torch.allclose(found.float(), expected, atol=0.05 * float(expected.abs().max()))
    half = copy.deepcopy(delta).bfloat16()
    found = half(x.bfloat16(), output.bfloat16())
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("frozen", ["input", "tensors"])
def test_gradients_that_nobody_asks_for_change_no_other(variant, frozen):
    delta = make_delta(variant)
    x = torch.randn(5, D_IN, dtype=torch.float64, requires_grad=True)
    output = torch.randn(5, delta.shape[1], dtype=torch.float64)
    delta(x, output).square().sum().backward()
    if frozen == "input":
        expected = {name: tensor.grad for name, tensor in delta.trained().items()}
        delta.zero_grad()
        delta(x.detach(), output).square().sum().backward()
        assert all(torch.equal(tensor.grad, expected[name]) for name, tensor in delta.trained().items())
    else:
        expected = x.grad.clone()
        x.grad = None
        delta.requires_grad_(False)
        delta(x, output).square().sum().backward()
        assert torch.equal(x.grad, expected)


def test_inputs_of_every_number_of_dimensions_and_an_empty_batch(method):
    delta = make_delta(method, dtype=torch.float32)
    x = torch.randn(2, 3, 4, D_IN)
    output = torch.randn(2, 3, 4, delta.shape[1])
    whole = delta(x, output)
    assert torch.allclose(delta(x[0, 0], output[0, 0]), whole[0, 0], atol=1e-5)
    assert torch.allclose(delta(x[0, 0, 0], output[0, 0, 0]), whole[0, 0, 0], atol=1e-5)
    assert delta(x[:0], output[:0]).shape == (0, 3, 4, delta.shape[1])
    # Inputs need not be contiguous.
    assert torch.allclose(delta(x.transpose(0, 2), output.transpose(0, 2)), whole.transpose(0, 2), atol=1e-5)
