"""Architectures with a vision tower for pictures of one size (and tiles of it)."""

from __future__ import annotations

import torch

from .parts import (
    IMAGE,
    SPECIAL,
    VIDEO,
    VISION_END,
    VISION_START,
    WIDTH,
    Architecture,
    opt,
    picture,
    qformer,
    text,
    vit,
)

_CLIP = vit("clip_vision_model", projection_dim=16)
_SIGLIP = vit("siglip_vision_model", vision_use_head=False)
_PIXTRAL = vit("pixtral", head_dim=8)
# Sixteen patches, for towers that merge them.
_FINE = vit("siglip_vision_model", vision_use_head=False, patch_size=4)

TOWERS = (
    Architecture(
        "vipllava",
        dict(vision_config=_CLIP, text_config=text("llama"), image_token_index=IMAGE,
             vision_feature_layers=[-2, -1], image_seq_length=4),
        pixels=picture(),
    ),
    Architecture(
        "llava_next_video",
        dict(vision_config=_CLIP, text_config=text("llama"), image_token_index=IMAGE, image_seq_length=4,
             video_token_index=VIDEO, image_grid_pinpoints=[[16, 16]]),
        image=(IMAGE,) * 10, image_ids=(IMAGE, VIDEO), unused=2,
        pixels=picture(images=(1, 2), image_sizes=[[16, 16]]),
    ),
    Architecture(
        "video_llava",
        dict(vision_config=_CLIP, text_config=text("llama"), image_token_index=IMAGE,
             video_token_index=VIDEO, image_seq_length=5, video_seq_length=5),
        image_ids=(IMAGE, VIDEO), pixels=picture(name="pixel_values_images"),
    ),
    Architecture(
        "aya_vision",
        dict(vision_config=_FINE, text_config=text("cohere2"), image_token_index=IMAGE, downsample_factor=2),
        pixels=picture(),
    ),
    Architecture(
        "cohere2_vision",
        dict(vision_config=_FINE, text_config=text("cohere2"), image_token_id=IMAGE, downsample_factor=2,
             alignment_intermediate_size=32),
        pixels=picture(),
    ),
    Architecture(
        "got_ocr2",
        dict(vision_config=vit(None, output_channels=16, window_size=2, global_attn_indexes=[1], mlp_dim=24,
                               image_size=64, patch_size=4),
             text_config=text("qwen2"), image_token_index=IMAGE, **SPECIAL),
        image=(IMAGE,) * 16, pixels=picture(64),
    ),
    Architecture(
        "pp_chart2table",
        dict(vision_config=vit(None, output_channels=16, window_size=2, global_attn_indexes=[1], mlp_dim=24,
                               image_size=64, patch_size=4),
             text_config=text("qwen2"), image_token_index=IMAGE, **SPECIAL),
        image=(IMAGE,) * 16, pixels=picture(64),
    ),
    Architecture(
        "aria",
        dict(vision_config=vit("idefics3_vision"), image_token_index=IMAGE,
             text_config=text("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
             projector_patch_to_query_dict={4: 4}),
        linear="layers.2.self_attn.o_proj", pixels=picture(),
    ),
    Architecture(
        "granite4_vision",
        dict(vision_config=_CLIP | dict(hidden_size=64, patch_size=4), text_config=text(None),
             image_token_id=IMAGE,
             image_grid_pinpoints=[[16, 16]], qformer_config=qformer("blip_2_qformer"), downsample_rate="1/2",
             deepstack_layer_map=[(-2, 0), (-1, 3)], spatial_target_layers=[1, 2, 3, 3]),
        image=(IMAGE,) * 10, unused=2, pixels=picture(images=(1, 2), image_sizes=[[16, 16]]),
    ),
    Architecture(
        "lighton_ocr",
        dict(vision_config=_PIXTRAL, text_config=text("qwen3"), image_token_id=IMAGE, spatial_merge_size=2),
        image=(IMAGE,), pixels=picture(image_sizes=[[16, 16]]),
    ),
    Architecture(
        "janus",
        dict(vision_config=vit(None, mlp_ratio=1.5, projection_dim=WIDTH, depth=2),
             text_config=text("llama"), image_token_id=IMAGE,
             vq_config=dict(embed_dim=8, num_embeddings=16, latent_channels=8, base_channels=32,
                            channel_multiplier=[1, 1], num_res_blocks=1, num_patches=4,
                            image_token_embed_dim=WIDTH, projection_dim=WIDTH)),
        pixels=picture(),
    ),
    Architecture(
        "deepseek_vl",
        dict(vision_config=_SIGLIP, text_config=text("llama"), image_token_id=IMAGE),
        pixels=picture(),
    ),
    Architecture(
        "deepseek_vl_hybrid",
        dict(vision_config=_SIGLIP, text_config=text("llama"), image_token_id=IMAGE,
             high_res_vision_config=vit("sam_vision_model", output_channels=16, window_size=2,
                                        global_attn_indexes=[1], mlp_dim=24, image_size=32, patch_size=4)),
        pixels=lambda generator: {
            "pixel_values": torch.randn(1, 3, 16, 16, generator=generator),
            "high_res_pixel_values": torch.randn(1, 3, 32, 32, generator=generator),
        },
    ),
    Architecture(
        "fuyu",
        dict(text_config=text("persimmon"), image_token_id=IMAGE, image_size=16, patch_size=8,
             hidden_size=WIDTH,
             vocab_size=160),
        linear="layers.2.mlp.dense_h_to_4h",
        pixels=lambda generator: {"image_patches": torch.randn(1, 4, 192, generator=generator)},
    ),
    Architecture(
        "ovis2",
        dict(vision_config=vit("ovis2_vision", hidden_stride=1, vocab_size=24, num_visual_indicator_tokens=5),
             text_config=text("qwen2"), image_token_id=IMAGE, hidden_size=WIDTH, vocab_size=160,
             visual_indicator_token_ids=[155, 156, 157, 158, 159]),
        pixels=picture(),
    ),
    Architecture(
        "qianfan_ocr",
        dict(text_config=text("qwen3"), image_token_id=IMAGE, image_seq_length=4, downsample_ratio=0.5,
             vision_config=vit(None, image_size=[16, 16], patch_size=[4, 4])),
        pixels=picture(),
    ),
    Architecture(
        "lfm2_vl",
        dict(text_config=text("lfm2", layer_types=["conv", "full_attention"] * 2, block_multiple_of=8),
             vision_config=dict(model_type="siglip2_vision_model", hidden_size=16, intermediate_size=24,
                                num_hidden_layers=2, num_attention_heads=2, num_patches=16, patch_size=4,
                                vision_use_head=False),
             image_token_id=IMAGE, downsample_factor=2, projector_hidden_size=24),
        linear="layers.2.feed_forward.w1",
        pixels=lambda generator: {
            "pixel_values": torch.randn(1, 16, 48, generator=generator),
            "spatial_shapes": torch.tensor([[4, 4]]),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        },
    ),
    Architecture(
        "idefics2",
        dict(text_config=text("mistral"), vision_config=vit("idefics2_vision"), image_token_id=IMAGE,
             perceiver_config=dict(hidden_size=WIDTH, resampler_n_latents=4, resampler_depth=1,
                                   resampler_n_heads=2, resampler_head_dim=8, num_key_value_heads=1)),
        layers="model.text_model.layers", pixels=picture(images=(1, 1)),
    ),
    Architecture(
        "shieldgemma2",
        dict(text_config=text("gemma3_text", sliding_window=16, query_pre_attn_scalar=8,
                              layer_types=["sliding_attention", "full_attention"] * 2),
             vision_config=_SIGLIP, image_token_index=IMAGE, mm_tokens_per_image=4,
             boi_token_index=VISION_START, eoi_token_index=VISION_END),
        image=(VISION_START, *(IMAGE,) * 4, VISION_END), types="token_type_ids", pixels=picture(),
    ),
    Architecture(
        "emu3",
        dict(text_config=text("emu3_text_model"), image_token_id=IMAGE,
             vq_config=dict(codebook_size=16, embed_dim=4, latent_channels=4, base_channels=32,
                            channel_multiplier=[1, 1], num_res_blocks=1, attn_resolutions=[8], hidden_size=32,
                            num_attention_heads=2, temporal_downsample_factor=1),
             vocabulary_map={"<image>": IMAGE, "<|extra_200|>": VISION_END}
             | {f"<|visual token {i:06d}|>": 120 + i for i in range(16)}),
        # Eight lines of eight codes, each with an end.
        layers="model.text_model.layers", image=(IMAGE,) * 72, unused=None,
        pixels=picture(image_sizes=[[16, 16]]),
    ),
    Architecture(
        "chameleon",
        text(None) | dict(
            image_token_id=IMAGE,
            vq_config=dict(embed_dim=8, num_embeddings=16, latent_channels=8, base_channels=32, resolution=16,
                           channel_multiplier=[1, 1], num_res_blocks=1, attn_type="none"),
            vocabulary_map={"<image>": IMAGE} | {f"IMGIMG{i:02d}Z": 120 + i for i in range(16)}),
        layers="model.layers", image=(IMAGE,) * 64, unused=None, pixels=picture(),
    ),
    Architecture(
        "llama4",
        dict(text_config=text("llama4_text", intermediate_size_mlp=48, num_local_experts=2,
                              moe_layers=[1, 3], attn_temperature_tuning=False),
             vision_config=dict(hidden_size=16, intermediate_size=64, num_hidden_layers=2,
                                num_attention_heads=2,
                                image_size=16, patch_size=4, vision_output_dim=16, projector_input_dim=16,
                                projector_output_dim=16, pixel_shuffle_ratio=0.5),
             image_token_index=IMAGE, boi_token_index=VISION_START, eoi_token_index=VISION_END),
        layers="language_model.model.layers", linear="layers.2.feed_forward.up_proj", pixels=picture(),
        base_fails={"beams": "Image features and image tokens do not match"},
    ),
    Architecture(
        "instructblip+opt",
        dict(text_config=opt(), vision_config=vit("instructblip_vision_model"),
             qformer_config=qformer("instructblip_qformer"), num_query_tokens=4, image_token_index=IMAGE),
        layers="language_model.model.decoder.layers", linear="layers.2.fc1",
        pixels=picture(qformer_input_ids=[[4, 5, 6]], qformer_attention_mask=[[1, 1, 1]]),
    ),
    Architecture(
        "instructblipvideo",
        dict(text_config=text("llama"), vision_config=vit("instructblipvideo_vision_model"),
             qformer_config=qformer("instructblipvideo_qformer"), num_query_tokens=4,
             video_token_index=VIDEO),
        layers="language_model.model.layers", image=(VIDEO,) * 8, image_ids=(VIDEO,),
        pixels=picture(images=(1, 2), qformer_input_ids=[[4, 5, 6]], qformer_attention_mask=[[1, 1, 1]]),
    ),
    Architecture(
        "mllama",
        dict(text_config=text("mllama_text_model", cross_attention_layers=[3],
                              rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
             vision_config=dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                num_global_layers=1,
                                attention_heads=2, image_size=16, patch_size=8, vision_output_dim=32,
                                intermediate_layers_indices=[0], max_num_tiles=1,
                                supported_aspect_ratios=[[1, 1]]),
             image_token_index=IMAGE),
        image=(IMAGE,), image_ids=(), sees="text",
        pixels=picture(images=(1, 1, 1), aspect_ratio_ids=[[1]], aspect_ratio_mask=[[[1]]]),
        more=lambda ids: {"cross_attention_mask": torch.ones(*ids.shape, 1, 1, dtype=torch.long)},
        base_fails={"prompt lookup": "must match the size of tensor"},
    ),
    Architecture(
        "idefics",
        text(None) | dict(
            additional_vocab_size=0, cross_layer_interval=2, use_resampler=False,
            vision_config=dict(embed_dim=16, image_size=16, patch_size=8, num_hidden_layers=2,
                               num_attention_heads=2, intermediate_size=24)),
        layers="model.layers", image=(VISION_START,), image_ids=(), sees="text",
        pixels=picture(images=(1, 1)),
        more=lambda ids: {"image_attention_mask": torch.ones(*ids.shape, 1, dtype=torch.long)},
    ),
    Architecture(
        "kosmos-2",
        dict(text_config=dict(vocab_size=160, embed_dim=WIDTH, ffn_dim=48, layers=4, attention_heads=4,
                              max_position_embeddings=128, **SPECIAL),
             vision_config=vit(None), latent_query_num=4),
        layers="text_model.model.layers", linear="layers.2.ffn.fc1", image_ids=(), pixels=picture(),
        more=lambda ids: {"image_embeds_position_mask": (ids == IMAGE).long()},
        base_fails={"static cache": "must match the size of tensor"},
    ),
    Architecture(
        "kosmos-2.5",
        dict(text_config=dict(vocab_size=160, embed_dim=WIDTH, ffn_dim=48, layers=4, attention_heads=4,
                              max_position_embeddings=128, **SPECIAL),
             vision_config=dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                num_attention_heads=2,
                                head_dim=8, patch_embed_hidden_size=48, max_num_patches=16),
             latent_query_num=4),
        layers="text_model.model.layers", linear="layers.2.ffn.fc1", image_ids=(),
        pixels=lambda generator: {
            "flattened_patches": torch.cat(
                [torch.tensor([[[r + 1.0, c + 1.0] for r in range(2) for c in range(2)]]),
                 torch.randn(1, 4, 48, generator=generator)], dim=-1),
        },
        more=lambda ids: {"image_embeds_position_mask": (ids == IMAGE).long()},
    ),
)  # fmt: skip
