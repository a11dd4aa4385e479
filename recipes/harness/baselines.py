"""The methods that the paper compares, trained in one loop: same data order, same seed, same report.

SARA and Mo-SARA are this library's. LoRA, DoRA, VeRA, AdaLoRA and prefix tuning come from PEFT, which is optional.
DyLoRA is a LoRA of PEFT's that trains with another rank in each step, EVA and PiSSA are LoRAs of PEFT's with another
start. Bottleneck adapters come from [`harness.bottleneck`]. The method `full` trains the model itself.

PEFT adapts modules, not projections: on GPT-2 its methods adapt the whole fused `c_attn` (query, key and value), while
SARA adapts query and value only. (LoRA with r 4 on GPT-2 medium has 393,216 parameters, which is the number of the
paper's LoRA, although that adapts query and value only.)
"""

import functools
import itertools
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import enable_full_determinism

from hf_sara import storage
from hf_sara.manifest import current_versions
from hf_sara.model_card import hardware
from hf_sara.planning import count_base
from hf_sara.targets import find_sites
from hf_sara.tensor_files import check_tensors
from hf_sara.trainer import FrozenBaseMixin, SaraTrainer

from . import bottleneck
from .arguments import BOTTLENECKS, OURS, PEFT_METHODS, MethodArguments
from .ranks import ranks_for

try:
    import resource
except ImportError:
    # Windows does not have it.
    resource = None

# The unit of `ru_maxrss`: macOS counts in bytes, and Linux in kilobytes.
UNIT = 1 if sys.platform == "darwin" else 1024
# This file of a checkpoint has all trained tensors in full, by their names in the model. PEFT's own file would lack
# the ranks that AdaLoRA has pruned, and the optimizer's state has entries for these too.
TRAINED_FILE = "trained.safetensors"
ALLOCATOR_FILE = "adalora_allocator.safetensors"
# The files that one would share of a trained baseline, by method.
ADAPTER_FILES = {
    **dict.fromkeys(PEFT_METHODS, ("adapter_config.json", "adapter_model.safetensors")),
    **dict.fromkeys(BOTTLENECKS, (bottleneck.CONFIG_FILE, bottleneck.TENSORS_FILE)),
    "full": ("config.json", "generation_config.json", "model*.safetensors*"),
}
# EVA looks at so many batches at most.
EVA_BATCHES = 64
# How much AdaLoRA adds of its factors' distance from orthogonal ones to the loss. This is PEFT's default.
ORTHOGONALITY = 0.5


# ---- the models ----


def attach_baseline(model: PreTrainedModel, args: MethodArguments, seed: int = 0) -> nn.Module:
    """
    Make a base model into a baseline: everything is frozen but what the method trains.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model. It is changed in place.
        args ([`MethodArguments`]): The method, which is none of this library's own, and its sizes.
        seed (`int`, *optional*, defaults to 0): The seed of VeRA's frozen projections.

    Returns:
        `torch.nn.Module`: PEFT's wrapper around the model, or the model itself. The trained tensors are float32.

    Raises:
        `ImportError`: If PEFT is needed and not installed.
        `ValueError`: If the model lacks the modules.
    """
    if args.method == "full":
        return model.float().requires_grad_(True)
    if args.method in BOTTLENECKS:
        sites = bottleneck.find_bottleneck_sites(model, args.method, args.target_modules, args.layers)
        bottleneck.attach_bottleneck(model, args.method, sites, args.bottleneck_size, args.dropout)
        return model
    peft = _import_peft(args.method)
    if args.method == "prefix":
        from .prefix import PrefixModel

        return PrefixModel(model, args.num_virtual_tokens)
    modules = list(dict.fromkeys(site.module for site in find_sites(model, args.sara_arguments())))
    where = {
        "task_type": "CAUSAL_LM",
        "target_modules": modules,
        "fan_in_fan_out": isinstance(model.get_submodule(modules[0]), Conv1D),
    }
    if args.method == "vera":
        # The projections follow from the seed, so they are not saved. VeRA's paper does the same.
        config = peft.VeraConfig(
            **where, r=args.vera_r, vera_dropout=args.dropout, projection_prng_key=seed, save_projection=False
        )
        return peft.get_peft_model(model, config)
    where |= {"lora_alpha": args.alpha, "lora_dropout": args.dropout}
    if args.method == "adalora":
        # The schedule needs the number of steps, so it is set when the training begins. PEFT would add the
        # orthogonality to the evaluation loss too, and would not add it to a smoothed loss, so our trainer adds it.
        schedule = {"tinit": 0, "tfinal": 0, "deltaT": args.adalora_interval, "total_step": 1}
        config = peft.AdaLoraConfig(
            **where, **schedule, init_r=args.initial_rank, target_r=args.lora_r, orth_reg_weight=0.0
        )
    elif args.method == "eva":
        config = peft.LoraConfig(**where, r=args.lora_r, init_lora_weights="eva", eva_config=peft.EvaConfig())
    elif args.method == "pissa":
        config = peft.LoraConfig(**where, r=args.lora_r, init_lora_weights="pissa")
    elif args.ranks != "own":
        ranks = ranks_for(model, args.sara_arguments(), args.ranks).rank_pattern()
        # Every module has the same scale.
        alphas = {name: args.alpha / args.lora_r * k for name, k in ranks.items()}
        config = peft.LoraConfig(**where, r=args.lora_r, rank_pattern=ranks, alpha_pattern=alphas)
    else:
        config = peft.LoraConfig(**where, r=args.lora_r, use_dora=args.method == "dora")
    return peft.get_peft_model(model, config)


