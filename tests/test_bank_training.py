"""Training all adapters of a bank at once: each becomes what it would in a training of its own."""

import copy
import json
import logging

import pytest
import torch
import transformers
from conftest import VOCABULARY, make_base, make_model, make_tokenizer, same_bits, sara_arguments
from datasets import Dataset, IterableDataset
from torch import nn
from training import dataset, make_idle, training_arguments
from transformers import Seq2SeqTrainingArguments, TrainerCallback

from hf_sara import AdapterBank, AdapterError, SaraAdapter, SaraSeq2SeqTrainer, SaraTrainer, SaraTrainerMixin
from hf_sara.row_names import BASE

NAMES = ("blue", "green", "red")
# The rows of each batch, of which those of one adapter are a batch of its own training.
ROWS = ("red", "blue", "green", "blue", "red", "green")
STEPS = 5


def make_starts(folder, model, method="sara", names=NAMES, seed=1, **changes):
    """The folders of new adapters, each with a start of its own."""
    torch.manual_seed(seed)
    for name in names:
        adapter = SaraAdapter.attach(
            model, sara_arguments(method, **{"dropout": 0.0, "modules_to_save": [], **changes})
        )
        adapter.save_pretrained(folder / name)
        adapter.detach()
    return {name: folder / name for name in names}


