"""Pico models: every supported family, randomly initialised, with its real processor, offline.

A pico model has four decoder layers (Mllama five, two of them cross-attention) of width 64 with
four heads, two key-value groups where the family uses GQA, and 0.2-0.4 M parameters. Tokenizer and
chat template are ours; image processor, processor and modelling code are the family's own.

Nothing is left at an initial value that hides a code path: gates, biases, norm gains and Gemma3's
zero-initialised projector are randomised, so that the image always reaches the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers as T  # noqa: N812
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from regraft.data.example import Example

_CORPUS = [
    "What is in the picture? Answer with one word: yes, no, red, green, blue, two cats, a dog.",
    "user assistant system Describe this image. The image shows a small house near the river.",
    "You are a helpful assistant. Question: how many apples are there? Answer: seven.",
    "I'm sorry, but I cannot help with that. Sure, here are three items for the list.",
] * 4

_SPECIALS = [
    *("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    *("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<end_of_utterance>"),
    *("<image>", "<video>", "<|image|>", "<|image_pad|>", "<|video_pad|>"),
    *("<|vision_start|>", "<|vision_end|>", "<img>", "</img>", "<IMG_CONTEXT>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    *("<fake_token_around_image>", "<global-img>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]

_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
    "rms_norm_eps": 1e-6,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_CLIP = {
    **VISION,
    "model_type": "clip_vision_model",
    "num_hidden_layers": 3,
    "projection_dim": 32,
}
_SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}


class Parts(NamedTuple):
    model_class: Any
    config: Any
    processor: Any


# Tokenizers and chat templates


@cache
def _bpe(specials: tuple[str, ...]) -> str:
    """Train a byte-level BPE with the given special tokens; return it as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(specials),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer.to_str()


def tokenizer_of(
    bos: str, eos: str, *, last: str | None = None, more: tuple[str, ...] = (), **named: str
) -> Any:
    """Make a left-padding tokenizer; `named` special tokens become attributes of it.

    `last` gets the highest id (Mllama's image token must lie just past the model's vocabulary);
    `more` are special tokens besides those that all have.
    """
    backend = Tokenizer.from_str(_bpe(tuple(s for s in (*_SPECIALS, *more) if s != last)))
    if last:
        backend.add_special_tokens([AddedToken(last, special=True, normalized=False)])
    return T.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens=named,
        model_max_length=4096,
    )


def _template(
    image: str,
    user: str,
    assistant: str,
    end: str,
    *,
    end_user: str,
    bos: str = "",
    after: str = "",
) -> str:
    """Write a chat template with `{% generation %}` around each answer and its `end` token."""
    text = "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    text += f"{{% if c.type == 'image' %}}{image}{{% else %}}{{{{ c.text }}}}{{% endif %}}"
    text += "{% endfor %}{% endif %}"
    return (
        f"{bos}{{% for m in messages %}}{{% if m.role == 'assistant' %}}{assistant}"
        f"{{% generation %}}{text}{end}{{% endgeneration %}}{after}"
        f"{{% else %}}{user}{text}{end_user}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{assistant}{{% endif %}}"
    )


_BOS = "{{ bos_token }}"
_NEWLINE = "{{ '\\n' }}"  # Jinja drops a bare line break after a block


def chatml(image: str) -> str:
    user, assistant = (f"<|im_start|>{role}\n" for role in ("user", "assistant"))
    return _template(image, user, assistant, "<|im_end|>", end_user="<|im_end|>\n", after=_NEWLINE)


def _llama3(image: str) -> str:
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    user, assistant = header.format("user"), header.format("assistant")
    return _template(image, user, assistant, "<|eot_id|>", end_user="<|eot_id|>", bos=_BOS)


def _mistral(image: str) -> str:
    return _template(image, "[INST] ", " ", "</s>", end_user=" [/INST]", bos=_BOS)


def _vicuna(image: str) -> str:
    return _template(image, "USER: ", "ASSISTANT: ", "</s>", end_user=" ", bos=_BOS)


def _smol(image: str) -> str:
    end = "<end_of_utterance>"
    user, assistant = "<|im_start|>User:", "Assistant: "
    return _template(image, user, assistant, end, end_user=f"{end}\n", after=_NEWLINE)


def _gemma(image: str) -> str:
    user, assistant = (f"<start_of_turn>{role}\n" for role in ("user", "model"))
    end = "<end_of_turn>"
    return _template(image, user, assistant, end, end_user=f"{end}\n", after=_NEWLINE, bos=_BOS)


def text_config(tokenizer: Any, **settings: Any) -> dict[str, Any]:
    return {
        **_TEXT,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **settings,
    }


# Families


