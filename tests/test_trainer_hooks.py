"""The methods of `transformers.Trainer` that our mixins override: which of them did a release of it change?"""

import ast
import inspect
from pathlib import Path

import transformers
from transformers import Trainer

from hf_sara import trainer, versions
from hf_sara.trainer import SaraTrainerMixin, hooks
from hf_sara.trainer.hooks import SIGNATURES, changed_hooks


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
    assert set(overridden()) == set(SIGNATURES), "A mixin overrides another method of Trainer. Add its signature."
    where = {name: ", ".join(modules) for name, modules in overridden().items()}
    assert not changed_hooks(), (
        f"transformers {transformers.__version__} changed what we build on: {changed_hooks()}. Read the new bodies "
        f"beside our overrides: {where}"
    )
    assert callable(transformers.trainer.deepspeed_load_checkpoint), "See AdapterTrainerMixin._prepare_for_training."


def test_a_changed_hook_is_named(monkeypatch):
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda self, model, trial, metrics=None: None)
    monkeypatch.delattr(Trainer, "_load_best_model")
    changed = changed_hooks()
    assert "Trainer._load_best_model is gone" in changed
    assert "Trainer._save_checkpoint has the parameters (self, model, trial, metrics=None)" in changed
    assert len(changed) == 2


def test_versions_that_were_not_tested_are_said_once(monkeypatch, caplog):
    hooks.say_if_untested.cache_clear()
    monkeypatch.setitem(versions.TESTED, "transformers", "5.3")
    hooks.say_if_untested()
    hooks.say_if_untested()
    (record,) = caplog.records
    assert f"Newer ones are installed: transformers {transformers.__version__}" in record.getMessage()
    assert "Nothing that it overrides has other parameters there." in record.getMessage()
    caplog.clear()
    hooks.say_if_untested.cache_clear()
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda self, model: None)
    hooks.say_if_untested()
    assert "Trainer._save_checkpoint has the parameters (self, model)." in caplog.text


def test_nothing_is_said_of_tested_versions_and_of_their_patches(monkeypatch, caplog):
    hooks.say_if_untested.cache_clear()
    monkeypatch.setattr(versions, "version", lambda name: f"{versions.TESTED[name]}.9")
    hooks.say_if_untested()
    assert not caplog.records


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
    # Trainer has this one since transformers 5.19.
    theirs = {"_initial_global_step"} | {name for name in ours if f"self.{name}" in source}
    # These are of a sampler, a callback, an interrupt, a collator and the weights of rows. `bank` is public.
    assert {name for name in ours - theirs if not name.startswith(("sara_", "_sara_"))} == {
        *("seed", "trainer", "pressed", "collator", "_counts", "_divided", "_are_apart", "bank"),
    }
