"""Tiny random vision-language models and prompts for them: real architectures, made in no time."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import transformers as hf
from dualedit import Edit, add_edit, inject_balancedit, inject_dualedit
from dualedit.tuners import EditLayer
from dualedit.tuners.dualedit import DualEditLayer
from peft import PeftModel
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

VOCAB = 120
PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END = 0, 1, 2, 110, 111, 112, 113
WORDS = 100  # ids from 3 up to this stand for words
WIDTH = 32


@dataclass(frozen=True)
class Family:
    """An architecture: how to build it, where its layers are, and how an image stands in a prompt."""

    name: str
    layers: str
    linear: str
    image_tokens: tuple[int, ...]
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A random model in eval mode, frozen as PEFT freezes it.

        PyTorch's matmul takes another path, with other rounding, for a weight that requires a gradient and an
        input that is not contiguous (as `logits_to_keep` makes it), in no_grad mode too. So bits are compared
        between frozen models.
        """
        torch.manual_seed(seed)
        model = _BUILDERS[self.name]().eval().requires_grad_(False)
        _spread(model)
        model.to(dtype)
        question = self.question(torch.Generator())
        with torch.no_grad():  # transformers installs hooks of its own at the first call
            model(**question | {"pixel_values": question["pixel_values"].to(dtype)})
        return model

    def pixels(self, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random images, one for each row."""
        if self.name == "qwen2_5_vl":
            grid = torch.tensor([[1, 4, 4]]).repeat(rows, 1)
            patches = torch.randn(rows * 16, 3 * 2 * 4 * 4, generator=generator)
            return {"pixel_values": patches, "image_grid_thw": grid}
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}

    def prompt(self, generator: torch.Generator, words: int = 5) -> Tensor:
        """Random ids [P]: BOS, an image, `words` random words."""
        text = torch.randint(3, WORDS, (words,), generator=generator).tolist()
        return torch.tensor([BOS, *self.prefix, *self.image_tokens, *self.suffix, *text])

    def batch(self, rows: list[Tensor], pixels: dict[str, Tensor], side: str = "left") -> dict[str, Tensor]:
        """Padded inputs as a processor makes them; `pixels` hold one image for each row."""
        length = max(len(row) for row in rows)
        ids = torch.full((len(rows), length), PAD)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            ids[i, place], mask[i, place] = row, 1
        inputs = {"input_ids": ids, "attention_mask": mask, **pixels}
        if self.name == "qwen2_5_vl":
            inputs["mm_token_type_ids"] = (ids == IMAGE).long()
        return inputs

    def question(self, generator: torch.Generator, words: int = 5) -> dict[str, Tensor]:
        """One random image and question."""
        return self.batch([self.prompt(generator, words)], self.pixels(1, generator))

    def questions(self, rows: int, generator: torch.Generator, side: str = "left") -> dict[str, Tensor]:
        """A padded batch of random images and questions, no two with the same last word."""
        prompts = [self.prompt(generator, words=3 + i % 4) for i in range(rows)]
        for prompt, word in zip(prompts, torch.randperm(WORDS - 3, generator=generator), strict=False):
            prompt[-1] = word + 3
        return self.batch(prompts, self.pixels(rows, generator), side)


METHODS = ("dualedit", "balancedit")
# A BalancEdit value that is fitted in some twenty steps to any short target, on a model from `sharp`.
FITTING = dict(max_steps=300, rank=8, learning_rate=0.03, stop_probability=0.6)


def sharp(family: Family) -> nn.Module:
    """The family's tiny model with a larger head, so that any token can become likely."""
    model = family.build()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3.0)
    return model


def editor_of(family: Family, method: str, model: nn.Module | None = None, **more: object) -> PeftModel:
    """The family's tiny model with an editor whose edits change the answer clearly."""
    model = family.build() if model is None else model
    if method == "dualedit":
        settings = dict(
            text_layer=1, vis_layer=2, mid_dim=16, num_heads=2, threshold=0.999, init_weights=False
        )
        return strengthen(inject_dualedit(model, **(settings | more)))
    settings = dict(layer=family.linear, alpha=0.9, max_steps=3, learning_rate=0.3, rank=4)
    return inject_balancedit(model, **(settings | more))


def strengthen(model: nn.Module) -> nn.Module:
    """Random DualEdit adapters that write loudly into the residual stream."""
    with torch.no_grad():
        for layer in edit_layers(model):
            if isinstance(layer, DualEditLayer):
                for name, parameter in layer.dualedit_adapter.named_parameters():
                    if "o_proj" in name:
                        parameter.normal_(std=2.0)
    return model


def edit_layers(model: nn.Module) -> list[EditLayer]:
    """The wrapped layers of a model."""
    return [module for module in model.modules() if isinstance(module, EditLayer)]


