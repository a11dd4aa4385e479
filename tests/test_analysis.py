import json
import sys

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, attach_trained, base_state, logits, make_inputs, make_model, same_bits, sara_arguments
from plotting import check, numbers

import hf_sara
from hf_sara import (
    analysis,
    plan,
    plot_correlation,
    plot_rank_curves,
    plot_routing,
    rank_correlation,
    rank_curves,
    routing,
    spectrum,
)
from hf_sara.analysis import RankCurves, Routing
from hf_sara.sites import all_sites, sites_by_kind

THRESHOLDS = [0.1, 0.35, 0.9]
KINDS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn.q", "c_attn.v"], "bert": ["query", "value"]}


def three_heads(family="llama", **changes):
    """A model with a trained Mo-SARA whose router has a clear opinion."""
    model = make_model(family, **changes)
    adapter = attach_trained(model, "mo_sara")
    torch.manual_seed(7)
    for _, delta in adapter.deltas():
        torch.nn.init.normal_(delta.gate_up.data, std=3.0)
    return model


def padded(model, lengths=(6, 3), seed=1):
    inputs = make_inputs(model, batch=len(lengths), length=max(lengths), seed=seed)
    for row, length in enumerate(lengths):
        inputs["attention_mask"][row, length:] = 0
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


# ---- ranks ----


