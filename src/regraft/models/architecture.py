"""Where a model keeps its heads and prunable weights, in memory and on disk.

One description serves every family: `model.get_decoder()` owns the decoder layers, and every
`nn.Linear` inside them except routers is prunable. The heads of a layer follow from the sizes of
its q_proj and k_proj. Only the text decoder is described; vision tower, projector, embeddings and
output head are never pruned.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from regraft.errors import RegraftError
from regraft.models.places import Place, of_tensor

_VISION_ONLY = (
    *("cross_attn.k_proj", "cross_attn.v_proj"),  # Mllama
    *("crossattention.self.key", "crossattention.self.value"),  # BLIP
    "mlp.vision_moe.",
)


@dataclass(frozen=True)
class LinearArchitecture:
    """One prunable weight, `[out, in]`: of an `nn.Linear`, or of one expert.

    `name` is its name in the layer ("self_attn.q_proj", "mlp.experts.3.down_proj"), `module` the
    dotted name of the module that owns it, `parameter` the parameter's name in that module, and
    `tensor` the name on disk. If the parameter in memory holds more than this weight, `held` is
    the weight's place in it; `stored` is the same for the tensor on disk.
    """

    layer: int
    name: str
    module: str
    tensor: str
    shape: tuple[int, int]
    parameter: str = "weight"
    expert: int | None = None
    held: Place | None = None
    stored: Place | None = None

    @property
    def key(self) -> str:
        """The same in every export of a model: "layers.0.self_attn.q_proj"."""
        return f"layers.{self.layer}.{self.name}"

    @property
    def role(self) -> str:
        """The last part of the name: "q_proj", "down_proj"."""
        return self.name.rpartition(".")[2]

    def weight(self, module: nn.Module) -> Tensor:
        """The weight in the module that owns it, `[out, in]`, a view."""
        parameter = getattr(module, self.parameter)
        assert isinstance(parameter, Tensor)
        return of_tensor(parameter.data, self.held, self.shape)

    @property
    def reads_vision(self) -> bool:
        """Whether it reads vision tokens only: keys and values of cross-attention, some experts."""
        return self.name.startswith(_VISION_ONLY)


@dataclass(frozen=True)
class LayerArchitecture:
    """One decoder layer: H query heads, KV key/value heads, head size D, its linears.

    `attention` is the name of the attention module, "self_attn" or "cross_attn" (Mllama), or of
    the module in its place. A layer whose heads cannot be identified has 0 heads, and `headless`
    says why.
    """

    index: int
    attention: str
    heads: int
    kv_heads: int
    head_dim: int
    linears: tuple[LinearArchitecture, ...]
    headless: str = ""

    def linear(self, role: str) -> LinearArchitecture:
        """The linear with this role, for instance "o_proj"."""
        return next(linear for linear in self.linears if linear.role == role)


@dataclass(frozen=True)
class Block:
    """A rectangle of a weight: rows [row_start, row_stop), columns [col_start, col_stop)."""

    row_start: int
    row_stop: int
    col_start: int
    col_stop: int


@dataclass(frozen=True)
class Architecture:
    """The text decoder of one checkpoint. `tied`: lm_head shares the embedding.

    `others` has the name in memory and the shape of every parameter that is never pruned, inside
    and outside the decoder.
    """

    family: str
    layers: tuple[LayerArchitecture, ...]
    hidden_size: int
    vocabulary: int
    tied: bool
    parameters: int
    others: tuple[tuple[str, tuple[int, ...]], ...] = field(repr=False)

    @property
    def linears(self) -> Iterator[LinearArchitecture]:
        """All prunable linears, layer by layer."""
        return (linear for layer in self.layers for linear in layer.linears)

    @property
    def prunable(self) -> int:
        return sum(linear.shape[0] * linear.shape[1] for linear in self.linears)

    @property
    def left_dense(self) -> list[str]:
        """Names, within a layer, of matrices and kernels that are never pruned, such as routers."""
        first = next(self.linears)
        own = re.match(rf"(.*?\b(?:{'|'.join(LAYER_LISTS)})\.){first.layer}\.", f"{first.module}.")
        assert own is not None
        pattern = re.compile(rf"{re.escape(own[1])}\d+\.(.+)")
        matches = (pattern.fullmatch(name) for name, shape in self.others if len(shape) > 1)
        return list(dict.fromkeys(match[1] for match in matches if match))

    @property
    def headless(self) -> str:
        """Which layers have no heads and why: "layers 0-2, 4: ..."; empty if all have heads."""
        by_reason: dict[str, list[int]] = {}
        for layer in self.layers:
            if layer.headless:
                by_reason.setdefault(layer.headless, []).append(layer.index)
        return "; ".join(
            f"{'layers' if indices[1:] else 'layer'} {_ranges(indices)}: {why}"
            for why, indices in by_reason.items()
        )


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as "0-2, 4"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


HEAD_ROLES = ("q_proj", "k_proj", "v_proj", "o_proj")
# Linears that choose experts or weight their outputs; never pruned
ROUTERS = ("router", "gate", "shared_expert_gate", "modality_router")


def head_block(layer: LayerArchitecture, linear: LinearArchitecture, head: int) -> Block | None:
    """The region of `head` in a weight (HSR, section 3.2); None for a linear without heads.

    Rows h*D:(h+1)*D of q_proj, or h*2D:(h+1)*2D if it also makes each head's gate; the rows of
    key/value head h // (H/KV) of k_proj and v_proj, which the query heads of a group share (GQA);
    columns h*D:(h+1)*D of o_proj.
    """
    out_features, in_features = linear.shape
    size = layer.head_dim
    if not 0 <= head < layer.heads:
        raise IndexError(f"layer {layer.index} has heads 0 to {layer.heads - 1}, not {head}")
    if linear.role == "q_proj":
        rows = out_features // layer.heads
        return Block(head * rows, (head + 1) * rows, 0, in_features)
    if linear.role in ("k_proj", "v_proj"):
        group = head // (layer.heads // layer.kv_heads)
        return Block(group * size, (group + 1) * size, 0, in_features)
    if linear.role == "o_proj":
        return Block(0, out_features, head * size, (head + 1) * size)
    return None


def check_same_architecture(
    dense: Architecture, pruned: Architecture, names: tuple[str, str]
) -> None:
    """Raise unless two checkpoints are the same network; the message has the first difference.

    Every parameter must have the same shape, in the decoder, the vocabulary and the vision part;
    names on disk and dtypes may differ. Messages call the two checkpoints by `names`.
    """
    if difference := _difference(dense, pruned):
        raise RegraftError(
            f"{names[0]} and {names[1]} are different models: {difference}. Give the dense "
            "checkpoint that the pruned one was made from."
        )


def _difference(dense: Architecture, pruned: Architecture) -> str | None:
    a, b = (
        {f"{li.key}.weight": li.shape for li in one.linears} | dict(one.others)
        for one in (dense, pruned)
    )
    for name in [*a, *b]:
        if a.get(name) != b.get(name):
            shapes = [list(one[name]) if name in one else "missing" for one in (a, b)]
            first, second = f"the first ({dense.family})", f"the second ({pruned.family})"
            return f"{name} is {shapes[0]} in {first} and {shapes[1]} in {second}"
    for one, other in zip(dense.layers, pruned.layers, strict=True):
        if (one.heads, one.kv_heads) != (other.heads, other.kv_heads):
            return f"layer {one.index} has {one.heads} and {other.heads} heads"
    return None


LAYER_LISTS = ("layers", "layer", "h", "block", "blocks")  # names of decoders' module lists


def text_decoder(model: nn.Module) -> nn.Module:
    """The module that owns the decoder layers and, as a rule, the final norm.

    Raises:
        RegraftError: the model has no text decoder (an encoder, a classifier).
    """
    decoder: object = model
    while not _layer_lists(decoder):
        find = getattr(decoder, "get_decoder", None)
        found = find() if callable(find) else None
        if found is decoder:  # it returns itself: Llama 4's language model, BERT-like models
            encodes = not getattr(getattr(decoder, "config", None), "is_decoder", True)
            inner = None if encodes else getattr(decoder, "encoder", None)
            found = getattr(decoder, "model", inner)
        if found is None or found is decoder:
            raise RegraftError(
                f"{type(model).__name__} has no text decoder with its layers in a module list "
                f"called {', '.join(LAYER_LISTS[:-1])} or {LAYER_LISTS[-1]}."
            )
        decoder = found
    assert isinstance(decoder, nn.Module)
    return decoder


def language_model(model: nn.Module) -> nn.Module:
    """The innermost part of a model that makes logits, usually the model itself.

    Raises:
        RegraftError: no part has an output head.
    """
    decoder = text_decoder(model)
    path = next(name for name, part in model.named_modules() if part is decoder).split(".")
    around = (model.get_submodule(".".join(path[:depth])) for depth in range(len(path)))
    found = [part for part in around if output_head(part) is not None]
    if not found:
        raise RegraftError(
            f"{type(model).__name__} has no output head that transformers knows; regraft works on "
            "vision-language and language models."
        )
    return found[-1]


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that turns final states into logits, weight `[vocabulary, d]`."""
    find = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None


