"""Architectures that came late to transformers; older versions do not have all of them."""

from __future__ import annotations

import torch

from .parts import IMAGE, VIDEO, WIDTH, Architecture, mrope, patches, picture, text, vit
from .tier1 import QWEN_IDS, QWEN_IMAGE

_MERGING = dict(depth=2, num_heads=2, hidden_size=16, intermediate_size=24, out_hidden_size=WIDTH,
                patch_size=4,
                spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=16)  # fmt: skip
_DEEP = dict(_MERGING, deepstack_visual_indexes=[0])
_BOTH = (IMAGE, VIDEO)
_SLIDING = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2)

NEWEST = (
    Architecture(
        "cosmos3_omni",
        dict(text_config=text("qwen3_vl_text", rope_parameters=mrope(mrope_interleaved=True)),
             vision_config=dict(_DEEP, model_type="qwen3_vl_vision"), **QWEN_IDS),
        image=QWEN_IMAGE, image_ids=_BOTH, types="mm_token_type_ids", pixels=patches(96),
    ),
    Architecture(
        "cosmos3_edge",
        dict(text_config=text(None, rope_parameters=mrope(mrope_interleaved=True)),
             vision_config=dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                num_attention_heads=2,
                                patch_size=4, num_patches=16, spatial_merge_size=2),
             projector_hidden_size=24, **QWEN_IDS),
        image=QWEN_IMAGE, image_ids=_BOTH, types="mm_token_type_ids", pixels=patches(48),
        linear="layers.2.mlp.fc1",
    ),
    Architecture(
        "cohere_compass",
        dict(text_config=text(None, **_SLIDING, rope_parameters={
                 kind: mrope(mrope_interleaved=True) for kind in ("sliding_attention", "full_attention")
             }),
             vision_config=_DEEP, **QWEN_IDS),
        image=QWEN_IMAGE, image_ids=_BOTH, types="mm_token_type_ids", pixels=patches(96),
    ),
    Architecture(
        "kimi_k25",
        dict(text_config=text("deepseek_v3", num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=8,
                              qk_rope_head_dim=8,
                              qk_nope_head_dim=8,
                              v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
                              moe_intermediate_size=16,
                              n_group=1, topk_group=1, first_k_dense_replace=3),
             vision_config=dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                num_attention_heads=2,
                                patch_size=4, pos_emb_height=4, pos_emb_width=4, pos_emb_time=4),
             projection_hidden_size=16, image_token_id=IMAGE, video_token_id=VIDEO),
        image=QWEN_IMAGE, image_ids=_BOTH,
        pixels=lambda generator: {
            "pixel_values": torch.randn(16, 3, 4, 4, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        },
    ),
    Architecture(
        "lfm3_vl",
        dict(text_config=text("lfm3"),
             vision_config=dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                num_attention_heads=2,
                                num_key_value_heads=2, patch_size=4),
             projector_hidden_size=24, image_token_id=IMAGE, video_token_id=VIDEO),
        image=QWEN_IMAGE, image_ids=_BOTH, pixels=patches(96),
        linear="layers.2.feed_forward.w1",
    ),
    Architecture(
        "mistral_large4",
        dict(text_config=text(None, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
                              num_key_value_heads=4,
                              kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
                              first_k_dense_replace=3),
             vision_config=vit("pixtral", head_dim=8), image_token_index=IMAGE, spatial_merge_size=1),
        pixels=picture(image_sizes=[[16, 16]]),
    ),
    Architecture(
        "muse_glimmer",
        dict(text_config=text(None, **_SLIDING),
             vision_config=dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                num_attention_heads=2,
                                patch_size=4, pos_emb_height=4, pos_emb_width=4, max_position_embeddings=16),
             image_token_id=IMAGE, video_token_id=VIDEO, out_hidden_size=64, projector_hidden_size=24),
        image=QWEN_IMAGE, image_ids=_BOTH, pixels=patches(96),
    ),
    Architecture(
        "granite_docling",
        dict(text_config=text(None),
             vision_config=vit(None, image_size=32, patch_size=4, out_hidden_size=WIDTH, scale_factor=4,
                               deepstack_visual_indexes=[0, 1], use_fine_route=False),
             image_token_id=IMAGE),
        layers="model.text_model.layers", pixels=picture(32, images=(1, 1), pixel_attention_mask=[[True]]),
    ),
)  # fmt: skip
