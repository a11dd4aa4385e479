"""The recipes as modules, for the tests of them."""

import importlib.util
from pathlib import Path
from types import ModuleType

RECIPES = Path(__file__).parents[2] / "recipes"
FAKE = Path(__file__).with_name("fake_recipe.py")


def load(name: str) -> ModuleType:
    """A recipe, imported under its name; a new module each time."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
