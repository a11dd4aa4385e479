"""Merging an adapter into a plain model, which can be loaded without hf_sara."""

import logging
from os import PathLike
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .adapter import SaraAdapter, adapter_of
from .carrier import adapters_on
from .files import delete_leftovers, new_folder
from .own_tokenizer import load_tokenizer
from .parts import input_embedding
from .patterns import is_of_update

logger = logging.getLogger(__name__)


def merge(
    model_or_adapter: nn.Module | SaraAdapter,
    folder: str | PathLike | None = None,
    *,
    max_shard_size: int | str = "50GB",
    tokenizer: Any = None,
) -> nn.Module:
    """
    Merge an adapter into a plain model. Without a folder, the model in memory is changed for good. With a folder, the
    merged model is saved there, and the model in memory is left as it was. For models that do not fit into memory, see
    [`~hf_sara.merge_shards`].

    Args:
        model_or_adapter ([`~transformers.PreTrainedModel`] or [`SaraAdapter`]): The adapted model, or its adapter.
        folder (`str` or `os.PathLike`, *optional*): Where to save the merged model, with its configuration and a
            tokenizer. It must not hold weights yet.
        max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`): Largest size of a weights file.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The tokenizer, or the processor, to save
            with the model. Defaults to that of the base, if it is on this machine and the model has as many tokens.

    Returns:
        [`~transformers.PreTrainedModel`]: Without a folder, the model with the update in its weights and no adapter;
        with a folder, the model as it was.

    Raises:
        `ValueError`: In the cases of [`SaraAdapter.merge`], and for a model that carries several adapters.
        `FileExistsError`: If the folder holds weights already.
    """
    adapter = adapter_of(model_or_adapter)
    model = adapter.model
    if len(adapters_on(model)) > 1:
        raise ValueError(
            f"The model carries the adapters {list(adapters_on(model))}, and a plain model carries none. Detach "
            "those that are not to be merged: adapter.detach()."
        )
    if folder is None:
        adapter.merge()
        adapter.detach(keep_merged=True)
        return model
    refuse_weights(folder)
    with new_folder(Path(folder)) as new:
        adapter.merge()
        try:
            plain = {name: tensor for name, tensor in model.state_dict().items() if not is_of_update(name)}
            # The method of the class is called, because that of an adapted model itself refuses.
            save: Any = cast(type[PreTrainedModel], type(model)).save_pretrained
            save(model, new, state_dict=plain, max_shard_size=max_shard_size)
            tokenizer = _tokenizer_of(model) if tokenizer is None else tokenizer
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
        except SafetensorError as error:
            raise OSError(f"The merged model cannot be written to {folder}: {error}") from error
        finally:
            adapter.unmerge()
    return model


def _tokenizer_of(model: Any) -> Any:
    """The tokenizer of a model's base, or `None` if it is not on this machine, or the model has other tokens."""
    config = getattr(model, "config", None)
    name, embedding = getattr(config, "_name_or_path", None), input_embedding(model)
    if not name or embedding is None:
        return None
    try:
        found = load_tokenizer(name, local_files_only=True)
        size = AutoConfig.from_pretrained(name, local_files_only=True).get_text_config().vocab_size
    except (OSError, ValueError, AttributeError):
        logger.info("No tokenizer is saved with the merged model, because that of %s is not on this machine.", name)
        return None
    return found if size == embedding.num_embeddings else None


def refuse_weights(folder: str | PathLike) -> None:
    """
    Raise a `FileExistsError` if a folder holds weights, since they would be mixed up with those of a new model. What a
    merge left beside the folder when it was killed is deleted.
    """
    delete_leftovers(Path(folder).parent)
    taken = sorted(path.name for path in Path(folder).glob("*.safetensors"))
    if taken:
        raise FileExistsError(f"{folder} holds {taken[0]} already. Choose another folder, or delete its weights.")
