"""
The base classes of a method: [`Method`] for its facts, and [`Delta`] for its updates.

A new method needs one file beside this one, with a subclass of each, and one line in the registry `METHODS`. The rest
of the package asks the method for its facts, and never compares its name.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ..factors import Factors, find_factors
from ..layouts import OutputSlice
from ..linears import compute_device, compute_dtype, is_offloaded, is_quantized, refuse_gradients, refuse_outer_hooks
from ..seeds import Seed
from ..sites import PlannedSite
from ..spectrum import find_rank
from ..spread import shares_values, tensor_parallel
from .products import add_update
from .shards import Shards

Shapes = dict[str, tuple[int, ...]]
Tensors = Mapping[str, torch.Tensor]


class Options(Protocol):
    """The choices of [`~hf_sara.SaraArguments`] that methods read."""

    dropout: float
    num_heads: int
    singular_values: bool
    zero_init_vh: bool
    v_position: str
    factors: str


@dataclass(frozen=True)
class Measured:
    """
    The facts about a base weight that a method needs before the weight can be adapted.

    Args:
        k (`int`): Rank of the site.
        factors ([`Factors`], *optional*): Its frozen factors, for a method that has some.
        seed ([`Seed`], *optional*): The seed that identifies the factors.
    """

    k: int
    factors: Factors | None = None
    seed: Seed | None = None

    def to(self, dtype: torch.dtype) -> "Measured":
        """The same facts with the factors in this dtype, in which an update keeps them."""
        return self if self.factors is None else replace(self, factors=self.factors.to(dtype))


class Method:
    """
    The facts of a method, for the options of one adapter.

    Subclasses set the class attributes, define `trained_shapes`, and override what differs. The frozen factors that
    can be recomputed at loading are U and Vh, the singular vectors of the base weight, and no others.

    Args:
        options ([`Options`]): The adapter's arguments.

    Attributes:
        name (`str`): The value of `SaraArguments.method`.
        title (`str`): The name of the method in texts.
        summary (`str`): What the method does, as the end of a sentence on a model card.
        limit (`str`): What its adapters can and cannot be turned into, as a sentence on a model card.
        default_threshold (`float`): The threshold if none is given.
        learning_rates (`tuple[float, float]`): The learning rates to try first, for a few hundred steps and for
            thousands of steps (docs/choosing.md has the measurements).
        delta_class (`type[Delta]`): The class of its updates.
        has_factors (`bool`): Whether an update has frozen factors U and Vh, the leading singular vectors of the base
            weight. They are computed when an adapter is attached, and identified by seeds in its files.
        shown_options (`tuple[str, ...]`): Options that a model card shows even if they have their defaults.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    limit: ClassVar[str]
    default_threshold: ClassVar[float]
    learning_rates: ClassVar[tuple[float, float]] = (2e-2, 1e-3)
    delta_class: ClassVar[type["Delta"]]
    has_factors: ClassVar[bool] = False
    shown_options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Options):
        self.options = options

    def check(self) -> None:
        """Raise a `ValueError` for an option that contradicts the method."""

    def trained_shapes(self, shape: tuple[int, int], k: int) -> Shapes:
        """
        Names and shapes of a site's trained tensors, in the order in which they are initialised.

        Args:
            shape (`tuple[int, int]`): (d_in, d_out) of the site.
            k (`int`): Rank of the site.
        """
        raise NotImplementedError

    def frozen_shapes(self, shape: tuple[int, int], k: int) -> Shapes:
        """Names and shapes of a site's frozen factors: U (d_in, k) and Vh (k, d_out), or none."""
        return {"U": (shape[0], k), "Vh": (k, shape[1])} if self.has_factors else {}

    def count(self, shape: tuple[int, int], k: int) -> int:
        """Number of trained parameters of one site."""
        return sum(math.prod(tensor) for tensor in self.trained_shapes(shape, k).values())

    @property
    def saves_factors(self) -> bool:
        """Whether the frozen factors are saved with the adapter, and not only the seeds that identify them."""
        return self.has_factors and self.options.factors == "save"

    @property
    def router_heads(self) -> int | None:
        """Number of vectors that a router mixes per token; `None` for a method that has no router at all."""
        return None

    def refuse_merge(self) -> None:
        """Raise a `ValueError` if no single matrix equals an update, so that it cannot be merged."""
        if self.delta_class.merged is Delta.merged:
            self.refuse_export()

    def refuse_export(self) -> None:
        """Raise a `ValueError` if an update is no product of low rank, so that it cannot be exported as a LoRA."""
        if self.delta_class.low_rank is Delta.low_rank:
            raise ValueError(
                f"An update of {self.title} is no matrix of low rank, so it cannot be merged or exported."
            )

    def measure(
        self, weight: torch.Tensor, threshold: float, site: str, k: int | None = None, digest: str | None = None
    ) -> Measured:
        """
        Find the rank of a base weight, and its frozen factors with their seed if the method has some.

        Args:
            weight (`torch.Tensor` of shape `(d_in, d_out)`): The weight of a site.
            threshold (`float`): With 0 < threshold <= 1.
            site (`str`): Name for error messages.
            k (`int`, *optional*): The rank, if a plan has it already.
            digest (`str`, *optional*): The weight's digest, if the caller has it already.
        """
        if not self.has_factors:
            return Measured(find_rank(weight, threshold, site, digest) if k is None else k)
        seed = Seed.of_weight(weight, digest)
        factors = find_factors(weight, threshold=threshold, k=k, site=site, digest=seed.sha256)
        return Measured(factors.k, factors, seed.with_factors(factors))

    def make_delta(self, site: PlannedSite, model: nn.Module, factors: Factors | None = None) -> "Delta":
        """
        Make the update of a site, with its initial values.

        Args:
            site ([`PlannedSite`]): The site.
            model ([`~transformers.PreTrainedModel`]): The base model; the update is not attached to it.
            factors ([`Factors`], *optional*): The frozen factors, for a method that has some.
        """
        module = site.linear(model)
        device = compute_device(module)
        if device.type == "meta":
            refuse_outer_hooks(model, site.name)
            if shares_values():
                device = torch.device("cpu")
        delta = self.delta_class(self, site, compute_dtype(module, model), device)
        delta.on_quantized = is_quantized(module)
        if tensor_parallel(getattr(module, "weight", None)) and self.delta_class.add_part is Delta.add_part:
            raise ValueError(
                f"{site.name}: {self.title} does not support tensor parallelism. Load the base without it."
            )
        if factors is not None:
            delta.set_factors(factors.U, factors.Vh)
        return delta


