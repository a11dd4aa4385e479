"""The reference models of TRL's trainers: the base for a new adapter, and a trained adapter as it came."""

import copy
import json
import math
import pickle
import warnings

import pytest
import torch
import with_trl
from conftest import attach_trained, base_state, make_base, make_inputs, make_model, same_bits, sara_arguments
from datasets import Dataset
from training import TWO_PROCESSES, run_script
from transformers import AutoModelForCausalLM
from with_trl import DATA, WORDS, trl_settings

from hf_sara import SaraAdapter, SaraTrainerMixin, from_hub
from hf_sara.trainer.reference import make_reference

# What an adapter can train beside its updates, and how many tensors of the base a reference cannot share for it.
BESIDE = {"updates only": {}, "rows": {"trainable_token_indices": [14, 26]}, "norm": {"modules_to_save": ["norm"]}}


def settings(folder, **changes):
    return trl_settings(folder, **{"max_steps": 3, "logging_steps": 1, "save_strategy": "no", **changes})


def make_trainer(kind, config, folder, tokenizer, model, data="preference", sara_args=None, changes=None, **more):
    class Trained(SaraTrainerMixin, kind):
        pass

    return Trained(
        model=model,
        args=config(**settings(folder, **(changes or {}))),
        sara_args=sara_args,
        train_dataset=data if isinstance(data, Dataset) else Dataset.from_dict(DATA[data]),
        processing_class=tokenizer,
        **more,
    )


@pytest.fixture
def dpo(trl, tmp_path, tokenizer):
    """A function that makes a trainer for DPO."""

    def make(model, sara_args=None, more=None, **changes):
        return make_trainer(
            trl.DPOTrainer,
            trl.DPOConfig,
            tmp_path / "dpo",
            tokenizer,
            model,
            "preference",
            sara_args,
            changes,
            **(more or {}),
        )

    return make


@torch.no_grad()
def scores(model) -> torch.Tensor:
    """The model's logits for a few tokens, two of which have trained rows in some tests."""
    return model.eval()(input_ids=torch.tensor([[5, 14, 17, 26, 40, 9]])).logits


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


LN2 = pytest.approx(math.log(2), abs=1e-5)


# ---- DPO ----


