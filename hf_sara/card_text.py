"""The text of a model card: values that fit into a table cell, and the text of people around the generated part.

A card has YAML metadata and Markdown. The generated Markdown stands between two marks. The text outside of them
belongs to the people who wrote it, and so do metadata that hf_sara does not set. A card that somebody broke stops
nothing: what cannot be metadata is kept as text below the generated part.
"""

import codecs
import logging
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub.repocard import REGEX_YAML_BLOCK

from .card_metadata import MAX_CHARACTERS, Metadata, accepted, field_text, normalized, read_metadata

BEGIN = "<!-- hf_sara: generated from here, written anew at every save -->"
END = "<!-- hf_sara: generated up to here -->"
MARKS = re.compile(f"({BEGIN}|{END})")
# Marks that stand on lines of their own, with what is between two of them.
MARKED_LINES = re.compile(rf"^{BEGIN}\n(?:(?!<!-- hf_sara: generated ).*\n)*?{END}$|^(?:{BEGIN}|{END})$", re.MULTILINE)
# Metadata without a line that ends them: they go to the first empty line or mark.
UNENDED = re.compile(r"(\s*---\n)(?=[\w-]+:)(.*?)(?=\n[ \t]*\n|\n<!-- hf_sara: generated |\Z)", re.DOTALL)
NOTE = "These lines of the metadata of this card are not metadata that the Hub accepts. They are kept here:"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Card:
    """
    A card in its pieces.

    Args:
        metadata ([`~hf_sara.card_metadata.Metadata`]): The metadata.
        before (`str`): The text that people wrote before the generated part.
        generated (`str` or `None`): The generated part, if the card has one.
        after (`str`): The text that people wrote after it.
        is_sound (`bool`): Whether the Hub accepts the metadata as they are.
    """

    metadata: Metadata
    before: str
    generated: str | None
    after: str
    is_sound: bool

    def has_own_text(self) -> bool:
        """Whether people wrote a text on the card."""
        return any((self.before, self.after, self.metadata.comments, self.metadata.rest))


def decode(content: bytes) -> str:
    """The text of a card's file, in whatever encoding its editor wrote it. Each line ends with a line feed."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return _cleaned(content.decode("utf-16", "replace"))
    for encoding in ("utf-8", "cp1252"):
        try:
            return _cleaned(content.decode(encoding))
        except UnicodeDecodeError:
            continue
    return _cleaned(content.decode("latin-1"))


def join_card(metadata: dict[str, Any], body: str, existing: str | None) -> str:
    """
    A card with metadata and generated text. The text and the metadata of people on an existing card are kept, and what
    cannot be kept as metadata is kept as text. Metadata that the Hub would refuse are left out with a warning.
    """
    return _write(metadata, body, _read(existing or ""))


def take_over(card: str, other: str) -> str:
    """Add the text that people wrote on another version of a card, unless people wrote on this version too."""
    mine = _read(card)
    if mine.has_own_text():
        return repaired(card)
    return _write(mine.metadata.fields, mine.generated or "", _read(other))


def repaired(card: str) -> str:
    """The card itself if the Hub accepts its metadata; else the card with the broken part of them as text below."""
    found = _read(card)
    return card if found.is_sound else _write({}, found.generated, found)


def loading_from(card: str, repo_id: str) -> str:
    """A card whose snippet loads the adapter from a repository, wherever it loaded it from before."""
    generated = _read(card).generated
    found = re.search(r'from_hub\("([^"]+)"', generated or "")
    if generated is None or found is None:
        return card
    return card.replace(generated, generated.replace(f'("{found[1]}"', f'("{repo_id}"'), 1)


def _cleaned(text: str) -> str:
    """A text that UTF-8 can hold, without a byte order mark, and with a line feed at the end of each line."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return text.encode("utf-8", "replace").decode("utf-8")


