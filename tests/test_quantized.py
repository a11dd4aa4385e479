"""Adapters on quantized bases: those of bitsandbytes, of transformers, and others as far as they install."""

import copy
import types

import pytest
import torch
from conftest import attach_trained, base_state, logits, make_inputs, make_model, same_bits, sara_arguments
from torch import nn
from torch.nn import functional as F
from training import dataset, make_trainer, training_arguments
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitnet import BitLinear
from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear
from transformers.integrations.eetq import EetqLinear
from transformers.integrations.finegrained_fp8 import FP8GroupedLinear, FP8Linear
from transformers.integrations.gemma_quant import QuantizedLinear
from transformers.integrations.metal_quantization import MetalLinear

from hf_sara import (
    AdapterBank,
    AdapterError,
    SaraAdapter,
    SaraArguments,
    SaraTrainer,
    export_lora,
    from_hub,
    merge,
    plan,
)
from hf_sara.frozen_buffers import hold_packing
from hf_sara.linears import is_quantized

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
Q_PROJ = r"model\.layers\.0\.self_attn\.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    make_model(hidden_size=64, intermediate_size=64).save_pretrained(path)
    return path


@pytest.fixture(params=["nf4", pytest.param("fp4", marks=pytest.mark.slow), "int8"])
def quantized(request, folder):
    """A function that loads the base quantized, with the same bits each time."""
    pytest.importorskip("bitsandbytes", "0.46")
    config = BitsAndBytesConfig(**KINDS[request.param])
    return lambda: AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()


def replaced(make):
    """A model in which `make` has made other modules of the query and value projections."""
    model = make_model()
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, make(getattr(layer.self_attn, name)).requires_grad_(False))
    return model


def trained_and_back(make, method, folder):
    """A trained adapter on such a model, which gives the same outputs where it is loaded."""
    model = replaced(make)
    adapter = attach_trained(model, method)
    adapter.save_pretrained(folder)
    fresh = replaced(make)
    SaraAdapter.load(fresh, folder)
    assert torch.equal(logits(fresh), logits(model))
    return adapter


def _plain(weight):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return linear


def ranks(model) -> list[int]:
    return [site.k for site in plan(model, sara_arguments()).sites]


# ---- bitsandbytes ----


def test_an_adapter_on_bitsandbytes_trains_and_comes_back(quantized, method, tmp_path):
    model = quantized()
    adapter = attach_trained(model, method)
    assert all(is_quantized(site.linear(model)) for site in adapter.sites)
    assert all(tensor.dtype == torch.float32 for tensor in adapter.trained().values())
    adapter.save_pretrained(tmp_path)
    fresh, hub = quantized(), from_hub(tmp_path, base_model=quantized())
    SaraAdapter.load(fresh, tmp_path)
    after = logits(model)
    assert torch.equal(logits(fresh), after)
    assert torch.equal(logits(hub), after)
    assert torch.equal(logits(copy.deepcopy(model)), after)
    with adapter.disabled():
        base = logits(model)
    assert not torch.allclose(after, base, atol=1e-2)
    adapter.detach()
    assert torch.equal(logits(model), base)


def test_a_bank_on_bitsandbytes_trains_and_serves(quantized, method, tmp_path):
    names = ["one", "two"]
    bank = AdapterBank.attach(quantized(), sara_arguments(method, modules_to_save=[]), names)
    data = dataset().add_column("adapter_name", names * 12)
    args = training_arguments(tmp_path, learning_rate=0.5, per_device_train_batch_size=4)
    trainer = SaraTrainer(model=bank.model, args=args, bank=bank, train_dataset=data)
    start = bank.state("one")
    trainer.train()
    trainer.save_model()
    assert not same_bits(start, bank.state("one"))
    ids = torch.tensor(data["input_ids"][:2])
    served = quantized()
    AdapterBank.load(served, tmp_path)
    with torch.no_grad():
        found = served(ids, adapter_names=names).logits
        for row, name in enumerate(names):
            alone = quantized()
            SaraAdapter.load(alone, tmp_path / name)
            expected = alone(ids).logits[row]
            # With eight bits, the other rows of a batch decide which columns are computed more exactly.
            limit = 0.15 if getattr(served, "is_loaded_in_8bit", False) else 1e-4
            assert float((found[row] - expected).abs().max()) < limit
            assert float((found[row] - quantized()(ids).logits[row]).abs().max()) > 2 * limit


