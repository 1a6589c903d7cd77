"""The language model for training on a CPU: the function of transformers' `LlamaModel`, split at a layer.

The layers below the split are frozen and run without gradients, so what they make of a sequence can be kept;
the layers
from the split up carry a LoRA:

    y = W x + s B A P x        (P whitens x by what plain text puts into it, see `reader.py`)
"""

import torch
import torch.nn.functional as F
from torch import nn

RANK, SCALE = 32, 1.0
# Modules by the input that they share.
TARGETS = {
    "attention": ("self_attn.q_proj", "self_attn.v_proj"),
    "heads": ("self_attn.o_proj",),
    "mlp": ("mlp.up_proj", "mlp.gate_proj"),
    "gated": ("mlp.down_proj",),
}


def norm(x, weight, eps: float):
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def turn(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def layer(x, cos, sin, mask, w, a, b, heads: int, kv_heads: int, eps: float, seen=None):
    """`x` [B, T, D] to the same; `cos`, `sin` [B, 1, T, H]; `mask` [B, 1, T, T]; `w` nine frozen weights;
    `a` four [k R, in] and `b` six [out, R], or None without a LoRA."""
    rows, length, _ = x.shape
    size = cos.shape[-1]

    def linears(h, weights, j, at):
        """Linears that share an input, with a LoRA each."""
        if seen is not None:
            seen(j, h)
        if a is None:
            return [F.linear(h, weight) for weight in weights]
        low = F.linear(h, a[j])
        return [
            F.linear(h, weight) + F.linear(low[..., k * RANK : (k + 1) * RANK], b[at + k])
            for k, weight in enumerate(weights)
        ]

    h = norm(x, w[0], eps)
    q, v = linears(h, (w[1], w[3]), 0, 0)
    k = F.linear(h, w[2])
    q = turn(q.view(rows, length, heads, size).transpose(1, 2), cos, sin)
    k = turn(k.view(rows, length, kv_heads, size).transpose(1, 2), cos, sin)
    v = v.view(rows, length, kv_heads, size).transpose(1, 2)
    # Grouped queries without copies of the keys: [B, kv, group T, H].
    group = heads // kv_heads
    scores = q.reshape(rows, kv_heads, group * length, size) @ k.transpose(-1, -2)
    scores = scores.view(rows, heads, length, length) * size**-0.5 + mask
    h = scores.softmax(-1).view(rows, kv_heads, group * length, length) @ v
    h = h.view(rows, heads, length, size).transpose(1, 2).reshape(rows, length, heads * size)
    x = x + linears(h, (w[4],), 1, 2)[0]
    h = norm(x, w[5], eps)
    up, gate = linears(h, (w[6], w[7]), 2, 3)
    return x + linears(F.silu(gate) * up, (w[8],), 3, 5)[0]


class LeanLlama(nn.Module):
    """`LlamaModel`'s frozen weights in bfloat16 and a LoRA in float32."""

    def __init__(self, model, split: int):
        super().__init__()
        self.model, self.split, c = model, split, model.config
        self.sizes = (c.num_attention_heads, c.num_key_value_heads, c.rms_norm_eps)
        self.frozen, self.names, self.whiten = [], [], []
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        for i, block in enumerate(model.layers):
            s, m = block.self_attn, block.mlp
            linears = [s.q_proj, s.k_proj, s.v_proj, s.o_proj]
            self.frozen.append(
                [block.input_layernorm.weight]
                + [p.weight for p in linears]
                + [
                    block.post_attention_layernorm.weight,
                    m.up_proj.weight,
                    m.gate_proj.weight,
                    m.down_proj.weight,
                ]
            )
            for group in TARGETS.values() if i >= split else ():
                width = block.get_submodule(group[0]).in_features
                self.a.append(nn.Parameter(torch.randn(RANK * len(group), width) / width**0.5))
                self.whiten.append(torch.eye(width))
                for name in group:
                    self.b.append(nn.Parameter(torch.zeros(block.get_submodule(name).out_features, RANK)))
                    self.names.append(f"layers.{i}.{name}")

    def turns(self, x, positions):
        cos, sin = self.model.rotary_emb(x, positions)
        return cos[:, None], sin[:, None]

    @torch.no_grad()
    def lower(self, x, mask, positions):
        """Hidden states in front of layer `split` [B, T, D] of embeddings `x` [B, T, D]."""
        cos, sin = self.turns(x, positions)
        for w in self.frozen[: self.split]:
            x = layer(x, cos, sin, mask, w, None, None, *self.sizes)
        return x

    def upper(self, x, mask, positions, seen=None):
        """Last hidden states [B, T, D] of what `lower` gave; `seen(i, inputs)` gets each module's inputs."""
        cos, sin = self.turns(x, positions)
        for i, w in enumerate(self.frozen[self.split :]):
            a = [(self.a[4 * i + j] @ self.whiten[4 * i + j]).to(x.dtype) for j in range(4)]
            b = [(self.b[6 * i + j] * SCALE).to(x.dtype) for j in range(6)]
            x = layer(
                x, cos, sin, mask, w, a, b, *self.sizes, seen and (lambda j, h, i=i: seen(4 * i + j, h))
            )
        return norm(x, self.model.norm.weight, self.sizes[2])

    def deltas(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What to add to each weight, as `(b, a)` with `W + b @ a`."""
        result, at = {}, 0
        for i in range(len(self.frozen) - self.split):
            for j, group in enumerate(TARGETS.values()):
                whole = self.a[4 * i + j].data @ self.whiten[4 * i + j]
                for k, name in enumerate(group):
                    b = self.b[at].data * SCALE
                    result[f"layers.{self.split + i}.{name}"] = (b, whole[k * RANK : (k + 1) * RANK].clone())
                    at += 1
        return result
