"""Makes docstrings in the Hugging Face form readable for mkdocstrings.

Such docstrings give types as ``name (`str`, *optional*, defaults to `"x"`):`` and link to objects by
``[`~transformers.Trainer`]``. Both are syntax of Hugging Face's own builder, and plain text for mkdocs. Here, types
lose their marks. A name that the page of the API describes becomes a link, and every other name becomes code.
"""

import ast
import re
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parent.parent.parent
LINK = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")
# Two kinds of lines have a type before a colon: those of parameters, and those of what is returned or raised.
PARAMETER = re.compile(r"^(?P<start>\s+[\w*]+ \()(?P<type>.*)(?P<end>\):.*)$")
RESULT = re.compile(
    r"^(?P<start>\s+)(?P<type>[`\[][^:]*?[`\]](?: of shape `[^`]*`)?(?:, \*optional\*)?)(?P<end>: .*)$"
)
# The names that docs/api.md describes, by their last part.
DESCRIBED = {
    name.rsplit(".", 1)[-1]: name
    for name in re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
}


def find_methods() -> dict[str, set[str]]:
    """The public methods of each class in hf_sara, by the name of the class."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "hf_sara").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
                found.setdefault(node.name, set()).update(name for name in names if not name.startswith("_"))
    return found


METHODS = find_methods()


def as_link(match: re.Match[str]) -> str:
    """The Markdown of one link in a text."""
    tilde, name = match.groups()
    parts = name.split(".")
    shown = parts[-1] if tilde else name
    if parts[-1] in DESCRIBED:
        return f"[`{shown}`][{DESCRIBED[parts[-1]]}]"
    if len(parts) > 1 and parts[-2] in DESCRIBED and parts[-1] in METHODS.get(parts[-2], ()):
        return f"[`{shown}`][{DESCRIBED[parts[-2]]}.{parts[-1]}]"
    return f"`{shown}`"


def as_type(match: re.Match[str]) -> str:
    """A line whose type is plain text. Its default has a column of its own."""
    text = re.sub(r", defaults to .*$", "", match["type"])
    text = LINK.sub(lambda link: link[2].rsplit(".", 1)[-1], text)
    return match["start"] + text.replace("`", "").replace("*optional*", "optional") + match["end"]


def rewrite(docstring: str) -> str:
    """A docstring in the form that mkdocstrings reads."""
    lines, expression = [], None
    for line in docstring.splitlines():
        section = re.match(r"(Args|Attributes|Returns|Raises):$", line)
        if section:
            expression = PARAMETER if section[1] in ("Args", "Attributes") else RESULT
        elif line and not line[0].isspace():
            expression = None
        # Descriptions are indented further than the lines with types.
        if expression is not None and re.match(r" {4}\S", line):
            line = expression.sub(as_type, line)
        lines.append(LINK.sub(as_link, line))
    return "\n".join(lines)


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = rewrite(obj.docstring.value)

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Leave out a constructor with `*args` and `**kwargs` alone. Then the page shows that of the base class."""
        constructor = cls.members.get("__init__")
        if isinstance(constructor, griffe.Function):
            names = [parameter.name for parameter in constructor.parameters]
            if names == ["self", "args", "kwargs"] and constructor.docstring is None:
                del cls.members["__init__"]
