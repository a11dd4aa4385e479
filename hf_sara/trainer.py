"""What `transformers.Trainer` needs to train an adapter alone.

Trainer has special cases for PEFT's own model class only. A `PreTrainedModel` that carries a SARA adapter falls
through all of them, and its whole base would be written at every checkpoint, so each of those places is overridden
here.
"""

import functools
import json
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers.trainer as transformers_trainer
from huggingface_hub import EvalResult, HfApi
from torch import nn
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler, nested_gather
from transformers.trainer_utils import (
    HPSearchBackend,
    HubStrategy,
    SaveStrategy,
    enable_full_determinism,
    sort_checkpoints,
)
from transformers.utils import PushInProgress

from . import hub, model_card, storage
from .adapter import SaraAdapter, unwrap
from .arguments import SaraArguments

logger = logging.getLogger(__name__)

RUNNING_LOSS_FILE = "running_loss.json"
# What resuming needs besides the adapter.
CHECKPOINT_FILES = (OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, RUNNING_LOSS_FILE, "rng_state*", "scaler.pt")


class EpochSeededSampler(LengthGroupedSampler):
    """[`~transformers.trainer_pt_utils.LengthGroupedSampler`] with an order that follows from seed and epoch alone."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer before each epoch."""
        self.generator.manual_seed(self.seed + epoch)


