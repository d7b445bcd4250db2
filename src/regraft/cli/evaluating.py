"""How good a model is: `regraft eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from regraft.cli.flags import refuse_unread
from regraft.cli.options import Compute, Flat, Model, OutFolder, open_model, watching
from regraft.console import show_result
from regraft.errors import RegraftError
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import Suites
from regraft.settings.evaluating import EvalSettings


def evaluate(
    model: Model,
    *,
    suite: Suites,
    out: OutFolder,
    patch: Path | None = None,
    defence: Path | None = None,
    text: Path | None = None,
    dense: Path | None = None,
    settings: Annotated[EvalSettings, Flat] = EvalSettings(),
    compute: Compute = ComputeSettings(),
) -> None:
    """Answer suites greedily and report ASR, over-refusal and utility with 95 % intervals.

    Example: regraft eval pruned --suite safebench FigStep/data --suite mossbench MOSSBench/data
    --out eval/pruned

    Parameters
    ----------
    patch
        Put this patch on the model in memory first.
    defence
        Answer under this defence at inference, from `regraft defend`.
    text
        Measure perplexity on this text file too: documents with blank lines between them.
    dense
        With --text: the folder of the dense model's evaluation on it, to measure KL to that model.
    """
    from regraft import stages

    with watching() as progress:
        refuse_unread(settings)
        if dense is not None and text is None:
            raise RegraftError("--dense is for KL on a text: name the text with --text.")
        on_text = None if text is None else stages.OnText(text, dense)
        source = open_model(model, compute.trust_remote_code)
        target = stages.Target(source, compute, patch, defence, on_text, progress=progress)
        done = stages.evaluate(target, out, suite, settings)
        show_result(progress.console, done.result)
        progress.note(f"Answers and results: {out}. As a page: regraft report {out}")
