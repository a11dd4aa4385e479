"""Linears that cannot hold an update, or hold it in another way: each is refused by name, or works exactly."""

import copy

import pytest
import torch
from conftest import attach_trained, logits, make_model, sara_arguments
from torch import nn
from torch.nn import functional as F

from hf_sara import AdapterError, SaraAdapter, SaraArguments, export_lora
from hf_sara.linears import computes_product, why_not
from hf_sara.targets import find_sites


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-3, 3)


class Larger(nn.Linear):
    def forward(self, x):
        return 1.2 * super().forward(x)


class TwoOutputs(nn.Linear):
    def forward(self, x):
        return super().forward(x), self.bias


class Grouped(nn.Linear):
    def forward(self, x):
        return torch.einsum("...gi,goi->...go", x, self.weight.view(2, -1, self.in_features)).flatten(-2)


class Rewritten(nn.Linear):
    """The same product, in words of its own."""

    def forward(self, hidden):
        product = hidden @ self.weight.T
        return product if self.bias is None else product + self.bias


class ThreeDimensions(nn.Linear):
    """The same product, for tensors of three dimensions alone."""

    def forward(self, x):
        batch, length, width = x.shape
        return super().forward(x.reshape(batch * length, width)).view(batch, length, -1)


class Finder(nn.Module):
    """Calls a linear that it finds by a name that is put together."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(4, 4)

    def init_weights(self):
        nn.init.zeros_(self.q_proj.weight)

    def forward(self, x, name="q"):
        return getattr(self, f"{name}_proj")(x)


class Penalised(nn.Module):
    """Reads the weight in a method that its forward does not use, and is called from outside."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(4, 4)

    def penalty(self):
        return self.q_proj.weight.square().sum()