class SaraTrainerMixin:
    """
    Makes any [`~transformers.Trainer`] train, save, resume and load SARA adapters: `class MyTrainer(SaraTrainerMixin,
    SFTTrainer): pass`. Everything else, arguments included, is the Trainer's own.

    Args:
        sara_args ([`SaraArguments`], *optional*):
            The adapter to attach to the model (to each new one, with `model_init`). Left out, a model that carries an
            adapter keeps it, and another gets the default, SARA at threshold 0.01.

    Raises:
        `ValueError`: If `sara_args` contradict the adapter that the model carries, or that adapter is merged.
    """

    def __init__(self, model=None, args=None, *positional, sara_args: SaraArguments | None = None, **kwargs):
        self.sara_args = sara_args
        self._sara_checked_gradients = False
        self._sara_resumed_loss: dict[str, Any] | None = None
        self._sara_trial_overrides: dict[str, Any] = {}
        self._sara_input_gradients: nn.Module | None = None
        self._sara_started: float | None = None
        self._sara_seconds = 0.0
        # Trainer switches the cache off for training; generation afterwards is many times slower without.
        self._sara_use_cache = getattr(getattr(model, "config", None), "use_cache", True)
        if model is not None and not isinstance(model, str):
            if args is not None:
                # Trainer seeds only later, but the adapter's random start has to follow from the seed too.
                enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
            self._attach(model)
        # A constructor may change the tokenizer that it is given: TRL's take a pad token and a template from `args`.
        tokenizer_state = _tokenizer_state(kwargs.get("processing_class"))
        with _pose_as_peft(model):
            if positional:
                super().__init__(model, args, *positional, **kwargs)
            else:
                # By name: another argument may stand between the two, as `ref_model` does in DPOTrainer.
                super().__init__(model=model, args=args, **kwargs)
        if model is not None and isinstance(model, str):
            self._attach(self.model)
        self._tokenizer_state = tokenizer_state or _tokenizer_state(self.processing_class)
        self.add_callback(_OnTrainBegin(self))

    # ---- the adapter ----

    @property
    def sara_adapter(self) -> SaraAdapter:
        """The adapter that is trained."""
        return SaraAdapter.of(self.accelerator.unwrap_model(self.model))

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained tensors by name."""
        return self.sara_adapter.trained()

    def _attach(self, model: nn.Module) -> None:
        adapter = SaraAdapter.of(model)
        wanted = self.sara_args
        if wanted is not None and self._sara_trial_overrides:
            wanted = replace(wanted, **self._sara_trial_overrides)
        elif self._sara_trial_overrides:
            wanted = SaraArguments(**self._sara_trial_overrides)
        if adapter is None:
            SaraAdapter.attach(model, wanted)
        elif wanted is not None and wanted != adapter.args:
            raise ValueError(
                f"The model already carries the adapter {adapter!r}, made with {adapter.args}, which is not what "
                f"sara_args asks for: {wanted}. Leave sara_args out to go on training it, or detach it first."
            )
        elif adapter.merged:
            raise ValueError(f"The adapter {adapter.name!r} is merged into the weights. Unmerge it before training.")

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        self._sara_use_cache = getattr(getattr(model, "config", None), "use_cache", True)
        self._sara_trial_overrides = self._sara_fields_of(trial)
        self._attach(model)
        self._sara_checked_gradients = False
        return model

    def _sara_fields_of(self, trial: Any) -> dict[str, Any]:
        """The fields of SaraArguments that a hyperparameter search tries."""
        if trial is None or self.hp_search_backend is None:
            return {}
        values = self.hp_space(trial) if self.hp_search_backend == HPSearchBackend.OPTUNA else trial
        return {field.name: values[field.name] for field in fields(SaraArguments) if field.name in values}

    # ---- training ----

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        Trainer's `train`. `resume_from_checkpoint=True` takes the last *complete* checkpoint: one that a crash cut off
        while it was written is passed over, with a warning.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no complete checkpoint in {self.args.output_dir!r} to resume from.")
        self._sara_resumed_loss = None
        if resume_from_checkpoint:
            # Not with the tensors, which DeepSpeed loads in its own way.
            path = Path(resume_from_checkpoint, RUNNING_LOSS_FILE)
            self._sara_resumed_loss = json.loads(path.read_text()) if path.is_file() else None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._sara_seconds, self._sara_started = self.training_seconds, None
            if self._sara_input_gradients is not None:
                self._sara_input_gradients.disable_input_require_grads()
                self._sara_input_gradients = None
            config = getattr(self.model, "config", None)
            if hasattr(config, "use_cache"):
                config.use_cache = self._sara_use_cache

    @property
    def training_seconds(self) -> float:
        """How long the training took so far, over all calls that it was resumed by."""
        return self._sara_seconds + (0.0 if self._sara_started is None else time.monotonic() - self._sara_started)

    def _on_train_begin(self) -> None:
        """What has to happen after Trainer has made the model and reset its own state, and before the first step."""
        self._restore_running_loss()
        self._sara_started = time.monotonic()
        model = self.accelerator.unwrap_model(self.model)
        wants_hooks = self.args.activation_checkpointing and hasattr(model, "enable_input_require_grads")
        if wants_hooks and not getattr(model, "_require_grads_hooks", None):
            # Reentrant checkpointing needs an input with gradient: embeddings of a frozen base have none.
            model.enable_input_require_grads()
            self._sara_input_gradients = model

    def get_decay_parameter_names(self, model) -> list[str]:
        # On purpose: weight decay applies to every trained tensor, vectors and router included, as in the paper.
        trained = {id(p) for p in self.trained().values()}
        names = [name for name, parameter in model.named_parameters() if id(parameter) in trained]
        return [*names, *(name for name in super().get_decay_parameter_names(model) if name not in set(names))]

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            # A finished run that is resumed. Trainer looks for the end after a step only, and would train one more.
            self.control.should_training_stop = True
            if self.state.global_step == self._initial_global_step:
                # Nothing is trained, and the time of the training stays what it was.
                self._sara_started = None
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        # DeepSpeed keeps gradients of its own, there is nothing to see here.
        if not self._sara_checked_gradients and not self.is_deepspeed_enabled:
            self._check_gradients()
            self._sara_checked_gradients = True
        return loss

    def _check_gradients(self) -> None:
        trained = self.trained()
        silent = [n for n, t in trained.items() if t.requires_grad and t.numel() and t.grad is None]
        frozen = [n for n, t in trained.items() if not t.requires_grad]
        if silent or frozen:
            names = silent or frozen
            raise RuntimeError(
                f"After the first backward pass {len(names)} trained tensors have no gradient: {', '.join(names[:5])}"
                f"{' ...' if len(names) > 5 else ''}. Their modules take no part in the loss, or the adapter is "
                "frozen, disabled or merged. Choose other target_modules or layers, or enable the adapter."
            )

    def _hp_search_setup(self, trial):
        space = self.hp_space if self.hp_search_backend is not None else None
        ours = {field.name for field in fields(SaraArguments)}
        if space is not None and trial is not None and self.hp_search_backend == HPSearchBackend.OPTUNA:
            # The adapter's own fields were used when the model was made; Trainer would warn that it has none of them.
            self.hp_space = lambda trial: {name: value for name, value in space(trial).items() if name not in ours}
        try:
            super()._hp_search_setup(trial)
        finally:
            if space is not None:
                self.hp_space = space

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            # Trainer groups by length with the global random numbers, of which methods use up different ones, and
            # which a run that is resumed in a later epoch does not have.
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return EpochSeededSampler(sampler.batch_size, lengths=sampler.lengths, seed=seed)
        return sampler

    # ---- writing ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, a few kilobytes, not the base. Called on every process; one of them writes."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # Trainer's own way gathers the whole base, or nothing. Gathering is collective: every rank takes part.
            self._write(output_dir, self._gather())
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        else:
            super().save_model(output_dir, _internal_call)

    def _gather(self) -> storage.Contents:
        """What is to be written, in full, whatever it is sharded by."""
        if not self.is_deepspeed_enabled:
            return storage.contents(self.sara_adapter)
        import deepspeed

        tensors = [tensor for _, delta in self.sara_adapter.deltas() for tensor in delta.parameters()]
        with deepspeed.zero.GatheredParameters(tensors):
            return storage.contents(self.sara_adapter)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        # `state_dict` is Trainer's own idea of one, which holds the base or nothing.
        self._write(output_dir)

    def _write(self, output_dir: str | None, held: storage.Contents | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = self.args.output_dir if output_dir is None else output_dir
        storage.write(self.sara_adapter, output_dir, held)
        if self.processing_class is not None and _tokenizer_state(self.processing_class) != self._tokenizer_state:
            self.processing_class.save_pretrained(output_dir)
        # `to_json_string` replaces every token by a placeholder.
        Path(output_dir, hub.TRAINING_ARGS_FILE).write_text(self.args.to_json_string(), encoding="utf-8")
        logger.info("Saved the adapter to %s", output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._save_running_loss(output_dir)
        if self.is_deepspeed_enabled:
            # Comes with DeepSpeed alone.
            from accelerate.utils import DeepSpeedSchedulerWrapper

            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
            if not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
                self._save_scheduler(output_dir)
        elif self.is_fsdp_enabled:
            from accelerate.utils import save_fsdp_optimizer

            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
            self._save_scheduler(output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    # ---- resuming ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_tensors(resume_from_checkpoint, "checkpoint")

    def _load_best_model(self) -> None:
        logger.info("Loading the best adapter from %s", self.state.best_model_checkpoint)
        self._load_tensors(self.state.best_model_checkpoint, "best checkpoint")

    def _load_tensors(self, folder: str, what: str) -> None:
        """Load a checkpoint's tensors into the adapter, after comparing method, sites and ranks; raise otherwise."""
        adapter = self.sara_adapter
        try:
            saved = storage.read(folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"The {what} {folder!r} cannot be loaded: {error}") from error
        differences = [
            f"{name}: {getattr(saved.args, name)!r} there, {getattr(adapter.args, name)!r} here"
            for name in ("method", "num_heads", "singular_values", "v_position")
            if getattr(saved.args, name) != getattr(adapter.args, name)
        ]
        there, here = ({site.name: site.k for site in sites} for sites in (saved.sites, adapter.sites))
        differences += [
            f"{name}: k={there.get(name)} there, k={here.get(name)} here"
            for name in {**there, **here}
            if there.get(name) != here.get(name)
        ]
        if differences:
            raise ValueError(
                f"The {what} {folder!r} belongs to another adapter. It differs in {'; '.join(differences[:5])}. "
                "Use the SaraArguments of its training, or another output_dir."
            )
        tensors = saved.tensors
        if self.is_deepspeed_enabled:
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(self.trained().values()), modifier_rank=0):
                adapter.load_state_dict(tensors)
        else:
            adapter.load_state_dict(tensors)

    def _prepare_for_training(self, *args, **kwargs):
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1:
            raise ValueError("FSDP1 is not supported. Leave 'version' out of fsdp_config, or set it to 2.")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # They take contiguous parameters only, and U lies in memory by columns.
            for parameter in self.model.parameters():
                parameter.data = parameter.data.contiguous()
        # DeepSpeed checkpoints are written without the frozen base, so they cannot be loaded strictly; Trainer asks
        # for that with PEFT's class only.
        load = transformers_trainer.deepspeed_load_checkpoint
        transformers_trainer.deepspeed_load_checkpoint = lambda engine, path, **_: load(
            engine, path, load_module_strict=False
        )
        try:
            return super()._prepare_for_training(*args, **kwargs)
        finally:
            transformers_trainer.deepspeed_load_checkpoint = load

    # The loss between two log lines lives in memory only. Saved with each checkpoint, the log of a resumed run equals
    # that of an uninterrupted one, also where checkpoints fall between log lines.

    def _save_running_loss(self, output_dir: str) -> None:
        # Of each process: their mean would be rounded.
        losses = nested_gather(self._tr_loss, self.args.parallel_mode).view(-1).tolist()
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            state = {
                "since_last_log": losses,
                "logged": self._total_loss_scalar,
                "last_logged_step": self._globalstep_last_logged,
                "seconds": self.training_seconds,
            }
            Path(output_dir, RUNNING_LOSS_FILE).write_text(json.dumps(state))

    def _restore_running_loss(self) -> None:
        self._sara_seconds = 0.0
        if self._sara_resumed_loss is not None:
            self._sara_seconds = self._sara_resumed_loss["seconds"]
            losses = self._sara_resumed_loss["since_last_log"]
            same = len(losses) == self.args.world_size
            self._tr_loss = self._tr_loss + (losses[self.args.process_index] if same else sum(losses) / len(losses))
            self._total_loss_scalar = self._sara_resumed_loss["logged"]
            self._globalstep_last_logged = self._sara_resumed_loss["last_logged_step"]

    def _finalize_training(self, trial, num_train_samples, start_time):
        if self._sara_resumed_loss is not None:
            # Trainer divides by the steps and the time of this call; the sum of the losses is that of the whole run.
            self._initial_global_step = 0
            start_time -= self._sara_seconds
            self._sara_resumed_loss = None
        return super()._finalize_training(trial, num_train_samples, start_time)

    # ---- the Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        # Trainer calls this in its constructor. A training must not wait for, or fail with, a network: each push makes
        # the repository if it has to.
        self.hub_model_id = self.args.hub_model_id
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """
        Save the adapter and its card to `args.output_dir` and push them, and only them, in one commit. The arguments
        are Trainer's; `kwargs` go to [`~SaraTrainerMixin.create_model_card`].
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        push = functools.partial(
            hub.push_folder,
            self.args.output_dir,
            self._hub_repo_id(),
            commit_message=commit_message,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision if revision is not None else self.args.hub_revision,
            token=token if token is not None else self.args.hub_token,
        )
        return push() if blocking else HfApi().run_as_future(push)

    def _hub_repo_id(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        by_step = self.args.save_strategy == SaveStrategy.STEPS
        where = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch)}"
        state = None
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            state = "last-checkpoint" if last else Path(checkpoint_folder).name
        job = HfApi().run_as_future(
            hub.push_checkpoint,
            checkpoint_folder,
            self._hub_repo_id(),
            commit_message=f"Training in progress, {where}",
            private=self.args.hub_private_repo,
            revision=self.args.hub_revision,
            token=self.args.hub_token,
            state_in_repo=state,
            state_files=CHECKPOINT_FILES,
        )
        job.add_done_callback(_warn_of_failure)
        if busy:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        results: Sequence[EvalResult] = (),
        dataset_name: str | None = None,
    ) -> None:
        """
        Write the adapter's model card to `args.output_dir`. The first nine arguments are Trainer's.

        Args:
            dataset_name (`str`, *optional*): `dataset`, as TRL's trainers call it.
            results (`Sequence[EvalResult]`, *optional*):
                Evaluation results. Left out, those of the last evaluation, where `dataset_tags` or `dataset` says on
                what.
        """
        if not self.is_world_process_zero():
            return
        dataset = dataset or dataset_name
        names = [dataset] if isinstance(dataset, str) else list(dataset or [])
        ids = [dataset_tags] if isinstance(dataset_tags, str) else list(dataset_tags or [])
        repo_id = self._hub_repo_id()
        path = Path(self.args.output_dir, model_card.CARD_FILE)
        card = model_card.make_card(
            self.sara_adapter,
            folder=self.args.output_dir,
            repo_id=repo_id,
            title=model_name or repo_id.rsplit("/", 1)[-1],
            base_model=finetuned_from,
            language=language,
            license=license,
            tags=tags or (),
            results=results or self._last_evaluation(ids, names, tasks),
            training=model_card.Training(
                hyperparameters=model_card.non_default(self.args),
                log=self.state.log_history,
                seconds=self.training_seconds,
                datasets=ids or names,
            ),
            existing=path.read_text(encoding="utf-8") if path.is_file() else None,
        )
        storage.write_file(path, card.encode())

    def _last_evaluation(self, ids: list[str], names: list[str], tasks: str | list[str] | None) -> list[EvalResult]:
        """The metrics of the last evaluation, where somebody said on what they were measured."""
        entry = next((entry for entry in reversed(self.state.log_history) if "eval_loss" in entry), {})
        values = {
            key.removeprefix("eval_"): value
            for key, value in entry.items()
            if key.startswith("eval_") and not key.endswith(("runtime", "per_second"))
        }
        task = tasks[0] if isinstance(tasks, list) and tasks else tasks
        task = task or model_card.pipeline_of(type(self.sara_adapter.model).__name__) or "other"
        dataset = (ids or names or [None])[0]
        if dataset is None:
            return []
        return [
            EvalResult(
                task_type=task,
                dataset_type=dataset,
                dataset_name=(names or ids)[0],
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in values.items()
        ]


def _warn_of_failure(job: Future) -> None:
    """A push in the background that failed must not go unnoticed, nor end the training."""
    if not job.cancelled() and job.exception() is not None:
        logger.warning("%s", job.exception())


class SaraTrainer(SaraTrainerMixin, Trainer):
    """
    [`~transformers.Trainer`] for SARA and Mo-SARA adapters.

    Example:

    ```python
    trainer = SaraTrainer(
        model=model,
        args=TrainingArguments("my-adapter", learning_rate=8e-3),
        sara_args=SaraArguments(threshold=0.012),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    ```
    """


class SaraSeq2SeqTrainer(SaraTrainerMixin, Seq2SeqTrainer):
    """[`~transformers.Seq2SeqTrainer`] for SARA and Mo-SARA adapters."""


class _OnTrainBegin(TrainerCallback):
    """Trainer has no method of its own to override at that moment, only an event."""

    def __init__(self, trainer: SaraTrainerMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._on_train_begin()


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """
    The newest checkpoint in a folder that was written to its end.

    Args:
        folder (`str` or `os.PathLike`): A training's `output_dir`.

    Returns:
        `str`, *optional*: Its path; `None` if there is none.
    """
    if not os.path.isdir(folder):
        return None
    for path in reversed(sort_checkpoints(output_dir=str(folder))):
        try:
            # Trainer writes the state last, so a state that can be read says that all else is there.
            json.loads(Path(path, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("Passing over the incomplete checkpoint %s.", path)
            continue
        return path
    return None


@contextmanager
def _pose_as_peft(model: Any):
    """
    Trainer refuses a quantized base unless PEFT has put an adapter on it. Ours is one too, so for the length of the
    constructor the model says that it has one.
    """
    inner = unwrap(model) if isinstance(model, nn.Module) else None
    if not getattr(inner, "is_quantized", False) or getattr(inner, "_hf_peft_config_loaded", False):
        yield
        return
    inner._hf_peft_config_loaded = True
    try:
        yield
    finally:
        inner._hf_peft_config_loaded = False


def _tokenizer_state(processing_class: Any) -> tuple | None:
    """What training may change of a tokenizer: its added tokens, special tokens and template."""
    if processing_class is None or not hasattr(processing_class, "get_added_vocab"):
        return None
    tokens = tuple(sorted(processing_class.get_added_vocab().items()))
    special = json.dumps(processing_class.special_tokens_map, default=str, sort_keys=True)
    return tokens, special, str(getattr(processing_class, "chat_template", None))
