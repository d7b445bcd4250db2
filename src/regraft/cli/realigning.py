"""A dense and a pruned model to a patch: `regraft realign`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from regraft.cli.options import Calibration, Compute, Flat, Model, OutFile, open_model, watching
from regraft.console import ConsoleWatch, show_search
from regraft.restoration.fine_tune import TRAINED_VALUES, is_trained
from regraft.restoration.patch import Patch
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.evaluating import EvalSettings
from regraft.settings.flags import (
    DEFAULT_VALIDATION_TOKENS,
    check_answers,
    check_imitation,
    check_inputs,
    check_search,
    refuse_unread,
)
from regraft.settings.realigning import RealignSettings
from regraft.settings.scoring import HeadSettings
from regraft.settings.searching import SearchSettings
from regraft.settings.validation import with_validation


def realign(
    dense: Model,
    pruned: Model,
    *,
    out: OutFile,
    heads_file: Path | None = None,
    statistics_file: Path | None = None,
    search: bool = False,
    max_new_tokens: int = DEFAULT_VALIDATION_TOKENS,
    settings: Annotated[RealignSettings, Flat] = RealignSettings(),
    choice: Annotated[SearchSettings, Flat] = SearchSettings(),
    scoring: Annotated[HeadSettings, Flat] = HeadSettings(),
    calibration: Calibration = CalibrationSettings(),
    compute: Compute = ComputeSettings(),
) -> None:
    """Select the pruned weights that carried safety and write their dense values as a patch.

    Head scores, input statistics and the ranking of weights are computed beside the patch where no
    file is given.

    Example: regraft realign MODEL pruned --method gain --budget 2 --data vlguard
    VLGuard/train.json --out gain.safetensors

    Parameters
    ----------
    dense
        The dense checkpoint.
    pruned
        The same model pruned, by regraft or by any other tool.
    heads_file
        From `regraft heads`.
    statistics_file
        From `regraft statistics`.
    search
        Choose how many weights of the budget are restored, on validation prompts.
    max_new_tokens
        Search: length of an answer to a validation prompt.
    """
    from regraft import stages

    with watching() as watch:
        refuse_unread(settings, calibration)
        check_imitation(settings, calibration)
        check_search(search, settings, choice)
        check_inputs(settings, scoring, heads_file, statistics_file)
        check_answers(search, max_new_tokens)
        dense_source = open_model(dense, compute.trust_remote_code)
        found = with_validation(choice, dense_source.folder, calibration) if search else None
        patch = stages.restore(
            dense_source,
            open_model(pruned, compute.trust_remote_code),
            out,
            settings,
            calibration,
            compute,
            watch,
            heads_file=heads_file,
            statistics_file=statistics_file,
            scoring=scoring,
            choice=found,
            evaluation=EvalSettings(max_new_tokens=max_new_tokens, full_answers=False),
        )
        if search:
            curve = stages.curve_beside(out)
            show_search(watch.console, stages.read_curve(curve))
            watch.note(f"All points: {curve}")
        _tell_patch(watch, out, patch)


def _tell_patch(watch: ConsoleWatch, out: Path, patch: Patch) -> None:
    pruned = patch.about["pruned"]
    exchanged = f" and {patch.removed:,} kept ones go in exchange" if patch.removed else ""
    watch.note(
        f"{out}: {patch.restored:,} weights are restored{exchanged}, "
        f"{10_000 * patch.restored / pruned:.3f} per 10,000 of {pruned:,} zeros."
    )
    if is_trained(patch):
        watch.note(f"{out}: {TRAINED_VALUES}")
    if "n_m" in patch.about:
        watch.note(
            f"{patch.about['violated_groups']:,} of {patch.about['groups']:,} "
            f"{patch.about['n_m']} groups are violated: kernels for {patch.about['n_m']} "
            "sparsity cannot run the realigned checkpoint."
            if patch.about["violated_groups"]
            else f"All {patch.about['groups']:,} {patch.about['n_m']} groups are kept."
        )
