"""The architectures that every test run builds."""

from __future__ import annotations

import torch

from .parts import (
    IMAGE,
    PAD,
    SPECIAL,
    VIDEO,
    VISION_END,
    VISION_START,
    WIDTH,
    Architecture,
    mrope,
    opt,
    patches,
    picture,
    qformer,
    text,
    vit,
)  # fmt: skip

_CLIP = vit("clip_vision_model", projection_dim=16)
_SIGLIP = vit("siglip_vision_model", vision_use_head=False)
_PIXTRAL = vit("pixtral", head_dim=8)
QWEN_IDS = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START,
    vision_end_token_id=VISION_END, **SPECIAL,
)  # fmt: skip
QWEN_IMAGE = (VISION_START, *(IMAGE,) * 4, VISION_END)
_QWEN_VISION = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)

TIER1 = (
    Architecture(
        "llava",
        dict(vision_config=_CLIP, text_config=text("llama"), image_token_index=IMAGE, image_seq_length=4),
        pixels=picture(),
    ),
    Architecture(
        "llava+pixtral",
        dict(vision_config=_PIXTRAL, text_config=text("mistral"), image_token_index=IMAGE,
             vision_feature_layer=-1, vision_feature_select_strategy="full"),
        pixels=picture(image_sizes=[[16, 16]]),
    ),
    Architecture(
        "llava_next",
        dict(vision_config=_CLIP, text_config=text("llama"), image_token_index=IMAGE, image_seq_length=4,
             image_grid_pinpoints=[[16, 16]]),
        # A thumbnail and one tile, four features each, and a newline behind each of the tile's two lines.
        image=(IMAGE,) * 10, unused=2,
        pixels=picture(images=(1, 2), image_sizes=[[16, 16]]),
    ),
    Architecture(
        "llava_onevision",
        dict(vision_config=_SIGLIP, text_config=text("qwen2"), image_token_index=IMAGE,
             video_token_index=VIDEO, image_grid_pinpoints=[[16, 16]],
             vision_feature_select_strategy="full", vision_feature_layer=-1),
        image=(IMAGE,) * 10, image_ids=(IMAGE, VIDEO), unused=2,
        pixels=picture(images=(1, 2), image_sizes=[[16, 16]], batch_num_images=[1]),
    ),
    Architecture(
        "qwen2_vl",
        dict(text_config=text(None, rope_parameters=mrope()),
             vision_config=dict(_QWEN_VISION, embed_dim=16, hidden_size=WIDTH), **QWEN_IDS),
        image=QWEN_IMAGE, image_ids=(IMAGE, VIDEO), types="mm_token_type_ids", pixels=patches(96),
    ),
    Architecture(
        "qwen2_5_vl",
        dict(text_config=text(None, rope_parameters=mrope()),
             vision_config=dict(_QWEN_VISION, hidden_size=16, out_hidden_size=WIDTH, intermediate_size=24,
                                fullatt_block_indexes=[1], window_size=16), **QWEN_IDS),
        image=QWEN_IMAGE, image_ids=(IMAGE, VIDEO), types="mm_token_type_ids", pixels=patches(96),
    ),
    Architecture(
        "qwen3_vl",
        dict(text_config=text(None, rope_parameters=mrope(mrope_interleaved=True)),
             vision_config=dict(_QWEN_VISION, hidden_size=16, out_hidden_size=WIDTH, intermediate_size=24,
                                num_position_embeddings=16, deepstack_visual_indexes=[0]), **QWEN_IDS),
        image=QWEN_IMAGE, image_ids=(IMAGE, VIDEO), types="mm_token_type_ids", pixels=patches(96),
    ),
    Architecture(
        "internvl",
        dict(text_config=text("qwen2"), image_token_id=IMAGE, image_seq_length=1, downsample_ratio=0.5,
             vision_config=vit(None, image_size=[16, 16], patch_size=[4, 4])),
        pixels=picture(),
    ),
    Architecture(
        "paligemma",
        dict(text_config=text("gemma"), vision_config=_SIGLIP, image_token_index=IMAGE,
             projection_dim=WIDTH, hidden_size=WIDTH, **SPECIAL),
        more=lambda ids: {"token_type_ids": torch.zeros_like(ids)}, pixels=picture(),
    ),
    Architecture(
        "gemma3",
        dict(text_config=text("gemma3_text", sliding_window=16, query_pre_attn_scalar=8,
                              layer_types=["sliding_attention", "full_attention"] * 2),
             vision_config=_SIGLIP, image_token_index=IMAGE, mm_tokens_per_image=4,
             boi_token_index=VISION_START, eoi_token_index=VISION_END),
        image=QWEN_IMAGE, types="token_type_ids", pixels=picture(),
    ),
    Architecture(
        "idefics3",
        dict(text_config=text("llama"), vision_config=vit("idefics3_vision", image_size=32),
             image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD),
        layers="model.text_model.layers", pixels=picture(32, images=(1, 1)),
    ),
    Architecture(
        "smolvlm",
        dict(text_config=text("llama"), vision_config=vit("smolvlm_vision", image_size=32),
             image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD),
        layers="model.text_model.layers", pixels=picture(32, images=(1, 1)),
    ),
    Architecture(
        "mistral3",
        dict(text_config=text("mistral"), vision_config=_PIXTRAL, image_token_index=IMAGE,
             spatial_merge_size=1, vision_feature_layer=-1),
        pixels=picture(image_sizes=[[16, 16]]),
    ),
    Architecture(
        "blip-2",
        dict(text_config=opt(), vision_config=vit("blip_2_vision_model"),
             qformer_config=qformer("blip_2_qformer"), num_query_tokens=4, image_token_index=IMAGE),
        layers="language_model.model.decoder.layers", linear="layers.2.fc1", pixels=picture(),
    ),
    Architecture(
        "instructblip",
        dict(text_config=text("llama"), vision_config=vit("instructblip_vision_model"),
             qformer_config=qformer("instructblip_qformer"), num_query_tokens=4, image_token_index=IMAGE),
        layers="language_model.model.layers",
        pixels=picture(qformer_input_ids=[[4, 5, 6]], qformer_attention_mask=[[1, 1, 1]]),
    ),
)  # fmt: skip