class Usage:
    """
    A record of what an update was used for. It is one object also where several copies of a module share it, as those
    that `nn.DataParallel` makes for each call.

    Args:
        adapter ([`Usage`], *optional*): The record of the whole adapter.

    Attributes:
        called (`bool`): Whether the linear was called while the update was enabled.
        learning (`bool`): Whether it was called in training mode, or while gradients were recorded, or whether the
            update comes from an earlier training.
    """

    def __init__(self, adapter: "Usage | None" = None):
        self.adapter = adapter
        self.called = False
        self.learning = False

    def note(self, training: bool) -> None:
        """Record a call. Nothing is read here, so that torch.compile needs no second graph after the first call."""
        self.called = True
        if training or torch.is_grad_enabled():
            self.learning = True
            if self.adapter is not None:
                self.adapter.learning = True

    def rests(self, training: bool) -> bool:
        """
        Whether an update adds nothing in an evaluation, because a training has used the adapter and not this update.
        It would do the same after saving and loading.
        """
        if training or torch.is_grad_enabled() or self.learning:
            return False
        return self.adapter is not None and self.adapter.learning


def keep_wide(parameter: nn.Parameter, before: torch.Tensor) -> None:
    """
    Give a trained tensor its values back where `model.to(torch.bfloat16)` or `model.half()` has taken it below
    float32: it would lose small steps, and a gradient scaler refuses float16 tensors.
    """
    if parameter.dtype in (torch.float16, torch.bfloat16):
        parameter.data = before.to(parameter.device)


