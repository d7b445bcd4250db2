"""How likely a model finds the reference responses: perplexity, which needs no generation."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from regraft.data.collate import IGNORED, batches, response_batch
from regraft.data.example import Example
from regraft.errors import RegraftError
from regraft.evaluation.metrics import resampled
from regraft.evaluation.results import Estimate
from regraft.evaluation.resumable_map import resumable_map
from regraft.models.load import placed
from regraft.models.replay import logits_of, replay, text_inputs

Nll = tuple[float, int]  # summed over the response's tokens, in nats; their number
_POSITIONS = 256  # whose logits are in memory at a time
_MOST = math.log(sys.float_info.max)  # nats a token whose exp is finite


def response_nlls(
    model: nn.Module,
    processor: Any,
    examples: Sequence[Example],
    batch_size: int,
    *,
    partial: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Nll]:
    """Negative log-likelihood of every response, in order; logits at response tokens only.

    Examples with and without image are apart, which some models need.

    Args:
        model: In eval mode.
        processor: Its processor.
        examples: Each with a response.
        batch_size: Examples in one pass.
        partial: Scratch folder; finished batches found there are kept.
        progress: Called with the number of examples just done.

    Raises:
        RegraftError: see `response_batch`; the model's numbers overflow.
    """
    groups = ([e for e in examples if (e.image is not None) == sees] for sees in (False, True))
    chunks = [one for group in groups for one in batches(group, batch_size)]

    def told(i: int) -> None:
        if progress is not None:
            progress(len(chunks[i]))

    def made(wanted: Sequence[int]) -> Iterator[tuple[int, list[Nll]]]:
        for i in wanted:
            nlls = _of_batch(model, processor, chunks[i])
            _require_finite(chunks[i], nlls)
            yield i, nlls
            told(i)

    found = resumable_map(len(chunks), made, partial, "nll", told)
    of_id = {
        example.id: (float(total), int(count))
        for chunk, nlls in zip(chunks, found, strict=True)
        for example, (total, count) in zip(chunk, nlls, strict=True)
    }
    return [of_id[example.id] for example in examples]


def perplexity(nlls: Sequence[Nll], seed: int) -> Estimate:
    """exp of the mean negative log-likelihood a token, with a bootstrap interval over examples.

    Raises:
        ValueError: there is no response.
    """
    sums = np.array([total for total, _ in nlls], dtype=np.float64)
    counts = np.array([count for _, count in nlls], dtype=np.float64)
    if not counts.sum():
        raise ValueError("Perplexity needs at least one response token.")
    low, high = resampled(len(nlls), seed, lambda rows: sums[rows].sum(1) / counts[rows].sum(1))
    value = float(sums.sum() / counts.sum())
    return Estimate(math.exp(value), len(nlls), math.exp(low), math.exp(high))


@torch.no_grad()
def _of_batch(model: nn.Module, processor: Any, examples: Sequence[Example]) -> list[Nll]:
    batch = placed(response_batch(processor, examples), model)
    assert batch.labels is not None
    final = replay(model, text_inputs(model, batch.inputs))  # [B, S, d]
    targets = batch.labels[:, 1:]  # [B, S - 1], what positions 0 .. S - 2 predict
    rows, positions = (targets != IGNORED).nonzero(as_tuple=True)  # [N], [N]
    nll = torch.cat(
        [
            F.cross_entropy(
                logits_of(model, final[rows[part], positions[part]]).float(),
                targets[rows[part], positions[part]],
                reduction="none",
            )
            for part in torch.arange(len(rows), device=rows.device).split(_POSITIONS)
        ]
    ).double()  # [N]
    totals = torch.zeros(len(examples), dtype=torch.float64, device=nll.device)
    totals.index_add_(0, rows, nll)
    counts = torch.bincount(rows, minlength=len(examples))
    return list(zip(totals.tolist(), counts.tolist(), strict=True))


def _require_finite(examples: Sequence[Example], nlls: Sequence[Nll]) -> None:
    for example, (total, count) in zip(examples, nlls, strict=True):
        if not total <= count * _MOST:  # nan as well
            raise RegraftError(
                f"The response of {example.id} has no finite perplexity: numbers overflow in this "
                "dtype. Use --dtype bfloat16 or float32."
            )
