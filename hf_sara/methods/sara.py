"""SARA: a trained low-rank update `dropout(x) U diag(S) Vh` beside a frozen weight.

At the size of a layer, an update costs as much in calls and in memory traffic as in arithmetic, so it has few tensor
operations. If the update is added to the output of a plain frozen linear, a short cut saves more, and changes the
result by rounding only: `_LinearWithUpdate` computes the gradients of the linear and of the update together, so that
both are written in one pass.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .base import Delta, Method, Options, Shapes
from .products import (
    add_dropped,
    add_product,
    can_drop_again,
    own_gradients_pay,
    random_numbers_from,
    random_state,
    uniform_,
)


class SaraDelta(Delta):
    """The update `dropout(x) U diag(S) Vh` of SARA. U (d_in, k), S (k) and Vh (k, d_out) are all trained."""

    U: nn.Parameter
    S: nn.Parameter
    Vh: nn.Parameter

    def reset_parameters(self, options: Options) -> None:
        d_in, _ = self.shape
        uniform_(self.U, fan_in=d_in)
        if options.singular_values:
            uniform_(self.S, fan_in=self.k)
        uniform_(self.Vh, fan_in=self.k)
        if options.zero_init_vh:
            nn.init.zeros_(self.Vh)

    def add_update(self, x, output, dtype, linear):
        # U is stored by columns, so its transpose (k, d_in) is contiguous. Tensors are looked up where they lie, and
        # cast only if they have to be, because both take as long as the start of a kernel.
        own: Any = self._parameters
        U, S, Vh = own["U"], own.get("S"), own["Vh"]
        if Vh.dtype != dtype:
            U, S, Vh = U.to(dtype), None if S is None else S.to(dtype), Vh.to(dtype)
        if linear is not None and own_gradients_pay(output):
            return _LinearWithUpdate.apply(x, output.detach(), linear.weight, U.t(), S, Vh, self.dropout_now())
        h = F.linear(x.reshape(-1, x.shape[-1]), U.t())
        return add_product(output, h if S is None else h * S, Vh, self.slice)

    def drops_itself(self, x, output):
        return can_drop_again(x, output, self.dropout)

    def add_part(self, x, output, dtype, shards):
        h = shards.summed(F.linear(x.reshape(-1, x.shape[-1]), shards.rows(self.U.t().to(dtype), 1)))
        scaled = h * self.S.to(dtype) if "S" in self.trained_names else h
        return add_product(
            output, shards.shared(scaled), shards.columns(self.Vh.to(dtype), 1), shards.slice(self.slice)
        )

    def update_of_rows(self, x, own, shards):
        U, S, Vh = own["U"], own.get("S"), own["Vh"]
        if shards is not None:
            U, Vh = shards.rows(U, 1), shards.columns(Vh, 2)
        h = x @ U
        h = h if shards is None else shards.summed(h)
        scaled = h if S is None else h * S[:, None]
        return (scaled if shards is None else shards.shared(scaled)) @ Vh

    @torch.no_grad()
    def rest(self):
        # If both were zero, neither would ever have a gradient.
        if self.Vh.any():
            (self.S if "S" in self.trained_names else self.Vh).zero_()

    @torch.no_grad()
    def low_rank(self):
        S = self.S if "S" in self.trained_names else self.U.new_ones(self.k)
        return self.U, S, self.Vh


class _LinearWithUpdate(torch.autograd.Function):
    """
    The output of a frozen linear plus `dropout(x) U diag(S) Vh`. The output is given, and overwritten. The gradient of
    x has the parts of the linear and of the update; autograd would write the update's part and read it again to add
    it. With dropout, x is kept, which all adapted linears of it share, and the state of the random numbers, from which
    the mask is made again. Autograd would keep what the dropout made of x, which is another tensor for each linear.

    Tensors between the factors have the shape (k, n) for n tokens. BLAS libraries compute products with few and long
    rows faster, and on a GPU, a row of k numbers in half precision begins where tensor cores cannot read it.
    """

    @staticmethod
    def forward(ctx, x, output, weight, Ut, S, Vh, p):
        ctx.p = p
        rows = x.reshape(-1, x.shape[-1])
        if p:
            ctx.state = random_state(x.device)
            rows, _ = torch.native_dropout(rows, p, True)
        h = Ut @ rows.t()
        ctx.save_for_backward(x, weight, Ut, S, Vh, h)
        ctx.mark_dirty(output)
        output.view(-1, output.shape[-1]).addmm_((h if S is None else h * S[:, None]).t(), Vh)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, Ut, S, Vh, h = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), grad_output.reshape(-1, grad_output.shape[-1])
        if ctx.p:
            with random_numbers_from(x.device, ctx.state):
                rows, mask = torch.native_dropout(rows, ctx.p, True)
        if torch.is_grad_enabled():
            # The gradient is to be differentiated, so h has to be a function of x and U again.
            h = Ut @ rows.t()
        grad_scaled = Vh @ grad.t()
        scaled, grad_h = (h, grad_scaled) if S is None else (h * S[:, None], grad_scaled * S[:, None])
        grad_S = None if S is None else (grad_scaled * h).sum(1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            through = grad @ weight
            if ctx.p:
                through = add_dropped(through, grad_h.t() @ Ut, mask, ctx.p)
            else:
                through.addmm_(grad_h.t(), Ut)
            grad_x = through.view(x.shape)
        return grad_x, None, None, grad_h @ rows, grad_S, scaled @ grad, None


class Sara(Method):
    """SARA: the rank of the update follows from the singular values of each weight (section 3.2 of the paper)."""

    name = "sara"
    title = "SARA"
    summary = "a low-rank update `U diag(S) Vh` beside each weight, its rank read from the weight's singular values."
    limit = "The update is a plain low-rank product; it can be merged, or exported to PEFT's LoRA format."
    default_threshold = 0.01
    delta_class = SaraDelta

    def check(self) -> None:
        if self.options.v_position != "back":
            raise ValueError(
                f"v_position={self.options.v_position!r} is an option of method='mo_sara': SARA has no vector v. "
                "Drop it, or choose method='mo_sara'."
            )

    def trained_shapes(self, shape: tuple[int, int], k: int) -> Shapes:
        """U (d_in, k), S (k) and Vh (k, d_out): k (d_in + d_out + 1) parameters. One of the ablations has no S."""
        d_in, d_out = shape
        if self.options.singular_values:
            return {"U": (d_in, k), "S": (k,), "Vh": (k, d_out)}
        return {"U": (d_in, k), "Vh": (k, d_out)}
