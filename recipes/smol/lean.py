"""The language model for training on a CPU: the function of transformers' `LlamaModel`, split at a layer.

The layers below the split are frozen and run without gradients, so what they make of a sequence can be kept.
The layers from the split up carry adapters beside their MLPs, which a gate opens only where a picture is
before:

    mlp(x) + B (s silu(w x + b) * A x)

In transformers these are further neurons of the MLP. Where no picture is, the gate is closed to the last bit
that counts, and text is answered as by the model as it came.
"""

import torch
import torch.nn.functional as F
from torch import nn

RANK = 96  # neurons of an adapter
# Layers below the split whose one further neuron marks positions behind a picture, for the layers above.
MARKING = (3, 5, 7, 9, 12, 13, 15)
START = 3  # tokens of "<|im_start|>user\n"
MARK = 5.0  # length of a mark; embeddings have 3.2


def signature(embedding) -> torch.Tensor:
    """The direction of length 1 in which token embeddings [V, D] differ least: what marks pictures."""
    centred = embedding - embedding.mean(0)
    return torch.linalg.eigh(centred.T @ centred)[1][:, 0]


def norm(x, weight, eps: float):
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def turn(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def attend(x, cos, sin, mask, w, heads: int, kv_heads: int, eps: float):
    """`x` [B, T, D] plus its attention; `cos`, `sin` [B, 1, T, H]; `mask` [B, 1, T, T]; `w` nine weights."""
    rows, length, _ = x.shape
    size = cos.shape[-1]
    h = norm(x, w[0], eps)
    q, k, v = (F.linear(h, weight) for weight in w[1:4])
    q = turn(q.view(rows, length, heads, size).transpose(1, 2), cos, sin)
    k = turn(k.view(rows, length, kv_heads, size).transpose(1, 2), cos, sin)
    v = v.view(rows, length, kv_heads, size).transpose(1, 2)
    # Grouped queries without copies of the keys: [B, kv, group T, H].
    group = heads // kv_heads
    scores = q.reshape(rows, kv_heads, group * length, size) @ k.transpose(-1, -2)
    scores = scores.view(rows, heads, length, length) * size**-0.5 + mask
    h = scores.softmax(-1).view(rows, kv_heads, group * length, length) @ v
    h = h.view(rows, heads, length, size).transpose(1, 2).reshape(rows, length, heads * size)
    return x + F.linear(h, w[4])


def feed(x, w, eps: float, gate=None, adapter=None):
    """`x` [B, T, D] plus its MLP and, behind a gate, an adapter.

    `gate`: weight [D], bias [], scale []; `adapter`: A [R, D], its bias (0 or 1) and B [D, R].
    """
    h = norm(x, w[5], eps)
    y = F.linear(F.silu(F.linear(h, w[7])) * F.linear(h, w[6]), w[8])
    if gate is not None:
        weight, bias, scale, _ = gate
        opened = (F.silu(h.float() @ weight + bias) * scale)[..., None].to(x.dtype)
        y = y + F.linear(opened * (F.linear(h, adapter[0]) + adapter[1]), adapter[2])
    return x + y


class LeanLlama(nn.Module):
    """`LlamaModel`'s frozen weights in bfloat16, gates, and adapters in float32."""

    def __init__(self, model, split: int):
        super().__init__()
        self.model, self.split, c = model, split, model.config
        self.sizes = (c.num_attention_heads, c.num_key_value_heads, c.rms_norm_eps)
        self.frozen = []
        for block in model.layers:
            s, m = block.self_attn, block.mlp
            before, behind = block.input_layernorm.weight, block.post_attention_layernorm.weight
            linears = [p.weight for p in (s.q_proj, s.k_proj, s.v_proj, s.o_proj)]
            self.frozen.append(
                [before, *linears, behind, m.up_proj.weight, m.gate_proj.weight, m.down_proj.weight]
            )
        count, width = len(self.frozen) - split, c.hidden_size
        self.a = nn.ParameterList(torch.randn(RANK, width) / width**0.5 for _ in range(count))
        self.b = nn.ParameterList(torch.zeros(width, RANK) for _ in range(count))
        # By layer: weight [D], bias [], scale [] and the start's states [D, START]; a marking layer's neuron.
        self.gates, self.marks = {}, {}

    def turns(self, x, positions):
        cos, sin = self.model.rotary_emb(x, positions)
        return cos[:, None], sin[:, None]

    def mark(self, number: int, dtype):
        """The one neuron of a marking layer, as an adapter; None for other layers."""
        if number not in self.marks:
            return None
        inner, outer = self.marks[number]
        return inner.to(dtype), 1, outer.to(dtype)

    def inner(self, at: int):
        """An adapter's A [R, D] without what would read the start's states."""
        states = self.gates[self.split + at][3]
        return self.a[at] - self.a[at] @ states @ torch.linalg.pinv(states)

    @torch.no_grad()
    def lower(self, x, mask, positions):
        """Hidden states in front of layer `split` [B, T, D] of embeddings `x` [B, T, D]."""
        cos, sin = self.turns(x, positions)
        heads, kv_heads, eps = self.sizes
        for i, w in enumerate(self.frozen[: self.split]):
            x = attend(x, cos, sin, mask, w, heads, kv_heads, eps)
            x = feed(x, w, eps, self.gates.get(i), self.mark(i, x.dtype))
        return x

    def upper(self, x, mask, positions):
        """Last hidden states [B, T, D] of what `lower` gave."""
        cos, sin = self.turns(x, positions)
        heads, kv_heads, eps = self.sizes
        for i, w in enumerate(self.frozen[self.split :]):
            x = attend(x, cos, sin, mask, w, heads, kv_heads, eps)
            adapter = (self.inner(i).to(x.dtype), 0, self.b[i].to(x.dtype))
            x = feed(x, w, eps, self.gates.get(self.split + i), adapter)
        return norm(x, self.model.norm.weight, eps)

    @torch.no_grad()
    def fit_gates(self, batches, direction) -> list[str]:
        """Set every gate in one pass through the layers, by linear discriminants and logistic regression.

        Args:
            batches: (x, mask, positions, on, off): embeddings, and which positions [B, T] are behind a
                picture and which are text without one.
            direction: the signature.

        Returns:
            lines about how well on and off are told apart.
        """
        heads, kv_heads, eps = self.sizes
        states, told = [batch[0] for batch in batches], []
        for i, w in enumerate(self.frozen):
            inputs = [[], []]
            for n, (_, mask, positions, *masks) in enumerate(batches):
                turns = self.turns(states[n], positions)
                states[n] = attend(states[n], *turns, mask, w, heads, kv_heads, eps)
                h = norm(states[n], w[5], eps).float()
                for found, where in zip(inputs, masks, strict=True):
                    found.append(h[where])
            if i in MARKING or i >= self.split:
                on, off = (torch.cat(found) for found in inputs)
                start = norm(states[0][0, :START], w[5], eps).float()
                told.append(f"layer {i}: " + self._fit_gate(i, on, off, start))
            if i in MARKING:  # 1 everywhere but at the start
                against = torch.linalg.pinv(self.gates[i][3]).sum(0, keepdim=True)
                self.marks[i] = (-against, MARK * direction[:, None])
            mark = self.mark(i, states[0].dtype)
            states = [feed(x, w, eps, self.gates[i] if mark else None, mark) for x in states]
        return told

    def _fit_gate(self, number: int, on, off, start) -> str:
        """`silu(w x + b)` is about 1 on average where it is to be open, and nothing where it is not."""
        mean = on.mean(0) - off.mean(0)
        spread = torch.cat([on - on.mean(0), off - off.mean(0)])
        spread = spread.T @ spread / len(spread)
        spread.diagonal().add_(0.005 * spread.diagonal().mean())
        weight = _separate(on, off, mean, spread)
        high, low = on @ weight, off @ weight
        steep = 60 / (high.median() - low.median())
        bias = -steep * low.max() - 14  # silu(-14) is a hundred-thousandth
        z = steep * high + bias
        # Every text begins with the same few tokens, whose states lie far from all others. No gate could tell
        # them; the adapters do not read them.
        self.gates[number] = (steep * weight, bias, 1 / F.silu(z).mean(), start.T.clone())
        return f"open {100 * (z > 0).float().mean():.2f} %, z {z.median():.1f}, lowest {z.min():.1f}"

    def neurons(self) -> dict[str, dict[str, torch.Tensor]]:
        """What to add to each layer's MLP: "gate" [R, D], "gate_bias" [R], "up" [R, D], "up_bias" [R] and
        "down" [D, R] of its further neurons."""
        result = {}
        for i, (weight, bias, scale, _) in sorted(self.gates.items()):
            if i in self.marks:
                up, down = self.marks[i][0], scale * self.marks[i][1]
                count, up_bias = 1, torch.ones(1)
            else:
                at = i - self.split
                up, down = self.inner(at).data, scale * self.b[at].data
                count, up_bias = len(up), torch.zeros(len(up))
            result[str(i)] = {
                "gate": weight.expand(count, -1).clone(), "gate_bias": bias.expand(count).clone(),
                "up": up.clone(), "up_bias": up_bias, "down": down.clone(),
            }  # fmt: skip
        return result


@torch.enable_grad()
def _separate(on, off, mean, spread, weighed: float = 8.0):
    """A direction [D] of which `on` [N, D] has more than `off` [M, D]: logistic regression from the linear
    discriminant, in which an `off` counts `weighed` times."""
    root = torch.linalg.cholesky(spread)
    on, off = (torch.linalg.solve_triangular(root, x.T, upper=False).T.contiguous() for x in (on, off))
    start = torch.linalg.solve_triangular(root, mean[:, None], upper=False)[:, 0]
    gap = (on @ start).mean() - (off @ start).mean()
    weight = (start * 8 / gap).requires_grad_()
    bias = (-((on @ weight).mean() + (off @ weight).mean()) / 2).detach().requires_grad_()
    search = torch.optim.LBFGS([weight, bias], max_iter=40, line_search_fn="strong_wolfe")

    def loss():
        search.zero_grad()
        wrong = F.softplus(-(on @ weight + bias)).mean() + weighed * F.softplus(off @ weight + bias).mean()
        total = wrong + 1e-4 * weight.square().sum()
        total.backward()
        return total

    search.step(loss)
    return torch.linalg.solve_triangular(root.T, weight.detach()[:, None], upper=True)[:, 0]
