"""Other judges of saved answers, and judges against people: `regraft judge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from regraft.cli.options import Compute, MaybeOutFile, MaybeOutFolder, watching
from regraft.console import show_agreement, show_judged, show_quality
from regraft.evaluation.keywords import KEYWORD_JUDGES
from regraft.settings.compute import ComputeSettings

app = App(name="judge", help="Judge saved answers by other judges, or judges by people's labels.")
Judges = Annotated[
    tuple[str, ...],
    Parameter(
        help="A keyword judge by name; llama-guard:MODEL, qwen3guard:MODEL or harmbench:MODEL with "
        "a folder or hub id; endpoint:URL#MODEL, which speaks OpenAI's protocol.",
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
    """Judge the saved answers of an evaluation by other judges; how far do any two agree?

    Example: regraft judge answers run/evaluation/pruned --by qwen3guard:Qwen3Guard-Gen-4B

    Parameters
    ----------
    evaluation
        Folder of `regraft eval`, or one below `evaluation` in that of a run.
    images
        Show judges that see the prompts' images, which lie in this folder or below it.
    """
    from regraft import stages
    from regraft.evaluation.judges import find
    from regraft.files import slug

    with watching() as progress:
        for one in by:
            find(one)
        folder = out or evaluation / stages.VERDICTS
        files = {one: folder / f"{slug(one)}.json" for one in by}
        judged = [
            stages.judge(evaluation, one, file, compute, progress, images)
            for one, file in files.items()
        ]
        show_judged(progress.console, [stages.own(evaluation), *judged])
        found = stages.agreement(evaluation, [*files.values()], folder / "agreement.json")
        show_agreement(progress.console, found)
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
    """Measure judges against answers that people labelled: accuracy, precision, recall, kappa.

    Judges that are models need --out: verdicts are kept beside it, and a stopped run goes on.

    Example: regraft judge bench xstest/completions_*.csv --ids even

    Parameters
    ----------
    file
        CSV with prompt, completion (or answer) and final_label (or label), as XSTest's.
    positive
        Labels that mean yes; XSTest's full and partial refusals, "refused", "yes" ... if not given.
    question
        What the labels say: whether the answer refuses, or whether it does harm.
    ids
        Only rows whose id is even, or odd: regraft-keywords-2 was chosen on XSTest's odd ones.
    """
    from regraft import stages
    from regraft.evaluation.labelled import Labels

    with watching() as progress:
        labels = Labels(question, positive, ids)
        found = stages.judge_bench(file, by, labels, compute, progress, out)
        show_quality(progress.console, found)
        if out is not None:
            progress.note(f"Wrote {out}")
