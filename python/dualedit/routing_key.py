"""Routing keys beside the plain one: heads that make of a question's states the vector it is looked up by."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class RoutingKey(nn.Module):
    """Unit keys from the last prompt token, and from the image and question tokens that it attends to.

    With x = LN(h), the last token's query pools the image tokens and, separately, the question tokens
    (multi-head softmax attention); key = normalise(W_s x_last + MLP([x_last, image pool, question pool])).
    The MLP's last layer starts at zero, so that an untrained head is a random projection of the plain
    last-token key, whose cosines it nearly keeps (Johnson-Lindenstrauss).

    Not in the papers, whose key is the last token's state alone (DualEdit, COLM 2025, Sec. 4.2): look-alike
    images hardly move that state, and what moves it is mixed with everything else that the token carries.

    Args:
        hidden_size: width D of the residual stream.
        key_dim: width P of a key.
        num_heads: heads of the two poolings; divides P.
        eps: of the LayerNorm.
    """

    def __init__(self, hidden_size: int, key_dim: int, num_heads: int = 4, eps: float = 1e-5):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        self.skip = nn.Linear(hidden_size, key_dim, bias=False)
        self.query = nn.Linear(hidden_size, 2 * key_dim)
        self.key = nn.Linear(hidden_size, key_dim)
        self.value = nn.Linear(hidden_size, key_dim)
        self.mix = nn.Linear(hidden_size + 2 * key_dim, 2 * key_dim)
        self.out = nn.Linear(2 * key_dim, key_dim)
        nn.init.normal_(self.skip.weight, std=key_dim**-0.5)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def _heads(self, states: Tensor) -> Tensor:
        """[B, L, P] as [B, heads, L, P / heads]."""
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _pool(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """What the query [B, P] finds where mask [B, L] is True, [B, P]; zero where nothing is."""
        some = mask.any(1, keepdim=True)
        found = nn.functional.scaled_dot_product_attention(
            self._heads(query[:, None]),
            self._heads(key),
            self._heads(value),
            attn_mask=(mask | ~some)[:, None, None],  # a softmax over nothing would be NaN
        )
        return found.transpose(1, 2).flatten(1) * some

    def forward(self, hidden: Tensor, text: Tensor, image: Tensor | None, last: Tensor) -> Tensor:
        """Keys of a batch of prompts.

        Args:
            hidden: [B, L, D] states.
            text, image: [B, L] bool, question and image tokens; image None where there are none.
            last: [B] int64, column of the last prompt token.

        Returns:
            [B, P] float32, of length 1.
        """
        place = hidden.device
        text, last = text.to(place), last.to(place)
        image = torch.zeros_like(text) if image is None else image.to(place)
        used = text | image
        # Padding may hold anything, NaN too, and zero weight times NaN is NaN.
        states = hidden.to(self.norm.weight.dtype).masked_fill(~used[:, :, None], 0.0)
        states = self.norm(states)
        end = states[torch.arange(len(last), device=place), last]
        key, value = self.key(states), self.value(states)
        look, read = self.query(end).chunk(2, dim=-1)
        pools = [self._pool(look, key, value, image), self._pool(read, key, value, text)]
        mixed = nn.functional.gelu(self.mix(torch.cat([end, *pools], dim=-1)))
        return nn.functional.normalize((self.skip(end) + self.out(mixed)).float(), dim=-1)


class PooledKey(nn.Module):
    """Unit keys from the last prompt token and the mean image token, each through a linear map of its own.

    key = normalise([normalise(M_l (l - c_l)), w normalise(M_i (i - c_i))]) with l the last token's state at
    the gate's layer and i the mean image token as it enters the decoder, both at length 1, and c their means
    over training facts; without an image the second half is zero. The cosine of two keys is then that of the
    questions and w^2 times that of the pictures, weighed: both have to match. `training.fit_pooled_key` sets
    the centres and maps in closed form (linear discriminant analysis): what pictures and wordings of one fact
    differ in counts little, what facts differ in counts much. Unfitted, the maps are random and nearly keep
    cosines.

    Not in the papers. Layer by layer, image tokens mix with what the model makes of them; where they enter,
    they tell look-alikes best apart. What is asked only the last token knows.

    Args:
        hidden_size: width D of the residual stream.
        key_dim: width P of a key, an even number of at most 2 D; half of it for each of the two.
        image_weight: w^2.

    Raises:
        ValueError: key_dim above 2 D.
    """

    def __init__(self, hidden_size: int, key_dim: int, image_weight: float = 1.0):
        super().__init__()
        half = key_dim // 2
        if half > hidden_size:
            raise ValueError(
                f"key_dim={key_dim}: half of a pooled key is a map of the residual stream's {hidden_size} "
                f"features. Pass at most {2 * hidden_size}."
            )
        self.centre = nn.Parameter(torch.zeros(2, hidden_size))
        self.maps = nn.Parameter(torch.randn(2, half, hidden_size) * half**-0.5)
        self.image_weight = nn.Parameter(torch.tensor(float(image_weight)))

    def forward(self, last: Tensor, pictured: Tensor | None) -> Tensor:
        """Keys [B, P] float32 of length 1 of a batch of prompts.

        Args:
            last: [B, D], states of the last prompt tokens.
            pictured: [B, D], mean image tokens as they enter the decoder, zero or None: there are none.
        """
        halves = self.halves(pooled_parts(last, pictured))
        weight = self.image_weight
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        weight = weight.float().clamp(min=0).sqrt()
        return nn.functional.normalize(torch.cat([halves[:, 0], weight * halves[:, 1]], dim=1), dim=1)

    def halves(self, parts: Tensor) -> Tensor:
        """Both mapped [B, 2, P / 2] from `pooled_parts` [B, 2, D], of length 1; zero where there is none."""
        some = (parts != 0).any(-1, keepdim=True)
        # Outside a forward FSDP2 leaves parameters in pieces.
        centre, maps = (p.full_tensor() if isinstance(p, DTensor) else p for p in (self.centre, self.maps))
        centred = (parts - centre.to(parts.dtype)) * some
        mapped = torch.einsum("bsd,spd->bsp", centred, maps.to(parts.dtype))
        return nn.functional.normalize(mapped, dim=-1)


def pooled_parts(last: Tensor, pictured: Tensor | None) -> Tensor:
    """States of last tokens [B, D] and mean image tokens [B, D], each of length 1: [B, 2, D] float32."""
    last = last.float()
    seen = torch.zeros_like(last) if pictured is None else pictured.to(last)
    return nn.functional.normalize(torch.stack([last, seen], dim=1), dim=-1)
