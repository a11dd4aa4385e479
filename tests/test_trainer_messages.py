"""What a training says by itself: about its learning rate, about Ctrl-C, and on its card."""

import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer, same_bits, sara_arguments
from training import At, dataset, log_of, make_trainer, training_arguments
from transformers import AutoTokenizer

from hf_sara import SaraAdapter, SaraTrainer, merge
from hf_sara.model_card import CARD_FILE
from hf_sara.trainer.interrupts import TrainingInterrupted
from hf_sara.trainer.resuming import last_complete_checkpoint


def warnings_of(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


# ---- the learning rate ----


@pytest.mark.parametrize(
    ("method", "rate", "said"),
    [
        ("sara", 5e-5, "Try 0.02 for up to a few hundred steps, and 0.001 for thousands"),
        ("sara", 3e-3, None),
        ("mo_sara", 8e-3, "Try 0.2 for up to a few hundred steps, and 0.03 for thousands"),
        ("mo_sara", 2e-2, "Try 0.2 for up to a few hundred steps"),
        ("mo_sara", 3e-2, None),
    ],
)
def test_a_learning_rate_that_is_too_small_is_said_once(method, rate, said, tmp_path, caplog):
    trainer = make_trainer(tmp_path, method, learning_rate=rate, max_steps=1, save_strategy="no")
    trainer.train()
    trainer.train()
    found = [message for message in warnings_of(caplog) if "learns next to nothing" in message]
    assert len(found) == (said is not None)
    assert said is None or (said in found[0] and f"learning_rate={rate:g}" in found[0])


def test_the_rate_is_that_of_the_optimizer(tmp_path, caplog):
    model = make_model()
    adapter = SaraAdapter.attach(model, sara_arguments("sara"))
    optimizer = torch.optim.SGD(adapter.trained().values(), lr=0.5)
    args = training_arguments(tmp_path, learning_rate=5e-5, max_steps=1, save_strategy="no")
    SaraTrainer(model, args, train_dataset=dataset(), optimizers=(optimizer, None)).train()
    assert not [message for message in warnings_of(caplog) if "learns next to nothing" in message]


@pytest.mark.parametrize(("heads", "said"), [(1, False), (3, True)])
def test_an_adapter_that_cannot_be_merged_says_so_before_it_is_trained(heads, said, tmp_path, caplog):
    args = sara_arguments("mo_sara", num_heads=heads)
    make_trainer(tmp_path, sara_args=args, max_steps=1, save_strategy="no").train()
    assert any("can be neither merged nor exported" in message for message in warnings_of(caplog)) == said


# ---- Ctrl-C ----


@pytest.fixture
def terminal():
    """A process that a person can interrupt. A job in the background, as this test run may be, ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    sys.excepthook = sys.__excepthook__


def interrupt_at(step: int) -> At:
    return At(step, lambda control: signal.raise_signal(signal.SIGINT))


@pytest.mark.parametrize("step", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_ctrl_c_ends_after_a_step_with_a_checkpoint_to_go_on_from(step, tmp_path, terminal):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    trainer = make_trainer(tmp_path / "run")
    trainer.add_callback(interrupt_at(step))
    with pytest.raises(
        TrainingInterrupted, match=r"after step [345] of 7. Go on .*resume_from_checkpoint=True"
    ) as info:
        trainer.train()
    assert isinstance(info.value, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert last_complete_checkpoint(tmp_path / "run").endswith(f"checkpoint-{trainer.state.global_step}")
    resumed = make_trainer(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(resumed.sara_adapter.state_dict(), whole.sara_adapter.state_dict())
    assert log_of(resumed) == log_of(whole)


def test_the_second_ctrl_c_ends_at_once(tmp_path, terminal):
    trainer = make_trainer(tmp_path)

    def twice(control):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    trainer.add_callback(At(3, twice))
    with pytest.raises(KeyboardInterrupt) as info:
        trainer.train()
    assert not isinstance(info.value, TrainingInterrupted)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_checkpoints_ctrl_c_says_so(tmp_path, terminal):
    trainer = make_trainer(tmp_path, save_strategy="no")
    trainer.add_callback(interrupt_at(3))
    with pytest.raises(TrainingInterrupted, match="No checkpoint was written"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_another_handler_of_the_signal_is_left_alone(tmp_path):
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        trainer = make_trainer(tmp_path, save_strategy="no")
        trainer.add_callback(interrupt_at(3))
        assert trainer.train().global_step == 7
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [1]


@pytest.mark.slow
def test_a_script_that_is_interrupted_ends_with_one_line(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from training import At, make_trainer
trainer = make_trainer({str(tmp_path)!r})
trainer.add_callback(At(3, lambda control: signal.raise_signal(signal.SIGINT)))
trainer.train()
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode != 0
    assert "Traceback" not in child.stderr
    assert child.stderr.strip().splitlines()[-1].startswith("The training was interrupted after step")


def test_the_time_of_a_resumed_run_is_said_to_be_that_of_all_calls(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(At(4, lambda control: setattr(control, "should_training_stop", True)))
    trainer.train()
    assert "train_runtime" not in caplog.text
    make_trainer(tmp_path).train(resume_from_checkpoint=True)
    assert "train_runtime and the speeds are those of the whole training" in caplog.text


# ---- the card ----


def test_a_card_is_written_with_the_adapter_and_not_before(tmp_path, caplog):
    trainer = make_trainer(tmp_path, save_strategy="no", eval_strategy="steps", eval_steps=7)
    trainer.train()
    trainer.create_model_card(model_name="My adapter", dataset="someone/data")
    assert not (tmp_path / CARD_FILE).exists()
    assert "is not saved in" in caplog.text
    trainer.save_model()
    card = (tmp_path / CARD_FILE).read_text()
    # It has what was said before it was written, and the last evaluation.
    assert "# My adapter" in card
    assert "someone/data" in card
    assert "eval\\_loss" in card
    assert "not saved yet" not in card
    for name in ("learning\\_rate", "lr\\_scheduler\\_type", "max\\_steps", "per\\_device\\_train\\_batch\\_size"):
        assert f"| {name} |" in card
    # An older card in another folder is not this adapter's.
    trainer.save_model(str(tmp_path / "other"))
    assert (tmp_path / "other" / CARD_FILE).is_file()


def test_a_save_over_a_card_leaves_a_true_one(tmp_path):
    trainer = make_trainer(tmp_path / "run", save_strategy="no")
    trainer.train()
    trainer.save_model()
    before = (tmp_path / "run" / CARD_FILE).read_text()
    other = make_trainer(tmp_path / "x", "mo_sara", save_strategy="no")
    other.sara_adapter.save_pretrained(tmp_path / "run")
    after = (tmp_path / "run" / CARD_FILE).read_text()
    assert "| method | SARA |" in before
    assert "| method | Mo-SARA |" in after
    assert "Nothing is recorded." in after
    # Without a card, none is written.
    other.sara_adapter.save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / CARD_FILE).exists()


def test_the_snippet_of_a_local_card_does_not_say_where_the_folder_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("secret-place/one", str(tmp_path / "secret-place" / "one")):
        trainer = make_trainer(folder, save_strategy="no", max_steps=1)
        trainer.save_model()
        card = Path(folder, CARD_FILE).read_text()
        assert 'from_hub("path/to/this/adapter"' in card
        assert "secret-place" not in card


def test_a_card_is_written_for_an_adapter_that_was_saved_by_itself(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="no", max_steps=1)
    trainer.train()
    trainer.sara_adapter.save_pretrained(tmp_path)
    trainer.create_model_card(license="mit")
    assert "license: mit" in (tmp_path / CARD_FILE).read_text()


def test_a_card_that_cannot_be_written_does_not_stop_a_save(tmp_path, caplog):
    (tmp_path / CARD_FILE).mkdir()
    trainer = make_trainer(tmp_path, save_strategy="no", max_steps=1)
    trainer.save_model()
    assert "model card cannot be written" in caplog.text
    assert same_bits(SaraAdapter.load(make_model(), tmp_path).state_dict(), trainer.sara_adapter.state_dict())


# ---- the tokenizer ----


def test_the_tokenizer_goes_with_the_adapter_and_with_a_merged_model(tmp_path):
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    args = training_arguments(tmp_path / "run", save_strategy="no", max_steps=1)
    trainer = SaraTrainer(model, args, train_dataset=dataset(), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    merge(trainer.model, tmp_path / "merged")
    tokenizer.add_tokens(["<star>"])
    merge(trainer.model, tmp_path / "given", tokenizer=tokenizer)
    for folder, size in (("run", -1), ("merged", -1), ("given", 0)):
        found = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert len(found) == len(tokenizer) + size
        assert found("The quick fox")["input_ids"] == tokenizer("The quick fox")["input_ids"]
