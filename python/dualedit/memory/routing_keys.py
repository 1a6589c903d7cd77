"""The pooled routing key: linear maps of a question's states to the vector that it is looked up by."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


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

    def forward(self, last: Tensor, mean_image: Tensor | None) -> Tensor:
        """Keys [B, P] float32 of length 1 of a batch of prompts.

        Args:
            last: [B, D], states of the last prompt tokens.
            mean_image: [B, hidden_size], mean image tokens as they enter the decoder, zero or None: there are
                none.
        """
        asked = self.question(last)
        shown = torch.zeros_like(asked) if mean_image is None else self.picture(mean_image.to(last.device))
        weight = self.image_weight
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        weight = weight.float().clamp(min=0).sqrt()
        return nn.functional.normalize(torch.cat([asked, weight * shown], dim=1), dim=1)
