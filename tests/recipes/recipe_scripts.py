"""The recipes as modules, for the tests of them."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from harness import base_models
from harness.options import RecipeError

RECIPES = Path(__file__).parents[2] / "recipes"
FAKE = Path(__file__).with_name("fake_recipe.py")


def need_smollm2() -> None:
    """Skip a test where the real small model is not installed."""
    try:
        base_models.smollm2_file()
    except RecipeError as error:
        pytest.skip(f"extra: {error}")


def load(name: str) -> ModuleType:
    """A recipe, imported under its name; a new module each time."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
