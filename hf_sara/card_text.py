"""The text of a model card: values that fit into a table cell, and the text of people around the generated part.

A card has YAML metadata and Markdown. The generated Markdown stands between two marks. The text outside of them
belongs to the people who wrote it, and so do metadata that hf_sara does not set.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

BEGIN = "<!-- hf_sara: generated from here, written anew at every save -->"
END = "<!-- hf_sara: generated up to here -->"


def join_card(metadata: dict[str, Any], body: str, existing: str | None) -> str:
    """A card with metadata and generated text. The text and the metadata of people on an existing card are kept."""
    before, after, theirs = "", "", {}
    if existing:
        card = ModelCard(existing, ignore_metadata_errors=True)
        theirs = card.data.to_dict()
        before, after = own_text(card.text)
    tags = list(dict.fromkeys([*listed(theirs.get("tags")), *metadata["tags"]]))
    kept = {key: value for key, value in theirs.items() if value is not None and key not in metadata}
    data = ModelCardData(**{**kept, **metadata, "tags": tags}, ignore_metadata_errors=True)
    # A mark in the generated text, which an output of a model may hold, would end that text too early.
    body = body.replace(BEGIN, "").replace(END, "")
    parts = [part for part in (before, f"{BEGIN}\n\n{body.strip()}\n\n{END}", after) if part]
    return f"---\n{data.to_yaml().strip()}\n---\n\n" + "\n\n".join(parts) + "\n"


def take_over(card: str, other: str) -> str:
    """Add the text that people wrote on another version of a card, unless people wrote on this version too."""
    mine = ModelCard(card, ignore_metadata_errors=True)
    if any(own_text(mine.text)):
        return card
    generated = mine.text.split(BEGIN, 1)[-1].split(END, 1)[0]
    metadata = {key: value for key, value in mine.data.to_dict().items() if value is not None}
    return join_card({"tags": [], **metadata}, generated, other)


def own_text(text: str) -> tuple[str, str]:
    """The text that people wrote before and after the generated part of a card's Markdown."""
    if BEGIN in text and END in text[text.index(BEGIN) :]:
        before, rest = text.split(BEGIN, 1)
        return before.strip(), rest.split(END, 1)[1].strip()
    return text.strip(), ""


def listed(value: str | Sequence[str] | None) -> list[str]:
    """One text, several, or none, as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def inline(value: Any) -> str:
    """Escape a text, so that no character of it can end its table cell or its line."""
    text = " ".join(str(value).split())
    text = text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([|`*_\[\]])", r"\\\1", text)


def fenced(text: str) -> str:
    """A text as a block of code. The fence is longer than any in the text, so that the text cannot end the block."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def cells(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values as the rows of a table."""
    return [(inline(name), inline(number(value))) for name, value in values.items()]


def number(value: Any) -> str:
    """A number with five digits, and anything else as it is."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """A time in minutes and seconds, or in hours and minutes."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
