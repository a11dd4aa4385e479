"""Reading JSON from files that are not trusted: their size is bounded, and their fields have to be the known ones."""

import inspect
import json
import math
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin


def read_json(path: Path, most_bytes: int) -> dict[str, Any]:
    """
    The JSON object in a file.

    Raises:
        `ValueError`: If the file is larger than `most_bytes` or no JSON object, or if it has a name twice in one
            object or a number that is not finite.
    """
    with open(path, "rb") as file:
        return parse_json(file.read(most_bytes + 1), most_bytes)


def parse_json(content: bytes, most_bytes: int) -> dict[str, Any]:
    """The JSON object in a text, with the errors of [`read_json`]."""
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes:,} bytes, which no config has")
    try:
        record = json.loads(
            content.decode(), parse_float=_finite, parse_constant=_finite, object_pairs_hook=_without_duplicates
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if type(record) is not dict:
        raise ValueError("it is not a JSON object")
    return record


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text} is not finite")
    return number


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name, value in pairs:
        if name in record:
            raise ValueError(f"{name!r} stands twice in one object")
        record[name] = value
    return record


def check_fields(what: str, record: Any, hints: Mapping[str, Any], optional: Collection[str] = ()) -> None:
    """Raise a `ValueError` unless a JSON object has exactly the known fields, with values of their types."""
    if type(record) is not dict:
        raise ValueError(f"{what} is not a JSON object")
    for name in hints:
        if name not in record and name not in optional:
            raise ValueError(f"{name!r} is missing in {what}")
    for name, value in record.items():
        if name not in hints:
            raise ValueError(f"the field {name!r} in {what} is unknown: update hf_sara, or leave it out")
        if not _is_of_type(value, hints[name]):
            expected = inspect.formatannotation(hints[name])
            raise ValueError(f"{name}={reprlib.repr(value)} in {what} is not of the type {expected}")


def _is_of_type(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type. An integer counts as a float too, and `True` does not count as an integer."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_is_of_type(value, part) for part in parts)
    if kind is list:
        return type(value) is list and all(_is_of_type(item, parts[0]) for item in value)
    if kind is dict:
        return type(value) is dict and all(_is_of_type(item, parts[1]) for item in value.values())
    return type(value) is hint or (hint is float and type(value) is int)
