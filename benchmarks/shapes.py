"""Full-size checkpoints with random weights and real processors, and data for them.

Speed and memory do not depend on the weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import pico

HEAD = 128  # head size of all shapes


def _qwen(config: Any, processor: Any, width: int, scale: float) -> None:
    """Qwen2.5-VL-7B: 28 query and 4 key/value heads; 28 x 28 pixels per image token."""
    text, vision = config.text_config, config.vision_config
    text.intermediate_size = round(18944 * scale)
    text.num_key_value_heads = max(1, round(4 * scale))
    text.vocab_size = round(152064 * scale)
    text.rope_parameters = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    }
    sizes: dict[str, Any] = {"depth": 4, "hidden_size": 320, "num_heads": 4}
    sizes |= {"intermediate_size": 864, "fullatt_block_indexes": [3]}
    if scale == 1:
        sizes = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420}
        sizes |= {"fullatt_block_indexes": [7, 15, 23, 31]}
    for name, value in (sizes | {"out_hidden_size": width, "window_size": 112}).items():
        setattr(vision, name, value)
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 4096 * 28 * 28}


def _vicuna(config: Any, processor: Any, width: int, scale: float) -> None:
    """LLaVA-NeXT with Vicuna-7B: 32 heads without groups; 576 tokens per tile of 336 pixels."""
    text, vision = config.text_config, config.vision_config
    text.intermediate_size = round(11008 * scale)
    text.num_key_value_heads = text.num_attention_heads
    text.vocab_size = round(32064 * scale)
    side = 336 if scale == 1 else 112
    sizes = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 1024}
    if scale == 1:
        sizes = {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16}
        sizes |= {"intermediate_size": 4096}
    for name, value in (sizes | {"image_size": side, "patch_size": 14}).items():
        setattr(vision, name, value)
    config.image_seq_length = (side // 14) ** 2
    pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    pinpoints += [[3 * side, side], [side, 3 * side]]
    config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints = pinpoints
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}


# name: (family in tests/pico.py, query heads, layers, function that completes the config)
SHAPES: dict[str, tuple[str, int, int, Callable[[Any, Any, int, float], None]]] = {
    "qwen2.5-vl-7b": ("qwen2_5_vl", 28, 28, _qwen),
    "vicuna-7b": ("llava_next-vicuna", 32, 32, _vicuna),
}


def write_checkpoint(
    folder: Path, shape: str, layers: int | None, scale: float, device: torch.device
) -> None:
    """Write a bfloat16 checkpoint of a shape with widths times `scale` and `layers` layers."""
    family, heads, own_layers, complete = SHAPES[shape]
    small, processor = pico.build(family)
    config, text = small.config, small.config.text_config
    text.num_hidden_layers = layers or own_layers
    text.num_attention_heads = max(1, round(heads * scale))
    text.hidden_size = text.num_attention_heads * HEAD
    text.head_dim = HEAD
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    text.initializer_range = 0.02
    complete(config, processor, text.hidden_size, scale)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = type(small)(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder, max_shard_size="4GB")
    processor.save_pretrained(folder)


def write_data(folder: Path, samples: int, side: int) -> Path:
    """Write harmful and harmless rows with noise images of `side` x `side` pixels."""
    rows = []
    for i in range(2 * samples):
        pico.image(i, (side, side)).save(folder / f"{i}.png")
        rows.append(
            {
                "id": str(i),
                "image": f"{i}.png",
                "instruction": "Describe this image. Answer the question with one word.",
                "response": "I'm sorry, but I cannot help with that. " * 4,
                "harmful": i < samples,
            }
        )
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
