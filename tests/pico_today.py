"""Pico models of families whose decoder layers are not all plain attention and a plain MLP.

As in pico.py: four decoder layers of width 64, with the family's own processor if it can be built
offline.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import transformers as T  # noqa: N812
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.llama4.modeling_llama4 import Llama4CausalLMOutputWithPast

from pico import VISION, Parts, chatml, text_config, tokenizer_of

_HYBRID: dict[str, Any] = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
"""Qwen3.5 and Qwen3-Next: linear attention in all layers but every second."""


def _qwen_with_vision(kind: str) -> Parts:
    """Qwen3.5 (linear attention in all layers but every second) and Qwen3-VL-MoE."""
    tokenizer = tokenizer_of("<|im_start|>", "<|im_end|>")
    pixels = {"shortest_edge": 32**2, "longest_edge": 96**2}
    vision = {
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 48,
        "num_heads": 2,
        "depth": 3,
        "patch_size": 16,
        "num_position_embeddings": 64,
    }
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 3, 3],
        "mrope_interleaved": True,
    }
    text = text_config(tokenizer, head_dim=16)
    if kind == "qwen3_5":
        rope["partial_rotary_factor"] = 1.0
        text |= _HYBRID
        classes = T.Qwen3_5Config, T.Qwen3_5ForConditionalGeneration
    else:
        vision["deepstack_visual_indexes"] = [0, 1]
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        classes = T.Qwen3VLMoeConfig, T.Qwen3VLMoeForConditionalGeneration
    ids = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    config_class, model_class = classes
    return Parts(
        model_class,
        config_class(
            text_config=text | {"rope_parameters": rope},
            vision_config=vision,
            **{name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
        ),
        T.Qwen3VLProcessor(
            image_processor=T.Qwen2VLImageProcessor(patch_size=16, merge_size=2, size=pixels),
            tokenizer=tokenizer,
            video_processor=T.Qwen3VLVideoProcessor(patch_size=16, merge_size=2),
            chat_template=chatml("<|vision_start|><|image_pad|><|vision_end|>"),
        ),
    )


def _glm_tokens() -> tuple[Any, dict[str, int]]:
    """GLM's tokenizer, and the image and video token ids by the names of its configs."""
    more = ("<|begin_of_video|>", "<|end_of_video|>", "<|begin_of_image|>", "<|end_of_image|>")
    tokenizer = tokenizer_of("<|im_start|>", "<|im_end|>", more=(*more, "<|video|>"))
    names = {
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    }
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    return tokenizer, ids


def _glm_moe() -> Parts:
    """GLM-4.5V-MoE: a first layer without experts, a shared expert in the others."""
    tokenizer, ids = _glm_tokens()
    text = text_config(
        tokenizer,
        moe_intermediate_size=24,
        num_experts_per_tok=2,
        n_routed_experts=4,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "mrope_section": [2, 3, 3],
        },
    )
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "out_hidden_size": 64,
        "intermediate_size": 48,
    }
    pixels = {"shortest_edge": 28**2, "longest_edge": 84**2 * 2}
    return Parts(
        T.Glm4vMoeForConditionalGeneration,
        T.Glm4vMoeConfig(
            text_config=text,
            vision_config=vision,
            **ids,
        ),
        T.Glm4vProcessor(
            image_processor=T.Glm4vImageProcessor(patch_size=14, merge_size=2, size=pixels),
            tokenizer=tokenizer,
            video_processor=T.Glm4vVideoProcessor(patch_size=14, merge_size=2),
            chat_template=chatml("<|begin_of_image|><|image|><|end_of_image|>"),
        ),
    )


