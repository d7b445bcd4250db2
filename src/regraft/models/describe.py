"""Derive the architecture of a model from its modules, and find its weights in a checkpoint.

Every layer's linears are prunable; heads are identified where a layer has separate q, k, v and o
projections.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from regraft.models.layout import Layout, Piece, Tiling, select, transpose
from regraft.models.places import Place


def read_architecture(model: nn.Module, checkpoint: Checkpoint, layout: Layout) -> Architecture:
    """Describe a model (weights may be on the meta device) and find its weights on disk.

    Raises:
        RegraftError: there are no linears, no output head, or the checkpoint lacks their weights.
    """
    output = output_head(language_model(model))
    assert output is not None
    layers = _describe_layers(model, _Files(checkpoint, layout))
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
        parameters=sum(p.numel() for p in model.parameters()),
        others=tuple(
            (name, tuple(parameter.shape))
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if name not in pruned
        ),
    )


def _describe_layers(model: nn.Module, files: _Files) -> tuple[LayerArchitecture, ...]:
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
            linears += _linears(where, module, files)
        attention, heads, why = _heads(layer, _text_config(model))
        if sharing and heads != NO_HEADS:
            heads, why = NO_HEADS, "layers share keys and values with others"
        described.append(LayerArchitecture(index, attention, *heads, tuple(linears), headless=why))
    return tuple(described)


@dataclass(frozen=True)
class _Files:
    """Finds weights of a model in its checkpoint.

    A matrix is found as pieces, each a number of its whole rows, from the first row on.
    """

    checkpoint: Checkpoint
    layout: Layout

    def matrix(
        self, parameter: str, shape: tuple[int, ...], expert: int | None, transposed: bool
    ) -> list[Piece]:
        """Find the weight of an `nn.Linear`, or one expert's matrix in that of all, `[E, ., .]`."""
        tiling = self._tiling(parameter, shape)
        tiling = tiling if expert is None else select(tiling, expert)
        tiling = transpose(tiling) if transposed else tiling
        if any(piece.view.shape[1] != tiling.shape[1] for piece in tiling.pieces):
            raise RegraftError(
                f"{self.checkpoint.folder}: {parameter} is stored as {len(tiling.pieces)} tensors, "
                "side by side; this key layout is not supported."
            )
        return sorted(tiling.pieces, key=lambda one: one.start)

    def place(self, piece: Piece) -> Place | None:
        """Where in its tensor a piece of a matrix is; None if it is the whole tensor."""
        shape = self.checkpoint.tensors[piece.tensor].shape
        if piece.view.shape == shape and piece.view.is_contiguous():
            return None
        return Place.of(piece.view)

    def _tiling(self, parameter: str, shape: tuple[int, ...]) -> Tiling:
        tiling = self.layout.get(parameter)
        if isinstance(tiling, str):
            raise RegraftError(f"{self.checkpoint.folder}: {parameter} cannot be found: {tiling}.")
        if tiling is None or tiling.shape != shape:
            stored = list(tiling.shape) if tiling else "none"
            raise RegraftError(
                f"{self.checkpoint.folder}: config.json describes a weight {parameter} of shape "
                f"{list(shape)}, the file has {stored}. Weights and config belong to different "
                "models, or the weights are quantised or fused."
            )
        return tiling


class _Where(NamedTuple):
    layer: int
    name: str  # within the layer
    module: str  # within the model


def _linears(where: _Where, module: nn.Module, files: _Files) -> Iterator[LinearArchitecture]:
    """Describe the weight of an `nn.Linear`, or all experts' matrices if `module` holds these."""
    parts = where.name.split(".")  # Gemma 4's router is "router.proj"
    if isinstance(module, nn.Linear) and not any(part in ROUTERS for part in parts):
        yield from _matrix(where, "weight", None, module, files)
    parameters = parameters_of(module)
    for expert in range(len(getattr(module, parameters[0])) if parameters else 0):
        for parameter in parameters:
            yield from _matrix(where, parameter, expert, module, files)


def _matrix(
    where: _Where, parameter: str, expert: int | None, module: nn.Module, files: _Files
) -> Iterator[LinearArchitecture]:
    """Describe one matrix, or each part of it if it is stored as several tensors."""
    whole = getattr(module, parameter).data
    flipped = expert is not None and bool(transposed(module))
    dotted = f"{where.module}.{parameter}"
    pieces = files.matrix(dotted, tuple(whole.shape), expert, flipped)
    matrix = whole if expert is None else whole[expert]
    parts = (matrix.T if flipped else matrix).split([len(piece.view) for piece in pieces])
    names = _names(where.name, parameter, expert, pieces)
    for name, piece, part in zip(names, pieces, parts, strict=True):
        yield LinearArchitecture(
            where.layer,
            name,
            where.module,
            piece.tensor,
            (part.shape[0], part.shape[1]),
            parameter,
            expert,
            held=None if part.shape == whole.shape else Place.of(part),
            stored=files.place(piece),
        )


def _names(module: str, parameter: str, expert: int | None, pieces: Sequence[Piece]) -> list[str]:
    """Names of a matrix's pieces: as on disk if these differ (separate gate, up), or numbered."""
    prefix = module if expert is None else f"{module}.{expert}"
    name = module if expert is None else f"{prefix}.{parameter}"
    if len(pieces) == 1:
        return [name]
    own = [piece.tensor.removesuffix(".weight").rpartition(".")[2] for piece in pieces]
    if len(set(own)) == len(own):
        return [f"{prefix}.{one}" for one in own]
    return [f"{name}_{i}" for i in range(len(pieces))]


def _text_config(model: nn.Module) -> Any:
    return text_decoder(model).config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]


NO_HEADS = (0, 0, 0)


def _heads(layer: nn.Module, config: Any) -> tuple[str, tuple[int, int, int], str]:
    """(name of the attention; query heads, key/value heads, head size; why there are no heads)."""
    found = find_attention(layer)
    if found is not None:
        name, attention = found
        return name, *_heads_of(attention, config)
    # what stands in place of attention: anything but an MLP or a norm
    known = ("norm", "mlp", "feed_forward", "moe", "act")
    others = (one for one, _ in layer.named_children() if not any(part in one for part in known))
    name = next(others, "none")
    return name, NO_HEADS, f"{name} is not attention with heads"


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
    # The module comes first: Qwen2-VL's config has no `head_dim`, and in Qwen3 and Gemma 3
    # hidden_size // num_attention_heads is a different number.
    size: int = (
        getattr(attention, "head_dim", None)
        or getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads
    )
    shapes = {role: list(getattr(attention, role).weight.shape) for role in HEAD_ROLES}
    heads, kv_heads = shapes["o_proj"][1] // size, shapes["k_proj"][0] // size
    outputs = shapes["q_proj"][0], shapes["k_proj"][0], shapes["v_proj"][0], shapes["o_proj"][1]
    expected = [
        (times * heads * size, kv_heads * size, kv_heads * size, heads * size) for times in (1, 2)
    ]
    if outputs not in expected or not kv_heads or heads % kv_heads:
        return NO_HEADS, f"{kind} has projections of shape {shapes}, not heads of {size} features"
    return (heads, kv_heads, size), ""
