"""Adapters in PEFT's LoRA format, which can be loaded without hf_sara.

A SARA update and a Mo-SARA update of one head are low-rank products, so the export is exact. A Mo-SARA update of
several heads depends on the token and has no such form.
"""

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from .adapter import SaraAdapter, adapter_of
from .base_model import BaseRecord, class_of, names_in_checkpoint
from .files import naming, new_folder
from .linears import linear_shape
from .parts import ModulePart, TokenPart
from .patterns import is_of_update
from .sites import PlannedSite
from .spread import is_spread
from .targets import fused_experts
from .tensor_files import check_tensors, to_bytes

logger = logging.getLogger(__name__)

LORA_CONFIG_FILE = "adapter_config.json"
LORA_TENSORS_FILE = "adapter_model.safetensors"
# PEFT moves a LoRA of these names to the parameter in which transformers 5 fuses experts.
NAMES_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3")


@dataclass(frozen=True)
class ExportReport:
    """
    A report of what [`export_lora`] wrote.

    Args:
        ranks (`dict[str, int]`): The LoRA rank of each module.
        errors (`dict[str, float]`): The error that `max_rank` caused in each module's update: the Frobenius norm of
            the difference divided by that of the update. It is zero where nothing was cut.
        size (`int`): Bytes of the two files.
    """

    ranks: dict[str, int]
    errors: dict[str, float]
    size: int

    @property
    def largest_error(self) -> float:
        """The largest of the relative errors."""
        return max(self.errors.values())

    def __str__(self) -> str:
        ranks = self.ranks.values()
        text = f"{len(ranks)} modules, rank {min(ranks)} to {max(ranks)}, {self.size:,} bytes"
        if self.largest_error == 0.0:
            return f"{text}, exact"
        worst = max(self.errors, key=self.errors.__getitem__)
        cut = sum(error > 0.0 for error in self.errors.values())
        return f"{text}, {cut} modules cut, relative error up to {self.largest_error:.3g} ({worst})"


def export_lora(
    model_or_adapter: nn.Module | SaraAdapter,
    folder: str | PathLike,
    *,
    max_rank: int | None = None,
    base_model_name_or_path: str | None = None,
) -> ExportReport:
    """
    Write an adapter as a plain LoRA folder, which `PeftModel.from_pretrained`, `model.load_adapter`, vLLM and others
    can read. Writing it does not need PEFT.

    Args:
        model_or_adapter ([`~transformers.PreTrainedModel`] or [`SaraAdapter`]): The adapted model, or its adapter.
        folder (`str` or `os.PathLike`): The folder to write to. It is made if it does not exist.
        max_rank (`int`, *optional*): The rank to which a larger one is cut, with the least possible error. If it is
            left out, the export is exact. The rank of a fused module is the sum of those of its projections.
        base_model_name_or_path (`str`, *optional*): The base that the LoRA names. Defaults to the base's Hub id, if it
            has one.

    Returns:
        [`ExportReport`]: Ranks, errors and size.

    Raises:
        `ValueError`: For Mo-SARA with more than one head (its update depends on the token), for a tensor that is not
            finite, and for a model that carries several adapters or none. Nothing is written then.
    """
    adapter = adapter_of(model_or_adapter)
    adapter.spec.method.refuse_export()
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank={max_rank} has to be at least 1. Leave it out for an exact export.")
    _refuse_parts(adapter)
    _refuse_two_places(adapter)
    _warn_of_experts(adapter)
    idle = adapter.idle_sites()
    pairs = {name: _lora_pair(adapter, name, idle) for name in dict.fromkeys(site.module for site in adapter.sites)}
    # PEFT renames a LoRA's tensors as transformers renames those of the base.
    stored = names_in_checkpoint(adapter.model, [f"{name}.weight" for name in pairs])
    # This is checked before anything is cut, because a decomposition of numbers that are not finite fails without
    # naming the tensor.
    exact = _lora_tensors(pairs, stored)
    check_tensors(exact, {key: tuple(tensor.shape) for key, tensor in exact.items()})
    errors = dict.fromkeys(pairs, 0.0)
    for name, (A, B) in pairs.items():
        if max_rank is not None and A.shape[0] > max_rank:
            A, B, errors[name] = truncate(A, B, max_rank)
            pairs[name] = A, B
    ranks = {name: A.shape[0] for name, (A, _) in pairs.items()}
    payload = to_bytes({**_lora_tensors(pairs, stored), **_part_tensors(adapter)})
    config = json.dumps(_lora_config(adapter, ranks, base_model_name_or_path), indent=2).encode() + b"\n"
    with new_folder(Path(folder)) as new:
        for name, content in ((LORA_TENSORS_FILE, payload), (LORA_CONFIG_FILE, config)):
            with naming(new / name):
                (new / name).write_bytes(content)
    adapter.warn_of_idle(idle)
    report = ExportReport(ranks, errors, len(payload) + len(config))
    logger.info("Exported a LoRA: %s", report)
    return report


