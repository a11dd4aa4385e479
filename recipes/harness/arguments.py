"""Which method a recipe trains, and the sizes of each."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from hf_sara.arguments import METHODS as OURS
from hf_sara.arguments import SaraArguments

from .options import check_least

PEFT_METHODS = ("lora", "dora", "vera", "adalora", "prefix")
BOTTLENECKS = ("series_adapter", "parallel_adapter")
ALL_METHODS = (*OURS, *PEFT_METHODS, *BOTTLENECKS, "full")
# The methods that have an option of `SaraArguments`, where that is not all of them. The baselines' own sizes, and
# dropout, may stand beside any method.
AT_SITES = tuple(method for method in ALL_METHODS if method not in ("prefix", "full"))
OWNERS = {entry.name: OURS for entry in fields(SaraArguments) if entry.name not in ("method", "dropout")}
OWNERS |= {"target_modules": AT_SITES, "layers": AT_SITES}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class MethodArguments(SaraArguments):
    """
    [`SaraArguments`] with the baselines beside: `method` may be any of `ALL_METHODS`. `dropout`, `target_modules` and
    `layers` are shared, where a method has them. The defaults are those of the paper's baselines. A size of one
    baseline is nothing to the others.

    Args:
        method (`str`, *optional*, defaults to `"sara"`):
            `"sara"`, `"mo_sara"`, `"lora"`, `"dora"`, `"vera"`, `"adalora"`, `"prefix"`, `"series_adapter"`,
            `"parallel_adapter"` or `"full"`.
        lora_r (`int`, *optional*, defaults to 10):
            LoRA and DoRA: the rank. AdaLoRA: the mean rank in the end.
        lora_alpha (`int`, *optional*):
            LoRA, DoRA, AdaLoRA: the update is scaled by `lora_alpha` over the (initial) rank. Left open: scaling 2.
        adalora_init_r (`int`, *optional*):
            AdaLoRA: the rank in the beginning, larger than `lora_r`. Left open: one and a half times `lora_r`.
        adalora_warmup (`float`, *optional*, defaults to 0.1):
            AdaLoRA: share of the steps before ranks are pruned.
        adalora_final (`float`, *optional*, defaults to 0.5):
            AdaLoRA: share of the steps after the pruning.
        adalora_interval (`int`, *optional*, defaults to 10):
            AdaLoRA: steps from one pruning to the next.
        vera_r (`int`, *optional*, defaults to 1024):
            VeRA: the rank of the shared frozen projections.
        num_virtual_tokens (`int`, *optional*, defaults to 30):
            Prefix tuning: length of the prefix.
        bottleneck_size (`int`, *optional*, defaults to 256):
            Series and parallel adapters: width of the bottleneck.

    Raises:
        `ValueError`: for a value outside its range, or an option of [`SaraArguments`] that the method does not have.
    """

    method: str = field(default="sara", metadata={"choices": list(ALL_METHODS), "help": "What to train."})
    lora_r: int = _option(10, "LoRA, DoRA: rank. AdaLoRA: mean rank in the end.")
    lora_alpha: int | None = _option(None, "LoRA, DoRA, AdaLoRA: scaling times (initial) rank. Default: scaling 2.")
    adalora_init_r: int | None = _option(None, "AdaLoRA: rank in the beginning. Default: 1.5 times lora_r.")
    adalora_warmup: float = _option(0.1, "AdaLoRA: share of the steps before ranks are pruned.")
    adalora_final: float = _option(0.5, "AdaLoRA: share of the steps after the pruning.")
    adalora_interval: int = _option(10, "AdaLoRA: steps from one pruning to the next.")
    vera_r: int = _option(1024, "VeRA: rank of the shared frozen projections.")
    num_virtual_tokens: int = _option(30, "Prefix tuning: length of the prefix.")
    bottleneck_size: int = _option(256, "Series and parallel adapters: width of the bottleneck.")

    def __post_init__(self):
        if self.method not in ALL_METHODS:
            raise ValueError(f"method={self.method!r} is unknown. Choose one of: {', '.join(ALL_METHODS)}.")
        for entry in fields(self):
            owners, value = OWNERS.get(entry.name, ALL_METHODS), getattr(self, entry.name)
            if self.method not in owners and value != entry.default:
                raise ValueError(
                    f"{entry.name}={value!r} is no option of method={self.method!r}, only of {', '.join(owners)}. "
                    "Leave it out."
                )
        # Checks what is shared, whatever the method is.
        shared = self.sara_arguments()
        self.target_modules, self.layers = shared.target_modules, shared.layers
        check_least(self, lora_r=1, lora_alpha=1, adalora_interval=1)
        check_least(self, vera_r=1, num_virtual_tokens=1, bottleneck_size=1)
        if self.method == "adalora":
            if self.initial_rank <= self.lora_r:
                raise ValueError(f"adalora_init_r={self.initial_rank} has to be larger than lora_r={self.lora_r}.")
            warmup, final = self.adalora_warmup, self.adalora_final
            if not (0.0 <= warmup < 1.0 and 0.0 < final < 1.0 and warmup + final < 1.0):
                raise ValueError(
                    f"adalora_warmup={warmup} and adalora_final={final} are shares of the steps that have to leave "
                    "some for the pruning between them: their sum has to be below 1, and adalora_final above 0."
                )

    @property
    def initial_rank(self) -> int:
        """The rank at the first step: of AdaLoRA it is the larger one that is pruned."""
        if self.method != "adalora":
            return self.lora_r
        return math.ceil(1.5 * self.lora_r) if self.adalora_init_r is None else self.adalora_init_r

    @property
    def alpha(self) -> int:
        """PEFT's `lora_alpha`: the scaling times the rank at the first step."""
        return 2 * self.initial_rank if self.lora_alpha is None else self.lora_alpha

    def sara_arguments(self) -> SaraArguments:
        """The part that defines an adapter of this library; for a baseline, SARA at the sites that are shared."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(SaraArguments)}
        return SaraArguments(**values if self.method in OURS else {**values, "method": "sara"})
