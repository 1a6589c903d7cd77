"""Step 4: adapters in the upper layers learn to answer from image tokens.

Each sequence is one picture and several questions about it; a block mask keeps the questions from seeing
each other. The loss is cross-entropy at answer positions. Gates keep the adapters from texts without a
picture (`lean.py`); they are fitted in closed form to pictures and to texts of the model as it came
(`replay.py`). What the frozen lower layers make of a batch is kept and used again.

    python recipes/smol/reader.py --minutes 64
"""

import argparse
import math
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from common import WORK, Pictures, language_model, load_parts, name_embeddings, save
from dualedit.smol.wordings import KINDS
from lean import LeanLlama, signature
from lite import Lite
from questions import ABOUT_PICTURES
from sequences import BF, TOKENS, Packer
from torch import nn
from tower import views
from vocabulary import Vocabulary, draw

SPLIT = 16  # layers at the bottom that stay
SHOWN = 8  # image tokens of a sequence in training, drawn at random, at their own positions
SIGN = 4.0  # length of the signature that the projector adds to every image token
MADE, BLUR = 0.5, 1.5  # share of sequences whose tokens are made of a name, and how far they are off at most
GATE_PICTURES, GATE_TEXTS = 256, 512  # sequences that the gates are fitted to
PICTURES = 24  # in a step
AGAIN = 0.5  # share of steps that take a batch which the lower layers have seen
KEPT, SAVED = 40, 300  # batches before any is taken again; seconds between checkpoints


def questions_of(concept) -> dict[str, str]:
    """The keys of `ABOUT_PICTURES` that fit a concept, and the answers."""
    if concept.family == "logos":
        return {"brand": concept.facts["name"]}
    if concept.family == "flags":
        return dict(concept.facts)
    return {"name": concept.facts["name"], "kind": KINDS.get(concept.subgroup, "object")}


class Source:
    """Pictures of the training role as sequences with image tokens, and those of validation artists."""

    def __init__(self, model, seed: int):
        self.rng = random.Random(seed)
        stock, tokenizer, embedding, folder = load_parts()
        data = Pictures(folder)
        self.concepts, self.packer = data.concepts, Packer(model, tokenizer)
        self.mark = SIGN * signature(embedding)
        length = embedding.norm(dim=1).mean()
        self.exact = length * name_embeddings(self.concepts, tokenizer, embedding) + embedding.mean(0)
        stock.load_state_dict(torch.load(WORK / "tower.pt", weights_only=True)["tower"], strict=False)
        self.vocabulary = Vocabulary().requires_grad_(False)
        self.vocabulary.load_state_dict(torch.load(WORK / "vocabulary.pt", weights_only=True)["vocabulary"])
        self.features = views(data, stock, 3)
        self.labels = data.concept[data.of("training")]
        self.by_concept = {}
        for i, c in enumerate(self.labels.tolist()):
            self.by_concept.setdefault(c, []).append(i)
        # A flag carries five facts: asked as often as its facts are worth, logos half as often as things.
        weight = {"flags": 1.6, "logos": 0.5}
        self.weights = [weight.get(self.concepts[c].family, 1.0) for c in self.by_concept]
        valid = data.of("validation")
        self.valid = random.Random(1).sample(data.concept[valid].tolist(), 192)
        chosen = valid[random.Random(1).sample(range(len(valid)), 192)]
        with torch.inference_mode():
            grid = Lite(stock)(data.pixels[chosen].float() / 127.5 - 1)
            self.valid_tokens = self.vocabulary(grid.flatten(2).transpose(1, 2)) + self.mark

    def pictured(self, count: int):
        """Sequences about pictures drawn at random, and their image tokens [count, SHOWN, 576]."""
        index, sequences = [], []
        shown = sorted(self.rng.sample(range(TOKENS), SHOWN))
        for c in self.rng.choices(list(self.by_concept), self.weights, k=count):
            asked = list(questions_of(self.concepts[c]).items())
            if self.concepts[c].family not in ("flags", "logos") and self.rng.random() < 0.6:
                asked = [asked[0]]  # the name more often than the kind
            self.rng.shuffle(asked)
            pairs = [(self.rng.choice(ABOUT_PICTURES[k][:-1]), a) for k, a in asked[:4]]
            index.append(self.rng.choice(self.by_concept[c]))
            sequences.append(self.packer.sequence(pairs, shown))
        index = torch.tensor(index)
        tokens = self.vocabulary(draw(self.features, index)[0])[:, shown]
        return sequences, self._made(tokens, self.labels[index]) + self.mark

    def _made(self, tokens, label):
        """Image tokens [B, T, 576], some of them replaced: a name's own embedding, off by as much as other
        pictures of the batch are off theirs and by a part of another name. The tower knows its training
        pictures by heart; new ones are less certain."""
        exact = self.exact[label][:, None]
        off = (tokens - exact)[torch.randperm(len(tokens))] * BLUR * torch.rand(len(tokens), 1, 1)
        towards = 0.4 * torch.rand(len(tokens), 1, 1) * (exact[torch.randperm(len(tokens))] - exact)
        return torch.where(torch.rand(len(tokens), 1, 1) < MADE, exact + off + towards, tokens)

    def batch(self):
        """(embeddings, mask, positions, places, labels) of a new batch."""
        return self.packer.batch(*self.pictured(PICTURES))

    def gate_batches(self):
        """Batches for `fit_gates`: which positions are behind a picture, and which are text without one."""
        start = len(self.packer.before)
        for _ in range(0, GATE_PICTURES, 32):
            sequences, tokens = self.pictured(32)
            x, mask, positions, _, _ = self.packer.batch(sequences, tokens)
            yield x, mask, positions, _from(start, sequences, x), torch.zeros(x.shape[:2], dtype=torch.bool)
        replay = torch.load(WORK / "replay.pt", weights_only=True)["ids"]
        order = sorted(self.rng.sample(range(len(replay)), GATE_TEXTS), key=lambda i: len(replay[i]))
        for first in range(0, GATE_TEXTS, 32):
            rows = [replay[i] for i in order[first : first + 32]]
            sequences = [(row, list(range(len(row))), [1] * len(row), []) for row in rows]
            x, mask, positions, _, _ = self.packer.batch(sequences, ())
            yield x, mask, positions, torch.zeros(x.shape[:2], dtype=torch.bool), _from(start, sequences, x)

    @torch.inference_mode()
    def evaluate(self, lean) -> str:
        """Share of answers right token by token after the right tokens before, validation artists."""
        right = {}
        for start in range(0, len(self.valid), 16):
            sequences, keys = [], []
            for b, c in enumerate(self.valid[start : start + 16]):
                asked = questions_of(self.concepts[c])
                sequences.append(
                    self.packer.sequence([(ABOUT_PICTURES[k][0], a) for k, a in asked.items()])
                )
                keys += [(b, k) for k, a in asked.items() for _ in self.packer.ids(a + "<|im_end|>")]
            x, mask, positions, places, labels = self.packer.batch(
                sequences, self.valid_tokens[start : start + 16]
            )
            h = lean.upper(lean.lower(x, mask, positions), mask, positions)[places[:, 0], places[:, 1]]
            whole = {}
            hits = (F.linear(h, self.packer.embed).argmax(-1) == labels).tolist()
            for key, hit in zip(keys, hits, strict=True):
                whole[key] = whole.get(key, True) and hit
            for (_, k), hit in whole.items():
                right.setdefault(k, []).append(hit)
        return " ".join(f"{k} {100 * np.mean(v):.0f}" for k, v in sorted(right.items()))


