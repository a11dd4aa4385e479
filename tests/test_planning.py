import pytest
import torch
from conftest import make_model, sara_arguments
from plotting import check
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, LlamaConfig

from hf_sara import SaraAdapter, SaraArguments, plan, spectrum
from hf_sara.budget import STEPS
from hf_sara.planning import AdapterSpec, count_base
from hf_sara.sites import PlannedSite
from hf_sara.spectrum import find_rank
from hf_sara.targets import find_sites


def test_a_plan_has_the_ranks_of_the_rule_and_the_counts_of_the_formula(method):
    model = make_model("llama")
    found = plan(model, sara_arguments(method, threshold=0.4))
    assert found.threshold == 0.4
    assert [site.k for site in found.sites] == [find_rank(site.weight(model), 0.4) for site in found.sites]
    cost = {"sara": lambda k, i, o: k * (i + o + 1), "mo_sara": lambda k, i, o: 3 * k + k + 3 + o}[method]
    assert found.trained_parameters == sum(cost(site.k, *site.shape) for site in found.sites)
    base = sum(parameter.numel() for parameter in model.parameters())
    assert found.base_parameters == base
    # As in the paper's tables: of base plus trained.
    assert found.share == found.trained_parameters / (base + found.trained_parameters)
    assert f"{found.trained_parameters:,} trained parameters" in str(found)


def test_a_plan_changes_nothing_and_is_what_attaching_does(method):
    model = make_model("gpt2")
    names = [name for name, _ in model.named_modules()]
    found = plan(model, sara_arguments(method))
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    adapter = SaraAdapter.attach(model, sara_arguments(method))
    assert adapter.sites == found.sites
    assert adapter.num_parameters() == found.trained_parameters
    assert str(adapter.plan()) == str(found)
    # An update is no part of the base that it is on.
    assert count_base(model) == found.base_parameters
    assert plan(model, sara_arguments(method)).share == found.share


def test_peft_makes_a_lora_of_these_ranks():
    peft = pytest.importorskip("peft")
    model = make_model()
    ranks = plan(model, sara_arguments(target_modules="all-linear", layers="1")).rank_pattern()
    assert len(set(ranks.values())) > 1
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=list(ranks), rank_pattern=ranks))
    found = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default"): len(module.weight)
        for name, module in lora.named_modules()
        if name.endswith("lora_A.default")
    }
    assert found == ranks


def test_ranks_of_parts_of_a_module_are_none_that_peft_could_take():
    found = plan(make_model("gpt2"), sara_arguments())
    with pytest.raises(
        ValueError, match=r"c_attn.* is a part of its module, and PEFT's LoRA adapts a module as a whole"
    ):
        found.rank_pattern()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("float32_from", [10**6, 2])
