"""Read the architecture of a model off its modules, and find its weights in a checkpoint.

Every layer's linears are prunable; heads are told apart where a layer has separate q, k, v and o
projections. What cannot be pruned and patched is refused here: quantised weights, and files that
belong to another model than config.json describes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import nn

from regraft.errors import RegraftError
from regraft.models.architecture import (
    FLOATS,
    HEAD_ROLES,
    ROUTERS,
    Architecture,
    LayerArchitecture,
    LinearArchitecture,
    decoder_layers,
    text_decoder,
)
from regraft.models.checkpoint import Checkpoint

Shape = tuple[int, str, tuple[int, int]]  # layer, name in it, [out, in]


def read_architecture(model: nn.Module, checkpoint: Checkpoint) -> Architecture:
    """Describe a model (weights may be on the meta device) and find its weights on disk.

    Raises:
        RegraftError: there are no linears, quantised weights, or a checkpoint whose decoder or head
            does not match the model.
    """
    decoder, output = text_decoder(model), model.get_output_embeddings()  # type: ignore[operator]
    shapes = [
        (index, name, (module.out_features, module.in_features))
        for index, layer in enumerate(decoder_layers(model))
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in ROUTERS
    ]
    if not shapes:
        raise RegraftError(f"The decoder layers of {type(model).__name__} have no linears to prune.")
    prefix = disk_prefix(checkpoint, shapes)
    for index, name, _ in shapes:
        _require_float(checkpoint, f"{prefix}layers.{index}.{name}.weight")
    layers = _describe_layers(model, prefix, shapes)
    _check_stored(checkpoint, prefix, decoder, output)
    pruned = {f"{linear.module}.weight" for layer in layers for linear in layer.linears}
    return Architecture(
        family=model.config.model_type,  # type: ignore[union-attr, arg-type]
        layers=layers,
        hidden_size=_text_config(model).hidden_size,
        vocabulary=output.weight.shape[0],
        # config.tie_word_embeddings would not do: MllamaConfig has none
        tied=output.weight is model.get_input_embeddings().weight,  # type: ignore[operator]
        has_vision=hasattr(model.config, "vision_config"),
        parameters=sum(p.numel() for p in model.parameters()),
        prefix=prefix,
        others=tuple(
            (name, tuple(parameter.shape))
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if name not in pruned
        ),
    )


def _describe_layers(
    model: nn.Module, prefix: str, shapes: Sequence[Shape]
) -> tuple[LayerArchitecture, ...]:
    """All decoder layers, whose linears are described by `shapes`."""
    names = {id(module): name for name, module in model.named_modules()}
    described = []
    for index, layer in enumerate(decoder_layers(model)):
        linears = tuple(
            LinearArchitecture(
                layer=index,
                name=name,
                module=f"{names[id(layer)]}.{name}",
                tensor=f"{prefix}layers.{index}.{name}.weight",
                shape=shape,
            )
            for layer_index, name, shape in shapes
            if layer_index == index
        )
        attention, heads, why = _heads(layer, _text_config(model))
        described.append(LayerArchitecture(index, attention, *heads, linears, headless=why))
    return tuple(described)


def _text_config(model: nn.Module) -> Any:
    return text_decoder(model).config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]


NO_HEADS = (0, 0, 0)


def _heads(layer: nn.Module, config: Any) -> tuple[str, tuple[int, int, int], str]:
    """(what a layer attends by; query heads, key/value heads and head size; why there are none)."""
    for name in ("self_attn", "cross_attn"):
        attention = getattr(layer, name, None)
        if isinstance(attention, nn.Module):
            return name, *_heads_of(attention, config)
    others = [name for name, child in layer.named_children() if _mixes_tokens(name)]
    name = others[0] if others else "none"
    return name, NO_HEADS, f"{name} is no attention by heads"


def _mixes_tokens(name: str) -> bool:
    """Whether a child of a layer takes the place of attention: all but its MLP and norms do."""
    return not any(part in name for part in ("norm", "mlp", "feed_forward", "moe", "act"))


def _heads_of(attention: nn.Module, config: Any) -> tuple[tuple[int, int, int], str]:
    """Query heads, key/value heads and head size, or why they cannot be told apart.

    A q_proj with twice the rows makes each head's query and its gate (Qwen3-Next): the head's rows
    are still one block.
    """
    kind = type(attention).__name__
    for role in HEAD_ROLES:
        if not isinstance(getattr(attention, role, None), nn.Linear):
            return NO_HEADS, f"{kind} has no {role} of its own"
    if not isinstance(getattr(attention, "scaling", None), int | float):
        return NO_HEADS, f"{kind} does not say how it scales"
    size = _head_dim(attention, config)
    shapes = {role: list(getattr(attention, role).weight.shape) for role in HEAD_ROLES}
    heads, kv_heads = shapes["o_proj"][1] // size, shapes["k_proj"][0] // size
    outputs = shapes["q_proj"][0], shapes["k_proj"][0], shapes["v_proj"][0], shapes["o_proj"][1]
    expected = [
        (times * heads * size, kv_heads * size, kv_heads * size, heads * size) for times in (1, 2)
    ]
    if outputs not in expected or not kv_heads or heads % kv_heads:
        return NO_HEADS, f"{kind} has projections of shape {shapes}, not heads of {size} features"
    return (heads, kv_heads, size), ""


def _head_dim(attention: nn.Module, config: Any) -> int:
    """The head size D.

    The attention module is asked first: Qwen2-VL's config has no `head_dim`, and of Qwen3 and
    Gemma 3 hidden_size // num_attention_heads is another number.
    """
    size: int = (
        getattr(attention, "head_dim", None)
        or getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads
    )
    return size


def disk_prefix(checkpoint: Checkpoint, shapes: Sequence[Shape]) -> str:
    """What the file puts before "layers.0.self_attn.q_proj.weight" of the text decoder.

    Key layouts differ between exports ("language_model.model.", "model.language_model.",
    "model."), and transformers renames them on load; what follows the prefix never changes. The
    prefix is the only one under which every linear lies with its shape.

    Args:
        checkpoint: The opened checkpoint.
        shapes: Of every prunable linear.

    Raises:
        RegraftError: no prefix or more than one fits.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    pattern = re.compile(r"^(.*?)(layers\.\d+\..+)\.weight$")
    for name, record in checkpoint.tensors.items():
        if match := pattern.match(name):
            found[match[1]][match[2]] = record.shape
    wanted = {f"layers.{index}.{name}": shape for index, name, shape in shapes}
    fitting = [
        prefix
        for prefix, tensors in found.items()
        if all(tensors.get(name) == shape for name, shape in wanted.items())
    ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise RegraftError(
            f"{checkpoint.folder}: the decoder's weights could be under any of {sorted(fitting)}."
        )
    closest = max(found, key=lambda p: len(found[p].keys() & wanted.keys()), default="")
    name = next(n for n, shape in wanted.items() if found[closest].get(n) != shape)
    stored = found[closest].get(name)
    raise RegraftError(
        f"{checkpoint.folder}: config.json describes a weight {closest}{name} of shape "
        f"{list(wanted[name])}, the file has {list(stored) if stored else 'none'}. "
        "Weights and config belong to different models, or the weights are quantised or fused."
    )


def _check_stored(
    checkpoint: Checkpoint, prefix: str, decoder: nn.Module, output: nn.Module
) -> None:
    """Compare shapes on disk with the model's: of the decoder's embedding and norms, the head."""
    wanted = {f"{prefix}{name}": one.shape for name, one in decoder.named_parameters()}
    head = f"{prefix.removesuffix('model.')}lm_head.weight"
    for name in {"lm_head.weight", head} - wanted.keys():
        wanted[name] = output.weight.shape  # type: ignore[assignment]
    for name, shape in wanted.items():
        record = checkpoint.tensors.get(name)
        if record is not None and record.shape != tuple(shape):
            raise RegraftError(
                f"{checkpoint.folder}: config.json describes {name} of shape {list(shape)}, the "
                f"file has {list(record.shape)}. Weights and config belong to different models, "
                "or the vocabulary was changed in one of them alone."
            )


def _require_float(checkpoint: Checkpoint, tensor: str) -> None:
    dtype = checkpoint.record(tensor).dtype
    if dtype not in FLOATS:
        raise RegraftError(
            f"{checkpoint.folder}: {tensor} is stored as {dtype}: it is quantised. Give a "
            f"checkpoint whose weights are {', '.join(FLOATS)}."
        )
