"""The mixin that lets `transformers.Trainer` attach, save, gather and load an adapter in place of the base.

Trainer has special cases for PEFT's own model class only. None of them holds for a `PreTrainedModel` that carries a
SARA adapter, so Trainer alone would write the whole base at every checkpoint.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers.trainer as transformers_trainer
from torch import nn
from transformers import set_seed
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import enable_full_determinism

from .. import publishing, storage
from ..adapter import SaraAdapter
from ..adapter_files import AdapterFiles
from ..arguments import SaraArguments
from ..carrier import adapters_on, unwrap
from ..contents import make_contiguous, reshard
from ..copies import own_names, watch_rows
from ..files import write_file
from ..linears import is_offloaded
from ..parts import Part, TokenPart
from ..planning import AdapterSpec, Plan
from .reference import reference_for
from .resuming import output_dir_of
from .searching import SearchMixin

logger = logging.getLogger(__name__)

# Trained tensors and saved factors by name.
Contents = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


class AdapterTrainerMixin(SearchMixin):
    """
    A mixin that makes a subclass of [`~transformers.Trainer`] train, save, resume and load SARA adapters. Its argument
    and its errors are those of [`SaraTrainerMixin`], which adds model cards and the Hub.
    """

    # The bank that is trained in the place of an adapter, see [`BankTrainerMixin`].
    bank: Any = None

    def __init__(
        self,
        model=None,
        args=None,
        *positional,
        sara_args: SaraArguments | None = None,
        adapter_name: str | None = None,
        plan: Plan | str | os.PathLike | None = None,
        published_arguments: Sequence[str] = (),
        **kwargs,
    ):
        self.sara_args = sara_args
        self._sara_plan = plan
        self._sara_published = published_arguments
        # The folder to which the adapter was saved last, and the step.
        self._sara_saved: tuple[str, int] | None = None
        self._sara_adapter_name = adapter_name
        self._sara_trial_overrides: dict[str, Any] = {}
        if model is not None and not isinstance(model, str):
            if args is not None:
                # Trainer sets the seed only later, but the adapter's random start has to follow from the seed too.
                enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
            self._attach(model)
        with _pose_as_peft(model), _let_save_state(model, args), reference_for(self, model, args, kwargs):
            super().__init__(model, args, *positional, **kwargs)
        if isinstance(model, str):
            self._attach(self.model)
        publishing.published_arguments(self.args, published_arguments)

    # ---- the adapter ----

    @property
    def sara_adapter(self) -> SaraAdapter:
        """The adapter that is trained, also `model.sara_adapter` during the training."""
        return self.choose_adapter(self.accelerator.unwrap_model(self.model))

    @property
    def _sara_base(self) -> Any:
        """The model that carries what is trained."""
        return unwrap(self.accelerator.unwrap_model(self.model))

    def choose_adapter(self, model: Any) -> SaraAdapter:
        """The adapter of a model that this trainer trains."""
        adapter = SaraAdapter.of(unwrap(model), self._sara_adapter_name)
        if adapter is None:
            raise ValueError("The model carries no SARA adapter any more. It was detached while the trainer had it.")
        return adapter

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained tensors by name."""
        return self.sara_adapter.trained()

    def _attach(self, model: Any) -> None:
        """Attach the adapter, or find it on the model, and let nothing else train."""
        model = unwrap(model)
        _refuse_to_move(model)
        wanted = self.sara_args
        if self._sara_trial_overrides:
            if self._sara_plan is not None:
                raise ValueError(
                    f"A search over {', '.join(self._sara_trial_overrides)} needs other ranks than those of the plan. "
                    "Leave the plan out."
                )
            wanted = replace(wanted or SaraArguments(), **self._sara_trial_overrides)
        adapter = _find_or_attach(model, wanted, self._sara_adapter_name, self._sara_plan)
        # Another adapter may be attached later, and this trainer goes on to train its own one.
        self._sara_adapter_name = adapter.name
        adapter.train_alone()

    def train(self, *args, **kwargs):
        """Train the adapter as Trainer trains a model. The model's other adapters do not train meanwhile."""
        if self.model is not None:
            self._train_alone()
        try:
            result = super().train(*args, **kwargs)
        finally:
            if self.model is not None and self.bank is None:
                self.sara_adapter.mirror_rows()
        self._rest()
        return result

    def _train_alone(self) -> None:
        self.sara_adapter.train_alone()

    def _rest(self) -> None:
        """Let the updates that never took part add nothing. Until the end they can learn from their start."""
        adapter = self.sara_adapter
        self._share_usage()
        state = self._gather()[0] if self.is_fsdp_enabled or self.is_deepspeed_enabled else None
        adapter.warn_of_unmoved(state)
        sites = adapter.untrained_sites(state, by_use=self.is_deepspeed_enabled)
        with gathered(self, [tensor for site in sites for tensor in adapter.delta(site).trained().values()], rank=0):
            adapter.rest(sites)
        adapter.warn_of_idle(sites)

    def _share_usage(self) -> None:
        """Let every process know which updates any of them used. An expert may have its tokens on one of them."""
        if self.args.world_size > 1:
            uses = [delta.usage for _, delta in self.sara_adapter.deltas()]
            flags = torch.tensor([[use.called, use.learning] for use in uses], dtype=torch.float)
            flags = flags.to(self.args.device)
            for use, (called, learning) in zip(uses, self.accelerator.reduce(flags, "sum").tolist(), strict=True):
                use.called, use.learning = called > 0, learning > 0

    def _save_checkpoint(self, *args, **kwargs):
        self._share_usage()
        return super()._save_checkpoint(*args, **kwargs)

    def _on_train_begin(self) -> None:
        super()._on_train_begin()
        self._check_before_training()

    def _check_before_training(self) -> None:
        """Raise an error if nothing would train, or more than what is saved."""
        adapter = self.sara_adapter
        if not any(delta.enabled for _, delta in adapter.deltas()):
            raise ValueError(
                f"The adapter {adapter.name!r} is disabled, so nothing would train. Call adapter.enable()."
            )
        adapter.refuse_others(self.accelerator.unwrap_model(self.model))

    def training_step(self, model, inputs, *args, **kwargs):
        if self._sara_learned:
            return super().training_step(model, inputs, *args, **kwargs)
        with watch_rows(self._sara_base):
            return super().training_step(model, inputs, *args, **kwargs)

    # ---- model_init ----

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        self._sara_trial_overrides = self._sara_fields_of(trial)
        self._attach(model)
        return model

    # ---- writing ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, and not the base. Every process has to call this, and one of them writes."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # Trainer itself would gather the whole base, or nothing. Every process has to take part in gathering.
            self._write(output_dir, self._gather())
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        else:
            super().save_model(output_dir, _internal_call)

    def _gather(self) -> Contents:
        """The tensors to write, as whole tensors, also if FSDP or DeepSpeed has sharded them."""
        adapter = self.sara_adapter
        tensors = [*adapter.tensors().values(), *(t for _, delta in adapter.deltas() for t in delta.parameters())]
        with gathered(self, tensors):
            return adapter.state_dict(), adapter.saved_factors()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        # Trainer's `state_dict` is not used, because it holds the whole base or nothing.
        if self.args.should_save:
            self._write(output_dir, self._gather())

    def _write(self, output_dir: str | None, contents: Contents) -> None:
        if not self.args.should_save:
            return
        output_dir = output_dir_of(self) if output_dir is None else output_dir
        self.sara_adapter.refuse_others(self.accelerator.unwrap_model(self.model))
        adapter = self.sara_adapter
        untrained = adapter.untrained_sites(contents[0], by_use=self.is_deepspeed_enabled)
        storage.write(output_dir, adapter.manifest(untrained), *contents)
        self._write_beside(output_dir)

    def _saved_adapters(self, folder: str) -> list[tuple[str, AdapterFiles]]:
        """What is saved to a folder: each adapter with the folder of its own files."""
        return [(folder, self.sara_adapter)]

    def _sara_spec(self) -> AdapterSpec:
        """The definition of what is trained."""
        return self.sara_adapter.spec

    def _write_beside(self, output_dir: str) -> None:
        """Write what a folder has besides the adapter."""
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        published = publishing.published_arguments(self.args, self._sara_published)
        write_file(Path(output_dir, publishing.TRAINING_ARGS_FILE), published.to_json().encode())
        self._sara_saved = (os.path.abspath(output_dir), self.state.global_step)
        logger.info("Saved to %s", output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            self._save_running_loss(output_dir)
            # accelerate has this class only if DeepSpeed is installed.
            from accelerate.utils import DeepSpeedSchedulerWrapper

            engine: Any = self.model_wrapped
            with own_names(self.sara_adapter.model):
                engine.save_checkpoint(output_dir, exclude_frozen_parameters=True)
            if not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
                self._save_scheduler(output_dir)
        elif self.is_fsdp_enabled:
            self._save_running_loss(output_dir)
            from accelerate.utils import save_fsdp_optimizer

            plugin = self.accelerator.state.fsdp_plugin
            reshard(self.sara_adapter.model)
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
            self._save_scheduler(output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_scheduler(self, output_dir: str) -> None:
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    # ---- loading ----

    def _load_tensors(self, folder: str, what: str) -> None:
        """Load a checkpoint's tensors into the adapter. Raise an error if its method, sites or ranks differ."""
        adapter = self.sara_adapter
        saved = read_like(adapter.spec, folder, f"The {what} {folder!r}")
        restore_task(self._sara_base, saved)
        with gathered(self, list(adapter.tensors().values()), rank=0):
            adapter.load_state_dict(saved.tensors, saved.untrained)

    def _prepare_for_training(self, *args, **kwargs):
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1:
            raise ValueError("FSDP1 is not supported. Leave 'version' out of fsdp_config, or set it to 2.")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            make_contiguous(cast(nn.Module, self.model))
        # DeepSpeed checkpoints are written without the frozen base, so they cannot be loaded strictly. Trainer is lax
        # with PEFT's class only, so its function is replaced here.
        load = transformers_trainer.deepspeed_load_checkpoint
        transformers_trainer.deepspeed_load_checkpoint = lambda engine, path, **_: load(
            engine, path, load_module_strict=False
        )
        try:
            with own_names(self._sara_base):
                return super()._prepare_for_training(*args, **kwargs)
        finally:
            transformers_trainer.deepspeed_load_checkpoint = load


def gathered(trainer: Any, tensors: Sequence[torch.Tensor], rank: int | None = None) -> AbstractContextManager:
    """Let DeepSpeed's tensors be whole within a `with` block, in which one process, or none, may change them."""
    if not trainer.is_deepspeed_enabled or not tensors:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(tensors), modifier_rank=rank)


def restore_task(model: Any, saved: storage.SavedAdapter) -> None:
    """A classifier finds its kind of loss out in its first forward, and a finished run that is resumed has none."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "problem_type", "none") is None:
        config.problem_type = saved.base.problem_type


def read_like(adapter: AdapterSpec, folder: str | os.PathLike, what: str) -> storage.SavedAdapter:
    """Read an adapter of the same method, sites and ranks, or raise an error that calls it `what`."""
    try:
        saved = storage.read(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{what} cannot be loaded: {error}") from error
    differences = _differences(saved, adapter)
    if differences:
        raise ValueError(
            f"{what} belongs to another adapter. It differs in {'; '.join(differences[:5])}. "
            "Use the SaraArguments of its training, or another output_dir."
        )
    return saved


def _differences(saved: storage.SavedAdapter, adapter: AdapterSpec) -> list[str]:
    """What tells a saved adapter from the one here, so that its tensors would not fit."""
    found = [
        f"{name}: {getattr(saved.args, name)!r} there, {getattr(adapter.args, name)!r} here"
        for name in ("method", "num_heads", "singular_values", "v_position")
        if getattr(saved.args, name) != getattr(adapter.args, name)
    ]
    there, here = ({site.name: site.k for site in sites} for sites in (saved.sites, adapter.sites))
    found += [
        f"{name}: k={there.get(name)} there, k={here.get(name)} here"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    ]
    if saved.parts != adapter.parts:
        parts = [[_described(part) for part in parts] for parts in (saved.parts, adapter.parts)]
        found.append(f"the parts that are trained beside the updates: {parts[0]} there, {parts[1]} here")
    if not found and saved.trained_shapes() != adapter.trained_shapes():
        found = [f"the shapes of its tensors: {saved.args} there, {adapter.args} here"]
    return found


def _described(part: Part) -> str:
    if isinstance(part, TokenPart):
        return f"{part.name}, {part.title}: {', '.join(map(str, part.indices))}"
    shapes = {**part.trained_shapes(), **part.buffer_shapes()}
    return f"{part.name}, {part.title}: {', '.join(f'{name} {shape}' for name, shape in shapes.items())}"


@contextmanager
def _pose_as_peft(model: Any):
    """
    Trainer refuses a quantized base unless PEFT has put an adapter on it. A SARA adapter does as well, so the model
    claims to have one of PEFT's while the constructor runs.
    """
    inner: Any = unwrap(model) if isinstance(model, nn.Module) else None
    if not getattr(inner, "is_quantized", False) or getattr(inner, "_hf_peft_config_loaded", False):
        yield
        return
    inner._hf_peft_config_loaded = True
    try:
        yield
    finally:
        inner._hf_peft_config_loaded = False


@contextmanager
def _let_save_state(model: Any, args: Any):
    """
    Trainer refuses to save the state of the optimizer for a model that was spread over processes while it was loaded,
    because the optimizer could have parts of tensors only. What an adapter trains is whole in every process.
    """
    spread = getattr(model, "is_distributed_loading_by_transformers", False)
    if not spread or args is None or args.save_only_model:
        yield
        return
    args.save_only_model = True
    try:
        yield
    finally:
        args.save_only_model = False


def _find_or_attach(
    model: Any, wanted: SaraArguments | None, name: str | None, plan: Plan | str | os.PathLike | None
) -> SaraAdapter:
    """The adapter of a model that is to be trained, or a new one."""
    names = list(adapters_on(model))
    if name is None and len(names) > 1:
        raise ValueError(
            f"The model carries the adapters {', '.join(map(repr, names))}, and a trainer trains one of them. Say "
            f"which: adapter_name={names[0]!r}."
        )
    adapter = SaraAdapter.of(model, name)
    if adapter is None:
        if names and wanted is None and plan is None:
            raise ValueError(
                f"The model carries no adapter {name!r}, but {', '.join(map(repr, names))}. Choose one of these, or "
                "give sara_args to attach a new one of that name."
            )
        return SaraAdapter.attach(model, wanted, name or "default", plan)
    if plan is not None:
        raise ValueError(
            f"The model already carries the adapter {adapter!r}, which has its ranks. Leave the plan out to go on "
            "training it, or detach it first."
        )
    if wanted is not None and wanted != adapter.args:
        raise ValueError(
            f"The model already carries the adapter {adapter!r}, made with {adapter.args}, which is not what "
            f"sara_args asks for: {wanted}. Leave sara_args out to go on training it, or detach it first."
        )
    if adapter.merged:
        raise ValueError(f"The adapter {adapter.name!r} is merged into the weights. Unmerge it before training.")
    return adapter


def _refuse_to_move(model: nn.Module) -> None:
    """Raise a `ValueError` if Trainer would move a model whose tensors accelerate has offloaded."""
    offloaded = next((name for name, module in model.named_modules() if is_offloaded(module)), None)
    if offloaded is not None and getattr(model, "hf_device_map", None) is None:
        raise ValueError(
            f"{offloaded} is offloaded by accelerate, and Trainer would move the model to one device. Offload it by "
            "the device_map of from_pretrained, or with accelerate.dispatch_model."
        )
