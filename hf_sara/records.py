"""Reading JSON from files that are not trusted: their size is bounded, and their fields have to be the known ones."""

import inspect
import json
import math
import reprlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

# A whole number of a file has to fit into 64 bits, as each size and each token id does. So nothing computes with, or
# prints, a number of a million digits.
LARGEST_NUMBER = 2**63 - 1
# The longest text of a number. Python writes numbers with at most 24 characters.
MOST_DIGITS = 100
MOST_DIMENSIONS = 64


def read_json(path: Path, most_bytes: int) -> dict[str, Any]:
    """
    The JSON object in a file.

    Raises:
        `ValueError`: If the file is larger than `most_bytes` or no JSON object, or if it has a name twice in one
            object, a number that is not finite or has more than 64 bits, or half of a character.
    """
    with open(path, "rb") as file:
        return parse_json(file.read(most_bytes + 1), most_bytes)


def parse_json(content: bytes, most_bytes: int) -> dict[str, Any]:
    """The JSON object in a text, with the errors of [`read_json`]."""
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes:,} bytes, which no config has")
    try:
        text = content.decode()
        record = json.loads(
            text,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_finite,
            object_pairs_hook=_without_duplicates,
        )
        if "\\ud" in text.lower():
            # Two escapes can be the halves of one character. A half alone cannot be written as UTF-8.
            json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if type(record) is not dict:
        raise ValueError("it is not a JSON object")
    return record


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS or abs(int(text)) > LARGEST_NUMBER:
        raise ValueError(f"the whole number {_short(text)} has more than 64 bits")
    return int(text)


def _finite(text: str) -> float:
    if len(text) > MOST_DIGITS or not math.isfinite(float(text)):
        raise ValueError(f"the number {_short(text)} is not finite, or has more than {MOST_DIGITS} digits")
    return float(text)


def _short(text: str) -> str:
    return text if len(text) <= 30 else f"{text[:20]}... of {len(text):,} characters"


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


def check_shape(what: str, shape: Sequence[int]) -> None:
    """Raise a `ValueError` unless a tensor can have this shape. torch counts its numbers in 64 bits."""
    product = 1
    for size in shape:
        product *= max(size, 1)
        if size < 0 or product > LARGEST_NUMBER or len(shape) > MOST_DIMENSIONS:
            raise ValueError(f"{what} has the shape {reprlib.repr(tuple(shape))}, which no tensor can have")
