"""Edits inside vLLM: models that apply them, a router, and a front that OpenAI's clients call.

vLLM finds `register` by the entry point "vllm.general_plugins". docs/vllm.md says how to serve with it.
"""

from __future__ import annotations

TESTED = "0.32"  # minor version of vLLM that the tests run with; its runner is not a stable interface
_MODELS = {
    "DualEditLlava": "EditedLlava",
    "DualEditLlavaRouter": "LlavaRouter",
    "DualEditQwen2_5_VL": "EditedQwen2_5_VL",
    "DualEditQwen2_5_VLRouter": "Qwen2_5_VLRouter",
}
ARCHITECTURES = {
    "LlavaForConditionalGeneration": "DualEditLlava",
    "Qwen2_5_VLForConditionalGeneration": "DualEditQwen2_5_VL",
}


def register() -> None:
    """Make the models known to vLLM, by names; nothing else of it changes."""
    from vllm import ModelRegistry

    for name, kind in _MODELS.items():
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, f"{__name__}.models:{kind}")
