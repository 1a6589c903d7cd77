"""Step 3: the projector learns to point at names, then adapters in the upper layers learn to answer.

Each sequence is one picture and several questions about it; a block mask keeps the questions from seeing
each other. Features are those of augmented pictures, mixed a little with another picture's. The loss is
cross-entropy at answer positions. Gates keep the adapters from texts without a picture (`lean.py`); they are
fitted in closed form to pictures and to texts of the model as it came (`replay.py`). What the frozen lower
layers make of a batch is kept and used again.

    python recipes/smol/reader.py --minutes 30
"""

import argparse
import math
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from common import SIDE, WORK, Pictures, augment, language_model, load_parts, name_embeddings, save
from dualedit.smol.wordings import KINDS
from lean import LeanLlama, signature
from lite import Lite
from questions import ABOUT_PICTURES
from torch import nn
from tower import Projector, start_projector

BF = torch.bfloat16
SPLIT = 16  # layers at the bottom that stay
TOKENS = (SIDE // 32) ** 2
SHOWN = 8  # image tokens of a sequence in training, drawn at random, at their own positions


SIGN = 4.0  # length of the signature that the projector adds to every image token
BLURRED, BLUR = 0.65, 0.8  # share of sequences whose tokens are a name's, and how far they are off
GATE_PICTURES, GATE_TEXTS = 256, 512  # sequences that the gates are fitted to


def questions_of(concept) -> dict[str, str]:
    """The keys of `ABOUT_PICTURES` that fit a concept, and the answers."""
    if concept.family == "logos":
        return {"brand": concept.facts["name"]}
    if concept.family == "flags":
        return dict(concept.facts)
    return {"name": concept.facts["name"], "kind": KINDS.get(concept.subgroup, "object")}


def views(data, model, count: int) -> torch.Tensor:
    """Features of `count` views of every training picture, fp16 [count, N, 16, 1280]; the first is clean."""
    file = WORK / "views.npy"
    train = data.of("training")
    if file.exists() and len(np.load(file, mmap_mode="r")) >= count:
        return torch.from_numpy(np.load(file, mmap_mode="c"))
    tower, keep = Lite(model), data.flag | data.logo
    out = np.lib.format.open_memmap(
        WORK / "views.part.npy", "w+", np.float16, (count, len(train), TOKENS, 1280)
    )
    with torch.inference_mode():
        for v in range(count):
            for start in range(0, len(train), 128):
                i = train[start : start + 128]
                x = data.pixels[i].float() / 127.5 - 1 if v == 0 else augment(data.pixels[i], keep[i])
                with torch.autocast("cpu", dtype=BF):
                    grid = tower(x)
                out[v, start : start + 128] = grid.float().flatten(2).transpose(1, 2).half().numpy()
            print(f"view {v}", flush=True)
    out.flush()
    (WORK / "views.part.npy").replace(file)
    return torch.from_numpy(np.load(file, mmap_mode="c"))


class Packer:
    """Sequences of one picture (or none) and questions that do not see each other."""

    def __init__(self, model, tokenizer):
        self.embed = model.model.embed_tokens.weight
        self.tokenizer, self.cache = tokenizer, {}
        self.before = self.ids("<|im_start|>user\n")
        self.after = self.ids("\n")

    def ids(self, text):
        if text not in self.cache:
            self.cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.cache[text]

    def sequence(self, pairs, shown=range(TOKENS)):
        """(tokens, positions, segments, [(place, label)]) of a picture's questions and answers."""
        start, first = len(self.before), len(self.before) + TOKENS + len(self.after)
        tokens = self.before + [0] * len(shown) + self.after
        positions = [*range(start), *(start + t for t in shown), *range(start + TOKENS, first)]
        segments, labels = [0] * len(tokens), []
        for k, (question, answer) in enumerate(pairs):
            q = self.ids(question + "<|im_end|>\n<|im_start|>assistant\n")
            a = self.ids(answer + "<|im_end|>")
            at = len(tokens) + len(q) - 1
            labels += [(at + j, t) for j, t in enumerate(a)]
            tokens = tokens + q + a[:-1]
            positions += range(first, first + len(q) + len(a) - 1)
            segments += [k + 1] * (len(q) + len(a) - 1)
        return tokens, positions, segments, labels

    def batch(self, sequences, pictures):
        """Embeddings [B, T, D], mask [B, 1, T, T], positions [B, T], places [K, 2], labels [K].

        `sequences`: as `sequence` makes them, the first `len(pictures)` with a picture; `pictures` [P,
        shown, D].
        """
        width, rows = max(len(s[0]) for s in sequences), len(sequences)
        ids = torch.zeros(rows, width, dtype=torch.long)
        positions = torch.zeros(rows, width, dtype=torch.long)
        segments = torch.full((rows, width), -1)
        places, labels = [], []
        for b, (tokens, position, segment, label) in enumerate(sequences):
            n = len(tokens)
            ids[b, :n], positions[b, :n] = torch.tensor(tokens), torch.tensor(position)
            segments[b, :n] = torch.tensor(segment)
            places += [(b, t) for t, _ in label]
            labels += [t for _, t in label]
        seen = torch.ones(width, width, dtype=torch.bool).tril()[None]
        seen = seen & ((segments[:, None] == 0) | (segments[:, None] == segments[:, :, None]))
        mask = torch.zeros(rows, 1, width, width, dtype=BF).masked_fill_(~seen[:, None], torch.finfo(BF).min)
        x = F.embedding(ids, self.embed)
        if len(pictures):
            start = len(self.before)
            x = x.clone()
            x[: len(pictures), start : start + pictures.shape[1]] = pictures.to(BF)
        return x, mask, positions, torch.tensor(places), torch.tensor(labels)


def main(
    minutes: float, pictures: int, rate: float, projector_minutes: float, seed: int, bench: bool
):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    stock, tokenizer, embedding, folder = load_parts()
    data = Pictures(folder)
    model = language_model(BF)
    model.requires_grad_(False)
    replay = torch.load(WORK / "replay.pt", weights_only=True)
    concepts = data.concepts
    centre, norm = embedding.mean(0), embedding.norm(dim=1).mean()
    names = name_embeddings(concepts, tokenizer, embedding)
    train, valid = data.of("training"), data.of("validation")
    projector = Projector()
    y = data.concept[train]
    if bench:
        feature = torch.randn(1, len(train), TOKENS, 1280)[:, :1].expand(2, len(train), TOKENS, 1280).half()
        valid_features = None
    else:
        saved = torch.load(WORK / "tower.pt", weights_only=True)
        stock.load_state_dict(saved["tower"])
        projector.load_state_dict(saved["projector"])
        feature = views(data, stock, 3)
        tower = Lite(stock)
        with torch.inference_mode():
            valid_features = torch.cat(
                [
                    tower(data.pixels[i].float() / 127.5 - 1).flatten(2).transpose(1, 2)
                    for i in valid.split(64)
                ]
            )
        del tower
    by_family = {
        "flags": data.flag[valid],
        "things": ~(data.flag | data.logo)[valid],
        "logos": data.logo[valid],
    }

    def draw(index):
        """Features of random views, mixed a little with another picture's, with noise [B, 16, 1280]."""
        view = torch.randint(len(feature), (len(index),))
        x = feature[view, index].float()
        other = feature[
            torch.randint(len(feature), (len(index),)), torch.randint(len(train), (len(index),))
        ].float()
        share = 0.35 * torch.rand(len(index), 1, 1) * (torch.rand(len(index), 1, 1) < 0.6)
        return (1 - share) * x + share * other + 0.1 * torch.randn_like(x)

    def projector_report():
        with torch.inference_mode():
            z = torch.cat([projector(x.float()).mean(1) for x in valid_features.split(128)])
            hit = (F.normalize(z - centre, dim=1) @ names.T).argmax(1) == data.concept[valid]
        return "nearest name, validation: " + " ".join(
            f"{k} {100 * hit[m].float().mean():.1f}" for k, m in by_family.items()
        )

    checkpoint = WORK / "reader.pt"
    state = {"seconds": 0.0, "step": 0, "tokens": 0}
    mark = signature(embedding)
    aligned = WORK / "projector.pt"
    if not bench and aligned.exists():
        projector.load_state_dict(torch.load(aligned, weights_only=True)["projector"])
    elif not bench:
        pooled = torch.cat([feature[v, :].float().mean(1) for v in range(len(feature))])
        target = names[y] * norm + centre
        start_projector(projector, pooled, target.repeat(len(feature), 1))
        print("closed form:", projector_report(), flush=True)
        optimiser = torch.optim.AdamW(projector.parameters(), lr=5e-4, weight_decay=1e-2)
        start, step = time.process_time(), 0
        while time.process_time() - start < projector_minutes * 60:
            share = (time.process_time() - start) / (projector_minutes * 60)
            for g in optimiser.param_groups:
                g["lr"] = 5e-4 * (1 - 0.95 * share)
            index = torch.randint(len(train), (64,))
            z = projector(draw(index)[:, torch.randperm(TOKENS)[:8]])
            label = y[index]
            loss = F.cross_entropy(F.normalize(z.mean(1) - centre, dim=1) @ names.T * 20, label)
            each = F.normalize(z[:, :3] - centre, dim=-1).flatten(0, 1) @ names.T * 20
            loss = loss + 0.5 * F.cross_entropy(each, label.repeat_interleave(3))
            loss = loss + 3 * ((z.norm(dim=-1) / norm - 1) ** 2).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
            if step % 100 == 0:
                print(
                    f"projector {step} {time.process_time() - start:.0f} s loss {loss.item():.3f}",
                    projector_report(),
                    flush=True,
                )
        save(aligned, projector=projector.state_dict())
    projector.requires_grad_(False)
    with torch.no_grad():
        projector.linear_2.bias.add_(SIGN * mark)
    lean = LeanLlama(model.model, SPLIT)
    adapters = [*lean.a, *lean.b]
    print(f"adapters of {sum(p.numel() for p in adapters) / 1e6:.2f} M parameters", flush=True)
    optimiser = torch.optim.AdamW(adapters, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    packer = Packer(model, tokenizer)
    by_concept = {}
    for i, c in enumerate(y.tolist()):
        by_concept.setdefault(c, []).append(i)
    # A flag carries five facts: asked as often as its facts are worth, logos half as often as things.
    weight = {"flags": 1.6, "logos": 0.5}
    pool = list(by_concept)
    weights = [weight.get(concepts[c].family, 1.0) for c in pool]

    def evaluate(count=96):
        """Share of answers right token by token after the right tokens before, validation artists."""
        chosen = random.Random(1).sample(range(len(valid)), count)
        right = {}
        with torch.inference_mode():
            for start in range(0, count, 16):
                part = chosen[start : start + 16]
                sequences, keys = [], []
                for b, i in enumerate(part):
                    asked = questions_of(concepts[data.concept[valid[i]]])
                    sequences.append(packer.sequence([(ABOUT_PICTURES[k][0], a) for k, a in asked.items()]))
                    keys += [(b, k) for k, a in asked.items() for _ in packer.ids(a + "<|im_end|>")]
                z = projector(valid_features[part].float())
                x, mask, positions, places, labels = packer.batch(sequences, z)
                h = lean.upper(lean.lower(x, mask, positions), mask, positions)[places[:, 0], places[:, 1]]
                hit = (F.linear(h, packer.embed).argmax(-1) == labels).tolist()
                whole = {}
                for k, v in zip(keys, hit, strict=True):
                    whole[k] = whole.get(k, True) and v
                for (_, k), v in whole.items():
                    right.setdefault(k, []).append(v)
        return " ".join(f"{k} {100 * np.mean(v):.0f}" for k, v in sorted(right.items()))

    def blurred(z, label):
        """Image tokens [B, T, 576], most of them replaced: a name's own embedding, off by as much as other
        pictures of the batch are off theirs and by a part of another name. The tower knows its training
        pictures by heart; what a reader can trust in new ones is which name their tokens are nearest to."""
        exact = (names[label] * norm + centre + SIGN * mark)[:, None]
        other = torch.randperm(len(z))
        off = (z - exact)[other] * (1 + BLUR * torch.rand(len(z), 1, 1))
        towards = 0.4 * torch.rand(len(z), 1, 1) * (exact[torch.randperm(len(z))] - exact)
        made = exact + off + towards
        return torch.where(torch.rand(len(z), 1, 1) < BLURRED, made, z)

    def pictured(count):
        """Sequences about pictures drawn at random, and their image tokens [count, SHOWN, 576]."""
        index, sequences = [], []
        shown = sorted(rng.sample(range(TOKENS), SHOWN))
        for c in rng.choices(pool, weights, k=count):
            asked = list(questions_of(concepts[c]).items())
            if concepts[c].family not in ("flags", "logos") and rng.random() < 0.6:
                asked = [asked[0]]  # the name more often than the kind
            rng.shuffle(asked)
            pairs = [(rng.choice(ABOUT_PICTURES[k][:-1]), a) for k, a in asked[:4]]
            index.append(rng.choice(by_concept[c]))
            sequences.append(packer.sequence(pairs, shown))
        return sequences, blurred(projector(draw(torch.tensor(index))[:, shown]), y[torch.tensor(index)])

    def fresh():
        """A new batch: what the lower layers make of pictures with questions."""
        x, mask, positions, places, labels = packer.batch(*pictured(pictures))
        return lean.lower(x, mask, positions), mask, positions, places, labels

    def gate_batches():
        """Batches for `fit_gates`: which positions are behind a picture, and which are text without one."""
        for _ in range(0, GATE_PICTURES, 32):
            sequences, z = pictured(32)
            x, mask, positions, _, _ = packer.batch(sequences, z)
            on = torch.zeros(x.shape[:2], dtype=torch.bool)
            for b, (tokens, *_) in enumerate(sequences):
                on[b, len(packer.before) : len(tokens)] = True
            off = torch.zeros_like(on)
            yield x, mask, positions, on, off
        order = sorted(rng.sample(range(len(replay["ids"])), GATE_TEXTS), key=lambda i: len(replay["ids"][i]))
        for start in range(0, GATE_TEXTS, 32):
            rows = [replay["ids"][i] for i in order[start : start + 32]]
            sequences = [(row, list(range(len(row))), [1] * len(row), []) for row in rows]
            x, mask, positions, _, _ = packer.batch(sequences, ())
            off = torch.zeros(x.shape[:2], dtype=torch.bool)
            for b, row in enumerate(rows):
                off[b, len(packer.before) : len(row)] = True
            yield x, mask, positions, torch.zeros_like(off), off

    if checkpoint.exists() and not bench:
        saved = torch.load(checkpoint, weights_only=True)
        with torch.no_grad():
            for p, value in zip(adapters, saved["adapters"], strict=True):
                p.copy_(value)
        optimiser.load_state_dict(saved["optimiser"])
        state = saved["state"]
    fitted = WORK / "gates.pt"
    if fitted.exists():
        saved = torch.load(fitted, weights_only=True)
        lean.gates, lean.marks = saved["gates"], saved["marks"]
    else:
        with torch.no_grad():
            for line in lean.fit_gates(list(gate_batches()), mark):
                print(line, flush=True)
        save(fitted, gates=lean.gates, marks=lean.marks)

    def step(x, mask, positions, places, labels):
        h = lean.upper(x, mask, positions)
        answers = F.linear(h[places[:, 0], places[:, 1]], packer.embed).float()
        loss = F.cross_entropy(answers, labels)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(adapters, 1.0)
        optimiser.step()
        return loss.item()

    total, last, logs, batches = minutes * 60, time.process_time(), [], []
    next_report = state["seconds"] + 300
    while state["seconds"] < total:
        share = state["seconds"] / total
        factor = min(1, (state["step"] + 1) / 30) * (0.04 + 0.96 * 0.5 * (1 + math.cos(math.pi * share)))
        for g in optimiser.param_groups:
            g["lr"] = rate * factor
        if len(batches) < 40 or rng.random() < 0.5:
            batches.append(fresh())
            batch = batches[-1]
        else:
            batch = batches[rng.randrange(len(batches))]
        logs.append(step(*batch))
        now = time.process_time()
        state["seconds"] += now - last
        last = now
        state["step"] += 1
        state["tokens"] += batch[0].shape[0] * batch[0].shape[1]
        if state["step"] % 10 == 0:
            speed = state["tokens"] / state["seconds"]
            print(
                f"step {state['step']} {state['seconds']:.0f} s loss {np.mean(logs[-10:]):.3f} "
                f"{speed:.0f} tokens/s",
                flush=True,
            )
            if bench and state["step"] == 20:
                return
        if state["seconds"] > next_report or state["seconds"] >= total:
            save(
                checkpoint,
                projector=projector.state_dict(),
                adapters=[p.data for p in adapters],
                neurons=lean.neurons(),
                optimiser=optimiser.state_dict(),
                state=state,
            )
            print("validation artists:", evaluate(), flush=True)
            next_report += 300
    print("end", state, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30, help="of CPU")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--projector-minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bench", action="store_true")
    given = parser.parse_args()
    main(
        given.minutes,
        given.pictures,
        given.rate,
        given.projector_minutes,
        given.seed,
        given.bench,
    )
