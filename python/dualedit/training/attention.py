"""Eager attention on a CPU, one head at a time.

What a model's eager attention costs on a CPU is not its products but its scores: for 4 rows of 600 tokens and
16 heads they are 23 million numbers, which are written, scaled, masked, cast, softened and cast back, each
time through memory; the backward pass does as much again. The scores of one head fit into the cache. So the
same steps are done here head by head, and the backward pass computes the scores again instead of keeping
them. Measured on one core (EPYC, Zen 5), those 4 rows in bf16: forward 50 ms in place of 210, backward 85 in
place of 210. Under a causal mask a third of the scores is left out besides: queries are taken in blocks,
each with the keys that it sees (see `sight.py`).
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dualedit_kernels.products import ONEDNN

from .sight import Block, Sight, sight_of

_NAME = "dualedit_by_head"
# What models pass along that eager attention does not read, or that the mask says already.
_UNREAD = {
    "is_causal", "sliding_window", "position_ids", "use_cache", "cache_position", "position_embeddings",
    "output_attentions", "output_hidden_states", "return_dict", "cu_seq_lens_q", "cu_seq_lens_k",
    "max_length_q", "max_length_k",
}  # fmt: skip
# Below this many scores in a head all heads fit into the cache together.
_WORTH_IT = 1 << 14


class _ByHead(torch.autograd.Function):
    """softmax(q k^T * scaling + mask) v.

    q [R, H, P, K], k [R, G, S, K], v [R, G, S, V] with H a multiple of G, all of one dtype; sight: the mask
    [R or 1, H or 1, P, S] of that dtype, or none, and its blocks. Result [R, P, H, V].
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sight: Sight, scaling: float) -> Tensor:
        # A power of two rounds nothing, and the queries are fewer numbers than the scores.
        ctx.before, ctx.after = (scaling, 1.0) if math.frexp(scaling)[0] == 0.5 else (1.0, scaling)
        q, k, v = (q * ctx.before).contiguous(), k.contiguous(), v.contiguous()
        rows, heads, queries, _ = q.shape
        out = q.new_empty(rows, queries, heads, v.shape[-1])
        with torch.autocast("cpu", enabled=False):
            for (one, keys, values), (mask, blocks), to_one in zip(
                _heads(q, k, v), sight.heads(rows, heads), _each(out.transpose(1, 2)), strict=True
            ):
                for block in blocks:
                    weights = _weights(one, keys, mask, block, ctx.after)
                    to_one[block.queries] = ONEDNN.linear(weights, values[block.keys].t(), None)
        ctx.save_for_backward(q, k, v)
        ctx.sight = sight
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v = ctx.saved_tensors
        into_q = torch.empty_like(q)
        # Several heads may share keys and values: their sum is taken in fp32.
        into_k, into_v = (torch.zeros(t.shape, dtype=torch.float32) for t in (k, v))
        heads = zip(
            _heads(q, k, v), _heads(into_q, into_k, into_v), ctx.sight.heads(*q.shape[:2]),
            _each(grad.transpose(1, 2).contiguous()), strict=True,
        )  # fmt: skip
        with torch.autocast("cpu", enabled=False):
            for (one, keys, values), (to_one, to_keys, to_values), (mask, blocks), from_out in heads:
                for block in blocks:
                    here, seen = block.queries, block.keys
                    weights = _weights(one, keys, mask, block, ctx.after)
                    to_values[seen] += ONEDNN.linear(weights.t(), from_out[here].t(), None)
                    from_weights = ONEDNN.linear(from_out[here], values[seen], None)  # [P, S] of the block
                    scores = torch._softmax_backward_data(from_weights, weights, -1, weights.dtype)
                    to_one[here] = ONEDNN.linear(scores, keys[seen].t(), None)
                    to_keys[seen] += ONEDNN.linear(scores.t(), one[here].t(), None)
        into_q, into_k = into_q.mul_(ctx.before * ctx.after), into_k.mul_(ctx.after)
        return into_q, into_k.to(k.dtype), into_v.to(v.dtype), None, None


def _each(x: Tensor) -> list[Tensor]:
    """[P, K] of each head of each row of x [R, H, P, K], none of them copied."""
    return [head for row in x.unbind() for head in row.unbind()]


def _heads(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries [P, K], keys [S, K] and values [S, V] of each head of each row, none of them copied."""
    share = q.shape[1] // k.shape[1]
    groups = list(zip(_each(k), _each(v), strict=True))
    return ((one, *groups[number // share]) for number, one in enumerate(_each(q)))


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, block: Block, scaling: float) -> Tensor:
    """[P, S] of a block of one head, rounded where eager attention rounds; softmax works in fp32 inside."""
    scores = ONEDNN.linear(q[block.queries], k[block.keys], None)
    if scaling != 1.0:
        scores = scores.mul_(scaling)
    if mask is not None and block.masked is not None:
        first = block.keys.start
        scores[:, block.masked.start - first : block.masked.stop - first].add_(
            mask[block.queries, block.masked]
        )
    return torch.softmax(scores, -1)


def attend_by_head(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: object,
) -> tuple[Tensor, Tensor | None]:
    """What transformers' attention layers call: the same as their eager attention, and no attention weights.

    Args:
        query: [R, H, P, K]; key: [R, G, S, K]; value: [R, G, S, V]; fp32 or bf16.
        attention_mask: [R or 1, H or 1, P, S], added to the scores, or None.
        more: what else the model says. Anything that might change the result is left to its own eager
            attention, as are dropout, other dtypes and few scores.

    Returns:
        [R, P, H, V], and None.
    """
    one = query.dtype
    known = all(name in _UNREAD or said is None for name, said in more.items())
    mask = attention_mask
    plain = one in (torch.float32, torch.bfloat16) and {one} == {key.dtype, value.dtype}
    fits = mask is None or (
        mask.dim() == 4 and mask.dtype.is_floating_point and mask.shape[-2:] == (query.shape[2], key.shape[2])
    )
    large = query.shape[2] * key.shape[2] >= _WORTH_IT
    if not (known and plain and fits and large) or dropout or scaling is None or query.device.type != "cpu":
        return _own_eager(module)(
            module, query, key, value, mask, scaling=scaling, dropout=dropout, **more
        )  # fmt: skip
    return _ByHead.apply(query, key, value, sight_of(mask, query.shape[2], key.shape[2], one), scaling), None


def _own_eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The eager attention of the model that a layer belongs to: transformers defines it beside the layer."""
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise ValueError(f"{type(module).__name__} has no eager attention: call the model outside of this block.")


@contextmanager
def attention_by_head(base: nn.Module) -> Iterator[int]:
    """Inside the block, the eager attention of a model on the CPU goes head by head.

    Yields:
        how many layers do: 0 on a GPU, for other attention than eager, and for layers that do not ask
        transformers for their attention.
    """
    configs, count = {}, 0
    for module in base.modules():
        config = getattr(module, "config", None)
        eager = getattr(config, "_attn_implementation", None) == "eager"
        if eager and _asks(module) and next(base.parameters()).device.type == "cpu":
            configs[id(config)] = config
            count += 1
    if count:
        _register()
    for config in configs.values():
        config._attn_implementation_internal = _NAME  # the property would set those of parts along with it
    try:
        yield count
    finally:
        for config in configs.values():
            config._attn_implementation_internal = "eager"


def _asks(module: nn.Module) -> bool:
    """Whether a module is an attention layer of the kind that looks its function up by its config."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(_NAME, attend_by_head)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
