"""hf_sara: SARA and Mo-SARA adapters for Hugging Face models (https://arxiv.org/abs/2408.03290)."""

from typing import TYPE_CHECKING

from .adapter import SaraAdapter
from .arguments import SaraArguments
from .plan import Plan, plan
from .storage import AdapterError

if TYPE_CHECKING:
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
    "plan",
]


def __getattr__(name: str):
    # The Trainer imports much that inference does not need, so it loads on first use.
    if name in ("SaraTrainer", "SaraSeq2SeqTrainer", "SaraTrainerMixin"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'hf_sara' has no attribute {name!r}")
