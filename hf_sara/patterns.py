"""The match of a module's name with a name or a regular expression of an adapter's arguments."""

import re
from collections.abc import Iterable

PLAIN_NAME = re.compile(r"[\w.]+")


def matches(name: str, pattern: str, argument: str) -> bool:
    """
    Whether a choice of modules includes a full name. A plain name has to be the end of the full name, and begin there
    after a dot. Anything else is a regular expression for the whole name. An error names the argument that it is of.
    """
    if PLAIN_NAME.fullmatch(pattern):
        return f".{name}".endswith(f".{pattern}")
    try:
        return re.fullmatch(pattern, name) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{argument}={pattern!r} is not a valid regular expression: {error}.") from error


def is_of_update(name: str) -> bool:
    """Whether the full name of a module or a parameter is that of an update, and not of the base model."""
    return ".sara." in f"{name}."


def is_within(name: str, modules: Iterable[str]) -> bool:
    """Whether a name is that of one of these modules, or of a module or a tensor in one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)
