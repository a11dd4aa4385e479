"""The two trainable updates of section 2 of the design, as child modules of the linear that they adapt.

SARA adds `dropout(x) U diag(S) Vh`, all trained. Mo-SARA adds `((z * (g S)) Vh) * v` with `z = dropout(x) U` and the
router `g = softmax(z gate_down gate_up)`, where U and Vh are frozen singular vectors of the weight.

Both compute in closed form, forward and backward, in one `torch.autograd.Function` each: the update is added to the
linear's output in the same matrix product, nothing is stored that the backward pass can do without, and no gradient
is computed that nobody asked for.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

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
        self.dropout = args.dropout
        self.enabled = True
        self.trained_names = tuple(trained_shapes(args, site.shape, k))
        trained_dtype = torch.promote_types(dtype, torch.float32)
        for name, shape in trained_shapes(args, site.shape, k).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=trained_dtype)))
        for name, shape in frozen_shapes(args, site.shape, k).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))
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

    def compute_dtype(self, x: torch.Tensor) -> torch.dtype:
        """The input's dtype, or autocast's where that is on."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return x.dtype

    def forward(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """
        Add the update.

        Args:
            x (`torch.Tensor` of shape `(..., d_in)`): The linear's input.
            output (`torch.Tensor` of shape `(..., outputs of the module)`): The linear's output.

        Returns:
            `torch.Tensor`: `output` plus the update on this site's columns, in `output`'s dtype.
        """
        dtype = self.compute_dtype(x)
        x = F.dropout(x, self.dropout, self.training)
        with torch.autocast(x.device.type, enabled=False):
            return self.add_update(x.to(dtype), output, dtype)

    def add_update(self, x: torch.Tensor, output: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        raise NotImplementedError

    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The update as factors of `U diag(S) Vh`: (d_in, k), (k,) and (k, d_out), in at least float32."""
        raise NotImplementedError

    @torch.no_grad()
    def merged(self) -> torch.Tensor:
        """The update as a matrix of shape (d_in, d_out), in at least float32."""
        U, S, Vh = self.low_rank()
        return (U * S) @ Vh

    def extra_repr(self) -> str:
        return f"d_in={self.shape[0]}, d_out={self.shape[1]}, k={self.k}, dropout={self.dropout}"


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

    def add_update(self, x, output, dtype):
        S = self.S.to(dtype) if "S" in self.trained_names else None
        return _AddSara.apply(x, output, self.U.to(dtype), S, self.Vh.to(dtype), self.slice)

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

    def add_update(self, x, output, dtype):
        if self.v_position == "front":
            x = x * self.v.to(dtype)
        v = self.v.to(dtype) if self.v_position == "back" else None
        gates = (self.gate_down.to(dtype), self.gate_up.to(dtype)) if self.num_heads > 1 else (None, None)
        U, Vh = self.U.to(dtype), self.Vh.to(dtype)
        return _AddMoSara.apply(x, output, U, *gates, self.S.to(dtype), Vh, v, self.slice)

    @torch.no_grad()
    def gates(self, x: torch.Tensor) -> torch.Tensor:
        """The router's weights for an input of shape (..., d_in): a tensor of shape (..., m) that sums to 1."""
        if self.num_heads == 1:
            return torch.ones(*x.shape[:-1], 1, device=x.device)
        x = x * self.v.to(x.dtype) if self.v_position == "front" else x
        z = x @ self.U.to(x.dtype)
        return _softmax(z, self.gate_down.to(x.dtype), self.gate_up.to(x.dtype))

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


DELTAS = {"sara": SaraDelta, "mo_sara": MoSaraDelta}


def _uniform(tensor: torch.Tensor, fan_in: int) -> None:
    """Kaiming-uniform with a = sqrt(5), that is uniform in +-1/sqrt(fan_in), also for vectors."""
    nn.init.uniform_(tensor, -1.0 / math.sqrt(fan_in), 1.0 / math.sqrt(fan_in))


def _softmax(z: torch.Tensor, gate_down: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """The router's softmax, in at least float32: it tells apart logits that half precision would blur."""
    logits = (z @ gate_down) * gate_up
    return torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def _add(output: torch.Tensor, left: torch.Tensor, right: torch.Tensor, part: OutputSlice | None) -> torch.Tensor:
    """`output` plus left @ right on the site's columns; the other columns keep their bits."""
    if part is None and output.dtype == left.dtype:
        return torch.addmm(output.reshape(-1, output.shape[-1]), left, right).view(output.shape)
    update = left @ right
    if part is None:
        return output + update.view(output.shape).to(output.dtype)
    result = output.clone(memory_format=torch.contiguous_format)
    columns = part.view(result)
    columns.add_(update.view(columns.shape))
    return result


def _columns(grad: torch.Tensor, part: OutputSlice | None, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of the site's columns, as a matrix (n, d_out)."""
    if part is not None:
        grad = part.view(grad).flatten(-2)
    return grad.reshape(-1, grad.shape[-1]).to(dtype)


class _AddSara(torch.autograd.Function):
    """output + (x U * S) Vh on the columns of `part`."""

    @staticmethod
    def forward(ctx, x, output, U, S, Vh, part):
        ctx.part = part
        ctx.save_for_backward(x, U, S, Vh)
        h = x.reshape(-1, x.shape[-1]) @ U
        return _add(output, h, Vh if S is None else S[:, None] * Vh, part)

    @staticmethod
    def backward(ctx, grad_output):
        x, U, S, Vh = ctx.saved_tensors
        needs = ctx.needs_input_grad
        x2 = x.reshape(-1, x.shape[-1])
        grad = _columns(grad_output, ctx.part, x.dtype)
        # Ranks are small beside the widths, so x U is cheaper to compute again than to keep.
        dh = grad @ (Vh if S is None else S[:, None] * Vh).t()
        dx = (dh @ U.t()).view(x.shape) if needs[0] else None
        dU = x2.t() @ dh if needs[2] else None
        dS = dVh = None
        if needs[4] or needs[3]:
            # h^T grad serves both: dVh = S * (h^T grad) by rows, dS = its product with Vh, summed along the rows.
            outer = (x2 @ U).t() @ grad
            dVh = outer if S is None else S[:, None] * outer
            dS = None if S is None else (outer * Vh).sum(1)
        return dx, grad_output, dU, dS, dVh, None


class _AddMoSara(torch.autograd.Function):
    """output + ((z * (g S)) Vh) * v on the columns of `part`, with z = x U and g = softmax(z gate_down gate_up)."""

    @staticmethod
    def forward(ctx, x, output, U, gate_down, gate_up, S, Vh, v, part):
        z = x.reshape(-1, x.shape[-1]) @ U
        ctx.part = part
        ctx.x_shape = x.shape
        # z is all that the backward pass needs of x: U and Vh are frozen.
        ctx.save_for_backward(z, U, gate_down, gate_up, S, Vh, v)
        return _add(output, z * _mix(z, gate_down, gate_up, S)[0], Vh if v is None else Vh * v, part)

    @staticmethod
    def backward(ctx, grad_output):
        z, U, gate_down, gate_up, S, Vh, v = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad = _columns(grad_output, ctx.part, z.dtype)
        mixed, g = _mix(z, gate_down, gate_up, S)
        dw = grad @ (Vh if v is None else Vh * v).t()
        dv = None
        if v is not None and needs[7]:
            # The diagonal of w^T ... Vh: column sums of grad * (w Vh) without the (n, d_out) product.
            dv = (Vh * ((z * mixed).t() @ grad)).sum(0)
        dmixed = dw * z
        dz = dw * mixed
        if g is None:
            dS, d_down, d_up = dmixed.sum(0, keepdim=True), None, None
        else:
            dS = g.t().to(z.dtype) @ dmixed
            dg = (dmixed @ S.t()).to(g.dtype)
            dlogits = (g * (dg - (g * dg).sum(-1, keepdim=True))).to(z.dtype)
            d_up = (z @ gate_down).t() @ dlogits
            da = dlogits @ gate_up.t()
            d_down = z.t() @ da
            dz = torch.addmm(dz, da, gate_down.t())
        dx = (dz @ U.t()).view(ctx.x_shape) if needs[0] else None
        return dx, grad_output, None, d_down, d_up, dS, None, dv, None


def _mix(z, gate_down, gate_up, S):
    """The mixed singular values (g S) per token, and the gates g; one head has no gates."""
    if gate_down is None:
        return S, None
    g = _softmax(z, gate_down, gate_up)
    return g.to(S.dtype) @ S, g
