"""A dense model to a pruned one: `regraft prune`."""

from __future__ import annotations

from typing import Annotated

from regraft.cli.flags import check_data, refuse_unread
from regraft.cli.options import Calibration, Compute, Flat, Model, OutFolder, open_model, watching
from regraft.pruning.pruner import zeros
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.pruning import PruneSettings


def prune(
    model: Model,
    *,
    out: OutFolder,
    settings: Annotated[PruneSettings, Flat] = PruneSettings(),
    calibration: Calibration = CalibrationSettings(),
    compute: Compute = ComputeSettings(),
) -> None:
    """Prune by Wanda, SparseGPT, SNIP or magnitude, calibrated on harmless prompts (D^u).

    Or by safety-potential, calibrated on harmful prompts with a safety prompt and without.

    Example: regraft prune MODEL --sparsity 0.5 --data vlguard VLGuard/train.json --out pruned
    """
    from regraft import stages

    with watching() as watch:
        refuse_unread(settings)
        check_data(settings.method, calibration)
        source = open_model(model, compute.trust_remote_code)
        pruned = stages.prune(source, out, settings, calibration, compute, watch)
        count = zeros(pruned.checkpoint, pruned.anatomy)
        watch.note(
            f"{out}: {count:,} of {pruned.anatomy.prunable:,} prunable weights are zero "
            f"({100 * count / pruned.anatomy.prunable:.2f} %)."
        )
