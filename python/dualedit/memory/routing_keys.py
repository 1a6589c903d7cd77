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


class Discriminant(nn.Module):
    """Vectors at length 1, moved by their mean, through a linear map, at length 1 again; zero stays zero.

    Args:
        width: D of what goes in.
        out: P of what comes out.
    """

    def __init__(self, width: int, out: int):
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(width))
        self.map = nn.Parameter(torch.randn(out, width) * out**-0.5)

    def forward(self, states: Tensor) -> Tensor:
        """[B, P] float32 of states [B, D]."""
        unit = nn.functional.normalize(states.float(), dim=-1)
        # Outside a forward FSDP2 leaves parameters in pieces.
        whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in (self.centre, self.map))
        centre, directions = whole
        centred = (unit - centre.float()) * (unit != 0).any(-1, keepdim=True)
        return nn.functional.normalize(centred @ directions.float().T, dim=-1)


class PooledKey(nn.Module):
    """Unit keys from the last prompt token and the mean image token, each through a linear map of its own.

    key = normalise([normalise(M_l (l - c_l)), w normalise(M_i (i - c_i))]) with l the last token's state at
    the gate's layer (BalancEdit: as it enters the edited linear layer) and i the mean image token as it
    enters the decoder, both at length 1, and c their means over training facts; without an image the second
    half is zero. The cosine of two keys is then that of the questions and w^2 times that of the pictures,
    weighed: both have to match. `training.fit_pooled_key` sets the centres and maps in closed form (linear
    discriminant analysis): what pictures and wordings of one fact differ in counts little, what facts differ
    in counts much. Unfitted, the maps are random and nearly keep cosines.

    Not in the papers. Layer by layer, image tokens mix with what the model makes of them; where they enter,
    they tell look-alikes best apart. What is asked only the last token knows.

    Args:
        hidden_size: width D of the residual stream, and so of image tokens.
        key_dim: width P of a key, an even number; half of it for each of the two.
        image_weight: w^2.
        state_size: width of the last token's state, where that is not the residual stream's.

    Raises:
        ValueError: half of key_dim is more than one of the widths.
    """

    def __init__(
        self, hidden_size: int, key_dim: int, image_weight: float = 1.0, state_size: int | None = None
    ):
        super().__init__()
        half, state_size = key_dim // 2, state_size or hidden_size
        if half > min(hidden_size, state_size):
            raise ValueError(
                f"key_dim={key_dim}: half of a pooled key maps {min(hidden_size, state_size)} features. "
                f"Pass at most {2 * min(hidden_size, state_size)}."
            )
        self.question = Discriminant(state_size, half)
        self.picture = Discriminant(hidden_size, half)
        self.image_weight = nn.Parameter(torch.tensor(float(image_weight)))

    def forward(self, last: Tensor, pictured: Tensor | None) -> Tensor:
        """Keys [B, P] float32 of length 1 of a batch of prompts.

        Args:
            last: [B, D], states of the last prompt tokens.
            pictured: [B, hidden_size], mean image tokens as they enter the decoder, zero or None: there are
                none.
        """
        asked = self.question(last)
        shown = torch.zeros_like(asked) if pictured is None else self.picture(pictured.to(last.device))
        weight = self.image_weight
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        weight = weight.float().clamp(min=0).sqrt()
        return nn.functional.normalize(torch.cat([asked, weight * shown], dim=1), dim=1)