@pytest.mark.one_in(2)
@pytest.mark.parametrize("beside", list(BESIDE))
def test_a_trained_adapter_is_its_own_reference(dpo, method, beside, base_folder):
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    adapter = attach_trained(model, method, **BESIDE[beside])
    start, base = scores(model), base_state(model)
    trainer = dpo(model)
    reference = trainer.ref_model
    assert torch.equal(scores(reference), start)
    assert not torch.equal(scores(make_base()), start)
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    trainer.train()
    assert losses(trainer)[0] == LN2
    assert losses(trainer)[-1] < losses(trainer)[0] - 1e-3
    # The policy has trained, the reference has not, and both still have one base.
    assert not torch.equal(scores(model), start)
    assert torch.equal(scores(reference), start)
    assert same_bits(dict(reference.state_dict()), before)
    assert same_bits(base_state(model), base)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in reference.parameters())
    trained = {id(tensor) for tensor in adapter.trained().values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    theirs = {name: parameter.data_ptr() for name, parameter in reference.named_parameters()}
    own = {name for name, p in model.named_parameters() if p.data_ptr() != theirs[name]}
    assert {id(model.get_parameter(name)) for name in own} >= trained
    assert own - {n for n, p in model.named_parameters() if id(p) in trained} == (
        {"model.embed_tokens.weight", "lm_head.weight"} if beside == "rows" else set()
    )


def test_a_new_adapter_has_the_base_as_its_reference(dpo, method, base_folder):
    trainer = dpo(AutoModelForCausalLM.from_pretrained(base_folder), sara_arguments(method), learning_rate=0.0)
    assert torch.equal(scores(trainer.ref_model), scores(make_base()))
    assert SaraAdapter.of(trainer.ref_model) is None
    trainer.train()
    # Mo-SARA starts at its base, and SARA does not.
    assert (losses(trainer)[0] == LN2) == (method == "mo_sara")


def test_a_new_adapter_that_was_attached_by_hand_has_the_base_as_its_reference(dpo, method):
    model = make_base()
    SaraAdapter.attach(model, sara_arguments(method, modules_to_save=["norm"]))
    base = scores(make_base())
    for policy in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(scores(dpo(policy).ref_model), base)
        assert [name for name, p in policy.named_parameters() if p.requires_grad]


def test_a_copied_adapter_that_was_trained_is_its_own_reference(dpo, method):
    model = make_base()
    adapter = attach_trained(model, method)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert not adapter.is_untrained()
    for policy in copies:
        assert not policy.sara_adapter.is_untrained()
        assert torch.equal(scores(dpo(policy).ref_model), scores(model))


def test_a_saved_adapter_is_the_reference_of_the_run_that_goes_on_with_it(dpo, method, base_folder, tmp_path):
    adapter = attach_trained(make_base(), method)
    adapter.save_pretrained(tmp_path)
    trainer = dpo(from_hub(tmp_path, base_model=base_folder), learning_rate=0.0)
    trainer.train()
    assert losses(trainer) == [LN2] * 3
    assert torch.equal(scores(trainer.ref_model), scores(adapter.model))


def test_writing_through_data_counts_as_training(method):
    adapter = SaraAdapter.attach(make_model(), sara_arguments(method))
    assert adapter.is_untrained()
    tensor = next(iter(adapter.trained().values()))
    tensor.data[0] += 1
    assert not adapter.is_untrained()


def test_precomputed_and_evaluated_references_are_the_trained_adapter(dpo, method):
    model = make_base()
    attach_trained(model, method)
    data = {"eval_dataset": Dataset.from_dict(DATA["preference"]).select(range(8))}
    trainer = dpo(model, more=data, precompute_ref_log_probs=True, learning_rate=0.0)
    assert trainer.evaluate()["eval_loss"] == LN2
    trainer.train()
    assert losses(trainer) == [LN2] * 3
    trainer = dpo(model, more=data, learning_rate=0.0)
    assert trainer.evaluate()["eval_loss"] == LN2


def test_a_second_training_has_the_first_ones_result_as_its_reference(dpo, method):
    model = make_base()
    first = dpo(model, sara_arguments(method))
    first.train()
    middle = scores(model)
    assert torch.equal(scores(first.ref_model), scores(make_base()))
    second = dpo(model)
    assert torch.equal(scores(second.ref_model), middle)
    second.train()
    assert losses(second)[0] == LN2
    # TRL replaces the model's forward, and the replacement must not lead from the reference to the policy.
    assert torch.equal(scores(second.ref_model), middle)
    assert not torch.equal(scores(model), middle)


def test_activation_checkpointing_leaves_the_reference_alone(dpo, method):
    model = make_base()
    attach_trained(model, method)
    start = scores(model)
    trainer = dpo(model, gradient_checkpointing=True)
    trainer.train()
    assert losses(trainer)[0] == LN2
    assert torch.equal(scores(trainer.ref_model), start)


def test_only_the_adapter_that_trains_differs_from_the_reference(dpo):
    model = make_base()
    attach_trained(model, name="style")
    with_style = scores(model)
    trainer = dpo(model, sara_arguments("mo_sara"), more={"adapter_name": "taste"})
    assert list(trainer.ref_model.sara_adapters) == ["style"]
    assert torch.equal(scores(trainer.ref_model), with_style)
    trainer.train()
    assert losses(trainer)[0] == LN2
    assert torch.equal(scores(trainer.ref_model), with_style)


def test_the_users_own_reference_is_left_alone(dpo, method):
    model, reference = make_base(), make_model("llama", seed=9, vocab_size=model_size())
    attach_trained(model, method)
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    trainer = dpo(model, more={"ref_model": reference})
    assert trainer.ref_model is reference
    trainer.train()
    assert losses(trainer)[0] != LN2
    assert same_bits(dict(reference.state_dict()), state)


def model_size() -> int:
    return make_base().config.vocab_size


@pytest.mark.parametrize("by_name", [False, True])
def test_a_reference_that_follows_the_policy_is_refused(dpo, by_name, base_folder):
    with pytest.raises(ValueError, match="sync_ref_model"):
        dpo(base_folder if by_name else make_base(), sync_ref_model=True)


def test_a_model_that_is_named_has_the_base_as_its_reference(dpo, base_folder):
    trainer = dpo(base_folder, sara_arguments("mo_sara"))
    assert torch.equal(scores(trainer.ref_model), scores(make_base()))
    trainer.train()
    assert losses(trainer)[0] == LN2


def test_a_trainer_that_loads_another_reference_is_refused(trl, tokenizer, tmp_path):
    class Own(trl.SFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.ref_model = make_base()

    model = make_base()
    trainer = make_trainer(Own, trl.SFTConfig, tmp_path, tokenizer, model, "text", sara_arguments())
    assert SaraAdapter.of(trainer.ref_model) is None
    train_rows(trainer.sara_adapter)
    with pytest.raises(ValueError, match=r"'default' came trained.*ref_model"):
        make_trainer(Own, trl.SFTConfig, tmp_path, tokenizer, model, "text")


def train_rows(adapter) -> None:
    with torch.no_grad():
        for tensor in adapter.trained().values():
            tensor.mul_(1.5).add_(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["arguments", "environment"])
def test_a_reference_is_sharded_beside_the_policy(trl, where, tmp_path):
    how = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    environment = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    }
    run = run_script(
        str(tmp_path),
        json.dumps(how if where == "arguments" else {}),
        launcher=TWO_PROCESSES,
        script=with_trl.__file__,
        **(environment if where == "environment" else {}),
    )
    assert run.returncode == 0, run.stderr
    first, *_, last = json.loads((tmp_path / "losses0.json").read_text())
    assert first == LN2
    assert last < first - 0.01
    SaraAdapter.load(make_base(), tmp_path)


def test_a_reference_can_have_memory_of_its_own(method):
    model = make_model()
    attach_trained(model, method)
    reference = make_reference(model.sara_adapter, share=False)
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    assert ours.isdisjoint(parameter.data_ptr() for parameter in reference.parameters())
    assert all(parameter.is_contiguous() for parameter in reference.parameters())
    inputs = make_inputs(model)
    torch.testing.assert_close(reference(**inputs).logits, model(**inputs).logits)


# ---- other trainers ----


def test_kto_has_the_trained_adapter_as_its_reference(trl, tokenizer, method, tmp_path):
    model = make_base()
    attach_trained(model, method)
    start = scores(model)
    data = Dataset.from_dict(
        {
            "prompt": DATA["preference"]["prompt"],
            "completion": DATA["preference"]["chosen"],
            "label": [index % 2 == 0 for index in range(len(WORDS))],
        }
    )
    trainer = make_trainer(trl.KTOTrainer, trl.KTOConfig, tmp_path, tokenizer, model, data)
    assert torch.equal(scores(trainer.ref_model), start)
    trainer.train()
    first = next(row for row in trainer.state.log_history if "loss" in row)
    # KTO's loss is one half wherever policy and reference agree.
    assert first["loss"] == pytest.approx(0.5, abs=1e-5)
    assert torch.equal(scores(trainer.ref_model), start)


def reward(completions, **kwargs) -> list[float]:
    return [float(len(completion) % 5) for completion in completions]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
@pytest.mark.parametrize("trained", [True, False])
def test_trainers_that_generate_have_the_right_reference(trl, tokenizer, name, trained, tmp_path):
    model = make_base()
    model.config._name_or_path = "nobody/knows-this-model"
    if trained:
        attach_trained(model, "mo_sara")
    start = scores(model)
    trainer = make_trainer(
        getattr(trl, f"{name}Trainer"),
        getattr(trl, f"{name}Config"),
        tmp_path,
        tokenizer,
        model,
        Dataset.from_dict({"prompt": DATA["preference"]["prompt"]}),
        None if trained else sara_arguments("mo_sara"),
        {"beta": 0.1, "num_generations": 2, "max_completion_length": 4, "disable_dropout": True},
        reward_funcs=reward,
    )
    reference = trainer.accelerator.unwrap_model(trainer.ref_model)
    assert torch.equal(scores(reference), start)
    assert (SaraAdapter.of(reference) is not None) == trained
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    kl = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert torch.equal(scores(reference), start)
    assert not torch.equal(scores(model), start)


@pytest.mark.slow
def test_no_reference_is_made_where_none_is_used(trl, tokenizer, tmp_path):
    model = make_base()
    attach_trained(model)
    data = Dataset.from_dict({"prompt": DATA["preference"]["prompt"]})
    changes = {"num_generations": 2, "max_completion_length": 4}
    trainer = make_trainer(
        trl.GRPOTrainer, trl.GRPOConfig, tmp_path, tokenizer, model, data, None, changes, reward_funcs=reward
    )
    trainer.train()
    assert trainer.ref_model is None


@pytest.mark.slow
@pytest.mark.parametrize("after", ["nothing", "sft"])
def test_online_dpo_has_the_trained_adapter_as_its_reference(trl, tokenizer, after, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        online = pytest.importorskip("trl.experimental.online_dpo")
    model = make_base()
    if after == "sft":
        make_trainer(trl.SFTTrainer, trl.SFTConfig, tmp_path, tokenizer, model, "text", sara_arguments()).train()
    else:
        attach_trained(model)
    start = scores(model)
    trainer = make_trainer(
        online.OnlineDPOTrainer,
        online.OnlineDPOConfig,
        tmp_path,
        tokenizer,
        model,
        Dataset.from_dict({"prompt": DATA["preference"]["prompt"]}),
        None,
        {"max_new_tokens": 4},
        reward_funcs=reward,
    )
    trainer.train()
    assert not torch.equal(scores(model), start)
    assert torch.equal(scores(trainer.accelerator.unwrap_model(trainer.ref_model)), start)


def test_sft_and_reward_trainers_make_no_reference(trl, tokenizer, tmp_path):
    for kind, config, model, data in (
        (trl.SFTTrainer, trl.SFTConfig, make_base(), "text"),
        (trl.RewardTrainer, trl.RewardConfig, make_rewarder(), "preference"),
    ):
        attach_trained(model) if data == "text" else SaraAdapter.attach(model, sara_arguments())
        trainer = make_trainer(kind, config, tmp_path, tokenizer, model, data)
        assert getattr(trainer, "ref_model", None) is None
        trainer.train()
        assert len(losses(trainer)) == 3


def make_rewarder():
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = make_base().config
    config.num_labels, config.pad_token_id = 1, 0
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.slow
def test_distillation_keeps_the_teacher_that_was_named(trl, tokenizer, base_folder, tmp_path):
    student = make_base()
    attach_trained(student)
    data = Dataset.from_dict({"prompt": DATA["preference"]["prompt"], "completion": DATA["preference"]["chosen"]})
    trainer = make_trainer(
        trl.DistillationTrainer,
        trl.DistillationConfig,
        tmp_path,
        tokenizer,
        student,
        data,
        teacher_model=base_folder,
    )
    teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
    assert torch.equal(scores(teacher), scores(make_base()))
    trainer.train()
    assert torch.equal(scores(teacher), scores(make_base()))