def _refuse_parts(adapter: SaraAdapter) -> None:
    """Raise a `ValueError` if this process has only a part of what trains, as after a training with FSDP."""
    tensors = {site.name: tensor for site, delta in adapter.deltas() for tensor in delta.parameters()}
    spread = next((name for name, tensor in {**adapter.trained(), **tensors}.items() if is_spread(tensor)), None)
    if spread is not None:
        raise ValueError(
            f"{spread}: FSDP or DeepSpeed spreads the adapter over the processes. Save it with trainer.save_model(), "
            "and export what is saved: hf-sara export."
        )


def _refuse_two_places(adapter: SaraAdapter) -> None:
    """Raise a `ValueError` if an adapted module is in two places of the model, of which PEFT would adapt one."""
    adapted = {id(site.linear(adapter.model)): site.module for site in adapter.sites}
    for name, module in adapter.model.named_modules(remove_duplicate=False):
        first = adapted.get(id(module), name)
        if name != first:
            raise ValueError(
                f"{first} and {name} are the same module, and a LoRA of PEFT would be on one of them only. Give each "
                "place a module of its own before the adapter is attached, or share the adapter itself."
            )


def _warn_of_experts(adapter: SaraAdapter) -> None:
    """Warn of linears that PEFT takes for experts, and so does not load, because they have the names of experts."""
    names = [site.module for site in adapter.sites if site.module.rsplit(".", 1)[-1] in NAMES_OF_EXPERTS]
    if names and fused_experts(adapter.model):
        logger.warning(
            "PEFT takes %s for fused experts of this %s, because of the name, and does not load their LoRA. Leave "
            "such modules out with exclude_modules, or merge the adapter, if PEFT is to load it.",
            ", ".join(names[:5]) + (" ..." if len(names) > 5 else ""),
            type(adapter.model).__name__,
        )