def _import_peft(method: str) -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"method={method!r} needs PEFT. Install it with: pip install 'hf_sara[peft]'") from error
    return peft


def orthogonality(model: nn.Module) -> torch.Tensor:
    """
    How far AdaLoRA's factors are from orthogonal ones: the mean of |P^T P - I| and |Q Q^T - I| over all of them, where
    P has the shape (d_out, r) and Q the shape (r, d_in). AdaLoRA's paper squares these norms (eq. 4). As in PEFT, they
    are not squared here.
    """
    distances = []
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            gram = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
            distances.append(torch.linalg.norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
    return torch.stack(distances).mean()


# ---- the trainers ----


class BaselineTrainer(FrozenBaseMixin, Trainer):
    """
    [`~transformers.Trainer`] for the methods that are not this library's. It shares exact resuming, and all else that
    has nothing to do with whose tensors are trained, with [`SaraTrainer`]: that is [`FrozenBaseMixin`]'s.

    A checkpoint holds the trained tensors by name. `save_model` writes what one would share: PEFT's adapter, the
    bottleneck adapter, or the whole model.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base, a causal language model. It is changed in place.
        args ([`~transformers.TrainingArguments`]): Trainer's arguments.
        method_args ([`MethodArguments`]): What to train.
        kwargs: Trainer's other arguments.

    Raises:
        `ValueError`: If the arguments ask for what baselines do not do: pushing to the Hub, FSDP, DeepSpeed.
    """

    def __init__(self, model, args, method_args: MethodArguments, **kwargs):
        if args.push_to_hub:
            raise ValueError(f"push_to_hub is not made for method={method_args.method!r}, only for {', '.join(OURS)}.")
        # The random start follows from the seed, as that of this library's methods does.
        enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
        self.method_args = method_args
        self.base_parameters = 0 if method_args.method == "full" else count_base(model)
        super().__init__(attach_baseline(model, method_args, args.seed), args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(f"method={method_args.method!r} does not run with FSDP or DeepSpeed here.")
        if method_args.method == "prefix" and self.label_smoother is not None:
            # Trainer decides by the class of the model inside of PEFT's wrapper whether labels are shifted. Of this
            # wrapper it takes a module that is one level deeper, so it would not shift them.
            self.compute_loss_func = functools.partial(self.label_smoother, shift_labels=True)

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained tensors by their names in the model."""
        model = self.accelerator.unwrap_model(self.model)
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what one would share, or the tensors of a checkpoint where Trainer itself calls this."""
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        if _internal_call:
            save_file({n: p.detach().contiguous() for n, p in self.trained().items()}, folder / TRAINED_FILE)
        elif self.method_args.method in BOTTLENECKS:
            bottleneck.save_bottleneck(model, folder)
        elif self.method_args.method == "full":
            model.save_pretrained(folder)
        else:
            self._share(model, folder)

    def _share(self, model: nn.Module, folder: Path) -> None:
        """Write what one would share of a method of PEFT's."""
        # Embeddings are never trained. Without this argument, PEFT would ask the Hub whether they have changed.
        model.save_pretrained(folder, save_embedding_layers=False)

    @torch.no_grad()
    def _load_tensors(self, folder: str, what: str) -> None:
        path = Path(folder, TRAINED_FILE)
        if not path.is_file():
            raise FileNotFoundError(f"The {what} {folder!r} cannot be loaded: it has no {TRAINED_FILE}.")
        tensors, own = load_file(path), self.trained()
        check_tensors(tensors, {name: tuple(parameter.shape) for name, parameter in own.items()})
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


class AdaLoraTrainer(BaselineTrainer):
    """[`BaselineTrainer`] with AdaLoRA's schedule, its pruning of ranks, and its own term of the loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_PruneRanks(self))

    @property
    def tuner(self) -> nn.Module:
        """PEFT's AdaLoRA model. It holds the rank allocator."""
        return self.accelerator.unwrap_model(self.model).base_model

    def _on_train_begin(self) -> None:
        super()._on_train_begin()
        steps, config = self.state.max_steps, self.tuner.peft_config["default"]
        config.total_step = steps
        config.tinit = round(self.method_args.adalora_warmup * steps)
        config.tfinal = max(1, round(self.method_args.adalora_final * steps))
        if config.tinit >= steps - config.tfinal:
            raise ValueError(f"{steps} steps are too few for AdaLoRA's schedule. Train longer.")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            loss = loss + ORTHOGONALITY * orthogonality(model) / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and _internal_call:
            save_file(self._allocator_state(), Path(output_dir, ALLOCATOR_FILE))

    def _allocator_state(self) -> dict[str, torch.Tensor]:
        """The importance of each entry that AdaLoRA has measured so far, and the ranks that it has kept."""
        allocator, pattern = self.tuner.rankallocator, self.tuner.peft_config["default"].rank_pattern or {}
        parts = {**_importance(allocator), "rank_pattern": {n: torch.tensor(mask) for n, mask in pattern.items()}}
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def _load_tensors(self, folder: str, what: str) -> None:
        super()._load_tensors(folder, what)
        parts = {**_importance(self.tuner.rankallocator), "rank_pattern": {}}
        for key, tensor in load_file(Path(folder, ALLOCATOR_FILE)).items():
            part, name = key.split("/", 1)
            parts[part][name] = tensor.tolist() if part == "rank_pattern" else tensor.to(self.args.device)
        self.tuner.peft_config["default"].rank_pattern = parts["rank_pattern"] or None


def _importance(allocator: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The running averages of PEFT's rank allocator: its own dictionaries, not copies, so they can be written to."""
    return {"ipt": allocator.ipt, "exp_avg_ipt": allocator.exp_avg_ipt, "exp_avg_unc": allocator.exp_avg_unc}


class _PruneRanks(TrainerCallback):
    """Let AdaLoRA measure its ranks and prune them after the optimizer's step, while the gradients are still there."""

    def __init__(self, trainer: AdaLoraTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.tuner.update_and_allocate(state.global_step)


class EvaTrainer(BaselineTrainer):
    """
    [`BaselineTrainer`] for EVA: before the training, the LoRA starts from the directions in which the inputs of its
    modules vary most on the training data, and its ranks go where they vary most.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        from peft import initialize_lora_eva_weights

        model = self.accelerator.unwrap_model(self.model)
        # The first batches in the order of the data are enough, and use no random number of the training.
        loader = self.get_eval_dataloader(self.train_dataset)
        # PEFT takes a dictionary and no BatchEncoding.
        batches = [dict(batch) for batch in itertools.islice(loader, EVA_BATCHES)]
        training = model.training
        model.eval()
        with torch.random.fork_rng():
            initialize_lora_eva_weights(model, batches, show_progress_bar=False)
        model.train(training)


class PissaTrainer(BaselineTrainer):
    """
    [`BaselineTrainer`] for PiSSA, whose LoRA starts as the leading part of each weight, which leaves the rest of it as
    the base. What one would share is a LoRA of twice the rank for the base as it was.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._sara_start = tempfile.TemporaryDirectory(prefix="pissa-")
        model = self.accelerator.unwrap_model(self.model)
        config = model.peft_config["default"]
        # PEFT wants its start saved as one that is no start of PiSSA.
        config.init_lora_weights = True
        model.save_pretrained(self._sara_start.name, save_embedding_layers=False)
        config.init_lora_weights = "pissa"

    def _share(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(
            folder, save_embedding_layers=False, path_initial_model_for_weight_conversion=self._sara_start.name
        )


class DyLoraTrainer(BaselineTrainer):
    """
    [`BaselineTrainer`] for DyLoRA: each step trains the first b ranks of a LoRA, where b is drawn anew, so that the
    result is a LoRA that can be cut to any smaller rank. With rank b, the update is scaled by `lora_alpha / b`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._sara_rank = self.method_args.lora_r
        model = self.accelerator.unwrap_model(self.model)
        for name, module in model.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_hook(self._cut)

    def _cut(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        rank, whole = self._sara_rank, output.shape[-1]
        if rank == whole:
            return output
        mask = (torch.arange(whole, device=output.device) < rank).to(output.dtype)
        # PEFT scales by `lora_alpha / lora_r`.
        return output * (mask * (whole / rank))

    def training_step(self, *args, **kwargs):
        # The rank follows from the seed and the step, so that a resumed run draws the same.
        seed = torch.Generator().manual_seed(self.args.seed + 1_000_003 * self.state.global_step)
        self._sara_rank = int(torch.randint(1, self.method_args.lora_r + 1, (), generator=seed))
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self._sara_rank = self.method_args.lora_r

    def evaluate_ranks(self) -> dict[str, float]:
        """The evaluation loss at each rank below the largest one: `eval_loss_rank_1`, ..."""
        losses = {}
        try:
            for rank in range(1, self.method_args.lora_r):
                self._sara_rank = rank
                found = self.evaluate(metric_key_prefix=f"rank_{rank}")
                losses[f"eval_loss_rank_{rank}"] = found[f"rank_{rank}_loss"]
        finally:
            self._sara_rank = self.method_args.lora_r
        return losses


# The trainers of the baselines that need one of their own.
KINDS = {"adalora": AdaLoraTrainer, "dylora": DyLoraTrainer, "eva": EvaTrainer, "pissa": PissaTrainer}


def make_trainer(
    method_args: MethodArguments, mixin: type | None = None, plan: str | None = None, **trainer_kwargs: Any
) -> Trainer:
    """
    Make the trainer of a method. Everything else is the same for all methods: the loop, the order of the data, the
    seed, the weight decay, the checkpoints.

    Args:
        method_args ([`MethodArguments`]): What to train.
        mixin (`type`, *optional*): A class with the methods of Trainer that a task overrides. It is the first base of
            the trainer's class.
        plan (`str`, *optional*): The file of a plan, from which SARA and Mo-SARA take their ranks.
        trainer_kwargs: Trainer's arguments, of which `model` (the base) and `args` are needed.

    Returns:
        [`~transformers.Trainer`]: A [`SaraTrainer`] or a [`BaselineTrainer`].

    Raises:
        `ImportError`: If the method needs PEFT and it is not installed.
        `ValueError`: If the model lacks the modules, or the method cannot do what the arguments ask for.
    """
    if method_args.method in OURS:
        ranks: Any = plan
        if method_args.ranks != "own":
            if plan is not None:
                raise ValueError(f"ranks={method_args.ranks!r} and plan={plan!r} ask for different ranks.")
            ranks = ranks_for(trainer_kwargs["model"], method_args.sara_arguments(), method_args.ranks)
        kind, own = SaraTrainer, {"sara_args": method_args.sara_arguments(), "plan": ranks}
    elif plan is not None:
        raise ValueError(f"plan={plan!r} has ranks of SARA, which method={method_args.method!r} does not use.")
    else:
        kind = KINDS.get(method_args.method, BaselineTrainer)
        own = {"method_args": method_args}
    bases = (kind,) if mixin is None else (mixin, kind)
    return type(kind.__name__, bases, {})(**own, **trainer_kwargs)


# ---- the report ----


def report(trainer: SaraTrainer | BaselineTrainer) -> dict[str, Any]:
    """
    What a method costs, with the same entries for all methods.

    Args:
        trainer ([`~transformers.Trainer`]): A trainer from [`make_trainer`], after `train()` and `save_model()`.

    Returns:
        `dict`: `method`; `trained_parameters` (of AdaLoRA: before its pruning); `share`, these divided by base plus
        trained parameters, in [0, 1]; `adapter_bytes`, of the files that one would share; `train_seconds`, over all
        calls that the training was resumed by; `peak_memory_bytes`, the process's largest resident set since it
        started, which is not measured on Windows; with CUDA `peak_cuda_bytes`, the most that was allocated; the
        `versions` of the packages and the `hardware`; of SARA and Mo-SARA the `threshold`.
    """
    folder = Path(trainer.args.output_dir)
    if isinstance(trainer, BaselineTrainer):
        method, trained = trainer.method_args.method, sum(p.numel() for p in trainer.trained().values())
        costs: Mapping[str, Any] = {
            "trained_parameters": trained,
            "share": trained / (trainer.base_parameters + trained),
            "adapter_bytes": sum(f.stat().st_size for part in ADAPTER_FILES[method] for f in folder.glob(part)),
        }
    else:
        adapter = trainer.sara_adapter
        method = adapter.args.method
        costs = {
            "trained_parameters": adapter.num_parameters(),
            "share": adapter.plan().share,
            "adapter_bytes": storage.size_on_disk(folder),
            "threshold": adapter.threshold,
        }
    return {
        "method": method,
        **costs,
        "train_seconds": trainer.training_seconds,
        **_peak_memory(),
        "versions": {**current_versions(), **({"peft": version("peft")} if method in PEFT_METHODS else {})},
        "hardware": hardware(),
    }


def _peak_memory() -> dict[str, int]:
    peak = {} if resource is None else {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT}
    return {**peak, "peak_cuda_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else peak