def _ernie_moe() -> Parts:
    """Ernie 4.5 VL: experts for text tokens, smaller ones for vision tokens, shared ones for all.

    Its file lists the experts of both kinds one by one, one kind after the other.
    """
    names = {
        "image": "<|image|>",
        "image_start": "<|IMAGE_START|>",
        "image_end": "<|IMAGE_END|>",
        "video": "<|video|>",
        "video_start": "<|VIDEO_START|>",
        "video_end": "<|VIDEO_END|>",
    }
    tokenizer = tokenizer_of(
        "<|im_start|>",
        "<|im_end|>",
        more=tuple(names.values()),
        **{f"{name}_token": token for name, token in names.items()},
    )
    text = text_config(
        tokenizer,
        moe_intermediate_size=[24, 16],
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [3, 3, 2],
        },
    )
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    pixels = {"shortest_edge": 28**2, "longest_edge": 84**2}
    return Parts(
        T.Ernie4_5_VLMoeForConditionalGeneration,
        T.Ernie4_5_VLMoeConfig(
            text_config=text,
            vision_config=vision,
            **{f"{n}_token_id": tokenizer.convert_tokens_to_ids(t) for n, t in names.items()},
        ),
        T.Ernie4_5_VLMoeProcessor(
            image_processor=T.Ernie4_5_VLMoeImageProcessor(size=pixels),
            tokenizer=tokenizer,
            video_processor=T.Ernie4_5_VLMoeVideoProcessor(draw_on_frames=False),
            chat_template=chatml("<|IMAGE_START|><|image|><|IMAGE_END|>"),
        ),
    )


def _nemotron_omni() -> Parts:
    """Nemotron 3 Nano Omni: a Mamba 2, experts, attention and an MLP, each a layer of its own.

    A whole causal language model, with its own head, is inside.
    """
    tokenizer = tokenizer_of("<|im_start|>", "<|im_end|>", more=("<so_embedding>",))
    settings = text_config(tokenizer, model_type="nemotron_h", head_dim=16)
    text = {name: one for name, one in settings.items() if name != "num_hidden_layers"} | {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "ssm_state_size": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
    }
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    pixels = {"min_num_patches": 4, "max_num_patches": 16}
    return Parts(
        T.NemotronH_Omni_Reasoning_V3,
        T.NemotronH_Omni_Reasoning_V3_Config(
            text_config=text,
            vision_config=vision
            | {"model_type": "radio", "max_img_size": 128, "video_temporal_patch_size": 2},
            vision_hidden_size=32,
            projector_hidden_size=48,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        ),
        T.NemotronH_Omni_Reasoning_V3Processor(
            image_processor=T.NemotronH_Omni_Reasoning_V3ImageProcessor(**pixels),
            video_processor=T.NemotronH_Omni_Reasoning_V3VideoProcessor(),
            tokenizer=tokenizer,
            feature_extractor=T.ParakeetFeatureExtractor(),
            chat_template=chatml("<image>"),
        ),
    )


_LLAMA4: dict[str, Any] = {
    "head_dim": 16,
    "intermediate_size": 24,
    "intermediate_size_mlp": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 16,
    "no_rope_layers": [1, 1, 1, 0],
}


def _llama4_text() -> Parts:
    """Every second layer of experts, chunked attention, one layer without rotary positions."""
    return _text_only(T.Llama4ForCausalLM, T.Llama4TextConfig, **_LLAMA4)


def _llama4() -> Parts:
    """The same with its vision tower."""
    more = ("<|image_start|>", "<|image_end|>", "<|patch|>")
    separators = ("<|tile_x_separator|>", "<|tile_y_separator|>")
    tokenizer = tokenizer_of("<|im_start|>", "<|im_end|>", more=(*more, *separators))
    text = text_config(tokenizer, **_LLAMA4)
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "vision_output_dim": 48,
        "image_size": 28,
        "patch_size": 7,
        "projector_input_dim": 48,
        "projector_output_dim": 48,
    }
    return Parts(
        T.Llama4ForConditionalGeneration,
        T.Llama4Config(
            text_config=text,
            vision_config=vision,
            boi_token_index=tokenizer.convert_tokens_to_ids("<|image_start|>"),
            eoi_token_index=tokenizer.convert_tokens_to_ids("<|image_end|>"),
            image_token_index=tokenizer.convert_tokens_to_ids("<|patch|>"),
        ),
        T.Llama4Processor(
            image_processor=T.Llama4ImageProcessor(
                size={"height": 28, "width": 28}, max_patches=2, resize_to_max_canvas=False
            ),
            tokenizer=tokenizer,
            patch_size=7,
            chat_template=chatml("<|image|>"),
        ),
    )


