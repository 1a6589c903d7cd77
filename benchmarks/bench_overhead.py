"""What stored edits cost a question that none of them answers: the embedded model, plain and edited.

    python -m benchmarks.bench_overhead --json benchmarks/results/<machine>.json

The edited models hold 1,000 edits and none is hit, so every answer is the plain model's, token for token;
that is checked before anything is timed. What is timed is the library's Python and the one lookup: "generate"
is `generate` of 16 tokens, "prefill" the first forward of it, "decode" one step over the cache. The three
models take turns; the ratio printed is the median of the ratios of each turn.

The first edit is a real one, the others are copies of it with random keys of its size: how much is stored
matters here, not what.
"""

from __future__ import annotations

import copy
import statistics

import numpy as np
import torch
from dualedit import Editor
from dualedit.toy.editors import METHODS, load_editor
from dualedit.toy.model import load_embedded
from dualedit.toy.world import ATTRIBUTES, QUESTIONS, World
from dualedit.tuners.adapter import active_adapter
from torch import Tensor, nn

from benchmarks.common import Benchmark, Rival, arguments, place

EDITS, TOKENS = 1000, 16
GOAL = 1.10


def main() -> None:
    """Run the benchmark from the command line."""
    options = arguments(__doc__.splitlines()[0]).parse_args()
    benchmark = Benchmark("overhead", options)
    plain, inputs, models = problem(EDITS)
    device = place(options.device)
    models = {name: model.to(device) for name, model in models.items()}
    inputs = {name: value.to(device) for name, value in inputs.items()}
    plain = plain.to(device)
    everyone = {"base": plain, **models}
    for part, make in (("generate", generation), ("prefill", prefill), ("decode", step)):
        shape = {"part": part, "tokens": TOKENS if part == "generate" else 1, "edits": EDITS, "hit": 0}
        with torch.no_grad():
            expected = make(plain, inputs)
            rivals = [rival(name, make(model, inputs), expected) for name, model in everyone.items()]
            times = benchmark.compare(shape, rivals, turns=7 if options.quick else 41)
        for name in models:
            ratio = statistics.median(a / b for a, b in zip(times[name], times["base"], strict=True))
            goal = f", goal {GOAL:.2f}" if part == "generate" else ""
            print(f"    {part}: {name} / base, median of paired ratios: {ratio:.3f}{goal}", flush=True)
    benchmark.finish()


def problem(edits: int) -> tuple[nn.Module, dict[str, Tensor], dict[str, nn.Module]]:
    """The plain model, a question about a logo, and by method an edited model that no edit of answers it."""
    world, rng = World(), np.random.default_rng(0)
    edited, asked = world.entities("train")[0], world.entities("test")[0]
    attribute = ATTRIBUTES[0]
    question = QUESTIONS[attribute].canonical
    request = world.render(edited, rng), question, world.answer(asked, attribute)
    picture = world.render(asked, rng)
    plain, _ = load_embedded()
    # Frozen, as PEFT freezes a model: PyTorch rounds some products otherwise for weights that take gradients.
    plain.requires_grad_(False)
    models = {}
    for method in METHODS:
        editor = load_editor(method)
        editor.edit(*request)
        fill(editor, edits - 1)
        if editor.explain(picture, question).fired:
            raise RuntimeError(f"{method}: the question hits an edit, which is not what is to be measured.")
        inputs = editor.prompter.inputs([(picture, question)])
        models[f"{method}, {edits} edits"] = editor.model
    return plain, inputs, models


def fill(editor: Editor, count: int) -> None:
    """Store copies of the editor's newest edit under random keys."""
    group = active_adapter(editor.model).group
    generator = torch.Generator().manual_seed(0)
    newest = group.rows(group.snapshot(), group.ids()[-1])
    for _ in range(count):
        rows = {place: dict(tables) for place, tables in newest.items()}
        for tables in rows.values():
            if "key" in tables:
                key = torch.randn(tables["key"].shape, generator=generator)
                # Three times as long: at a key's own length some lie within the copied L2 radius.
                tables["key"] = key * (3 * tables["key"].float().norm() / key.norm())
        group.add(rows, {})


def rival(name: str, run, expected) -> Rival:
    """A model to time, right only if it gives what the plain one gives, bit for bit."""
    want = expected()

    def wrong(found: Tensor) -> str | None:
        return None if torch.equal(found, want) else "another answer than the plain model's"

    return Rival(name, "float32", run, wrong)


def generation(model: nn.Module, inputs: dict[str, Tensor]):
    """`generate` of exactly TOKENS tokens, greedy."""
    settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    return lambda: model.generate(**inputs, **settings)


def prefill(model: nn.Module, inputs: dict[str, Tensor]):
    """The forward of the prompt."""
    return lambda: model(**inputs, use_cache=True).logits


def step(model: nn.Module, inputs: dict[str, Tensor]):
    """One token over a cache, which is cut back again."""
    cache = copy.deepcopy(model(**inputs, use_cache=True).past_key_values)
    token = inputs["input_ids"][:, -1:]

    def run() -> Tensor:
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return run


if __name__ == "__main__":
    main()