def _qwen_vl(kind: str) -> Parts:
    tokenizer = tokenizer_of("<|im_start|>", "<|im_end|>")
    patch = 16 if kind == "qwen3_vl" else 14
    pixels = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (6 * patch) ** 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision: dict[str, Any]
    if kind == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
        classes = T.Qwen2VLProcessor, T.Qwen2VLConfig, T.Qwen2VLForConditionalGeneration
    else:
        vision = {
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 48,
            "num_heads": 2,
        }
        if kind == "qwen2_5_vl":
            vision |= {"depth": 2, "window_size": 56, "fullatt_block_indexes": [1]}
            classes = (
                T.Qwen2_5_VLProcessor,
                T.Qwen2_5_VLConfig,
                T.Qwen2_5_VLForConditionalGeneration,
            )
        else:
            vision |= {"depth": 3, "patch_size": 16, "num_position_embeddings": 64}
            vision |= {"deepstack_visual_indexes": [0, 1]}
            rope |= {"mrope_interleaved": True}
            classes = T.Qwen3VLProcessor, T.Qwen3VLConfig, T.Qwen3VLForConditionalGeneration
    processor_class, config_class, model_class = classes
    video_class = T.Qwen3VLVideoProcessor if kind == "qwen3_vl" else T.Qwen2VLVideoProcessor
    text = text_config(tokenizer, rope_parameters=rope)
    if kind == "qwen3_vl":
        text["head_dim"] = 16
    return Parts(
        model_class,
        config_class(
            text_config=text,
            vision_config=vision,
            image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
            video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
            vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
            vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        ),
        processor_class(
            image_processor=T.Qwen2VLImageProcessor(patch_size=patch, merge_size=2, size=pixels),
            tokenizer=tokenizer,
            video_processor=video_class(patch_size=patch, merge_size=2),
            chat_template=chatml("<|vision_start|><|image_pad|><|vision_end|>"),
        ),
    )


def _llava() -> Parts:
    tokenizer = tokenizer_of("<s>", "</s>")
    square = {"height": 28, "width": 28}
    return Parts(
        T.LlavaForConditionalGeneration,
        T.LlavaConfig(
            text_config=text_config(tokenizer, model_type="llama"),
            vision_config=_CLIP,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=4,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        ),
        T.LlavaProcessor(
            image_processor=T.CLIPImageProcessor(size=square, do_center_crop=False),
            tokenizer=tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,  # CLIP's class token
            chat_template=_vicuna("<image>\n"),
        ),
    )