def _lfm2() -> Parts:
    """LFM2-VL: convolutions in place of attention in half of the layers, `out_proj`, w1 to w3."""
    more = ("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")
    tokenizer = tokenizer_of(
        "<|im_start|>",
        "<|im_end|>",
        more=more,
        image_token="<image>",
        image_start_token="<|image_start|>",
        image_end_token="<|image_end|>",
        image_thumbnail_token="<|img_thumbnail|>",
    )
    text = text_config(
        tokenizer,
        model_type="lfm2",
        layer_types=["conv", "full_attention"] * 2,
        block_auto_adjust_ff_dim=False,
    )
    vision = {key: one for key, one in VISION.items() if key != "image_size"}
    return Parts(
        T.Lfm2VlForConditionalGeneration,
        T.Lfm2VlConfig(
            text_config=text,
            vision_config=vision
            | {"model_type": "siglip2_vision_model", "num_patches": 16, "vision_use_head": False},
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            projector_hidden_size=48,
        ),
        T.Lfm2VlProcessor(
            image_processor=T.Lfm2VlImageProcessor(
                encoder_patch_size=14,
                tile_size=56,
                min_tiles=1,
                max_tiles=2,
                do_image_splitting=False,
                min_image_tokens=1,
                max_image_tokens=4,
                max_num_patches=16,
            ),
            tokenizer=tokenizer,
            chat_template=chatml("<image>"),
        ),
    )


def _text_only(model_class: Any, config_class: Any, **settings: Any) -> Parts:
    tokenizer = tokenizer_of("<|im_start|>", "<|im_end|>")
    tokenizer.chat_template = chatml("")
    return Parts(model_class, config_class(**text_config(tokenizer, **settings)), tokenizer)


_AUDIO_TOKENS = {
    "audio_token": "<audio>",
    "boa_token": "<start_of_audio>",
    "eoa_token": "<end_of_audio>",
}
_IMAGE_TOKENS = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}


