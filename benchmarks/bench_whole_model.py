"""What 10,000 stored edits cost a question that none of them answers, in a model of LLaVA-1.5-7B's shapes.

    python -m benchmarks.bench_whole_model --json benchmarks/results/whole-model-<machine>.json

The model is transformers' LLaVA with the 7B's sizes: CLIP-L/336, 576 image tokens, decoder layers of width
4096; bf16, random weights. It has as many decoder layers as free memory holds, at most 32; how many is in
every row. DualEdit edits layers 16 and 19, BalancEdit layer 20 (in a model too small for them, the layers at
the same relative depth). "prefill" is the forward of picture and question as `generate` runs it, "decode" one
token over its cache. The edited model and the plain one, which share their weights, take turns of one
forward, in an order that changes every turn; the ratio printed is the median of those of two turns in a row,
one in each order, with its bootstrap interval. Tokens are measured until that interval is narrower than
0.6 %. "base again" is a second plain model, with a cache of its own: its ratio to the first is what no editor
has to answer for.

Before anything is timed, the edited model must have looked the question up among all edits and hit none, and
its logits and every layer's cached keys and values must be the plain model's, bit for bit.

One edit is a real one. The others have random keys of its size and all share its value (BalancEdit) or one
token's keys and values (DualEdit): a question that hits no edit reads none of that. What 10,000 real ones
would take is printed. The first lookup after an edit also makes the codes of the new keys; that is not timed
with it but printed, for all keys at once.
"""

from __future__ import annotations

import math
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import init_empty_weights
from dualedit import add_edit, inject_balancedit, inject_dualedit
from dualedit.memory import EditMemory
from dualedit.models.architectures import unwrap
from dualedit.runtime.context import runtime_of
from dualedit.tuners import EditLayer
from dualedit.tuners.adapter import active_adapter
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.common import Benchmark, Rival, Row, arguments, paired_ratio, place

EDITS, QUESTION, DTYPE, GOAL = 10_000, 32, torch.bfloat16, 1.01
FEWEST, NARROW = 20, 0.006  # turns of a token before an interval is believed, and how narrow it has to be
# Bytes of memory left to activations, and on the CPU to others: a GPU of 16 GB takes all 32 layers.
SPARE = {"cpu": 4 << 30, "cuda": 3 << 29}
METHODS = ("dualedit", "balancedit")
AGAIN = "base again"


