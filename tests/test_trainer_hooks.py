"""The methods of `transformers.Trainer` that our mixins override: which of them did a release of it change?"""

import ast
import inspect
from pathlib import Path

import transformers
from transformers import Trainer

from hf_sara import trainer
from hf_sara.trainer import SaraTrainerMixin

# The parameters of each method, with which the overrides and their calls of `super()` were written.
SIGNATURES = {
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
    "call_model_init": "(self, trial=None)",
    "compute_loss": "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
    "create_model_card": "(self, language=None, license=None, tags=None, model_name=None, finetuned_from=None, "
    "tasks=None, dataset_tags=None, dataset=None, dataset_args=None)",
    "get_batch_samples": "(self, epoch_iterator, num_batches, device)",
    "get_decay_parameter_names": "(self, model)",
    "init_hf_repo": "(self, token=None, private=None)",
    "push_to_hub": "(self, commit_message='End of training', blocking=True, token=None, revision=None, private=None, "
    "**kwargs)",
    "save_model": "(self, output_dir=None, _internal_call=False)",
    "train": "(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None)",
    "training_step": "(self, model, inputs, num_items_in_batch=None)",
}
# Attributes and functions of the Trainer that the mixins read or set.
ATTRIBUTES = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step", "_train_batch_size")


def plain(signature: inspect.Signature) -> str:
    """A signature without its annotations, which releases change for other reasons."""
    parameters = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return str(inspect.Signature(parameters))


def overridden() -> dict[str, list[str]]:
    """The methods of Trainer that our mixins define too, and the modules where they do."""
    found: dict[str, list[str]] = {}
    for kind in SaraTrainerMixin.__mro__:
        if kind.__module__.startswith("hf_sara."):
            for name in vars(kind):
                if not name.startswith("__") and hasattr(Trainer, name):
                    found.setdefault(name, []).append(kind.__module__)
    return found


def test_the_hooks_of_trainer_are_those_that_we_override():
    where = overridden()
    assert set(where) == set(SIGNATURES), "A mixin overrides another method of Trainer. Add its signature here."
    changed = []
    for name, expected in SIGNATURES.items():
        found = plain(inspect.signature(getattr(Trainer, name)))
        if found != expected:
            changed.append(f"Trainer.{name}{found}, was {expected}: read its new body beside {', '.join(where[name])}")
    assert not changed, f"transformers {transformers.__version__} changed what we build on. " + "; ".join(changed)


def test_the_state_that_resuming_restores_is_still_kept_under_its_names():
    source = inspect.getsource(inspect.getmodule(Trainer))
    missing = [name for name in ATTRIBUTES if f"self.{name}" not in source]
    assert not missing, (
        f"transformers {transformers.__version__} keeps {missing} no more. Look at hf_sara/trainer/resuming.py, which "
        "saves and restores them, for what took their place."
    )
    assert callable(transformers.trainer.deepspeed_load_checkpoint), "See AdapterTrainerMixin._prepare_for_training."


def test_the_state_of_the_mixins_cannot_be_taken_for_that_of_another_trainer():
    """The mixins stand before any subclass of Trainer, so that their own attributes have a prefix."""
    ours = set()
    for path in Path(trainer.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in (part for found in targets for part in getattr(found, "elts", [found])):
                if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self":
                    ours.add(target.attr)
    source = inspect.getsource(inspect.getmodule(Trainer))
    theirs = {name for name in ours if f"self.{name}" in source}
    # These are of a sampler, of a callback and of an interrupt.
    assert {name for name in ours - theirs if not name.startswith(("sara_", "_sara_"))} == {
        "seed",
        "trainer",
        "pressed",
    }
