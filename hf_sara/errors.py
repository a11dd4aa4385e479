"""The error of adapter files, and how text from elsewhere is shown."""

import re
import sys
from typing import Any


def escaped(text: str, keep: str = "") -> str:
    """The text with an escape in place of each character that does not print, except for those of `keep`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def one_line(text: object, most: int = 2000) -> str:
    """
    Text that came from elsewhere, in a form that neither floods nor controls a terminal: one line of at most `most`
    characters, without characters that do not print.
    """
    joined = re.sub(r"\s*[\r\n]\s*", " ", _shortened(str(text), most).strip())
    return _shortened(escaped(joined), most)


def print_anything() -> None:
    """
    From now on, a character that the standard output cannot show is printed as an escape. A file or a pipe has one of
    the old code pages on Windows, which lack most characters, and they would be errors.
    """
    output: Any = sys.stdout
    if hasattr(output, "reconfigure"):
        output.reconfigure(errors="backslashreplace")


def _shortened(text: str, most: int) -> str:
    half = (most - 7) // 2
    return text if len(text) <= most else f"{text[:half]} [...] {text[-half:]}"


class AdapterError(ValueError):
    """An adapter's files are damaged, or do not belong to this base model."""

    def __init__(self, message: str):
        # The message may quote the files.
        super().__init__(one_line(message))