@pytest.mark.parametrize("family", list(KINDS))
def test_curves_are_the_ranks_of_plans(family):
    model = make_model(family, **({"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3}))
    curves = rank_curves(model, THRESHOLDS)
    assert list(curves.ranks) == list(curves.layers) == KINDS[family]
    assert curves.thresholds == THRESHOLDS
    for kind, k in curves.ranks.items():
        assert curves.layers[kind] == [0, 1, 2]
        assert k.shape == (3, 3)
        assert k.dtype.kind == "i"
        # More of the sum takes more singular values.
        assert (np.diff(k, axis=0) > 0).all()
    for row, threshold in enumerate(THRESHOLDS):
        for site in plan(model, sara_arguments(threshold=threshold)).sites:
            kind = next(kind for kind in curves.ranks if site.name.endswith(kind))
            assert curves.ranks[kind][row, site.layer] == site.k


@pytest.mark.parametrize("family", list(KINDS))
def test_curves_from_the_files_are_those_of_the_loaded_model(family, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    expected = rank_curves(model, THRESHOLDS).to_dict()
    for source in (tmp_path, str(tmp_path)):
        assert rank_curves(source, THRESHOLDS).to_dict() == expected
    # An adapter on the model changes nothing.
    attach_trained(model)
    assert rank_curves(model, THRESHOLDS).to_dict() == expected


def test_a_matrix_is_factorised_once_for_all_thresholds(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SARA_CACHE", str(tmp_path))
    factorised = []
    compute = spectrum._gram_spectrum
    monkeypatch.setattr(spectrum, "_gram_spectrum", lambda *args: factorised.append(args) or compute(*args))
    model = make_model()
    rank_curves(model, [i / 10 for i in range(1, 10)])
    assert len(factorised) == 4
    rank_curves(model, [0.25, 0.75])
    assert len(factorised) == 4


def test_curves_go_through_json():
    curves = rank_curves(make_model(), THRESHOLDS)
    content = json.loads(json.dumps(curves.to_dict()))
    again = RankCurves(**content)
    assert again.to_dict() == content
    assert (again.ranks["q_proj"] == curves.ranks["q_proj"]).all()


def test_arguments_choose_sites_and_layers():
    model = make_model(num_hidden_layers=4)
    curves = rank_curves(model, [0.5], sara_arguments(layers="1,3", target_modules=["k_proj"]))
    assert curves.layers == {"k_proj": [1, 3]}
    everything = rank_curves(model, [0.5], sara_arguments(target_modules=["k_proj"]))
    assert (curves.ranks["k_proj"] == everything.ranks["k_proj"][:, [1, 3]]).all()


def test_kinds_are_told_apart_by_as_much_of_the_name_as_it_takes():
    model = make_model("t5", num_decoder_layers=3)
    curves = rank_curves(model, [0.5])
    assert curves.layers == {
        "encoder.block.*.layer.0.SelfAttention.q": [0, 1],
        "encoder.block.*.layer.0.SelfAttention.v": [0, 1],
        "decoder.block.*.layer.0.SelfAttention.q": [0, 1, 2],
        "decoder.block.*.layer.0.SelfAttention.v": [0, 1, 2],
        "EncDecAttention.q": [0, 1, 2],
        "EncDecAttention.v": [0, 1, 2],
    }
    assert set(curves.mean_ranks(0.5)) == {0, 1, 2}


def test_sites_outside_of_the_layers_are_kinds_but_have_no_curve(family):
    sites = all_sites(make_model(family))
    kinds = sites_by_kind(sites)
    assert sorted(site.name for row in kinds.values() for site in row) == sorted(site.name for site in sites)
    for row in kinds.values():
        assert len({site.layer for site in row}) == len(row)
    with pytest.raises(ValueError, match="lm_head is in no numbered layer"):
        rank_curves(make_model(), [0.5], sara_arguments(target_modules=["q_proj", "lm_head"]))


def test_curves_of_a_plan_or_a_budget_have_its_ranks(tmp_path):
    model = make_model(num_hidden_layers=3)
    model.save_pretrained(tmp_path)
    args = sara_arguments(threshold=None, parameter_budget="900")
    planned = plan(model, args)
    expected = rank_curves(model, [planned.threshold]).to_dict()
    assert planned.threshold not in (0.01, 1.0)
    for found in (rank_curves(planned), rank_curves(model, args=args), rank_curves(tmp_path, args=args)):
        assert found.to_dict() == expected
    assert rank_curves(model, args=sara_arguments(threshold=0.4)).thresholds == [0.4]


def test_no_threshold_plan_or_budget_is_ignored():
    model, args = make_model(), sara_arguments(threshold=None, parameter_budget="900")
    with pytest.raises(ValueError, match="parameter_budget='900' exclude each other"):
        rank_curves(model, [0.5], args)
    for others in ({"thresholds": [0.5]}, {"args": args}):
        with pytest.raises(ValueError, match="Give the model in place of the plan"):
            rank_curves(plan(model, args), **others)
    with pytest.raises(ValueError, match="thresholds is empty"):
        rank_curves(model)


@pytest.mark.parametrize("thresholds", [[], [0.5, 0.0], [1.5]])
def test_thresholds_that_make_no_sense_are_an_error(thresholds):
    with pytest.raises(ValueError, match="threshold"):
        rank_curves(make_model(), thresholds)


def test_a_model_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        rank_curves(tmp_path / "no" / "model", [0.5])


# ---- routing ----


@torch.no_grad()
def direct(model, batch):
    """The mean gates by their formula, from the hidden states that the model itself gives out."""
    hidden = model(**batch, output_hidden_states=True).hidden_states
    mask = batch["attention_mask"].bool()
    expected = {}
    for site, delta in model.sara_adapter.deltas():
        if model.config.model_type == "gpt2":
            x = model.transformer.h[site.layer].ln_1(hidden[site.layer])
        else:
            x = model.model.layers[site.layer].input_layernorm(hidden[site.layer])
        gates = ((x @ delta.U) @ delta.gate_down @ delta.gate_up).softmax(-1)
        expected.setdefault(site.name.rsplit(".", 1)[-1], []).append(gates[mask].mean(0))
    return [torch.stack(rows).double().numpy() for rows in expected.values()]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_routing_is_the_mean_of_the_gates(family):
    model = three_heads(family)
    batch = padded(model)
    found = routing(model, batch)
    assert list(found.gates) == KINDS[family]
    for (kind, gates), expected in zip(found.gates.items(), direct(model, batch), strict=True):
        assert found.layers[kind] == [0, 1]
        assert gates.shape == (2, 3)
        np.testing.assert_allclose(gates, expected, atol=1e-6)
        np.testing.assert_allclose(gates.sum(1), 1.0, atol=1e-6)
        # Rows that were swapped or averaged away would show.
        assert np.ptp(gates, axis=0).max() > 0.01
        assert np.ptp(gates, axis=1).max() > 0.1


def test_padding_does_not_count():
    model = three_heads()
    batch = padded(model, lengths=(6, 3))
    found = routing(model, batch).to_dict()
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][1, 3:] = (other["input_ids"][1, 3:] + 5) % VOCABULARY
    assert routing(model, other).to_dict() == found
    # Each token counts once, whatever the lengths.
    alone = [routing(model, {"input_ids": batch["input_ids"][row : row + 1, :n]}) for row, n in ((0, 6), (1, 3))]
    for kind, gates in found["gates"].items():
        expected = (6 * alone[0].gates[kind] + 3 * alone[1].gates[kind]) / 9
        np.testing.assert_allclose(gates, expected, atol=1e-6)
    unmasked = routing(model, {"input_ids": batch["input_ids"]})
    assert np.abs(unmasked.gates["q_proj"] - found["gates"]["q_proj"]).max() > 1e-3


@pytest.mark.parametrize("family", ["bert", "vit", "gpt_neox"])
def test_routing_of_other_families(family):
    model = three_heads(family)
    gates = routing(model, make_inputs(model)).gates
    assert [rows.shape for rows in gates.values()] == [(2, 3), (2, 3)]


def state_of(model):
    modes = [module.training for module in model.modules()]
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    gradients = [parameter.grad is not None for parameter in model.parameters()]
    return modes, hooks, trained, gradients


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = three_heads(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    model.zero_grad()
    state, base, batch = state_of(model), base_state(model), padded(model)
    if fails:
        batch["input_ids"][0, 0] = VOCABULARY + 5
        with pytest.raises(IndexError):
            routing(model, batch)
    else:
        # Without dropout, so twice the same.
        assert routing(model, batch).to_dict() == routing(model, batch).to_dict()
    assert state_of(model) == state
    assert same_bits(base_state(model), base)
    assert torch.is_grad_enabled()


def test_a_mask_that_marks_no_padding_is_an_error():
    model = three_heads()
    state, ids = state_of(model), make_inputs(model)["input_ids"]
    # From each position to each: Llama takes it, but it does not say which tokens are padding.
    batch = {"input_ids": ids, "attention_mask": torch.zeros(2, 1, 6, 6)}
    with pytest.raises(ValueError, match=r"\(2, 1, 6, 6\) does not fit the 12 positions that model\.layers\.0"):
        routing(model, batch)
    assert state_of(model) == state


def test_a_batch_of_padding_has_no_mean():
    model = three_heads()
    batch = padded(model)
    batch["attention_mask"][:] = 0
    with pytest.raises(ValueError, match="saw no token"):
        routing(model, batch)


def test_routing_of_one_adapter_of_several():
    model = make_model()
    attach_trained(model, "sara", name="plain")
    attach_trained(model, "mo_sara", name="mixed", num_heads=4)
    gates = routing(model, padded(model), adapter_name="mixed").gates
    assert gates["v_proj"].shape == (2, 4)
    with pytest.raises(ValueError, match="'plain' is SARA"):
        routing(model, padded(model))
    with pytest.raises(ValueError, match="no adapter 'other'"):
        routing(model, padded(model), adapter_name="other")


def test_what_has_no_router_is_an_error():
    model = make_model()
    with pytest.raises(ValueError, match="carries no adapter"):
        routing(model, padded(model))
    attach_trained(model, "mo_sara", num_heads=1)
    with pytest.raises(ValueError, match="one head"):
        routing(model, padded(model))
    seq2seq = three_heads("t5")
    with pytest.raises(ValueError, match="encoder-decoder"):
        routing(seq2seq, make_inputs(seq2seq))


def test_routing_goes_through_json_and_changes_no_output():
    model = three_heads()
    batch = padded(model)
    before = logits(model, **batch)
    found = routing(model, batch)
    content = json.loads(json.dumps(found.to_dict()))
    assert Routing(**content).to_dict() == content
    assert torch.equal(logits(model, **batch), before)


# ---- correlation ----

SCORES = {"0-1": 40.0, "2-3": 45.0, "4-5": 41.0, "6-7": 47.0}


def test_correlation_of_groups_of_layers_with_their_scores():
    ranks = dict(enumerate([1, 3, 4, 6, 4, 4, 9, 11]))
    found = rank_correlation(ranks, SCORES)
    assert found.groups == list(SCORES)
    assert found.ranks == [2.0, 5.0, 4.0, 10.0]
    x, y = np.array(found.ranks), np.array(found.scores)
    assert found.pearson == pytest.approx(np.corrcoef(x, y)[0, 1])
    # Of order 1, 3, 2, 4 in ranks and 1, 3, 2, 4 in scores.
    assert found.spearman == pytest.approx(1.0)
    assert found.pearson < 0.95
    falling = rank_correlation(ranks, {group: -score for group, score in SCORES.items()})
    assert falling.pearson == pytest.approx(-found.pearson)
    assert json.loads(json.dumps(found.to_dict()))["groups"] == list(SCORES)


def test_curves_correlate_by_the_mean_of_a_layers_sites():
    curves = RankCurves(
        [0.1, 0.5], {"q": [0, 1, 2], "v": [0, 1]}, {"q": [[1, 2, 3], [4, 6, 5]], "v": [[1, 1], [2, 2]]}
    )
    assert rank_correlation(curves, {0: 1.0, 1: 2.0, 2: 3.0}, threshold=0.5).ranks == [3.0, 4.0, 5.0]
    one = RankCurves([0.5], {"q": [0, 1, 2]}, {"q": [[4, 6, 5]]})
    assert rank_correlation(one, {0: 1.0, 1: 3.0, 2: 2.0}).pearson == pytest.approx(1.0)
    with pytest.raises(ValueError, match="Choose one"):
        rank_correlation(curves, {0: 1.0, 1: 2.0, 2: 3.0})
    with pytest.raises(ValueError, match=r"threshold=0\.2 is none of"):
        rank_correlation(curves, {0: 1.0, 1: 2.0, 2: 3.0}, threshold=0.2)


def test_ranks_that_are_all_the_same_correlate_with_nothing():
    found = rank_correlation(dict.fromkeys(range(8), 1), SCORES)
    assert found.pearson is None
    assert found.spearman is None
    with pytest.raises(ValueError, match=r"'6-7', but there is no rank for the layers \[7\]"):
        rank_correlation(dict.fromkeys(range(7), 1), SCORES)
    with pytest.raises(ValueError, match="fewer than three"):
        rank_correlation({0: 1, 1: 2}, {0: 1.0, 1: 2.0})


# ---- figures ----


def lines_of(axes):
    return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.get_lines()]


def test_figure_of_rank_curves(image):
    # Not in order, and down to k = 1.
    curves = rank_curves(make_model(num_hidden_layers=5), [0.9, 0.01, 0.5])
    figure = plot_rank_curves(curves, image, title="A tiny Llama")
    check(figure)
    assert [axes.get_title() for axes in figure.axes] == ["q_proj", "v_proj"]
    for kind, axes in zip(curves.ranks, figure.axes, strict=True):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "rank k")
        assert lines_of(axes) == [([0, 1, 2, 3, 4], curves.ranks[kind][row].tolist()) for row in (1, 2, 0)]
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > curves.ranks[kind].max()
        assert numbers(axes.yaxis)
        assert all(int(number) >= 1 for number in numbers(axes.yaxis))
        assert numbers(axes.xaxis) == ["0", "1", "2", "3", "4"]
    (legend,) = figure.legends
    assert legend.get_title().get_text() == "threshold"
    assert [text.get_text() for text in legend.get_texts()] == ["0.9", "0.5", "0.01"]
    assert len({tuple(line.get_color()) for line in axes.get_lines()}) == 3
    assert figure.get_suptitle() == "A tiny Llama"


def test_figure_of_many_kinds(image):
    curves = RankCurves([0.5], {kind: [0, 1] for kind in "abcde"}, {kind: [[1, 1]] for kind in "abcde"})
    figure = plot_rank_curves(curves, image)
    check(figure)
    assert [axes.get_title() for axes in figure.axes] == list("abcde")
    assert numbers(figure.axes[0].yaxis) == ["1"]


def test_figure_of_routing(image):
    gates = np.random.default_rng(0).dirichlet([1.0] * 5, size=(2, 40))
    gates[1] = 0.2
    layers = list(range(40))
    figure = plot_routing(
        Routing({"q_proj": layers, "v_proj": layers}, {"q_proj": gates[0], "v_proj": gates[1]}), image
    )
    check(figure)
    *panels, bar = figure.axes
    assert [axes.get_title() for axes in panels] == ["q_proj", "v_proj"]
    assert bar.get_ylabel() == "gate, mean over tokens"
    for axes, expected in zip(panels, gates, strict=True):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")
        (heat,) = axes.get_images()
        assert (heat.get_array() == expected).all()
        assert heat.get_clim() == (0.0, gates.max())
        assert numbers(axes.xaxis) == ["0", "1", "2", "3", "4"]
        # The first layer on top.
        assert numbers(axes.yaxis)[:2] == ["0", "3"]
        assert axes.get_ylim() == (39.5, -0.5)


def test_routing_rows_have_the_numbers_of_their_layers(image):
    gates = np.full((3, 2), 0.5)
    figure = plot_routing(Routing({"q_proj": [1, 5, 12]}, {"q_proj": gates}), image, highest=0.8)
    check(figure)
    # On the colour scale that it shares with other figures.
    assert figure.axes[0].get_images()[0].get_clim() == (0.0, 0.8)
    assert numbers(figure.axes[0].yaxis) == ["1", "5", "12"]


@pytest.mark.parametrize(("ranks", "r"), [(range(8), "r = 0.66"), ([1] * 8, "r = undefined")])
def test_figure_of_a_correlation(image, ranks, r):
    figure = plot_correlation(rank_correlation(dict(enumerate(ranks)), SCORES), "accuracy (%)", image)
    check(figure)
    (axes,) = figure.axes
    assert r in axes.get_title()
    assert "n = 4" in axes.get_title()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("mean rank k", "accuracy (%)")
    assert {text.get_text(): text.xy[1] for text in axes.texts} == SCORES
    assert lines_of(axes)[0][1] == list(SCORES.values())


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_sara\[plot\]'"):
        plot_rank_curves(RankCurves([0.5], {"a": [0]}, {"a": [[1]]}), tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


def test_public_names():
    names = {"plot_correlation", "plot_rank_curves", "plot_routing", "rank_correlation", "rank_curves", "routing"}
    assert names <= set(hf_sara.__all__)
    assert all(getattr(hf_sara, name) is getattr(analysis, name) for name in names)