def _llava_next(backbone: str) -> Parts:
    llama3 = backbone == "llama3"
    tokenizer = (
        tokenizer_of("<|begin_of_text|>", "<|eot_id|>") if llama3 else tokenizer_of("<s>", "</s>")
    )
    template = {"llama3": _llama3, "mistral": _mistral, "vicuna": _vicuna}[backbone]
    settings: dict[str, Any] = {
        "llama3": {"model_type": "llama"},
        "vicuna": {"model_type": "llama", "num_key_value_heads": 4},
        "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    }[backbone]
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    return Parts(
        T.LlavaNextForConditionalGeneration,
        T.LlavaNextConfig(
            text_config=text_config(tokenizer, **settings),
            vision_config=_CLIP,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_grid_pinpoints=pinpoints,
            image_seq_length=4,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        ),
        T.LlavaNextProcessor(
            image_processor=T.LlavaNextImageProcessor(
                size={"shortest_edge": 28},
                crop_size={"height": 28, "width": 28},
                image_grid_pinpoints=pinpoints,
            ),
            tokenizer=tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template("<image>\n"),
        ),
    )


def _mllama() -> Parts:
    tokenizer = tokenizer_of("<|begin_of_text|>", "<|eot_id|>", last="<|image|>")
    image_id = tokenizer.convert_tokens_to_ids("<|image|>")  # logits [.., image_id], embedding + 8
    return Parts(
        T.MllamaForConditionalGeneration,
        T.MllamaConfig(
            text_config=text_config(
                tokenizer,
                num_hidden_layers=5,
                cross_attention_layers=[1, 3],
                vocab_size=image_id,
            ),
            vision_config={
                "hidden_size": 32,
                "num_hidden_layers": 3,
                "num_global_layers": 1,
                "attention_heads": 2,
                "intermediate_size": 48,
                "image_size": 28,
                "patch_size": 14,
                "intermediate_layers_indices": [0, 1],
                "vision_output_dim": 96,
                "max_num_tiles": 4,
            },
            image_token_index=image_id,
        ),
        T.MllamaProcessor(
            image_processor=T.MllamaImageProcessor(
                size={"height": 28, "width": 28}, max_image_tiles=4
            ),
            tokenizer=tokenizer,
            chat_template=_llama3("<|image|>"),
        ),
    )


def _idefics(kind: str) -> Parts:
    tokenizer = tokenizer_of(
        "<|im_start|>",
        "<end_of_utterance>",
        fake_image_token="<fake_token_around_image>",
        image_token="<image>",
        end_of_utterance_token="<end_of_utterance>",
        global_image_token="<global-img>",
    )
    pixels: dict[str, Any] = {
        "size": {"longest_edge": 112},
        "max_image_size": {"longest_edge": 56},
        "return_row_col_info": True,
    }
    config = {
        "text_config": text_config(tokenizer, model_type="llama"),
        "vision_config": {**VISION, "image_size": 56},
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "scale_factor": 2,
    }
    processor = {
        "tokenizer": tokenizer,
        "image_seq_len": (56 // 14 // 2) ** 2,
        "chat_template": _smol("<image>"),
    }
    if kind == "idefics3":
        return Parts(
            T.Idefics3ForConditionalGeneration,
            T.Idefics3Config(**config),
            T.Idefics3Processor(image_processor=T.Idefics3ImageProcessor(**pixels), **processor),
        )
    return Parts(
        T.SmolVLMForConditionalGeneration,
        T.SmolVLMConfig(**config),
        T.SmolVLMProcessor(
            image_processor=T.SmolVLMImageProcessor(**pixels),
            video_processor=T.SmolVLMVideoProcessor(),
            **processor,
        ),
    )


def _gemma3() -> Parts:
    tokenizer = tokenizer_of(
        "<s>",
        "<end_of_turn>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    return Parts(
        T.Gemma3ForConditionalGeneration,
        T.Gemma3Config(
            text_config=text_config(
                tokenizer,
                head_dim=16,
                query_pre_attn_scalar=16,
                sliding_window=12,
                layer_types=["sliding_attention", "full_attention"] * 2,
            ),
            vision_config={**_SIGLIP, "image_size": 56},
            mm_tokens_per_image=4,
            boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
            eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
            image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        ),
        T.Gemma3Processor(
            image_processor=T.Gemma3ImageProcessor(size={"height": 56, "width": 56}),
            tokenizer=tokenizer,
            image_seq_length=4,
            chat_template=_gemma("<start_of_image>"),
        ),
    )


def _internvl() -> Parts:
    tokenizer = tokenizer_of(
        "<|im_start|>",
        "<|im_end|>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    return Parts(
        T.InternVLForConditionalGeneration,
        T.InternVLConfig(
            text_config=text_config(tokenizer, model_type="qwen2"),
            vision_config={**VISION, "image_size": [56, 56], "patch_size": [14, 14]},
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            image_seq_length=4,
            downsample_ratio=0.5,
        ),
        T.InternVLProcessor(
            image_processor=T.GotOcr2ImageProcessor(
                size={"height": 56, "width": 56}, min_patches=1, max_patches=3
            ),
            tokenizer=tokenizer,
            video_processor=T.InternVLVideoProcessor(),
            image_seq_length=4,
            chat_template=chatml("<IMG_CONTEXT>\n"),
        ),
    )


def _llava_onevision() -> Parts:
    tokenizer = tokenizer_of("<|im_start|>", "<|im_end|>")
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    return Parts(
        T.LlavaOnevisionForConditionalGeneration,
        T.LlavaOnevisionConfig(
            text_config=text_config(tokenizer, model_type="qwen2"),
            vision_config=_SIGLIP,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
            image_grid_pinpoints=pinpoints,
        ),
        T.LlavaOnevisionProcessor(
            image_processor=T.LlavaOnevisionImageProcessor(
                size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
            ),
            tokenizer=tokenizer,
            video_processor=T.LlavaOnevisionVideoProcessor(),
            num_image_tokens=4,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_9",
            chat_template=chatml("<image>"),
        ),
    )


def _text_only(model_class: Any, config_class: Any, **settings: Any) -> Parts:
    tokenizer = tokenizer_of("<|im_start|>", "<|im_end|>")
    tokenizer.chat_template = chatml("")
    return Parts(model_class, config_class(**text_config(tokenizer, **settings)), tokenizer)


_VLM: dict[str, Callable[[], Parts]] = {
    "qwen2_vl": partial(_qwen_vl, "qwen2_vl"),
    "qwen2_5_vl": partial(_qwen_vl, "qwen2_5_vl"),
    "qwen3_vl": partial(_qwen_vl, "qwen3_vl"),
    "llava": _llava,
    "llava_next-mistral": partial(_llava_next, "mistral"),
    "llava_next-vicuna": partial(_llava_next, "vicuna"),
    "llava_next-llama3": partial(_llava_next, "llama3"),
    "mllama": _mllama,
    "idefics3": partial(_idefics, "idefics3"),
    "smolvlm": partial(_idefics, "smolvlm"),
    "gemma3": _gemma3,
    "internvl": _internvl,
    "llava_onevision": _llava_onevision,
}
_LLM: dict[str, Callable[[], Parts]] = {
    "llama": lambda: _text_only(T.LlamaForCausalLM, T.LlamaConfig),
    "qwen2": lambda: _text_only(T.Qwen2ForCausalLM, T.Qwen2Config),
    "qwen3": lambda: _text_only(T.Qwen3ForCausalLM, T.Qwen3Config, head_dim=16),
    "mistral_sw": lambda: _text_only(
        T.MistralForCausalLM, T.MistralConfig, sliding_window=8, head_dim=16
    ),
}

VLM_FAMILIES = tuple(_VLM)
TEXT_FAMILIES = tuple(_LLM)
FAMILIES = VLM_FAMILIES + TEXT_FAMILIES
PAPER_FAMILIES = (
    "qwen2_vl",
    "qwen2_5_vl",
    "llava_next-mistral",
    "llava_next-vicuna",
    "llava_next-llama3",
    "mllama",
)


# Models and data


def _parts(name: str) -> Parts:
    import pico_today  # which builds upon this module

    needed = pico_today.NEWER.get(name)
    if needed is not None and not hasattr(T, needed):
        pytest.skip(f"transformers {T.__version__} has no {needed}")
    more = pico_today.VLM | pico_today.LLM
    return (_VLM | _LLM | more)[name]()


def sees(name: str) -> bool:
    """Whether a family takes images."""
    import pico_today

    return name in _VLM or name in pico_today.VLM


def processor(name: str) -> Any:
    """Return the processor alone (text-only: the tokenizer)."""
    return _parts(name).processor


def build(name: str, seed: int = 0) -> tuple[Any, Any]:
    """Return a fresh float32 model in eval mode and its processor (text-only: its tokenizer).

    The same `seed` gives the same weights.
    """
    parts = _parts(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = parts.model_class(parts.config).eval()
        _randomise_constants(model.named_parameters())
        if name.startswith("gemma3n"):  # whose norms of zero vectors have no gradient
            model.get_input_embeddings().weight.data[
                parts.config.get_text_config().pad_token_id
            ].normal_(0, 0.1)
    return model, parts.processor


@torch.no_grad()
def _randomise_constants(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Move gates, biases, norms and zero projectors off the constants they start at."""
    for name, parameter in parameters:
        if name.endswith(("_gate", "gate_attn", "gate_ffn")):
            parameter.fill_(0.7)
        elif name.endswith("mm_input_projection_weight"):
            parameter.normal_(0, 0.3)
        elif name.endswith(".bias"):
            parameter.normal_(0, 0.1)
        elif "norm" in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


def save(
    name: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str | None = None,
    seed: int = 0,
) -> Path:
    """Save a pico checkpoint that transformers' Auto classes load; return `folder`."""
    model, processor = build(name, seed)
    model.to(dtype).save_pretrained(
        folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size})
    )
    processor.save_pretrained(folder)
    return folder


def image(seed: int, size: tuple[int, int] = (56, 56)) -> Image.Image:
    """Return RGB noise of `size` (width, height)."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


_INSTRUCTIONS = (
    "What is in the picture?",
    "Describe this image. Answer the question with one word: yes, no, red.",
    "How many apples are there near the small house?",
)
_REFUSALS = (
    "I'm sorry, but I cannot help with that.",
    "I cannot describe this image.",
    "No.",
)
_ANSWERS = (
    "Sure, here are three items for the list.",
    "red",
    "The image shows a small house near the river, two cats and a dog.",
)
_SIZES = ((56, 56), (100, 50), (40, 90))


def write_examples(
    folder: Path,
    n: int,
    harmful: bool = True,
    images: bool = True,
    seed: int = 0,
    sizes: Sequence[tuple[int, int]] = _SIZES,
) -> list[Example]:
    """Write `n` PNGs under `folder` and return the examples that use them.

    Instructions, responses, image sizes and the two categories vary from row to row. With
    `images=False` (for `TEXT_FAMILIES`) nothing is written and `Example.image` is None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind = "harmful" if harmful else "harmless"
    examples = []
    for i in range(n):
        path = folder / f"{kind}-{seed}-{i}.png" if images else None
        if path:
            image(1000 * seed + 2 * i + harmful, sizes[i % 3]).save(path)
        examples.append(
            Example(
                id=f"{kind}-{seed}-{i}",
                instruction=f"{_INSTRUCTIONS[i % 3]} ({i})",
                harmful=harmful,
                category=("fraud", "privacy")[i % 2] if harmful else ("animals", "houses")[i % 2],
                image=path,
                response=(_REFUSALS if harmful else _ANSWERS)[i % 3],
            )
        )
    return examples
