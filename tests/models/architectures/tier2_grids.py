"""Architectures that take a picture as a grid of patches, most of them with positions in two dimensions."""

from __future__ import annotations

import torch

from .parts import (
    AUDIO,
    IMAGE,
    SPECIAL,
    VIDEO,
    VISION_END,
    VISION_START,
    WIDTH,
    Architecture,
    mrope,
    patches,
    text,
    vit,
)
from .tier1 import QWEN_IDS, QWEN_IMAGE

_MERGING = dict(depth=2, num_heads=2, hidden_size=16, intermediate_size=24, out_hidden_size=WIDTH,
                patch_size=4,
                spatial_merge_size=2, temporal_patch_size=2)  # fmt: skip
_WINDOWED = dict(_MERGING, fullatt_block_indexes=[1], window_size=16)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
_INTERLEAVED = mrope(mrope_interleaved=True)
_LINEAR_ATTENTION = dict(
    linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
    layer_types=["linear_attention", "full_attention"] * 2,
    rope_parameters=dict(_INTERLEAVED, partial_rotary_factor=1.0),
)  # fmt: skip
_GLM_IDS = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, image_start_token_id=VISION_START,
    image_end_token_id=VISION_END, video_start_token_id=155, video_end_token_id=156, **SPECIAL,
)  # fmt: skip
_GLM_VISION = dict(_MERGING, image_size=16)
_BOTH = (IMAGE, VIDEO)
_OMNI_AUDIO = dict(
    num_mel_bins=8, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, d_model=16, n_window=2,
    output_dim=WIDTH, max_source_positions=8,
)  # fmt: skip


def _glm(
    name: str, text_type: str | None, linear: str = "layers.2.mlp.gate_up_proj", **more: object
) -> Architecture:
    rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=10000.0, partial_rotary_factor=1.0)
    return Architecture(
        name,
        dict(text_config=text(text_type, rope_parameters=rope, **more), vision_config=_GLM_VISION,
             **_GLM_IDS),
        linear=linear, image=QWEN_IMAGE, image_ids=_BOTH, types="mm_token_type_ids", pixels=patches(96),
    )  # fmt: skip


