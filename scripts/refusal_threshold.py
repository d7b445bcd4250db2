"""Refuse by a threshold: a baseline that changes no weight (for docs/alternatives.md).

A pruned model that answers harmful prompts may still find a refusal likelier there than elsewhere.
Here a prompt is refused where the log-probability that the model gives to the start of a refusal
reaches a threshold; to all other prompts the model's own answers stay. The threshold is the one at
which as many harmful calibration prompts are refused as the dense model refuses.

How well these log-probabilities tell the prompts that the dense model refuses from those that it
answers does not depend on a threshold: the area under the ROC curve (AUC), 0.5 by chance.

    python scripts/refusal_threshold.py MODEL EVALUATION --dense DENSE_EVALUATION \\
        --calibration runs/real-data/calibration-0.jsonl --out OUT
    regraft report OUT --dense DENSE_EVALUATION --pruned EVALUATION --out page

EVALUATION is the model's own, with one suite. A harmful prompt of the calibration file has a
response exactly where the dense model refuses it, as `scripts/make_real_benchmark.py` writes it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu
from torch import nn

from regraft.data.example import Example
from regraft.data.sources import DataSource, read
from regraft.disk.parsing import read_json
from regraft.errors import RegraftError
from regraft.evaluation.keywords import DEFAULT_JUDGE
from regraft.evaluation.perplexity import response_nlls
from regraft.evaluation.results import Answer
from regraft.evaluation.summary import judge_answer, summarise
from regraft.loading import load
from regraft.models.load import open_source
from regraft.progress import SILENT
from regraft.settings.compute import ComputeSettings
from regraft.stages.evaluating import read_evaluation, write_evaluation

REFUSAL = "I'm sorry, but I can't assist with that."
START = 3  # tokens of it that are scored
BATCH = 32
RESAMPLES = 2_000

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def refusal_scores(model: nn.Module, processor: Any, examples: Sequence[Example]) -> Floats:
    """Log-probability of the first tokens of a refusal after every prompt, in nats."""
    refusals = [replace(one, response=REFUSAL) for one in examples]
    nlls = response_nlls(model, processor, refusals, BATCH, first=START)
    return -np.array([nats for nats, _ in nlls])


def auc(scores: Floats, positive: Bools) -> float:
    """Chance that a positive scores above a negative, ties counted half (Mann and Whitney)."""
    of_each = scores[positive], scores[~positive]
    above = mannwhitneyu(*of_each, method="asymptotic").statistic  # its p value is not used
    return float(above / (len(of_each[0]) * len(of_each[1])))


def auc_interval(scores: Floats, positive: Bools) -> tuple[float, float]:
    """95 % interval of the AUC, bootstrapped over the prompts of each class."""
    random = np.random.default_rng(0)
    classes = np.flatnonzero(positive), np.flatnonzero(~positive)
    found = []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([random.choice(one, len(one)) for one in classes])
        found.append(auc(scores[drawn], positive[drawn]))
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high)


def threshold_at(scores: Floats, count: int) -> float:
    """The threshold that as many of the scores reach, infinite for none."""
    return float(np.sort(scores)[::-1][count - 1]) if count else np.inf


def refused_above(
    examples: Sequence[Example], answers: Sequence[Answer], scores: Floats, threshold: float
) -> tuple[Answer, ...]:
    """The answers, with a refusal in place of each whose score reaches the threshold."""
    return tuple(
        replace(
            judge_answer(example, REFUSAL, DEFAULT_JUDGE, full_answers=False),
            image_digest=answer.image_digest,
        )
        if score >= threshold
        else answer
        for example, answer, score in zip(examples, answers, scores, strict=True)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Score the prompts, choose the threshold, write the evaluation and print the AUC."""
    args = _arguments(arguments)
    if args.out.exists():
        raise RegraftError(f"{args.out} exists already. Choose another name or remove it.")
    own, dense = read_evaluation(args.evaluation), read_evaluation(args.dense)
    if own.result.judge != DEFAULT_JUDGE.name:
        raise RegraftError(
            f"{args.evaluation} was judged by {own.result.judge}, but refusals here are judged by "
            f"{DEFAULT_JUDGE.name}. Evaluate with that judge."
        )
    by_id = {one.id: one for one in read(_source(own.result.suite)).examples}
    examples = [by_id[answer.id] for answer in own.result.answers]
    calibration = [one for one in read(_source(args.calibration)).examples if one.harmful]
    if not calibration:
        raise RegraftError(f"{args.calibration} has no harmful prompt to set a threshold by.")
    compute = ComputeSettings(dtype=args.dtype)
    model, processor = load(open_source(args.model), compute, SILENT)
    refused = sum(one.response is not None for one in calibration)
    threshold = threshold_at(refusal_scores(model, processor, calibration), refused)
    scores = refusal_scores(model, processor, examples)
    answers = refused_above(examples, own.result.answers, scores, threshold)
    result = replace(summarise(own.result.suite, DEFAULT_JUDGE, answers), text=own.result.text)
    content = read_json(args.evaluation / "results.json")
    about = {**content["about"], "threshold": threshold}
    write_evaluation(args.out, {"about": about, "sizes": content["sizes"]}, result)

    print(f"Threshold {threshold:.3f} nats, from {refused} of {len(calibration)} refusals.")
    refuses = {answer.id: answer.refused for answer in dense.result.answers}
    positive = np.array([refuses[one.id] for one in examples])
    harmful = np.array([one.harmful for one in examples])
    for kind, chosen in (("harmful", harmful), ("harmless", ~harmful)):
        print(f"AUC on {kind} prompts: {_auc_line(scores[chosen], positive[chosen])}")


def _auc_line(scores: Floats, positive: Bools) -> str:
    count, others = int(positive.sum()), int((~positive).sum())
    sizes = f"the dense model refuses {count} and answers {others}"
    if not (count and others):
        return f"none, since {sizes}"
    low, high = auc_interval(scores, positive)
    return f"{auc(scores, positive):.3f} [{low:.3f}, {high:.3f}]; {sizes}"


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("model", help="Folder of the pruned (or restored) model.")
    parser.add_argument("evaluation", type=Path, help="Its evaluation.")
    parser.add_argument("--dense", type=Path, required=True, help="The dense model's evaluation.")
    parser.add_argument("--calibration", required=True, help="Prompts for the threshold.")
    parser.add_argument("--out", type=Path, required=True, help="New folder.")
    parser.add_argument("--dtype", default="auto")
    return parser.parse_args(given)


def _source(text: str) -> DataSource:
    return DataSource.model_validate(text)


if __name__ == "__main__":
    try:
        main()
    except RegraftError as error:
        sys.exit(f"refusal_threshold: error: {error}")
