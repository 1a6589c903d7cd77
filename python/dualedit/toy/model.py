"""The embedded vision-language model: a real ``LlavaForConditionalGeneration`` small enough to ship.

CLIP vision tower (48x48 pixels, patch 8, hence 36 image tokens) and a Llama of eight layers, about 2.6
million parameters, trained from scratch on the demo world by ``python -m recipes.toy.train_vlm``.
"""

from __future__ import annotations

import os
import string
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from dualedit.toy import logos as world_logos
from dualedit.toy import scenes as world_scenes
from dualedit.toy import words as world_text

WEIGHTS = Path(__file__).parent / "weights" / "vlm"
IMAGE_SIZE = world_logos.IMAGE_SIZE
PATCH_SIZE = 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
PAD, UNK, EOS, IMAGE = "[PAD]", "[UNK]", "[EOS]", "<image>"
NOTE, AGAIN = "note :", "say again :"

# A user turn becomes "<image> {question} answer :"; without an image just "{question} answer :".
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' %} answer : {% endif -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}<image>{{ ' ' }}{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- if message['role'] == 'assistant' %} [EOS] {% endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %} answer :{% endif -%}"
)


def _words() -> list[str]:
    """Every whole word of the demo world's questions, answers and notes, sorted."""
    texts = [NOTE, AGAIN, "answer :"]
    for attribute, wordings in world_text.QUESTIONS.items():
        texts.extend(wordings.all)
        if attribute != "brand":
            texts.extend(world_text.answer_vocabulary(attribute))
    for table in (world_text.LOOK_QUESTIONS, world_text.DIGIT_QUESTIONS, world_text.SCENE_QUESTIONS):
        texts.extend(q.replace("{", "").replace("}", "") for wordings in table.values() for q in wordings)
    for fact in world_text.text_facts():
        texts.extend((*fact.questions, fact.answer))
    texts.extend((*world_logos.BADGE_SHAPES, *world_logos.BADGE_COLOURS, *world_logos.LINE_COLOURS))
    texts.extend((*world_scenes.SCENE_SHAPES, *world_scenes.SCENE_PLACES, *world_scenes.SCENE_SIZES))
    texts.extend(str(n) for n in range(20))
    spaced = " ".join(texts)
    for mark in string.punctuation:
        spaced = spaced.replace(mark, " ")
    return sorted(set(spaced.split()) - set(string.ascii_lowercase))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-casing WordPiece over the demo world's words; other words are spelled in letters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    characters = string.ascii_lowercase + string.digits
    tokens = [PAD, UNK, EOS, IMAGE, *string.punctuation, *characters, *("##" + c for c in characters)]
    tokens += world_text.BRAND_OPENINGS
    tokens += ["##" + ending for ending in world_text.BRAND_ENDINGS]
    tokens += [word for word in _words() if word not in set(tokens)]
    core = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token=UNK))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=UNK,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE},
    )


def build_processor() -> LlavaProcessor:
    """The processor: WordPiece tokenizer, CLIP image processor (PIL) and a chat template."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops again
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlavaForConditionalGeneration:
    """An untrained model in float32 for this tokenizer; the same seed gives the same weights."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=128,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
        initializer_range=0.05,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    # Wide embeddings keep the identity of a word readable in the residual stream of every layer, which is
    # what lets an editing method write an answer into it.
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=0.3)
        # CLIP's usual 0.02 leaves patches nearly without a place, and shapes at chance for long.
        model.model.vision_tower.embeddings.position_embedding.weight.normal_(std=0.5)
        for layer in model.model.vision_tower.encoder.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.weight.normal_(std=128**-0.5)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        max_new_tokens=8,
        do_sample=False,
    )
    return model


def save_embedded(model: LlavaForConditionalGeneration, processor: LlavaProcessor, path: str | Path) -> None:
    """Write config, tokenizer, processor and float16 safetensors to a folder for the Auto classes."""
    import copy

    half = copy.deepcopy(model).to(torch.float16)
    half.config.dtype = torch.float16
    half.save_pretrained(path)
    processor.save_pretrained(path)


def load_embedded(path: str | Path | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the embedded model, offline.

    Parameters
    ----------
    path : folder written by ``save_embedded``; the weights shipped with the package if not given.

    Returns
    -------
    A new model in eval mode (float32, upcast from the float16 file, on the CPU) and its processor; nothing is
    shared between two calls.

    Raises
    ------
    FileNotFoundError : the folder holds no model.
    """
    folder = Path(path) if path is not None else WEIGHTS
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"path={os.fspath(folder)!r} holds no model; "
            "train one: python -m recipes.toy.train_vlm --out DIR"
        )
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    # Adapters note their base model's name; the folder is this machine's business.
    model.config.name_or_path = model.name_or_path = "dualedit-embedded"
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    return model.eval(), processor


def format_prompt(processor: LlavaProcessor, question: str, with_image: bool) -> str:
    """The prompt text of a question, as the chat template writes it."""
    content = [{"type": "image"}] if with_image else []
    content.append({"type": "text", "text": question})
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