@dataclass(frozen=True)
class Sizes:
    """LLaVA-1.5-7B's, unless said otherwise."""

    hidden: int = 4096
    feed_forward: int = 11008
    heads: int = 32
    layers: int = 32
    words: int = 32064
    vision_hidden: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    side: int = 336
    patch: int = 14
    mid: int = 1024

    @property
    def image_tokens(self) -> int:
        """Tokens that a picture takes in the prompt."""
        return (self.side // self.patch) ** 2

    def edited(self) -> tuple[int, int, int]:
        """DualEdit's text and visual layer and BalancEdit's: 16, 19 and 20 of 32, or as deep in fewer."""
        if self.layers >= 20:
            return 16, 19, min(20, self.layers - 1)
        text = min(self.layers // 2, self.layers - 2)
        visual = min(max(self.layers * 19 // 32, text + 1), self.layers - 1)
        return text, visual, visual

    def config(self) -> LlavaConfig:
        """The model's configuration."""
        return LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=self.vision_hidden, intermediate_size=4 * self.vision_hidden,
                num_hidden_layers=self.vision_layers, num_attention_heads=self.vision_heads,
                image_size=self.side, patch_size=self.patch,
            ),
            text_config=LlamaConfig(
                vocab_size=self.words, hidden_size=self.hidden, intermediate_size=self.feed_forward,
                num_hidden_layers=self.layers, num_attention_heads=self.heads,
                num_key_value_heads=self.heads, max_position_embeddings=4096, pad_token_id=0,
            ),
            image_token_index=self.words - 1, image_seq_length=self.image_tokens,
        )  # fmt: skip


SIZES = Sizes()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line. Returns 1 if an edited model answered otherwise, else 0."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="decoder layers; default: as many as fit, at most 32")
    parser.add_argument("--method", choices=METHODS, help="only this one")
    parser.add_argument("--turns", type=int, help="turns of a prefill; default: 8, or 4 with --quick")
    parser.add_argument(
        "--tokens", type=int, help="turns of a token, at most; default: 300, or 20 with --quick"
    )
    parser.add_argument("--edits", type=int, default=EDITS, help="stored edits")
    options = parser.parse_args(argv)
    if options.layers is not None and options.layers < 2:
        parser.error(f"--layers {options.layers}: DualEdit edits two layers.")
    benchmark = Benchmark("whole_model", options)
    layers = options.layers or layers_that_fit(SIZES, options.device)
    sizes = replace(SIZES, layers=layers)
    weights = random_weights(sizes, place(options.device))
    held = sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) / 2**30
    print(f"    {layers} of {SIZES.layers} decoder layers, {held:.1f} GiB of weights", flush=True)
    right = [
        measure(benchmark, method, sizes, weights) for method in METHODS if options.method in (None, method)
    ]
    benchmark.finish()
    return 0 if all(right) else 1


def measure(benchmark: Benchmark, method: str, sizes: Sizes, weights: dict[str, Tensor]) -> bool:
    """Prefill and decode of the plain and the edited model; False if the edited one answered otherwise."""
    options = benchmark.options
    asked, other = (question(sizes, seed, place(options.device)) for seed in (0, 1))
    model = edited_model(method, sizes, weights, other, asked)
    fill(model, options.edits)
    seconds = encoding_seconds(model, benchmark.clock)
    if seconds is not None:
        print(f"    {method}: codes of {options.edits} keys made in {seconds:.2f} s", flush=True)
    plain, again = (Asked(skeleton(sizes, weights), asked) for _ in range(2))
    changed = Asked(model, asked)
    own = Own(model, benchmark.clock) if options.device == "cpu" else None
    text, visual, linear = sizes.edited()
    edited = f"{text}, {visual}" if method == "dualedit" else str(linear)
    tokens = asked["input_ids"].shape[1]
    few = options.turns or (4 if options.quick else 8)
    many = options.tokens or (20 if options.quick else 300)
    for part, width, turns in (("prefill", tokens, few), ("decode", 1, many)):
        shape = {
            "method": method, "part": part, "layers": sizes.layers, "edited": edited, "tokens": width,
            "cached": tokens if part == "decode" else 0, "edits": options.edits, "hit": 0,
        }  # fmt: skip
        models = {"base": plain, method: changed, AGAIN: again}
        runs = {name: getattr(one, part) for name, one in models.items()}
        if own is not None:
            runs[method] = partial(own.forward, runs[method])
        rivals = [
            Rival("base", "bfloat16", runs["base"], plain.kept),
            Rival(method, "bfloat16", runs[method], partial(changed.differs, plain, options.edits)),
            Rival(AGAIN, "bfloat16", runs[AGAIN], again.kept),
        ]
        with torch.no_grad():
            times = benchmark.compare(shape, rivals, turns=turns, enough=partial(narrow, part, method))
        if method not in times:
            return False
        for name in (AGAIN, method):
            ratio = benchmark.compare_pairs(shape, name, "base", times)
        reached = "reached" if ratio.high <= GOAL else "missed" if ratio.low > GOAL else "not resolved"
        print(f"    {part}: at most {GOAL} {reached}", flush=True)
        if own is not None:
            taken = len(times[method])
            own.report(benchmark, part, shape, method, taken, statistics.median(times["base"]))
    return True


def narrow(part: str, method: str, times: dict[str, list[float]]) -> bool:
    """Whether enough tokens have been measured; a prefill takes too long to ask."""
    if part != "decode" or len(times["base"]) < FEWEST or method not in times:
        return False
    ratio = paired_ratio(times[method], times["base"])
    return ratio.high - ratio.low <= NARROW


class Own:
    """Times what an editor adds to a forward: its hooks, and what its layers do beside their base layer.

    What PyTorch takes to call a hook is not in it: some microseconds a forward.
    """

    def __init__(self, model: nn.Module, clock: Callable[[], float]):
        self.clock, self.seconds = clock, 0.0
        self.forwards: list[float] = []  # milliseconds
        runtime = runtime_of(unwrap(model))
        for module in unwrap(model).modules():
            if isinstance(module, EditLayer):
                module.edited = self._timed(module.edited)
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for number, hook in hooks.items():
                    if getattr(hook, "runtime", None) is runtime:
                        hooks[number] = self._timed(hook)

    def _timed(self, call: Callable) -> Callable:
        def timed(*args):
            began = self.clock()
            result = call(*args)
            self.seconds += self.clock() - began
            return result

        return timed

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        """Run a forward and note what was its own part."""
        self.seconds = 0.0
        result = run()
        self.forwards.append(self.seconds * 1e3)
        return result

    def report(
        self, benchmark: Benchmark, part: str, shape: dict, method: str, turns: int, base: float
    ) -> None:
        """Print the own part of the last turns and keep it as a row."""
        last = self.forwards[-turns:]
        key = (benchmark.op, f"{method}, its own part", benchmark.device, "bfloat16", shape)
        row = Row(*key, benchmark.options.threads, statistics.median(last), min(last), max(last))
        benchmark.add(row)
        print(
            f"    {part}: {method}'s own code {row.median_ms:.3f} ms, {row.median_ms / base:.3%} of the base"
        )


class Asked:
    """A model that is asked one question, and what it answered last: logits and cache."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]):
        self.model, self.inputs = model, inputs
        self.logits = self.cache = None

    def prefill(self) -> Tensor:
        """The forward of the prompt, logits of its last token alone, as in `generate`."""
        output = self.model(**self.inputs, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        return output.logits

    def decode(self) -> Tensor:
        """One token over the cache, which is cut back again."""
        token = self.inputs["input_ids"][:, -1:]
        logits = self.model(input_ids=token, past_key_values=self.cache, use_cache=True).logits
        self.cache.crop(-1)
        return logits

    def kept(self, logits: Tensor) -> str | None:
        """Keep the plain model's answer; it is right by definition if it is finite."""
        self.logits = logits
        return None if bool(logits.isfinite().all()) else "its logits are not finite"

    def differs(self, plain: Asked, edits: int, logits: Tensor) -> str | None:
        """What is wrong with this model's answer beside the plain model's, or None."""
        if not torch.equal(logits, plain.logits):
            return "other logits than the plain model's"
        for number, (own, base) in enumerate(zip(self.cache.layers, plain.cache.layers, strict=True)):
            if not (torch.equal(own.keys, base.keys) and torch.equal(own.values, base.values)):
                return f"layer {number} caches other keys or values than the plain model's"
        (decision,) = next(
            v for v in vars(self.cache).values() if hasattr(v, "sequence")
        ).sequence.decisions.values()
        if decision.route is None or {len(held) for held in decision.snapshots.values()} != {edits}:
            return f"the question was not looked up among {edits} edits"
        return "an edit was hit" if bool((decision.route >= 0).any()) else None


# ------------------------------------------------------------------------------------------------ the model


def layers_that_fit(sizes: Sizes, device: str) -> int:
    """Decoder layers whose weights fit in free memory, beside all that is not a layer."""
    width, words = sizes.hidden, sizes.words
    layer = 4 * width * width + 3 * width * sizes.feed_forward
    vision = sizes.vision_layers * 12 * sizes.vision_hidden**2
    rest = 2 * words * width + 2 * width * width + vision + EDITS * width * 2
    fits = (free_memory(device) - SPARE[device] - rest * DTYPE.itemsize) // (layer * DTYPE.itemsize)
    if fits < 2:
        raise MemoryError(
            f"there is no room for two decoder layers of {layer * DTYPE.itemsize >> 20} MiB each."
        )
    return min(sizes.layers, int(fits))


def free_memory(device: str) -> int:
    """Bytes that can be allocated."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def random_weights(sizes: Sizes, device: str) -> dict[str, Tensor]:
    """All parameters by name: one block of random numbers again and again, scaled by a weight's inputs.

    Seven billion random numbers would take a minute, and no product can tell.
    """
    generator = torch.Generator(device).manual_seed(0)
    block = torch.randn((1 << 20) + 7, generator=generator, device=device).to(DTYPE)  # odd: rows differ
    weights = {}
    with init_empty_weights(include_buffers=False):
        named = list(LlavaForConditionalGeneration(sizes.config()).named_parameters())
    for name, meta in named:
        tensor = torch.empty(meta.shape, dtype=DTYPE, device=device)
        if "norm" in name or name.endswith("bias"):
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            scale = 1.0 if "embed_tokens" in name else math.prod(meta.shape[1:]) ** -0.5
            for piece in tensor.view(-1).split(len(block)):
                torch.mul(block[: len(piece)], scale, out=piece)
        weights[name] = tensor
    return weights


def skeleton(sizes: Sizes, weights: dict[str, Tensor]) -> nn.Module:
    """A model over these very weights: several models share them."""
    with init_empty_weights(include_buffers=False):
        model = LlavaForConditionalGeneration(sizes.config()).eval()
    for name, tensor in weights.items():
        parent, _, own = name.rpartition(".")
        # Frozen, as PEFT freezes a model: PyTorch rounds some products otherwise for weights that take
        # gradients.
        model.get_submodule(parent).register_parameter(own, nn.Parameter(tensor, requires_grad=False))
    device = next(iter(weights.values())).device
    for name, buffer in model.named_buffers():
        parent, _, own = name.rpartition(".")
        model.get_submodule(parent)._buffers[own] = buffer.to(device)
    return model


def question(sizes: Sizes, seed: int, device: str) -> dict[str, Tensor]:
    """A random picture and a question of random words about it."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, sizes.words - 2, (1, QUESTION), generator=generator)
    picture = torch.full((1, sizes.image_tokens), sizes.words - 1)
    ids = torch.cat([torch.ones(1, 1, dtype=torch.int64), picture, words], dim=1)
    pixels = torch.randn(1, 3, sizes.side, sizes.side, generator=generator).to(DTYPE)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: value.to(device) for name, value in inputs.items()}


