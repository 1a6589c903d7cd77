"""Engines of vLLM, with edits and without, and what they are asked."""

from __future__ import annotations

import os
from typing import Any

for _name, _value in (
    ("VLLM_CPU_KVCACHE_SPACE", "1"), ("HF_HUB_OFFLINE", "1"), ("VLLM_NO_USAGE_STATS", "1"),
    ("VLLM_CPU_OMP_THREADS_BIND", "nobind"), ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
    ("VLLM_LOGGING_LEVEL", "ERROR"),
):  # fmt: skip
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402
from dualedit.serving.vllm.plan import EDIT  # noqa: E402

SETTINGS = dict(
    dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=32, limit_mm_per_prompt={"image": 1},
    disable_log_stats=True, kv_cache_memory_bytes=64 << 20, distributed_executor_backend="uni",
    max_logprobs=-1, block_size=32,
)  # fmt: skip


def engine(world, edits: bool = True, router: int | None = None, **settings: Any):
    """An engine of a world's model.

    Args:
        edits: with the world's store; without: vLLM as it comes.
        router: number of decoder layers, for one that answers with routing keys.
    """
    from dualedit.serving.vllm import ARCHITECTURES
    from transformers import AutoConfig
    from vllm import LLM

    more: dict[str, Any] = {}
    kind = ARCHITECTURES[AutoConfig.from_pretrained(world.model).architectures[0]]
    if edits:
        more = {
            "hf_overrides": {"architectures": [kind]},
            "worker_cls": "dualedit.serving.vllm.runner_v1.CPUWorker",
            "additional_config": {"dualedit": {"store": str(world.store), **settings.pop("dualedit", {})}},
        }
    if router is not None:
        more["additional_config"]["dualedit"]["router"] = True
        more["hf_overrides"] = {
            "architectures": [f"{kind}Router"], "text_config": {"num_hidden_layers": router},
        }  # fmt: skip
        more["runner"] = "pooling"
    return LLM(**{"model": str(world.model if edits else world.stock), **SETTINGS, **more, **settings})


def prompt(ask, edit: str | None = None, salt: str | None = "") -> dict[str, Any]:
    """A question as engines take it; `salt` "": as the front would set it, None: none."""
    made: dict[str, Any] = {"prompt": ask.text}
    if ask.image is not None:
        made["multi_modal_data"] = {"image": ask.image}
    if edit is not None and salt is not None:
        made["cache_salt"] = salt or f"dualedit:{edit.partition('@')[0]}"
    return made


def params(edit: str | None = None, tokens: int = 6, **more: Any):
    """Greedy, with the log probabilities of all tokens."""
    from vllm import SamplingParams

    extra = None if edit is None else {EDIT: edit}
    return SamplingParams(
        **{"temperature": 0, "max_tokens": tokens, "logprobs": -1, "extra_args": extra, **more}
    )


def ask_all(llm, asks: list, names: list[str | None], **more: Any) -> list:
    """Outputs of questions in one batch, each with its edit."""
    prompts = [prompt(ask, name) for ask, name in zip(asks, names, strict=True)]
    return llm.generate(prompts, [params(name, **more) for name in names], use_tqdm=False)


def tokens(output) -> list[int]:
    """Of an answer."""
    return list(output.outputs[0].token_ids)


def logs(output) -> torch.Tensor:
    """Log probabilities [V] of the first token."""
    found = output.outputs[0].logprobs[0]
    return torch.tensor([found[i].logprob for i in range(len(found))])