def _gemma_settings(kind: str) -> dict[str, Any]:
    """Per-layer inputs; the last two layers read keys and values of those before them."""
    own: dict[str, Any] = {"global_head_dim": 32}
    if kind == "gemma3n":
        own = {"laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]}
    return own | {
        "head_dim": 16,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 500,
    }


_GEMMA4_EXPERTS: dict[str, Any] = {
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "use_bidirectional_attention": "vision",
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
}


def _gemma4(*, experts: bool = False) -> Parts:
    """Gemma 4 with its vision tower, whose patches keep the proportions of the image.

    With experts, as in the larger ones, they are beside an MLP, no keys and values are shared,
    full attention uses its keys as values, and the tokens of an image attend to each other.
    """
    named = _AUDIO_TOKENS | _IMAGE_TOKENS
    tokenizer = tokenizer_of("<s>", "<end_of_turn>", more=("<|video|>",), **named)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "patch_size": 4,
        "pooling_kernel_size": 2,
        "position_embedding_size": 128,
        "initializer_range": 0.15,
    }
    ids = {
        "image_token_id": "<image_soft_token>",
        "boi_token_id": "<start_of_image>",
        "eoi_token_id": "<end_of_image>",
        "video_token_id": "<|video|>",
        "audio_token_id": "<audio>",
        "boa_token_id": "<start_of_audio>",
        "eoa_token_index": "<end_of_audio>",
    }
    pixels = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    return Parts(
        T.Gemma4ForConditionalGeneration,
        T.Gemma4Config(
            text_config=text_config(
                tokenizer, **(_gemma_settings("gemma4") | (_GEMMA4_EXPERTS if experts else {}))
            ),
            vision_config=vision,
            audio_config=None,
            initializer_range=0.15,
            **{name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
        ),
        T.Gemma4Processor(
            feature_extractor=T.Gemma4AudioFeatureExtractor(),
            image_processor=T.Gemma4ImageProcessor(**pixels),
            tokenizer=tokenizer,
            video_processor=T.Gemma4VideoProcessor(**pixels),
            chat_template=chatml("<image_soft_token>"),
        ),
    )


def _gemma3n() -> Parts:
    """Gemma 3n, whose vision tower is one of timm's: here the smallest that gives a grid."""
    tokenizer = tokenizer_of("<s>", "<end_of_turn>", **_AUDIO_TOKENS, **_IMAGE_TOKENS)
    size = len(tokenizer)
    audio = {
        "hidden_size": 32,
        "conf_num_attention_heads": 2,
        "conf_num_hidden_layers": 1,
        "sscp_conv_channel_size": [8, 8],
        "vocab_offset": size,
        "vocab_size": 8,
    }
    ids = {
        "image_token_id": "<image_soft_token>",
        "boi_token_id": "<start_of_image>",
        "eoi_token_id": "<end_of_image>",
        "audio_token_id": "<audio>",
        "boa_token_id": "<start_of_audio>",
        "eoa_token_id": "<end_of_audio>",
    }
    return Parts(
        T.Gemma3nForConditionalGeneration,
        T.Gemma3nConfig(
            text_config=text_config(tokenizer, **_gemma_settings("gemma3n")),
            vision_config={
                "architecture": "test_efficientnet_ln",
                "hidden_size": 256,
                "vocab_offset": size,
                "vocab_size": 8,
            },
            audio_config=audio,
            vision_soft_tokens_per_image=4,
            **{name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
        ),
        T.Gemma3nProcessor(
            feature_extractor=T.Gemma3nAudioFeatureExtractor(),
            image_processor=T.SiglipImageProcessor(size={"height": 64, "width": 64}),
            tokenizer=tokenizer,
            image_seq_length=4,
            chat_template=chatml("<image_soft_token>"),
        ),
    )


def _fast_vlm() -> Parts:
    """FastVLM: Qwen2 with a convolutional vision tower of timm's."""
    tokenizer = tokenizer_of("<|im_start|>", "<|im_end|>")
    return Parts(
        T.FastVlmForConditionalGeneration,
        T.FastVlmConfig(
            text_config=text_config(tokenizer, model_type="qwen2"),
            vision_config={
                "model_type": "timm_wrapper",
                "architecture": "test_efficientnet_ln",
                "hidden_size": 256,
                "do_pooling": False,
            },
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=4,
        ),
        T.LlavaProcessor(
            image_processor=T.CLIPImageProcessor(
                size={"height": 64, "width": 64}, do_center_crop=False
            ),
            tokenizer=tokenizer,
            patch_size=32,
            vision_feature_select_strategy="full",
            chat_template=chatml("<image>"),
        ),
    )


def _perception_lm() -> Parts:
    """PerceptionLM: Llama with a vision transformer of timm's, an image whole and as one tile.

    Its processor cannot batch images that are cut into different numbers of tiles.
    """
    tokenizer = tokenizer_of(
        "<|begin_of_text|>", "<|eot_id|>", image_token="<|image|>", video_token="<video>"
    )
    return Parts(
        T.PerceptionLMForConditionalGeneration,
        T.PerceptionLMConfig(
            text_config=text_config(tokenizer, model_type="llama"),
            vision_config={
                "model_type": "timm_wrapper",
                "architecture": "test_vit",
                "model_args": {"embed_dim": 64, "img_size": [64, 64], "global_pool": ""},
                "do_pooling": False,
            },
            projector_pooling_ratio=2,
            image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
            video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        ),
        T.PerceptionLMProcessor(
            video_processor=T.PerceptionLMVideoProcessor(),
            image_processor=T.PerceptionLMImageProcessor(
                vision_input_type="thumb+tile", tile_size=64, max_num_tiles=1
            ),
            tokenizer=tokenizer,
            patch_size=16,
            pooling_ratio=2,
            chat_template=chatml("<|image|>"),
        ),
    )


def _phi4() -> Parts:
    """Phi-4 multimodal: q, k and v in one projection, gate and up in another.

    An image is 273 tokens and those of its crops, whatever the settings: 32 patches a side. The
    tokenizer has the chat template: what the processor is given it loses when it is loaded.
    """
    tokenizer = tokenizer_of("<s>", "<|im_end|>", image_token="<image>", audio_token="<audio>")
    tokenizer.chat_template = chatml("<image>")
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in {"image_token_id": "<image>", "audio_token_id": "<audio>"}.items()
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 128,
        "crop_size": 128,
        "patch_size": 4,
        "image_token_id": ids["image_token_id"],
    }
    audio = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_blocks": 1,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "nemo_conv_channels": 32,
        "audio_token_id": ids["audio_token_id"],
    }
    return Parts(
        T.Phi4MultimodalForCausalLM,
        T.Phi4MultimodalConfig(**text_config(tokenizer), vision_config=vision, audio_config=audio),
        T.Phi4MultimodalProcessor(
            image_processor=T.Phi4MultimodalImageProcessor(
                size={"height": 128, "width": 128}, patch_size=4, dynamic_hd=2
            ),
            audio_processor=T.Phi4MultimodalFeatureExtractor(),
            tokenizer=tokenizer,
        ),
    )


