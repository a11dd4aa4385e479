"""Mo-SARA: trained vectors of singular values, mixed by a router, between a weight's frozen singular vectors.

The update is `((z * (g S)) Vh) * v` with `z = dropout(x) U` and the router `g = softmax(z gate_down gate_up)`, where U
and Vh are frozen singular vectors of the weight.

At the size of a layer, an update costs as much in calls and in memory traffic as in arithmetic, so it has few tensor
operations. If the update is added to the output of a plain frozen linear, a short cut saves more, and changes the
result by rounding only: z is computed from the linear's output, `x U = (x W) Vh^T / sigma`, because U diag(sigma) Vh
is the leading part of W. This product has d_out in the place of d_in, and grouped queries make d_out small. Its
gradient goes to the linear's output, so that no second gradient of x is needed.

The paper's form (v at the back, several heads) has two gradients of its own: `_MixedUpdate`, with fewer passes than
autograd's, for whole outputs in full precision, and `_LinearWithMixture`, which keeps less, for GPUs. Tensors between
the factors have the shape (k, n) for n tokens, because BLAS libraries compute a product with few and long rows faster
than one with few columns.
"""

import torch
from torch import nn

from ..sites import PlannedSite
from ..spectrum import doubled
from .base import Delta, Method, Options, Shapes
from .products import (
    add_dropped,
    add_product,
    at_least_float32,
    can_drop_again,
    is_plain,
    own_gradients_pay,
    random_numbers_from,
    random_state,
    uniform_,
)


