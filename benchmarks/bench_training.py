"""A training step of DualEdit's adapters against the published procedure.

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
- dualedit, text first: the same, without what it saves because the image stands in front of all text, so that
  the edited text reaches none of its positions before the image is edited. Where a template begins with text,
  as LLaVA's own does, this is what a step costs
- with --all, published with eager attention, and dualedit unpacked: an image read once for each question

The released code of the paper differs from that description in one point: before training it writes what
enters the first edited layer to disk, for every question of the data set, and then starts from there. That
cache would serve both sides; here the lower layers run in every step, as for questions that are new each
time.

What bounds it in bf16, where both sides' products run at what the processor gives (430 GFLOP/s on one Zen 5
core): counted in layers over one image of each edit, the published step is 86: 6 runs through 8 layers and
an output head of 2.6 layers' work, 4 of them with a backward pass through 3 layers and the head. 26 of
these are left: 5 lower layers for each of 3 images (15), the layer between the edited ones without an edit
for each (3), the next one for what must stay (1) and, for 3 images, that layer and the keys and values of the
last, forward and backward (7). With text in front of the image it is just below 30: there the layer between
the edited ones has to run with the edit too, forward and backward, but for queries, keys and values of the
image: nothing that is trained is below them, and for two images of three the run without the edit, which the
third then does not need, has left them. An eighth of a product's time is saved by laying the frozen weights
out for oneDNN once. Beside the products there are attention, where half
of the scores under a causal mask are closed and a third is left out, the adapters, the vision tower and the
optimiser, and what a model does between its products: rotations, gates and sums, pass by pass over memory.
In fp32 PyTorch's own products run at half speed on this processor, and the step's do not.

Both read the same questions with the same adapter weights. A rival is timed if its five losses and the norm
of each adapter weight's gradient are those of the published procedure.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from dualedit import EditRequest, EditSample, Probe, inject_dualedit
from dualedit.models.placement import to_device
from dualedit.models.prompting import Prompter
from dualedit.toy.model import IMAGE, build_tokenizer
from dualedit.training.batches import KEEP, Batch, make_batch, questions_of
from dualedit.training.dualedit import teacher_forced
from dualedit.training.frozen import quick_layers
from dualedit.training.recipe import TERMS, Recipe
from dualedit.training.setting import adamw
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

HIDDEN, LAYERS, HEADS, FEED_FORWARD, WORDS = 1024, 8, 16, 2752, 32_000
TEXT_LAYER, VIS_LAYER, MID, MID_HEADS = 4, 5, 1024, 8
PATCH, VISION, EOS = 14, 256, 2
LOSSES = TERMS[:5]
# Relative errors of losses and gradient norms: rounding of the two ways, not of the arithmetic's order alone.
ALLOWED = {torch.float32: 2e-3, torch.bfloat16: 6e-2}


def build(side: int) -> tuple[nn.Module, LlavaProcessor]:
    """The model and a processor for it."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=VISION, intermediate_size=4 * VISION, num_hidden_layers=6, num_attention_heads=4,
            image_size=side, patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=WORDS, hidden_size=HIDDEN, intermediate_size=FEED_FORWARD, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=2048,
            pad_token_id=0, bos_token_id=1, eos_token_id=EOS,
        ),
        image_token_index=image, image_seq_length=(side // PATCH) ** 2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    model.set_attn_implementation("eager")  # as `dualedit train` sets it on a CPU
    size = {"height": side, "width": side}
    images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    processor = LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, image_token=IMAGE,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    return model, processor


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
    image_id: int

    def step(self) -> dict[str, Tensor]:
        """The five losses."""
        edit = self.terms["reliability"]
        with torch.no_grad(), self.hooked(self._record):
            self.states: dict[int, Tensor] = {}
            self.base(**_call(edit), use_cache=False)
        self.real = edit["attention_mask"] != 0
        losses = {}
        for term, inputs in self.terms.items():
            before = None
            if term in KEEP:
                with torch.no_grad():
                    before = self.base(**_call(inputs), use_cache=False).logits
            labels = inputs["labels"]
            image = inputs["input_ids"] == self.image_id
            self.spans = {
                TEXT_LAYER: (inputs["attention_mask"] != 0) & ~image & ((labels != -100).cumsum(1) == 0),
                VIS_LAYER: image,
            }
            with self.hooked(self._edit):
                logits = self.base(**_call(inputs), use_cache=False).logits
            losses[term] = _loss(logits, before, labels)
        return losses

    @contextmanager
    def hooked(self, hook) -> Iterator[None]:
        layers = self.base.model.language_model.layers
        handles = [
            layers[number].register_forward_hook(lambda m, a, out, number=number: hook(number, out))
            for number in (TEXT_LAYER, VIS_LAYER)
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
        if number == TEXT_LAYER:  # sample by sample
            rows = []
            for row in range(len(hidden)):
                states = self.states[number][row : row + 1, self.real[row]]
                new = hidden[row : row + 1].clone()
                new[:, span[row]] = attend(self.text, hidden[row : row + 1, span[row]], states, None)
                rows.append(new)
            return torch.cat(rows)
        tokens = hidden[span].view(len(hidden), -1, HIDDEN)  # every row has one image
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
    """A batch, the same adapters on two copies of the model, and both ways to train them."""

    def __init__(self, dtype: torch.dtype, side: int, count: int):
        base, processor = build(side)
        for parameter in base.parameters():
            parameter.data = parameter.data.to(dtype)
        self.dtype, self.count = dtype, count
        prompter, samples = Prompter(processor, "<image> {prompt} answer :"), edits(count, side)
        weights = {**Recipe().weights()}
        plain = copy.deepcopy(base)
        model = inject_dualedit(
            base,
            text_layer=TEXT_LAYER,
            vis_layer=VIS_LAYER,
            mid_dim=MID,
            num_heads=MID_HEADS,
            init_weights=False,
        ).eval()
        self.ours = TrainingStep(model, autocast=dtype if dtype == torch.bfloat16 else None)
        for layer in self.ours.upper.layers.values():
            layer.dualedit_adapter.float()
        image_id = plain.config.image_token_index
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        self.batches: dict[bool, Batch] = {
            pack: make_batch(prompter, samples, generators, weights, EOS, [image_id], pack)
            for pack in (True, False)
        }
        asked = [q for n, s in enumerate(samples) for q in questions_of(s, n, weights, generators[n])]
        terms = {
            term: to_device(teacher_forced(prompter, [q.probe for q in asked if q.term == term], EOS), plain)
            for term in LOSSES
        }
        adapters = {
            part: copy.deepcopy(adapter)
            for layer in self.ours.upper.layers.values()
            for part, adapter in layer.dualedit_adapter["default"].items()
        }
        self.published = Published(plain, adapters["text"], adapters["vision"], terms, image_id)
        assert self.ours.choose_way(self.batches[True]), "the upper layers of LLaVA run on their own"
        assert self.ours.upper.share, "and between the edited ones at the positions only that an edit reaches"
        names = self.ours.trained()
        self.own = {"ours": list(names.values())}
        self.own["published"] = [
            dict(adapters[name.split(".")[-3] if name.split(".")[-3] in adapters else name.split(".")[-2]]
                 .named_parameters())[".".join(name.split(".")[-2:])]
            for name in names
        ]  # fmt: skip
        self.optimizers = {
            "ours": adamw(self.ours, Recipe(), quick=True),
            "published": torch.optim.AdamW(self.own["published"], weight_decay=0),
        }
        # A learning rate of 0: the work of an update, and the same weights in every turn.
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = 0.0
        self.running = ExitStack()  # for all steps, as the training loop does
        self.running.enter_context(quick_layers(self.ours.base))

    def _autocast(self):
        return torch.autocast("cpu", torch.bfloat16) if self.dtype == torch.bfloat16 else nullcontext()

    def _finish(self, who: str, losses: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizers[who].zero_grad(set_to_none=True)
        losses.sum().backward()
        self.optimizers[who].step()
        return losses.detach().float(), torch.stack([p.grad.float().norm() for p in self.own[who]])

    def run_ours(self, pack: bool) -> tuple[Tensor, Tensor]:
        """Losses [5] and gradient norms of the adapters' weights."""
        batch = self.batches[pack]
        return self._finish("ours", self.ours(batch)[:5] / self.count)

    def text_first(self, on: bool) -> None:
        """Whether a step does all that it would with text in front of the image."""
        self.ours.upper.share = not on

    def fused(self, on: bool) -> None:
        """Whether the published step's attention is the fused one."""
        self.published.base.set_attn_implementation("sdpa" if on else "eager")

    def run_published(self) -> tuple[Tensor, Tensor]:
        """The same, as published."""
        with self._autocast():
            losses = self.published.step()
        return self._finish("published", torch.stack([losses[term] for term in LOSSES]))


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
        problem = Problem(dtype, side, options.edits)
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
            Rival("dualedit", name, lambda p=problem: p.run_ours(True), wrong),
            Rival(
                "dualedit, text first", name, lambda p=problem: p.run_ours(True), wrong, problem.text_first
            ),
        ]
        if options.all:
            rivals.append(Rival("published, eager attention", name, problem.run_published, wrong))
            rivals.append(Rival("dualedit unpacked", name, lambda p=problem: p.run_ours(False), wrong))
        shape = {"edits": options.edits, "image_tokens": (side // PATCH) ** 2, "hidden": HIDDEN,
                 "layers": LAYERS, "words": WORDS, "dtype": name}  # fmt: skip
        times = benchmark.compare(shape, rivals, turns=3)
        for impl in ("dualedit", "dualedit, text first"):
            ratios = [a / b for a, b in zip(times["published"], times.get(impl, ()), strict=False)]
            if ratios:
                print(f"    {impl} is {statistics.median(ratios):.2f} times as fast as published", flush=True)
    benchmark.finish()


if __name__ == "__main__":
    main()
