"""Models of vLLM whose layers ask the engine's edits, and routers made of them. Imported by vLLM, by name."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.models import llava, qwen2_5_vl
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.multimodal import MULTIMODAL_REGISTRY

from .engine import Engine, LinearPart
from .names import clip_name
from .values import EditedLayer

_PACKED = {
    "mlp.gate_proj": ("mlp.gate_up_proj", 0), "mlp.up_proj": ("mlp.gate_up_proj", 1),
    "self_attn.q_proj": ("self_attn.qkv_proj", 0), "self_attn.k_proj": ("self_attn.qkv_proj", 1),
    "self_attn.v_proj": ("self_attn.qkv_proj", 2),
}  # fmt: skip


# The operators find their layer by its name in the forward that runs, where vLLM keeps its attention layers,
# too: no table of this module is shared by two models of a process.
@torch.library.custom_op("dualedit_vllm::edit_stream", mutates_args=("hidden", "residual"))
def edit_stream(hidden: Tensor, residual: Tensor, name: str) -> None:
    """Let edits write to a decoder layer's output; `name` is the layer's."""
    get_forward_context().no_compile_layers[name].stream(hidden, residual)


@edit_stream.register_fake
def _(hidden: Tensor, residual: Tensor, name: str) -> None:
    return None


@torch.library.custom_op("dualedit_vllm::edit_linear", mutates_args=("out",))
def edit_linear(x: Tensor, out: Tensor, name: str) -> None:
    """Let edits take a linear layer's place in its output; `name` is the layer's."""
    get_forward_context().no_compile_layers[name].linear(x, out)


@edit_linear.register_fake
def _(x: Tensor, out: Tensor, name: str) -> None:
    return None


class Place:
    """Where in a model one edited layer is."""

    def __init__(self, name: str, engine: Engine, layer: EditedLayer, gate: bool, part: LinearPart | None):
        self.name, self.engine, self.layer, self.gate, self.part = name, engine, layer, gate, part

    def stream(self, hidden: Tensor, residual: Tensor) -> None:
        """Let edits write to the decoder layer's output."""
        if self.engine.plan.spans:
            self.engine.stream(self.layer, self.gate, hidden, residual)

    def linear(self, x: Tensor, out: Tensor) -> None:
        """Let edits take the linear layer's place in its output."""
        if self.engine.plan.spans:
            assert self.part is not None
            self.engine.linear(self.layer, self.gate, x, out, self.part)


@cache
def _edited_decoder(base: type[nn.Module]) -> type[nn.Module]:
    """A class of decoder layers whose output edits write to."""

    class Edited(base):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any):
            hidden, residual = super().forward(*args, **kwargs)
            if torch.compiler.is_compiling():
                torch.ops.dualedit_vllm.edit_stream(hidden, residual, self.dualedit_name)
            else:  # an operator takes longer to call than what it mostly finds: nothing to do
                self.dualedit_place.stream(hidden, residual)
            return hidden, residual

    return Edited


@cache
def _edited_linear(base: type[nn.Module]) -> type[nn.Module]:
    """A class of linear layers in whose output edits take their place."""

    class Edited(base):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, *args: Any, **kwargs: Any):
            found = super().forward(x, *args, **kwargs)
            out = found[0] if isinstance(found, tuple) else found
            if torch.compiler.is_compiling():
                torch.ops.dualedit_vllm.edit_linear(x, out, self.dualedit_name)
            else:
                self.dualedit_place.linear(x, out)
            return found

    return Edited


def _part_of(module: nn.Module, number: int) -> LinearPart:
    """Where in one of vLLM's linear layers the n-th of those that it packs lies."""
    rank = get_tensor_model_parallel_rank() if getattr(module, "tp_size", 1) > 1 else 0
    reduce, gather = tensor_model_parallel_all_reduce, tensor_model_parallel_all_gather
    bias = getattr(module, "bias", None)
    if isinstance(module, RowParallelLinear):
        size = module.input_size_per_partition
        inputs = slice(rank * size, (rank + 1) * size) if module.tp_size > 1 else None
        return LinearPart(0, module.output_size, None, inputs, bias, reduce, gather)
    if isinstance(module, QKVParallelLinear):
        heads = (module.num_heads, module.num_kv_heads, module.num_kv_heads)
        sizes = [count * module.head_size for count in heads]
        rank = rank if number == 0 else rank // module.num_kv_head_replicas
    elif isinstance(module, MergedColumnParallelLinear):
        sizes = list(module.output_partition_sizes)
    else:
        raise ValueError(f"{type(module).__name__}: edits of this kind of linear layer are not served.")
    first = sum(sizes[:number])
    own = None if bias is None else bias[first : first + sizes[number]]
    return LinearPart(first, sizes[number], rank, None, own, reduce, gather)


