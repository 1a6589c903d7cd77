"""Step 1: the upper two thirds of EfficientNet-Lite0 learn to name drawings by artists of the training role.

Two heads read the mean of the grid: a cosine classifier that starts at the concepts' centroids, and the
projector, whose output is compared with the names' embeddings of the language model. Batch-norm statistics
are frozen. The loss is about names only.

    python recipes/smol/tower.py --minutes 26
"""

import argparse
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from common import SIDE, WORK, Pictures, augment, load_parts, name_embeddings, save
from dualedit.smol.model import VOCABULARY
from lite import Lite
from torch import nn

FROZEN = 5  # blocks at the bottom that stay
VIEWS = 5  # augmented views of each picture; those after are drawn from these, which saves the frozen blocks


class Projector(nn.Module):
    """As transformers' `FastVlmMultiModalProjector`: [..., 1280] to [..., 576]."""

    def __init__(self, features: int = 1280, width: int = 576):
        super().__init__()
        self.linear_1 = nn.Linear(features, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1(x)))


@torch.no_grad()
def start_projector(projector: Projector, x: torch.Tensor, target: torch.Tensor, ridge: float = 0.02) -> None:
    """Set `projector` to the linear map that fits best, in closed form.

    Its gate is held where GELU is the identity (inputs around 5): training starts from ridge regression.

    Args:
        x: features [N, 1280].
        target: embeddings [N, 576].
        ridge: in units of the mean variance of `x`.
    """
    mean, centre = x.mean(0), target.mean(0)
    x, target = x - mean, target - centre
    square = x.T @ x
    square.diagonal().add_(ridge * square.diagonal().mean() * len(x) ** 0.5)
    weight = torch.linalg.solve(square, x.T @ target).T
    spread = (x @ weight.T).std() * 1.5
    projector.linear_1.weight.copy_(weight / spread)
    projector.linear_1.bias.copy_(5 - weight @ mean / spread)
    projector.linear_2.weight.copy_(torch.eye(len(weight)) * spread)
    projector.linear_2.bias.copy_(centre - 5 * spread)


def tuned(name: str) -> bool:
    """Whether a parameter of the tower is trained: blocks from `FROZEN` up without their gates."""
    if name.startswith(f"{VOCABULARY[0]}.expansion"):  # Lite's last convolution
        return True
    if name.startswith("encoder.blocks.") and not name.startswith(VOCABULARY):
        return int(name.split(".")[2]) >= FROZEN and "squeeze_excite" not in name
    return False


def trainable(model) -> list[nn.Parameter]:
    for name, p in model.named_parameters():
        p.requires_grad_(tuned(name))
    return [p for p in model.parameters() if p.requires_grad]