GRIDS = (
    Architecture(
        "qwen3_vl_moe",
        dict(text_config=text(None, rope_parameters=_INTERLEAVED, decoder_sparse_step=1, **_EXPERTS),
             vision_config=dict(_MERGING, num_position_embeddings=16, deepstack_visual_indexes=[0]),
             **QWEN_IDS),
        linear="layers.2.self_attn.o_proj",
        image=QWEN_IMAGE, image_ids=_BOTH, types="mm_token_type_ids", pixels=patches(96),
    ),
    Architecture(
        "qwen3_5",
        dict(text_config=text(None, **_LINEAR_ATTENTION),
             vision_config=dict(_MERGING, num_position_embeddings=16), **QWEN_IDS),
        image=QWEN_IMAGE, image_ids=_BOTH, types="mm_token_type_ids", pixels=patches(96),
        base_fails={"prompt lookup": "not supported with stateful models"},
    ),
    Architecture(
        "qwen3_5_moe",
        dict(text_config=text(None, **_LINEAR_ATTENTION, **_EXPERTS, shared_expert_intermediate_size=16),
             vision_config=dict(_MERGING, num_position_embeddings=16), **QWEN_IDS),
        linear="layers.2.mlp.shared_expert.up_proj",
        image=QWEN_IMAGE, image_ids=_BOTH, types="mm_token_type_ids", pixels=patches(96),
        base_fails={"prompt lookup": "not supported with stateful models"},
    ),
    Architecture(
        "qwen2_5_omni_thinker",
        dict(text_config=text(None, rope_parameters=mrope()), vision_config=_WINDOWED,
             audio_config=_OMNI_AUDIO,
             image_token_index=IMAGE, video_token_index=VIDEO, audio_token_index=AUDIO,
             vision_start_token_id=VISION_START, vision_end_token_id=VISION_END, audio_start_token_id=155,
             audio_end_token_id=156, user_token_id=3, **SPECIAL),
        older="model.layers", image=QWEN_IMAGE, image_ids=_BOTH, pixels=patches(96),
    ),
    Architecture(
        "qwen3_omni_moe_thinker",
        dict(text_config=text(None, rope_parameters=_INTERLEAVED, decoder_sparse_step=1, **_EXPERTS),
             vision_config=dict(_MERGING, num_position_embeddings=16, deepstack_visual_indexes=[0]),
             audio_config=_OMNI_AUDIO | dict(downsample_hidden_size=8, n_window_infer=4, conv_chunksize=4),
             image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=AUDIO,
             vision_start_token_id=VISION_START, vision_end_token_id=VISION_END, audio_start_token_id=155,
             audio_end_token_id=156, user_token_id=3, **SPECIAL),
        older="model.layers", linear="layers.2.self_attn.o_proj",
        image=QWEN_IMAGE, image_ids=_BOTH, pixels=patches(96),
    ),
    _glm("glm4v", None),
    _glm("glm46v", "glm4v_text"),
    _glm("glmga", "glm4v_text"),
    _glm("glm_ocr", None),
    _glm("glm4v_moe", None, "layers.2.mlp.shared_experts.up_proj", n_routed_experts=4, num_experts_per_tok=2,
         moe_intermediate_size=16, n_shared_experts=1, first_k_dense_replace=1),
    Architecture(
        "exaone4_5",
        dict(text_config=text("exaone4", sliding_window=16,
                              layer_types=["sliding_attention", "full_attention"] * 2),
             vision_config=dict(_WINDOWED, num_key_value_heads=2), image_token_id=IMAGE,
             video_token_id=VIDEO),
        image=QWEN_IMAGE, image_ids=_BOTH, pixels=patches(96),
    ),
    Architecture(
        "paddleocr_vl",
        dict(text_config=text(None, rope_parameters=mrope()), vision_config=vit(None, patch_size=4),
             **QWEN_IDS),
        image=QWEN_IMAGE, image_ids=_BOTH, types="mm_token_type_ids",
        pixels=lambda generator: {
            "pixel_values": torch.randn(16, 3, 4, 4, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        },
    ),
    Architecture(
        "video_llama_3",
        dict(text_config=text("qwen2"),
             vision_config=dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                num_attention_heads=2,
                                patch_size=4),
             image_token_id=IMAGE, video_token_id=VIDEO),
        image=QWEN_IMAGE, image_ids=_BOTH, pixels=patches(48, image_merge_sizes=[2]),
    ),
    Architecture(
        "hunyuan_vl",
        dict(text_config=text(None,
                              rope_parameters={"rope_type": "xdrope", "rope_theta": 10000.0, "factor": 1.0,
                                               "alpha": 1000.0,
                                                     "xdrope_section": [1, 1, 1, 1]}),
             vision_config=dict(hidden_size=16, intermediate_size=24, num_attention_heads=2,
                                num_hidden_layers=2,
                                out_hidden_size=WIDTH, text_hidden_size=WIDTH, patch_size=4,
                                spatial_merge_size=2,
                                max_image_size=16, min_image_size=16, img_max_token_num=16,
                                max_vit_seq_len=16),
             image_token_id=IMAGE, im_start_id=VISION_START, im_end_id=VISION_END, im_newline_id=155),
        # Of a picture's ids, the first, the last and the end of each of two lines are not patches.
        image=(VISION_START, *(IMAGE,) * 8, VISION_END), unused=4, types="mm_token_type_ids",
        pixels=patches(48),
    ),
    Architecture(
        "ernie4_5_vl_moe",
        dict(text_config=text(None, rope_parameters=mrope((1, 1, 2)), moe_intermediate_size=[16, 16], moe_k=2,
                              moe_num_experts=4, moe_num_shared_experts=1,
                              mlp_layer_types=["dense", "sparse", "dense", "sparse"]),
             vision_config=dict(depth=2, hidden_size=WIDTH, num_heads=2, intermediate_size=24, patch_size=4,
                                spatial_merge_size=2, temporal_merge_size=2),
             **_GLM_IDS),
        image=QWEN_IMAGE, image_ids=_BOTH, types="mm_token_type_ids", pixels=patches(48),
        more=lambda ids: {"moe_mm_token_type_ids": (ids == IMAGE).long()},
        base_fails={
            mode: "does not match the shape of the indexed tensor" for mode in ("no cache", "prompt lookup")
        },
    ),
    Architecture(
        "hyperclovax_vision_v2",
        dict(text_config=text(None), vision_config=_WINDOWED, image_token_id=IMAGE, video_token_id=VIDEO),
        image=QWEN_IMAGE, image_ids=_BOTH, pixels=patches(96),
    ),
    Architecture(
        "gemma4",
        dict(text_config=text(None, sliding_window=16, hidden_size_per_layer_input=8,
                              vocab_size_per_layer_input=160, layer_types=["sliding_attention",
                                                                           "full_attention"] * 2),
             vision_config=dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                num_attention_heads=2,
                                num_key_value_heads=2, head_dim=8, patch_size=4, pooling_kernel_size=2,
                                position_embedding_size=16),
             image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=AUDIO, boi_token_id=VISION_START,
             eoi_token_id=VISION_END, boa_token_id=155, eoa_token_index=156),
        image=QWEN_IMAGE, image_ids=_BOTH, types="mm_token_type_ids",
        pixels=lambda generator: {
            "pixel_values": torch.rand(1, 16, 48, generator=generator),
            "image_position_ids": torch.tensor([[[c, r] for r in range(4) for c in range(4)]]),
        },
    ),
    Architecture(
        "gemma4_unified",
        dict(text_config=text(None, sliding_window=16,
                              layer_types=["sliding_attention", "full_attention"] * 2),
             vision_config=dict(patch_size=4, pooling_kernel_size=2, mm_embed_dim=16, mm_posemb_size=16,
                                output_proj_dims=16),
             image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=AUDIO, boi_token_id=VISION_START,
             eoi_token_id=VISION_END, boa_token_id=155, eoa_token_index=156),
        image=QWEN_IMAGE, image_ids=_BOTH, types="mm_token_type_ids",
        pixels=lambda generator: {
            "pixel_values": torch.rand(1, 4, 192, generator=generator),
            "image_position_ids": torch.tensor([[[c, r] for r in range(2) for c in range(2)]]),
        },
    ),
)  # fmt: skip
