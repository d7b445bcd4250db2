"""Whether a compressed model is still as safe as the dense one: `regraft check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from regraft.cli.exits import leave
from regraft.cli.options import Compute, Flat, OutFolder, given, watching
from regraft.console import say, show_grid
from regraft.settings.checking import Margins
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import Suites
from regraft.settings.evaluating import EndpointSettings, EvalSettings

EXIT_CODES = {"pass": 0, "fail": 1, "undecided": 3}  # 2 is bad input
Prompts = Annotated[
    Suites,
    Parameter(
        help="Where a model is to be evaluated: demo:test, a .jsonl file or NAME PATH, as in "
        "`regraft eval --help`; the flag repeated, several.",
        negative="",
        show_default=False,
    ),
]
Side = Annotated[str, Parameter(help="Model, endpoint:URL#MODEL or evaluation.")]


def check(
    dense: Side,
    compressed: Side,
    *,
    out: OutFolder,
    suite: Prompts = (),
    patch: Path | None = None,
    margins: Annotated[Margins, Flat] = Margins(),
    settings: Annotated[EvalSettings, Flat] = EvalSettings(),
    compute: Compute = ComputeSettings(),
    endpoint: Annotated[EndpointSettings, Flat] = EndpointSettings(),
) -> None:
    """Tell whether a compressed model is as safe as the dense one, within margins: exit code 0 yes,
    1 no, 3 undecided.

    Each is a model's folder, hub id or 'demo', or the folder of a finished evaluation. ASR,
    over-refusal, utility and degenerate answers pass where the one-sided 95 % interval of their
    change is within the margin, fail where it is beyond it. A margin of 100 leaves one out.

    Example: regraft check model model-w4 --suite safebench FigStep/data --suite mossbench
    MOSSBench/data --out check

    Parameters
    ----------
    patch
        Put this on the compressed model first.
    """
    from regraft import api
    from regraft.report.gate import sentence, table

    with watching() as progress:
        blocks = given(margins, settings, compute, endpoint)
        found = api.check(
            dense, compressed, out, suites=suite, patch=patch, progress=progress, **blocks
        )
        show_grid(progress.console, table(found))
        for metric in found.metrics:
            if metric.outcome != "pass":
                progress.note(sentence(metric))
        for note in found.notes:
            say(progress.console, note, "dim")
        progress.note(f"Verdict: {found.verdict}. Files: {out}")
    leave(EXIT_CODES[found.verdict])
