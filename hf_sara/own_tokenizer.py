"""Whether the tokenizer in an adapter's folder is one of its own, which has to travel with it."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from .base_model import BaseRecord

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja"),
)


def has_own_tokenizer(folder: str | PathLike, base: BaseRecord) -> bool:
    """
    Whether a folder has a tokenizer that differs from the base's own. A tokenizer that cannot be compared, because the
    base has no Hub id, or its tokenizer is not in the cache, counts as different. No network is asked.

    Args:
        folder (`str` or `os.PathLike`): The folder of an adapter.
        base ([`BaseRecord`]): The base of the adapter.
    """
    if not any(Path(folder, name).is_file() for name in TOKENIZER_FILES):
        return False
    if base.model_id is None:
        return True
    try:
        here = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        there = AutoTokenizer.from_pretrained(base.model_id, revision=base.revision or "main", local_files_only=True)
    except (OSError, ValueError, KeyError):
        return True
    return _facts(here) != _facts(there)


def _facts(tokenizer: Any) -> list[Any]:
    """What a tokenizer makes of a text. How it pads and truncates a batch is not part of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pipeline = {} if backend is None else json.loads(backend.to_str())
    steps = {key: value for key, value in pipeline.items() if key not in ("padding", "truncation")}
    return [
        type(tokenizer).__name__,
        tokenizer.get_vocab(),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.chat_template,
        steps,
    ]