class Views:
    """What the frozen blocks make of augmented pictures: new views while there is room, then kept ones."""

    def __init__(self, data, tower, keep):
        self.data, self.tower, self.keep = data, tower, keep
        self.count = torch.zeros(len(data.concept), dtype=torch.long)
        self.kept = None

    @torch.no_grad()
    def draw(self, index):
        """float32 [B, 40, S / 8, S / 8] for picture indices [B]."""
        if self.count[index].min() >= VIEWS:
            view = torch.randint(VIEWS, (len(index),))
            return self.kept[view, index].float().contiguous(memory_format=torch.channels_last)
        x = augment(self.data.pixels[index], self.keep[index]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = self.tower.lower(x, FROZEN)
        if self.kept is None:
            self.kept = torch.zeros(VIEWS, len(self.count), *low.shape[1:], dtype=torch.float16)
        at = self.count[index].clamp_max(VIEWS - 1)
        self.kept[at, index] = low.half()
        self.count[index] += 1
        return low.float()


def views(data, model, count: int) -> torch.Tensor:
    """Features of `count` views of every training picture, fp16 [count, N, 16, 1280]; the first is clean."""
    file = WORK / "views.npy"
    train = data.of("training")
    if file.exists() and len(np.load(file, mmap_mode="r")) >= count:
        return torch.from_numpy(np.load(file, mmap_mode="c"))
    tower, keep = Lite(model), data.flag | data.logo
    out = np.lib.format.open_memmap(
        WORK / "views.part.npy", "w+", np.float16, (count, len(train), (SIDE // 32) ** 2, 1280)
    )
    with torch.inference_mode():
        for v in range(count):
            for start in range(0, len(train), 128):
                i = train[start : start + 128]
                x = data.pixels[i].float() / 127.5 - 1 if v == 0 else augment(data.pixels[i], keep[i])
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    grid = tower(x)
                out[v, start : start + 128] = grid.float().flatten(2).transpose(1, 2).half().numpy()
            print(f"view {v}", flush=True)
    out.flush()
    (WORK / "views.part.npy").replace(file)
    return torch.from_numpy(np.load(file, mmap_mode="c"))


def main(minutes: float, batch: int, base_rate: float, seed: int):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, tokenizer, embedding, folder = load_parts()
    data = Pictures(folder)
    names = name_embeddings(data.concepts, tokenizer, embedding)
    centre, norm = embedding.mean(0), embedding.norm(dim=1).mean()
    y, keep = data.concept, data.flag | data.logo
    train = data.of("training")
    valid = data.of("validation")
    tower = Lite(model)
    projector = Projector()
    head = nn.Linear(1280, len(data.concepts), bias=False)
    seen = torch.tensor([c.seen for c in data.concepts])
    parameters = trainable(model)

    def raw(index):
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.cat(
                [tower(data.pixels[i].float() / 127.5 - 1).float().mean((2, 3)) for i in index.split(128)]
            )

    def centroids(e, labels):
        return F.normalize(torch.zeros(len(data.concepts), 1280).index_add_(0, labels, e), dim=1)

    checkpoint = WORK / "tower.pt"
    if not checkpoint.exists():
        e0 = raw(train)
        mean = e0.mean(0).clone()
        with torch.no_grad():
            head.weight.copy_(centroids(F.normalize(e0 - mean, dim=1), y[train]))
        start_projector(projector, e0, names[y[train]] * norm + centre)

    def report():
        with torch.inference_mode():
            v = raw(valid)
            by_head = (F.normalize(v - mean, dim=1) @ F.normalize(head.weight, dim=1).T)[:, seen]
            by_head = torch.nonzero(seen)[:, 0][by_head.argmax(1)] == y[valid]
            by_name = (F.normalize(projector(v) - centre, dim=1) @ names.T).argmax(1) == y[valid]
        parts = {
            "flags": data.flag[valid],
            "things": ~(data.flag | data.logo)[valid],
            "logos": data.logo[valid],
        }
        text = []
        for label, hit in (("head", by_head), ("projector", by_name)):
            text.append(
                label + " " + " ".join(f"{k} {100 * hit[m].float().mean():.1f}" for k, m in parts.items())
            )
        return "validation artists: " + "; ".join(text)

    views = Views(data, tower, keep)
    groups = [
        {"params": parameters, "lr": base_rate},
        {"params": list(head.parameters()), "lr": 3e-4},
        {"params": list(projector.parameters()), "lr": 2e-4},
    ]
    rates = [g["lr"] for g in groups]
    optimiser = torch.optim.AdamW(groups, weight_decay=2e-2)
    state = {"seconds": 0.0, "step": 0, "epoch": 0}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["tower"])
        projector.load_state_dict(saved["projector"])
        head.load_state_dict(saved["head"])
        optimiser.load_state_dict(saved["optimiser"])
        mean, state = saved["mean"], saved["state"]
    print(f"{len(train)} training pictures, {len(valid)} of validation artists;", report(), flush=True)
    total, last = minutes * 60, time.process_time()
    while state["seconds"] < total:
        losses = []
        for index in train[torch.randperm(len(train))].split(batch):
            now = time.process_time()
            state["seconds"] += now - last
            last = now
            share = min(1.0, state["seconds"] / total)
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = (
                    rate
                    * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * share)))
                    * min(1, (state["step"] + 1) / 40)
                )
            state["step"] += 1
            low = views.draw(index)
            grid = tower.top(tower._run(low, tower.blocks[FROZEN:]))
            e = F.normalize(grid.mean((2, 3)) - mean, dim=1)
            logits = e @ F.normalize(head.weight, dim=1).T * 24
            loss = F.cross_entropy(logits[:, seen], (seen.cumsum(0) - 1)[y[index]], label_smoothing=0.05)
            tokens = grid.flatten(2).transpose(1, 2)
            z = projector(tokens[:, torch.randperm(tokens.shape[1])[:6]])
            mean_token = F.normalize(projector(grid.mean((2, 3))) - centre, dim=1)
            named = F.cross_entropy(mean_token @ names.T * 20, y[index])
            each = F.cross_entropy(
                (F.normalize(z[:, :3].reshape(-1, 576) - centre, dim=1) @ names.T) * 20,
                y[index].repeat_interleave(3),
            )
            length = ((z.norm(dim=-1) / norm - 1) ** 2).mean()
            total_loss = loss + 0.4 * named + 0.3 * each + 2 * length
            optimiser.zero_grad()
            total_loss.backward()
            optimiser.step()
            losses.append((loss.item(), named.item(), each.item(), length.item()))
            if state["seconds"] > total:
                break
        state["epoch"] += 1
        loss = " ".join(f"{v:.3f}" for v in np.mean(losses, 0))
        print(f"epoch {state['epoch']} {state['seconds']:.0f} s loss {loss}", end="; ", flush=True)
        print(report() if state["epoch"] % 2 == 0 or state["seconds"] >= total else "", flush=True)
        save(
            checkpoint,
            tower=model.state_dict(),
            projector=projector.state_dict(),
            head=head.state_dict(),
            optimiser=optimiser.state_dict(),
            mean=mean,
            state=state,
        )
    print("end", report(), f"side {SIDE}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=26, help="of CPU")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    main(given.minutes, given.batch, given.rate, given.seed)
