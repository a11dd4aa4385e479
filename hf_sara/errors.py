"""The error of adapter files."""


class AdapterError(ValueError):
    """An adapter's files are damaged, or do not belong to this base model."""

    def __init__(self, message: str):
        # The message may quote the files. It is shortened and escaped, so that they can neither flood a terminal nor
        # control it.
        shown = message if len(message) <= 2000 else f"{message[:1000]} [...] {message[-1000:]}"
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown))