class Delta(nn.Module):
    """
    The base class of the updates of all methods. It knows where they stand, their dtypes, and whether they are
    enabled. An update is a child module of the linear that it adapts.

    Subclasses define `reset_parameters`, `add_update`, `add_part` for tensor parallelism, and `low_rank` if the update
    is one matrix.

    Args:
        method ([`Method`]): The method, with the adapter's options.
        site ([`PlannedSite`]): The adapted weight matrix.
        dtype (`torch.dtype`): Dtype of the base weight and of the frozen factors. Trained tensors are float32, or
            float64 on a float64 base.
        device (`torch.device`): Device of the base weight.
    """

    def __init__(self, method: Method, site: PlannedSite, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.site_name = site.name
        # Only the linears of some quantizations pass no gradient to their inputs.
        self.on_quantized = False
        self.shape = site.shape
        self.slice: OutputSlice | None = site.slice
        self.k = site.k
        # This is a module, because some trainers turn dropout off by going through a model's modules.
        self.dropout = nn.Dropout(method.options.dropout)
        self.enabled = True
        self.usage = Usage()
        trained, frozen = method.trained_shapes(site.shape, site.k), method.frozen_shapes(site.shape, site.k)
        self.trained_names = tuple(trained)
        trained_dtype = torch.promote_types(dtype, torch.float32)
        for name, shape in trained.items():
            self.register_parameter(name, nn.Parameter(_empty(name, shape, trained_dtype)))
        for name, shape in frozen.items():
            zeros = nn.init.zeros_(_empty(name, shape, dtype))
            self.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
        self.reset_parameters(method.options)
        self.to(device)

    def reset_parameters(self, options: Options) -> None:
        """Give the trained tensors their initial values."""
        raise NotImplementedError

    def trained(self) -> Mapping[str, nn.Parameter]:
        """The trained tensors by name."""
        return {name: self.get_parameter(name) for name in self.trained_names}

    @torch.no_grad()
    def rest(self) -> None:
        """Let the update add nothing, in such a way that it can still learn. By default, all its tensors are zero."""
        for tensor in self.trained().values():
            tensor.zero_()

    @torch.no_grad()
    def set_factors(self, U: torch.Tensor, Vh: torch.Tensor) -> None:
        """Copy the frozen factors into the update: U of shape (d_in, k), Vh of shape (k, d_out)."""
        self.get_parameter("U").copy_(U)
        self.get_parameter("Vh").copy_(Vh)

    def _apply(self, fn, recurse=True):
        before = {name: parameter.data for name, parameter in self.trained().items()}
        super()._apply(fn, recurse)
        for name, value in before.items():
            keep_wide(self.get_parameter(name), value)
        return self

    def forward(
        self,
        x: torch.Tensor,
        output: torch.Tensor,
        linear: nn.Linear | None = None,
        shards: Shards | None = None,
        own: Tensors | None = None,
    ) -> torch.Tensor:
        """
        Add the update.

        Args:
            x (`torch.Tensor` of shape `(..., d_in)`): The linear's input.
            output (`torch.Tensor` of shape `(..., outputs of the module)`): The linear's output.
            linear (`torch.nn.Linear`, *optional*): The linear, if it is plain and frozen, and `output` is what it
                computed from `x`, which nothing else has used yet. The update may take a short cut then.
            shards ([`Shards`], *optional*): The part of the linear that this process has, if tensor parallelism
                spreads it. `x` or `output` is then that of this part.
            own (`dict[str, torch.Tensor]`, *optional*): For a batch whose rows have different adapters, the trained
                tensors of the adapter of each row, of shape `(rows, *shape)`. They take the place of the update's own.

        Returns:
            `torch.Tensor`: `output` plus the update on this site's columns, in `output`'s dtype.
        """
        if torch.is_grad_enabled():
            self._refuse_lost_gradients(x, output)
        if x.device != output.device:
            # accelerate moves the input of a linear behind its hooks.
            x = x.to(output.device)
        autocast = torch.is_autocast_enabled(x.device.type)
        if own is not None or autocast or self.slice is not None or x.dtype != output.dtype:
            linear = None
        if self.training and self.dropout.p and not (linear is not None and self.drops_itself(x, output)):
            x, linear = self.dropout(x) if shards is None else shards.dropped(x, self.dropout, self.shape[0]), None
        if not autocast:
            return self._add(x, output, x.dtype, linear, shards, own)
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return self._add(x.to(dtype), output, dtype, None, shards, own)

    def dropout_now(self) -> float:
        """The probability with which an input is dropped now. Some trainers switch the module off."""
        return self.dropout.p if self.training and self.dropout.training else 0.0

    def drops_itself(self, x: torch.Tensor, output: torch.Tensor) -> bool:
        """Whether `add_update` applies dropout to the input of a plain frozen linear, and saves memory by that."""
        return False

    def _add(
        self, x: Any, output: Any, dtype: Any, linear: nn.Linear | None, shards: Shards | None, own: Tensors | None
    ) -> torch.Tensor:
        if own is not None:
            rows = x.reshape(len(next(iter(own.values()))), -1, x.shape[-1])
            update = self.update_of_rows(rows, {name: tensor.to(dtype) for name, tensor in own.items()}, shards)
            part = self.slice if shards is None else shards.slice(self.slice)
            return add_update(output, update.flatten(0, 1), part)
        if shards is not None:
            return self.add_part(x, output, dtype, shards)
        return self.add_update(x, output, dtype, linear)

    def _refuse_lost_gradients(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """Let a backward pass fail that would lose gradients. A forward pass alone is right all the same."""
        if "forward" in self.__dict__ and is_offloaded(self):
            why = (
                f"{self.site_name}: accelerate has offloaded what the adapter trains, so its gradients would be lost. "
                "Attach the adapter after the offloading, or call model.sara_adapter.trained(), which brings it back, "
                "before the optimizer is made."
            )
            refuse_gradients(self.parameters(recurse=False), why)
        if self.on_quantized and x.requires_grad and not output.requires_grad:
            why = (
                f"{self.site_name}: this linear passes no gradient to its input, so the updates before it would learn "
                "the wrong thing. Some quantized linears are for inference alone, and bitsandbytes' 4-bit ones are "
                "after an evaluation on some CPUs. Train on a base of another quantization, or on another device."
            )
            refuse_gradients([x], why)

    def add_update(
        self, x: torch.Tensor, output: torch.Tensor, dtype: torch.dtype, linear: nn.Linear | None
    ) -> torch.Tensor:
        """`output` plus the update of `x`, computed in `dtype`. See [`Delta.forward`] for `linear`."""
        raise NotImplementedError

    def add_part(self, x: torch.Tensor, output: torch.Tensor, dtype: torch.dtype, shards: Shards) -> torch.Tensor:
        """
        The same where tensor parallelism spreads the linear, for the part of `x` or of `output` that this process has.
        A method that does not define it cannot be used there.
        """
        raise NotImplementedError

    def update_of_rows(self, x: torch.Tensor, own: Tensors, shards: Shards | None) -> torch.Tensor:
        """
        The updates for a batch whose rows have different adapters. A method that does not define it cannot be used in
        an [`AdapterBank`].

        Args:
            x (`torch.Tensor` of shape `(rows, tokens, d_in)`): The inputs of each row, after dropout.
            own (`dict[str, torch.Tensor]`): The trained tensors of the adapter of each row, of shape `(rows, *shape)`.
            shards ([`Shards`], *optional*): See [`Delta.forward`].

        Returns:
            `torch.Tensor` of shape `(rows, tokens, d_out)`: What is added to the outputs.
        """
        raise NotImplementedError

    def follow_weight(self, module: nn.Module) -> None:
        """Look at the base weight. This is called whenever its values or the frozen factors were set."""

    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The update as factors of `U diag(S) Vh`: (d_in, k), (k,) and (k, d_out), in at least float32."""
        raise NotImplementedError

    @torch.no_grad()
    def merged(self) -> torch.Tensor:
        """The update as a matrix of shape (d_in, d_out), in at least float32."""
        U, S, Vh = self.low_rank()
        return (U * S) @ Vh

    def extra_repr(self) -> str:
        return f"d_in={self.shape[0]}, d_out={self.shape[1]}, k={self.k}"


def deltas_of(module: Any) -> Iterable[Delta]:
    """The updates that a linear carries, of all adapters."""
    return module.sara.values()


def _empty(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # U is stored by columns, because BLAS libraries multiply by a narrow matrix several times faster that way.
    if name == "U" and len(shape) == 2:
        return torch.empty(shape[::-1], dtype=dtype).t()
    return torch.empty(shape, dtype=dtype)