def store(
    model: nn.Module, inputs: dict[str, Tensor], generator: torch.Generator, target: Tensor | None = None
) -> Edit:
    """Store an edit of one question with a random target; BalancEdit gets a near and a far sample."""
    if target is None:
        target = torch.randint(3, WORDS, (3,), generator=generator)
    noise = torch.randn(inputs["pixel_values"].shape, generator=generator)
    near, far = ({**inputs, "pixel_values": inputs["pixel_values"] + scale * noise} for scale in (0.01, 3.0))
    samples = (
        {}
        if hasattr(edit_layers(model)[0], "dualedit_adapter")
        else {"positives": [near], "negatives": [far]}
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The edit did not take")
        return add_edit(model, inputs, target, **samples)


def row_of(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch, its padding cut off."""
    keep = inputs["attention_mask"][row].bool()
    out = {}
    for name, value in inputs.items():
        if name == "pixel_values" and "image_grid_thw" in inputs:
            out[name] = value[row * 16 : (row + 1) * 16]
        elif value.shape[:2] == inputs["input_ids"].shape:
            out[name] = value[row : row + 1, keep]
        else:
            out[name] = value[row : row + 1]
    return out


def _spread(model: nn.Module) -> None:
    """Larger weights than the usual start: different inputs give clearly different states and answers."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1.2 / module.in_features**0.5)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)


def _text(config: type, **more: object) -> dict[str, object]:
    return dict(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        **more,
    )


def _clip() -> hf.CLIPVisionConfig:
    return hf.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )


def llama_config(**more: object) -> hf.LlamaConfig:
    """The language model of the tiny LLaVA."""
    return hf.LlamaConfig(**_text(hf.LlamaConfig, **more))


def _llava() -> nn.Module:
    config = hf.LlavaConfig(
        vision_config=_clip(),
        text_config=llama_config(),
        image_token_index=IMAGE,
        image_seq_length=4,
        pad_token_id=PAD,
    )
    return hf.LlavaForConditionalGeneration(config)


def _qwen() -> nn.Module:
    text = _text(
        hf.Qwen2_5_VLConfig,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    )
    vision = dict(
        depth=2, hidden_size=16, num_heads=2, intermediate_size=24, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=2, out_hidden_size=WIDTH, fullatt_block_indexes=[1], window_size=16,
    )  # fmt: skip
    config = hf.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def _opt_config() -> hf.OPTConfig:
    return hf.OPTConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, ffn_dim=48, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=WIDTH, dropout=0.0,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip


def _blip2() -> nn.Module:
    text = _opt_config()
    vision = hf.Blip2VisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    qformer = hf.Blip2QFormerConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        encoder_hidden_size=16, max_position_embeddings=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config = hf.Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    return hf.Blip2ForConditionalGeneration(config)


def tiny_llama(seed: int = 0) -> nn.Module:
    """A text-only model."""
    torch.manual_seed(seed)
    model = hf.LlamaForCausalLM(llama_config()).eval()
    _spread(model)
    return model


def tiny_opt(seed: int = 0) -> nn.Module:
    """A text-only model that computes in float64 throughout, if it is in float64."""
    torch.manual_seed(seed)
    model = hf.OPTForCausalLM(_opt_config()).eval()
    _spread(model)
    return model


def tiny_mllama(seed: int = 0) -> nn.Module:
    """A model that feeds images through cross-attention."""
    torch.manual_seed(seed)
    text = dict(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, cross_attention_layers=[1], pad_token_id=PAD, bos_token_id=BOS,
        eos_token_id=EOS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, max_position_embeddings=128,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_global_layers=1, attention_heads=2,
        image_size=16, patch_size=8, vision_output_dim=32, intermediate_layers_indices=[0], max_num_tiles=1,
        supported_aspect_ratios=[[1, 1]],
    )  # fmt: skip
    config = hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return hf.MllamaForConditionalGeneration(config).eval()


def tiny_t5() -> nn.Module:
    """An encoder-decoder."""
    config = hf.T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return hf.T5ForConditionalGeneration(config).eval()


_BUILDERS = {"llava": _llava, "qwen2_5_vl": _qwen, "blip2": _blip2}

LLAVA = Family("llava", "model.language_model.layers", "layers.2.mlp.up_proj", (IMAGE,) * 4)
QWEN = Family(
    "qwen2_5_vl",
    "model.language_model.layers",
    "layers.2.mlp.up_proj",
    (IMAGE,) * 4,
    (VISION_START,),
    (VISION_END,),
)
BLIP2 = Family("blip2", "language_model.model.decoder.layers", "layers.2.fc1", (IMAGE,) * 4)
FAMILIES = (LLAVA, QWEN, BLIP2)

_WORDS = (
    "what brand is this computer ? color who made the red blue green lenovo acer dell apple cat dog "
    "question : answer user assistant a picture of in small big old new name it"
).split()
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}user :{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)


def tiny_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Whole words; the special tokens have the ids of the tiny models, unknown words are all the same."""
    names = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", 3: "<unk>", IMAGE: "<image>"}
    listed = [names.get(i, f"w{i}") for i in range(VOCAB)]
    for place, word in enumerate(dict.fromkeys(_WORDS)):
        listed[4 + place] = word
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(listed)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.normalizer = normalizers.Lowercase()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def tiny_processor(chat: bool = True) -> hf.LlavaProcessor:
    """A processor for the tiny LLaVA, with or without a chat template."""
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
    return hf.LlavaProcessor(
        image_processor=images, tokenizer=tiny_tokenizer(), patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_TEMPLATE if chat else None,
    )  # fmt: skip


def random_image(generator: torch.Generator) -> Image.Image:
    """A picture of noise."""
    pixels = torch.randint(0, 256, (20, 24, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
