"""Several adapters on one model: which one a trainer trains, and what a model that carries adapters refuses."""

import copy
import logging
import pickle

import pytest
import torch
from conftest import (
    attach_trained,
    base_state,
    logits,
    make_inputs,
    make_model,
    same_bits,
    sara_arguments,
    train,
)
from torch import nn
from training import STEPS, At, dataset, log_of, training_arguments
from transformers import AutoModelForSequenceClassification, BertModel

from hf_sara import SaraAdapter, SaraTrainer, merge


def make_trainer(folder, model=None, adapter_name=None, sara_args=None, callbacks=None, **changes):
    """A trainer that names its adapter."""
    model_init = changes.pop("model_init", None)
    return SaraTrainer(
        model=model,
        model_init=model_init,
        args=training_arguments(folder, **changes),
        sara_args=sara_args,
        adapter_name=adapter_name,
        train_dataset=dataset(),
        eval_dataset=dataset(8, seed=1),
        callbacks=callbacks,
    )


def two_adapters(**changes):
    """A model with two trained adapters, `"de"` and `"fr"`."""
    model = make_model()
    for index, name in enumerate(("de", "fr")):
        attach_trained(model, "sara", name, seed=index, dropout=0.1, **changes)
    return model


def trains(adapter) -> set[bool]:
    return {tensor.requires_grad for tensor in adapter.trained().values()}


# ---- the trained one ----


def test_a_trainer_asks_which_adapter_is_meant(tmp_path):
    with pytest.raises(ValueError, match=r"'de', 'fr'.*adapter_name='de'"):
        make_trainer(tmp_path, two_adapters())


def test_an_unknown_name_is_refused_unless_there_is_something_to_attach(tmp_path):
    model = two_adapters()
    with pytest.raises(ValueError, match=r"no adapter 'it', but 'de', 'fr'.*sara_args"):
        make_trainer(tmp_path, model, "it")
    assert list(model.sara_adapters) == ["de", "fr"]
    trainer = make_trainer(tmp_path, model, "it", sara_arguments("mo_sara"))
    assert list(model.sara_adapters) == ["de", "fr", "it"]
    assert trainer.sara_adapter.name == "it"
    assert model.sara_adapter is trainer.sara_adapter


def test_on_a_bare_model_the_name_is_that_of_the_new_adapter(method, tmp_path):
    trainer = make_trainer(tmp_path, make_model(), "de")
    assert list(trainer.model.sara_adapters) == ["de"]
    again = make_trainer(tmp_path, make_model(), "de", sara_arguments(method))
    assert again.sara_adapter.args == sara_arguments(method)


@pytest.mark.parametrize("name", ["de", "fr"])
def test_the_others_keep_their_bits_and_get_no_gradient(name, tmp_path):
    model = two_adapters()
    ours, other = (SaraAdapter.of(model, one) for one in (name, {"de": "fr", "fr": "de"}[name]))
    start, theirs, base = ours.state_dict(), other.state_dict(), base_state(model)
    trainer = make_trainer(tmp_path, model, name, save_strategy="no")
    trainer.train()
    assert model.sara_adapter is trainer.sara_adapter is ours
    assert same_bits(other.state_dict(), theirs)
    assert same_bits(base_state(model), base)
    assert all(not torch.equal(tensor, start[key]) for key, tensor in ours.state_dict().items())
    assert trains(other) == {False}
    assert trains(ours) == {True}
    assert all(tensor.grad is None for tensor in other.trained().values())


def test_the_others_add_their_updates_while_one_trains(tmp_path):
    alone, beside = make_model(), make_model()
    attach_trained(beside, name="fr")
    losses = []
    for model in (alone, beside):
        trainer = make_trainer(tmp_path, model, "de", sara_arguments(), save_strategy="no")
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] != losses[1]


def test_an_adapter_that_rested_trains_when_its_turn_comes(tmp_path):
    model = two_adapters()
    de, fr = (SaraAdapter.of(model, name) for name in ("de", "fr"))
    make_trainer(tmp_path, model, "de")
    assert (trains(de), trains(fr)) == ({True}, {False})
    trainer = make_trainer(tmp_path, model, "fr", save_strategy="no")
    assert (trains(de), trains(fr)) == ({False}, {True})
    before, other = fr.state_dict(), de.state_dict()
    trainer.train()
    assert not same_bits(fr.state_dict(), before)
    assert same_bits(de.state_dict(), other)


def test_an_adapter_that_rested_trains_in_a_loop_of_ones_own(tmp_path):
    model = two_adapters()
    de, fr = (SaraAdapter.of(model, name) for name in ("de", "fr"))
    make_trainer(tmp_path, model, "de")
    fr.train_alone()
    before, other = fr.state_dict(), de.state_dict()
    train(fr)
    assert not same_bits(fr.state_dict(), before)
    assert same_bits(de.state_dict(), other)
    assert model.sara_adapter is fr


