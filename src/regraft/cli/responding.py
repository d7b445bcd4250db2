"""Calibration data from prompts: `regraft respond`."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from cyclopts import Parameter

from regraft.checks import told
from regraft.cli.options import Compute, Model, OutFile, open_model, watching
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import Prompts


def respond(
    model: Model,
    *,
    data: Prompts,
    out: OutFile,
    max_response_tokens: Annotated[int, Parameter(help="Length of an answer.")] = 64,
    compute: Compute = ComputeSettings(),
) -> None:
    """Write calibration data from prompts, by the dense model's own greedy answers.

    Kept are refusals of harmful prompts and what refuses nothing of harmless ones. All answers stay
    in the folder OUT.responses.

    Example: regraft respond MODEL --data prompts.jsonl --out calibration.jsonl
    """
    from regraft import stages

    with watching() as watch:
        source = open_model(model, compute.trust_remote_code)
        reading = stages.respond(source, data, out, max_response_tokens, compute, watch)
        kinds = Counter(one.harmful for one in reading.examples)
        watch.note(told("Answers", reading))
        watch.note(
            f"{out}: {kinds[True]} harmful and {kinds[False]} harmless prompts with answers. "
            f"Use it with --data {out}."
        )
