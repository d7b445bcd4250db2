"""Score every attention head by Ships and KL: all exactly, or by estimate and the best exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from regraft.data.collate import Batch
from regraft.disk.artifact import read_artifact, require_finite, write_artifact
from regraft.disk.files import digest
from regraft.errors import RegraftError
from regraft.heads.ships import HeadSettings, first_feature_angles, ships
from regraft.heads.states import States, ablate_heads, layers_run
from regraft.models.architecture import Architecture
from regraft.progress import Advance, expect

FORMAT = "regraft-heads-2"
Criterion = Literal["ships", "kl", "released"]
Heads = Mapping[int, Sequence[int]]  # layer -> heads in it


@dataclass(frozen=True)
class HeadScores:
    """Scores of all heads, `[layers, heads]` float64; NaN where a layer did not run.

    Attributes:
        ships: Data-set level, in radians.
        kl: Query level, mean over samples, in nats.
        about: How the scores were made.
        exact: Which heads were ablated exactly, `[layers, heads]` bool; other scores are estimates.
            None if all are exact.
        estimate: Estimated Ships and KL, `[2, layers, heads]`; None if nothing was estimated.
        noise: Ships and KL caused by one extra rounding of a layer's input, `[2, layers]`: lower
            scores are not meaningful. None in float32.
        released: Scores by HSR's released code (`first_feature_angles`); None unless all heads are
            exact.
    """

    ships: Tensor
    kl: Tensor
    about: Mapping[str, Any]
    exact: Tensor | None = None
    estimate: Tensor | None = None
    noise: Tensor | None = None
    released: Tensor | None = None

    def of(self, criterion: Criterion) -> Tensor:
        """The scores by one criterion, `[layers, heads]`."""
        if criterion != "released":
            return self.ships if criterion == "ships" else self.kl
        if self.released is None:
            raise RegraftError(
                "These head scores do not include those of HSR's released code (`released`). Score "
                "heads again, to another file, with `regraft analyse heads` in mode exact."
            )
        return self.released

    def ranked(self, criterion: Criterion) -> list[tuple[int, int]]:
        """All scored (layer, head), most important first, exact scores before estimates."""
        heads = _ranked(self.of(criterion))
        exact = self.exact
        return heads if exact is None else sorted(heads, key=lambda head: not exact[head])

    def certain(self, criterion: Criterion) -> int:
        """How many of the best heads may be chosen: all before the first without an exact score.

        Heads are in the order of their estimates. Later ones may have exact scores because they
        rank high by the other criterion.
        """
        if self.exact is None or self.estimate is None:
            return len(self.ranked(criterion))
        estimated = _ranked(self.estimate[("ships", "kl").index(criterion)])
        exact = self.exact
        return next((i for i, head in enumerate(estimated) if not exact[head]), len(estimated))

    def best(self, criterion: Criterion, count: int) -> list[tuple[int, int]]:
        """The `count` most important (layer, head).

        Raises:
            RegraftError: fewer heads were scored, or fewer exactly.
        """
        ranked, certain = self.ranked(criterion), self.certain(criterion)
        if count > len(ranked):
            raise RegraftError(f"top_heads is {count}, but only {len(ranked)} heads were scored.")
        if count > certain:
            raise RegraftError(
                f"top_heads is {count}, but only the {certain} best by {criterion} were all scored "
                f"exactly; other scores are estimates. Score heads again with --candidates {count} "
                "or more."
            )
        return ranked[:count]

    def below_noise(self, criterion: Literal["ships", "kl"]) -> int | None:
        """How many exact scores are below the rounding noise of their layer; None if unmeasured."""
        if self.noise is None:
            return None
        floor = self.noise[("ships", "kl").index(criterion)]
        below = self.of(criterion) < floor[:, None]
        return int((below if self.exact is None else below & self.exact).sum())


def score_heads(
    model: nn.Module,
    architecture: Architecture,
    batches: Sequence[Batch],
    partial: Path,
    settings: HeadSettings,
    *,
    about: Mapping[str, Any] | None = None,
    advance: Advance = lambda _: None,
) -> HeadScores:
    """Ships and KL of every head of the text decoder on D^s prompts.

    Keeps one batch's layer inputs in memory at a time; the model is left as it was. `r_max` must be
    at most `most_rank`.

    Args:
        batches: Prompts that end where the answer starts.
        partial: Folder for finished layers, which are not run again after a kill. They can be
            reused with another `r_max` or other `candidates`, if nothing else differs.
        advance: See `ablate_heads`; the work for candidates is added once they are known.

    Raises:
        RegraftError: states overflow.
    """

    def measured(name: str, heads: Heads, how: HeadSettings) -> _Measured:
        states = ablate_heads(model, architecture, batches, partial / name, how, heads, advance)
        return _measure(states, architecture, heads, settings.r_max)

    every: Heads = {layer.index: range(layer.heads) for layer in architecture.layers}
    about = dict(about or {})
    if settings.mode == "exact":
        exact = measured("exact", every, settings)
        ships_, kl, released = exact.scores
        return HeadScores(ships_, kl, about, noise=exact.noise, released=released)
    estimate = measured("estimate", every, settings).scores[:2]
    best = candidates(estimate, settings.candidates)
    exactly = settings.model_copy(update={"mode": "exact"})
    samples = sum(len(batch.ids) for batch in batches)
    expect(advance, samples * layers_run(architecture, best))
    exact = measured(f"candidates-{digest(repr(best))[:16]}", best, exactly)
    is_exact = ~exact.scores[0].isnan()
    scores = torch.where(is_exact, exact.scores[:2], estimate)
    return HeadScores(scores[0], scores[1], about, is_exact, estimate, exact.noise)


def candidates(estimate: Tensor, count: int) -> dict[int, list[int]]:
    """Select the heads that are among the `count` best by Ships or by KL, as layer -> heads.

    `estimate` has both, `[2, layers, heads]`.
    """
    best = sorted({head for one in estimate for head in _ranked(one)[:count]})
    return {layer: [h for i, h in best if i == layer] for layer in {i for i, _ in best}}


def save_heads(path: Path, scores: HeadScores) -> None:
    names = ("ships", "kl", "exact", "estimate", "noise", "released")
    found = {name: getattr(scores, name) for name in names}
    tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
    write_artifact(path, FORMAT, {"about": scores.about}, tensors)


def load_heads(path: Path, architecture: Architecture) -> HeadScores:
    """Read scores and check that they fit the model.

    Raises:
        RegraftError: the file is missing or damaged, or its scores are of a model of another size.
    """
    header, tensors = read_artifact(path, FORMAT, "head scores")
    expected = [len(architecture.layers), max(layer.heads for layer in architecture.layers)]
    shapes = {"ships": expected, "kl": expected, "exact": expected, "released": expected}
    shapes |= {"estimate": [2, *expected], "noise": [2, expected[0]]}
    if wrong := sorted(({"ships", "kl"} - tensors.keys()) | (tensors.keys() - shapes.keys())):
        raise RegraftError(f"{path} is damaged: the tensor {wrong[0]} is missing or unknown.")
    for name, tensor in tensors.items():
        if list(tensor.shape) != shapes[name]:
            raise RegraftError(
                f"{path} scores {list(tensor.shape)} layers x heads ({name}); the model has "
                f"{shapes[name]}. Score the heads of this model with `regraft analyse heads`."
            )
        if tensor.dtype != (torch.bool if name == "exact" else torch.float64):
            raise RegraftError(f"{path} is damaged: the tensor {name} is {tensor.dtype}.")
    require_finite(path, tensors, nan=True)  # NaN where a layer did not run
    return HeadScores(about=header["about"], **tensors)


class _Measured(NamedTuple):
    scores: Tensor  # Ships, KL, released: [3, layers, heads] float64, NaN if not scored
    noise: Tensor | None  # [2, layers]


def _measure(states: States, architecture: Architecture, heads: Heads, r_max: int) -> _Measured:
    layers, columns = len(architecture.layers), max(layer.heads for layer in architecture.layers)
    scores = torch.full((3, layers, columns), math.nan, dtype=torch.float64)
    noise = torch.full((2, layers), math.nan, dtype=torch.float64)
    base = states.base()  # [N, d]
    for layer, chosen in heads.items():
        found = states.layer(layer)
        if found is None:
            continue
        scores[0, layer, list(chosen)] = ships(base, found["ablated"], r_max)
        scores[1, layer, list(chosen)] = found["kl"].double().mean(dim=1)
        scores[2, layer, list(chosen)] = first_feature_angles(base, found["ablated"])
        if "jittered" in found:
            noise[0, layer] = ships(base, found["jittered"][None], r_max)
            noise[1, layer] = found["jittered_kl"].double().mean()
    return _Measured(scores, None if noise.isnan().all() else noise)


def _ranked(scores: Tensor) -> list[tuple[int, int]]:
    """All scored (layer, head), best first; ties in order of layer and head."""
    order = torch.argsort(scores.flatten().nan_to_num(-math.inf), descending=True, stable=True)
    heads = scores.shape[1]
    scored = int((~scores.isnan()).sum())
    return [(int(i) // heads, int(i) % heads) for i in order[:scored]]
