"""Trained rows of an embedding on a model."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .linears import is_offloaded
from .parts import Part, TokenPart, row_scale, widened
from .spread import is_spread, whole


class TokenRows(nn.Module):
    """
    Trained rows of an embedding's weight. The weight of the base is frozen, and holds their values while they are in
    use, so that whatever reads it finds them; a hook on each module that has this weight gives them their gradient.

    Args:
        host (`nn.Embedding` or `nn.Linear`): The input embedding, or the output embedding.
        part ([`TokenPart`]): The description of the rows.
        key (`str`): The name of the adapter.
    """

    def __init__(self, host: nn.Embedding | nn.Linear, part: TokenPart, key: str):
        super().__init__()
        self.part = part
        self.key = key
        self._enabled = False
        weight = whole(host.weight)
        self.register_buffer("indices", torch.tensor(part.indices, device=weight.device), persistent=False)
        base = weight[self.get_buffer("indices")].clone()
        self.register_buffer("base", base, persistent=False)
        self.rows = nn.Parameter(base.to(widened(base.dtype), copy=True), requires_grad=part.trained)

    def trained(self, host: nn.Module) -> dict[str, nn.Parameter]:
        """The rows by their full name, if they train."""
        return {self.part.key: self.rows} if self.part.trained else {}

    def buffers_of(self, host: nn.Module) -> dict[str, torch.Tensor]:
        """The rows by their full name, if they do not train."""
        return {} if self.part.trained else {self.part.key: self.rows}

    def is_enabled(self) -> bool:
        """Whether the rows are in use."""
        return self._enabled

    def switch(self, host: Any, enabled: bool) -> None:
        """Put the trained rows, or the base's, into the weight."""
        self._enabled = enabled
        self.mirror(host)

    def replaced(self, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """A copy of the weight with other values in these rows."""
        changed = weight.detach().clone()
        changed[self.get_buffer("indices").to(weight.device)] = rows.to(weight.device, weight.dtype)
        return changed

    @torch.no_grad()
    def mirror(self, host: Any) -> None:
        """
        Write the rows that are in use into the weight, unless it is spread over processes, which only hooks reach.
        """
        weight = host.weight
        if isinstance(weight, DTensor) or isinstance(self.rows, DTensor) or hasattr(weight, "ds_id") or weight.is_meta:
            return
        # `data` is written, because autograd would take a change of the weight between forward and backward for an
        # error. The columns of an output that this concerns are computed from the rows themselves, so it is none.
        rows = self.rows if self._enabled else self.get_buffer("base")
        weight.data[self.get_buffer("indices")] = rows.to(weight.dtype)

    @torch.no_grad()
    def merged(self, host: Any) -> dict[str, torch.Tensor]:
        """The trained rows in the dtype of the weight, or a `ValueError` if they cannot be written into it."""
        if is_spread(host.weight):
            raise ValueError(
                f"{self.part.name}: its weight is spread over processes, so the trained rows cannot be merged into "
                "it. Merge the adapter on a model that is whole, or into the files of the base: hf-sara merge."
            )
        rows = self.rows.to(host.weight.dtype)
        if not torch.isfinite(rows).all():
            raise ValueError(
                f"{self.part.name}: the trained rows leave the range of {host.weight.dtype}. Use a wider dtype."
            )
        return {"rows": rows}

    @torch.no_grad()
    def write(self, host: Any, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Switch the rows off and write values into the base's ones. Returns the bits that these had before."""
        self.switch(host, False)
        before = {"rows": self.get_buffer("base").clone()}
        self.get_buffer("base").copy_(values["rows"])
        self.mirror(host)
        return before

    def forward(self, module: nn.Module, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The output of a module with the trained rows. DeepSpeed gathers them when this module is called."""
        return (self.in_embedding if isinstance(module, nn.Embedding) else self.in_linear)(
            cast(Any, module), x, output
        )

    def in_embedding(self, embedding: Any, tokens: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The output of an embedding, with the trained rows at their tokens."""
        indices = self.get_buffer("indices")
        place = torch.searchsorted(indices, tokens).clamp_(max=len(indices) - 1)
        ours = (indices[place] == tokens).unsqueeze(-1)
        rows = self.rows.to(embedding.weight.dtype) * row_scale(embedding)
        return torch.where(ours, nn.functional.embedding(place, rows).to(output.dtype), output)

    def in_linear(self, linear: nn.Linear, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The output of a linear with the same weight, with the columns of the trained rows."""
        indices = self.get_buffer("indices")
        bias = None if linear.bias is None else linear.bias[indices]
        columns = nn.functional.linear(x, self.rows.to(linear.weight.dtype), bias)
        return output.index_copy(-1, indices, columns.to(output.dtype))


def refuse_offloaded(part: Part, *modules: nn.Module) -> None:
    """Raise a `ValueError` if accelerate has offloaded modules of a part that has to share its tensors with others."""
    if any(is_offloaded(inner) for module in modules for inner in module.modules()):
        raise ValueError(
            f"{part.name}: accelerate has offloaded it after the adapter was attached, so that it shares its weight "
            "with no other module any more. Save the adapter before, and load it on a base that is offloaded already, "
            f"with a device_map that keeps {part.name} on a device."
        )


def use_rows(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
    """
    The forward hook of an embedding, and of a linear with its weight, which puts the trained rows into the output.
    """
    x = args[0] if args else kwargs["input"]
    for rows in module.sara.values():
        if isinstance(rows, TokenRows) and rows.is_enabled():
            if "forward" in rows.__dict__:
                refuse_offloaded(rows.part, rows)
            output = rows(module, x, output)
    return output
