"""Step 2: a visual vocabulary turns what the tower sees into the names' own embeddings.

One neuron for each thing that training sees, and behind it the thing's name as the language model would read
it. The neurons start at the tower's classifier and the names at their embeddings, both in closed form. Then
all of it learns that tokens are like the embedding of their thing's name: what the language model is given is
nearly text, and it can read text.

    python recipes/smol/vocabulary.py --minutes 4
"""

import argparse
import time

import torch
import torch.nn.functional as F
from common import WORK, Pictures, load_parts, name_embeddings, save
from dualedit.smol.model import FEATURES, VOCABULARY, WIDTH, WORDS
from lite import Lite
from torch import nn
from tower import views

GRID = 4  # image tokens of a side
OWN = 0.25  # share of a token's own place in it; the rest is the mean of the grid
OPEN, STEEP = 0.3, 12.0  # cosine with a thing's classifier from which its neuron opens, and how steeply
GELU = 8.0  # where GELU is the identity


class Vocabulary(nn.Module):
    """Features [..., 16, 1280] of a grid to image tokens [..., 16, 576]."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(1280, FEATURES)
        self.words = nn.Linear(FEATURES, WORDS)
        self.names = nn.Linear(WORDS, WIDTH)
        self.register_buffer("centre", torch.zeros(WIDTH))

    def forward(self, features):
        mixed = OWN * features + (1 - OWN) * features.mean(-2, keepdim=True)
        return self.names(F.relu6(self.words(self.inner(mixed)))) + self.centre

    @torch.no_grad()
    def start(self, classes, mean, length, names, centre):
        """Set all weights in closed form.

        Args:
            classes: directions [C, 1280] of length 1 of the tower's classifier.
            mean: of features [1280].
            length: of features less their mean, on average.
            names: [C, 576], less `centre`.
            centre: [576] of the embeddings of names.
        """
        count = len(classes)
        _, _, axes = torch.linalg.svd(classes)
        axes = axes[:FEATURES]
        self.inner.weight.copy_(axes)
        self.inner.bias.copy_(-axes @ mean)
        self.words.weight.zero_()
        self.words.bias.fill_(-1.0)  # neurons that no thing has
        self.words.weight[:count] = STEEP * (classes @ axes.T) / length
        self.words.bias[:count] = -STEEP * OPEN
        self.names.weight.zero_()
        self.names.weight[:, :count] = names.T / (STEEP * (0.5 - OPEN))
        self.names.bias.zero_()
        self.centre.copy_(centre)

    def parts(self, mark, eps: float = 1e-3) -> dict[str, torch.Tensor]:
        """The weights under the names that transformers' modules give them: the tower's eighth and ninth
        stage, its last convolution, and the projector. `mark` [576] is added to every token.

        Behind the ninth stage nothing changes any more: the last convolution holds a token's positive and
        negative parts, and the projector puts them together again, in a range where GELU is the identity.
        """
        stage, last = (f"tower.{name}" for name in VOCABULARY)
        still = (1 + eps) ** 0.5  # a batch norm's weight with which it changes nothing
        look = torch.full((1280, 1, 7, 7), (1 - OWN) / GRID**2)
        look[:, :, 3, 3] += OWN
        plus = torch.zeros(1280, WIDTH, 1, 1)
        join = torch.zeros(WIDTH, 1280)
        for half, sign in ((0, 1.0), (WIDTH, -1.0)):
            i = torch.arange(WIDTH)
            plus[half + i, i] = sign
            join[i, half + i] = sign
        one, zero = torch.full, torch.zeros
        return {
            f"{stage}.depthwise_conv.depthwise_conv.weight": look,
            f"{stage}.depthwise_conv.depthwise_norm.weight": one((1280,), still),
            f"{stage}.depthwise_conv.depthwise_norm.bias": zero(1280),
            f"{stage}.projection.project_conv.weight": self.inner.weight[..., None, None],
            f"{stage}.projection.project_bn.weight": one((FEATURES,), still),
            f"{stage}.projection.project_bn.bias": self.inner.bias,
            f"{last}.expansion.expand_conv.weight": self.words.weight[..., None, None],
            f"{last}.expansion.expand_bn.weight": one((WORDS,), still),
            f"{last}.expansion.expand_bn.bias": self.words.bias,
            f"{last}.depthwise_conv.depthwise_conv.weight": one((WORDS, 1, 1, 1), 1.0),
            f"{last}.depthwise_conv.depthwise_norm.weight": one((WORDS,), still),
            f"{last}.depthwise_conv.depthwise_norm.bias": zero(WORDS),
            f"{last}.projection.project_conv.weight": self.names.weight[..., None, None],
            f"{last}.projection.project_bn.weight": one((WIDTH,), still),
            f"{last}.projection.project_bn.bias": self.names.bias,
            "tower.encoder.top_conv.weight": plus,
            "tower.encoder.top_bn.weight": one((1280,), still),
            "tower.encoder.top_bn.bias": zero(1280),
            "projector.linear_1.weight": join,
            "projector.linear_1.bias": one((WIDTH,), GELU),
            "projector.linear_2.weight": torch.eye(WIDTH),
            "projector.linear_2.bias": self.centre + mark - GELU,
        }


def draw(features, index):
    """Features of random views of pictures, mixed a little with another picture's, with noise.

    Args:
        features: [V, N, 16, 1280].
        index: [B].

    Returns:
        [B, 16, 1280] and, of each, the share of the other picture [B] and which it is [B].
    """
    view = torch.randint(len(features), (len(index),))
    x = features[view, index].float()
    place = torch.randint(features.shape[1], (len(index),))
    other = features[torch.randint(len(features), (len(index),)), place].float()
    share = 0.45 * torch.rand(len(index)) * (torch.rand(len(index)) < 0.6)
    mixed = x + share[:, None, None] * (other - x) + 0.1 * torch.randn_like(x)
    return mixed, share, place


def main(minutes: float, batch: int, rate: float, seed: int):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, tokenizer, embedding, folder = load_parts()
    data = Pictures(folder)
    saved = torch.load(WORK / "tower.pt", weights_only=True)
    model.load_state_dict(saved["tower"], strict=False)
    seen = torch.tensor([c.seen for c in data.concepts])
    length = embedding.norm(dim=1).mean()
    centre = embedding.mean(0)
    names = name_embeddings(data.concepts, tokenizer, embedding)
    train, valid = data.of("training"), data.of("validation")
    y = data.concept
    features = views(data, model, 3)
    tower = Lite(model)
    with torch.inference_mode():
        known = torch.cat(
            [tower(data.pixels[i].float() / 127.5 - 1).flatten(2).transpose(1, 2) for i in valid.split(64)]
        ).clone()
    vocabulary = Vocabulary()
    pooled = known.mean(1)
    spread = (pooled - saved["mean"]).norm(dim=1).mean()
    classes = F.normalize(saved["head"]["weight"], dim=1)[seen]
    vocabulary.start(classes, saved["mean"], spread, length * names[seen], centre)

    def report():
        with torch.inference_mode():
            z = vocabulary(known) - centre
            own = F.cosine_similarity(z, names[y[valid]][:, None], dim=-1).mean()
            hit = (F.normalize(z.mean(1), dim=1) @ names.T).argmax(1) == y[valid]
        families = {"flags": data.flag, "things": ~(data.flag | data.logo), "logos": data.logo}
        text = " ".join(f"{k} {100 * hit[f[valid]].float().mean():.1f}" for k, f in families.items())
        size = z.norm(dim=-1).mean()
        return f"validation artists: nearest name {text}; cosine to the own {own:.3f}; length {size:.2f}"

    print("closed form:", report(), flush=True)
    optimiser = torch.optim.AdamW(vocabulary.parameters(), lr=rate, weight_decay=1e-3)
    total, begin, step = minutes * 60, time.process_time(), 0
    while (done := time.process_time() - begin) < total:
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 - 0.97 * done / total)
        index = torch.randint(len(train), (batch,))
        x, share, other = draw(features, index)
        z = vocabulary(x)[:, torch.randperm(GRID**2)[:4]] - centre
        label = y[train[index]]
        # Where two pictures are mixed, the token shall be like both, as far as each is in it.
        aim = names[label] + share[:, None] / (1 - share[:, None]) * names[y[train[other]]]
        alike = F.cosine_similarity(z, aim[:, None], dim=-1).mean()
        cosine = F.normalize(z, dim=-1).flatten(0, 1) @ names.T
        told = F.cross_entropy(20 * cosine, label.repeat_interleave(4))
        size = ((z.norm(dim=-1) / length - 1) ** 2).mean()
        loss = 1 - alike + 0.2 * told + 0.5 * size
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        step += 1
        if step % 100 == 0:
            print(f"step {step} {done:.0f} s alike {alike:.3f} told {told:.3f}", report(), flush=True)
    print("end", report(), flush=True)
    save(WORK / "vocabulary.pt", vocabulary=vocabulary.state_dict())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=4, help="of CPU")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    main(given.minutes, given.batch, given.rate, given.seed)
