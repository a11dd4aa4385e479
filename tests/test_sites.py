import pytest
import torch
from conftest import FAMILIES, make_inputs, make_model, sara_arguments
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_sara import SaraArguments
from hf_sara.layouts import OutputSlice
from hf_sara.sites import Site, all_sites, sites_by_kind
from hf_sara.targets import find_sites

# Sites per model and their shapes: q is (24, heads x head size), v has the heads that keys and values have.
SHAPES = {
    **dict.fromkeys(FAMILIES, ((24, 24), (24, 24))),
    **dict.fromkeys(("llama", "mistral", "qwen2", "phi3", "falcon_new"), ((24, 24), (24, 12))),
    "qwen3": ((24, 32), (24, 16)),
    "gemma": ((24, 32), (24, 8)),
    "falcon_multi_query": ((24, 24), (24, 6)),
}
FUSED = ("phi3", "gpt2", "gpt_neox", "bloom", "falcon_new", "falcon_multi_query", "falcon_old")


def q_and_v(model) -> tuple[list, list]:
    sites = find_sites(model, SaraArguments())
    queries = [site for site in sites if (site.label or site.module.rsplit(".", 1)[-1])[0] == "q"]
    values = [site for site in sites if (site.label or site.module.rsplit(".", 1)[-1])[0] == "v"]
    return queries, values


def test_by_default_query_and_value_of_every_layer_are_adapted(family):
    model = make_model(family)
    queries, values = q_and_v(model)
    assert len(queries) == len(values) == (6 if family == "t5" else 2)
    assert {site.shape for site in queries} == {SHAPES[family][0]}
    assert {site.shape for site in values} == {SHAPES[family][1]}
    assert len(find_sites(model, SaraArguments())) == len(queries) + len(values)
    assert {site.layer for site in queries} == {0, 1}


def test_values_are_what_carries_anything_from_one_token_to_another(family):
    # Without values, no attention moves anything: the last token (BERT, ViT: the first one) sees only itself.
    model = make_model(family)
    one, other = make_inputs(model, seed=1), make_inputs(model, seed=2)
    if family == "vit":
        own = None
    else:
        own = 0 if "Classification" in type(model).__name__ else -1
        names = ("labels",) if family == "t5" else ("input_ids",)
        for name in names:
            # T5 shifts its labels: the second last one is the last one's input.
            position = -2 if family == "t5" else own
            other[name][:, position] = one[name][:, position]

    def seen(inputs):
        with torch.no_grad():
            logits = model(**inputs).logits
        return logits if logits.dim() == 2 else logits[:, own]

    assert not torch.allclose(seen(one), seen(other), atol=1e-3)
    for site in q_and_v(model)[1]:
        site.write(model.get_submodule(site.module), torch.zeros(site.shape))
    assert torch.allclose(seen(one), seen(other), atol=1e-5)


@pytest.mark.parametrize("family", FUSED)
def test_the_slices_of_a_fused_projection_are_those_that_the_model_takes_for_q_and_v(family):
    # In the last layer, the first token's query is nothing to the last token, its key and value are; and where all
    # queries are zero its key is nothing either. So gradients tell, column by column, which is which.
    model = make_model(family)
    q, v = (sites[-1] for sites in q_and_v(model))
    module = model.get_submodule(v.module)
    d_out = module.weight.shape[1] if family == "gpt2" else module.weight.shape[0]
    columns = {site.label: site.slice.view(torch.arange(d_out)).flatten() for site in (q, v)}

    def columns_that_matter():
        kept = []
        handle = module.register_forward_hook(lambda module, args, output: output.retain_grad() or kept.append(output))
        model(**make_inputs(model)).logits[:, -1].square().sum().backward()
        handle.remove()
        return kept[0].grad[:, 0].abs().amax(0) > 1e-9

    everything = torch.ones(d_out, dtype=torch.bool)
    everything[columns["q"]] = False
    assert torch.equal(columns_that_matter(), everything)
    q.write(module, torch.zeros(q.shape))
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    only_v = torch.zeros(d_out, dtype=torch.bool)
    only_v[columns["v"]] = True
    assert torch.equal(columns_that_matter(), only_v)


def test_read_gives_y_as_x_times_w_and_write_is_its_inverse(family):
    model = make_model(family)
    for site in find_sites(model, SaraArguments()):
        module = model.get_submodule(site.module)
        x = torch.randn(3, site.shape[0])
        columns = slice(None) if site.slice is None else site.slice.view(torch.arange(d_out_of(module))).flatten()
        bias = 0 if module.bias is None else module.bias
        expected = (module(x) - bias)[:, columns]
        assert site.weight(model).shape == site.shape
        assert not site.weight(model).requires_grad
        assert torch.allclose(x @ site.weight(model), expected, atol=1e-5)
        before, new = module.weight.detach().clone(), torch.randn(site.shape)
        old = site.read(module).clone()
        site.write(module, new)
        assert torch.equal(site.read(module), new)
        site.write(module, old)
        assert torch.equal(module.weight, before)


def d_out_of(module) -> int:
    return module.nf if hasattr(module, "nf") else module.out_features


def test_slices_of_a_fused_projection_do_not_overlap_and_leave_nothing_out():
    for family in FUSED:
        model = make_model(family)
        for module in {site.module for site in find_sites(model, SaraArguments())}:
            sites = [site for site in all_sites(model) if site.module == module]
            d_out = d_out_of(model.get_submodule(module))
            columns = torch.cat([site.slice.view(torch.arange(d_out)).flatten() for site in sites])
            assert [site.label for site in sites] == ["q", "k", "v"]
            assert sorted(columns.tolist()) == list(range(d_out))