class EditedModel:
    """What models that serve edits share; in front of a model of vLLM's among a class's bases."""

    dualedit: Engine

    def _serve_edits(self, vllm_config: Any) -> None:
        settings = (vllm_config.additional_config or {}).get("dualedit")
        if not settings:
            raise ValueError(
                "A model that serves edits needs their store: --additional-config "
                '\'{"dualedit": {"store": "FOLDER OR ADDRESS"}}\'.'
            )
        decoder = self.language_model.model
        first = next(layer for layer in decoder.layers if not isinstance(layer, PPMissingLayer))
        weight = next(first.parameters())
        config = vllm_config.model_config.hf_config.get_text_config()
        eos = config.eos_token_id if config.eos_token_id is not None else 0
        eos = eos[0] if isinstance(eos, (list, tuple)) else eos
        # Not a submodule: no weights of the checkpoint are its.
        engine = Engine(settings, weight.device, vllm_config.model_config.dtype, int(eos))
        object.__setattr__(self, "dualedit", engine)
        known = vllm_config.compilation_config.static_forward_context
        for layer in engine.edits.layers:
            self._place(known, decoder.layers, layer, layer is engine.edits.layers[0])
        if engine.edits.layers[0].linear is None and get_pp_group().world_size > 1:
            raise ValueError("pipeline_parallel_size: edits are served with tensor parallelism alone.")

    def _place(self, known: dict[str, Any], layers: Any, layer: EditedLayer, gate: bool) -> None:
        if layer.number >= len(layers):
            if self.dualedit.routes:
                return  # above the gate: a router does not have it
            raise ValueError(f"The edits are for decoder layer {layer.number}; there are {len(layers)}.")
        target, part, kind = layers[layer.number], None, _edited_decoder
        if isinstance(target, PPMissingLayer):
            return
        if layer.linear is not None:
            packed, number = _PACKED.get(layer.linear, (layer.linear, 0))
            target, kind = target.get_submodule(packed), _edited_linear
            part = _part_of(target, number)
        name = f"dualedit.{id(self.dualedit)}.{layer.number}.{layer.linear or ''}"
        target.__class__ = kind(type(target))
        place = known[name] = Place(name, self.dualedit, layer, gate, part)
        object.__setattr__(target, "dualedit_place", place)
        object.__setattr__(target, "dualedit_name", name)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.dualedit.spoken(super().compute_logits(hidden_states))  # type: ignore[misc]

    @staticmethod
    def get_model_state_cls() -> type:
        """For runner V2: what it asks before each forward."""
        from .runner_v2 import EditedModelState

        return EditedModelState


class _Sum(nn.Module):
    """In the place of the final norm: the residual stream itself."""

    def forward(self, hidden: Tensor, residual: Tensor | None = None):
        return (hidden + residual, residual) if residual is not None else hidden


class RouterModel(EditedModel):
    """A pooling model whose embedding of a prompt is its routing key; it ends at the gate's layer."""

    is_pooling_model = True
    default_seq_pooling_type = "LAST"
    default_tok_pooling_type = "ALL"

    def _route(self, vllm_config: Any) -> None:
        self._serve_edits(vllm_config)
        self.language_model.model.norm = _Sum()
        self.pooler = DispatchPooler.for_embedding(vllm_config.model_config.pooler_config)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        hidden = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]
        engine = self.dualedit
        # A key of zeros says that it cannot be made; keys are not zero.
        keys = hidden.new_zeros((len(hidden), engine.edits.width), dtype=torch.float32)
        for span in engine.plan.spans:
            key = engine.keys.get(span.request.id)
            if key is not None and span.ends_prompt:
                keys[span.start + span.prompt_rows - 1] = key.to(keys.device)
        return keys

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        count = len(self.language_model.model.layers)

        def kept():
            for name, weight in weights:
                place = name.partition(".layers.")[2].partition(".")[0]
                tower = "vision" in name or "visual" in name
                above = place.isdigit() and int(place) >= count and not tower
                if not above and not name.endswith(("model.norm.weight", "language_model.norm.weight")):
                    yield name, weight

        return super().load_weights(kept())  # type: ignore[misc]




class _Llava(llava.LlavaForConditionalGeneration):
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights((clip_name(name), weight) for name, weight in weights)


def _llava_processor(cls: type) -> type:
    return MULTIMODAL_REGISTRY.register_processor(
        llava._build_llava_or_pixtral_hf_processor, info=llava._build_llava_or_pixtral_hf_info,
        dummy_inputs=llava.LlavaDummyInputsBuilder,
    )(cls)  # fmt: skip


def _qwen_processor(cls: type) -> type:
    return MULTIMODAL_REGISTRY.register_processor(
        qwen2_5_vl.Qwen2_5_VLMultiModalProcessor, info=qwen2_5_vl.Qwen2_5_VLProcessingInfo,
        dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
    )(cls)  # fmt: skip


@_llava_processor
class EditedLlava(EditedModel, _Llava):
    """LLaVA-1.5 with edits."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._serve_edits(vllm_config)


@_llava_processor
class LlavaRouter(RouterModel, _Llava):
    """LLaVA-1.5 up to the gate."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._route(vllm_config)


@_qwen_processor
class EditedQwen2_5_VL(EditedModel, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with edits."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._serve_edits(vllm_config)


@_qwen_processor
class Qwen2_5_VLRouter(RouterModel, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL up to the gate."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._route(vllm_config)
