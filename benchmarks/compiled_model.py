"""torch.compile of an edited model: what the operators of `dualedit.runtime.compile` are worth.

    python -m benchmarks.compiled_model

A Llama of 12 layers and 512 dimensions with random weights is compiled without an editor, with one whose
Python stands behind operators, as it does, and with one whose Python cuts the graph instead ("breaks"). Each
is compiled in a process of its own, from nothing: "compile" is the processor's time for the first two calls
(two lengths; the second makes the length a variable). Then the processes take turns at a forward of 64 tokens
that no edit answers. "whole graph" says whether `fullgraph=True` compiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings

import torch
from dualedit import add_edit, inject_dualedit
from torch import nn

WAYS = ("base", "operators", "breaks")


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--backend", default="inductor", help="eager: graphs without their code")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way is not None:
        return work(options)
    settings = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    settings["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    given = [f"--{name}={getattr(options, name)}" for name in ("layers", "hidden", "backend")]
    command = [sys.executable, "-m", "benchmarks.compiled_model", *given, "--way"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, **settings}
    workers = {way: subprocess.Popen([*command, way], env=environment, **pipes) for way in WAYS}
    for worker in workers.values():
        print(json.dumps(answer(worker)), flush=True)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.turns):
        for way, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            times[way].append(answer(worker))
    for way, worker in workers.items():
        ratios = [own / base for own, base in zip(times[way], times["base"], strict=True)]
        best, middle = min(times[way]) * 1e3, statistics.median(times[way]) * 1e3
        print(f"{way}: forward {best:.2f} ms at best, {middle:.2f} in the middle; "
              f"{statistics.median(ratios):.3f} of base, turn by turn", flush=True)  # fmt: skip
        worker.stdin.close()
        worker.wait()


def answer(worker: subprocess.Popen):
    """A worker's next line."""
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"a worker ended with {worker.wait()}")
    return json.loads(line)


def work(options: argparse.Namespace) -> None:
    """Compile in one way, print what it took, then time a forward for each line read."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    way = options.way
    model = edited(way, options.layers, options.hidden)
    call = calls(64)
    with torch.no_grad():
        expected = model(**call).logits
        whole = fits_one_graph(model)
        torch.compiler.reset()
        from torch._dynamo.utils import counters

        counters.clear()
        compiled, began = torch.compile(model, backend=options.backend), sum(os.times()[:4])
        for length in (64, 48):
            compiled(**calls(length))
        compiling = sum(os.times()[:4]) - began
        first = dict(counters["stats"])
        for length in (48, 56, 64, 33):
            compiled(**calls(length))
        error = float((compiled(**call).logits - expected).abs().max())
        print(json.dumps({
            "way": way, "compile_s": round(compiling, 1), "graphs": first.get("unique_graphs", 0),
            "graphs_after_more_lengths": counters["stats"].get("unique_graphs", 0),
            "graph_breaks": sum(counters["graph_break"].values()), "whole_graph": whole,
            "largest_error": error,
        }), flush=True)  # fmt: skip
        for _ in sys.stdin:
            took = []
            for _ in range(5):
                began = time.thread_time()
                compiled(**call)
                took.append(time.thread_time() - began)
            print(min(took), flush=True)


def edited(way: str, layers: int, hidden: int) -> nn.Module:
    """The model, with an editor that holds one edit unless it is the base."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=256, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    if way == "base":
        return model
    editor = inject_dualedit(model, text_layer=layers // 2, vis_layer=None, mid_dim=64)
    asked = {"input_ids": torch.arange(3, 15)[None], "attention_mask": torch.ones(1, 12).long()}
    add_edit(editor, asked, torch.tensor([5, 6]))
    if way == "breaks":
        cut_graphs()
    return editor.get_base_model()


def cut_graphs() -> None:
    """Let hooks and wrapped layers run as Python in a compiled model."""
    from dualedit.runtime import compile as operators
    from dualedit.runtime import hooks
    from dualedit.tuners.dualedit.layer import DualEditLayer

    operators.tracing = lambda: False
    for kind, name in (
        (hooks.CallBegins, "__call__"), (hooks.PassBegins, "__call__"), (hooks.Ends, "__call__"),
        (DualEditLayer, "edited"),
    ):  # fmt: skip
        setattr(kind, name, torch.compiler.disable(getattr(kind, name)))


def calls(length: int) -> dict[str, torch.Tensor]:
    """A question of so many tokens that no edit answers."""
    ids = torch.randint(100, 4000, (1, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def fits_one_graph(model: nn.Module) -> bool:
    """Whether `fullgraph=True` compiles (traced only)."""
    try:
        torch.compile(model, backend="eager", fullgraph=True)(**calls(64))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


if __name__ == "__main__":
    main()
