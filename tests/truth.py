"""Independent, naive implementations that the fast ones are compared with.

Everything here runs whole forward passes, one head or one layer at a time, from pixels to logits,
with its own hooks and attention code. It uses nothing of `regraft.models.replay` or
`regraft.heads.ships`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import pico
from regraft.data.collate import Batch, prompt_batch, response_batch
from regraft.evaluation.metrics import rsr_interval
from regraft.models.architecture import (
    Architecture,
    LayerArchitecture,
    LinearArchitecture,
    decoder_layers,
    text_decoder,
)
from regraft.models.checkpoint_copy import write_edited
from regraft.models.layerwise import LayerwisePass
from regraft.models.load import Source, load_model, load_processor, open_source
from regraft.models.placement import PlacedModel
from regraft.pruning.base import PruneSettings, prune_settings
from regraft.pruning.masks import Pattern, assign_patterns
from regraft.pruning.prune import LayerPruning
from regraft.pruning.results import LayerResults
from regraft.pruning.statistics import ImportanceStatistics


class Opened(NamedTuple):
    source: Source
    model: nn.Module
    processor: Any
    architecture: Architecture


@cache
def opened(folder: Path) -> Opened:
    """A checkpoint as the package opens it; shared by tests, leave it unchanged."""
    source = open_source(folder)
    return Opened(source, load_model(source), load_processor(source), source.architecture)


def examples(family: str, folder: Path, n: int = 3, *, images: bool = True, **kwargs: Any) -> list:
    """Examples with images for vision-language families, without for language models."""
    if family == "phi4_multimodal":  # which sees a square alone otherwise than beside the others
        kwargs |= {"sizes": ((60, 40), (100, 50), (40, 90))}
    return pico.write_examples(folder, n, images=images and pico.sees(family), **kwargs)


def make_batch(kind: str, family: str, processor: Any, folder: Path) -> Batch:
    """A batch of one `kind`: left or right padded, a single row, or no image for an image model."""
    if kind == "left":
        return prompt_batch(processor, examples(family, folder, 3))
    if kind == "right":
        return pad_right(response_batch(processor, examples(family, folder, 3)))
    if kind == "single":
        return response_batch(processor, examples(family, folder, 1))
    assert kind == "text"
    return prompt_batch(processor, examples(family, folder, 3, images=False))


def pad_right(batch: Batch) -> Batch:
    """Move each row's padding behind its tokens."""
    mask = batch.inputs["attention_mask"]
    shifts = (mask.shape[1] - mask.sum(dim=1)).tolist()

    def roll(tensor: Tensor) -> Tensor:
        rows = [row.roll(-shift, 0) for row, shift in zip(tensor, shifts, strict=True)]
        return torch.stack(rows)

    inputs = {n: roll(t) if t.shape[:2] == mask.shape else t for n, t in batch.inputs.items()}
    assert (inputs["attention_mask"].diff(dim=1) <= 0).all()
    return replace(
        batch, inputs=inputs, labels=None if batch.labels is None else roll(batch.labels)
    )


class States(NamedTuple):
    """One full forward: input of each layer that ran, normed final state, logits."""

    entering: dict[int, Tensor]
    final: Tensor
    logits: Tensor


@torch.no_grad()
def full_forward(model: nn.Module, inputs: Any) -> States:
    """Run the whole model, from pixels to logits, and watch its decoder."""
    decoder, entering, final = text_decoder(model), {}, []
    hooks = [
        layer.register_forward_pre_hook(lambda _m, args, i=i: entering.__setitem__(i, args[0]))
        for i, layer in enumerate(decoder_layers(model))
    ]
    hooks.append(decoder.register_forward_hook(lambda _m, _a, out: final.append(out[0])))
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return States(entering, final[0], logits)


@torch.no_grad()
def linear_inputs(model: nn.Module, batch: Batch, names: list[str]) -> dict[str, Tensor]:
    """Inputs of the linears with these module names in one full forward."""
    modules, seen = dict(model.named_modules()), {}
    hooks = [
        modules[name].register_forward_pre_hook(
            lambda _m, args, name=name: seen.__setitem__(name, args[0].clone())
        )
        for name in names
    ]
    try:
        model(**batch.inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


# One head's query, key or value scaled inside the attention, after the key/value repetition

_EDIT: dict[str, Any] = {}


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """Softmax attention by its definition; q, k, v are [B, heads, S, D], the mask is additive."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (torch.repeat_interleave(t, repeats, dim=1) for t in (key, value))
    if module is _EDIT["module"]:
        query, key, value = query.clone(), key.clone(), value.clone()
        for name, tensor in (("q", query), ("k", key), ("v", value)):
            if _EDIT["target"] in (name, "all"):
                tensor[:, _EDIT["head"]] *= _EDIT["eps"]
    scores = query @ key.transpose(2, 3) * kwargs["scaling"] + mask
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("truth", _attention)
AttentionMaskInterface.register("truth", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


@contextmanager
def ablated(model: nn.Module, layer: int, head: int, target: str, eps: float) -> Iterator[None]:
    """Inside the block the text decoder runs with one query head's q, k, v or all scaled by eps."""
    decoder = text_decoder(model)
    block = decoder_layers(model)[layer]
    before = decoder.config._attn_implementation
    names = ("self_attn", "cross_attn", "mixer")
    module = next(getattr(block, name) for name in names if hasattr(block, name))
    _EDIT.update(module=module, head=head, target=target, eps=eps)
    decoder.set_attn_implementation("truth")
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)
        _EDIT["module"] = None


