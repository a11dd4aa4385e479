"""hf_sara: SARA and Mo-SARA adapters for Hugging Face models (https://arxiv.org/abs/2408.03290)."""

from importlib import import_module
from typing import TYPE_CHECKING

from .adapter import SaraAdapter
from .arguments import SaraArguments
from .plan import Plan, plan
from .storage import AdapterError

if TYPE_CHECKING:
    from .export import ExportReport, export_lora, merge, merge_shards
    from .trainer import SaraSeq2SeqTrainer, SaraTrainer, SaraTrainerMixin

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "ExportReport",
    "Plan",
    "SaraAdapter",
    "SaraArguments",
    "SaraSeq2SeqTrainer",
    "SaraTrainer",
    "SaraTrainerMixin",
    "export_lora",
    "merge",
    "merge_shards",
    "plan",
]


# What inference does not need loads on first use: the Trainer imports much.
LAZY = {
    **dict.fromkeys(("SaraTrainer", "SaraSeq2SeqTrainer", "SaraTrainerMixin"), "trainer"),
    **dict.fromkeys(("ExportReport", "export_lora", "merge", "merge_shards"), "export"),
}


def __getattr__(name: str):
    if name in LAZY:
        return getattr(import_module(f".{LAZY[name]}", __name__), name)
    raise AttributeError(f"module 'hf_sara' has no attribute {name!r}")
