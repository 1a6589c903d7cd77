"""What the tiny builders share: the record of an architecture, small configs, random pictures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from dualedit.models.architectures import IMAGE_MASK
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as REGISTERED

PAD, BOS, EOS = 0, 1, 2
WORDS = 100  # ids from 3 up to this stand for words
IMAGE, VIDEO, VISION_START, VISION_END, AUDIO = 150, 151, 152, 153, 154
VOCAB = 160
IMAGE_ID_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
WIDTH = 32
SPECIAL = dict(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)


@dataclass(frozen=True)
class Architecture:
    """One row of the table: how to build a model type tiny, and what an editor should find in it.

    Attributes:
        name: the row's name: the model type, with a variant behind a plus sign where it has several.
        settings: arguments of its config class.
        layers: name of the list of decoder layers.
        older: what older versions of transformers called it.
        linear: end of the name of a linear layer in decoder layer 2, for BalancEdit; None: it has none that
            sees every token.
        image: ids that stand for one picture in a prompt.
        pixels: from a generator to the tensors of one picture, to be concatenated along dimension 0.
        image_ids: ids of image and video content that the config should state.
        types: name of the tensor that marks image tokens with 1, where the model wants one.
        more: from input ids [1, P] to whatever else the model wants.
        sees: what can be edited: "both", or "text" where images are not in the sequence.
        unused: how many ids of `image` do not depend on the picture (newlines, separators); None where that
            is a matter of luck, because pictures become codes.
        base_fails: modes in which the base model itself fails, each with a piece of its error's text; the
            tester runs the base model and holds this against what happens.
    """

    name: str
    settings: Mapping[str, object]
    layers: str = "model.language_model.layers"
    older: str = ""
    linear: str | None = "layers.2.mlp.up_proj"
    image: tuple[int, ...] = (IMAGE,) * 4
    pixels: Callable[[torch.Generator], dict[str, Tensor]] | None = None
    image_ids: tuple[int, ...] = (IMAGE,)
    types: str | None = None
    more: Callable[[Tensor], dict[str, Tensor]] | None = None
    sees: str = "both"
    unused: int | None = 0
    base_fails: Mapping[str, str] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """The name that transformers knows it by."""
        return self.name.partition("+")[0]

    @property
    def stated_by(self) -> str:
        """What of its config (or its inputs) says where the picture stands."""
        if self.sees == "text":
            return "none"
        if self.more is not None and IMAGE_MASK in self.more(torch.tensor([[BOS]])):
            return f"`{IMAGE_MASK}`"
        config = self.config()
        names = [n for n in IMAGE_ID_NAMES if isinstance(getattr(config, n, None), int)]
        seen: dict[int, str] = {}
        for name in names:
            seen.setdefault(getattr(config, name), name)
        return ", ".join(f"`{name}`" for name in seen.values())

    def config(self) -> transformers.PretrainedConfig:
        """A fresh tiny config."""
        return AutoConfig.for_model(self.model_type, **copy.deepcopy(dict(self.settings)))

    def build(self, seed: int) -> nn.Module:
        """A random model in eval mode, frozen, that has run once (transformers then installs own hooks)."""
        torch.manual_seed(seed)
        if self.model_type not in REGISTERED:
            pytest.skip(f"transformers {transformers.__version__} does not know {self.model_type}")
        model = getattr(transformers, REGISTERED[self.model_type])._from_config(self.config())
        model.eval().requires_grad_(False)
        _spread(model)
        with torch.no_grad():
            model(**self.row(torch.Generator().manual_seed(seed)))
        return model

    def row(self, generator: torch.Generator, words: int = 5) -> dict[str, Tensor]:
        """One random picture and question, as a processor returns them.

        The last word is also the first: prompt lookup then has something to propose.
        """
        text = torch.randint(3, WORDS, (words,), generator=generator).tolist()
        text[-1] = text[0]
        ids = torch.tensor([[BOS, *self.image, *text]])
        return self.around(ids, self.pixels(generator))

    def around(self, ids: Tensor, pixels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs of the model for ids [B, P] and pictures."""
        inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long(), **pixels}
        if self.types:
            inputs[self.types] = torch.isin(ids, torch.tensor(self.image_ids or (IMAGE,))).long()
        return inputs | (self.more(ids) if self.more else {})


def batch(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of one length, one below the other."""
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _spread(model: nn.Module) -> None:
    """Larger weights than the usual start: different inputs give clearly different states and answers."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1.2 / module.in_features**0.5)
            elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.normal_(module.weight, std=1.2 / module.weight[0].numel() ** 0.5)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():  # projections of pictures that start at zero
                nn.init.normal_(parameter, std=1.0 / parameter.shape[0] ** 0.5)


# ---------------------------------------------------------------------- configs


def text(model_type: str | None, **more: object) -> dict[str, object]:
    """A tiny language model of the Llama kind."""
    named = {} if model_type is None else {"model_type": model_type}
    return named | dict(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=False, **SPECIAL,
    ) | more  # fmt: skip


def opt() -> dict[str, object]:
    """A tiny OPT."""
    return dict(
        model_type="opt", vocab_size=VOCAB, hidden_size=WIDTH, ffn_dim=48, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=WIDTH, dropout=0.0, **SPECIAL,
    )  # fmt: skip


def vit(model_type: str | None, **more: object) -> dict[str, object]:
    """A tiny vision transformer: 16 x 16 pixels in four patches."""
    named = {} if model_type is None else {"model_type": model_type}
    return named | dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16,
        patch_size=8,
    ) | more  # fmt: skip


def qformer(model_type: str, **more: object) -> dict[str, object]:
    """A tiny Q-Former on `vit`."""
    return dict(
        model_type=model_type, vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, encoder_hidden_size=16, max_position_embeddings=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ) | more  # fmt: skip


def mrope(sections: tuple[int, ...] = (1, 1, 2), **more: object) -> dict[str, object]:
    """Rotary positions in time, height and width, for heads of width 8."""
    return {"rope_type": "default", "mrope_section": list(sections), "rope_theta": 10000.0, **more}


# ---------------------------------------------------------------------- pictures


def picture(size: int = 16, images: tuple[int, ...] = (1,), name: str = "pixel_values", **fixed: object):
    """Pictures [*images, 3, size, size], with constant tensors beside them."""

    def pixels(generator: torch.Generator) -> dict[str, Tensor]:
        constant = {key: torch.as_tensor(value) for key, value in fixed.items()}
        return {name: torch.randn(*images, 3, size, size, generator=generator), **constant}

    return pixels


def patches(width: int, rows: int = 4, columns: int = 4, **fixed: object):
    """A picture as rows x columns flat patches of `width` numbers, and its grid."""

    def pixels(generator: torch.Generator) -> dict[str, Tensor]:
        constant = {key: torch.as_tensor(value) for key, value in fixed.items()}
        return {
            "pixel_values": torch.randn(rows * columns, width, generator=generator),
            "image_grid_thw": torch.tensor([[1, rows, columns]]),
            **constant,
        }

    return pixels