def test_a_slice_is_a_view():
    tensor = torch.arange(24.0).view(2, 12)
    part = OutputSlice(groups=2, start=1, stop=3)
    assert part.size == 4
    assert part.view(tensor).tolist() == [[[1, 2], [7, 8]], [[13, 14], [19, 20]]]
    part.view(tensor).zero_()
    assert tensor[0].tolist() == [0, 0, 0, 3, 4, 5, 6, 0, 0, 9, 10, 11]


def test_gpt2_cross_attention_has_no_query_in_c_attn():
    config = GPT2Config(n_embd=24, n_layer=1, n_head=4, vocab_size=40, add_cross_attention=True)
    model = GPT2LMHeadModel(config)
    labels = {site.name: site.shape for site in all_sites(model) if "crossattention.c_attn" in site.name}
    assert labels == {
        "transformer.h.0.crossattention.c_attn.k": (24, 24),
        "transformer.h.0.crossattention.c_attn.v": (24, 24),
    }


@pytest.mark.parametrize(
    ("family", "targets", "names"),
    [
        ("llama", ["k_proj"], ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj"]),
        ("llama", ["self_attn.k_proj"], ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj"]),
        ("llama", ["layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        ("llama", ["model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        ("llama", [r".*\.1\..*\.(q|k)_proj"], ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]),
        ("gpt2", ["c_attn.k"], ["transformer.h.0.attn.c_attn.k", "transformer.h.1.attn.c_attn.k"]),
        ("gpt2", ["h.0.attn.c_attn"], [f"transformer.h.0.attn.c_attn.{label}" for label in "qkv"]),
        ("gpt2", [r".*\.0\..*c_attn\.[qv]"], [f"transformer.h.0.attn.c_attn.{label}" for label in "qv"]),
        # gpt2's c_proj is in the attention and in the MLP; the name of a module is no part of another's.
        ("gpt2", ["0.mlp.c_proj"], ["transformer.h.0.mlp.c_proj"]),
        ("gptj", ["lm_head"], ["lm_head"]),
    ],
)
def test_target_modules(family, targets, names):
    found = [site.name for site in find_sites(make_model(family), SaraArguments(target_modules=targets))]
    assert sorted(found) == sorted(names)


def test_a_name_is_not_the_end_of_another_name():
    with pytest.raises(ValueError, match="'proj' matches no linear module"):
        find_sites(make_model("llama"), SaraArguments(target_modules=["proj"]))


def test_an_unknown_name_is_an_error_that_lists_what_the_model_has():
    with pytest.raises(ValueError, match=r"'query' matches no.*q_proj \(24 x 24, 2 times\).*v_proj \(24 x 12, 2"):
        find_sites(make_model("llama"), SaraArguments(target_modules=["v_proj", "query"]))
    with pytest.raises(ValueError, match=r"c_attn\.q \(24 x 24, 2 times\)"):
        find_sites(make_model("gpt2"), SaraArguments(target_modules=["q_proj"]))


def test_an_invalid_regular_expression_is_an_error():
    with pytest.raises(ValueError, match=r"'\(q_proj' is not a valid regular expression"):
        find_sites(make_model("llama"), SaraArguments(target_modules=["(q_proj"]))


def test_layers_choose_among_the_targets():
    model = make_model("llama", num_hidden_layers=4)
    sites = find_sites(model, SaraArguments(layers="0,2-3"))
    assert [site.layer for site in sites] == [0, 0, 2, 2, 3, 3]
    with pytest.raises(ValueError, match=r"layers='3-5' names \[4, 5\], but .* \[0, 1, 2, 3\]"):
        find_sites(model, SaraArguments(layers="3-5"))


def test_a_model_of_another_kind_needs_target_modules():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6))
    with pytest.raises(ValueError, match=r"This Sequential has no query and value projections.*0 \(4 x 5, 1 times\)"):
        find_sites(model, SaraArguments())
    assert [site.name for site in find_sites(model, SaraArguments(target_modules=["1"]))] == ["1"]
    with pytest.raises(ValueError, match=r"no nn\.Linear or Conv1D"):
        find_sites(nn.Sequential(nn.ReLU()), SaraArguments(target_modules=["x"]))


def test_a_weight_without_values_is_an_error_that_names_the_site():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 5))
    site = find_sites(model, SaraArguments(target_modules=["0"]))[0]
    with pytest.raises(ValueError, match="0: the weight is on the meta device"):
        site.weight(model)
    model = nn.Sequential(nn.Linear(4, 5))
    model[0].weight = nn.Parameter(torch.zeros(5, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"0: the weight of this Linear is stored as torch\.uint8"):
        site.weight(model)


def test_an_attached_adapter_offers_no_sites_of_its_own(method):
    from hf_sara import SaraAdapter

    model = make_model("gpt2")
    before = all_sites(model)
    SaraAdapter.attach(model, sara_arguments(method))
    assert all_sites(model) == before


def test_kinds_of_sites_with_names_that_no_model_has():
    # An adapter's files may say any names: numbers of any length, digits that are no numbers, and many kinds.
    names = [f"l.{'9' * 5000}.q", "l.².q", "a." * 10_000 + "b", *(f"x{number}" for number in range(10_000))]
    sites = [Site(name, name, (2, 2)) for name in names]
    assert {site.layer for site in sites} == {None}
    found = sites_by_kind(sites)
    assert [site for row in found.values() for site in row] == sites
    assert found["x77"] == [sites[80]]