def test_two_trainers_that_were_made_first_train_one_after_the_other(tmp_path):
    model = two_adapters()
    trainers = [make_trainer(tmp_path / name, model, name, save_strategy="no") for name in ("de", "fr")]
    for trainer, name, other in zip(trainers, ("de", "fr"), ("fr", "de"), strict=True):
        ours, theirs = trainer.sara_adapter, SaraAdapter.of(model, other)
        assert ours.name == name
        before = ours.state_dict(), theirs.state_dict()
        trainer.train()
        assert model.sara_adapter is ours
        assert not same_bits(ours.state_dict(), before[0])
        assert same_bits(theirs.state_dict(), before[1])
        trainer.save_model()
    for name in ("de", "fr"):
        loaded = SaraAdapter.load(make_model(), tmp_path / name)
        assert same_bits(loaded.state_dict(), SaraAdapter.of(model, name).state_dict())


def test_an_adapter_that_is_attached_later_neither_trains_nor_is_saved(tmp_path):
    model = make_model()
    trainer = make_trainer(tmp_path, model, sara_args=sara_arguments(), save_strategy="no")
    late = attach_trained(model, "mo_sara", "late")
    theirs = late.state_dict()
    trainer.train()
    assert trainer.sara_adapter.name == "default"
    assert model.sara_adapter is trainer.sara_adapter
    assert same_bits(late.state_dict(), theirs)
    trainer.save_model()
    assert SaraAdapter.load(make_model(), tmp_path).args.method == "sara"


def test_a_resumed_run_goes_on_with_the_named_adapter(tmp_path):
    whole = make_trainer(tmp_path / "whole", two_adapters(), "fr")
    whole.train()
    stop = At(3, lambda control: setattr(control, "should_training_stop", True))
    make_trainer(tmp_path / "parts", two_adapters(), "fr", callbacks=[stop]).train()
    resumed = make_trainer(tmp_path / "parts", two_adapters(), "fr")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert same_bits(resumed.sara_adapter.state_dict(), whole.sara_adapter.state_dict())
    assert log_of(resumed) == log_of(whole)
    untouched = SaraAdapter.of(two_adapters(), "de").state_dict()
    assert same_bits(SaraAdapter.of(resumed.model, "de").state_dict(), untouched)


def test_the_best_checkpoint_is_loaded_into_the_named_adapter(tmp_path):
    # So large a learning rate makes the loss worse after the first steps.
    changes = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 3.0}
    trainer = make_trainer(tmp_path, two_adapters(), "fr", **changes)
    trainer.train()
    best = SaraAdapter.load(make_model(), trainer.state.best_model_checkpoint).state_dict()
    last = SaraAdapter.load(make_model(), tmp_path / f"checkpoint-{STEPS}").state_dict()
    assert same_bits(trainer.sara_adapter.state_dict(), best)
    assert not same_bits(best, last)
    assert same_bits(
        SaraAdapter.of(trainer.model, "de").state_dict(), SaraAdapter.of(two_adapters(), "de").state_dict()
    )


def test_model_init_gives_every_new_model_the_named_adapter(tmp_path):
    models = []

    def model_init():
        models.append(attach_trained(make_model(), name="de").model)
        return models[-1]

    trainer = make_trainer(tmp_path, None, "fr", sara_arguments("mo_sara"), model_init=model_init, save_strategy="no")
    theirs = SaraAdapter.of(models[-1], "de").state_dict()
    trainer.train()
    assert [list(model.sara_adapters) for model in models] == [["de", "fr"]] * 2
    assert trainer.sara_adapter.name == "fr"
    assert trainer.sara_adapter.model is models[-1]
    assert same_bits(SaraAdapter.of(models[-1], "de").state_dict(), theirs)


def test_parts_of_the_others_rest_too(tmp_path):
    model = make_model("bert")
    first = attach_trained(model, name="first", modules_to_save=["classifier"])
    first.disable()
    theirs = first.state_dict()
    trainer = make_trainer(tmp_path, model, "second", sara_arguments("mo_sara", modules_to_save=["classifier"]))
    trainer.train_dataset = classified(24)
    trainer.args.save_strategy = "no"
    trainer.train()
    assert same_bits(first.state_dict(), theirs)
    assert trains(first) == {False}
    assert "classifier.weight" in trainer.sara_adapter.state_dict()


def classified(size: int):
    data = dataset(size)
    return data.remove_columns(["labels"]).add_column("labels", [row[0] % 3 for row in data["input_ids"]])


def test_the_tensors_of_the_others_are_not_other_parameters(tmp_path):
    model = two_adapters()
    trainer = make_trainer(tmp_path, model, "de", save_strategy="no")
    # Someone lets another adapter train as well. Its tensors can be saved with it, so that nothing is lost.
    for tensor in SaraAdapter.of(model, "fr").trained().values():
        tensor.requires_grad_(True)
    theirs = SaraAdapter.of(model, "fr").state_dict()
    trainer.save_model()
    trainer.train()
    assert same_bits(SaraAdapter.of(model, "fr").state_dict(), theirs)


