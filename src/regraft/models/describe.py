"""Derive the architecture of a model from its modules, and find its weights in a checkpoint.

Every layer's linears are prunable; heads are identified where a layer has separate q, k, v and o
projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from regraft.errors import RegraftError
from regraft.models.architecture import (
    HEAD_ROLES,
    ROUTERS,
    Architecture,
    LayerArchitecture,
    LinearArchitecture,
    decoder_layers,
    find_attention,
    language_model,
    output_head,
    text_decoder,
)
from regraft.models.checkpoint import Checkpoint
from regraft.models.experts import parameters_of, transposed
from regraft.models.layout import Layout, Piece
from regraft.models.on_disk import WeightFinder
from regraft.models.places import Place


def read_architecture(model: nn.Module, checkpoint: Checkpoint, layout: Layout) -> Architecture:
    """Describe a model (weights may be on the meta device) and find its weights on disk.

    Raises:
        RegraftError: there are no linears, no output head, or the checkpoint lacks their weights.
    """
    output = output_head(language_model(model))
    assert output is not None
    layers = _describe_layers(model, WeightFinder(checkpoint, layout))
    if not any(layer.linears for layer in layers):
        raise RegraftError(
            f"The decoder layers of {type(model).__name__} have no linears to prune."
        )
    pruned = {f"{li.module}.{li.parameter}" for layer in layers for li in layer.linears}
    return Architecture(
        family=model.config.model_type,  # type: ignore[union-attr, arg-type]
        layers=layers,
        hidden_size=_text_config(model).hidden_size,
        vocabulary=output.weight.shape[0],  # type: ignore[index, arg-type]
        # not from config.tie_word_embeddings, which MllamaConfig lacks
        tied=output.weight is model.get_input_embeddings().weight,  # type: ignore[operator]
        has_vision=hasattr(model.config, "vision_config"),
        parameters=sum(p.numel() for p in model.parameters()),
        others=tuple(
            (name, tuple(parameter.shape))
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if name not in pruned
        ),
    )


def _is_prunable(name: str, module: nn.Module) -> bool:
    parts = name.split(".")  # Gemma 4's router is "router.proj"
    return isinstance(module, nn.Linear) and not any(part in ROUTERS for part in parts)


def _describe_layers(model: nn.Module, finder: WeightFinder) -> tuple[LayerArchitecture, ...]:
    names = {id(module): name for name, module in model.named_modules()}
    described, layers = [], decoder_layers(model)
    sharing = any(
        getattr(module, "is_kv_shared_layer", False)
        for layer in layers
        for module in layer.modules()
    )
    for index, layer in enumerate(layers):
        linears: list[LinearArchitecture] = []
        for name, module in layer.named_modules():
            where = _Where(index, name, f"{names[id(layer)]}.{name}")
            if _is_prunable(name, module):
                linears += _linear(where, module, finder)
            else:
                linears += _experts(where, module, finder)
        attention, heads, why = _heads(layer, _text_config(model))
        if sharing and heads != NO_HEADS:
            heads, why = NO_HEADS, "layers share keys and values with others"
        described.append(LayerArchitecture(index, attention, *heads, tuple(linears), headless=why))
    return tuple(described)


class _Where(NamedTuple):
    layer: int
    name: str  # within the layer
    module: str  # within the model


def _linear(where: _Where, module: Any, finder: WeightFinder) -> list[LinearArchitecture]:
    """Describe the weight of an `nn.Linear`, or each part if it is stored as several tensors."""
    shape = (module.out_features, module.in_features)
    pieces = finder.linear(f"{where.module}.weight", shape)
    if len(pieces) == 1:
        stored = finder.place(pieces[0])
        return [LinearArchitecture(*where, pieces[0].tensor, shape, stored=stored)]
    layer, name, owner = where
    return [
        LinearArchitecture(
            layer,
            f"{name}.{own}",
            owner,
            piece.tensor,
            (piece.shape[0], shape[1]),
            held=Place(piece.start[0] * shape[1], shape[1], 1),
            stored=finder.place(piece),
        )
        for own, piece in zip(_names(where.name, pieces), pieces, strict=True)
    ]


def _experts(where: _Where, module: nn.Module, finder: WeightFinder) -> list[LinearArchitecture]:
    """Describe each expert's matrices, if `module` holds those of all experts in 3-D parameters."""
    found = []
    flipped = bool(transposed(module))
    parameters = {name: getattr(module, name) for name in parameters_of(module)}
    for expert in range(len(next(iter(parameters.values()), ()))):
        for parameter, tensor in parameters.items():
            shape = tuple(tensor.shape)
            dotted = f"{where.module}.{parameter}"
            rows, columns = shape[:0:-1] if flipped else shape[1:]
            pieces = finder.expert(dotted, shape, expert, flipped)
            for name, piece in zip(_names(parameter, pieces), pieces, strict=True):
                first = expert * rows * columns + piece.start[0] * (1 if flipped else columns)
                found.append(
                    LinearArchitecture(
                        where.layer,
                        f"{where.name}.{expert}.{name}",
                        where.module,
                        piece.tensor,
                        (piece.shape[0], columns),
                        parameter,
                        expert,
                        Place(first, 1, rows) if flipped else Place(first, columns, 1),
                        finder.place(piece),
                    )
                )
    return found


def _names(parameter: str, pieces: Sequence[Piece]) -> list[str]:
    """Names of a matrix's pieces: as on disk if these differ (separate gate, up), or numbered."""
    if len(pieces) == 1:
        return [parameter]
    names = [piece.tensor.removesuffix(".weight").rpartition(".")[2] for piece in pieces]
    if len(set(names)) == len(names):
        return names
    return [f"{parameter}_{i}" for i in range(len(pieces))]


def _text_config(model: nn.Module) -> Any:
    return text_decoder(model).config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]


NO_HEADS = (0, 0, 0)


def _heads(layer: nn.Module, config: Any) -> tuple[str, tuple[int, int, int], str]:
    """(name of the attention; query heads, key/value heads, head size; why there are no heads)."""
    found = find_attention(layer)
    if found is not None:
        name, attention = found
        return name, *_heads_of(attention, config)
    others = [name for name, child in layer.named_children() if _mixes_tokens(name)]
    name = others[0] if others else "none"
    return name, NO_HEADS, f"{name} is not attention with heads"


def _mixes_tokens(name: str) -> bool:
    """Whether a layer's child, by its name, replaces attention: anything but an MLP or a norm."""
    return not any(part in name for part in ("norm", "mlp", "feed_forward", "moe", "act"))


def _heads_of(attention: nn.Module, config: Any) -> tuple[tuple[int, int, int], str]:
    """Query heads, key/value heads and head size, or why heads cannot be identified.

    A q_proj with twice the rows makes each head's query and its gate (Qwen3-Next); the head's rows
    are still one block.
    """
    kind = type(attention).__name__
    for role in HEAD_ROLES:
        if not isinstance(getattr(attention, role, None), nn.Linear):
            return NO_HEADS, f"{kind} has no separate {role}"
    if not isinstance(getattr(attention, "scaling", None), int | float):
        return NO_HEADS, f"{kind} has no attribute scaling"
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

    The attention module comes first: Qwen2-VL's config has no `head_dim`, and in Qwen3 and Gemma 3
    hidden_size // num_attention_heads is a different number.
    """
    size: int = (
        getattr(attention, "head_dim", None)
        or getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads
    )
    return size
