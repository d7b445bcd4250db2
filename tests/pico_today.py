"""Pico models of families whose decoder layers are not all plain attention and a plain MLP.

As in pico.py: four decoder layers of width 64 behind the family's own processor where one can be
built offline.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import transformers as T  # noqa: N812

from pico import Parts, chatml, text_config, tokenizer_of


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
        text |= {
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        }
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


VLM: dict[str, Callable[[], Parts]] = {
    "qwen3_5": partial(_qwen_with_vision, "qwen3_5"),
    "qwen3_vl_moe": partial(_qwen_with_vision, "qwen3_vl_moe"),
}
LLM: dict[str, Callable[[], Parts]] = {}
