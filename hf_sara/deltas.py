"""The two trainable updates of section 2 of the design, as child modules of the linear that they adapt.

SARA adds `dropout(x) U diag(S) Vh`, all trained. Mo-SARA adds `((z * (g S)) Vh) * v` with `z = dropout(x) U` and the
router `g = softmax(z gate_down gate_up)`, where U and Vh are frozen singular vectors of the weight.

At a layer's size, an update costs as much in calls and in memory traffic as in arithmetic, so both are few tensor
operations. Two short cuts save more of it where the update stands on the output of a plain frozen linear, and change
no result but for rounding:

- SARA's update brings the linear's gradient along (`_LinearWithUpdate`): both are written in one pass.
- Mo-SARA reads z from the linear's output, `x U = (x W) Vh^T / sigma`, since U diag(sigma) Vh is the leading part of
  W. The sizes in it are d_out's, which grouped queries make small, and no gradient of its own goes to x.

The paper's Mo-SARA (v behind, several heads) has a gradient with fewer passes than autograd's (`_MixedUpdate`), on
whole outputs of full precision. Mo-SARA keeps what lies between its factors by ranks, as (k, n) for n tokens: BLAS
libraries make such a product of few and long rows faster than one of few columns.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .arguments import SaraArguments
from .sites import OutputSlice, Site


def trained_shapes(args: SaraArguments, shape: tuple[int, int], k: int) -> dict[str, tuple[int, ...]]:
    """
    Names and shapes of a site's trained tensors, in the order in which they are initialised.

    Args:
        args ([`SaraArguments`]): The adapter's arguments.
        shape (`tuple[int, int]`): (d_in, d_out) of the site.
        k (`int`): Rank of the site.

    Returns:
        `dict[str, tuple[int, ...]]`: SARA has k (d_in + d_out + 1) parameters, Mo-SARA m k + k + m + d_out.
    """
    d_in, d_out = shape
    if args.method == "sara":
        shapes = {"U": (d_in, k), "S": (k,), "Vh": (k, d_out)}
        return shapes if args.singular_values else {"U": shapes["U"], "Vh": shapes["Vh"]}
    shapes = {"S": (args.num_heads, k)}
    if args.num_heads > 1:
        # One head needs no router: the softmax of one logit is 1.
        shapes.update(gate_down=(k, 1), gate_up=(1, args.num_heads))
    if args.v_position != "none":
        shapes["v"] = (d_out,) if args.v_position == "back" else (d_in,)
    return shapes


def frozen_shapes(args: SaraArguments, shape: tuple[int, int], k: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a site's frozen factors: U (d_in, k) and Vh (k, d_out) for Mo-SARA, none for SARA."""
    return {"U": (shape[0], k), "Vh": (k, shape[1])} if args.method == "mo_sara" else {}


def count_trained(args: SaraArguments, shape: tuple[int, int], k: int) -> int:
    """Number of trained parameters of one site."""
    return sum(math.prod(tensor) for tensor in trained_shapes(args, shape, k).values())


