"""What edits cost the questions that none of them answers: vLLM with and without them, side by side.

    .venv-vllm/bin/python -m benchmarks.vllm_overhead --json benchmarks/results/vllm-overhead.json

The embedded model with 1,000 edits whose keys are far from every question. Engines of one process take turns,
so that a busy machine is as busy for each; what is reported are medians of ratios of neighbouring turns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

for _name, _value in (
    ("HF_HUB_OFFLINE", "1"), ("VLLM_NO_USAGE_STATS", "1"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
    ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"), ("VLLM_LOGGING_LEVEL", "ERROR"), ("OMP_NUM_THREADS", "1"),
):  # fmt: skip
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402
from dualedit import Editor, load_edits, save_edits  # noqa: E402
from dualedit.serving.vllm.answers import CODE, Code  # noqa: E402
from dualedit.serving.vllm.names import clip_name  # noqa: E402
from dualedit.serving.vllm.plan import ASK  # noqa: E402
from dualedit.store import Store, publish  # noqa: E402
from dualedit.store.codebook import Entry, shard_bytes  # noqa: E402
from dualedit.store.manifest import Shard, commit  # noqa: E402
from dualedit.store.places import LocalPlace  # noqa: E402
from dualedit.toy.editors import EDITORS  # noqa: E402
from dualedit.toy.model import WEIGHTS, load_embedded  # noqa: E402
from dualedit.toy.pictures import sample_pictures  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def store_of(count: int, place: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A store of so many edits that no question is near to, and questions as vLLM takes them."""
    model, processor = load_embedded()
    editor = Editor(load_edits(model, EDITORS / "dualedit"), processor)
    pictures = sample_pictures()[:6]
    asked = [(picture.image, question) for picture in pictures for question, _ in picture.questions]
    # One true edit, as a pattern for the others.
    editor.edit(*asked[0], pictures[0].other_answer, keep_failed=True)
    save_edits(editor.model, place / "edits")
    publish(place / "edits", place / "store")
    generator = torch.Generator().manual_seed(0)
    width = Store(place / "store").now().keys.shape[1]
    keys = torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1)
    with_keys(place / "store", keys)
    prompts = [
        {"prompt": editor.prompter.text(image, question), "multi_modal_data": {"image": image}}
        for image, question in asked
    ]
    return place / "store", prompts


def with_keys(store: Path, keys: torch.Tensor, radius: torch.Tensor | None = None) -> None:
    """Give a store of one edit so many more [N, P], all with its values; the next version has them alone."""
    moment = Store(store).now()
    pattern = next(iter(moment.shards.values())).entries()[int(moment.ids[0])]
    radii = [pattern.radius] * len(keys) if radius is None else radius.tolist()
    entries = [
        Entry(i + 1, pattern.version, keys[i], radii[i], pattern.bytes, pattern.sha256, float("inf"), 0)
        for i in range(len(keys))
    ]
    data = shard_bytes(moment.manifest.memories[0], entries)
    digest = hashlib.sha256(data).hexdigest()
    folder, file = LocalPlace(store), f"codebook/00000000-{digest[:16]}.safetensors"
    folder.create(file, data)
    shard = Shard(0, file, len(data), digest, len(keys))
    commit(folder, moment.manifest, replace(moment.manifest, edits=len(keys), shards=(shard,)))


def stock_model(place: Path) -> Path:
    """The embedded model with the names of weights that vLLM's own LLaVA reads."""
    shutil.copytree(WEIGHTS, place / "model")
    named = {clip_name(name): weight for name, weight in load_file(WEIGHTS / "model.safetensors").items()}
    save_file(named, place / "model" / "model.safetensors", {"format": "pt"})
    return place / "model"


def engines(place: Path, store: Path, eager: bool) -> dict[str, Any]:
    """The stock engine, one with edits, and a router."""
    from vllm import LLM

    model = stock_model(place)
    settings = dict(
        dtype="float32", enforce_eager=eager, max_model_len=256, max_num_seqs=16, block_size=32,
        kv_cache_memory_bytes=64 << 20, limit_mm_per_prompt={"image": 1}, disable_log_stats=True,
        distributed_executor_backend="uni", enable_prefix_caching=False,
    )  # fmt: skip
    worker = {"worker_cls": "dualedit.serving.vllm.runner_v1.CPUWorker"}
    ours = {"dualedit": {"store": str(store)}}
    router = {"architectures": ["DualEditLlavaRouter"], "text_config": {"num_hidden_layers": 2}}
    return {
        "stock": LLM(str(model), **settings),
        "optimistic": LLM(
            str(WEIGHTS), **settings, **worker, additional_config=ours,
            hf_overrides={"architectures": ["DualEditLlava"]},
        ),
        "router": LLM(
            str(WEIGHTS), **settings, **worker, runner="pooling", hf_overrides=router,
            additional_config={"dualedit": {"store": str(store), "router": True}},
        ),
    }  # fmt: skip


def turn(made: dict[str, Any], form: str, prompts: list, tokens: int) -> float:
    """Seconds that all prompts take."""
    from vllm import PoolingParams, SamplingParams

    extra = {ASK: 2, CODE: str(Code.of(3, [2], [0, 1]))} if form == "optimistic" else None
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra)
    llm = made["stock"] if form == "router" else made[form]
    began = time.perf_counter()
    if form == "router":  # the key first; the lookup among 1,000 keys is microseconds beside it
        pooling = PoolingParams(use_activation=False)
        made["router"].embed(prompts, pooling_params=pooling, use_tqdm=False)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    if any(len(output.outputs[0].token_ids) != tokens for output in outputs):
        raise RuntimeError(f"{form}: an edit has answered, and none was to")
    return seconds


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--compile", action="store_true", help="torch.compile, as vLLM does by itself")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store, prompts = store_of(options.edits, Path(folder))
        made = engines(Path(folder), store, not options.compile)
        many = (prompts * 3)[:64]
        cases = {"throughput": (many, 16), "time to first token": (prompts[:1], 1)}
        results: dict[str, Any] = {}
        for case, (asked, tokens) in cases.items():
            for form in ("stock", "optimistic", "router"):
                turn(made, form, asked, tokens)
            ratios: dict[str, list[float]] = {"optimistic": [], "router": []}
            base: list[float] = []
            repeats = 1 if len(asked) > 1 else 8
            for number in range(options.turns):
                order = ["stock", "optimistic", "router"]
                seconds = {form: 0.0 for form in order}
                for again in range(repeats):
                    for form in order[:: 1 if (number + again) % 2 else -1]:
                        seconds[form] += turn(made, form, asked, tokens)
                base.append(seconds["stock"] / repeats)
                for form, found in ratios.items():
                    found.append(seconds[form] / seconds["stock"])
            results[case] = {"stock_ms": round(statistics.median(base) * 1e3, 1)} | {
                f"{form}_over_stock": {
                    "median": round(statistics.median(found), 4),
                    "quartiles": [round(q, 4) for q in statistics.quantiles(found, n=4)[::2]],
                }
                for form, found in ratios.items()
            }
    report = {
        "edits": options.edits, "turns": options.turns, "compiled": options.compile, "threads": 1,
        "machine": platform.processor() or platform.machine(), "load": round(os.getloadavg()[0], 1),
        "results": results,
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
