"""Updates of modules that a training never used: they rest, so that the model computes there what the base does."""

import copy
import logging

import pytest
import torch
from conftest import attach_trained, edit_config, logits, make_model, same_bits, sara_arguments, train
from datasets import Dataset
from safetensors.torch import load_file
from structures import make, words
from torch import nn
from training import make_trainer
from transformers import TrainerCallback, TrainingArguments

from hf_sara import SaraAdapter, SaraArguments, SaraTrainer, export_lora, merge_shards
from hf_sara.storage import read

IDLE = "model.decoder.layers.0.encoder_attn.q_proj"


@torch.no_grad()
def with_encoder(model) -> torch.Tensor:
    """What a decoder computes if it has something to attend to, which its training did not have."""
    seen = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2))
    return model.eval()(input_ids=words(), encoder_hidden_states=seen).logits


def trainer_of(model, folder, **changes):
    row = words()[0].tolist()
    settings = {"max_steps": 3, "learning_rate": 0.05, "per_device_train_batch_size": 2, "report_to": "none"}
    args = TrainingArguments(str(folder), **{**settings, "use_cpu": True, "save_strategy": "no", **changes})
    data = Dataset.from_list([{"input_ids": row, "labels": row}] * 8)
    return SaraTrainer(model=model, args=args, sara_args=sara_arguments(), train_dataset=data)


def update_at(model, name: str = IDLE) -> torch.Tensor:
    """What the updates of one linear add to its output."""
    module, x = model.get_submodule(name), torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    return module(x) - nn.functional.linear(x, module.weight, module.bias)


VARIANTS = [{}, {"singular_values": False}, {"zero_init_vh": True}, {"method": "mo_sara", "v_position": "none"}]


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_unused_update_adds_nothing_where_the_adapter_is_loaded(variant, tmp_path, caplog):
    model, inputs = make("decoder without its encoder")
    base = copy.deepcopy(model)
    adapter = attach_trained(model, inputs=inputs, **variant)
    before = adapter.state_dict()
    adapter.save_pretrained(tmp_path)
    assert "the modules of 4 sites" in caplog.text
    assert IDLE in caplog.text
    loaded = SaraAdapter.load(base, tmp_path)
    assert update_at(base).abs().max() == 0
    assert update_at(base, IDLE.replace("encoder_attn", "self_attn")).abs().max() > 0
    with torch.no_grad():
        assert torch.equal(with_encoder(base), with_encoder(model))
    # The model in memory may go on training, so saving leaves it as it is. It is said once.
    assert same_bits(before, adapter.state_dict())
    caplog.clear()
    adapter.save_pretrained(tmp_path)
    assert not caplog.text
    # What was loaded can still learn.
    hidden = torch.randn(2, 5, 24)
    train(loaded, inputs={**inputs, "encoder_hidden_states": hidden})
    assert update_at(base).abs().max() > 0


def test_merging_and_exporting_leave_unused_updates_out(tmp_path):
    model, inputs = make("decoder without its encoder")
    adapter = attach_trained(model, inputs=inputs)
    before, weight = adapter.state_dict(), model.get_submodule(IDLE).weight.clone()
    export_lora(adapter, tmp_path)
    lora = load_file(tmp_path / "adapter_model.safetensors")
    assert lora[f"base_model.model.{IDLE}.lora_B.weight"].abs().max() == 0
    assert lora[f"base_model.model.{IDLE.replace('encoder_attn', 'self_attn')}.lora_B.weight"].abs().max() > 0
    adapter.merge()
    assert torch.equal(model.get_submodule(IDLE).weight, weight)
    adapter.unmerge()
    assert same_bits(before, adapter.state_dict())


def test_the_trainer_goes_on_and_names_what_was_never_used(tmp_path, caplog):
    model, _ = make("decoder without its encoder")
    base = copy.deepcopy(model)
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    assert IDLE in caplog.text
    trained = with_encoder(model)
    trainer.save_model()
    SaraAdapter.load(base, tmp_path)
    assert torch.equal(with_encoder(base), trained)
    deltas = {site.name: delta for site, delta in trainer.sara_adapter.deltas()}
    assert deltas[IDLE].S.abs().max() == 0
    assert deltas[IDLE.replace("encoder_attn", "self_attn")].S.abs().max() > 0


