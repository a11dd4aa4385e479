"""The parts of a model that an adapter trains beside its updates: whole modules, and rows of embeddings.

Every parameter that trains is saved with the adapter. So a head that a task makes anew is trained and saved unless the
arguments say otherwise, and every other part is named in `modules_to_save` or `trainable_token_indices`.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .arguments import SaraArguments
from .dequantizing import holds_numbers
from .heads import default_heads, input_embedding, own_parameters, random_parameters
from .linears import is_packed
from .patterns import is_of_update, is_within, matches
from .sites import Site
from .spread import is_spread, whole_shape

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModulePart:
    """
    A module that is trained in full.

    Args:
        name (`str`): Its name in the model.
        parameters (`dict[str, tuple[int, ...]]`): The shapes of its parameters by their names in the module.
        buffers (`dict[str, tuple[int, ...]]`): The same for its saved buffers, such as statistics of a BatchNorm.
        dtypes (`dict[str, str]`): The dtypes of its buffers.
        ties (`dict[str, str]`): By name, parameters that are the same as one of an earlier part, and its full name.
    """

    name: str
    parameters: Shapes
    buffers: Shapes = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """How it is trained, in the tables of a plan."""
        return "trained in full"

    def trained_shapes(self) -> Shapes:
        """Full names and shapes of its trained tensors."""
        return {f"{self.name}.{name}": shape for name, shape in self.parameters.items()}

    def buffer_shapes(self) -> Shapes:
        """Full names and shapes of its buffers."""
        return {f"{self.name}.{name}": shape for name, shape in self.buffers.items()}

    def held(self) -> set[str]:
        """The full names of the base's tensors that the adapter brings."""
        return {f"{self.name}.{name}" for name in (*self.parameters, *self.buffers, *self.ties)}

    def to_json(self) -> dict[str, Any]:
        """The part's record in an adapter's config."""
        return {key: value for key, value in vars(self).items() if value or key in ("name", "parameters")}


@dataclass(frozen=True)
class TokenPart:
    """
    Rows of an embedding: those of the input embedding, which train there and in every module that shares its weight,
    or those of an output embedding with a weight of its own, which do not train, but have to come back.

    Args:
        name (`str`): Name of the embedding in the model.
        indices (`tuple[int, ...]`): The rows, in rising order.
        width (`int`): Length of a row.
        trained (`bool`): Whether they train.
    """

    name: str
    indices: tuple[int, ...]
    width: int
    trained: bool = True

    @property
    def title(self) -> str:
        """How it is trained, in the tables of a plan."""
        count = len(self.indices)
        return f"{count} row{'s' * (count > 1)} {'trained' if self.trained else 'kept'}"

    def trained_shapes(self) -> Shapes:
        """Full name and shape of the trained rows: (number of rows, width)."""
        return self._shapes() if self.trained else {}

    def buffer_shapes(self) -> Shapes:
        """Full name and shape of the rows that do not train."""
        return {} if self.trained else self._shapes()

    def _shapes(self) -> Shapes:
        return {self.key: (len(self.indices), self.width)}

    @property
    def key(self) -> str:
        """The full name of the rows."""
        return f"{self.name}.trainable_tokens"

    def held(self) -> set[str]:
        """The base has every tensor itself, so the adapter brings none."""
        return set()

    def to_json(self) -> dict[str, Any]:
        """The part's record in an adapter's config."""
        return {**vars(self), "indices": list(self.indices)}


Part = ModulePart | TokenPart


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a part's tensor is trained and saved. Small steps would be lost in a smaller one."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def count(part: Part) -> int:
    """Number of trained parameters of a part."""
    return sum(math.prod(shape) for shape in part.trained_shapes().values())


# ---- the choice of parts ----


def find_parts(model: nn.Module, args: SaraArguments, sites: Sequence[Site]) -> list[Part]:
    """
    The parts that an adapter's arguments choose.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model.
        args ([`SaraArguments`]): The arguments. Only `modules_to_save` and `trainable_token_indices` are read.
        sites (`Sequence[Site]`): The adapter's sites, which no part may contain.

    Raises:
        `ValueError`: If a name matches nothing, a part is quantized, shares a weight with a module that is not
            trained, or contains a site.
    """
    names = default_heads(model) if args.modules_to_save is None else _chosen(model, args.modules_to_save)
    parts: list[Part] = [*module_parts(model, names)]
    if args.trainable_token_indices is not None:
        parts += token_parts(model, args.trainable_token_indices, names)
    refuse_overlap(model, parts, sites)
    refuse_collisions(model, parts)
    return parts


