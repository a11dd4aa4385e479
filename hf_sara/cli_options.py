"""Values of options of the command `hf-sara` that are several ones."""

import reprlib

import typer


def listed(values: list[str] | None) -> list[str] | None:
    """The values of an option that may be repeated, and of which each may be several names with commas."""
    from .patterns import PLAIN_NAME

    found: list[str] = []
    for value in values or ():
        names = [name.strip() for name in value.split(",")]
        # A regular expression may have a comma of its own.
        found += names if all(map(PLAIN_NAME.fullmatch, names)) else [value]
    return found or None


def token_ids(values: list[str] | None) -> list[int] | None:
    try:
        return [int(token) for value in values or () for token in value.split(",")] or None
    except ValueError as error:
        raise typer.BadParameter(
            f"{reprlib.repr(values)} has to be ids of tokens, which are whole numbers, with commas: 5,17.",
            param_hint="--trainable-token-indices",
        ) from error
