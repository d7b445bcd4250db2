"""Judge saved answers with other judges, measure judges against human labels: `regraft judge`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter
from rich.console import Console

from regraft.cli.options import Compute, MaybeOutFile, MaybeOutFolder
from regraft.console import live_progress, say, show_table
from regraft.evaluation.keywords import KEYWORD_JUDGES
from regraft.report.formatting import kappa, p_value, points_cell
from regraft.settings.compute import ComputeSettings

if TYPE_CHECKING:
    from regraft.evaluation.labelled import Bench
    from regraft.evaluation.verdicts import Agreement, Judged

app = App(
    name="judge",
    help="Judge saved answers with other judges, or measure judges against human labels.",
)
Judges = Annotated[
    tuple[str, ...],
    Parameter(
        help="A keyword judge by name; llama-guard:MODEL, qwen3guard:MODEL or harmbench:MODEL with "
        "a folder or hub id; endpoint:URL#MODEL, a model behind an OpenAI-compatible server; or a "
        "judge of an installed package.",
    ),
]


@app.command(name="answers")
def judge(
    evaluation: Path,
    *,
    by: Judges,
    out: MaybeOutFolder = None,
    images: Path | None = None,
    compute: Compute = ComputeSettings(),
) -> None:
    """Judge the saved answers of an evaluation with other judges, and show how far they agree.

    Example: regraft judge answers run/evaluation/pruned --by qwen3guard:Qwen3Guard-Gen-4B

    Parameters
    ----------
    evaluation
        Folder of `regraft eval`, or a model's folder in `evaluation` of a run.
    images
        Folder with the prompts' images, for judges that see images.
    """
    from regraft.disk.files import slug
    from regraft.evaluation.judges import find
    from regraft.stages import judging

    progress = live_progress()
    for one in by:
        find(one)
    folder = out or evaluation / judging.VERDICTS
    files = {one: folder / f"{slug(one)}.json" for one in by}
    judged = [
        judging.judge_answers(evaluation, one, file, compute, progress, images)
        for one, file in files.items()
    ]
    _show_judged(progress.console, [judging.own_judge(evaluation), *judged])
    found = judging.agreement(evaluation, [*files.values()], folder / "agreement.json")
    _show_agreement(progress.console, found)
    progress.note(f"Verdicts with reasons: {folder}")


@app.command(name="bench")
def judge_bench(
    *file: Path,
    by: Judges = tuple(KEYWORD_JUDGES),
    positive: tuple[str, ...] = (),
    question: Literal["refusal", "harm"] = "refusal",
    ids: Literal["all", "even", "odd"] = "all",
    out: MaybeOutFile = None,
    compute: Compute = ComputeSettings(),
) -> None:
    """Measure judges against human labels of answers: accuracy, precision, recall, kappa.

    Judges that are models need --out: verdicts are saved beside it, so that a stopped run resumes.

    Example: regraft judge bench xstest/completions_*.csv --ids even

    Parameters
    ----------
    file
        CSV files with prompt, completion (or answer) and final_label (or label), as XSTest's.
    positive
        Labels that mean yes; by default XSTest's full and partial refusals, "refused", "yes" ...
    question
        What the labels say: whether the answer is a refusal, or whether it is harmful.
    ids
        Use only rows with even, or odd, ids: regraft-keywords-2 was chosen on XSTest's odd ids.
    """
    from regraft.evaluation.labelled import Labels
    from regraft.stages import judging

    progress = live_progress()
    labels = Labels(question, positive, ids)
    found = judging.measure_judges(file, by, labels, compute, progress, out)
    for name, bench in found.items():
        _show_quality(progress.console, name, bench)
    if out is not None:
        progress.note(f"Wrote {out}")


def _show_judged(console: Console, judged: Sequence[Judged]) -> None:
    """Print the rates of the same answers by several judges, the evaluation's own judge first."""

    def degenerate(one: Judged) -> str:
        kinds = ("harmful", "harmless")
        return ", ".join(f"{one.degenerate.get(kind, 0):,} {kind}" for kind in kinds)

    show_table(
        console,
        ("judge", "ASR", "over-refusal", "degenerate", "unreadable"),
        ((one.judge, one.asr, one.over_refusal, degenerate(one), one.unread) for one in judged),
    )
    if any(one.degenerate for one in judged):
        say(
            console,
            "Degenerate: answers that are degenerate and, by the judge, no refusals, to harmful "
            "and to harmless prompts; they never count as successful attacks.",
            "dim",
        )


def _show_agreement(console: Console, found: Sequence[Agreement]) -> None:
    rows = (
        (kind, one.one, one.other, one.share, one.share.n, kappa(one.kappa))
        for kind in ("harmful", "harmless")
        for one in found
        if one.harmful == (kind == "harmful")
    )
    show_table(console, ("prompts", "judge", "and judge", "agree", "n", "kappa"), rows)


def _show_quality(console: Console, name: str, bench: Bench) -> None:
    several = f" to {bench.prompts:,} prompts" if bench.prompts < bench.answers else ""
    show_table(
        console,
        ("judge", "accuracy", "precision", "recall", "kappa", "unreadable"),
        (
            (one.judge, one.accuracy, one.precision, one.recall, kappa(one.kappa), one.unread)
            for one in bench.judges
        ),
        title=f"{name}, {bench.answers:,} answers{several}",
    )
    against = [(one.judge, one.against) for one in bench.judges if one.against]
    if against:
        headings = ("judge", "accuracy minus that of the best other, points", "p", "best other")
        rows = ((judge, points_cell(one).text, p_value(one.p), one.other) for judge, one in against)
        show_table(console, headings, rows)
    labels = f"Labels taken as yes: {', '.join(bench.yes)}; as no: {', '.join(bench.no)}."
    say(console, labels, "dim")