class MoSaraDelta(Delta):
    """
    The update `((z * (g S)) Vh) * v` of Mo-SARA, with `z = dropout(x) U` and `g = softmax(z gate_down gate_up)`.
    S (m, k), gate_down (k, 1), gate_up (1, m) and v (d_out) are trained. U (d_in, k) and Vh (k, d_out) are frozen.
    """

    U: nn.Parameter
    Vh: nn.Parameter
    S: nn.Parameter
    gate_down: nn.Parameter
    gate_up: nn.Parameter
    v: nn.Parameter
    inverse_sigma: torch.Tensor | None

    def __init__(self, method: Method, site: PlannedSite, dtype: torch.dtype, device: torch.device):
        self.v_position = method.options.v_position
        self.num_heads = method.options.num_heads
        super().__init__(method, site, dtype, device)
        # This is 1 / sigma, of shape (k,), while U diag(sigma) Vh is the leading part of the base weight, else None.
        self.register_buffer("inverse_sigma", None, persistent=False)

    def _apply(self, fn, recurse=True):
        dtype = self.U.dtype
        super()._apply(fn, recurse)
        if self.U.dtype != dtype:
            # Factors and weight were rounded, so the factors are not the singular vectors of the weight any more.
            self.inverse_sigma = None
        return self

    def reset_parameters(self, options: Options) -> None:
        uniform_(self.S, fan_in=self.k)
        if self.num_heads > 1:
            uniform_(self.gate_down, fan_in=self.k)
            uniform_(self.gate_up, fan_in=1)
        if self.v_position != "none":
            nn.init.zeros_(self.v)

    @torch.no_grad()
    def follow_weight(self, module):
        # In half precision, the rounding of the output would harm z more than the short cut is worth.
        if not is_plain(module) or self.U.dtype not in (torch.float32, torch.float64):
            return
        if module.bias is not None or self.slice is not None or self.v_position == "front":
            return
        U, Vh = doubled(self.U), doubled(self.Vh)
        projected = doubled(module.weight.t()) @ Vh.t()
        sigma = projected.norm(dim=0)
        error = (projected - U * sigma).norm(dim=0)
        # This is also false if sigma spans so many orders of magnitude that the output's rounding would show in z.
        holds = bool((error <= 1e-5 * sigma).all())
        self.inverse_sigma = (1 / sigma).to(self.U.device, self.U.dtype) if holds else None

    def add_update(self, x, output, dtype, linear):
        Vh = self.Vh.to(dtype)
        if linear is not None and self.drops_itself(x, output):
            p = self.dropout_now()
            if p or self.inverse_sigma is None:
                U, own = self.U.to(dtype), (self.S, self.gate_down, self.gate_up, self.v)
                return _LinearWithMixture.apply(x, output.detach(), linear.weight, U, Vh, *own, p)[0]
        # FSDP may have cast the weight and the factors for this call independently, so the dtypes are compared.
        if linear is not None and self.inverse_sigma is not None and self.inverse_sigma.dtype == dtype:
            z = Vh @ output.reshape(-1, output.shape[-1]).t() * self.inverse_sigma[:, None]
        else:
            z = self._project(x, dtype)
        is_full = output.dtype == dtype == self.S.dtype == at_least_float32(dtype)
        if self._is_papers() and is_full and self.slice is None and not Vh.requires_grad and own_gradients_pay(output):
            return _MixedUpdate.apply(output, z, Vh, self.S, self.gate_down, self.gate_up, self.v)
        scaled = self._scaled(z)
        if self.v_position != "back":
            return add_product(output, scaled, Vh, self.slice)
        v = self.v.to(dtype)
        if self.slice is None and output.dtype == dtype:
            # v multiplies the update and not Vh, because its gradient is then a sum, and not one more matrix product.
            return torch.addcmul(output.reshape(-1, output.shape[-1]), scaled @ Vh, v).view(output.shape)
        return add_product(output, scaled, Vh * v, self.slice)

    def _is_papers(self) -> bool:
        return self.v_position == "back" and self.num_heads > 1

    def drops_itself(self, x, output):
        frozen = not (self.U.requires_grad or self.Vh.requires_grad)
        return self._is_papers() and frozen and can_drop_again(x, output, self.dropout)

    def add_part(self, x, output, dtype, shards):
        x, U = x.reshape(-1, x.shape[-1]), self.U.to(dtype)
        if self.v_position == "front":
            x = x * shards.rows(self.v.to(dtype), 0)
        z = shards.summed(shards.rows(U, 0).t() @ x.t())
        Vh = shards.columns(self.Vh.to(dtype), 1)
        if self.v_position == "back":
            Vh = Vh * shards.columns(self.v.to(dtype), 0)
        return add_product(output, shards.shared(self._scaled(z)), Vh, shards.slice(self.slice))

    def update_of_rows(self, x, own, shards):
        # All adapters of a base have the same U and Vh, so these two products are those of one adapter.
        U, Vh, S, v = self.U.to(x.dtype), self.Vh.to(x.dtype), own["S"], own.get("v")
        if shards is not None:
            U, Vh = shards.rows(U, 0), shards.columns(Vh, 1)
            if v is not None:
                v = (shards.rows if self.v_position == "front" else shards.columns)(v, 1)
        z = (x * v[:, None] if v is not None and self.v_position == "front" else x) @ U
        z = z if shards is None else shards.summed(z)
        if self.num_heads > 1:
            logits = (z @ own["gate_down"]) @ own["gate_up"]
            S = torch.softmax(logits.to(at_least_float32(logits.dtype)), dim=-1).to(z.dtype) @ S
        scaled = z * S
        update = (scaled if shards is None else shards.shared(scaled)) @ Vh
        return update * v[:, None] if v is not None and self.v_position == "back" else update

    def _scaled(self, z: torch.Tensor) -> torch.Tensor:
        """The input of Vh, of shape (n, k), for z of shape (k, n)."""
        S = self.S.to(z.dtype)
        return (z * (S.t() if self.num_heads == 1 else S.t() @ self.router(z).to(z.dtype))).t()

    def _project(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """z, of shape (k, n), for the linear's input of shape (..., d_in)."""
        if self.v_position == "front":
            x = x * self.v.to(dtype)
        return self.U.to(dtype).t() @ x.reshape(-1, x.shape[-1]).t()

    def router(self, z: torch.Tensor) -> torch.Tensor:
        """
        The softmax of the router for z of shape (k, n): a tensor (m, n). It is computed in at least float32, because
        half precision would round its logits too coarsely.
        """
        logits = (self.gate_down @ self.gate_up).to(z.dtype).t() @ z
        return torch.softmax(logits.to(at_least_float32(logits.dtype)), dim=0)

    @torch.no_grad()
    def gates(self, x: torch.Tensor) -> torch.Tensor:
        """The router's weights for an input of shape (..., d_in), of shape (..., m). They sum to 1 for each token."""
        if self.num_heads == 1:
            return torch.ones(*x.shape[:-1], 1, device=x.device)
        return self.router(self._project(x, x.dtype)).t().reshape(*x.shape[:-1], self.num_heads)

    @torch.no_grad()
    def rest(self):
        (self.S if self.v_position == "none" else self.v).zero_()

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


class _MixedUpdate(torch.autograd.Function):
    """
    `output`, of shape (..., d_out), plus `((z * (g S)) Vh) * v`, with z of shape (k, n). Its gradient has fewer passes
    over the tokens than autograd's, because in it v scales the small factor Vh, and not the gradient of every token.
    """

    @staticmethod
    def between(z, Vh, S, gate_down, gate_up):
        router = gate_down @ gate_up
        gates = torch.softmax(router.t() @ z, dim=0)
        mixed = S.t() @ gates
        return router, gates, mixed, (mixed * z).t() @ Vh

    @staticmethod
    def forward(ctx, output, z, Vh, S, gate_down, gate_up, v):
        between = _MixedUpdate.between(z, Vh, S, gate_down, gate_up)
        ctx.save_for_backward(z, Vh, S, gate_down, gate_up, v, *between)
        # The result is not a view, because later operations may change it in place.
        return torch.addcmul(output, between[-1].view(output.shape), v)

    @staticmethod
    def backward(ctx, grad_output):
        z, Vh, S, gate_down, gate_up, v, *between = ctx.saved_tensors
        if torch.is_grad_enabled():
            # The gradient is to be differentiated, so these have to be functions of the inputs again.
            between = _MixedUpdate.between(z, Vh, S, gate_down, gate_up)
        router, gates, mixed, update = between
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        grad_scaled = (Vh * v) @ grad.t()
        grad_mixed = grad_scaled * z
        grad_gates = S @ grad_mixed
        grad_logits = torch._softmax_backward_data(grad_gates, gates, 0, gates.dtype)
        grad_z = torch.addcmul(router @ grad_logits, grad_scaled, mixed)
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


class _LinearWithMixture(torch.autograd.Function):
    """
    The output of a frozen linear plus the update of its input x. The output is given, and overwritten. Of the tensors
    that grow with the batch, z alone is kept: x is not needed, since U is frozen; the mask of the dropout is made
    again from the state of the random numbers; and the gradient of v is a sum over Vh instead of one over the update.
    z is a result too, so that a gradient that is to be differentiated has it as a function of x.
    """

    @staticmethod
    def between(z, S, gate_down, gate_up):
        router = (gate_down @ gate_up).to(z.dtype)
        gates = torch.softmax((router.t() @ z).to(at_least_float32(z.dtype)), dim=0)
        return router, gates, S.to(z.dtype).t() @ gates.to(z.dtype)

    @staticmethod
    def forward(ctx, x, output, weight, U, Vh, S, gate_down, gate_up, v, p):
        ctx.set_materialize_grads(False)
        ctx.p, ctx.shape = p, x.shape
        rows = x.reshape(-1, x.shape[-1])
        if p:
            ctx.state = random_state(x.device)
            rows, _ = torch.native_dropout(rows, p, True)
        z = U.t() @ rows.t()
        ctx.save_for_backward(weight, U, Vh, S, gate_down, gate_up, v, z)
        ctx.mark_dirty(output)
        _, _, mixed = _LinearWithMixture.between(z, S, gate_down, gate_up)
        output.view(-1, output.shape[-1]).addmm_((mixed * z).t(), Vh * v.to(z.dtype))
        return output, z

    @staticmethod
    def backward(ctx, grad_output, grad_of_z):
        weight, U, Vh, S, gate_down, gate_up, v, z = ctx.saved_tensors
        if grad_output is None:
            grad_output = z.new_zeros(z.shape[1], Vh.shape[1])
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        router, gates, mixed = _LinearWithMixture.between(z, S, gate_down, gate_up)
        grad_scaled = (Vh * v.to(z.dtype)) @ grad.t()
        grad_mixed = grad_scaled * z
        grad_gates = (S.to(z.dtype) @ grad_mixed).to(gates.dtype)
        grad_logits = torch._softmax_backward_data(grad_gates, gates, 0, gates.dtype).to(z.dtype)
        grad_z = torch.addcmul(router @ grad_logits, grad_scaled, mixed)
        grad_z = grad_z if grad_of_z is None else grad_z + grad_of_z
        grad_x = None
        if ctx.needs_input_grad[0]:
            through = grad @ weight
            if ctx.p:
                with random_numbers_from(through.device, ctx.state):
                    _, mask = torch.native_dropout(through.detach(), ctx.p, True)
                through = add_dropped(through, grad_z.t() @ U.t(), mask, ctx.p)
            else:
                through.addmm_(grad_z.t(), U.t())
            grad_x = through.view(ctx.shape)
        grad_router = (z @ grad_logits.t()).to(gate_down.dtype)
        return (
            grad_x,
            None,
            None,
            None,
            None,
            (gates.to(z.dtype) @ grad_mixed.t()).to(S.dtype),
            grad_router @ gate_up.t(),
            gate_down.t() @ grad_router,
            (((mixed * z) @ grad) * Vh).sum(0, dtype=v.dtype),
            None,
        )


def refuse_heads(num_heads: int) -> None:
    """Raise a `ValueError`, unless the update of a Mo-SARA adapter is one matrix."""
    if num_heads > 1:
        raise ValueError(
            f"A Mo-SARA update with {num_heads} heads depends on the token, since a router mixes its heads, so no "
            "single matrix equals it. Only num_heads=1 can be merged or exported."
        )


class MoSara(Method):
    """Mo-SARA: only one-dimensional vectors are trained (section 3.3 of the paper)."""

    name = "mo_sara"
    title = "Mo-SARA"
    summary = (
        "trained vectors of singular values, mixed per token by a router, between a weight's frozen singular vectors."
    )
    limit = "With more than one head the update depends on the token, so it cannot be merged into the weights."
    default_threshold = 0.5
    learning_rates = (2e-1, 3e-2)
    delta_class = MoSaraDelta
    has_factors = True
    # A card always shows the number of heads, because its readers look for it.
    shown_options = ("num_heads",)

    def check(self) -> None:
        if not self.options.singular_values or self.options.zero_init_vh:
            raise ValueError(
                "singular_values=False and zero_init_vh=True are ablations of method='sara'; the factors of "
                "method='mo_sara' are frozen. Drop them, or choose method='sara'."
            )

    def trained_shapes(self, shape: tuple[int, int], k: int) -> Shapes:
        """S (m, k), gate_down (k, 1), gate_up (1, m) and v (d_out): m k + k + m + d_out parameters for m heads."""
        d_in, d_out = shape
        heads, v_position = self.options.num_heads, self.options.v_position
        shapes: Shapes = {"S": (heads, k)}
        if heads > 1:
            # One head needs no router, because the softmax of one logit is 1.
            shapes.update(gate_down=(k, 1), gate_up=(1, heads))
        if v_position != "none":
            shapes["v"] = (d_out,) if v_position == "back" else (d_in,)
        return shapes

    @property
    def router_heads(self) -> int:
        return self.options.num_heads

    def refuse_export(self) -> None:
        refuse_heads(self.options.num_heads)