class Reader(nn.Module):
    """Reads the weight of one linear, and calls the other one after a look at its weight's dtype."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.called(F.linear(x, self.read.weight).to(self.called.weight.dtype))


class InheritsReader(Reader):
    pass


def with_queries(kind):
    model = make_model()
    for layer in model.model.layers:
        query = kind(24, 24, bias=False)
        query.load_state_dict(layer.self_attn.q_proj.state_dict())
        layer.self_attn.q_proj = query
    return model.eval()


@pytest.mark.parametrize("kind", [Scaled, Clipped, Larger, TwoOutputs, Grouped])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_that_computes_something_else_is_refused_by_name_and_class(kind, dtype):
    assert not computes_product(kind(4, 6).to(dtype))
    model = with_queries(kind).to(dtype)
    for args in (SaraArguments(), SaraArguments(target_modules=["q_proj"])):
        with pytest.raises(ValueError, match=rf"0\.self_attn\.q_proj cannot be adapted: this {kind.__name__} has"):
            SaraAdapter.attach(model, args)
    assert not hasattr(model, "sara_adapter")
    assert all(parameter.requires_grad for parameter in model.parameters())
    names = {site.module.rsplit(".", 1)[-1] for site in find_sites(model, SaraArguments(target_modules="all-linear"))}
    assert "q_proj" not in names
    assert "v_proj" in names
    assert len(find_sites(model, SaraArguments(exclude_modules=["q_proj"]))) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_linear_with_the_same_product_in_other_words_is_adapted(dtype):
    assert computes_product(Rewritten(64, 32).to(dtype))
    assert computes_product(ThreeDimensions(64, 32).to(dtype))
    model = with_queries(Rewritten)
    adapter = attach_trained(model)
    before = logits(model)
    adapter.merge()
    assert torch.allclose(logits(model), before, atol=1e-4)


def test_a_forward_on_the_module_itself_counts_too(tmp_path):
    model = make_model()
    attach_trained(make_model()).save_pretrained(tmp_path)
    query = model.model.layers[0].self_attn.q_proj
    own = query.forward
    query.forward = lambda x: own(x)
    assert len(find_sites(model, SaraArguments())) == 4
    query.forward = lambda x: 2 * own(x)
    with pytest.raises(ValueError, match=r"0\.self_attn\.q_proj cannot be adapted: this Linear has a forward"):
        SaraAdapter.attach(model, SaraArguments())
    with pytest.raises(AdapterError, match="computes something else"):
        SaraAdapter.load(model, tmp_path)


def test_a_linear_whose_parent_reads_the_weight_is_refused():
    model = make_model()
    model.mixer = nn.MultiheadAttention(24, 4)
    with pytest.raises(ValueError, match=r"mixer\.out_proj cannot be adapted: MultiheadAttention reads the weight"):
        SaraAdapter.attach(model, SaraArguments(target_modules=["out_proj"]))
    for parent in (Reader(), InheritsReader()):
        assert "reads the weight of this Linear" in why_not(parent.read, parent, "read")
        assert why_not(parent.called, parent, "called") is None
    for parent in (Finder(), Penalised()):
        assert why_not(parent.q_proj, parent, "q_proj") is None


def read_extra(model, args, out):
    out.last_hidden_state = out.last_hidden_state + F.linear(out.last_hidden_state, model.extra.weight)


def test_a_linear_that_was_never_called_keeps_what_the_model_computes_by_its_weight(tmp_path, caplog):
    model = make_model()
    model.model.extra = nn.Linear(24, 24, bias=False)
    # Nothing in the code of a class says that the weight is read here.
    model.model.register_forward_hook(read_extra)
    adapter = attach_trained(model, target_modules=["extra", "q_proj"])
    before, pristine = logits(model), model.model.extra.weight.clone()
    adapter.merge()
    assert "extra" in caplog.text
    assert torch.equal(model.model.extra.weight, pristine)
    assert torch.allclose(logits(model), before, atol=1e-4)


def test_a_linear_can_be_called_by_keyword():
    model = make_model()
    attach_trained(model)
    query, x = model.model.layers[0].self_attn.q_proj, torch.randn(2, 3, 24)
    assert torch.equal(query(input=x), query(x))
    model = make_model("gpt2")
    attach_trained(model)
    fused = model.transformer.h[0].attn.c_attn
    assert torch.equal(fused(x=x), fused(x))


def test_a_parametrized_weight_trains_and_is_not_merged(tmp_path):
    model = make_model()
    for layer in model.model.layers:
        nn.utils.parametrizations.weight_norm(layer.self_attn.q_proj)
    base = copy.deepcopy(model)
    adapter = attach_trained(model)
    adapter.save_pretrained(tmp_path)
    before = logits(model)
    SaraAdapter.load(base, tmp_path)
    assert torch.equal(logits(base), before)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: .*parametriz"):
        adapter.merge()
    assert torch.equal(logits(model), before)


def test_one_module_in_two_places_works_and_is_not_exported(tmp_path):
    model = make_model()
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    base = copy.deepcopy(model)
    adapter = attach_trained(model)
    assert len(adapter.sites) == 3
    adapter.save_pretrained(tmp_path)
    before = logits(model)
    SaraAdapter.load(base, tmp_path)
    assert torch.equal(logits(base), before)
    with pytest.raises(ValueError, match=r"0\.self_attn\.q_proj and .*1\.self_attn\.q_proj are the same"):
        export_lora(adapter, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    adapter.merge()
    assert torch.allclose(logits(model), before, atol=1e-4)


def test_packed_linears_are_named():
    class QuantLinear(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.register_buffer("qweight", linear.weight.detach().mul(99).int())

        def forward(self, x):
            return x @ (self.qweight / 99).t()

    model = make_model()
    for layer in model.model.layers:
        layer.self_attn.q_proj = QuantLinear(layer.self_attn.q_proj)
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert len(find_sites(model, SaraArguments(target_modules="all-linear", exclude_modules=["q_proj"]))) == 12
    assert len(find_sites(model, SaraArguments(target_modules="all-linear", exclude_modules=names))) == 12
    for target in (None, ["q_proj"], "all-linear"):
        with pytest.raises(ValueError, match=r"0\.self_attn\.q_proj is a QuantLinear, which stores its weight"):
            SaraAdapter.attach(model, sara_arguments(target_modules=target))
    assert len(find_sites(model, SaraArguments(target_modules=["v_proj"]))) == 2


def test_a_module_with_the_sizes_of_a_linear_is_left_out_of_all_linear(caplog):
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features, self.weight = 24, 24, nn.Parameter(torch.randn(24, 24))

        def forward(self, x):
            return x @ self.weight

    model = make_model()
    model.extra = Custom()
    assert len(find_sites(model, SaraArguments(target_modules="all-linear"))) == 14
    assert "extra is a Custom, which is no kind of linear that hf_sara knows" in caplog.text
    assert len(find_sites(model, SaraArguments())) == 4
    with pytest.raises(ValueError, match="extra is a Custom, which is no kind of linear"):
        find_sites(model, SaraArguments(target_modules=["extra"]))