def test_a_checkpoint_keeps_the_start_and_says_so(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    def run(folder, resume=None, callbacks=()):
        model, _ = make("decoder without its encoder")
        trainer = trainer_of(model, folder, max_steps=4, save_strategy="steps", save_steps=2)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.sara_adapter

    whole = run(tmp_path / "whole")
    run(tmp_path / "stopped", callbacks=[Stop()])
    checkpoint = tmp_path / "stopped" / "checkpoint-2"
    saved = read(checkpoint)
    assert len(saved.untrained) == 4
    assert IDLE in saved.untrained
    assert saved.tensors[f"{IDLE}.S"].abs().max() > 0
    resumed = run(tmp_path / "stopped", resume=True)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    # Who loads a checkpoint as an adapter gets no random update.
    loaded, _ = make("decoder without its encoder")
    adapter = SaraAdapter.load(loaded, checkpoint)
    assert adapter.state_dict()[f"{IDLE}.S"].abs().max() == 0


def test_an_expert_without_a_token_rests_and_one_with_tokens_does_not(tmp_path, caplog):
    model, _ = make("experts as modules")
    args = SaraArguments(target_modules=["q", "v", "wi", "wo"], threshold=0.2)
    data = [{"input_ids": words()[0], "labels": words()[0]}] * 4
    settings = TrainingArguments(str(tmp_path), max_steps=2, learning_rate=0.05, report_to="none", use_cpu=True)
    trainer = SaraTrainer(model=model, args=settings, sara_args=args, train_dataset=data)
    trainer.train()
    experts = {site.name: delta for site, delta in trainer.sara_adapter.deltas() if ".expert_" in site.name}
    resting = {name for name, delta in experts.items() if delta.S.abs().max() == 0}
    assert resting == {name for name, delta in experts.items() if not delta.usage.called}
    assert 0 < len(resting) < len(experts)
    assert next(iter(resting)) in caplog.text


def test_a_save_in_the_middle_changes_no_training(tmp_path):
    """The encoder comes from the third step on, and a callback has saved the adapter before."""

    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.sara_adapter.save_pretrained(tmp_path / "middle")

    def run(folder, *callbacks):
        model, inputs = make("decoder without its encoder")
        rows = [{name: value[0] for name, value in inputs.items()} for _ in range(4)]
        for row in rows[2:]:
            row["encoder_hidden_states"] = torch.randn(5, 24, generator=torch.Generator().manual_seed(4))
        values = {"per_device_train_batch_size": 1, "max_steps": 4, "train_sampling_strategy": "sequential"}
        trainer = trainer_of(model, folder, **values)
        trainer.train_dataset = rows
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
        return trainer.sara_adapter.state_dict()

    whole = run(tmp_path / "whole")
    assert whole[f"{IDLE}.S"].abs().max() > 0
    assert same_bits(whole, run(tmp_path / "saved", Save()))


def test_the_best_checkpoint_before_the_first_use_rests(tmp_path):
    model, _ = make("decoder without its encoder")
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    early = trainer.sara_adapter.state_dict()
    adapter = trainer.sara_adapter
    for _, delta in adapter.deltas():
        delta.usage.learning = True
    adapter.load_state_dict(early, untrained=[IDLE])
    assert [site.name for site in adapter.untrained_sites()] == [IDLE]


def test_files_merge_as_the_memory_does(tmp_path):
    base, _ = make("decoder without its encoder")
    base.save_pretrained(tmp_path / "base")
    trainer = trainer_of(base, tmp_path / "run", save_strategy="steps", save_steps=2)
    trainer.train()
    merge_shards(tmp_path / "base", tmp_path / "run" / "checkpoint-2", tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.get_submodule(IDLE).weight, base.get_submodule(IDLE).weight)
    own = IDLE.replace("encoder_attn", "self_attn")
    assert not torch.equal(merged.get_submodule(own).weight, base.get_submodule(own).weight)


def test_batches_without_anything_to_train_are_passed_over_and_too_many_are_an_error(tmp_path):
    model, inputs = make("decoder without its encoder")
    row = {name: value[0] for name, value in inputs.items()}
    seen = {**row, "encoder_hidden_states": torch.randn(5, 24)}

    def run(rows):
        values = {"per_device_train_batch_size": 1, "max_steps": len(rows), "train_sampling_strategy": "sequential"}
        trainer = trainer_of(copy.deepcopy(model), tmp_path, **values)
        trainer.model.sara_adapter.detach()
        SaraAdapter.attach(trainer.model, sara_arguments(target_modules=["encoder_attn.q_proj"]))
        trainer.train_dataset = rows
        trainer.train()
        return trainer

    trained = run([row, row, seen, row]).sara_adapter
    assert not trained.is_untrained()
    for rows in ([row] * 4, [row] * 12):
        with pytest.raises(
            RuntimeError, match=f"In the first {min(len(rows), 10)} batches none of the 6 trained tensors"
        ):
            run(rows)


def test_what_is_called_and_has_no_gradient_keeps_its_part_and_is_named(tmp_path, caplog):
    model = make_model()
    model.extra = nn.Linear(24, 24, bias=False)
    # The output of this linear takes part, without a gradient.
    model.model.norm.register_forward_hook(lambda module, args, out: out + model.extra(out).detach())
    trainer = make_trainer(tmp_path, model=model, sara_args=sara_arguments(target_modules=["q_proj", "extra"]))
    trainer.train()
    before = logits(model)
    assert "3 trained tensors did not change in the training" in caplog.text
    assert "extra.U" in caplog.text
    trainer.save_model()
    assert torch.equal(logits(model), before)
    assert trainer.sara_adapter.state_dict()["extra.S"].abs().max() > 0


def test_an_adapter_that_is_saved_before_its_training_keeps_its_start(tmp_path):
    model = make_model()
    adapter = SaraAdapter.attach(model, sara_arguments())
    before = logits(model)
    start = adapter.state_dict()
    adapter.save_pretrained(tmp_path)
    assert all(torch.equal(value, adapter.state_dict()[name]) for name, value in start.items())
    adapter.merge()
    assert torch.allclose(logits(model), before, atol=1e-4)


def test_a_hostile_record_of_training_is_refused(tmp_path):
    adapter = attach_trained(make_model())
    adapter.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config["sites"][0].update(trained="no"))
    with pytest.raises(ValueError, match="trained"):
        read(tmp_path)


@pytest.fixture(autouse=True)
def _level(caplog):
    caplog.set_level(logging.WARNING, logger="hf_sara")
