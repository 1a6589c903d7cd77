"""A training step of DualEdit's adapters against the published procedure: times on a CPU.

    python -m benchmarks.bench_training --json benchmarks/results/training-<machine>.json

The model is LLaVA-1.5-7B at a quarter of its width and depth (hidden 1024, 8 layers, 32,000 words, an image
of 576 tokens), random weights, the paper's adapters (width 1024, 8 heads) at the same relative depth as
layers 16 and 19 of 32. A step is all five losses of the paper, forward, backward and AdamW, in fp32 and in
bf16. It has 2 edits where the paper has 4, so that a run ends in minutes; `--edits 4` takes twice as long.
Rivals:

- published: the published procedure written plainly. The whole model runs forward for the edit, for each loss
  and, where the loss compares with it, for the unedited model; keys and values are projected from the edit's
  raw states in each of them, the text adapter goes through the batch sample by sample, and the output head
  computes every position. Its attention is transformers' own choice, the fused one.
- dualedit: `dualedit.training.step`, as `dualedit train` runs it
- dualedit, kept: the same for questions that come again, with what the frozen layers make of them kept
  (`keep_gib`)
- with --all, published with eager attention, and dualedit unpacked: an image read once for each question

The released code of the paper differs from that description in one point: before training it writes what
enters the first edited layer to disk, for every question of the data set, and then starts from there.
`benchmarks.count_training_flops` counts that, too, at the real model's shapes: at a quarter of its depth the
layers below the edits, and so what is saved there, weigh more than they do in the model itself.

Both read the same questions with the same adapter weights. A rival is timed if its five losses and the norm
of each adapter weight's gradient are those of the published procedure.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from dualedit import EditRequest, EditSample, Probe, inject_dualedit
from dualedit.models.placement import to_device
from dualedit.models.prompting import Prompter
from dualedit.toy.model import IMAGE, build_tokenizer
from dualedit.training.batches import BatchMaker, with_answers
from dualedit.training.losses import KEEP
from dualedit.training.parts import Batch
from dualedit.training.questions import questions_of
from dualedit.training.recipe import TERMS, Recipe
from dualedit.training.step import TrainingStep
from dualedit.tuners.dualedit.modules import EditCrossAttention
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.common import Benchmark, Rival, arguments

MID, MID_HEADS, PATCH, EOS = 1024, 8, 14, 2
LOSSES = TERMS[:5]
# Relative errors of losses and gradient norms: rounding of the two ways, not of the arithmetic's order alone.
ALLOWED = {torch.float32: 2e-3, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Size:
    """The widths and depths of a LLaVA, and the numbers of its edited layers."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int
    words: int
    vision: int
    vision_layers: int
    vision_heads: int
    text_layer: int
    vis_layer: int


QUARTER = Size(1024, 8, 16, 2752, 32_000, 256, 6, 4, 4, 5)


