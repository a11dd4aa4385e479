"""
The versions of the libraries below hf_sara: what differs between them, and how far they were tested.

setup.cfg has the oldest versions that work. Where versions differ, a function here hides it, and says which version
makes the function superfluous.
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version
from transformers import TrainingArguments

# The newest versions that the tests ran with.
TESTED = {"transformers": "5.24", "torch": "2.13", "accelerate": "1.15", "huggingface_hub": "2.4", "peft": "0.21"}


def untested() -> list[str]:
    """The installed libraries that are newer than all versions that the tests ran with, as `transformers 5.30.1`."""
    newer = []
    for name, last in TESTED.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if Version(installed).release[:2] > Version(last).release:
            newer.append(f"{name} {installed}")
    return newer


def checkpoints_activations(args: TrainingArguments) -> bool:
    """Whether a training computes activations twice. The name is another one before transformers 5.23."""
    return bool(getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None))
