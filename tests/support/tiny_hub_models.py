"""Model directories as they lie on the hub, processor included, with random weights of next to no size."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

LAYERS = 24  # so that the layers of the README's snippets, 16, 19 and 20, are there
WIDTH = 32
_TEXTS = [
    "USER: ASSISTANT: What brand is this computer? Which brand made this computer? lenovo acer dell",
    "You are a helpful assistant. system user assistant the quick brown fox jumps over a lazy dog 0123456789",
]

# What the two chat templates write: "USER: <image>\n... ASSISTANT:", and ChatML with a system line.
_LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _learned(pre_tokenizer, alphabet: Iterable[str], special: list[str]) -> tuple[dict[str, int], list]:
    """Vocabulary and merges of a byte-pair encoding learned from a few lines."""
    core = Tokenizer(models.BPE(unk_token=special[0]))
    core.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=list(alphabet), show_progress=False
    )
    core.train_from_iterator(_TEXTS * 3, trainer)
    model = json.loads(core.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _spread(model: nn.Module, seed: int) -> nn.Module:
    """Weights wide enough that different inputs give different answers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5, generator=generator)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(generator=generator)
        model.get_output_embeddings().weight.mul_(4.0)
    return model.eval()


@dataclass(frozen=True)
class Size:
    """Of a language model: width of its residual stream, attention heads, decoder layers."""

    width: int = WIDTH
    heads: int = 4
    layers: int = LAYERS

    def text(self, vocabulary: int, **more: object) -> dict[str, object]:
        """The text config's settings."""
        return dict(
            vocab_size=vocabulary, hidden_size=self.width, intermediate_size=self.width * 3 // 2,
            num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.heads // 2, max_position_embeddings=512, **more,
        )  # fmt: skip


def make_llava(folder: Path, seed: int, size: Size = Size()) -> Path:
    """A folder like llava-hf/llava-1.5-7b-hf."""
    vocabulary, merges = _learned(pre_tokenizers.Metaspace(), "▁", ["<unk>", "<s>", "</s>"])
    tokenizer = hf.LlamaTokenizer(
        vocab=vocabulary, merges=merges, pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    tokenizer.padding_side = "left"
    crop = {"height": 28, "width": 28}
    processor = hf.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=crop),
        tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>", chat_template=_LLAVA_TEMPLATE,
    )  # fmt: skip
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28,
        patch_size=14, projection_dim=16,
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**size.text(len(tokenizer))), image_seq_length=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = _spread(hf.LlavaForConditionalGeneration(config), seed)
    return _save(folder, model, processor)


def make_qwen(folder: Path, seed: int, size: Size = Size()) -> Path:
    """A folder like Qwen/Qwen2.5-VL-7B-Instruct. Its processor needs torchvision, as the real one does."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
               "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary, merges = _learned(pre_tokenizers.ByteLevel(add_prefix_space=False), alphabet, special)
    tokenizer = hf.Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, eos_token="<|im_end|>", additional_special_tokens=special[1:]
    )
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("vision_start", "vision_end", "image_pad", "video_pad", "im_end", "endoftext")}  # fmt: skip
    sizes = dict(patch_size=14, merge_size=2, temporal_patch_size=2, min_pixels=56 * 56, max_pixels=56 * 56)
    processor = hf.Qwen2_5_VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**sizes), tokenizer=tokenizer,
        video_processor=hf.Qwen2VLVideoProcessor(), chat_template=_QWEN_TEMPLATE,
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=16, num_heads=2, intermediate_size=24, patch_size=14, spatial_merge_size=2,
        temporal_patch_size=2, out_hidden_size=size.width, fullatt_block_indexes=[1], window_size=112,
    )  # fmt: skip
    part = size.width // size.heads // 8
    rope = {"rope_type": "default", "mrope_section": [part, part, 2 * part], "rope_theta": 1000000.0}
    config = hf.Qwen2_5_VLConfig(
        text_config=size.text(
            len(tokenizer), rope_parameters=rope, bos_token_id=ids["endoftext"], eos_token_id=ids["im_end"]
        ),
        vision_config=vision, bos_token_id=ids["endoftext"], eos_token_id=ids["im_end"],
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
    )  # fmt: skip
    model = _spread(hf.Qwen2_5_VLForConditionalGeneration(config), seed)
    model.generation_config.eos_token_id = [ids["im_end"], ids["endoftext"]]
    model.generation_config.pad_token_id = ids["endoftext"]
    return _save(folder, model, processor)


def _save(folder: Path, model: nn.Module, processor: hf.ProcessorMixin) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