def _lora_pair(
    adapter: SaraAdapter, module_name: str, idle: Collection[PlannedSite]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    lora_A (k, d_in) and lora_B (d_out, k) of a module. The projections of a fused one follow one another. Those of
    idle sites are zero.
    """
    d_in, d_out = linear_shape(adapter.model.get_submodule(module_name))
    sites = [site for site in adapter.sites if site.module == module_name]
    # The projections of a fused module share its input, so A is stacked. In B, each projection fills its own rows and
    # columns.
    A = torch.zeros(sum(site.k for site in sites), d_in)
    B = torch.zeros(d_out, len(A))
    start = 0
    for site in sites:
        U, S, Vh = (factor.detach().cpu() for factor in adapter.delta(site).low_rank())
        # Each side gets the square root of |S|, and one side gets the sign too.
        root = S.abs().sqrt()
        A[start : start + site.k] = (U * root).t()
        rows = B[:, start : start + site.k]
        rows = rows if site.slice is None else site.slice.view(rows, dim=0)
        if site not in idle:
            rows.copy_(((S.sign() * root)[:, None] * Vh).t().reshape(rows.shape))
        start += site.k
    return A, B


def truncate(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """
    The best approximation of the product B A at a lower rank, found without forming the product.

    Args:
        A (`torch.Tensor` of shape `(k, d_in)`): Right factor.
        B (`torch.Tensor` of shape `(d_out, k)`): Left factor.
        rank (`int`): The largest rank that is kept.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, float]`: The new A and B, and the relative error in the Frobenius norm.
    """
    left, small_left = torch.linalg.qr(B.double())
    right, small_right = torch.linalg.qr(A.double().t())
    P, S, Qh = torch.linalg.svd(small_left @ small_right.t(), full_matrices=False)
    root = S[:rank].sqrt()
    new_A = (root[:, None] * Qh[:rank] @ right.t()).to(A.dtype)
    new_B = (left @ P[:, :rank] * root).to(B.dtype)
    whole = float(torch.linalg.vector_norm(S))
    return new_A, new_B, float(torch.linalg.vector_norm(S[rank:])) / whole if whole > 0.0 else 0.0


def _lora_tensors(
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], stored: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA under PEFT's names, in which each module has its name in a checkpoint."""
    return {
        f"base_model.model.{stored[f'{name}.weight'].removesuffix('.weight')}.{key}.weight": tensor.contiguous()
        for name, pair in pairs.items()
        for key, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    }


def _part_tensors(adapter: SaraAdapter) -> dict[str, torch.Tensor]:
    """What is trained beside the updates, under PEFT's names."""
    state = adapter.state_dict()
    found = {}
    for part in adapter.parts:
        if isinstance(part, TokenPart):
            found[f"{part.name}.token_adapter.trainable_tokens_delta"] = state[part.key]
        else:
            found |= {name: state[name] for name in (*part.trained_shapes(), *part.buffer_shapes())}
            # PEFT gives each module a copy of its own, also where two have the same weight.
            found |= {f"{part.name}.{name}": state[other].clone() for name, other in part.ties.items()}
    check_tensors(found, {name: tuple(tensor.shape) for name, tensor in found.items()})
    return {f"base_model.model.{name}": tensor for name, tensor in found.items()}


def _lora_config(adapter: SaraAdapter, ranks: dict[str, int], base_name: str | None) -> dict[str, Any]:
    model = adapter.model
    base = BaseRecord.of(model)
    task = _task_type(base.class_name)
    # PEFT takes the first pattern with which the module's name ends, so a longer name has to come before its own end.
    patterns = {name: ranks[name] for name in sorted(ranks, key=len, reverse=True)}
    largest = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": task,
        # If there is no task, PEFT needs this entry to find the class of the base.
        "auto_mapping": None
        if task
        else {"base_model_class": base.class_name, "parent_library": class_of(model).__module__},
        "base_model_name_or_path": base_name or base.model_id,
        "revision": None if base_name else base.revision,
        "inference_mode": True,
        # Rank and alpha are equal everywhere, so that every scaling is 1.
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "lora_dropout": adapter.args.dropout,
        "target_modules": _target_modules(model, ranks),
        "fan_in_fan_out": any(isinstance(model.get_submodule(name), Conv1D) for name in ranks),
        "bias": "none",
        "modules_to_save": _modules_to_save(adapter) or None,
        "trainable_token_indices": {
            part.name: list(part.indices) for part in adapter.parts if isinstance(part, TokenPart)
        }
        or None,
    }


def _modules_to_save(adapter: SaraAdapter) -> list[str]:
    """
    The names of the modules that are trained in full. PEFT takes every module whose name ends with one of them, so a
    name with which another one ends gets the prefix that all names have in PEFT's model.
    """
    others = [name for name, _ in adapter.model.named_modules() if not is_of_update(name)]
    names = [part.name for part in adapter.parts if isinstance(part, ModulePart)]
    return [
        f"base_model.model.{name}" if any(other.endswith(name) and other != name for other in others) else name
        for name in names
    ]


def _task_type(class_name: str) -> str | None:
    # PEFT's classification tasks are left out, because PEFT looks for the model's head in their adapters, and fails if
    # there is none.
    if class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if class_name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values() else None


def _target_modules(model: nn.Module, names: Mapping[str, int]) -> list[str] | str:
    """
    The modules' full names. PEFT also adapts modules whose names end with one of them. If the model has others of this
    kind, a pattern that matches the full names only is returned.
    """
    ends = tuple(f".{name}" for name in names)
    others = (name for name, _ in model.named_modules() if name not in names and not is_of_update(name))
    if any(name.endswith(ends) for name in others):
        return "|".join(name.replace(".", r"\.") for name in names)
    return list(names)
