"""The ends of a model: its input embedding, and the head that its task makes anew."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .patterns import is_of_update

# A model for one of these tasks has a head of its own, which the checkpoint of a pretrained model does not have.
TASKS_WITH_A_NEW_HEAD = re.compile(
    r"For(Sequence|Token|Image|Audio|AudioFrame|Video)Classification|ForQuestionAnswering|ForMultipleChoice"
    r"|ForXVector|Reward"
)


def default_heads(model: Any) -> list[str]:
    """
    The modules of the head that the model's task makes anew, or none for another task.

    Raises:
        `ValueError`: If parameters of the model are random, and cannot be told from its body.
    """
    kind = _task(model)
    heads = task_heads(model)
    random = random_parameters(model) if kind else []
    own = [name for name, _ in model.named_parameters(recurse=False) if name in random]
    if own:
        raise ValueError(
            f"{', '.join(own)} is not in the checkpoint of the base, and belongs to no module, so that it cannot be "
            f"trained and saved. Load the {kind} without it, as its configuration allows, or say modules_to_save=[]."
        )
    if not heads and random:
        raise ValueError(
            f"The head of this {kind} cannot be told from its body, and these parameters are random, because they are "
            f"not in the checkpoint of the base: {', '.join(random[:5])}. Name their modules in modules_to_save, or "
            "say modules_to_save=[] to leave them as they are."
        )
    return heads


def task_heads(model: Any) -> list[str]:
    """The children of a model that look like the head that its task makes anew. Most models have none."""
    if _task(model) is None:
        return []
    return [name for name, child in model.named_children() if _is_head(model, name, child)]


def _task(model: Any) -> str | None:
    """The name of the class of a model whose task makes a new head."""
    return next((k.__name__ for k in type(model).__mro__ if TASKS_WITH_A_NEW_HEAD.search(k.__name__)), None)


def _is_head(model: Any, name: str, child: nn.Module) -> bool:
    """A head is a child with parameters that is neither the body nor an embedding."""
    if isinstance(child, (PreTrainedModel, nn.Embedding)) or "embed" in name or not any(own_parameters(child)):
        return False
    if hasattr(model, model.base_model_prefix):
        return name != model.base_model_prefix
    # Without a body of a known name, a child with a list of layers is taken for one.
    return not any(isinstance(module, nn.ModuleList) and len(module) > 1 for module in child.modules())


def random_parameters(model: nn.Module) -> list[str]:
    """The parameters that no checkpoint gave, of a model that was loaded from one. transformers marks the others."""
    names = {n: hasattr(p, "_is_hf_initialized") for n, p in model.named_parameters() if not is_of_update(n)}
    return [name for name, loaded in names.items() if not loaded] if any(names.values()) else []


def own_parameters(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """The parameters of each module in a module once, also if the module has several names."""
    for path, inner in module.named_modules():
        for name, parameter in inner._parameters.items():
            full = f"{path}.{name}" if path else name
            if parameter is not None and not is_of_update(f".{full}"):
                yield full, parameter


def input_embedding(model: Any) -> nn.Embedding | None:
    """The input embedding of tokens, or `None` for a model that has none."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Embedding) else None
