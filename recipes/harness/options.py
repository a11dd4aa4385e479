"""The command line of the recipes. Every option can also stand in a YAML file."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from hf_sara.errors import print_anything


class RecipeError(ValueError):
    """A recipe was asked for something that it cannot do. The message says what to change."""


def parse_arguments(
    dataclasses: Sequence[type],
    defaults: Callable[[dict[str, Any]], dict[str, Any]],
    argv: Sequence[str] | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """
    Parse a command line. Its options win over those in the YAML file of `--config`, which win over the recipe's
    defaults.

    Args:
        dataclasses (`Sequence[type]`): The dataclasses whose fields are the options.
        defaults (`Callable`): Gets all options that were given outright, by the file or the command line, and returns
            the recipe's defaults, which may depend on them: the paper's learning rate depends on the method.
        argv (`Sequence[str]`, *optional*): The command line; defaults to the process's own.
        description (`str`, *optional*): Text above the list of options.

    Returns:
        `tuple`: One instance per dataclass.

    Raises:
        [`RecipeError`]: If the YAML file is missing, not a mapping, or names an unknown option.
    """
    given, _ = given_options(dataclasses, argv)
    known = {field.name for dataclass in dataclasses for field in fields(dataclass) if field.init}
    from_file = _read_yaml(given["config"], known) if given.get("config") else {}
    parser = _make_parser(dataclasses, description)
    parser.set_defaults(**{**defaults({**from_file, **given}), **from_file})
    return parser.parse_args_into_dataclasses(args=argv)[: len(dataclasses)]


def given_options(dataclasses: Sequence[type], argv: Sequence[str] | None = None) -> tuple[dict[str, Any], list[str]]:
    """
    Read which options a command line gives, without any defaults.

    Args:
        dataclasses (`Sequence[type]`): The dataclasses whose fields are the options.
        argv (`Sequence[str]`, *optional*): The command line; defaults to the process's own.

    Returns:
        `tuple[dict[str, Any], list[str]]`: The values of the given options by their names, `config` among them, and
        the arguments that belong to no option.
    """
    parser = argparse.ArgumentParser(
        parents=[_make_parser(dataclasses)], add_help=False, conflict_handler="resolve", allow_abbrev=False
    )
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    given, unknown = parser.parse_known_args(argv)
    return vars(given), unknown


def _make_parser(dataclasses: Sequence[type], description: str | None = None) -> HfArgumentParser:
    parser = HfArgumentParser(
        dataclasses,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file with any of these options; the command line wins over it.")
    return parser


def _read_yaml(path: str, known: set[str]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise RecipeError(f"--config {path}: cannot be read ({error}).") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"--config {path}: is not valid YAML ({error}).") from error
    if not isinstance(content, dict):
        raise RecipeError(f"--config {path}: has to be a mapping of option names to values.")
    unknown = sorted(set(content) - known)
    if unknown:
        raise RecipeError(
            f"--config {path}: unknown options {', '.join(map(str, unknown))}. See --help for the names."
        )
    return content


def check_least(options: Any, **least: int) -> None:
    """
    Refuse numbers that are too small. Without this, some of them would be refused after hours of training only.

    Args:
        options: An instance of a dataclass. A field that is `None` is not checked.
        least (`int`): The least value of each field.

    Raises:
        [`RecipeError`]: If a field has a smaller value; the message names the first one.
    """
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise RecipeError(f"{name}={value} has to be at least {bound}.")


def run_script(name: str, main: Callable[[], Any]) -> None:
    """
    Run a recipe as a script, and print what it returns.

    Args:
        name (`str`): The name of the recipe, which stands before an error's message.
        main (`Callable`): The recipe.
    """
    print_anything()
    try:
        result = main()
    except (ValueError, OSError, ImportError) as error:
        # These errors say what cannot work or what is missing, so their message is enough. Any other one is a bug,
        # and shows its trace.
        sys.exit(f"{name}: {error}")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