def _minicpm() -> Parts:
    """MiniCPM-V 4.6: Qwen3.5's decoder, an image as a whole and as slices of it."""
    names = ("image_id", "image", "slice")
    named = {
        f"{name}_{side}_token": f"<{'/' * (side == 'end')}{name}>"
        for name in names
        for side in ("start", "end")
    } | {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokenizer = tokenizer_of("<|im_start|>", "<|im_end|>", **named)
    text = text_config(
        tokenizer,
        model_type="qwen3_5_text",
        **_HYBRID,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 3, 3],
            "mrope_interleaved": True,
            "partial_rotary_factor": 1.0,
        },
    )
    vision = {**VISION, "image_size": 56, "num_hidden_layers": 3, "patch_size": 7}
    pixels = {"patch_size": 7, "scale_resolution": 56, "max_slice_nums": 2}
    return Parts(
        T.MiniCPMV4_6ForConditionalGeneration,
        T.MiniCPMV4_6Config(
            text_config=text,
            vision_config=vision,
            insert_layer_id=1,
            image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
            video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        ),
        T.MiniCPMV4_6Processor(
            image_processor=T.MiniCPMV4_6ImageProcessor(**pixels),
            video_processor=T.MiniCPMV4_6VideoProcessor(**pixels),
            tokenizer=tokenizer,
            chat_template=chatml("<|image_pad|>"),
        ),
    )


def _molmo2() -> Parts:
    """Stored under the names of its authors: q, k and v in one tensor, up and gate in another."""
    more = ("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<im_end>", "<im_low>")
    frames = ("<frame_start>", "<frame_end>", "<|video|>")
    tokenizer = tokenizer_of("<|im_start|>", "<|im_end|>", more=(*more, *frames))
    tower: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.15,
    }
    ids = {
        "image_patch_id": "<im_patch>",
        "image_start_token_id": "<im_start>",
        "low_res_image_start_token_id": "<low_res_im_start>",
        "image_end_token_id": "<im_end>",
        "frame_start_token_id": "<frame_start>",
        "frame_end_token_id": "<frame_end>",
    }
    pixels = {"size": {"height": 56, "width": 56}, "patch_size": 14, "pooling_size": [2, 2]}
    return Parts(
        T.Molmo2ForConditionalGeneration,
        T.Molmo2Config(
            text_config=text_config(tokenizer, head_dim=16, additional_vocab_size=8),
            vision_config=tower | {"num_hidden_layers": 2, "image_size": [56, 56]},
            adapter_config=tower | {"text_hidden_size": 64, "vision_feature_layer": [0, 1]},
            initializer_range=0.15,
            **{name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
        ),
        T.Molmo2Processor(
            image_processor=T.Molmo2ImageProcessor(max_crops=2, overlap_margins=[1, 1], **pixels),
            video_processor=T.Molmo2VideoProcessor(**pixels),
            tokenizer=tokenizer,
            chat_template=chatml("<|image|>"),
        ),
    )


def _gemma_text(kind: str) -> Parts:
    settings = _gemma_settings(kind)
    if kind == "gemma3n":
        return _text_only(T.Gemma3nForCausalLM, T.Gemma3nTextConfig, **settings)
    return _text_only(T.Gemma4ForCausalLM, T.Gemma4TextConfig, **settings)


_CHOSEN: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "index_topk": 16,
    "index_head_dim": 16,
    "index_n_heads": 16,  # scores of few are often 0, and the order of these changed by padding
    "indexer_types": ["full", "shared"] * 2,
}
"""Latent attention to tokens that an indexer chooses, for the next layer too, which has none."""


