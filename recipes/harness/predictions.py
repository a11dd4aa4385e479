"""Decoding a test set into a file, from which an interrupted call goes on."""

import json
import logging
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from transformers.utils.logging import tqdm

from hf_sara.files import write_file

logger = logging.getLogger(__name__)


def decode_to_file(
    path: str | PathLike,
    key: str,
    values: Sequence[Any],
    lengths: Sequence[int],
    decode: Callable[[list[int]], list[dict[str, Any]]],
    batch_size: int = 16,
) -> list[dict[str, Any]]:
    """
    Decode inputs in batches, and write the results into a file after each batch.

    Args:
        path (`str` or `os.PathLike`): The file, with one line of JSON per row. In the end, the rows are in the order
            of `values`. Rows of an earlier call whose inputs are not among `values` are kept behind them.
        key (`str`): The entry of a row that says which input it belongs to.
        values (`Sequence`): The distinct values of that entry, one per input.
        lengths (`Sequence[int]`): The lengths of the inputs in tokens. Inputs of similar length share a batch.
        decode (`Callable`): Gets the indices of a batch and returns their rows, in that order.
        batch_size (`int`, *optional*, defaults to 16): How many inputs are decoded together.

    Returns:
        `list[dict]`: The rows, in the order of `values`.
    """
    path = Path(path)
    done = _read_rows(path, key)
    # The file is written anew, because the last line of an interrupted call may be incomplete.
    _write_rows(path, done.values())
    # A batch is decoded as a whole or not at all, so that a resumed call pads like an uninterrupted one.
    order = sorted(range(len(values)), key=lambda index: lengths[index])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with (
        tqdm(total=len(values), desc=f"Decoding {path.stem}") as progress,
        open(path, "a", encoding="utf-8", newline="\n") as file,
    ):
        for batch in batches:
            if not all(values[index] in done for index in batch):
                for row in decode(batch):
                    done[row[key]] = row
                    file.write(_line(row))
                file.flush()
            progress.update(len(batch))
    rows = [done.pop(value) for value in values]
    _write_rows(path, [*rows, *done.values()])
    return rows


def first_row(path: str | PathLike) -> dict[str, Any]:
    """The row of the first input, in a file that [`decode_to_file`] has finished."""
    with open(path, encoding="utf-8") as file:
        return json.loads(next(file))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read_rows(path: Path, key: str) -> dict[Any, dict[str, Any]]:
    done = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        if not line:
            continue
        try:
            row = json.loads(line)
            done[row[key]] = row
        except (ValueError, KeyError, TypeError):
            logger.warning("%s has a damaged line; its text is decoded again.", path)
    return done


def _write_rows(path: Path, rows) -> None:
    write_file(path, "".join(map(_line, rows)).encode())