def _read(card: str) -> Card:
    """Take a card apart. There is no error, whatever its text is."""
    text = _cleaned(card)
    block = REGEX_YAML_BLOCK.match(text)
    found = block or UNENDED.match(text)
    head = found[2] if found else ""
    rest = text[found.end() :] if found else text
    unmarked = MARKED_LINES.sub("", head)
    metadata = read_metadata(unmarked)
    before, generated, after = _split(rest)
    is_sound = metadata.is_sound and text == card and unmarked == head and block is found
    return Card(metadata, before, generated, after, is_sound)


def _split(text: str) -> tuple[str, str | None, str]:
    """The text before the first generated part, that part, and the text after it. Marks that are alone go away."""
    pieces = MARKS.split(text)
    marks = ["", *pieces[1::2], ""]
    generated: list[str] = []
    own: list[list[str]] = [[]]
    for piece, mark, following in zip(pieces[::2], marks, marks[1:], strict=False):
        if (mark, following) == (BEGIN, END):
            generated.append(piece)
            own.append([])
        else:
            own[-1].append(piece)
    before, *after = (" ".join(part).strip() for part in own)
    return before, generated[0] if generated else None, "\n\n".join(filter(None, after))


def _write(metadata: Mapping[str, Any], body: str | None, own: Card) -> str:
    """A card with metadata and generated text, if there is one, and with what people wrote on another card."""
    ours: dict[str, Any] = {}
    left_out = []
    for key, value in metadata.items():
        if isinstance(value, list) and key != "model-index":
            refused = [item for item in value if not accepted(key, [item])]
            left_out += [f"{key}={reprlib.repr(item)}" for item in refused]
            value = [item for item in value if accepted(key, [item])]
            if refused and not value:
                continue
        ours.update(normalized(key, value))
    theirs = {key: value for key, value in own.metadata.fields.items() if key not in ours}
    rest = list(own.metadata.rest)
    tags = list(dict.fromkeys(ours.get("tags", [])))
    mine = set(tags)
    more = [tag for tag in dict.fromkeys(own.metadata.fields.get("tags", [])) if tag not in mine]
    if len(field_text("tags", [*more, *tags])) <= MAX_CHARACTERS // 2:
        tags = [*more, *tags]
    elif more:
        rest.append(field_text("tags", more).strip())
    lines, room = [], MAX_CHARACTERS
    # The tags are the first, because they alone tell the Hub of whose kind this adapter is.
    for key, value in ({"tags": []} | ours | theirs | {"tags": tags}).items():
        line = field_text(key, value) if accepted(key, value) else None
        if line is not None and len(line) <= room:
            lines.append(line)
            room -= len(line)
        elif key in theirs and line is not None:
            rest.append(line.strip())
        else:
            left_out.append(f"{key}={reprlib.repr(value)}")
    for comment in own.metadata.comments:
        if len(comment) < room:
            lines.append(f"{comment}\n")
            room -= len(comment) + 1
        else:
            rest.append(comment)
    if left_out:
        logger.warning("The metadata of the card are without %s: the Hub would refuse this.", ", ".join(left_out))
    if rest:
        logger.warning(
            "The old model card has metadata that the Hub would refuse, or that cannot be read. They are kept as text "
            "below the generated part of the new card. Correct them there, and move them back."
        )
    kept = "\n".join(rest)
    # A mark in the generated text, which an output of a model may hold, would end that text too early.
    parts = [own.before, "" if body is None else f"{BEGIN}\n\n{_unmarked(body).strip()}\n\n{END}"]
    parts += [f"{NOTE}\n\n{fenced(_unmarked(kept))}" if rest else "", own.after]
    return _cleaned(f"---\n{''.join(lines)}---\n\n" + "\n\n".join(filter(None, parts)) + "\n")


def _unmarked(text: str) -> str:
    """A text without our marks. A space takes the place of each, so that no new mark arises from what is around it."""
    return MARKS.sub(" ", text)


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