def make_rows(kind="causal", count=30, names=ROWS, seed=0):
    """Rows of a task with the name of an adapter. Sequences have different numbers of labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, 8), generator=generator)
    labels = ids.clone()
    for row in range(count):
        # Some rows have next to no label, and some have one at their start.
        labels[row, int(torch.randint(2, 8, (), generator=generator)) :] = -100
        labels[row, : row % 3] = -100
    classes = torch.randint(0, 3, (count,), generator=generator)
    targets = {
        "causal": labels,
        "classes": classes,
        "tokens": labels.clamp(max=2),
        "numbers": torch.randn(count, generator=generator),
        "several": torch.randint(0, 2, (count, 3), generator=generator).float(),
    }
    columns = {"input_ids": ids.tolist(), "adapter_name": [names[row % len(names)] for row in range(count)]}
    if kind == "answers":
        starts = torch.randint(0, 8, (count,), generator=generator)
        return Dataset.from_dict({**columns, "start_positions": starts.tolist(), "end_positions": starts.tolist()})
    return Dataset.from_dict({**columns, "labels": targets[kind].tolist()})


def in_order(folder, **changes):
    """Arguments of a training that takes the data in their order."""
    return training_arguments(folder, train_sampling_strategy="sequential", **changes)


def train_alone(model, folder, start, data, output, trainer_class=SaraTrainer, batch_size=2, **changes):
    adapter = SaraAdapter.load(model, start)
    arguments = in_order(output, **{"max_steps": STEPS, "per_device_train_batch_size": batch_size, **changes})
    trainer = trainer_class(model=model, args=arguments, train_dataset=data.remove_columns("adapter_name"))
    trainer.train()
    return adapter.state_dict()


def assert_equal_to_alone(
    make, kind, tmp_path, method="sara", trainer_class=SaraTrainer, limit=1e-6, starts=None, **changes
):
    """All adapters of a bank are what each is after its own training with its rows of the same batches."""
    folders = make_starts(tmp_path, make(), method, **(starts or {}))
    data, model = make_rows(kind), make()
    bank = AdapterBank.load(model, folders)
    begin = {name: bank.state(name) for name in NAMES}
    arguments = in_order(tmp_path / "run", **{"max_steps": STEPS, "per_device_train_batch_size": len(ROWS), **changes})
    trainer_class(model=model, args=arguments, bank=bank, train_dataset=data).train()
    for name in NAMES:
        own = data.filter(lambda row, name=name: row["adapter_name"] == name)
        expected = train_alone(make(), tmp_path, folders[name], own, tmp_path / "alone", trainer_class, **changes)
        found = bank.state(name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=limit, atol=limit)
        assert not same_bits(found, begin[name])


# ---- one adapter ----


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_one_adapter_has_the_bits_of_a_training_without_a_bank(method, dropout, tmp_path):
    start = make_starts(tmp_path, make_model(), method, ["one"], dropout=dropout)
    data, model = dataset(), make_model()
    adapter = SaraAdapter.load(model, start["one"])
    values = {"eval_strategy": "steps", "eval_steps": 2}
    alone = SaraTrainer(
        model=model, args=training_arguments(tmp_path / "a", **values), train_dataset=data, eval_dataset=data
    )
    alone.train()
    bank = AdapterBank.load(make_model(), start)
    named = data.add_column("adapter_name", ["one"] * len(data))
    args = training_arguments(tmp_path / "b", **values)
    trainer = SaraTrainer(model=bank.model, args=args, bank=bank, train_dataset=named, eval_dataset=named)
    trainer.train()
    assert same_bits(bank.state("one"), adapter.state_dict())
    logs = [
        [{key: value for key, value in entry.items() if "second" not in key and "runtime" not in key} for entry in log]
        for log in (alone.state.log_history, trainer.state.log_history)
    ]
    assert logs[0] == logs[1]
    trainer.save_model()
    assert same_bits(SaraAdapter.load(make_model(), tmp_path / "b" / "one").state_dict(), adapter.state_dict())
    # It is served as it was trained.
    ids = torch.tensor(data["input_ids"][:2])
    with torch.no_grad():
        torch.testing.assert_close(bank.model(ids, adapter_names=["one", "one"]).logits, model(ids).logits)
        bank.end_training()
        torch.testing.assert_close(bank.model(ids, adapter_names=["one", "one"]).logits, model(ids).logits)


# ---- many ----

WIDE_HEAD = {"num_labels": 3}
KINDS = {
    "llama": (lambda: make_model(dtype=torch.float64), "causal"),
    "gpt2": (
        lambda: make_model("gpt2", dtype=torch.float64, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
        "causal",
    ),
    "t5": (lambda: make_model("t5", dtype=torch.float64, dropout_rate=0.0), "causal"),
    "classes": (lambda: _bert("BertForSequenceClassification"), "classes"),
    "numbers": (lambda: _bert("BertForSequenceClassification", num_labels=1), "numbers"),
    "several": (
        lambda: _bert("BertForSequenceClassification", problem_type="multi_label_classification"),
        "several",
    ),
    "tokens": (lambda: _bert("BertForTokenClassification"), "tokens"),
    "masked": (lambda: _bert("BertForMaskedLM"), "causal"),
    "answers": (lambda: _bert("BertForQuestionAnswering", num_labels=2), "answers"),
}


def _bert(kind, **changes):
    values = {
        **{"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"intermediate_size": 32, "initializer_range": 0.2, "num_labels": 3, "pad_token_id": 0},
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **changes},
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, kind)(transformers.BertConfig(**values)).double().eval()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_each_adapter_equals_its_own_training(kind, accumulation, method, tmp_path):
    make, rows = KINDS[kind]
    # Clipping is in force, and the learning rate falls.
    changes = {"max_grad_norm": 0.05, "weight_decay": 0.1, "gradient_accumulation_steps": accumulation}
    assert_equal_to_alone(make, rows, tmp_path, method, max_steps=4 if accumulation == 1 else 2, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("method", [pytest.param("sara", marks=pytest.mark.long), "mo_sara"])
def test_a_hundred_adapters_equal_their_own_trainings_after_twenty_steps(method, tmp_path):
    make, kind = KINDS["tokens"]
    names = [f"adapter-{number:03}" for number in range(100)]
    folders = make_starts(tmp_path, make(), method, names)
    data = make_rows(kind, count=100 * 20, names=names)
    values = {"max_steps": 20, "learning_rate": 0.1 if method == "mo_sara" else 0.02, "save_strategy": "no"}
    bank = AdapterBank.load(make(), folders)
    args = in_order(tmp_path / "run", per_device_train_batch_size=100, **values)
    SaraTrainer(model=bank.model, args=args, bank=bank, train_dataset=data).train()
    for number, name in enumerate(names):
        own = data.select(range(number, len(data), 100))
        expected = train_alone(make(), tmp_path, folders[name], own, tmp_path / "alone", batch_size=1, **values)
        for key, value in expected.items():
            torch.testing.assert_close(bank.state(name)[key], value, rtol=1e-12, atol=1e-12)


WAYS = {
    "label smoothing": {"label_smoothing_factor": 0.1},
    "smoothing and accumulation": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2, "max_steps": 2},
    "sgd": {"optim": "sgd"},
    "rmsprop": {"optim": "rmsprop"},
    "not fused": {"optim": "adamw_torch"},
    "no clipping": {"max_grad_norm": 0.0},
    "activation checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_train(way, method, tmp_path):
    assert_equal_to_alone(lambda: make_model(dtype=torch.float64), "causal", tmp_path, method, limit=1e-5, **WAYS[way])


@pytest.mark.parametrize(
    "starts",
    [{"target_modules": "all-linear"}, {"num_heads": 1}, {"v_position": "front"}, {"factors": "save"}],
    ids=["all-linear", "one head", "v in front", "saved factors"],
)
def test_variants(starts, tmp_path):
    assert_equal_to_alone(lambda: make_model(dtype=torch.float64), "causal", tmp_path, "mo_sara", starts=starts)


def test_full_precision_is_as_close_as_asked(method, tmp_path):
    assert_equal_to_alone(make_model, "causal", tmp_path, method, limit=1e-5)


def test_half_precision_trains(method, tmp_path):
    model = make_model(dtype=torch.bfloat16)
    bank = AdapterBank.load(model, make_starts(tmp_path, model, method))
    before = {name: bank.state(name) for name in NAMES}
    args = training_arguments(tmp_path / "run", per_device_train_batch_size=6, learning_rate=0.1)
    SaraTrainer(model=model, args=args, bank=bank, train_dataset=make_rows()).train()
    for name in NAMES:
        assert all(tensor.dtype == torch.float32 for tensor in bank.state(name).values())
        assert not same_bits(before[name], bank.state(name))


def test_an_adapter_without_rows_in_a_batch_takes_no_step(method, tmp_path):
    """Its moments, its weight decay and its number of steps stay what they are."""
    make = lambda: make_model(dtype=torch.float64)  # noqa: E731
    folders = make_starts(tmp_path, make(), method)
    # Green has rows in the batches 0 and 2, red in 1 and 2, and blue in all.
    names = ["green", "blue"] * 2 + ["blue", "red"] * 2 + ["green", "red", "blue", "green"] + ["blue"] * 4
    data = make_rows(count=16, names=names)
    values = {"max_steps": 4, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.1}
    bank = AdapterBank.load(make(), folders)
    args = in_order(tmp_path / "run", per_device_train_batch_size=4, **values)
    SaraTrainer(model=bank.model, args=args, bank=bank, train_dataset=data).train()
    for name, batches in {"green": (0, 2), "red": (1, 2), "blue": (0, 1, 2, 3)}.items():
        model = make()
        adapter = SaraAdapter.load(model, folders[name])
        parts = [
            [row for row in data.select(range(4 * batch, 4 * batch + 4)) if row["adapter_name"] == name]
            for batch in batches
        ]
        sizes = [len(part) for part in parts]
        rows = Dataset.from_list([row for part in parts for row in part]).remove_columns("adapter_name")

        class Uneven(SaraTrainer):
            def get_train_dataloader(self, rows=rows, sizes=sizes):
                starts = [sum(sizes[:index]) for index in range(len(sizes))]
                batches = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
                return torch.utils.data.DataLoader(
                    rows.with_format("torch"), batch_sampler=batches, collate_fn=self.data_collator
                )

        arguments = training_arguments(tmp_path / "alone", **{**values, "max_steps": len(parts)})
        Uneven(model=model, args=arguments, train_dataset=rows).train()
        for key, value in adapter.state_dict().items():
            torch.testing.assert_close(bank.state(name)[key], value, rtol=1e-5, atol=1e-5)


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


@pytest.mark.parametrize("names", [NAMES, ("one",)], ids=["three", "one"])
def test_resumed_equals_uninterrupted(method, names, tmp_path):
    folders = make_starts(tmp_path, make_model(), method, names, dropout=0.2)
    rows = make_rows(names=names if len(names) == 1 else ROWS)

    def trainer(output, callbacks=()):
        # The order in which the adapters come makes no difference.
        order = reversed(folders) if output == "resumed" else folders
        bank = AdapterBank.load(make_model(), {name: folders[name] for name in order})
        args = training_arguments(tmp_path / output, per_device_train_batch_size=5, max_steps=7, save_steps=2)
        return SaraTrainer(model=bank.model, args=args, bank=bank, train_dataset=rows, callbacks=list(callbacks))

    whole = trainer("whole")
    whole.train()
    trainer("resumed", [KillAt(4)]).train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=True)
    for name in names:
        assert same_bits(whole.bank.state(name), resumed.bank.state(name))
        there = SaraAdapter.load(make_model(), tmp_path / "whole" / "checkpoint-6" / name).state_dict()
        here = SaraAdapter.load(make_model(), tmp_path / "resumed" / "checkpoint-6" / name).state_dict()
        assert same_bits(there, here)
    losses = [[entry.get("loss") for entry in one.state.log_history] for one in (whole, resumed)]
    assert losses[0] == losses[1]


def test_a_checkpoint_of_another_bank_is_refused(tmp_path):
    folders = make_starts(tmp_path, make_model())

    def trainer(names, **changes):
        bank = AdapterBank.load(make_model(), {name: folders[name] for name in names})
        args = training_arguments(tmp_path / "run", per_device_train_batch_size=6, **changes)
        return SaraTrainer(model=bank.model, args=args, bank=bank, train_dataset=make_rows(names=names))

    trainer(NAMES, max_steps=2).train()
    with pytest.raises(ValueError, match=r"belongs to another bank\. Only one of the two has the adapters red"):
        trainer(NAMES[:2]).train(resume_from_checkpoint=True)
    other = make_starts(tmp_path / "other", make_model(), threshold=0.4)
    bank = AdapterBank.load(make_model(), other)
    args = training_arguments(tmp_path / "run", per_device_train_batch_size=6)
    again = SaraTrainer(model=bank.model, args=args, bank=bank, train_dataset=make_rows())
    with pytest.raises(ValueError, match=r"The adapter 'blue' of the checkpoint .* belongs to another adapter\. It"):
        again.train(resume_from_checkpoint=True)


def test_a_damaged_adapter_makes_a_checkpoint_incomplete(tmp_path):
    folders = make_starts(tmp_path, make_model())
    bank = AdapterBank.load(make_model(), folders)
    args = training_arguments(tmp_path / "run", per_device_train_batch_size=6, max_steps=4)
    trainer = SaraTrainer(model=bank.model, args=args, bank=bank, train_dataset=make_rows())
    trainer.train()
    file = tmp_path / "run" / "checkpoint-4" / "red" / "sara_adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is not complete"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


# ---- files and cards ----


def test_each_is_saved_as_a_plain_adapter_with_a_card(method, tmp_path):
    bank = AdapterBank.attach(make_model(), sara_arguments(method, modules_to_save=[]), NAMES)
    args = training_arguments(tmp_path / "run", per_device_train_batch_size=6)
    trainer = SaraTrainer(model=bank.model, args=args, bank=bank, train_dataset=make_rows())
    trainer.train()
    trainer.save_model()
    states = {name: bank.state(name) for name in NAMES}
    for name in NAMES:
        folder = tmp_path / "run" / name
        assert same_bits(SaraAdapter.load(make_model(), folder).state_dict(), states[name])
        card = (folder / "README.md").read_text()
        assert f"# {name}\n" in card
        assert r"| learning\_rate | 0.02 |" in card
        assert "in one run with 2 other adapters" in card
        bank[name].save_pretrained(tmp_path / "alone" / name)
        assert same_bits(SaraAdapter.load(make_model(), tmp_path / "alone" / name).state_dict(), states[name])
    again = AdapterBank.load(make_model(), tmp_path / "run")
    assert again.names == sorted(NAMES)
    assert all(same_bits(again.state(name), states[name]) for name in NAMES)
    trainer.create_model_card(tags="of-three")
    assert "of-three" in (tmp_path / "run" / "red" / "README.md").read_text()


def test_a_new_bank_starts_as_a_new_adapter_does(method, tmp_path):
    torch.manual_seed(8)
    adapter = SaraAdapter.attach(make_model(), sara_arguments(method))
    torch.manual_seed(8)
    bank = AdapterBank.attach(make_model(), sara_arguments(method), NAMES)
    assert same_bits(bank.state("blue"), adapter.state_dict())
    assert not same_bits(bank.state("blue"), bank.state("red"))
    bank.save_pretrained(tmp_path)
    # A loaded adapter fits beside them.
    bank.add("more", tmp_path / "red")
    assert same_bits(bank.state("more"), bank.state("red"))


def test_factors_that_are_saved_belong_to_a_new_bank_too(tmp_path):
    bank = AdapterBank.attach(make_model(), sara_arguments("mo_sara", factors="save"), NAMES)
    bank.save_pretrained(tmp_path)
    bank.add("more", tmp_path / "red")
    adapter = SaraAdapter.load(make_model(), tmp_path / "red")
    assert same_bits(adapter.state_dict(), bank.state("more"))


def test_the_best_checkpoint_is_loaded(tmp_path):
    bank = AdapterBank.attach(make_model(), sara_arguments(), NAMES)
    # The rate is so large that the loss rises.
    values = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    args = training_arguments(tmp_path, per_device_train_batch_size=6, learning_rate=2.0, warmup_steps=0, **values)
    trainer = SaraTrainer(
        model=bank.model, args=args, bank=bank, train_dataset=make_rows(), eval_dataset=make_rows(seed=4)
    )
    trainer.train()
    best = min((entry for entry in trainer.state.log_history if "eval_loss" in entry), key=lambda e: e["eval_loss"])
    assert best["step"] < 7
    for name in NAMES:
        there = SaraAdapter.load(make_model(), tmp_path / f"checkpoint-{best['step']}" / name).state_dict()
        assert same_bits(there, bank.state(name))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best["eval_loss"])


def test_updates_that_took_no_part_add_nothing(tmp_path, caplog):
    make = make_idle
    bank = AdapterBank.attach(make(), sara_arguments(target_modules="all-linear", modules_to_save=[]), NAMES)
    args = training_arguments(tmp_path, per_device_train_batch_size=6)
    trainer = SaraTrainer(model=bank.model, args=args, bank=bank, train_dataset=make_rows())
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "did not use the modules of 1 sites while the bank trained" in caplog.text
    trainer.save_model()
    config = json.loads((tmp_path / "red" / "sara_config.json").read_text())
    assert [site["name"] for site in config["sites"] if site.get("trained") is False] == ["model.extra"]


@pytest.mark.parametrize("names", [NAMES, ("one",)], ids=["three", "one"])
def test_a_cast_of_the_model_leaves_what_trains(names, tmp_path):
    bank = AdapterBank.attach(make_model(), sara_arguments(modules_to_save=[]), names)
    bank.train_alone()
    before = {name: bank.state(name) for name in names}
    bank.model.to(torch.bfloat16)
    bank.save_pretrained(tmp_path)
    bank.model.to(torch.float32)
    for name in names:
        assert same_bits(bank.state(name), before[name])
        assert same_bits(SaraAdapter.load(make_model(), tmp_path / name).state_dict(), before[name])


def test_a_base_with_random_weights_is_named(tmp_path, caplog):
    config = make_model("bert").config
    transformers.BertModel(config).save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        AdapterBank.attach(model, sara_arguments(modules_to_save=[]), NAMES)
    assert "freezes them: classifier.weight, classifier.bias. An adapter of a bank does not train" in caplog.text


# ---- data ----


def test_evaluation_and_prediction_have_their_adapters(method, tmp_path):
    bank = AdapterBank.load(make_model(), make_starts(tmp_path, make_model(), method))
    args = training_arguments(tmp_path / "run", per_device_train_batch_size=6, per_device_eval_batch_size=4)
    data = make_rows(count=12)
    trainer = SaraTrainer(model=bank.model, args=args, bank=bank, train_dataset=data, eval_dataset=data)
    trainer.train()
    found = torch.tensor(trainer.predict(data).predictions)
    with torch.no_grad():
        ids = torch.tensor(data["input_ids"])
        expected = bank.model(ids, adapter_names=data["adapter_name"]).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    losses = [
        nn.functional.cross_entropy(
            expected[row : row + 4, :-1].flatten(0, 1), torch.tensor(data["labels"][row : row + 4])[:, 1:].flatten()
        )
        for row in (0, 4, 8)
    ]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(sum(losses) / 3), rel=1e-5)


def test_generation_in_an_evaluation(tmp_path):
    bank = AdapterBank.load(make_model("t5"), make_starts(tmp_path, make_model("t5")))
    args = Seq2SeqTrainingArguments(
        **{"output_dir": str(tmp_path / "run"), "max_steps": 3, "per_device_train_batch_size": 6, "use_cpu": True},
        **{"predict_with_generate": True, "generation_max_length": 6, "learning_rate": 0.05, "disable_tqdm": True},
    )
    data = make_rows(count=12)
    trainer = SaraSeq2SeqTrainer(model=bank.model, args=args, bank=bank, train_dataset=data)
    trainer.train()
    found = trainer.predict(data).predictions
    expected = bank.model.generate(
        torch.tensor(data["input_ids"]), adapter_names=data["adapter_name"], max_length=6
    ).tolist()
    assert [row[: len(row)].tolist() for row in found[:, : len(expected[0])]] == expected


STREAMS = {
    "a list": lambda data: list(data),
    "streamed": lambda data: data.to_iterable_dataset(),
    "a generator": lambda data: IterableDataset.from_generator(lambda: iter(list(data))),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_data_of_other_kinds(stream, tmp_path):
    folders = make_starts(tmp_path, make_model())
    states = []
    for index, data in enumerate((make_rows(), STREAMS[stream](make_rows()))):
        bank = AdapterBank.load(make_model(), folders)
        args = in_order(tmp_path / str(index), per_device_train_batch_size=6, max_steps=3)
        SaraTrainer(model=bank.model, args=args, bank=bank, train_dataset=data).train()
        states.append({name: bank.state(name) for name in NAMES})
    assert all(same_bits(states[0][name], states[1][name]) for name in NAMES)


def test_an_adapter_without_data_is_named(tmp_path, caplog):
    bank = AdapterBank.attach(make_model(), sara_arguments(), (*NAMES, "idle"))
    with caplog.at_level(logging.WARNING):
        SaraTrainer(model=bank.model, args=training_arguments(tmp_path), bank=bank, train_dataset=make_rows())
    assert "1 adapters of the bank have no row in the training data, and do not train: idle" in caplog.text


# ---- what cannot work ----


def _trainer(tmp_path, bank=None, data=None, trainer_class=SaraTrainer, arguments=None, **changes):
    bank = AdapterBank.attach(make_model(), sara_arguments(), NAMES) if bank is None else bank
    return trainer_class(
        **{
            "model": bank.model,
            "args": training_arguments(tmp_path / "run", **(arguments or {})),
            "bank": bank,
            "train_dataset": make_rows() if data is None else data,
            **changes,
        }
    )


REFUSED = {
    "another model": ({"model": make_model()}, "The bank is on another model"),
    "arguments": ({"sara_args": sara_arguments()}, "sara_args cannot be given together with bank"),
    "a name": ({"adapter_name": "red"}, "adapter_name cannot be given together with bank"),
    "an optimizer": ({"optimizers": (torch.optim.SGD([torch.zeros(1)]), None)}, "optimizers cannot be given together"),
    "optim": ({"arguments": {"optim": "adafactor"}}, "optim='adafactor' may look at the shapes of tensors"),
    "a push": ({"arguments": {"push_to_hub": True}}, "would push all adapters of the bank to one repository"),
    "no column": ({"data": dataset()}, "a bank needs the column 'adapter_name'"),
    "unknown names": (
        {"data": make_rows(names=("red", "pink"))},
        "has 'pink', and the bank has the adapters blue, green",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_the_training(case, tmp_path):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        _trainer(tmp_path, **changes)


def test_names_that_are_no_folders_are_refused(tmp_path):
    bank = AdapterBank.attach(make_model(), sara_arguments(), ["../up", "red"])
    with pytest.raises(ValueError, match=r"'\.\./up' cannot be saved in a folder of its name"):
        _trainer(tmp_path, bank=bank, data=make_rows(names=("../up", "red")))
    with pytest.raises(ValueError, match=r"'\.\./up' cannot be saved in a folder of its name"):
        bank.save_pretrained(tmp_path)
    bank["../up"].save_pretrained(tmp_path / "fine")


def test_rows_without_a_name_are_refused(tmp_path):
    rows = [*list(make_rows(count=6)), {"input_ids": [3, 4], "labels": [3, 4]}]
    trainer = _trainer(tmp_path, data=rows, arguments={"per_device_train_batch_size": 7})
    with pytest.raises(ValueError, match="1 of 7 rows have no text in the column 'adapter_name'"):
        trainer.train()


def test_losses_of_which_rows_have_no_part_of_their_own_are_refused(tmp_path):
    def contrast(outputs, labels, num_items_in_batch=None):
        means = outputs.logits.mean(1)
        return nn.functional.cross_entropy(means @ means.t(), torch.arange(len(means)))

    trainer = _trainer(tmp_path, arguments={"per_device_train_batch_size": 6}, compute_loss_func=contrast)
    before = trainer.bank.state("red")
    with pytest.raises(ValueError, match=r"is not the mean of those of the labels: it is .* cannot train adapters of"):
        trainer.train()
    assert same_bits(before, trainer.bank.state("red"))


def test_a_loss_of_ones_own_that_is_a_mean_works(tmp_path):
    def mean(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    class WithLoss(SaraTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, compute_loss_func=mean, **kwargs)

    assert_equal_to_alone(lambda: make_model(dtype=torch.float64), "causal", tmp_path, trainer_class=WithLoss)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match="A bank trains in one process on one device"):
        _trainer(tmp_path)


def test_adapters_with_other_dropouts_do_not_train_together(tmp_path):
    folders = {
        **make_starts(tmp_path, make_model(), names=["one"]),
        **make_starts(tmp_path, make_model(), names=["two"], dropout=0.5),
    }
    bank = AdapterBank.load(make_model(), folders)
    with pytest.raises(ValueError, match=r"the dropouts \[0.0, 0.5\]"):
        _trainer(tmp_path, bank=bank, data=make_rows(names=("one", "two")))
    # Each is saved with its own.
    assert [bank[name].spec.args.dropout for name in ("one", "two")] == [0.0, 0.5]


def test_new_adapters_with_heads_are_refused():
    with pytest.raises(AdapterError, match="trains classifier in addition"):
        AdapterBank.attach(make_model("bert"), sara_arguments(), NAMES)
    for names, message in (([], "at least one adapter"), ("red", "at least one adapter"), (["a", "a"], "already has")):
        with pytest.raises(ValueError, match=message):
            AdapterBank.attach(make_model(), sara_arguments(), names)


# ---- the model beside it ----


def test_the_base_is_frozen_and_free_again(tmp_path):
    model = make_model()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bank = AdapterBank.attach(model, sara_arguments(), NAMES)
    trainer = _trainer(tmp_path, bank=bank, arguments={"per_device_train_batch_size": 6})
    training = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(training) == 3
    assert all(".sara." in name for name in training)
    trainer.train()
    with pytest.raises(ValueError, match=r"Call bank.end_training\(\) first"):
        bank.remove("red")
    state = bank.state("red")
    bank.end_training()
    assert same_bits(bank.state("red"), state)
    bank.remove("green")
    bank.detach()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert same_bits(dict(model.state_dict()), bits)


def test_a_parameter_beside_the_bank_that_trains_is_refused(tmp_path):
    trainer = _trainer(tmp_path)
    trainer.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        trainer.train()


def test_training_again_goes_on_from_there(tmp_path):
    trainer = _trainer(tmp_path, arguments={"per_device_train_batch_size": 6, "max_steps": 2})
    trainer.train()
    first = trainer.bank.state("red")
    trainer.train()
    second = trainer.bank.state("red")
    assert not same_bits(first, second)
    trainer.bank.end_training()
    trainer.train()
    assert not same_bits(trainer.bank.state("red"), second)


def test_an_adapter_beside_the_bank_rests(tmp_path):
    bank = AdapterBank.attach(make_model(), sara_arguments(), NAMES)
    adapter = SaraAdapter.attach(bank.model, sara_arguments("mo_sara"), "beside")
    before = adapter.state_dict()
    _trainer(tmp_path, bank=bank, arguments={"per_device_train_batch_size": 6}).train()
    assert same_bits(adapter.state_dict(), before)
    # And the other way round.
    state = bank.state("red")
    args = training_arguments(tmp_path / "other", learning_rate=0.2)
    SaraTrainer(model=bank.model, args=args, train_dataset=dataset()).train()
    assert not same_bits(adapter.state_dict(), before)
    assert same_bits(bank.state("red"), state)


def test_trl_trains_a_bank(trl, tmp_path):
    class SaraSFTTrainer(SaraTrainerMixin, trl.SFTTrainer):
        pass

    bank = AdapterBank.attach(make_base(), sara_arguments(), NAMES)
    args = trl.SFTConfig(
        **{"output_dir": str(tmp_path), "max_steps": 3, "per_device_train_batch_size": 6, "use_cpu": True},
        **{"learning_rate": 0.05, "report_to": "none", "disable_tqdm": True, "bf16": False},
    )
    before = bank.state("red")
    data = make_rows().remove_columns("labels")
    trainer = SaraSFTTrainer(
        model=bank.model, args=args, bank=bank, train_dataset=data, processing_class=make_tokenizer()
    )
    trainer.train()
    assert not same_bits(before, bank.state("red"))


# ---- what a review found ----


def test_an_adapter_that_diverges_leaves_the_others_alone(tmp_path):
    bank = AdapterBank.attach(make_model(), sara_arguments(), NAMES)
    bank._table[bank._slots["red"]] *= 1e20
    arguments = {"per_device_train_batch_size": 6, "max_steps": 2, "save_strategy": "no"}
    trainer = _trainer(tmp_path, bank=bank, arguments=arguments)
    trainer.train()
    assert not all(tensor.isfinite().all() for tensor in bank.state("red").values())
    with pytest.raises(AdapterError, match=r"The adapter 'red' cannot be saved: .* NaN or infinite values"):
        trainer.save_model()
    for name in ("blue", "green"):
        assert all(tensor.isfinite().all() for tensor in bank.state(name).values())
        saved = SaraAdapter.load(make_model(), tmp_path / "run" / name).state_dict()
        assert same_bits(saved, bank.state(name))


@pytest.mark.parametrize(("size", "accumulation"), [(6, 1), (1, 6)])
def test_rows_whose_prompts_are_long(size, accumulation, tmp_path):
    """The labels stand at the end, and one row has none."""
    data = make_rows(count=24)
    labels = torch.tensor(data["input_ids"])
    labels[:, :6] = -100
    labels[13] = -100
    data = data.remove_columns("labels").add_column("labels", labels.tolist())
    make = lambda: make_model(dtype=torch.float64)  # noqa: E731
    folders = make_starts(tmp_path, make())
    values = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    bank = AdapterBank.load(make(), folders)
    args = in_order(
        tmp_path / "run", per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, **values
    )
    SaraTrainer(model=bank.model, args=args, bank=bank, train_dataset=data).train()
    for name in ("red", "green"):
        own = data.filter(lambda row, name=name: row["adapter_name"] == name)
        expected = train_alone(make(), tmp_path, folders[name], own, tmp_path / "alone", **values)
        for key, value in expected.items():
            torch.testing.assert_close(bank.state(name)[key], value, rtol=1e-6, atol=1e-6)


def sequence_means(outputs, labels, num_items_in_batch=None):
    each = nn.functional.cross_entropy(
        outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100
    )
    valid = (labels[:, 1:] != -100).sum(1).clamp(min=1)
    return (each.sum(1) / valid).mean()


def in_batch_contrast(outputs, labels, num_items_in_batch=None):
    means = nn.functional.normalize(outputs.logits.mean(1), dim=-1)
    return nn.functional.cross_entropy(means @ means.roll(1, 1).t(), torch.arange(len(means)))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("loss", [sequence_means, in_batch_contrast])
@pytest.mark.parametrize("size", [6, 16, 96])
def test_other_losses_are_refused_at_any_batch_size(loss, size, tmp_path):
    arguments = {"per_device_train_batch_size": size}
    trainer = _trainer(tmp_path, data=make_rows(count=96), arguments=arguments, compute_loss_func=loss)
    with pytest.raises(ValueError, match="is not the mean of those of the labels"):
        trainer.train()


def test_a_model_with_two_losses_is_refused(tmp_path):
    bank = AdapterBank.attach(_bert("BertForPreTraining"), sara_arguments(modules_to_save=[]), NAMES)
    with pytest.raises(
        ValueError, match="has the labels labels, next_sentence_label, of which a loss cannot be split"
    ):
        _trainer(tmp_path, bank=bank)


def test_the_loss_of_a_router_is_refused(tmp_path):
    values = {
        **{"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4},
        **{"intermediate_size": 32, "num_key_value_heads": 2, "num_local_experts": 2, "output_router_logits": True},
    }
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**values))
    bank = AdapterBank.attach(model, sara_arguments(), NAMES)
    trainer = _trainer(tmp_path, bank=bank, arguments={"per_device_train_batch_size": 6})
    with pytest.raises(ValueError, match=r"model\.config\.output_router_logits = False"):
        trainer.train()


@pytest.mark.parametrize("kind", ["classes", "answers"])
def test_rows_without_a_label_do_not_count(kind, tmp_path):
    make = KINDS[kind][0]
    data = make_rows(kind, count=24)
    for column in set(data.column_names) - {"input_ids", "adapter_name"}:
        values = list(data[column])
        # A label to ignore, and an answer behind the end of the text, in other batches than the first.
        for row in (13, 14, 20):
            values[row] = -100 if kind == "classes" else 99
        data = data.remove_columns(column).add_column(column, values)
    folders = make_starts(tmp_path, make())
    values = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    bank = AdapterBank.load(make(), folders)
    args = in_order(tmp_path / "run", per_device_train_batch_size=6, **values)
    SaraTrainer(model=bank.model, args=args, bank=bank, train_dataset=data).train()
    for name in NAMES:
        own = data.filter(lambda row, name=name: row["adapter_name"] == name)
        expected = train_alone(make(), tmp_path, folders[name], own, tmp_path / "alone", **values)
        for key, value in expected.items():
            torch.testing.assert_close(bank.state(name)[key], value, rtol=1e-6, atol=1e-6)


def test_pairs_in_the_place_of_rows_are_refused(trl, tmp_path):
    class SaraRewardTrainer(SaraTrainerMixin, trl.RewardTrainer):
        pass

    config = transformers.LlamaConfig(vocab_size=400, hidden_size=24, num_hidden_layers=1, num_attention_heads=4)
    config.update({"intermediate_size": 32, "num_labels": 1, "pad_token_id": 0})
    bank = AdapterBank.attach(
        transformers.LlamaForSequenceClassification(config), sara_arguments(modules_to_save=[]), NAMES
    )
    args = trl.RewardConfig(
        **{"output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 6, "use_cpu": True},
        **{"report_to": "none", "disable_tqdm": True, "bf16": False},
    )
    data = Dataset.from_dict(
        {"chosen": ["The fox ."] * 12, "rejected": ["A dog ."] * 12, "adapter_name": [*ROWS, *ROWS]}
    )
    before = bank.state("red")
    with pytest.raises(ValueError, match=r"The batch has 6 examples, and the model would get 12 rows|has the labels"):
        SaraRewardTrainer(
            model=bank.model, args=args, bank=bank, train_dataset=data, processing_class=make_tokenizer()
        ).train()
    assert same_bits(before, bank.state("red"))


def test_packing_is_refused(trl, tmp_path):
    class SaraSFTTrainer(SaraTrainerMixin, trl.SFTTrainer):
        pass

    args = trl.SFTConfig(
        **{"output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True},
        **{"report_to": "none", "disable_tqdm": True, "bf16": False, "padding_free": True, "max_length": None},
    )
    bank = AdapterBank.attach(make_base(), sara_arguments(), NAMES)
    with pytest.raises(ValueError, match="no packing, no padding_free"):
        SaraSFTTrainer(
            model=bank.model,
            args=args,
            bank=bank,
            train_dataset=make_rows().remove_columns("labels"),
            processing_class=make_tokenizer(),
        ).train()


def test_a_trainer_goes_on_after_another_one_had_the_bank(tmp_path):
    arguments = {"per_device_train_batch_size": 6, "max_steps": 2}
    trainer = _trainer(tmp_path, arguments=arguments)
    trainer.train()
    trainer.bank.end_training()
    _trainer(tmp_path, bank=trainer.bank, arguments=arguments)
    before = trainer.bank.state("red")
    trainer.train()
    assert not same_bits(before, trainer.bank.state("red"))


def test_workers_that_live_on_know_the_names(tmp_path):
    values = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "per_device_eval_batch_size": 6}
    bank = AdapterBank.attach(make_model(), sara_arguments(), NAMES)
    trainer = _trainer(tmp_path, bank=bank, arguments=values, eval_dataset=make_rows(seed=4))
    before = trainer.evaluate()["eval_loss"]
    bank.save_pretrained(tmp_path, "red")
    bank.end_training()
    bank.add("another", tmp_path / "red")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before)


@pytest.mark.parametrize(
    "name", ["checkpoint-2", "optimizer.pt", "training_args.json", "global_step3", "../up", "runs"]
)
def test_names_of_a_trainings_own_files_are_refused(name, tmp_path):
    bank = AdapterBank.attach(make_model(), sara_arguments(), [name, "red"])
    with pytest.raises(ValueError, match="cannot be saved in a folder of its name"):
        _trainer(tmp_path, bank=bank, data=make_rows(names=(name, "red")))
    # The refused trainer leaves nothing behind.
    assert not bank.trained()
    assert all(parameter.requires_grad for parameter in bank.model.lm_head.parameters())
    bank.remove(name)


def test_what_a_bank_has_got_later_is_checked_too(tmp_path):
    bank = AdapterBank.attach(make_model(), sara_arguments(), ["red"])
    bank.save_pretrained(tmp_path)
    trainer = _trainer(tmp_path, bank=bank, data=make_rows(names=("red",)), arguments={"optim": "adafactor"})
    trainer.train()
    bank.end_training()
    bank.add("blue", tmp_path / "red")
    with pytest.raises(ValueError, match="optim='adafactor' may look at the shapes"):
        trainer.train()
    bank.add("../up", tmp_path / "red")
    with pytest.raises(ValueError, match="cannot be saved in a folder of its name"):
        trainer.save_model()
    assert not (tmp_path / "up").exists()


def test_the_base_thaws_when_nothing_needs_it_frozen(tmp_path):
    def free(model):
        return sum(parameter.requires_grad for name, parameter in model.named_parameters() if ".sara." not in name)

    count = free(make_model())
    for order in range(2):
        bank = AdapterBank.attach(make_model(), sara_arguments(), NAMES)
        _trainer(tmp_path, bank=bank)
        adapter = SaraAdapter.attach(bank.model, sara_arguments(), "beside")
        for one in (bank, adapter)[:: -1 if order else 1]:
            assert free(bank.model) == 0
            one.detach()
        assert free(bank.model) == count
        assert not [name for name in vars(bank.model) if name.startswith("sara")]
    first = AdapterBank.attach(make_model(), sara_arguments(), NAMES)
    second = AdapterBank.attach(first.model, sara_arguments(), ["one", "two"])
    _trainer(tmp_path, bank=first)
    trainer = _trainer(tmp_path, bank=second, data=make_rows(names=("one", "two")))
    first.detach()
    assert free(second.model) == 0
    trainer.train()


@pytest.mark.parametrize("kind", ["a column", "a name"])
def test_evaluation_data_are_looked_at_before_the_training(kind, tmp_path):
    data = make_rows().remove_columns("adapter_name") if kind == "a column" else make_rows(names=("red", "pink"))
    message = "The first data have the columns" if kind == "a column" else "has 'pink', and the bank has"
    with pytest.raises(ValueError, match=message):
        _trainer(tmp_path, eval_dataset={"first": data})


def test_the_base_can_be_evaluated_beside_them(tmp_path):
    trainer = _trainer(tmp_path, eval_dataset=make_rows(names=("red", BASE)))
    assert trainer.evaluate()["eval_loss"] > 0
    trainer = _trainer(tmp_path, bank=None, data=list(make_rows(names=("red", BASE))))
    with pytest.raises(ValueError, match="has '__base__', and the bank has the adapters blue"):
        trainer.train()


def test_clear_errors(tmp_path):
    trainer = _trainer(tmp_path)
    trainer.bank.detach()
    with pytest.raises(ValueError, match="The bank was detached from its model"):
        trainer.train()
    trainer = _trainer(tmp_path, data_collator=list)
    with pytest.raises(ValueError, match="The collator makes a list of the rows"):
        trainer.train()


def test_a_finished_run_of_a_classifier_keeps_the_kind_of_its_loss(tmp_path):
    folders = make_starts(tmp_path, KINDS["classes"][0]())

    def trainer():
        bank = AdapterBank.load(KINDS["classes"][0](), folders)
        args = in_order(tmp_path / "run", per_device_train_batch_size=6, max_steps=2)
        return SaraTrainer(model=bank.model, args=args, bank=bank, train_dataset=make_rows("classes"))

    trainer().train()
    again = trainer()
    again.train(resume_from_checkpoint=True)
    again.save_model()
    config = json.loads((tmp_path / "run" / "red" / "sara_config.json").read_text())
    assert config["base"]["problem_type"] == "single_label_classification"


def test_the_loss_is_looked_at_once(tmp_path, monkeypatch):
    for size in (1, 6):
        trainer = _trainer(tmp_path, arguments={"per_device_train_batch_size": size})
        seen = []
        look = trainer._sara_rows._look_at_loss
        monkeypatch.setattr(
            trainer._sara_rows, "_look_at_loss", lambda *a, look=look, seen=seen: seen.append(look(*a))
        )
        trainer.train()
        assert len(seen) == 1


def test_a_copy_of_a_model_whose_bank_trains_has_a_table_of_its_own():
    model = make_model()
    bank = AdapterBank.attach(model, sara_arguments(), NAMES)
    bank.train_alone()
    other = copy.deepcopy(model).sara_banks[0]
    with torch.no_grad():
        other.trained()["red"].add_(1.0)
    assert not same_bits(other.state("red"), bank.state("red"))
    assert same_bits(other.state("blue"), bank.state("blue"))
