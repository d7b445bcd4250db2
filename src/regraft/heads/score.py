"""Score every attention head by exact suffix replay, batched over heads.

For each batch: one full forward keeps the layers' inputs, then each layer is run to the end once
for every head ablated, several heads stacked in one pass. Only last-token states are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from regraft.artifact import read_artifact, write_artifact
from regraft.data.collate import Batch
from regraft.errors import RegraftError
from regraft.files import atomic_file
from regraft.heads.ships import kl_divergence, ships
from regraft.models.ablation import EPS, AblationTarget, head_outputs, replay_ablated
from regraft.models.anatomy import Anatomy, LayerAnatomy
from regraft.models.load import placed
from regraft.models.replay import last_positions, layer_inputs, logits_of, text_inputs

FORMAT = "regraft-heads-1"
Criterion = Literal["ships", "kl"]


@dataclass(frozen=True)
class HeadScores:
    """Scores of all heads, `[layers, heads]` float64; NaN where a layer did not run.

    `ships` in radians (data-set level), `kl` in nats (query level, mean over samples). `about`
    says how they were made.
    """

    ships: Tensor
    kl: Tensor
    about: Mapping[str, Any]

    def ranked(self, criterion: Criterion) -> list[tuple[int, int]]:
        """(layer, head), most important first; heads that were not scored are left out."""
        scores = self.ships if criterion == "ships" else self.kl
        order = torch.argsort(scores.flatten().nan_to_num(-math.inf), descending=True, stable=True)
        heads = scores.shape[1]
        scored = int((~scores.isnan()).sum())
        return [(int(i) // heads, int(i) % heads) for i in order[:scored]]


def score_heads(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Sequence[Batch],
    partial: Path,
    *,
    r_max: int = 5,
    target: AblationTarget = "all",
    eps: float = EPS,
    tokens_per_pass: int = 16384,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> HeadScores:
    """Ships and KL of every head of the text decoder on D^s prompts.

    Keeps one batch's layer inputs in memory at a time. Each finished batch is written to
    `partial` and not run again after a kill.

    Args:
        model: The dense model, left as it was.
        anatomy: Its anatomy.
        batches: Prompts that end where the answer starts.
        partial: Folder for finished batches.
        r_max: Rank of the subspaces that Ships compares.
        target: What is scaled by eps: the head's query, key, value or all three.
        eps: The scale.
        tokens_per_pass: How many tokens (rows times length) one pass may hold; bounds memory.
        about: Recorded with the scores.
        progress: Called with 1 after each layer of each batch.

    Returns:
        The scores, float64 on CPU.

    Raises:
        RegraftError: r_max exceeds the number of samples or features, or states overflow.
    """
    samples = sum(len(batch.ids) for batch in batches)
    limit = min(samples, anatomy.hidden_size)
    if not 1 <= r_max <= limit:
        raise RegraftError(
            f"r_max is {r_max}, but {samples} samples of {anatomy.hidden_size} features allow "
            f"1 to {limit}. Lower r_max or use more samples."
        )
    paths = [partial / f"batch_{i:05d}.safetensors" for i in range(len(batches))]
    for batch, path in zip(batches, paths, strict=True):
        if not path.exists():
            states = _batch_states(
                model,
                anatomy,
                placed(batch, model),
                target,
                eps,
                tokens_per_pass,
                progress or _ignore,
            )
            _require_finite(states)
            with atomic_file(path) as temporary:
                save_file(states, temporary)
        elif progress is not None:
            progress(len(anatomy.layers))
    heads = max(layer.heads for layer in anatomy.layers)
    scores = torch.full((2, len(anatomy.layers), heads), math.nan, dtype=torch.float64)
    base = torch.cat([_read(path, "base") for path in paths])  # [samples, d]
    for layer in anatomy.layers:
        if all(_has(path, f"states.{layer.index}") for path in paths):
            ablated = torch.cat([_read(p, f"states.{layer.index}") for p in paths], dim=1)
            kl = torch.cat([_read(p, f"kl.{layer.index}") for p in paths], dim=1)  # [H, samples]
            scores[0, layer.index, : layer.heads] = ships(base, ablated, r_max)
            scores[1, layer.index, : layer.heads] = kl.double().mean(dim=1)
    return HeadScores(scores[0], scores[1], dict(about or {}))


def save_heads(path: Path, scores: HeadScores) -> None:
    """Write scores to a safetensors file."""
    tensors = {"ships": scores.ships, "kl": scores.kl}
    write_artifact(path, FORMAT, {"about": scores.about}, tensors)


def load_heads(path: Path, anatomy: Anatomy) -> HeadScores:
    """Read scores and check that they fit the model.

    Raises:
        RegraftError: the file is missing, is something else, or is of a model of other size.
    """
    header, tensors = read_artifact(path, FORMAT, "head scores")
    scores = HeadScores(tensors["ships"], tensors["kl"], header["about"])
    expected = [len(anatomy.layers), max(layer.heads for layer in anatomy.layers)]
    if list(scores.ships.shape) != expected:
        raise RegraftError(
            f"{path} scores {list(scores.ships.shape)} layers x heads; the model has {expected}. "
            "Score the heads of this model with `regraft heads`."
        )
    return scores


@torch.no_grad()
def _batch_states(
    model: nn.Module,
    anatomy: Anatomy,
    batch: Batch,
    target: AblationTarget,
    eps: float,
    tokens_per_pass: int,
    progress: Callable[[int], None],
) -> dict[str, Tensor]:
    text = text_inputs(model, batch.inputs)
    inputs = layer_inputs(model, text)
    rows, length = inputs.final.shape[:2]
    at = torch.arange(rows, device=inputs.final.device), last_positions(batch.inputs, length)
    base = inputs.final[at]  # [B, d]
    base_logits = logits_of(model, base)
    states = {"base": base.float().cpu()}
    copies = max(1, tokens_per_pass // (rows * length))
    for layer in anatomy.layers:
        hidden = inputs.by_layer.get(layer.index)
        if hidden is not None:
            outputs = head_outputs(
                model, text, layer.index, hidden, layer.head_dim, target=target, eps=eps
            )
            ablated = torch.cat(
                [
                    replay_ablated(model, text, layer.index, hidden, outputs, heads)[
                        :, at[0], at[1]
                    ]  # [k, B, S, d] -> [k, B, d]
                    for heads in _chunks(layer, copies)
                ]
            )  # [H, B, d]
            kl = kl_divergence(base_logits, logits_of(model, ablated))
            states[f"states.{layer.index}"] = ablated.float().cpu()
            states[f"kl.{layer.index}"] = kl.cpu()
        progress(1)
    return states


def _require_finite(states: Mapping[str, Tensor]) -> None:
    for name, tensor in states.items():
        if not torch.isfinite(tensor).all():
            raise RegraftError(
                f"Hidden states overflow in this dtype (layer {name.rpartition('.')[2]}). "
                "Use --dtype bfloat16 or float32."
            )


def _chunks(layer: LayerAnatomy, size: int) -> list[range]:
    """Even chunks of at most `size` heads."""
    count = math.ceil(layer.heads / size)
    size = math.ceil(layer.heads / count)
    return [range(s, min(s + size, layer.heads)) for s in range(0, layer.heads, size)]


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as handle:
        tensor: Tensor = handle.get_tensor(name)
        return tensor


def _has(path: Path, name: str) -> bool:
    with safe_open(path, "pt") as handle:
        return name in handle.keys()  # noqa: SIM118


def _ignore(_: int) -> None:
    return None
