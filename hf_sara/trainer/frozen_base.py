"""The mixin that lets `transformers.Trainer` train a few tensors beside a frozen base, whatever their method is.

Trainer has special cases for PEFT's own model class only. None of them holds for a model that is frozen in another
way.
"""

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..versions import checkpoints_activations
from .resuming import ExactResumeMixin

logger = logging.getLogger(__name__)

# So many batches may pass in the beginning without a gradient, as one without an image for an adapter of images.
PATIENCE = 10


class FrozenBaseMixin(ExactResumeMixin):
    """
    A mixin that makes a subclass of [`~transformers.Trainer`] train named tensors of a model whose other parameters
    are frozen. Subclasses define `trained` and `_load_tensors`, and write checkpoints in `save_model`.
    """

    def __init__(self, model=None, args=None, *positional, **kwargs):
        self._sara_learned = False
        self._sara_idle_steps = 0
        self._sara_input_gradients: PreTrainedModel | None = None
        self._sara_note_cache(model)
        if positional:
            super().__init__(model, args, *positional, **kwargs)
        else:
            # They are passed by name, since another argument may stand between them, as `ref_model` in DPOTrainer.
            super().__init__(model=model, args=args, **kwargs)

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained tensors by name."""
        raise NotImplementedError

    def _load_tensors(self, folder: str, what: str) -> None:
        """Load the trained tensors of a checkpoint, or raise an error that calls it `what` if they do not fit."""
        raise NotImplementedError

    def _sara_note_cache(self, model) -> None:
        # Trainer switches the cache off for training. It is switched on again later, because generation without it is
        # many times slower.
        self._sara_use_cache = getattr(getattr(model, "config", None), "use_cache", True)

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        self._sara_note_cache(model)
        self._sara_learned = False
        self._sara_idle_steps = 0
        return model

    def train(self, *args, **kwargs):
        """Train as Trainer does, and restore the model's configuration and hooks afterwards."""
        try:
            result = super().train(*args, **kwargs)
        finally:
            if self._sara_input_gradients is not None:
                self._sara_input_gradients.disable_input_require_grads()
                self._sara_input_gradients = None
            config: Any = getattr(self.model, "config", None)
            if hasattr(config, "use_cache"):
                config.use_cache = self._sara_use_cache
        if self._sara_idle_steps and not self._sara_learned:
            self._refuse_to_learn_nothing()
        return result

    def _on_train_begin(self) -> None:
        super()._on_train_begin()
        model = self.accelerator.unwrap_model(self.model)
        wants_hooks = checkpoints_activations(self.args) and hasattr(model, "enable_input_require_grads")
        if wants_hooks and not getattr(model, "_require_grads_hooks", None):
            # Reentrant checkpointing needs an input with a gradient, which embeddings of a frozen base do not have.
            model.enable_input_require_grads()
            self._sara_input_gradients = model

    def get_decay_parameter_names(self, model) -> list[str]:
        # Weight decay applies to every trained tensor on purpose, vectors and router included, as in the paper.
        trained = {id(p) for p in self.trained().values()}
        names = [name for name, parameter in model.named_parameters() if id(parameter) in trained]
        return [*names, *(name for name in super().get_decay_parameter_names(model) if name not in set(names))]

    def training_step(self, model, inputs, *args, **kwargs):
        if self._sara_learned:
            return super().training_step(model, inputs, *args, **kwargs)
        self._refuse_frozen()
        loss = super().training_step(model, inputs, *args, **kwargs)
        # DeepSpeed keeps gradients in its own place, and FSDP has empty shards, so that they cannot be checked here.
        tensors = [tensor for tensor in self.trained().values() if tensor.numel()]
        unseen = self.is_deepspeed_enabled or not tensors
        self._sara_learned = unseen or any(tensor.grad is not None for tensor in tensors)
        self._sara_idle_steps += not self._sara_learned
        if self._sara_idle_steps >= PATIENCE:
            self._refuse_to_learn_nothing()
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, *args, **kwargs):
        found: Any = super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        loss = found[0] if return_outputs else found
        if not torch.is_grad_enabled() or not model.training or loss.requires_grad:
            return found
        # No adapted module took part in this batch. Others may do in the next one.
        if self.args.world_size > 1:
            raise RuntimeError(
                "A batch of this process used no module that is trained, and the other processes would wait for its "
                "gradients. Give each batch something to train, or train in one process."
            )
        loss = loss + torch.zeros_like(loss, requires_grad=True)
        return (loss, *found[1:]) if return_outputs else loss

    def _refuse_frozen(self) -> None:
        frozen = [name for name, tensor in self.trained().items() if not tensor.requires_grad]
        if frozen:
            raise RuntimeError(
                f"{len(frozen)} tensors of the adapter are frozen and would not train: {', '.join(frozen[:5])}"
                f"{' ...' if len(frozen) > 5 else ''}. Let them train: parameter.requires_grad_(True)."
            )

    def _refuse_to_learn_nothing(self) -> None:
        names = list(self.trained())
        raise RuntimeError(
            f"In the first {self._sara_idle_steps} batches none of the {len(names)} trained tensors had a gradient: "
            f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}. Their modules take no part in the loss, or "
            "the adapter is disabled or merged. Choose other target_modules or layers, or enable the adapter."
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_tensors(resume_from_checkpoint, "checkpoint")

    def _load_best_model(self) -> None:
        logger.info("Loading the best adapter from %s", self.state.best_model_checkpoint)
        self._load_tensors(str(self.state.best_model_checkpoint), "best checkpoint")