# ------------------------------------------------------------------------------------------------ the edits


def edited_model(
    method: str, sizes: Sizes, weights: dict[str, Tensor], other: dict[str, Tensor], asked: dict[str, Tensor]
) -> nn.Module:
    """The model with an edit of the other question, whose radius ends before the question that is asked."""
    text, visual, linear = sizes.edited()
    model = skeleton(sizes, weights)
    if method == "dualedit":
        # Adapters that write when they are open: as the identity they would hide a hit.
        model = inject_dualedit(
            model, text_layer=text, vis_layer=visual, mid_dim=sizes.mid, init_weights=False
        )
    else:
        model = inject_balancedit(model, layer=f"language_model.layers.{linear}.mlp.up_proj", max_steps=1)
    model.eval()
    target = torch.tensor([5, 6, 7])
    # A rewording: the same picture, shifted by a shade.
    near = {**other, "pixel_values": other["pixel_values"] + 0.01}
    positives = [near] if method == "balancedit" else []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The edit did not take")  # what is stored does not matter
        warnings.filterwarnings("ignore", "The positive sample")
        add_edit(model, other, target, positives=positives, negatives=[asked])
    real = sum(memory.bytes_per_edit() for memory in active_adapter(model).group.memories.values())
    print(
        f"    {method}: an edit with its picture takes {real / 2**20:.2f} MiB, 10,000 take "
        f"{real * 10_000 / 2**30:.1f} GiB",
        flush=True,
    )
    return model


