"""Whether the tokenizer in an adapter's folder is one of its own, which has to travel with it."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from .base_files import loading
from .base_model import BaseRecord

# The files of every tokenizer of transformers.
VOCABULARY_FILES = (
    *("added_tokens.json", "bpe.codes", "byte_maps.json", "chat_template.jinja", "dict.txt", "emoji.json"),
    *("entity_vocab.json", "merges.txt", "normalizer.json", "prophetnet.tokenizer", "sentencepiece.bpe.model"),
    *("sentencepiece.model", "source.spm", "special_tokens_map.json", "spiece.model", "spm.model", "spm_char.model"),
    *("target.spm", "target_vocab.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("vocab-src.json", "vocab-tgt.json", "vocab.json", "vocab.txt", "word_pronunciation.json", "word_shape.json"),
)
# A processor has these beside its tokenizer, and they travel with it.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
TOKENIZER_FILES = (*VOCABULARY_FILES, *PROCESSOR_FILES)


def has_own_tokenizer(folder: str | PathLike, base: BaseRecord) -> bool:
    """
    Whether a folder has a tokenizer that differs from the base's own. A tokenizer that cannot be compared, because the
    base has no Hub id, or its tokenizer is not in the cache, counts as different. No network is asked.

    Args:
        folder (`str` or `os.PathLike`): The folder of an adapter.
        base ([`BaseRecord`]): The base of the adapter.
    """
    if not any(Path(folder, name).is_file() for name in VOCABULARY_FILES):
        return False
    if base.model_id is None:
        return True
    try:
        here = load_tokenizer(folder, local_files_only=True)
        there = load_tokenizer(base.model_id, revision=base.revision or "main", local_files_only=True)
        return _facts(here) != _facts(there)
    except (OSError, ValueError):
        return True


def load_tokenizer(name_or_folder: str | PathLike, **access: Any) -> Any:
    """
    A tokenizer of transformers. No code from a repository is run.

    Raises:
        `OSError`: If there is none, or the download failed.
        `ValueError`: If a file of it is damaged.
    """
    with loading(f"The tokenizer in {str(name_or_folder)!r}"):
        return AutoTokenizer.from_pretrained(name_or_folder, trust_remote_code=False, **access)


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