@contextmanager
def edited(weight: Tensor) -> Iterator[Tensor]:
    """Yield a weight to change; it is restored after the block."""
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            yield weight
    finally:
        weight.data.copy_(before)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Fail if the block leaves a weight, mode, attribute, forward or hook of the model changed."""
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    traits = _traits(model)
    yield
    after = model.state_dict()
    assert list(weights) == list(after)
    changed = [name for name, tensor in weights.items() if not torch.equal(tensor, after[name])]
    assert not changed, f"weights were changed: {changed}"
    now = _traits(model)
    different = {name: (was, now[name]) for name, was in traits.items() if now[name] != was}
    assert not different, f"modules were changed: {different}"


def _traits(model: nn.Module) -> dict[str, Any]:
    """State that a function might leave behind; transformers itself adds recording hooks, once."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")

    def hooks(module: nn.Module) -> list[Any]:
        found = [hook for kind in kinds for hook in getattr(module, kind).values()]
        return [h for h in found if not h.__module__.startswith("transformers.")]

    return {
        name: (
            module.training,
            "forward" in module.__dict__,
            getattr(module, "scaling", None),
            hooks(module),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for name, module in model.named_modules()
    }


def layer_architecture(
    *, heads: int, kv_heads: int, head_dim: int, hidden: int
) -> LayerArchitecture:
    """A layer of these sizes without a model, with a down_proj that has no heads."""
    shapes = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.down_proj": (hidden, 3 * hidden),
    }
    linears = tuple(
        LinearArchitecture(
            0, name, f"model.layers.0.{name}", f"model.layers.0.{name}.weight", shape
        )
        for name, shape in shapes.items()
    )
    return LayerArchitecture(0, "self_attn", heads, kv_heads, head_dim, linears)


def pruned_at_random(
    source: Source, target: Path, share: float
) -> tuple[Source, dict[str, Tensor]]:
    """A copy of a checkpoint with random weights set to zero, and where: key -> [out, in]."""
    generator = torch.Generator().manual_seed(0)
    masks = {
        li.key: torch.rand(li.shape, generator=generator) < share
        for li in source.architecture.linears
    }
    edits = {
        li.tensor: lambda weight, mask=masks[li.key]: weight.masked_fill(mask, 0)
        for li in source.architecture.linears
    }
    write_edited(source.checkpoint, target, edits)
    return open_source(target), masks


def random_statistics(
    architecture: Architecture, generator: torch.Generator
) -> ImportanceStatistics:
    """Squared input sums of every prunable weight, drawn at random."""
    squares = {li.key: torch.rand(li.shape[1], generator=generator) for li in architecture.linears}
    return ImportanceStatistics("wanda", squares, 1)


def resident(network: nn.Module) -> PlacedModel:
    """A resident model on the device of its first parameter."""
    parameter = next(network.parameters())
    return PlacedModel(network, parameter.device, parameter.dtype)


def layerwise(
    model: nn.Module, batches: Sequence[Batch], *, streamed: bool = False
) -> LayerwisePass:
    """A layerwise pass of the batches on a CPU model, before its first layer."""
    return LayerwisePass(replace(resident(model), streamed=streamed), batches)


def prune(
    opened: Opened,
    model: nn.Module,
    batches: Sequence[Batch],
    pattern: Pattern | Mapping[LinearArchitecture, Pattern],
    folder: Path,
    *,
    settings: PruneSettings | None = None,
    streamed: bool = False,
    **kwargs: Any,
) -> LayerResults:
    """Prune `model` layer by layer, with one pattern for all linears or one for each."""
    architecture, results = opened.source.architecture, LayerResults(folder)
    if isinstance(pattern, Pattern):
        pattern = assign_patterns(architecture.linears, pattern)
    LayerPruning(
        settings or prune_settings(),
        opened.source,
        layerwise(model, batches, streamed=streamed),
        pattern,
        results,
        **kwargs,
    ).run()
    return results


@dataclass(frozen=True)
class PairedTest:
    """McNemar's test: outcomes true only for a, only for b, and the two-sided p value."""

    only_a: int
    only_b: int
    p: float


def paired_rsr(
    dense: Sequence[int], pruned: Sequence[int], restored: Sequence[int], answers: int = 1
) -> tuple[float, float] | None:
    """`rsr_interval` of one data set, by model in place of by prompt."""
    return rsr_interval([list(zip(dense, pruned, restored, strict=True))], answers)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> PairedTest:
    """McNemar's exact test of two yes/no outcomes on the same prompts (McNemar 1947).

    Under the null hypothesis each discordant prompt is a fair coin, so `p` is the two-sided
    binomial tail; 1 where no prompt is discordant.

    Raises:
        ValueError: the lengths differ.
    """
    if len(a) != len(b):
        raise ValueError(f"A paired test needs the same prompts; got {len(a)} and {len(b)}.")
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    discordant = only_a + only_b
    p = float(binomtest(only_a, discordant).pvalue) if discordant else 1.0
    return PairedTest(only_a, only_b, p)
