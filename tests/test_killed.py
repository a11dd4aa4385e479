"""
Trainings that are killed at random moments, again and again, and resumed until they are finished.

HF_SARA_KILLED_RUNS=40 python -m pytest -m slow tests/test_killed.py
"""

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from conftest import sara_arguments
from training import MODELS, log_of, make_trainer

from hf_sara.storage import TENSORS_FILE
from hf_sara.trainer import last_complete_checkpoint

RUNS = int(os.environ.get("HF_SARA_KILLED_RUNS", "8"))
STEPS = 12


def train_to_the_end(folder: Path, seed: int) -> None:
    """Train a head and rows of the embedding beside the updates, from the last checkpoint on."""
    arguments = sara_arguments("sara" if seed % 2 else "mo_sara", dropout=0.1, trainable_token_indices=[4, 9, 21])
    changes = {"seed": seed, "max_steps": STEPS, "save_steps": 2, "save_total_limit": 3}
    trainer = make_trainer(folder, model=MODELS["classifier"](), sara_args=arguments, **changes)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder) is not None)
    trainer.save_model()
    (folder / "log.json").write_text(json.dumps(log_of(trainer)))


def outcome(folder: Path) -> tuple[bytes, list]:
    """The bytes of the adapter, and the log."""
    return (folder / TENSORS_FILE).read_bytes(), json.loads((folder / "log.json").read_text())


def ended_within(seconds: float, folder: Path, seed: int) -> bool:
    """Train in a process of its own, which has imported everything already, and kill it after some seconds."""
    child = os.fork()
    if not child:
        status = 1
        try:
            train_to_the_end(folder, seed)
            status = 0
        finally:
            os._exit(status)
    alarm = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
    alarm.start()
    _, status = os.waitpid(child, 0)
    alarm.cancel()
    assert status in (0, signal.SIGKILL), f"The training failed with the status {status}."
    return status == 0


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_trainings_that_are_killed_at_random_moments_end_with_the_bits_of_uninterrupted_ones(tmp_path, capsys):
    kills, torn = [], 0
    for seed in range(RUNS):
        dice = random.Random(seed)
        whole, folder = tmp_path / f"whole{seed}", tmp_path / f"killed{seed}"
        start = time.monotonic()
        train_to_the_end(whole, seed)
        seconds = time.monotonic() - start
        count = 0
        # It may take longer on a machine that others use too, so the time that a training has grows slowly.
        while not ended_within(dice.uniform(0.1, 1.2) * seconds * (1 + count / 20), folder, seed):
            count += 1
            torn += any(not (path / "trainer_state.json").exists() for path in folder.glob("checkpoint-*"))
            assert count < 100
        here, there = outcome(folder), outcome(whole)
        assert here[0] == there[0], f"seed {seed}, killed {count} times"
        assert here[1] == there[1], f"seed {seed}, killed {count} times"
        kills.append(count)
    with capsys.disabled():
        print(f"\n{RUNS} trainings of {STEPS} steps, killed {sum(kills)} times: {kills}")  # noqa: T201
        print(f"{torn} times a checkpoint was cut off")  # noqa: T201
    assert sum(kills) >= RUNS / 2