def fill(model: nn.Module, count: int) -> None:
    """Give the memory ``count`` edits: its one edit, and others that share all but their keys with it."""
    for memory in active_adapter(model).group.memories.values():
        _share(memory, count)


def _share(memory: EditMemory, count: int) -> None:
    """As `EditMemory.add` would leave it, but a table's rows lie in one place: nothing writes there."""
    stored = memory.snapshot()
    real = int(stored.length[0]) if memory.token_tables else 0
    with torch.inference_mode(False), torch.no_grad():
        for name in memory.edit_tables:
            row = stored.tables[name]
            setattr(memory, name, _keys(row, count) if name == "key" else row.expand(count, *row.shape[1:]))
        for name in memory.token_tables:
            table = stored.tables[name]
            setattr(memory, name, torch.cat([table, table[:1].expand(count - 1, -1)]))
        device = stored.length.device
        lengths = torch.ones(count, dtype=torch.int64, device=device)
        lengths[0] = real
        memory.edit_ids = torch.arange(1, count + 1, device=device)
        memory.edit_lengths = lengths if memory.token_tables else torch.zeros_like(lengths)
        memory.edit_places = torch.arange(count, device=device)
        memory.edit_slots = torch.full((count,), -1, dtype=torch.int64, device=device)
    memory._num_edits, memory._num_rows, memory._highest_id = count, count, count
    memory.edit_starts = memory.edit_lengths.cumsum(0) - memory.edit_lengths
    memory._num_tokens, memory._num_removed = int(memory.edit_lengths.sum()), 0
    memory._snapshot = None


def _keys(row: Tensor, count: int) -> Tensor:
    """The key [1, D] and random ones [count, D], three times as long: at its own length one could be near."""
    generator = torch.Generator(row.device).manual_seed(2)
    keys = torch.randn(count, row.shape[1], generator=generator, device=row.device)
    keys *= 3 * row.float().norm() / row.shape[1] ** 0.5
    keys[0] = row[0]
    return keys.to(row.dtype)


def encoding_seconds(model: nn.Module, clock: Callable[[], float]) -> float | None:
    """What making codes of all keys takes; None where lookups do without."""
    adapter = active_adapter(model)
    config, group = adapter.config, adapter.group
    stored = group.first.snapshot()
    began = clock()
    codes = stored.codes(stored.tables["key"], getattr(config, "metric", "cosine"))
    return None if codes is None else clock() - began


if __name__ == "__main__":
    sys.exit(main())