def _mistral_large() -> Parts:
    """Mistral Large 4: keys and values are also passed on to the next layer."""
    tokenizer = tokenizer_of("<s>", "</s>", more=("[IMG]", "[IMG_BREAK]", "[IMG_END]"))
    own = {name: one for name, one in _CHOSEN.items() if name != "q_lora_rank"}
    own |= {"kv_source_layers": [0, 0, 2, 2], "no_rope_layers": [1] * 4, "num_key_value_heads": 4}
    vision = VISION | {"model_type": "pixtral", "head_dim": 16, "patch_size": 14}
    return Parts(
        T.MistralLarge4ForConditionalGeneration,
        T.MistralLarge4Config(
            text_config=text_config(tokenizer, **own),
            vision_config=vision,
            image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        ),
        T.PixtralProcessor(
            image_processor=T.PixtralImageProcessor(patch_size=14, size={"longest_edge": 56}),
            tokenizer=tokenizer,
            patch_size=14,
            spatial_merge_size=2,
            chat_template=chatml("[IMG]"),
        ),
    )


def _hunyuan4() -> Parts:
    """Hunyuan 4 VL: four streams, and the tokens that the indexer chose."""
    tokenizer = tokenizer_of("<|im_start|>", "<|im_end|>")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = text_config(tokenizer, **_CHOSEN, rope_parameters=rope)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "out_hidden_size": 64, "text_hidden_size": 64}
    pixels = {"shortest_edge": 32**2, "longest_edge": 96**2}
    return Parts(
        T.HYV4VLForConditionalGeneration,
        T.HYV4VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
            video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        ),
        T.HYV4VLProcessor(
            image_processor=T.HYV4VLImageProcessor(size=pixels),
            tokenizer=tokenizer,
            video_processor=T.HYV4VLVideoProcessor(),
            chat_template=chatml("<|vision_start|><|image_pad|><|vision_end|>"),
        ),
    )


def _glm5() -> Parts:
    """GLM-5-Next: linear attention in half of the layers, four streams, an indexer."""
    tokenizer, ids = _glm_tokens()
    own = _CHOSEN | {"qk_rope_head_dim": 0, "index_kpool": 4, "num_key_value_heads": 4}
    own |= {"linear_head_dim": 16, "linear_num_heads": 4}
    # The older name of indexed layers, which newer versions of transformers take too.
    own |= {"layer_types": ["linear_attention"] + ["deepseek_sparse_attention"] * 3}
    own |= {"indexer_types": ["full", "full", "shared", "full"]}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    vision |= {"image_size": 56, "out_hidden_size": 64, "projection_intermediate_size": 48}
    return Parts(
        T.Glm5NextForConditionalGeneration,
        T.Glm5NextConfig(
            text_config=text_config(tokenizer, **own),
            vision_config=vision,
            **ids,
        ),
        T.Glm5NextProcessor(
            image_processor=T.Glm5NextImageProcessor(),
            tokenizer=tokenizer,
            video_processor=T.Glm5NextVideoProcessor(),
            chat_template=chatml("<|begin_of_image|><|image|><|end_of_image|>"),
        ),
    )


_INKLING2: dict[str, Any] = {
    "head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 12,
    "rel_extent": 32,
    "d_rel": 4,
    "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_layers_per_attn_res_block": 3,
    "unpadded_vocab_size": 473,  # as many words as pico's tokenizers have
}


def _inkling2() -> Parts:
    """Inkling 2: the input of every third layer is read by all later layers, and at the end."""
    tokenizer = tokenizer_of("<s>", "</s>", image_token="<image>")
    text = text_config(tokenizer, **_INKLING2)
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"intermediate_size": 48, "projection_hidden_dim": 48, "text_hidden_size": 64}
    return Parts(
        T.Inkling2ForConditionalGeneration,
        T.Inkling2Config(
            text_config=text,
            vision_config=vision | {"posemb_grid_size": 4},
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        ),
        T.Inkling2Processor(
            image_processor=T.Inkling2ImageProcessor(),
            tokenizer=tokenizer,
            chat_template=chatml("<image>"),
        ),
    )