def test_the_gradients_on_bitsandbytes_are_those_of_the_dequantized_weights(quantized, folder):
    models = [quantized().train(), AutoModelForCausalLM.from_pretrained(folder).train()]
    names = [
        name for name, module in models[0].named_modules() if isinstance(module, nn.Linear) and is_quantized(module)
    ]
    assert len(names) == 14
    for site in plan(models[0], SaraArguments(target_modules=names)).sites:
        site.write(site.linear(models[1]), site.weight(models[0]))
    torch.manual_seed(0)
    adapters = [SaraAdapter.attach(model, sara_arguments(dropout=0.0)) for model in models]
    assert [site.k for site in adapters[0].sites] == [site.k for site in adapters[1].sites]
    adapters[0].load_state_dict(adapters[1].state_dict())
    for model in models:
        model(**make_inputs(model)).loss.backward()
    for name, tensor in adapters[1].trained().items():
        # The product of 8 bit quantizes the inputs too.
        error = (adapters[0].trained()[name].grad - tensor.grad).norm()
        assert error < 0.1 * tensor.grad.norm(), name


def test_the_trainer_trains_on_bitsandbytes(quantized, tmp_path):
    trainer = make_trainer(tmp_path, "mo_sara", model=quantized(), save_strategy="no", report_to="none")
    before = trainer.model.sara_adapter.state_dict()
    trainer.train()
    trainer.save_model()
    assert not any(torch.equal(before[name], t) for name, t in trainer.model.sara_adapter.state_dict().items())
    assert torch.equal(logits(from_hub(tmp_path, base_model=quantized())), logits(trainer.model))


def test_what_needs_the_weights_of_bitsandbytes_is_refused(quantized, tmp_path):
    model = quantized()
    adapter = attach_trained(model)
    for action in (adapter.merge, lambda: merge(model, tmp_path / "merged")):
        with pytest.raises(
            ValueError, match=f"{Q_PROJ}: the weight of this Linear.* is quantized, so it cannot be merged"
        ):
            action()
    assert not adapter.merged
    with pytest.raises(ValueError, match=r"self_attn\.q_proj\.weight: the weight is quantized"):
        plan(model, SaraArguments(target_modules=["down_proj"], modules_to_save=["self_attn"]))


def test_peft_loads_the_export_on_the_same_quantized_base(quantized, tmp_path):
    peft = pytest.importorskip("peft")
    model = quantized()
    export_lora(attach_trained(model), tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantized(), tmp_path)
    # Ours is not packed for evaluations, so PEFT's must not be either.
    hold_packing(loaded)
    found = logits(loaded)
    torch.testing.assert_close(found, logits(model), atol=1e-4, rtol=1e-4)


def test_rows_of_a_quantized_output_embedding_are_refused(folder):
    pytest.importorskip("bitsandbytes", "0.46")
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["nothing"])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    assert is_quantized(model.lm_head)
    with pytest.raises(ValueError, match="the weight of lm_head, a Linear4bit, is quantized"):
        SaraAdapter.attach(model, sara_arguments(trainable_token_indices=[3]))


def test_an_evaluation_before_a_training_takes_no_gradient_away(quantized, method, tmp_path):
    # On some CPUs it would pack the weights anew, and then no gradient would pass through them.
    values = {"learning_rate": 0.2, "eval_strategy": "steps", "eval_steps": 2}
    states = []
    for evaluates in (False, True):
        trainer = make_trainer(tmp_path / str(evaluates), method, model=quantized(), dropout=0.0, **values)
        if evaluates:
            trainer.evaluate()
        trainer.train()
        states.append(trainer.sara_adapter.state_dict())
    assert same_bits(*states)
    sites = trainer.sara_adapter.sites
    assert all(float(states[0][f"{s.name}.{'v' if method == 'mo_sara' else 'S'}"].abs().max()) > 0.1 for s in sites)


