"""An editing method from outside the package: a vector for each edit, added to one decoder layer's output.

Everything that a method is stands here: settings, wrapped layer, tuner, how an edit is made, and the line
that registers it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from dualedit.memory import EditMemory
from dualedit.memory.routing import last_state
from dualedit.models.architectures import hidden_size, resolve_layer
from dualedit.models.placement import place_of, to_device
from dualedit.runtime.context import bound, explicit_masks
from dualedit.runtime.frames import Record
from dualedit.runtime.partial import Replay
from dualedit.runtime.recording import record_states
from dualedit.tuners import EditConfig, EditLayer, EditMethod, EditTuner, register_edit_method
from dualedit.tuners.config import EditType
from dualedit.tuners.fitting import Goal, fit_to_answer, layer_number
from dualedit.tuners.method import NewEdit
from torch import nn


@dataclass
class SteeringConfig(EditConfig):
    layer: int = 0
    reach: float = 0.05
    steps: int = 40

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = EditType("STEERING")


class SteeringLayer(EditLayer):
    adapter_layer_names = ("steering_adapter",)
    other_param_names = ("steering_memory",)

    def __init__(self, base_layer, layer_name, runtime):
        super().__init__(base_layer, layer_name, runtime)
        self.steering_adapter = nn.ModuleDict()
        self.steering_memory = nn.ModuleDict()

    def update_layer(self, adapter_name, config, width, group):
        device, dtype = place_of(self.base_layer)
        memory = EditMemory({"key": (width,), "radius": (), "vector": (width,)}, {}, device, dtype)
        self.steering_adapter[adapter_name] = nn.Module()
        self.steering_memory[adapter_name] = memory
        self._add(adapter_name, config, memory, group)

    def forward(self, *args, **kwargs):
        output = self.base_layer(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        edited = self.edited(hidden, hidden)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def edited(self, x, base):
        mode = self.runtime.mode()
        if isinstance(mode, Record):
            self._record(mode, base)
            return base
        for name in self._running():
            forward = self._current_pass(name)
            if mode is not None:
                if self.layer_name in mode.edits:
                    base = self._steer(base, forward, mode.route, mode.edits[self.layer_name])
            elif forward is not None and forward.in_prompt:
                decision = self._decision(name, base, forward)
                if not decision.nothing:
                    vectors = self.stored_edits(decision.snapshots[self.layer_name])
                    base = self._steer(base, forward, decision.route, vectors)
        return base

    def _steer(self, base, forward, route, vectors):
        route = forward.decision_rows(route)
        rows = route >= 0
        at = forward.columns(forward.sequence.prompt.text) & rows[:, None]
        added = vectors[route.clamp(min=0)][:, None].to(base.dtype)
        return torch.where(at[:, :, None], base + added, base)

    def routing_key(self, name, states, prompt, mean_image=None):
        return last_state(states, prompt.last)

    @staticmethod
    def stored_edits(snapshot):
        return snapshot.tables["vector"]


class SteeringModel(EditTuner):
    prefix = "steering_"
    tuner_layer_cls = SteeringLayer
    containers = ("steering_adapter", "steering_memory")

    def _targets(self, config):
        return [resolve_layer(self.model, config.layer, "layer")]

    def _update(self, layer, adapter_name, config, group, key):
        layer.update_layer(adapter_name, config, hidden_size(self.model), group)


class SteeringMethod(EditMethod):
    name = "steering"
    title = "Steering vectors"
    paper = "https://example.org/steering"
    config_class = SteeringConfig
    tuner_class = SteeringModel

    def metric(self, config):
        return "cosine"

    def needs_samples(self, config):
        return False

    def make_edit(self, adapter, inputs, full, positives, negatives):
        layer, base = adapter.gate_layer, adapter.base
        states, prompt = record_states(base, inputs)
        key = adapter.key_of(states, prompt)
        vector = torch.zeros(1, key.shape[1], requires_grad=True)
        batch = to_device(full, base)
        labels = batch.pop("labels")
        route = torch.zeros(1, dtype=torch.int64)
        # Without labels the target would count as prompt; where a question is asked it is not there.
        with explicit_masks(base, prompt.text, prompt.image), bound(base, route, {}):
            replay = Replay(base, batch, layer_number(layer.layer_name, base))

        def logits_of():
            with bound(base, route, {layer.layer_name: vector}):
                return replay()

        notes = fit_to_answer(logits_of, labels, [vector], Goal(0.1, adapter.config.steps, 0.9), "stuck")
        rows = {"key": key[0], "radius": torch.tensor(adapter.config.reach), "vector": vector.detach()[0]}
        return NewEdit({layer.layer_name: rows}, key, notes)


register_edit_method(SteeringMethod())
