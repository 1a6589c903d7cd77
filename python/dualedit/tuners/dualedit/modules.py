"""The adapter of DualEdit: cross-attention from the input's tokens to the tokens of an edit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dualedit_kernels import (
    AttentionWeights,
    Gate,
    Slots,
    decides_gate,
    fold_query,
    gated_edit_attention,
    look_up,
)

_ALIGNED = 64  # bytes, as PyTorch allocates


@dataclass(frozen=True)
class EditKV:
    """Projected edits, one after the other.

    Attributes:
        k, v: [T, M], all edits' tokens.
        start, length: [N] int64, first row and number of rows of each edit.
        query: the adapter's `query_weights`, where they are at hand already: with gradients they cost as much
            as the projection of `mid_dim` tokens, and several batches of a training step share them.
    """

    k: Tensor
    v: Tensor
    start: Tensor
    length: Tensor
    query: tuple[Tensor, Tensor] | None = None


class EditCrossAttention(nn.Module):
    """The adapter that the published results come from.

    q = W_q (W_in LN(x) + b_in) + b_q, k = W_k LN(e) + b_k, v = W_v LN(e) + b_v, and
    x + W_o softmax(q k^T / sqrt(M / heads)) v + b_o, for input states x and edit states e. The paper's
    formula (DualEdit, COLM 2025, Sec. 4) leaves out the two LayerNorms, the input projection and the
    residual; the published weights have them.

    Args:
        hidden_size: width D of the residual stream.
        mid_dim: width M of the attention.
        num_heads: heads; divides M.
        eps: of the LayerNorms.
        init_weights: True starts as the identity (W_o = 0), False with a random output projection.
    """

    def __init__(
        self, hidden_size: int, mid_dim: int, num_heads: int, eps: float = 1e-5, init_weights: bool = True
    ):
        super().__init__()
        self.num_heads = num_heads
        self.query_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.edit_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.in_proj = nn.Linear(hidden_size, mid_dim)
        self.q_proj = nn.Linear(mid_dim, mid_dim)
        self.k_proj = nn.Linear(hidden_size, mid_dim)
        self.v_proj = nn.Linear(hidden_size, mid_dim)
        self.o_proj = nn.Linear(mid_dim, hidden_size)
        if init_weights:
            nn.init.zeros_(self.o_proj.weight)
            nn.init.zeros_(self.o_proj.bias)
        self._folded: tuple[tuple[int, ...], tuple[Tensor, Tensor]] | None = None

    def project_edit(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [.., T, M] of edit states [.., T, D], in the adapter's dtype."""
        norm = self.edit_norm
        parts = (*norm.parameters(), *self.k_proj.parameters(), *self.v_proj.parameters())
        # Outside a forward FSDP2 leaves parameters in pieces; every process needs the whole of them.
        scale, shift, w_k, b_k, w_v, b_v = (p.full_tensor() if isinstance(p, DTensor) else p for p in parts)
        states = states.to(scale.dtype)
        states = nn.functional.layer_norm(states, norm.normalized_shape, scale, shift, norm.eps)
        return nn.functional.linear(states, w_k, b_k), nn.functional.linear(states, w_v, b_v)

    def query_weights(self) -> tuple[Tensor, Tensor]:
        """LayerNorm's affine, input and query projection as one: weight [M, D] and bias [M]."""
        parts = (
            self.query_norm.weight, self.query_norm.bias, self.in_proj.weight, self.in_proj.bias,
            self.q_proj.weight, self.q_proj.bias,
        )  # fmt: skip
        if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
            self._forget_fold()
            found = fold_query(*parts)
            for part in found:
                # A fused optimiser's step does not count as a change of the weights; it comes after backward.
                if part.requires_grad and not torch.compiler.is_compiling():
                    part.register_hook(self._forget_fold)
            return found
        # Between two training steps the fold is the same. A parameter's version counts its in-place changes;
        # moving or casting the module gives it other memory.
        state = tuple(number for part in parts for number in (part.data_ptr(), part.dtype, part._version))
        folded = self._folded
        if folded is None or folded[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._folded = folded = (state, fold_query(*parts))
        return folded[1]

    def _forget_fold(self, _: Tensor | None = None) -> None:
        self._folded = None

    def train(self, mode: bool = True):
        self._forget_fold()  # weights that were written to through `.data` do not count a version
        for part in self.parameters():
            # transformers' load_adapter leaves weights mapped from the file, unaligned, which changes the
            # last bit of a product. It sets the mode when it is done.
            if type(part) is nn.Parameter and part.device.type == "cpu" and part.data_ptr() % _ALIGNED:
                part.data = part.data.clone()
        return super().train(mode)

    def __getstate__(self):
        return {**self.__dict__, "_folded": None}

    def forward(
        self,
        hidden: Tensor,
        span: Tensor,
        edits: EditKV,
        route: Tensor | None = None,
        gate: Gate | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Write the routed edits into the residual stream.

        Args:
            hidden: [B, L, D] input states.
            span: [B, L] bool, positions to write to.
            edits: the projected edits.
            route: [B] int64, index of each row's edit, -1 for none; or
            gate: decides the route here.

        Returns:
            states [B, L, D] in hidden's dtype (rows with route -1 bit for bit as they came), and route [B].
        """
        if gate is not None and not decides_gate(hidden, gate):
            # Looked up first: a CPU knows then whether any row is open, and mostly needs no weights at all.
            route, gate = look_up(hidden, gate), None
            if route.device.type == "cpu" and not bool((route >= 0).any()):
                return hidden, route
        w_q, b_q = self.query_weights() if edits.query is None else edits.query
        slots = Slots(edits.k, edits.v, edits.start, edits.length)
        weights = AttentionWeights(
            w_q, b_q, self.o_proj.weight, self.o_proj.bias, self.num_heads, self.query_norm.eps
        )
        return gated_edit_attention(hidden, span, slots, weights, route=route, gate=gate)
