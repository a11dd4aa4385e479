"""Reading a base model's files, which may be damaged or hostile: clear errors, and bounds on time and memory."""

import itertools
import json
import os
import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME, cached_file

from .errors import AdapterError
from .records import LARGEST_NUMBER
from .repos import NETWORK_ERRORS

# The bounds on what a base's configuration may ask for. They are far above those of any model, and a damaged or
# hostile configuration beyond them would keep the computer busy for hours, or fill its memory.
MAX_CONFIG_BYTES = 32 * 2**20
MOST_MODULES = 2**19
MOST_BY_KEY = {
    # Numbers of parts, as num_hidden_layers, n_layer, encoder_layers and n_routed_experts.
    re.compile(r"(?!.*_per_)((n|num)_.*|(.*_)?)(layers?|experts?|blocks?|stages?|depth)"): 4096,
    re.compile(r"(?!.*_ids?$).*labels?"): 10**6,
}


@contextmanager
def loading(what: str, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """
    Turn the errors that damaged files of a base bring about in transformers, which are of many kinds, into one kind.
    Errors of the network, of missing files and packages, and of too little memory stay what they are.

    Args:
        what (`str`): The thing that is loaded, as the error's message names it.
        kind (`type`): The kind of the error.
    """
    numbers = itertools.count(1)

    def count(*_: Any) -> None:
        if next(numbers) > MOST_MODULES:
            raise ValueError(f"its configuration asks for more than {MOST_MODULES:,} modules and parameters.")

    hooks = [register_module_module_registration_hook(count), register_module_parameter_registration_hook(count)]
    try:
        yield
    except NETWORK_ERRORS:
        raise
    except (ImportError, MemoryError, torch.OutOfMemoryError, AdapterError):
        raise
    except Exception as error:
        name = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise kind(f"{what} cannot be loaded: {name}{error}") from error
    finally:
        for hook in hooks:
            hook.remove()


def check_config(name_or_folder: str | os.PathLike, **access: Any) -> None:
    """
    Check the config.json of a base before transformers makes lists and modules of it.

    Args:
        name_or_folder (`str` or `os.PathLike`): Folder or Hub id of a model.
        access: `revision`, `token`, `cache_dir` and `local_files_only`, as in `from_pretrained`.

    Raises:
        `ValueError`: If the file is no JSON object, or asks for more layers, experts or labels than any model has.
    """
    path = cached_file(name_or_folder, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **access)
    if path is None:
        return
    with open(path, "rb") as file:
        content = file.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise ValueError(f"{CONFIG_NAME} is damaged: it has more than {MAX_CONFIG_BYTES:,} bytes.")
    left: list[tuple[str, Any]] = [("", parse_object(content, CONFIG_NAME))]
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left.extend(value.items())
        elif isinstance(value, list):
            left.extend((key, item) for item in value)
        elif type(value) is int and abs(value) > _most(key):
            raise ValueError(
                f"{CONFIG_NAME} is damaged: {reprlib.repr(key)} is {reprlib.repr(value)}, and no model has that many."
            )


def _most(key: str) -> int:
    """The largest number that a field of a configuration may have."""
    limits = [most for pattern, most in MOST_BY_KEY.items() if pattern.fullmatch(key)]
    return min(limits, default=LARGEST_NUMBER)


def base_config(name_or_folder: str | os.PathLike, **access: Any) -> PreTrainedConfig:
    """The configuration of a base whose config.json was checked. No code from a repository is run."""
    check_config(name_or_folder, **access)
    return AutoConfig.from_pretrained(name_or_folder, trust_remote_code=False, **access)


def parse_object(content: bytes, name: str) -> dict[str, Any]:
    """The JSON object in a file of a base."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: it is not JSON ({error}).") from error
    if type(parsed) is not dict:
        raise ValueError(f"{name} is damaged: it is not a JSON object.")
    return parsed
