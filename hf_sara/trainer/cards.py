"""Model cards and pushes of a training: which facts the card shows, and when the adapter is pushed."""

import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from .. import hub, storage
from ..card_text import listed
from ..checkpoints import RUNNING_LOSS_FILE
from ..model_card import Sample, Training, pipeline_of
from ..planning import AdapterSpec
from ..publishing import Published, published_arguments
from ..tensor_files import tensors_digest
from .bank_trainer import BankTrainerMixin
from .hooks import say_if_untested
from .resuming import output_dir_of

logger = logging.getLogger(__name__)

# Resuming needs these files besides the adapter.
CHECKPOINT_FILES = (OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, RUNNING_LOSS_FILE, "rng_state*", "scaler.pt")
# A card always shows these, and the number of epochs or of steps.
ALWAYS_SHOWN = (
    *("learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("optim", "seed"),
)
# A run of so few steps needs the rates of a short one.
SHORT_RUN = 1000
# These arguments say how a training was run, and not what it computed.
UNINTERESTING = re.compile(
    "logging_|disable_tqdm|hub_|save_|dataloader_|skip_memory|use_cpu|eval_|load_best|accelerator_config|ddp_"
)


def non_default(args: TrainingArguments, chosen: Sequence[str] = ()) -> Published:
    """
    The training arguments that may be published and that a reader of the card cares about: those that differ from
    their defaults, and a few that decide every training. It is counted how many others differ.
    """
    # The declared defaults are read, and not those of a new instance. Making one fails if the defaults do not suit
    # this machine, and resets the state that Accelerate keeps for a running training.
    default = {
        item.name: item.default if item.default_factory is MISSING else item.default_factory() for item in fields(args)
    }
    found = published_arguments(args, chosen)
    # `max_steps` overrides the number of epochs, so that number says nothing about the training.
    idle = "num_train_epochs" if args.max_steps > 0 else "max_steps"
    shown = {
        name: value
        for name, value in found.values.items()
        # Some fields that are declared `None` become False, or an empty list.
        if name in ALWAYS_SHOWN or ((default[name] or None) != (value or None) and not UNINTERESTING.match(name))
    }
    del shown[idle]
    left_out = [
        name
        for name in default
        if name not in found.values and (default[name] or None) != (getattr(args, name) or None)
    ]
    return Published(shown, len(left_out))


class SaraTrainerMixin(BankTrainerMixin):
    """
    A mixin that makes any [`~transformers.Trainer`] train, save, resume, load and share SARA adapters: `class
    MyTrainer(SaraTrainerMixin, SFTTrainer): pass`. Everything else, arguments included, is the Trainer's own.
    Its default learning rate is far too small here, and a training warns of it once: see [`SaraTrainer`].

    Args:
        sara_args ([`SaraArguments`], *optional*):
            The adapter to attach to the model, or to each new model of `model_init`. If it is left out, a model that
            carries an adapter keeps it, and a model without one gets the default, SARA at threshold 0.01.
        adapter_name (`str`, *optional*):
            The adapter to train, for a model that carries several, or the name of a new one. The tensors of the others
            do not train.
        bank ([`AdapterBank`], *optional*):
            The bank of the model whose adapters are trained, all at once, in the place of one adapter. Each row of the
            data has the name of its adapter in the column `adapter_name`, trains this one alone, and counts for it as
            in a training of its own. Each adapter is saved in a folder of its name.
        plan ([`Plan`], `str` or `os.PathLike`, *optional*):
            What [`plan`] found for the model, or the file that [`save_plan`] wrote. A new adapter takes its ranks, and
            none is computed. `sara_args` are the plan's if they are left out, and must not ask for other ranks.
        published_arguments (`Sequence[str]`, *optional*):
            Fields of a subclass of [`~transformers.TrainingArguments`] that the card and training_args.json may show.
            Those of TrainingArguments itself are shown as far as they hold neither a path nor a secret.

    Raises:
        `ValueError`: If `sara_args` contradict the adapter that the model carries, that adapter is merged, the model
            carries several and `adapter_name` does not say which is meant, or a parameter trains that the adapter does
            not hold.
    """

    hub_model_id: Any
    push_in_progress: Any

    def __init__(self, *args, **kwargs):
        # What the card says besides the facts of the training, by the names of `make_card`.
        self._sara_card: dict[str, Any] = {}
        self._sara_has_said = False
        super().__init__(*args, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        # Trainer calls this in its constructor. A training must neither wait for a network nor fail without one, so
        # each push makes the repository if it does not exist.
        self.hub_model_id = self.args.hub_model_id
        self.push_in_progress = None

    def _on_train_begin(self) -> None:
        super()._on_train_begin()
        if not self._sara_has_said and self.is_world_process_zero():
            self._sara_has_said = True
            say_if_untested()
            _advise(self._sara_spec(), self.optimizer, self.args.learning_rate, self.state.max_steps)
        with_state = self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
        if self.args.push_to_hub and with_state and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"hub_strategy={HubStrategy(self.args.hub_strategy).value!r} pushes the state of the optimizer, which "
                "FSDP and DeepSpeed keep in files of their own. hub_strategy='every_save' pushes the adapter."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Write the adapter and its model card, and not the base. Every process has to call this, and one of them writes.
        """
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.args.should_save:
            try:
                self._write_card(output_dir_of(self) if output_dir is None else output_dir)
            except OSError as error:
                logger.warning("The adapter is saved, and its model card cannot be written: %s", error)

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
        if self.bank is not None:
            raise ValueError("Push each adapter of the bank: trainer.bank[name].push_to_hub(repo_id).")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        folder = output_dir_of(self)
        commit: dict[str, Any] = {
            "repo_id": self._hub_repo_id(),
            "commit_message": commit_message or "End of training",
            "private": self.args.hub_private_repo if private is None else private,
            "revision": revision if revision is not None else self.args.hub_revision,
            "token": token if token is not None else self.args.hub_token,
        }
        if blocking:
            return hub.push_folder(folder, **commit)
        return HfApi().run_as_future(hub.push_files, hub.files_to_push(folder), folder, **commit)

    def _hub_repo_id(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(output_dir_of(self)).absolute().name

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        pending = self.push_in_progress
        busy = pending is not None and not pending.is_done()
        if busy and not self.args.hub_always_push:
            logger.info("Step %d is not pushed, because an earlier push is under way.", self.state.global_step)
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        by_step = self.args.save_strategy == SaveStrategy.STEPS
        where = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch)}"
        state = None
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            state = "last-checkpoint" if last else Path(checkpoint_folder).name
        try:
            # The files are read now, because this folder may be deleted before the push begins.
            files = hub.files_to_push(checkpoint_folder, state, CHECKPOINT_FILES)
        except (OSError, ValueError) as error:
            logger.warning("Step %d is not pushed: %s", self.state.global_step, error)
            return
        job = HfApi().run_as_future(
            hub.push_files,
            files,
            checkpoint_folder,
            self._hub_repo_id(),
            commit_message=f"Training in progress, {where}",
            private=self.args.hub_private_repo,
            revision=self.args.hub_revision,
            token=self.args.hub_token,
        )
        job.add_done_callback(_warn_of_failure)
        if pending is not None and busy:
            pending.jobs.append(job)
        else:
            # The class takes a list of jobs, which its annotation does not say.
            jobs: Any = [job]
            self.push_in_progress = PushInProgress(jobs)

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
        sample: Sample | None = None,
    ) -> None:
        """
        Write the adapter's model card to `args.output_dir`, beside the adapter. If the adapter is not saved there yet,
        as it is now, the card is written with the next save. The first nine arguments are Trainer's, and later cards
        have what they say too.

        Args:
            dataset_name (`str`, *optional*): Another name of `dataset`, which TRL's trainers use.
            results (`Sequence[EvalResult]`, *optional*):
                Evaluation results. Defaults to those of the last evaluation, if `dataset_tags` or `dataset` names its
                data.
            sample ([`~hf_sara.model_card.Sample`], *optional*): An input of the task and its output, for the snippet.
        """
        given = {
            "language": language,
            "license": license,
            "tags": tags,
            "title": model_name,
            "base_model": finetuned_from,
            "tasks": tasks,
            "ids": listed(dataset_tags),
            "names": listed(dataset or dataset_name),
            "results": results,
            "sample": sample,
        }
        self._sara_card |= {name: value for name, value in given.items() if value}
        if not self.is_world_process_zero():
            return
        folder = output_dir_of(self)
        if self._is_saved(folder):
            self._write_card(folder)
        elif not self.is_in_train:
            logger.warning(
                "The adapter is not saved in %s yet. The card is written when save_model is called.", folder
            )

    def _is_saved(self, folder: str) -> bool:
        """Whether a folder has the adapter as it is now."""
        if self._sara_saved == (os.path.abspath(folder), self.state.global_step):
            return True
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # One process alone cannot gather the tensors to compare.
            return False
        try:
            return all(
                storage.read(path).tensors_sha256 == tensors_digest(adapter.state_dict())
                for path, adapter in self._saved_adapters(folder)
            )
        except (OSError, ValueError):
            return False

    def _write_card(self, folder: str) -> None:
        """Write the card of the adapter that was just saved to a folder, with all that is known of it by now."""
        facts = dict(self._sara_card)
        names, ids, tasks = facts.pop("names", []), facts.pop("ids", []), facts.pop("tasks", None)
        settings = non_default(self.args, self._sara_published)
        on_hub = self.args.push_to_hub or self.hub_model_id or self.args.hub_model_id
        evaluation = _last_evaluation(self.state.log_history, self._sara_base, ids, names, tasks)
        facts.setdefault("results", evaluation)
        facts.setdefault("title", self._hub_repo_id().rsplit("/", 1)[-1] if on_hub else Path(folder).absolute().name)
        training = Training(
            hyperparameters=settings.values,
            left_out=settings.left_out,
            log=self.state.log_history,
            seconds=self.training_seconds,
            datasets=ids or names,
            others=0 if self.bank is None else len(self.bank.names) - 1,
        )
        for path, adapter in self._saved_adapters(folder):
            own = facts if path == folder else {**facts, "title": Path(path).name}
            # Without a repository, the snippet does not say where the folder lies, which is nobody else's business.
            adapter.write_card(path, repo_id=self._hub_repo_id() if on_hub else None, training=training, **own)


def _last_evaluation(
    log: Sequence[dict[str, Any]], model: Any, ids: list[str], names: list[str], tasks: str | list[str] | None
) -> list[EvalResult]:
    """The metrics of the last evaluation, if ids or names say on which data they were measured."""
    entry: dict[str, float] = next((entry for entry in reversed(log) if "eval_loss" in entry), {})
    values = {
        key.removeprefix("eval_"): value
        for key, value in entry.items()
        if key.startswith("eval_") and not key.endswith(("runtime", "per_second"))
    }
    if not ids and not names:
        return []
    dataset = (ids or names)[0]
    task = next(iter(listed(tasks)), None) or pipeline_of(type(model).__name__) or "other"
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


def _advise(spec: AdapterSpec, optimizer: Any, default_rate: float, steps: int) -> None:
    """Say before a training what would otherwise cost a person a whole run to find out."""
    method = spec.method
    groups = getattr(optimizer, "param_groups", ())
    rate = max((group.get("initial_lr", group["lr"]) for group in groups), default=default_rate)
    short, long = method.learning_rates
    # A head that trains with the adapter bears no rate as large as that of a short run.
    is_short = steps <= SHORT_RUN and not spec.parts
    # An optimizer that finds its own rate has 0 here.
    if 0.0 < rate < (short / 8 if is_short else long / 2):
        logger.warning(
            "%s learns next to nothing in %d steps at learning_rate=%g. The defaults of trainers are for whole "
            "models. Try %g for up to a few hundred steps, and %g for thousands.",
            *(method.title, steps, rate, short, long),
        )
    if spec.limit is not None:
        logger.warning("This adapter can be neither merged nor exported, also after its training. %s", spec.limit)


def _warn_of_failure(job: Future) -> None:
    """Warn of a push in the background that failed. It must neither go unnoticed nor end the training."""
    if not job.cancelled() and job.exception() is not None:
        logger.warning("%s", job.exception())