# ---- what a model refuses ----


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "vit"])
@pytest.mark.parametrize("wrapper", ["plain", "compiled", "parallel"])
def test_one_name_for_each_row_is_refused(family, wrapper):
    model = make_model(family)
    adapter = SaraAdapter.attach(model, sara_arguments(), "de")
    wrapped = {
        "plain": lambda model: model,
        "compiled": lambda model: torch.compile(model, backend="eager"),
        "parallel": nn.DataParallel,
    }[wrapper](model)
    inputs = make_inputs(model)
    with pytest.raises(ValueError, match=r"'fr', 'it', and the model carries the adapters 'de'"):
        wrapped(**inputs, adapter_names=["fr", "it", "de", "fr"])
    for names in (["de", "de"], ["de", "__base__"]):
        with pytest.raises(ValueError, match="not supported"):
            wrapped(**inputs, adapter_names=names)
    if wrapper == "plain":
        model(**inputs, adapter_names=None)
        adapter.detach()
        assert not any(hook.__name__ == "refuse_names" for hook in model._forward_pre_hooks.values())


def copies_of(model):
    yield model
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    yield torch.compile(model, backend="eager")


def test_a_model_with_adapters_cannot_be_saved_as_a_plain_one(tmp_path):
    for one in copies_of(two_adapters()):
        for method in (one.save_pretrained, one.push_to_hub):
            with pytest.raises(ValueError, match=r"carries the adapters 'de', 'fr'.*sara_adapter\.save_pretrained"):
                method(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_model_can_be_saved_again_when_its_last_adapter_is_gone(tmp_path):
    model = two_adapters()
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        adapters = list(one.sara_adapters.values())
        assert all(adapter.model is one for adapter in adapters)
        adapters[0].detach()
        with pytest.raises(ValueError, match="carries the adapters 'fr'"):
            one.save_pretrained(tmp_path)
        adapters[1].detach()
        one.save_pretrained(tmp_path / "plain")
        assert same_bits(type(one).from_pretrained(tmp_path / "plain").state_dict(), make_model().state_dict())
        assert vars(one).keys() == vars(make_model()).keys()


def test_a_merged_model_is_saved_after_its_adapter_is_detached(tmp_path):
    model = make_model()
    adapter = attach_trained(model)
    adapter.merge()
    with pytest.raises(ValueError, match="carries the adapters"):
        model.save_pretrained(tmp_path / "model")
    adapter.detach(keep_merged=True)
    model.save_pretrained(tmp_path / "model")
    fresh = attach_trained(make_model())
    merge(fresh.model, tmp_path / "merged")
    plain = [type(model).from_pretrained(tmp_path / name) for name in ("model", "merged")]
    assert same_bits(plain[0].state_dict(), plain[1].state_dict())
    assert torch.equal(logits(plain[0]), logits(model))


# ---- what would be lost ----


def test_a_parameter_that_was_unfrozen_by_hand_is_refused(tmp_path):
    model = make_model()
    trainer = make_trainer(tmp_path / "run", model, sara_args=sara_arguments(), save_strategy="no")
    model.model.norm.weight.requires_grad_(True)
    state = base_state(model)
    for action in (
        trainer.train,
        trainer.save_model,
        lambda: trainer.sara_adapter.save_pretrained(tmp_path / "run"),
    ):
        with pytest.raises(ValueError, match=r"model\.norm\.weight.*modules_to_save"):
            action()
    assert same_bits(base_state(model), state)
    assert not (tmp_path / "run" / "sara_adapter.safetensors").exists()
    model.model.norm.weight.requires_grad_(False)
    trainer.train()
    trainer.save_model()


def test_random_parameters_that_are_frozen_are_warned_of_by_name(tmp_path, caplog):
    inner = make_model("bert").bert
    BertModel.save_pretrained(inner, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    with caplog.at_level(logging.WARNING, "hf_sara"):
        adapter = SaraAdapter.attach(model, sara_arguments(modules_to_save=[]))
    assert "classifier.weight, classifier.bias" in caplog.text
    assert "modules_to_save" in caplog.text
    caplog.clear()
    adapter.detach()
    with caplog.at_level(logging.WARNING, "hf_sara"):
        SaraAdapter.attach(model, sara_arguments(modules_to_save=["classifier"]))
    assert "random" not in caplog.text


def test_a_model_without_a_checkpoint_has_nothing_to_warn_of(caplog):
    with caplog.at_level(logging.WARNING, "hf_sara"):
        train(SaraAdapter.attach(make_model("bert"), sara_arguments(modules_to_save=[])))
    assert "random" not in caplog.text
