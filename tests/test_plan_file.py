"""Plans as files: what is read from one is what was found, and it serves its own base only."""

import contextlib
import json

import pytest
import torch
from conftest import attach_trained, make_model, same_bits, sara_arguments
from training import dataset, make_trainer, training_arguments
from typer.testing import CliRunner

from hf_sara import SaraAdapter, SaraArguments, SaraTrainer, load_plan, plan, save_plan
from hf_sara.cli import app


@contextlib.contextmanager
def no_ranks():
    """Nothing computes a rank or a spectrum in this block."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("planning.find_rank", "budget.find_spectrum", "methods.base.find_rank"):
            patch.setattr(f"hf_sara.{name}", None)
        yield


def saved_plan(folder, family="llama", **arguments):
    found = plan(make_model(family), SaraArguments(**arguments))
    save_plan(found, folder / "plan.json")
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        {"threshold": 0.3},
        {"method": "mo_sara", "num_heads": 3, "layers": "0"},
        {"parameter_budget": 2000, "target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"threshold": 0.3, "modules_to_save": ["norm"], "trainable_token_indices": [3, 5]},
    ],
    ids=str,
)
def test_what_is_read_is_what_was_found(arguments, tmp_path):
    found = saved_plan(tmp_path, **arguments)
    read = load_plan(tmp_path / "plan.json")
    assert read == found
    assert read.digests == found.digests
    assert str(read) == str(found)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_an_adapter_of_a_plan_is_the_one_without(family, method, tmp_path):
    args = sara_arguments(method)
    save_plan(plan(make_model(family), args), tmp_path / "plan.json")
    bases = make_model(family), make_model(family)
    torch.manual_seed(7)
    whole = SaraAdapter.attach(bases[0], args)
    torch.manual_seed(7)
    with no_ranks():
        adapter = SaraAdapter.attach(bases[1], plan=tmp_path / "plan.json")
    assert adapter.args == args
    assert same_bits(adapter.state_dict(), whole.state_dict())
    assert same_bits(adapter.frozen_factors(), whole.frozen_factors())
    assert adapter.seeds.keys() == whole.seeds.keys()


def test_arguments_that_leave_the_ranks_alone_may_be_others(tmp_path):
    saved_plan(tmp_path, threshold=0.5)
    adapter = SaraAdapter.attach(
        make_model(), SaraArguments(method="mo_sara", num_heads=3, dropout=0.3), plan=tmp_path / "plan.json"
    )
    assert adapter.args.dropout == 0.3
    assert [site.k for site in adapter.sites] == [site.k for site in load_plan(tmp_path / "plan.json").sites]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"threshold": 0.4}, r"threshold=0\.4 \(the plan has 0\.3\)"),
        ({}, r"threshold=0\.01 \(the plan has 0\.3\)"),
        ({"threshold": 0.3, "layers": "0"}, r"layers='0' \(the plan has None\)"),
        ({"parameter_budget": 3000}, r"parameter_budget='3000' \(the plan has None\)"),
    ],
    ids=str,
)
def test_arguments_that_ask_for_other_ranks_are_refused(arguments, said, tmp_path):
    saved_plan(tmp_path, threshold=0.3)
    model = make_model()
    with pytest.raises(ValueError, match=said):
        SaraAdapter.attach(model, SaraArguments(**arguments), plan=tmp_path / "plan.json")
    assert not hasattr(model, "sara_adapter")


def test_a_budget_is_solved_once(tmp_path):
    found = saved_plan(tmp_path, parameter_budget=2000)
    with no_ranks():
        adapter = SaraAdapter.attach(make_model(), SaraArguments(parameter_budget=2000), plan=tmp_path / "plan.json")
    assert adapter.threshold == found.threshold
    assert adapter.plan().trained_parameters <= 2000


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: make_model(seed=1), r"q_proj: this model's weight is not the one that the plan was made of"),
        (lambda: make_model("qwen2"), r"this model's weight is not the one"),
        (lambda: make_model(num_hidden_layers=3), r"The plan is not one of this LlamaForCausalLM.* 2 differ"),
        (lambda: make_model("gpt2"), r"The plan is not one of this GPT2LMHeadModel"),
    ],
    ids=["other weights", "other family", "more layers", "other names"],
)
def test_another_base_is_refused(model, said, tmp_path):
    saved_plan(tmp_path, threshold=0.3)
    model = model()
    with pytest.raises(ValueError, match=said):
        SaraAdapter.attach(model, plan=tmp_path / "plan.json")
    assert not hasattr(model, "sara_adapter")


def test_a_budget_that_limits_nothing_is_said(caplog):
    found = plan(make_model(), SaraArguments(method="mo_sara", parameter_budget="50%"))
    assert found.threshold == 1.0
    assert "parameter_budget=50% limits nothing" in caplog.text
    assert str(found).endswith("the budget of 50% limits nothing, all ranks are full")
    caplog.clear()
    assert "limits nothing" not in str(plan(make_model(), SaraArguments(parameter_budget=2000))) + caplog.text


def test_an_exact_upcast_is_the_same_base_and_a_rounded_copy_is_not(tmp_path):
    save_plan(plan(make_model(dtype=torch.bfloat16), SaraArguments(threshold=0.3)), tmp_path / "plan.json")
    SaraAdapter.attach(make_model(dtype=torch.bfloat16).float(), plan=tmp_path / "plan.json")
    saved_plan(tmp_path, threshold=0.3)
    with pytest.raises(ValueError, match="not the one that the plan was made of"):
        SaraAdapter.attach(make_model(dtype=torch.bfloat16), plan=tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c: c.update(plan_version=2), "its version is 2"),
        (lambda c: c.pop("threshold"), "'threshold' is missing"),
        (lambda c: c.update(more=1), "unknown"),
        (lambda c: c["sites"][0].update(k=0), "k=0"),
        (lambda c: c["sites"][0].update(sha256="x"), "sha256"),
        (lambda c: c["sites"].clear(), "no sites"),
        (lambda c: c["arguments"].update(threshold=7.0), "threshold"),
    ],
    ids=["version", "no threshold", "unknown", "k", "digest", "no sites", "arguments"],
)
def test_a_damaged_file_is_refused_by_name(damage, said, tmp_path):
    saved_plan(tmp_path, threshold=0.3)
    path = tmp_path / "plan.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    damage(config)
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"plan\.json is not the file of a plan: .*{said}"):
        load_plan(path)


def test_a_plan_of_an_adapter_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match=r"Make it with hf_sara\.plan"):
        save_plan(attach_trained(make_model()).plan(), tmp_path / "plan.json")


def test_a_trainer_takes_a_plan(tmp_path):
    whole = make_trainer(tmp_path / "whole")
    save_plan(plan(make_model(), sara_arguments(dropout=0.1)), tmp_path / "plan.json")
    whole.train()
    with no_ranks():
        trainer = SaraTrainer(
            model=make_model(),
            args=training_arguments(tmp_path / "run"),
            train_dataset=dataset(),
            eval_dataset=dataset(8, seed=1),
            plan=tmp_path / "plan.json",
        )
        trainer.train()
    assert same_bits(trainer.sara_adapter.state_dict(), whole.sara_adapter.state_dict())
    with pytest.raises(ValueError, match=r"already carries the adapter .* Leave the plan out"):
        SaraTrainer(
            model=trainer.model, args=training_arguments(tmp_path / "run"), plan=load_plan(tmp_path / "plan.json")
        )


def test_the_command_line_writes_one_from_the_files_of_a_model(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    arguments = ["plan", str(tmp_path / "base"), "--threshold", "0.3", "--save", str(tmp_path / "plan.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert f"Wrote {tmp_path / 'plan.json'}" in result.stderr
    assert load_plan(tmp_path / "plan.json") == plan(make_model(), SaraArguments(threshold=0.3))
    assert SaraAdapter.attach(make_model(), plan=tmp_path / "plan.json").args.threshold == 0.3
