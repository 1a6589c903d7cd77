"""What vLLM's second runner asks a model before each forward: its documented hook, `get_model_state_cls`."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from .plan import Plan


class EditedModelState(DefaultModelState):
    """The default state of a model's requests, and the plan of each forward for its edits."""

    encoder_cache = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._asked: dict[str, tuple[list[int], list[str], dict[str, Any] | None]] = {}

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        extra = None if params is None else params.extra_args
        prompt = new_req_data.prompt_token_ids
        if prompt is not None and self.model.dualedit.planner.wants(extra):
            pictures = [feature.identifier for feature in new_req_data.mm_features]
            self._asked[new_req_data.req_id] = (list(prompt), pictures, extra)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self._asked.pop(req_id, None)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        self.model.dualedit.begin(self._plan(input_batch))
        return super().prepare_inputs(input_batch, req_states)

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        self.model.dualedit.begin(Plan())
        return super().prepare_dummy_inputs(num_reqs, num_tokens)

    def _plan(self, batch: Any) -> Plan:
        plan, engine = Plan(), self.model.dualedit
        engine.planner.forget(self._asked)
        for i, request_id in enumerate(batch.req_ids):
            asked = self._asked.get(request_id)
            if asked is None:
                plan.sampled.append((None, -1))
                continue
            prompt, pictures, extra = asked
            request = engine.planner.request(request_id, prompt, pictures, extra)
            start, computed = int(batch.query_start_loc_np[i]), int(batch.num_computed_tokens_np[i])
            length = int(batch.query_start_loc_np[i + 1]) - start
            seen = {} if self.encoder_cache is None else self.encoder_cache.encoder_outputs
            engine.concern(plan, request, start, length, computed, seen)
        return plan
