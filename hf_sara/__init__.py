"""hf_sara: SARA and Mo-SARA adapters for Hugging Face models (https://arxiv.org/abs/2408.03290)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapter import SaraAdapter
    from .arguments import SaraArguments
    from .hub import from_hub, push_to_hub
    from .planning import Plan, plan
    from .storage import AdapterError
    from .trainer import SaraSeq2SeqTrainer, SaraTrainer, SaraTrainerMixin

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "Plan",
    "SaraAdapter",
    "SaraArguments",
    "SaraSeq2SeqTrainer",
    "SaraTrainer",
    "SaraTrainerMixin",
    "from_hub",
    "plan",
    "push_to_hub",
]

# Every name loads on first use: torch and transformers take seconds, and a command's --help needs neither.
_HOMES = {
    "AdapterError": "storage",
    "Plan": "planning",
    "SaraAdapter": "adapter",
    "SaraArguments": "arguments",
    "SaraSeq2SeqTrainer": "trainer",
    "SaraTrainer": "trainer",
    "SaraTrainerMixin": "trainer",
    "from_hub": "hub",
    "plan": "planning",
    "push_to_hub": "hub",
}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'hf_sara' has no attribute {name!r}")