def _layer_lists(module: object) -> list[nn.ModuleList]:
    found = (getattr(module, name, None) for name in LAYER_LISTS)
    return [one for one in found if isinstance(one, nn.ModuleList)]


def layer_list(decoder: nn.Module) -> nn.ModuleList:
    """The module list in which a text decoder keeps its layers."""
    return _layer_lists(decoder)[0]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    return list(layer_list(text_decoder(model)))


# "cross_attn" is Mllama's; Nemotron-H calls every kind "mixer"
ATTENTIONS = ("self_attn", "cross_attn", "mixer", "attention", "attn", "self_attention")


def find_attention(layer: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of a decoder layer's attention, by the names in `ATTENTIONS`."""
    for name in ATTENTIONS:
        module = getattr(layer, name, None)
        if isinstance(module, nn.Module):
            return name, module
    return None


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention of a decoder layer that has heads."""
    found = find_attention(layer)
    assert found is not None
    return found[1]


def embeds_for_each_layer(decoder: nn.Module) -> bool:
    """Whether every layer also reads a projection of the embeddings (Gemma 3n, Gemma 4)."""
    return bool(getattr(decoder.config, "hidden_size_per_layer_input", 0))


def cross_attention_layers(model: nn.Module) -> list[int]:
    """Layers whose keys and values come from vision states (Mllama)."""
    layers = enumerate(decoder_layers(model))
    return [i for i, layer in layers if not hasattr(layer, "self_attn") and has_cross(layer)]


def has_cross(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "cross_attn", None), nn.Module)


def cache_argument(module: nn.Module) -> str:
    """Name of the key/value cache among the arguments of a decoder's or a layer's forward.

    "cache" from transformers 5.24 on, "past_key_values" before.
    """
    forward = type(module).forward  # the instance's forward may be replaced
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