def test_a_weight_that_an_evaluation_has_packed_anew_is_refused(folder):
    bnb = pytest.importorskip("bitsandbytes", "0.49")
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.raises(ValueError, match=rf"{Q_PROJ}: the weight of this Linear4bit .* Load the base again"):
        SaraAdapter.attach(model, sara_arguments())


# ---- FP8 ----


def fp8(linear, block_size=None, scale_fmt="float", kind=FP8Linear) -> FP8Linear:
    """An FP8 linear with the rounded values of a linear."""
    d_out, d_in = linear.weight.shape
    module = kind(d_in, d_out, block_size=block_size, scale_fmt=scale_fmt, has_bias=linear.bias is not None)
    rows, columns = block_size or (d_out, d_in)
    scales = torch.empty(-(-d_out // rows), -(-d_in // columns))
    for i in range(len(scales)):
        for j in range(scales.shape[1]):
            block = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = 2.0 ** (linear.weight[block].detach().abs().max() / 448).log2().ceil()
            module.weight.data[block] = (linear.weight[block].detach() / scales[i, j]).to(torch.float8_e4m3fn)
    module.weight_scale_inv.data = (scales if block_size else scales[0, 0]).to(module.weight_scale_inv.dtype)
    return module


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("block_size", [None, (8, 8), (7, 10), (24, 24), (128, 128), (1, 24)])
def test_fp8_linears_are_read_by_their_scales(block_size, scale_fmt):
    # The scales are powers of two, and differ by much more than the rounding of the values.
    model = make_model()
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.v_proj):
                linear.weight[:5] *= 30
                linear.weight[:, -3:] *= 30
    quantized = copy.deepcopy(model)
    for layer in quantized.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(
                layer.self_attn, name, fp8(getattr(layer.self_attn, name), block_size, scale_fmt).requires_grad_(False)
            )
    for site in plan(quantized, sara_arguments()).sites:
        exact, found = site.weight(model), site.weight(quantized)
        assert found.dtype == torch.float32
        assert (found - exact).abs().max() <= 2**-4 * exact.abs().max()
        # A wrong scale would be a factor of two or more.
        large = exact.abs() > 2**-5 * exact.abs().max()
        assert ((found / exact)[large] - 1).abs().max() < 0.3
        site.write(site.linear(model), found)
    assert ranks(quantized) == ranks(model)


def test_an_adapter_on_fp8_linears_trains_and_comes_back(method, tmp_path):
    # The kernels of FP8 run on a GPU, so the forward here is what transformers' backward computes.
    def make(linear):
        module = fp8(linear, (8, 16))
        module.forward = types.MethodType(lambda self, x: F.linear(x, dequantized(self), self.bias), module)
        return module

    def dequantized(module):
        rows, columns = module.block_size
        scale = module.weight_scale_inv.repeat_interleave(rows, 0)[: module.out_features]
        return module.weight.float() * scale.repeat_interleave(columns, 1)[:, : module.in_features]

    adapter = trained_and_back(make, method, tmp_path)
    if method == "sara":
        with pytest.raises(ValueError, match=f"{Q_PROJ}: the weight of this FP8Linear is quantized"):
            adapter.merge()


def test_the_other_linears_of_8_bit_floats_are_read_by_their_scales_or_refused():
    def compressed(linear):
        d_out, d_in = linear.weight.shape
        module = CompressedTensorsFP8Linear(d_in, d_out)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 448
        module.weight.data, module.weight_scale.data = (linear.weight / scale).to(torch.float8_e4m3fn), scale.t()
        return module

    model = make_model()
    for site in plan(replaced(compressed), sara_arguments()).sites:
        torch.testing.assert_close(site.weight(replaced(compressed)), site.weight(model), atol=0.05, rtol=0.07)

    def bare(linear):
        linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        return linear

    def grouped(linear):
        module = fp8(linear)
        module.__class__, module.n_groups = FP8GroupedLinear, 2
        return module

    def four_bits(linear):
        module = fp8(linear, (8, 8))
        module.weight = nn.Parameter(torch.zeros(linear.out_features, 12, dtype=torch.int8), requires_grad=False)
        return module

    for make, kind in ((bare, "Linear"), (grouped, "FP8GroupedLinear"), (four_bits, "FP8Linear")):
        with pytest.raises(ValueError, match=f"{Q_PROJ}: the weight of this {kind} is stored as .* cannot be read"):
            SaraAdapter.attach(replaced(make), sara_arguments())


# ---- packed weights ----


class Packed(nn.Module):
    """As the linears of GPTQ and AWQ: packed integers, and no `nn.Linear`."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", (linear.weight.detach() * 50).round().int().t().contiguous())
        self.bias = None

    def values(self):
        return self.qweight.float() / 50

    def forward(self, x):
        return x @ self.values()


class Transposed(Packed):
    """As gptqmodel's TorchQuantLinear."""

    def dequantize_weight(self, num_itr: int = 1):
        return self.values()


class InPlace(Packed):
    """A method that turns the module into a plain one."""

    def dequantize(self):
        self.weight = nn.Parameter(self.values().t())
        self.qweight.zero_()
        del self.qweight


class InPlaceWithValues(Packed):
    """The same, and the values are returned."""

    def dequantize(self):
        weight = self.values().t()
        self.qweight.zero_()
        del self.qweight
        return weight


class OtherShape(Packed):
    def dequantize(self):
        return self.values().flatten()


class Integers(Packed):
    def dequantize(self):
        return self.qweight.t()


class Fails(Packed):
    def dequantize(self, scale):
        return scale


class OtherValues(Packed):
    def dequantize(self):
        return self.values().flip(0).t()


class NoGradient(Packed):
    def dequantize(self):
        return self.values().t()

    def forward(self, x):
        return (x * 100).round() / 100 @ self.values()


class ForGpusAlone(Transposed):
    def forward(self, x):
        raise RuntimeError("no kernel")


class ForInferenceAlone(Transposed):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("kind", [Transposed, InPlaceWithValues])
def test_a_method_of_a_packed_class_gives_the_values(kind, method, tmp_path):
    model = replaced(kind)
    before = base_state(model)
    expected = replaced(lambda linear: _plain(Packed(linear).values().t().contiguous()))
    assert ranks(model) == ranks(expected)
    for site in plan(model, sara_arguments()).sites:
        assert torch.equal(site.weight(model), site.weight(expected))
    adapter = attach_trained(model, method)
    assert same_bits(base_state(model), before)
    adapter.save_pretrained(tmp_path)
    fresh = replaced(kind)
    SaraAdapter.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    SaraAdapter.attach(expected, sara_arguments(method)).load_state_dict(adapter.state_dict())
    torch.testing.assert_close(logits(expected), logits(model))
    if method == "sara":
        export_lora(adapter, tmp_path)
        with pytest.raises(ValueError, match=f"{Q_PROJ}: the weight of this {kind.__name__} is quantized"):
            adapter.merge()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (InPlace, "its values come as NoneType"),
        (OtherShape, r"its values come in the shape \(576,\)"),
        (Integers, "its values come as torch.int32"),
        (Fails, ".*missing 1 required positional argument"),
        (OtherValues, "its forward multiplies by something else"),
        (NoGradient, "its forward passes no gradient to its input"),
        (ForGpusAlone, "its values may be transposed, and its forward cannot tell: no kernel"),
    ],
)
def test_a_method_that_cannot_be_trusted_is_refused(kind, reason):
    model = replaced(kind)
    before, names = base_state(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=f"{Q_PROJ}: the weight of this {kind.__name__} is packed, .*: {reason}"):
        SaraAdapter.attach(model, sara_arguments())
    assert same_bits(base_state(model), before)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("targets", [None, ["q_proj"], pytest.param(["all-linear"], marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "make",
    [
        Packed,
        lambda linear: BitLinear(24, linear.out_features, bias=False, dtype=torch.float32),
        lambda linear: EetqLinear(24, linear.out_features),
        lambda linear: MetalLinear(24, linear.out_features, group_size=8),
        lambda linear: QuantizedLinear(24, linear.out_features, num_bits=4),
    ],
    ids=["packed", "bitnet", "eetq", "metal", "gemma"],
)
def test_a_packed_class_without_a_method_is_named(make, targets):
    model = replaced(make)
    kind = type(model.model.layers[0].self_attn.q_proj).__name__
    if kind == "QuantizedLinear":
        # Values of its own, times random inputs that it rounds.
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.data.random_(0, 255)
            layer.self_attn.q_proj.input_activation_scale.data.fill_(0.1)
    with pytest.raises(ValueError, match=f"{Q_PROJ}(:| is).* {kind}[ ,]"):
        SaraAdapter.attach(model, sara_arguments(target_modules=targets))


def test_an_adapter_is_not_loaded_on_a_packed_class(tmp_path):
    attach_trained(make_model()).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=f"'{Q_PROJ}', which this LlamaForCausalLM has as a Packed"):
        SaraAdapter.load(replaced(Packed), tmp_path)


def test_a_linear_that_passes_no_gradient_fails_in_the_backward_pass_alone(tmp_path):
    attach_trained(replaced(Transposed)).save_pretrained(tmp_path)
    model = replaced(ForInferenceAlone)
    SaraAdapter.load(model, tmp_path)
    loss = model(**make_inputs(model)).loss
    with pytest.raises(RuntimeError, match=r"_proj: this linear passes no gradient to its input"):
        loss.backward()


# ---- packages that the tests do not install ----


def _int8(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def test_an_adapter_on_torchao_trains_and_comes_back(method, tmp_path):
    model = _int8(make_model())
    adapter = attach_trained(model, method)
    assert type(adapter.sites[0].linear(model)) is nn.Linear
    assert is_quantized(adapter.sites[0].linear(model))
    adapter.save_pretrained(tmp_path)
    fresh = _int8(make_model())
    SaraAdapter.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    plain = make_model()
    for site in adapter.sites:
        site.write(site.linear(plain), site.weight(model))
    assert ranks(plain) == [site.k for site in plan(model, sara_arguments()).sites]
    if method == "sara":
        with pytest.raises(ValueError, match=f"{Q_PROJ}: the weight of this Linear is quantized"):
            adapter.merge()
        export_lora(adapter, tmp_path)
    with pytest.raises(ValueError, match=r"lm_head\.weight: the weight is quantized"):
        plan(model, SaraArguments(modules_to_save=["lm_head"]))


def test_torchao_with_inputs_of_8_bit_is_refused_since_it_passes_no_gradient():
    torchao = pytest.importorskip("torchao.quantization")
    model = make_model()
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match=f"{Q_PROJ}: .* passes no gradient"):
        SaraAdapter.attach(model, sara_arguments())


def test_an_adapter_on_hqq_trains_and_comes_back(method, tmp_path):
    hqq = pytest.importorskip("hqq.core.quantize")

    def make(linear):
        config = hqq.BaseQuantizeConfig(nbits=4, group_size=8)
        return hqq.HQQLinear(linear.requires_grad_(False), config, compute_dtype=torch.float32, device="cpu")

    adapter = trained_and_back(make, method, tmp_path)
    for site in adapter.sites:
        torch.testing.assert_close(site.weight(adapter.model), site.weight(make_model()), atol=0.1, rtol=0.1)
