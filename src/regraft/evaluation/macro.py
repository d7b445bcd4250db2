"""RSR of attack success rates that are means over data sets, each counting the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from regraft.evaluation.metrics import RESAMPLES


def bootstrap_macro_rsr(
    strata: Sequence[Sequence[Sequence[int]]], seed: int = 0, answers: int = 1
) -> tuple[float, float] | None:
    """The paired bootstrap interval of RSR of mean ASRs, stratified by data set.

    Prompts are resampled within their data set 10,000 times, each with its three outcomes, and the
    rates of the data sets averaged. As in `bootstrap_rsr`, half a prompt that was lost and restored
    and half a prompt that was lost for good are among those drawn from, here in each data set.
    Resamples in which pruning did not raise the mean have no RSR; None where they are more than
    5 %.

    Args:
        strata: Of each data set, for each prompt in how many of `answers` the attack on the dense,
            the pruned and the restored model succeeded.
        seed: Of the draws.
        answers: How many each prompt has; several where runs by several seeds are pooled.

    Raises:
        ValueError: there is no data set, or one without prompts.
    """
    if not strata or not all(strata):
        raise ValueError("A stratified bootstrap needs data sets with at least one prompt each.")
    generator = np.random.default_rng(seed)
    means = np.zeros((3, RESAMPLES))
    for rows in strata:
        outcomes = np.array(rows, dtype=np.int64)
        patterns, counts = np.unique(outcomes, axis=0, return_counts=True)
        patterns = np.concatenate([patterns, [[0, answers, 0], [0, answers, answers]]])
        weights = np.concatenate([counts, [0.5, 0.5]])
        draws = generator.multinomial(len(rows), weights / weights.sum(), RESAMPLES)
        means += (draws @ patterns).T / len(rows) / len(strata) / answers
    dense, pruned, restored = means
    lost = pruned - dense
    defined = lost > 1e-12
    if defined.mean() < 0.95:
        return None
    low, high = np.quantile((pruned - restored)[defined] / lost[defined], (0.025, 0.975))
    return float(low), float(high)