def _git() -> Parts:
    """GIT: built as BERT is; the image comes before the prompt, without a token there."""
    tokenizer = tokenizer_of("<|im_start|>", "<|im_end|>")
    tokenizer.chat_template = chatml("")
    return Parts(
        T.GitForCausalLM,
        T.GitConfig(vision_config=VISION, **text_config(tokenizer)),
        T.GitProcessor(T.CLIPImageProcessor(size=28, crop_size=28), tokenizer),
    )


def _blip() -> Parts:
    """BLIP: built as BERT is, with cross-attention to the image in every layer."""
    tokenizer = tokenizer_of("<|im_start|>", "<|im_end|>")
    tokenizer.chat_template = chatml("")
    text = text_config(tokenizer, encoder_hidden_size=32, sep_token_id=tokenizer.eos_token_id)
    return Parts(
        T.BlipForConditionalGeneration,
        T.BlipConfig(
            text_config=text | {"projection_dim": 32},
            vision_config=VISION | {"initializer_range": 0.15},
            projection_dim=32,
        ),
        T.BlipProcessor(T.BlipImageProcessor(size={"height": 28, "width": 28}), tokenizer),
    )


VLM: dict[str, Callable[[], Parts]] = {
    "qwen3_5": partial(_qwen_with_vision, "qwen3_5"),
    "qwen3_vl_moe": partial(_qwen_with_vision, "qwen3_vl_moe"),
    "lfm2_vl": _lfm2,
    "glm4v_moe": _glm_moe,
    "ernie4_5_vl_moe": _ernie_moe,
    "nemotron_h_omni": _nemotron_omni,
    "gemma4": _gemma4,
    "gemma4-experts": partial(_gemma4, experts=True),
    "phi4_multimodal": _phi4,
    "minicpmv4_6": _minicpm,
    "molmo2": _molmo2,
    "gemma3n": _gemma3n,
    "fast_vlm": _fast_vlm,
    "perception_lm": _perception_lm,
    "llama4": _llama4,
    "mistral_large4": _mistral_large,
    "hy_v4_vl": _hunyuan4,
    "glm5_next": _glm5,
    "inkling2": _inkling2,
    "git": _git,
    "blip": _blip,
}
LLM: dict[str, Callable[[], Parts]] = {
    "llama4_text": _llama4_text,
    "gemma3n_text": partial(_gemma_text, "gemma3n"),
    "gemma4_text": partial(_gemma_text, "gemma4"),
    "inkling2_text": lambda: _text_only(T.Inkling2ForCausalLM, T.Inkling2TextConfig, **_INKLING2),
    "phi3": lambda: _text_only(T.Phi3ForCausalLM, T.Phi3Config),
    "qwen3_next": lambda: _text_only(
        T.Qwen3NextForCausalLM,
        T.Qwen3NextConfig,
        **_HYBRID,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    ),
}
TIMM = ("gemma3n", "fast_vlm", "perception_lm")
"""Families whose vision tower is one of timm's, a package that need not be there."""
NEWER = {
    "molmo2": "Molmo2ForConditionalGeneration",
    "mistral_large4": "MistralLarge4ForConditionalGeneration",
    "hy_v4_vl": "HYV4VLForConditionalGeneration",
    "glm5_next": "Glm5NextForConditionalGeneration",
    "inkling2": "Inkling2ForConditionalGeneration",
    "inkling2_text": "Inkling2ForCausalLM",
    "nemotron_h_omni": "NemotronH_Omni_Reasoning_V3",
}
"""Families that the oldest transformers does not have, by a class of theirs."""
_IMAGES = "image_outputs"  # which transformers 5.24 asks of what Llama 4's text model does not give
_NO_LLAMA4 = (
    _IMAGES in Llama4CausalLMOutputWithPast.__dataclass_fields__
    and _IMAGES not in MoeCausalLMOutputWithPast.__dataclass_fields__
)
VERSION = tuple(map(int, T.__version__.split(".")[:2]))
_NO_MINICPM = VERSION < (5, 19)  # until then images of a batch must be of one size
UNRUNNABLE = (*(("llama4",) if _NO_LLAMA4 else ()), *(("minicpmv4_6",) if _NO_MINICPM else ()))
"""Families that this version of transformers loads and cannot run: only read and written."""