class Delta(nn.Module):
    """
    What SARA's and Mo-SARA's updates have in common: where they stand, their dtypes, and whether they count.

    Args:
        args ([`SaraArguments`]): The adapter's arguments.
        site ([`Site`]): The adapted weight matrix.
        k (`int`): Rank.
        dtype (`torch.dtype`): Dtype of the base weight. Frozen factors have it; trained tensors are float32, or
            float64 on a float64 base.
        device (`torch.device`): Where the base weight is.
    """

    def __init__(self, args: SaraArguments, site: Site, k: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.shape = site.shape
        self.slice: OutputSlice | None = site.slice
        self.k = k
        # A module, since some trainers turn dropout off by going through a model's modules.
        self.dropout = nn.Dropout(args.dropout)
        self.enabled = True
        self.trained_names = tuple(trained_shapes(args, site.shape, k))
        trained_dtype = torch.promote_types(dtype, torch.float32)
        for name, shape in trained_shapes(args, site.shape, k).items():
            self.register_parameter(name, nn.Parameter(_empty(name, shape, trained_dtype)))
        for name, shape in frozen_shapes(args, site.shape, k).items():
            self.register_parameter(name, nn.Parameter(_empty(name, shape, dtype), requires_grad=False))
        self.reset_parameters(args)
        self.to(device)

    def reset_parameters(self, args: SaraArguments) -> None:
        raise NotImplementedError

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained tensors by name."""
        return {name: getattr(self, name) for name in self.trained_names}

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` and `model.half()` must not take the trained tensors below float32: they would
        # lose small updates, and a gradient scaler refuses float16 ones. They keep their values, not a rounded copy.
        before = {name: parameter.data for name, parameter in self.trained().items()}
        super()._apply(fn, recurse)
        for name, value in before.items():
            parameter = getattr(self, name)
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = value.to(parameter.device)
        return self

    def forward(self, x: torch.Tensor, output: torch.Tensor, linear: nn.Linear | None = None) -> torch.Tensor:
        """
        Add the update.

        Args:
            x (`torch.Tensor` of shape `(..., d_in)`): The linear's input.
            output (`torch.Tensor` of shape `(..., outputs of the module)`): The linear's output.
            linear (`torch.nn.Linear`, *optional*): The linear, if it is a plain and frozen one and `output` is what it
                computed from `x` and nobody else's yet: then the short cuts are open.

        Returns:
            `torch.Tensor`: `output` plus the update on this site's columns, in `output`'s dtype.
        """
        if self.dropout.p and self.training:
            x, linear = self.dropout(x), None
        if not torch.is_autocast_enabled(x.device.type):
            if linear is not None and (x.dtype != output.dtype or self.slice is not None):
                linear = None
            return self.add_update(x, output, x.dtype, linear)
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return self.add_update(x.to(dtype), output, dtype, None)

    def add_update(
        self, x: torch.Tensor, output: torch.Tensor, dtype: torch.dtype, linear: nn.Linear | None
    ) -> torch.Tensor:
        raise NotImplementedError

    def follow_weight(self, module: nn.Module) -> None:
        """Take note of the base weight, whenever its values or the frozen factors were set."""

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


def is_plain(module: nn.Module) -> bool:
    """Whether a module is torch's own linear, unquantized and frozen, so that its output is x W and nothing else."""
    if type(module) is not nn.Linear or module.weight.requires_grad:
        return False
    return module.bias is None or not module.bias.requires_grad


class SaraDelta(Delta):
    """The update `dropout(x) U diag(S) Vh` of SARA: U (d_in, k), S (k), Vh (k, d_out), all trained, no scaling."""

    def reset_parameters(self, args: SaraArguments) -> None:
        d_in, _ = self.shape
        _uniform(self.U, fan_in=d_in)
        if args.singular_values:
            _uniform(self.S, fan_in=self.k)
        _uniform(self.Vh, fan_in=self.k)
        if args.zero_init_vh:
            nn.init.zeros_(self.Vh)

    def add_update(self, x, output, dtype, linear):
        # U as (k, d_in), which is contiguous.
        Ut, Vh = self.U.t().to(dtype), self.Vh.to(dtype)
        S = self.S.to(dtype) if "S" in self.trained_names else None
        if linear is not None and _has_own_gradients():
            return _LinearWithUpdate.apply(x, output.detach(), linear.weight, Ut, S, Vh)
        h = F.linear(x.reshape(-1, x.shape[-1]), Ut)
        return _add_product(output, h if S is None else h * S, Vh, self.slice)

    @torch.no_grad()
    def low_rank(self):
        S = self.S if "S" in self.trained_names else self.U.new_ones(self.k)
        return self.U, S, self.Vh


class MoSaraDelta(Delta):
    """
    The update `((z * (g S)) Vh) * v` of Mo-SARA, with `z = dropout(x) U` and `g = softmax(z gate_down gate_up)`.
    Trained: S (m, k), gate_down (k, 1), gate_up (1, m), v (d_out). Frozen: U (d_in, k), Vh (k, d_out).
    """

    def __init__(self, args: SaraArguments, site: Site, k: int, dtype: torch.dtype, device: torch.device):
        self.v_position = args.v_position
        self.num_heads = args.num_heads
        super().__init__(args, site, k, dtype, device)
        # 1 / sigma of shape (k,) while U diag(sigma) Vh is the leading part of the base weight, else None.
        self.register_buffer("inverse_sigma", None, persistent=False)

    def _apply(self, fn, recurse=True):
        dtype = self.U.dtype
        super()._apply(fn, recurse)
        if self.U.dtype != dtype:
            # Rounded factors of a rounded weight are not its singular vectors any more.
            self.inverse_sigma = None
        return self

    def reset_parameters(self, args: SaraArguments) -> None:
        _uniform(self.S, fan_in=self.k)
        if self.num_heads > 1:
            _uniform(self.gate_down, fan_in=self.k)
            _uniform(self.gate_up, fan_in=1)
        if self.v_position != "none":
            nn.init.zeros_(self.v)
        for factor in (self.U, self.Vh):
            nn.init.zeros_(factor)

    @torch.no_grad()
    def set_factors(self, U: torch.Tensor, Vh: torch.Tensor) -> None:
        """Put the frozen factors in place: U of shape (d_in, k), Vh of shape (k, d_out)."""
        self.U.copy_(U)
        self.Vh.copy_(Vh)

    @torch.no_grad()
    def follow_weight(self, module):
        # In half precision, the output's rounding would cost z more than the short cut gains.
        if not is_plain(module) or self.U.dtype not in (torch.float32, torch.float64):
            return
        if module.bias is not None or self.slice is not None or self.v_position == "front":
            return
        U, Vh = self.U.double(), self.Vh.double()
        projected = module.weight.t().double() @ Vh.t()
        sigma = projected.norm(dim=0)
        error = (projected - U * sigma).norm(dim=0)
        # Also false where sigma spans so many orders of magnitude that the output's rounding would show in z.
        holds = bool((error <= 1e-5 * sigma).all())
        self.inverse_sigma = (1 / sigma).to(self.U.dtype) if holds else None

    def add_update(self, x, output, dtype, linear):
        Vh, S = self.Vh.to(dtype), self.S.to(dtype)
        # FSDP may have cast the weight and the factors for this call, each on its own.
        if linear is not None and self.inverse_sigma is not None and self.inverse_sigma.dtype == dtype:
            z = Vh @ output.reshape(-1, output.shape[-1]).t() * self.inverse_sigma[:, None]
        else:
            z = self._project(x, dtype)
        is_papers = self.v_position == "back" and self.num_heads > 1
        is_full = output.dtype == dtype == self.S.dtype == torch.promote_types(dtype, torch.float32)
        if is_papers and is_full and self.slice is None and not Vh.requires_grad and _has_own_gradients():
            return _MixedUpdate.apply(output, z, Vh, self.S, self.gate_down, self.gate_up, self.v)
        scaled = (z * (S.t() if self.num_heads == 1 else S.t() @ self.router(z).to(dtype))).t()
        if self.v_position != "back":
            return _add_product(output, scaled, Vh, self.slice)
        v = self.v.to(dtype)
        if self.slice is None and output.dtype == dtype:
            # Not Vh * v: the gradient of v from the update itself is a sum, that from the factor another product.
            return torch.addcmul(output.reshape(-1, output.shape[-1]), scaled @ Vh, v).view(output.shape)
        return _add_product(output, scaled, Vh * v, self.slice)

    def _project(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """z of shape (k, n), of the linear's input of shape (..., d_in)."""
        if self.v_position == "front":
            x = x * self.v.to(dtype)
        return self.U.to(dtype).t() @ x.reshape(-1, x.shape[-1]).t()

    def router(self, z: torch.Tensor) -> torch.Tensor:
        """
        The softmax of the router for z of shape (k, n): a tensor (m, n), in at least float32, since half precision
        would blur its logits.
        """
        logits = (self.gate_down @ self.gate_up).to(z.dtype).t() @ z
        return torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=0)

    @torch.no_grad()
    def gates(self, x: torch.Tensor) -> torch.Tensor:
        """The router's weights for an input of shape (..., d_in): a tensor of shape (..., m) that sums to 1."""
        if self.num_heads == 1:
            return torch.ones(*x.shape[:-1], 1, device=x.device)
        return self.router(self._project(x, x.dtype)).t().reshape(*x.shape[:-1], self.num_heads)

    @torch.no_grad()
    def low_rank(self):
        refuse_heads(self.num_heads)
        dtype = self.S.dtype
        U, Vh = self.U.to(dtype), self.Vh.to(dtype)
        if self.v_position == "front":
            U = self.v[:, None] * U
        elif self.v_position == "back":
            Vh = Vh * self.v
        return U, self.S[0], Vh


def refuse_heads(num_heads: int) -> None:
    """Raise a `ValueError`, unless the update of a Mo-SARA adapter is one matrix."""
    if num_heads > 1:
        raise ValueError(
            f"A Mo-SARA update with {num_heads} heads depends on the token, since a router mixes its heads, so no "
            "single matrix equals it. Only num_heads=1 can be merged or exported."
        )


def _empty(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # U lies in memory by columns: BLAS libraries multiply by a narrow matrix several times faster that way.
    return torch.empty(shape[::-1], dtype=dtype).t() if name == "U" else torch.empty(shape, dtype=dtype)


DELTAS = {"sara": SaraDelta, "mo_sara": MoSaraDelta}


def _uniform(tensor: torch.Tensor, fan_in: int) -> None:
    """Kaiming-uniform with a = sqrt(5), that is uniform in +-1/sqrt(fan_in), also for vectors."""
    nn.init.uniform_(tensor, -1.0 / math.sqrt(fan_in), 1.0 / math.sqrt(fan_in))


def _add_product(
    output: torch.Tensor, left: torch.Tensor, right: torch.Tensor, part: OutputSlice | None
) -> torch.Tensor:
    """`output` plus left @ right, of shape (n, d_out), on the site's columns; the other columns keep their bits."""
    if part is None and output.dtype == left.dtype:
        return torch.addmm(output.reshape(-1, output.shape[-1]), left, right).view(output.shape)
    update = (left @ right).to(output.dtype)
    if part is None:
        return output + update.view(output.shape)
    if not _is_transformed():
        return _AddToColumns.apply(output, update, part)
    blocks = output.unflatten(-1, (part.groups, -1))
    before, own, after = blocks.tensor_split((part.start, part.stop), -1)
    return torch.cat([before, own + update.view(own.shape), after], -1).flatten(-2)


def _is_transformed() -> bool:
    """Whether a transform of torch.func is at work, which goes through plain operations alone."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _has_own_gradients() -> bool:
    """Whether to use gradients of our own: torch.compile does better with plain operations, torch.jit needs them."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled():
        return False
    return not _is_transformed()


class _LinearWithUpdate(torch.autograd.Function):
    """
    The output of a frozen linear, which is given and overwritten, plus `x U diag(S) Vh`; the gradient of x is both the
    linear's and the update's. Left to autograd, the update's part would be written and read once more to be added.
    """

    @staticmethod
    def forward(ctx, x, output, weight, Ut, S, Vh):
        h = F.linear(x.reshape(-1, x.shape[-1]), Ut)
        ctx.save_for_backward(x, weight, Ut, S, Vh, h)
        ctx.mark_dirty(output)
        output.view(-1, output.shape[-1]).addmm_(h if S is None else h * S, Vh)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, Ut, S, Vh, h = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), grad_output.reshape(-1, grad_output.shape[-1])
        if torch.is_grad_enabled():
            # The gradient is to be differentiated: h has to be a function of x and U again.
            h = F.linear(rows, Ut)
        grad_scaled = F.linear(grad, Vh)
        scaled, grad_h = (h, grad_scaled) if S is None else (h * S, grad_scaled * S)
        grad_S = None if S is None else (grad_scaled * h).sum(0)
        grad_x = (grad @ weight).addmm_(grad_h, Ut).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_h.t() @ rows, grad_S, scaled.t() @ grad


class _MixedUpdate(torch.autograd.Function):
    """
    `output`, of shape (..., d_out), plus `((z * (g S)) Vh) * v`, with z of shape (k, n). Its gradient has fewer passes
    over the tokens than autograd's: v scales the small factor in it, not every token's gradient.
    """

    @staticmethod
    def between(z, Vh, S, gate_down, gate_up):
        gates = torch.softmax((gate_down @ gate_up).t() @ z, dim=0)
        mixed = S.t() @ gates
        return gates, mixed, (mixed * z).t() @ Vh

    @staticmethod
    def forward(ctx, output, z, Vh, S, gate_down, gate_up, v):
        between = _MixedUpdate.between(z, Vh, S, gate_down, gate_up)
        ctx.save_for_backward(z, Vh, S, gate_down, gate_up, v, *between)
        # Not a view: what comes next may change it in place.
        return torch.addcmul(output, between[-1].view(output.shape), v)

    @staticmethod
    def backward(ctx, grad_output):
        z, Vh, S, gate_down, gate_up, v, *between = ctx.saved_tensors
        if torch.is_grad_enabled():
            # The gradient is to be differentiated: these have to be functions of the inputs again.
            between = _MixedUpdate.between(z, Vh, S, gate_down, gate_up)
        gates, mixed, update = between
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        grad_scaled = (Vh * v) @ grad.t()
        grad_mixed = grad_scaled * z
        grad_gates = S @ grad_mixed
        grad_logits = gates * (grad_gates - (gates * grad_gates).sum(0))
        grad_z = torch.addcmul(gate_down @ (gate_up @ grad_logits), grad_scaled, mixed)
        grad_router = z @ grad_logits.t()
        return (
            grad_output,
            grad_z,
            None,
            gates @ grad_mixed.t(),
            grad_router @ gate_up.t(),
            gate_down.t() @ grad_router,
            (grad * update).sum(0),
        )


class _AddToColumns(torch.autograd.Function):
    """
    `output` plus `update` on the columns of `part`. An in-place addition to a view does the same, but autograd copies
    the whole gradient for it.
    """

    @staticmethod
    def forward(ctx, output, update, part):
        ctx.part = part
        result = output.clone(memory_format=torch.contiguous_format)
        columns = part.view(result)
        columns.add_(update.view(columns.shape))
        return result

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, ctx.part.view(grad_output).reshape(-1, ctx.part.size), None