def config_of(size: Size, side: int, image_id: int) -> LlavaConfig:
    """A LLaVA's configuration for images of side x side pixels."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=size.vision, intermediate_size=4 * size.vision, num_hidden_layers=size.vision_layers,
            num_attention_heads=size.vision_heads, image_size=side, patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=size.words, hidden_size=size.hidden, intermediate_size=size.feed_forward,
            num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.heads,
            max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=EOS,
        ),
        image_token_index=image_id, image_seq_length=(side // PATCH) ** 2,
    )  # fmt: skip


def processor_of(side: int) -> LlavaProcessor:
    """A processor for images of side x side pixels."""
    pixels = {"height": side, "width": side}
    images = CLIPImageProcessorPil(size=pixels, crop_size=pixels, do_center_crop=False)
    return LlavaProcessor(
        image_processor=images, tokenizer=build_tokenizer(), patch_size=PATCH, image_token=IMAGE,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def build(size: Size, side: int, image_id: int) -> nn.Module:
    """A frozen model with random weights."""
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config_of(size, side, image_id)).eval().requires_grad_(False)
    model.set_attn_implementation("eager")  # as `dualedit train` sets it on a CPU
    return model


def edits(count: int, side: int) -> list[EditSample]:
    """Edits with one question for each loss, as long as those of E-VQA."""
    generator = torch.Generator().manual_seed(0)

    def picture() -> Image.Image:
        return Image.fromarray(torch.randint(256, (side, side, 3), generator=generator).byte().numpy())

    samples = []
    for number in range(count):
        request = EditRequest(picture(), f"what is the name of the thing in picture {number} ?", "a red sign")
        samples.append(
            EditSample(
                request,
                {
                    "t_gen": [Probe(request.image_source, "which thing does it show ?", request.target)],
                    "v_gen": [Probe(picture(), request.prompt, request.target)],
                },
                {
                    "t_loc": [Probe(None, "who wrote the first book about the blue sea ?", "an old man")],
                    "m_loc": [Probe(picture(), "how many shapes are there ?", "three")],
                },
            )
        )
    return samples


# ---------------------------------------------------------------------- the published procedure


@dataclass
class Published:
    """The published training step, written plainly.

    base: a model of its own; text, vision: the adapters; terms: model inputs of each loss's questions, edit i
    in row i, labels included.
    """

    base: nn.Module
    text: EditCrossAttention
    vision: EditCrossAttention
    terms: dict[str, dict[str, Tensor]]
    size: Size

    def step(self) -> dict[str, Tensor]:
        """The five losses."""
        self.read_edits()
        return {term: self.loss(term) for term in self.terms}

    def read_edits(self) -> None:
        """Run the edits once, for the states that become keys and values."""
        edit = self.terms["reliability"]
        with torch.no_grad(), self.hooked(self._record):
            self.states: dict[int, Tensor] = {}
            self.base(**_call(edit), use_cache=False)
        self.real = edit["attention_mask"] != 0

    def loss(self, term: str) -> Tensor:
        """One of the five losses."""
        inputs, before = self.terms[term], None
        if term in KEEP:
            with torch.no_grad():
                before = self.base(**_call(inputs), use_cache=False).logits
        labels = inputs["labels"]
        image = inputs["input_ids"] == self.base.config.image_token_index
        self.spans = {
            self.size.text_layer: (inputs["attention_mask"] != 0)
            & ~image
            & ((labels != -100).cumsum(1) == 0),
            self.size.vis_layer: image,
        }
        with self.hooked(self._edit):
            logits = self.base(**_call(inputs), use_cache=False).logits
        return _loss(logits, before, labels)

    @contextmanager
    def hooked(self, hook) -> Iterator[None]:
        layers = self.base.model.language_model.layers
        handles = [
            layers[number].register_forward_hook(lambda m, a, out, number=number: hook(number, out))
            for number in (self.size.text_layer, self.size.vis_layer)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, number: int, hidden: Tensor) -> None:
        self.states[number] = hidden

    def _edit(self, number: int, hidden: Tensor) -> Tensor:
        span = self.spans[number]
        if not bool(span.any()):
            return hidden
        if number == self.size.text_layer:  # sample by sample
            rows = []
            for row in range(len(hidden)):
                states = self.states[number][row : row + 1, self.real[row]]
                new = hidden[row : row + 1].clone()
                new[:, span[row]] = attend(self.text, hidden[row : row + 1, span[row]], states, None)
                rows.append(new)
            return torch.cat(rows)
        tokens = hidden[span].view(len(hidden), -1, self.size.hidden)  # every row has one image
        new = attend(self.vision, tokens, self.states[number], self.real)
        return hidden.masked_scatter(span[..., None], new.to(hidden.dtype))


def attend(adapter: EditCrossAttention, x: Tensor, states: Tensor, real: Tensor | None) -> Tensor:
    """The adapter on tokens x [R, P, D] with an edit's raw states [R, T, D]; real [R, T] masks padding."""
    q = adapter.q_proj(adapter.in_proj(adapter.query_norm(x.to(adapter.query_norm.weight.dtype))))
    edit = adapter.edit_norm(states.to(adapter.edit_norm.weight.dtype))
    k, v = adapter.k_proj(edit), adapter.v_proj(edit)
    q, k, v = (t.unflatten(-1, (MID_HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * (MID // MID_HEADS) ** -0.5
    if real is not None:
        scores = scores.masked_fill(~real[:, None, None, :], torch.finfo(scores.dtype).min)
    out = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
    return (x + adapter.o_proj(out)).to(x.dtype)


def _call(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name != "labels"}


def _loss(logits: Tensor, before: Tensor | None, labels: Tensor) -> Tensor:
    """Mean over the answers of the mean over their tokens."""
    losses = []
    for row, label in enumerate(labels):
        at = (label[1:] != -100).nonzero()[:, 0]
        now = logits[row, at].float().log_softmax(-1)
        if before is None:
            losses.append(F.nll_loss(now, label[1:][at]))
        else:
            old = before[row, at].float().log_softmax(-1)
            losses.append(F.kl_div(now, old, log_target=True, reduction="batchmean"))
    return torch.stack(losses).mean()


# ---------------------------------------------------------------------- side by side


class Problem:
    """A batch, the same adapters on two copies of the model, and both ways to train them.

    Args:
        bases: the model twice, for the published procedure and for ours; on which adapters are put here.
        side: of an image, in pixels; count: edits in the batch.
    """

    def __init__(self, size: Size, bases: tuple[nn.Module, nn.Module], side: int, count: int):
        plain, base = bases
        self.dtype, self.count = base.dtype, count
        prompter, samples = Prompter(processor_of(side), "<image> {prompt} answer :"), edits(count, side)
        weights = {**Recipe().weights()}
        model = inject_dualedit(
            base,
            text_layer=size.text_layer,
            vis_layer=size.vis_layer,
            mid_dim=MID,
            num_heads=MID_HEADS,
            init_weights=False,
        )
        self.ours = TrainingStep(model.eval(), autocast=self.dtype if self.dtype == torch.bfloat16 else None)
        for layer in self.ours.layers.values():
            layer.dualedit_adapter.float()
        image_ids = [plain.config.image_token_index]

        def generators() -> list[torch.Generator]:
            return [torch.Generator().manual_seed(i) for i in range(count)]

        self.batches: dict[str, Batch] = {
            name: BatchMaker(prompter, weights, EOS, image_ids, **how)(samples, generators())
            for name, how in (
                ("packed", {"pack": True}), ("unpacked", {}), ("kept", {"pack": True, "one_by_one": True}),
            )
        }  # fmt: skip
        self.ours.frozen.keep_bytes = 1 << 40
        asks = zip(samples, generators(), strict=True)
        questions = [q for n, (s, g) in enumerate(asks) for q in questions_of(s, n, weights, g)]
        probes = {term: [q.probe for q in questions if q.term == term] for term in LOSSES}
        terms = {term: to_device(with_answers(prompter, probes[term], EOS), plain) for term in LOSSES}
        adapters = {
            part: copy.deepcopy(adapter)
            for layer in self.ours.layers.values()
            for part, adapter in layer.dualedit_adapter["default"].items()
        }
        self.published = Published(plain, adapters["text"], adapters["vision"], terms, size)
        self.own = {
            "ours": list(self.ours.trained().values()),
            "published": [p for adapter in adapters.values() for p in adapter.parameters()],
        }
        assert len({tuple(tuple(p.shape) for p in own) for own in self.own.values()}) == 1, "the same order"
        # A learning rate of 0: the work of an update, and the same weights in every turn.
        self.optimizers = {
            who: torch.optim.AdamW(own, lr=0.0, weight_decay=0) for who, own in self.own.items()
        }

    def _autocast(self):
        return torch.autocast("cpu", torch.bfloat16) if self.dtype == torch.bfloat16 else nullcontext()

    def _finish(self, who: str, losses: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizers[who].zero_grad(set_to_none=True)
        losses.sum().backward()
        self.optimizers[who].step()
        return losses.detach().float(), torch.stack([p.grad.float().norm() for p in self.own[who]])

    def run_ours(self, batch: str) -> tuple[Tensor, Tensor]:
        """Losses [5] and gradient norms of the adapters' weights, of one of `batches`."""
        return self._finish("ours", self.ours(self.batches[batch])[:5] / self.count)

    def fused(self, on: bool) -> None:
        """Whether the published step's attention is the fused one."""
        self.published.base.set_attn_implementation("sdpa" if on else "eager")

    def run_published(self) -> tuple[Tensor, Tensor]:
        """The same, as published."""
        with self._autocast():
            losses = self.published.step()
        return self._finish("published", torch.stack([losses[term] for term in LOSSES]))


def timed(dtype: torch.dtype, side: int, count: int) -> Problem:
    """The problem whose steps are timed."""
    base = build(QUARTER, side, build_tokenizer().convert_tokens_to_ids(IMAGE))
    for parameter in base.parameters():
        parameter.data = parameter.data.to(dtype)
    problem = Problem(QUARTER, (copy.deepcopy(base), base), side, count)
    assert problem.ours.choose_way(problem.batches["packed"]), "the layers of LLaVA run on their own"
    return problem


def main() -> None:
    """Run the benchmark from the command line."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=2, help="in the batch; 2 if not given")
    parser.add_argument("--side", type=int, help="of an image, in pixels; 336, or 168 with --quick")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="only this one; both if not given")
    parser.add_argument("--all", action="store_true", help="time the variants of both sides too")
    options = parser.parse_args()
    if options.device != "cpu":
        parser.error(f"--device {options.device}: this benchmark builds its models on the CPU; leave it out.")
    side = options.side or (168 if options.quick else 336)
    benchmark = Benchmark("training_step", options)
    for dtype in (
        (torch.bfloat16, torch.float32) if options.dtype is None else (getattr(torch, options.dtype),)
    ):
        problem = timed(dtype, side, options.edits)
        name = str(dtype).removeprefix("torch.")
        published: list[tuple[Tensor, Tensor]] = []

        def wrong(found: tuple[Tensor, Tensor], published=published, dtype=dtype) -> str | None:
            published.append(found)  # which is checked first
            for what, got, wanted in zip(("losses", "gradients"), found, published[0], strict=True):
                # Relative to the largest of the losses, and of the gradients: some are zero but for rounding.
                error = float((got - wanted).abs().max() / wanted.abs().max())
                if not error <= ALLOWED[dtype]:
                    return f"{what} are off by {error:.1e}"
            return None

        rivals = [
            Rival("published", name, problem.run_published, wrong, problem.fused),
            Rival("dualedit", name, lambda p=problem: p.run_ours("packed"), wrong),
            Rival("dualedit, kept", name, lambda p=problem: p.run_ours("kept"), wrong),
        ]
        if options.all:
            rivals.append(Rival("published, eager attention", name, problem.run_published, wrong))
            rivals.append(Rival("dualedit unpacked", name, lambda p=problem: p.run_ours("unpacked"), wrong))
        shape = {"edits": options.edits, "image_tokens": (side // PATCH) ** 2, "hidden": QUARTER.hidden,
                 "layers": QUARTER.layers, "words": QUARTER.words, "dtype": name}  # fmt: skip
        times = benchmark.compare(shape, rivals, turns=3)
        for impl in ("dualedit", "dualedit, kept"):
            ratios = [a / b for a, b in zip(times["published"], times.get(impl, ()), strict=False)]
            if ratios:
                print(f"    {impl} is {statistics.median(ratios):.2f} times as fast as published", flush=True)
    benchmark.finish()


if __name__ == "__main__":
    main()