def _chosen(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """The outermost modules that the patterns match, in the order of the model."""
    offered = [
        name
        for name, module in model.named_modules()
        if name and not is_of_update(name) and any(own_parameters(module))
    ]
    found: list[str] = []
    for pattern in patterns:
        if not any(matches(name, pattern, "modules_to_save") for name in offered):
            raise ValueError(f"modules_to_save={pattern!r} matches no module with parameters. {_offer(offered)}")
    for name in offered:
        if not is_within(name, found) and any(matches(name, pattern, "modules_to_save") for pattern in patterns):
            found.append(name)
    return found


def _offer(names: Sequence[str]) -> str:
    leaves = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
    return f"The model has: {', '.join(leaf for leaf in leaves if not leaf.isdigit())}."


# ---- their description ----


def module_parts(model: nn.Module, names: Sequence[str]) -> list[ModulePart]:
    """The parts of these modules, as the model has them. An attached copy is described as the module itself is."""
    owners = weight_owners(model)
    first: dict[int, str] = {}
    parts = []
    for name in names:
        module = model.get_submodule(name)
        parameters: Shapes = {}
        ties: dict[str, str] = {}
        _refuse_quantized(module, name)
        for key, parameter in own_parameters(module):
            full = f"{name}.{key}"
            others = [o for o in owners[id(parameter)] if not is_within(o, names)]
            if others:
                raise ValueError(
                    f"{full} is tied to {', '.join(others)}, so all of them would change. Name all of these modules "
                    "in modules_to_save, or load the base with tie_word_embeddings=False."
                )
            if id(parameter) in first:
                ties[key] = first[id(parameter)]
            else:
                first[id(parameter)] = full
                parameters[key] = whole_shape(parameter)
        buffers = dict(_own_buffers(module))
        shapes = {key: tuple(buffer.shape) for key, buffer in buffers.items()}
        dtypes = {key: str(widened(buffer.dtype)).removeprefix("torch.") for key, buffer in buffers.items()}
        parts.append(ModulePart(name, parameters, shapes, dtypes, ties))
    return parts


def _refuse_quantized(module: nn.Module, name: str) -> None:
    """Raise a `ValueError` if a tensor of a part cannot be trained, because it is quantized or packed."""
    for path, inner in module.named_modules():
        full = f"{name}.{path}" if path else name
        quantized = [n for n, p in inner.named_parameters(recurse=False) if not holds_numbers(p)]
        if (quantized or is_packed(inner)) and not is_of_update(f".{full}"):
            leaf = quantized[0] if quantized else "weight"
            stored = str(inner.get_parameter(leaf).dtype) if quantized else f"in a {type(inner).__name__}"
            raise ValueError(
                f"{full}.{leaf}: the weight is quantized ({stored}), so it cannot be trained. Load the base "
                f"with this module unquantized (llm_int8_skip_modules), or leave {name} out of modules_to_save."
            )


def token_parts(model: Any, indices: Sequence[int], whole: Sequence[str]) -> list[TokenPart]:
    """The parts of these rows of the model's embeddings, beside modules that are trained as a whole."""
    embedding = input_embedding(model)
    if embedding is None:
        raise ValueError(
            f"trainable_token_indices: this {type(model).__name__} has no input embedding of tokens. Leave it out."
        )
    rows, width = embedding.num_embeddings, embedding.embedding_dim
    if max(indices) >= rows:
        raise ValueError(
            f"trainable_token_indices names the token {max(indices)}, and the input embedding has {rows} rows. Call "
            "model.resize_token_embeddings(len(tokenizer)) first."
        )
    names = {module: name for name, module in model.named_modules()}
    name = names[embedding]
    if is_within(name, whole):
        raise ValueError(
            f"trainable_token_indices: {name} is in modules_to_save, so all of its rows train. Leave one out."
        )
    output = model.get_output_embeddings()
    for one in (embedding, output):
        if isinstance(one, (nn.Embedding, nn.Linear)) and not holds_numbers(one.weight):
            raise ValueError(
                f"trainable_token_indices: the weight of {names[one]}, a {type(one).__name__}, is quantized, so that "
                "its rows cannot be trained. Load the base with this module unquantized (llm_int8_skip_modules)."
            )
    for owner in row_owners(model, embedding):
        if not isinstance(owner, (nn.Embedding, nn.Linear)):
            raise ValueError(
                f"trainable_token_indices: a {type(owner).__name__} shares the weight of {name}, and its rows cannot "
                "be trained. Use modules_to_save, or load the base with tie_word_embeddings=False."
            )
        if isinstance(owner, nn.Embedding) and not _looks_up_rows(owner):
            raise ValueError(
                f"trainable_token_indices: {name} is a {type(owner).__name__}, which computes more than rows of its "
                "weight. Use modules_to_save to train it in full."
            )
    rows_of = tuple(sorted(indices))
    parts = [TokenPart(name, rows_of, width)]
    own_weight = isinstance(output, nn.Linear) and output.weight is not embedding.weight
    if own_weight and not is_within(names[output], whole) and output.out_features == rows:
        random = random_parameters(model)
        if output.bias is not None and f"{names[output]}.bias" in random:
            raise ValueError(
                f"trainable_token_indices: {names[output]} has a bias, whose new entries would be lost. Name "
                f"{names[output]} in modules_to_save too."
            )
        # The base may lack them: the rows of new tokens are random there.
        parts.append(TokenPart(names[output], rows_of, output.in_features, trained=False))
    return parts


def row_owners(model: nn.Module, embedding: nn.Module) -> list[nn.Module]:
    """The embedding, and all modules that share its weight."""
    weight = embedding.get_parameter("weight")
    return [m for m in model.modules() if any(p is weight for p in m.parameters(recurse=False))]


def _looks_up_rows(embedding: nn.Embedding) -> bool:
    """Whether an output of the embedding is a row of its weight, maybe times its scale."""
    weight = embedding.weight.detach()
    if weight.is_meta or is_spread(embedding.weight) or embedding.max_norm is not None:
        return embedding.max_norm is None
    token = torch.zeros(1, dtype=torch.long, device=weight.device)
    with torch.no_grad():
        return torch.equal(nn.Embedding.__call__(embedding, token)[0], weight[0] * row_scale(embedding))


def row_scale(embedding: Any) -> Any:
    """The number by which some models' embeddings multiply their rows, in the dtype of the weight."""
    scale = getattr(embedding, "embed_scale", 1.0)
    return scale.to(embedding.weight.dtype) if isinstance(scale, torch.Tensor) else scale


def refuse_overlap(model: nn.Module, parts: Sequence[Part], sites: Sequence[Site]) -> None:
    """Raise a `ValueError` if a site's weight is also that of a part."""
    taken: dict[int, str] = {}
    for part in parts:
        module = model.get_submodule(part.name)
        taken |= {id(parameter): part.name for parameter in module.parameters()}
    for site in sites:
        part_name = taken.get(id(getattr(site.linear(model), "weight", None)))
        if part_name is not None:
            raise ValueError(
                f"{site.name} cannot have a low-rank update, because {part_name} is trained beside it and has the "
                "same weight. Leave it out of target_modules, or out of modules_to_save and trainable_token_indices."
            )


def refuse_collisions(model: nn.Module, parts: Sequence[Part]) -> None:
    """Raise a `ValueError` if two parts of one adapter train the same tensors, unless a tie says so."""
    for one, other in itertools.combinations(parts, 2):
        tied = any(isinstance(part, ModulePart) and part.ties for part in (one, other))
        nested = is_within(one.name, [other.name]) or is_within(other.name, [one.name])
        same_rows = isinstance(one, TokenPart) and isinstance(other, TokenPart) and one.name == other.name
        if (nested and not same_rows) or (parts_collide(model, one, other) and not tied):
            raise ValueError(f"{one.name!r} and {other.name!r} cannot train side by side, because they are one.")


def parts_collide(model: nn.Module, part: Part, other: Part) -> bool:
    """Whether two parts, maybe of two adapters, train the same numbers."""
    if isinstance(part, TokenPart) and isinstance(other, TokenPart):
        weights = [model.get_submodule(name).get_parameter("weight") for name in (part.name, other.name)]
        return weights[0] is weights[1] and not set(part.indices).isdisjoint(other.indices)
    ours, theirs = ({id(p) for p in model.get_submodule(name).parameters()} for name in (part.name, other.name))
    return not ours.isdisjoint(theirs)


def weight_owners(model: nn.Module) -> Mapping[int, list[str]]:
    """By the id of a parameter, its full names in all modules that have it. A tied parameter has several."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in own_parameters(model):
        owners[id(parameter)].append(name)
    return owners


def _own_buffers(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """The saved buffers of a module and of those in it, by their names there."""
    for path, inner in module.named_modules():
        for name, buffer in saved_buffers(inner):
            full = f"{path}.{name}" if path else name
            if not is_of_update(f".{full}"):
                yield full, buffer


def saved_buffers(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """A module's own buffers that are part of its state. Others are computed anew when the module is made."""
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer
