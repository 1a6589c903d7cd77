"""PEFT's common tests of its tuners (its `tests/testing_common.py`), on edit adapters with an edit in them.

docs/peft.md lists them. Each runs on a tiny LLaVA and a tiny Qwen2.5-VL, with both methods.
"""

import warnings

import peft
import pytest
import torch
from dualedit.tuners import BalancEditConfig, DualEditConfig
from peft_tests import common_tests
from tiny_models import LLAVA, METHODS, QWEN, row_of, store, strengthen

APPLY = {
    "model_attr": {}, "adapter_name": {}, "prepare_for_training": {}, "load_model_low_cpu_mem_usage": {},
    "save_pretrained": {}, "save_pretrained_selected_adapters": {},
    "save_pretrained_adapter_name_substring": {}, "from_pretrained_config_construction": {},
    "load_multiple_adapters": {}, "add_adapter_no_autocast_adapter_dtype": {"dtype": torch.bfloat16},
    "generate": {}, "generate_pos_args": {"raises_err": False}, "generate_half_prec": {},
    "inference_safetensors": {}, "peft_model_device_map": {}, "delete_adapter": {},
    "delete_inactive_adapter": {}, "delete_unknown_adapter_raises": {}, "unload_adapter": {},
    "disable_adapter": {}, "passing_input_embeds_works": {"test_name": ""}, "lora_conversion": {},
    "get_base_model_state_dict": {},
}  # fmt: skip
_MERGED = "an edit applies to some inputs only, so it cannot be merged into weights; merging is refused"
_ROWS = "every row is routed to its own edit; rows are not given adapters by name"
_TRAINED = (
    "a loss on the outputs reaches no adapter: keys and values of stored edits are constants, and "
    "DualEdit's adapters are trained by dualedit.training"
)
LEFT_OUT = {
    "merge_layers": _MERGED, "merge_layers_fp16": _MERGED, "merge_layers_nan": _MERGED,
    "merge_layers_multi": _MERGED, "merge_layers_is_idempotent": _MERGED, "safe_merge": _MERGED,
    "mixed_adapter_batches": _ROWS, "generate_with_mixed_adapter_batches_and_beam_search": _ROWS,
    "training": _TRAINED, "training_layer_indexing": _TRAINED, "training_gradient_checkpointing": _TRAINED,
    "training_prompt_learning_tasks": "of prompt learning only",
    "weighted_combination_of_adapters": "of LoRA and IA3 only",
    "weighted_combination_of_adapters_lora": "of LoRA only",
    "weighted_combination_of_adapters_ia3": "of IA3 only",
    "adding_multiple_adapters_with_bias_raises": "of methods with a setting called bias",
}  # fmt: skip
# It goes back through the outputs: DualEdit's output projection is reached, BalancEdit has nothing there.
LEFT_OUT_OF_BALANCEDIT = {"inference_safetensors": _TRAINED}
SETTINGS = {
    "dualedit": lambda family: dict(
        text_layer=1, vis_layer=2, mid_dim=16, num_heads=2, threshold=0.999, init_weights=False
    ),
    "balancedit": lambda family: dict(
        layer=family.linear, alpha=0.9, max_steps=3, learning_rate=0.3, rank=4, key="pooled", key_dim=16
    ),
}
CONFIGS = {"dualedit": DualEditConfig, "balancedit": BalancEditConfig}


@pytest.fixture(scope="module")
def common():
    return common_tests()


def test_every_one_of_pefts_tests_is_run_or_has_a_reason(common):
    named = {name[len("_test_") :] for name in dir(common.PeftCommonTester) if name.startswith("_test_")}
    assert named == {*APPLY, *LEFT_OUT} and not set(APPLY) & set(LEFT_OUT)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [LLAVA, QWEN], ids=lambda family: family.name)
@pytest.mark.parametrize("name", APPLY)
def test_pefts_own(name, family, method, common, generator, tmp_path, monkeypatch):
    if method == "balancedit" and name in LEFT_OUT_OF_BALANCEDIT:
        pytest.skip(LEFT_OUT_OF_BALANCEDIT[name])
    question = family.questions(2, generator)
    family.build().config.save_pretrained(tmp_path)

    class Models:
        @staticmethod
        def from_pretrained(model_id, dtype=torch.float32):
            model = family.build(dtype=dtype)
            model.name_or_path = model.config._name_or_path = model_id
            return model

    def with_an_edit(model, config, *args, **kwargs):
        made = peft.get_peft_model(model, config, *args, **kwargs)
        if method == "dualedit":
            strengthen(made)
        inputs = {
            n: v.to(model.dtype) if v.is_floating_point() else v for n, v in row_of(question, 0).items()
        }
        store(made, inputs, torch.Generator().manual_seed(1))
        return made

    class Tester(common.PeftCommonTester):
        transformers_class, torch_device = Models, "cpu"

        def prepare_inputs_for_testing(self):
            return dict(question)

    monkeypatch.setattr(common, "get_peft_model", with_an_edit)
    settings = SETTINGS[method](family)
    if method == "balancedit" and name == "passing_input_embeds_works":
        settings["key"] = "mean"  # a pooled key reads the picture, and refuses embeddings that do not show it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = getattr(Tester(), f"_test_{name}")
        run(model_id=str(tmp_path), config_cls=CONFIGS[method], config_kwargs=settings, **APPLY[name])