def _from(start: int, sequences, x):
    """Which positions [B, T] are those of a sequence from `start` on."""
    place = torch.arange(x.shape[1])
    lengths = torch.tensor([len(tokens) for tokens, *_ in sequences])
    return (place >= start) & (place < lengths[:, None])


def fit_gates(lean, source) -> None:
    """The gates in closed form, once."""
    fitted = WORK / "gates.pt"
    if fitted.exists():
        saved = torch.load(fitted, weights_only=True)
        lean.gates, lean.marks = saved["gates"], saved["marks"]
        return
    with torch.no_grad():
        for line in lean.fit_gates(list(source.gate_batches()), source.mark / SIGN):
            print(line, flush=True)
    save(fitted, gates=lean.gates, marks=lean.marks)


def main(minutes: float, rate: float, seed: int):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = language_model(BF)
    model.requires_grad_(False)
    source, lean = Source(model, seed), LeanLlama(model.model, SPLIT)
    adapters = [*lean.a, *lean.b]
    print(f"adapters of {sum(p.numel() for p in adapters) / 1e6:.2f} M parameters", flush=True)
    optimiser = torch.optim.AdamW(adapters, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    state = {"seconds": 0.0, "step": 0, "tokens": 0}
    checkpoint = WORK / "reader.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        with torch.no_grad():
            for p, value in zip(adapters, saved["adapters"], strict=True):
                p.copy_(value)
        optimiser.load_state_dict(saved["optimiser"])
        state = saved["state"]
    fit_gates(lean, source)
    if state["step"]:
        print("validation artists:", source.evaluate(lean), flush=True)
    total, last, losses, batches = minutes * 60, time.process_time(), [], []
    next_report = state["seconds"] + SAVED
    while state["seconds"] < total:
        share = state["seconds"] / total
        warm = min(1, (state["step"] + 1) / 30)
        for group in optimiser.param_groups:
            group["lr"] = rate * warm * (0.04 + 0.96 * 0.5 * (1 + math.cos(math.pi * share)))
        if len(batches) < KEPT or source.rng.random() >= AGAIN:
            x, mask, positions, places, labels = source.batch()
            batches.append((lean.lower(x, mask, positions), mask, positions, places, labels))
            batch = batches[-1]
        else:
            batch = source.rng.choice(batches)
        losses.append(step(lean, source.packer.embed, optimiser, adapters, *batch))
        now = time.process_time()
        state["seconds"] += now - last
        last = now
        state["step"] += 1
        state["tokens"] += batch[0].shape[0] * batch[0].shape[1]
        if state["step"] % 10 == 0:
            speed = state["tokens"] / state["seconds"]
            print(
                f"step {state['step']} {state['seconds']:.0f} s loss {np.mean(losses[-10:]):.3f} "
                f"{speed:.0f} tokens/s",
                flush=True,
            )
        if state["seconds"] > next_report or state["seconds"] >= total:
            save(
                checkpoint,
                adapters=[p.data for p in adapters],
                neurons=lean.neurons(),
                optimiser=optimiser.state_dict(),
                state=state,
            )
            print("validation artists:", source.evaluate(lean), flush=True)
            next_report += SAVED
    print("end", state, flush=True)


def step(lean, embed, optimiser, adapters, x, mask, positions, places, labels) -> float:
    """One step of the optimiser; the loss before it."""
    h = lean.upper(x, mask, positions)
    loss = F.cross_entropy(F.linear(h[places[:, 0], places[:, 1]], embed).float(), labels)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(adapters, 1.0)
    optimiser.step()
    return loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=64, help="of CPU")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    main(given.minutes, given.rate, given.seed)
