"""Workers of vLLM's first runner that say, before each forward, which rows belong to which request."""

from __future__ import annotations

from typing import Any

from .models import EditedModel
from .plan import Plan


def follow_forwards(runner: Any) -> None:
    """Have a runner (`GPUModelRunner`, or the CPU's) tell its model's edits what each forward is about.

    Dummy and profiling runs call the model itself, so that their plan is empty.
    """
    forward = runner._model_forward

    def planned(*args: Any, **kwargs: Any):
        model = runner.model
        engine = getattr(getattr(model, "runnable", model), "dualedit", None)
        if engine is None:
            return forward(*args, **kwargs)
        engine.begin(plan_of(runner, engine))
        try:
            return forward(*args, **kwargs)
        finally:
            engine.end()

    runner._model_forward = planned


def plan_of(runner: Any, engine: Any) -> Plan:
    """What the runner's next forward is about."""
    batch, plan, planner = runner.input_batch, Plan(), engine.planner
    planner.forget(runner.requests)
    starts, done, requests = runner.query_start_loc.np, batch.num_computed_tokens_cpu, runner.requests
    for i, request_id in enumerate(batch.req_ids):
        state = requests[request_id]
        params = state.sampling_params
        extra = None if params is None else params.extra_args
        if not planner.wants(extra) or state.prompt_token_ids is None:
            plan.sampled.append((None, -1))
            continue
        pictures = [feature.identifier for feature in state.mm_features or ()]
        request = planner.request(request_id, state.prompt_token_ids, pictures, extra)
        start, computed = int(starts[i]), int(done[i])
        engine.concern(plan, request, start, int(starts[i + 1]) - start, computed, runner.encoder_cache)
    return plan


class _Counts:
    def dualedit_counts(self) -> dict[str, Any]:
        """For `collective_rpc`: what this process's edits have done."""
        model = self.model_runner.model  # type: ignore[attr-defined]
        engine = getattr(model, "runnable", model).dualedit
        return {**engine.counts, **engine.edits.tiers.used(), "version": engine.store.now().version}


def _cpu_worker() -> type:
    from vllm.v1.worker.cpu_worker import CPUWorker as Base

    class CPUWorker(_Counts, Base):
        def init_device(self) -> None:
            super().init_device()
            follow_forwards(self.model_runner)

    return CPUWorker


def _gpu_worker() -> type:
    from vllm.v1.worker.gpu_worker import Worker as Base

    class GPUWorker(_Counts, Base):
        def init_device(self) -> None:
            super().init_device()
            if hasattr(self.model_runner, "_model_forward"):  # the second runner asks the model instead
                follow_forwards(self.model_runner)

    return GPUWorker


def __getattr__(name: str) -> type:
    made = {"CPUWorker": _cpu_worker, "GPUWorker": _gpu_worker}.get(name)
    if made is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made()
    return globals()[name]


__all__ = ["CPUWorker", "EditedModel", "GPUWorker", "follow_forwards", "plan_of"]  # noqa: F822
