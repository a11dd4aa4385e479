"""Updates of modules that a training never used: they rest, so that the model computes there what the base does."""

import copy
import logging

import pytest
import torch
from conftest import attach_trained, edit_config, logits, make_model, sara_arguments, train
from datasets import Dataset
from structures import make, words
from torch import nn
from training import make_trainer
from transformers import TrainerCallback, TrainingArguments

from hf_sara import SaraAdapter, SaraArguments, SaraTrainer, export_lora
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


@pytest.mark.parametrize("variant", [{}, {"singular_values": False}])
def test_an_unused_update_adds_nothing_after_the_training(variant, tmp_path, caplog):
    model, inputs = make("decoder without its encoder")
    base = copy.deepcopy(model)
    adapter = attach_trained(model, inputs=inputs, **variant)
    plain = adapter.model.model.decoder.layers[0].encoder_attn.q_proj
    adapter.save_pretrained(tmp_path)
    assert "4 of 8 sites were never used" in caplog.text
    assert IDLE in caplog.text
    x = torch.randn(3, 24)
    assert torch.equal(plain(x), nn.functional.linear(x, plain.weight, plain.bias))
    SaraAdapter.load(base, tmp_path)
    assert torch.equal(with_encoder(base), with_encoder(model))
    # It is said once.
    caplog.clear()
    adapter.save_pretrained(tmp_path)
    assert not caplog.text
    # It can still learn.
    hidden = torch.randn(2, 5, 24)
    train(adapter, inputs={**inputs, "encoder_hidden_states": hidden})
    assert not torch.equal(plain(x), nn.functional.linear(x, plain.weight, plain.bias))


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
    base = copy.deepcopy(model)
    args = SaraArguments(target_modules=["q", "v", "wi", "wo"], threshold=0.2)
    data = [{"input_ids": words()[0], "labels": words()[0]}] * 4
    settings = TrainingArguments(str(tmp_path), max_steps=2, learning_rate=0.05, report_to="none", use_cpu=True)
    trainer = SaraTrainer(model=model, args=settings, sara_args=args, train_dataset=data)
    trainer.train()
    trainer.save_model()
    assert "expert" in caplog.text
    SaraAdapter.load(base, tmp_path)
    inputs = {"input_ids": words(12).roll(3), "labels": words(12)}
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, base.eval()(**inputs).logits)


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


def test_the_export_has_no_random_update(tmp_path):
    model, inputs = make("decoder without its encoder")
    adapter = attach_trained(model, inputs=inputs)
    export_lora(adapter, tmp_path)
    assert adapter.state_dict()[f"{IDLE}.S"].abs().max() == 0


def test_a_hostile_record_of_training_is_refused(tmp_path):
    adapter = attach_trained(make_model())
    adapter.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config["sites"][0].update(trained="no"))
    with pytest.raises(ValueError, match="trained"):
        read(tmp_path)


@pytest.fixture(autouse=True)
def _level(caplog):
    caplog.set_level(logging.WARNING, logger="hf_sara")