def test_budgets_are_met_and_the_next_step_would_exceed_them(method, family, float32_from, monkeypatch, tmp_path):
    # Also where spectra are first computed in float32: what they leave in doubt must not cost the budget.
    monkeypatch.setattr(spectrum, "FLOAT32_FROM", float32_from)
    monkeypatch.setenv("HF_SARA_CACHE", str(tmp_path))
    model = make_model(family, **({"hidden_size": 48} if family == "llama" else {"n_embd": 48}))
    base = plan(model, sara_arguments(method)).base_parameters
    whole = plan(model, sara_arguments(method, threshold=1.0)).trained_parameters
    least = plan(model, sara_arguments(method, threshold=1e-9)).trained_parameters
    budgets = [least, least + 1, *range(least + 20, whole, (whole - least) // 12), whole - 1]
    for budget in [*map(str, budgets), f"{100 * (least + whole) / 2 / base:.4f}%"]:
        allowed = int(budget) if "%" not in budget else float(budget[:-1]) / 100
        found = plan(model, sara_arguments(method, threshold=None, parameter_budget=budget))
        after = plan(model, sara_arguments(method, threshold=round(found.threshold * STEPS + 1) / STEPS))
        if "%" in budget:
            assert found.share <= allowed < after.share
        else:
            assert found.trained_parameters <= allowed < after.trained_parameters
        assert found.base_parameters == base


def test_a_budget_for_everything_takes_everything(method):
    model = make_model("llama")
    found = plan(model, sara_arguments(method, threshold=None, parameter_budget="10_000_000"))
    assert found.threshold == 1.0
    assert [site.k for site in found.sites] == [min(site.shape) for site in found.sites]


def test_an_adapter_attached_for_a_budget_keeps_to_it(method):
    adapter = SaraAdapter.attach(make_model("llama"), sara_arguments(method, threshold=None, parameter_budget="2.5%"))
    assert 0.015 < adapter.plan().share <= 0.025
    assert 0 < adapter.threshold < 1


def test_a_budget_too_small_is_an_error_that_says_what_is_needed(method):
    model = make_model("llama")
    # k = 1 at q (24 x 24) and v (24 x 12) of both layers.
    least = {"sara": 2 * (49 + 37), "mo_sara": 2 * (7 + 24 + 7 + 12)}[method]
    with pytest.raises(ValueError, match=rf"'{least - 1}' allows {least - 1} .* k = 1 at each of the 4 .* {least}\."):
        plan(model, sara_arguments(method, threshold=None, parameter_budget=least - 1))
    assert plan(model, sara_arguments(method, threshold=None, parameter_budget=least)).trained_parameters == least
    with pytest.raises(ValueError, match="fewer target_modules or layers"):
        SaraAdapter.attach(model, sara_arguments(method, threshold=None, parameter_budget="0.00001%"))
    assert not hasattr(model, "sara_adapter")


def test_a_weight_without_a_rank_is_an_error_that_names_the_site(method):
    model = make_model("llama")
    model.model.layers[1].self_attn.v_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.v_proj: .*1 values that are NaN"):
        plan(model, sara_arguments(method))
    with pytest.raises(ValueError, match=r"v_proj: .*NaN"):
        SaraAdapter.attach(model, sara_arguments(method))
    assert not hasattr(model, "sara_adapter")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_plan_of_a_folder_is_that_of_the_model_in_it(method, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    args = sara_arguments(method)
    assert plan(tmp_path, args) == plan(str(tmp_path), args) == plan(model, args)
    with pytest.raises(FileNotFoundError, match="cannot be a Hub id"):
        plan(tmp_path / "no" / "model", args)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_the_table_of_a_plan_has_a_summary_first_and_each_rank(family):
    found = plan(make_model(family), sara_arguments(target_modules=["all-linear"], threshold=0.4))
    lines = found.table().splitlines()
    assert lines[0] == str(found)
    assert max(map(len, lines[1:])) <= 119
    columns, rows = found.rank_table()
    ranks = [int(k) for row in rows for cell in row[1:] for k in cell.split()]
    assert sorted(ranks) == sorted(site.k for site in found.sites)
    # The totals of the kinds, the parts included, are the total of the plan.
    start = next(number for number, line in enumerate(lines) if line.startswith("kind"))
    totals = [int(line.split()[-1].replace(",", "")) for line in lines[start + 1 :]]
    assert sum(totals) == found.trained_parameters
    assert [line.split()[0] for line in lines[start + 1 :]] == columns[1:] + [part.name for part in found.parts]


def test_a_site_outside_of_the_layers_has_a_row_of_its_own():
    found = plan(make_model(), sara_arguments(target_modules=["q_proj", "lm_head"]))
    columns, rows = found.rank_table()
    assert columns == ["layer", "lm_head", "q_proj"]
    assert [row[0] for row in rows] == ["-", "0", "1"]
    assert rows[0][2] == ""
    assert "-" in [line.split(" ")[0] for line in found.table().splitlines()]


def test_many_modules_beside_the_sites_do_not_flood_the_summary():
    found = plan(make_model(num_hidden_layers=6), sara_arguments(modules_to_save=[".*norm"]))
    assert len(found.parts) == 13
    assert ", and 8 other modules, " in str(found)


def test_a_plan_says_what_cannot_be_merged_or_exported():
    model = make_model()
    mixed = plan(model, sara_arguments("mo_sara"))
    assert "neither merged nor exported" in str(mixed)
    assert "Only num_heads=1 can be merged or exported" in mixed.table().splitlines()[1]
    for args in (sara_arguments(), sara_arguments("mo_sara", num_heads=1)):
        assert plan(model, args).limit is None
        assert "exported" not in plan(model, args).table()


def test_the_ranks_of_a_plan_are_drawn(tmp_path):
    found = plan(make_model(num_hidden_layers=3), sara_arguments())
    figure = found.plot(tmp_path / "ranks.png")
    check(figure)
    (axes,) = figure.axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    ranks = {kind: [site.k for site in found.sites if site.name.endswith(kind)] for kind in ("q_proj", "v_proj")}
    assert drawn == {kind: ([0, 1, 2], k) for kind, k in ranks.items()}
    check(plan(make_model("t5"), sara_arguments(target_modules=["all-linear"])).plot())
    many = [
        PlannedSite(f"h.{kind // 40}.m{kind % 40}", f"h.{kind // 40}.m{kind % 40}", (2, 2), k=1) for kind in range(80)
    ]
    check(AdapterSpec(sara_arguments(), 0.5, many, []).plot())
    found.plot(tmp_path / "ranks.svg")
    assert {path.name for path in tmp_path.iterdir()} == {"ranks.png", "ranks.svg"}


def test_shared_parameters_are_counted_once():
    model = make_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert plan(model, SaraArguments()).base_parameters == model.num_parameters()


# ---- the paper's models ----

LLAMA_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
LLAMA_13B = LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
GPT_J_6B = GPTJConfig()
GPT2_MEDIUM = GPT2Config(n_embd=1024, n_layer=24, n_head=16)


def attach_at_rank(config, k, **arguments):
    """A paper's model without values, and an adapter of rank k at all its sites."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        args = SaraArguments(**arguments)
        sites = [PlannedSite.of(site, k) for site in find_sites(model, args)]
        return SaraAdapter(model, AdapterSpec(args, 0.5, sites, []))


@pytest.mark.parametrize(
    ("config", "base", "sites", "d"),
    [
        pytest.param(LLAMA_7B, 6_738_415_616, 64, 4096, marks=pytest.mark.slow),
        pytest.param(LLAMA_13B, 13_015_864_320, 80, 5120, marks=pytest.mark.slow),
        pytest.param(GPT_J_6B, 6_050_882_784, 56, 4096, marks=pytest.mark.slow),
        (GPT2_MEDIUM, 354_823_168, 48, 1024),
    ],
    ids=["llama-7b", "llama-13b", "gpt-j-6b", "gpt2-medium"],
)
def test_the_papers_models_have_the_counts_of_its_formulas(config, base, sites, d):
    for arguments, k, trained in [
        ({"method": "sara"}, 8, sites * 8 * (d + d + 1)),
        ({"method": "mo_sara", "num_heads": 5}, 300, sites * (5 * 300 + 300 + 5 + d)),
        ({"method": "mo_sara", "num_heads": 1}, 300, sites * (300 + d)),
        ({"method": "mo_sara", "num_heads": 10, "v_position": "none"}, 300, sites * (10 * 300 + 300 + 10)),
    ]:
        adapter = attach_at_rank(config, k, **arguments)
        parameters = [p for p in adapter.model.parameters() if p.requires_grad]
        assert sum(map(torch.numel, parameters)) == adapter.num_parameters() == trained
        assert adapter.plan().base_parameters == base
        assert adapter.plan().share == trained / (base + trained)


def test_the_papers_shares_of_mo_sara():
    # It prints no ranks. Of 4096 and of 1024, these are what half of the sum of singular values can well take.
    llama = attach_at_rank(LLAMA_7B, 808, method="mo_sara", num_heads=5)
    assert f"{100 * llama.plan().share:.2g}" == "0.0085"
    gpt2 = attach_at_rank(GPT2_MEDIUM, 233, method="mo_sara", num_heads=3)
    assert f"{gpt2.num_parameters() / 1e6:.3f}" == "0.094"
