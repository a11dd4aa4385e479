"""
What the mixins of this package build on inside of [`~transformers.Trainer`], much of it private, so that a release of
transformers may change it: the methods that they override, and the state that they save and restore.
"""

import functools
import inspect
import logging

from transformers import Trainer

from ..versions import TESTED, untested

logger = logging.getLogger(__name__)

# The parameters of each method, with which the overrides and their calls of `super()` were written. Where several are
# given, the later ones are those of earlier versions of transformers.
SIGNATURES: dict[str, str | tuple[str, ...]] = {
    "_clip_grad_norm": "(self, model)",
    "_finalize_training": "(self, trial, num_train_samples, start_time)",
    "_get_train_sampler": "(self, train_dataset=None)",
    "_hp_search_setup": "(self, trial)",
    "_init_training_state": "(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, "
    "trial)",
    "_load_best_model": "(self)",
    "_load_from_checkpoint": "(self, resume_from_checkpoint, model=None)",
    "_prepare_for_training": "(self, max_steps, train_dataloader, resume_from_checkpoint)",
    "_push_from_checkpoint": "(self, checkpoint_folder)",
    "_run_epoch": "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
    "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)",
    "_save": "(self, output_dir=None, state_dict=None)",
    "_save_optimizer_and_scheduler": "(self, output_dir)",
    "_save_checkpoint": "(self, model, trial)",
    "_save_rng_state": "(self, output_dir)",
    "_set_signature_columns_if_needed": "(self)",
    "call_model_init": "(self, trial=None)",
    "compute_loss": "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
    "create_model_card": "(self, language=None, license=None, tags=None, model_name=None, finetuned_from=None, "
    "tasks=None, dataset_tags=None, dataset=None, dataset_args=None)",
    "get_batch_samples": "(self, epoch_iterator, num_batches, device)",
    "get_decay_parameter_names": "(self, model)",
    "init_hf_repo": ("(self, token=None, private=None)", "(self, token=None)"),
    "prediction_step": "(self, model, inputs, prediction_loss_only, ignore_keys=None)",
    "push_to_hub": (
        "(self, commit_message='End of training', blocking=True, token=None, revision=None, private=None, **kwargs)",
        "(self, commit_message='End of training', blocking=True, token=None, revision=None, **kwargs)",
    ),
    "save_model": "(self, output_dir=None, _internal_call=False)",
    "train": "(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None)",
    "training_step": "(self, model, inputs, num_items_in_batch=None)",
}
# Attributes of the Trainer that resuming saves and restores, and two by which labels are counted.
ATTRIBUTES = (
    "_loss_shifts_labels",
    "_get_num_items_in_batch",
    "_tr_loss",
    "_total_loss_scalar",
    "_globalstep_last_logged",
    "_train_batch_size",
)


def changed_hooks() -> list[str]:
    """What transformers changed of the above, each in a few words."""
    changed = []
    for name, accepted in SIGNATURES.items():
        method = getattr(Trainer, name, None)
        if method is None:
            changed.append(f"Trainer.{name} is gone")
            continue
        found = _plain(inspect.signature(method))
        if found not in (accepted if isinstance(accepted, tuple) else (accepted,)):
            changed.append(f"Trainer.{name} has the parameters {found}")
    source = inspect.getsource(inspect.getmodule(Trainer))  # type: ignore[arg-type]
    changed += [f"Trainer.{name} is gone" for name in ATTRIBUTES if f"self.{name}" not in source]
    return changed


def _plain(signature: inspect.Signature) -> str:
    """A signature without its annotations, which releases change for other reasons."""
    parameters = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return str(inspect.Signature(parameters))


@functools.cache
def say_if_untested() -> None:
    """Warn, once in a process, if hf_sara runs with versions that it was not tested with."""
    newer = untested()
    if newer:
        tested = ", ".join(f"{name} {last}" for name, last in TESTED.items())
        changed = changed_hooks()
        logger.warning(
            "hf_sara was tested up to these versions: %s. Newer ones are installed: %s. %s",
            tested,
            ", ".join(newer),
            f"transformers changed what it builds on, so look closely at the results: {'; '.join(changed)}."
            if changed
            else "Nothing that it overrides has other parameters there.",
        )
