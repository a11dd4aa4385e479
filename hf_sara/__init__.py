"""hf_sara: SARA and Mo-SARA adapters for Hugging Face models (https://arxiv.org/abs/2408.03290)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapter import SaraAdapter
    from .analysis import (
        plot_correlation,
        plot_rank_curves,
        plot_routing,
        rank_correlation,
        rank_curves,
        routing,
    )
    from .arguments import SaraArguments
    from .bank import AdapterBank
    from .errors import AdapterError
    from .export import ExportReport, export_lora
    from .merge_files import merge_shards
    from .plain_model import merge
    from .plan_file import load_plan, save_plan
    from .planning import Plan, plan
    from .row_names import adapter_rows
    from .sharing import from_hub, push_to_hub
    from .trainer import SaraSeq2SeqTrainer, SaraTrainer, SaraTrainerMixin

__version__ = "0.1.0"

__all__ = [
    "AdapterBank",
    "AdapterError",
    "ExportReport",
    "Plan",
    "SaraAdapter",
    "SaraArguments",
    "SaraSeq2SeqTrainer",
    "SaraTrainer",
    "SaraTrainerMixin",
    "adapter_rows",
    "export_lora",
    "from_hub",
    "load_plan",
    "merge",
    "merge_shards",
    "plan",
    "plot_correlation",
    "plot_rank_curves",
    "plot_routing",
    "push_to_hub",
    "rank_correlation",
    "rank_curves",
    "routing",
    "save_plan",
]

# Every name is loaded at its first use, because torch and transformers take seconds to import, and the `--help` of a
# command needs neither.
_HOMES = {
    "adapter": ("SaraAdapter",),
    "analysis": (
        "plot_correlation",
        "plot_rank_curves",
        "plot_routing",
        "rank_correlation",
        "rank_curves",
        "routing",
    ),
    "arguments": ("SaraArguments",),
    "bank": ("AdapterBank",),
    "errors": ("AdapterError",),
    "export": ("ExportReport", "export_lora"),
    "merge_files": ("merge_shards",),
    "plain_model": ("merge",),
    "plan_file": ("load_plan", "save_plan"),
    "planning": ("Plan", "plan"),
    "row_names": ("adapter_rows",),
    "sharing": ("from_hub", "push_to_hub"),
    "trainer": ("SaraSeq2SeqTrainer", "SaraTrainer", "SaraTrainerMixin"),
}


def __getattr__(name: str):
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{home}", __name__), name)
    raise AttributeError(f"module 'hf_sara' has no attribute {name!r}")
