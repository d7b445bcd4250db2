"""Prune a model: `regraft prune`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, create_model

from regraft.cli.options import (
    Calibration,
    Compute,
    DryRun,
    Flat,
    Model,
    OutFolder,
)
from regraft.console import live_progress, show_preview
from regraft.flags import check_pruning
from regraft.pruning.base import PRUNERS, PruneSettings, all_settings, help_text
from regraft.pruning.prune import zeros
from regraft.settings.base import by_method
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings


def _flags() -> type[BaseModel]:
    """The flags of all pruners. The settings of the chosen pruner refuse those of others."""
    settings = all_settings()
    names = dict.fromkeys(name for one in settings.values() for name in one.model_fields)
    fields: dict[str, Any] = {name: _flag(name, settings) for name in names}
    fields["method"] = (str, Field("wanda", description=help_text()))
    return create_model("PruneFlags", **fields)


def _flag(name: str, settings: dict[str, type[PruneSettings]]) -> Any:
    """(type, field) of a flag; its help names the pruners unless all have it."""
    having = {by: one.model_fields for by, one in settings.items() if name in one.model_fields}
    fields = {by: own[name] for by, own in having.items()}
    first, *others = fields.values()
    text = first.description or ""
    if len(fields) < len(settings):
        text = f"{text} For {', '.join(fields)} only."
    if all(one.default == first.default for one in others):
        return first.annotation, Field(first.default, description=text)
    pruners: dict[Any, list[str]] = {}
    for by, one in fields.items():
        pruners.setdefault(one.default, []).append(by)
    defaults = "; ".join(f"{value} for {', '.join(by)}" for value, by in pruners.items())
    return Any, Field(None, description=f"{text} Default: {defaults}.")


if TYPE_CHECKING:
    PruneFlags = BaseModel
else:
    PruneFlags = _flags()
_NONE_GIVEN = PruneFlags()


def prune(
    model: Model,
    *,
    out: OutFolder,
    flags: Annotated[PruneFlags, Flat] = _NONE_GIVEN,
    calibration: Calibration = CalibrationSettings(),
    compute: Compute = ComputeSettings(),
    dry_run: DryRun = False,
) -> None:
    """Set the least important weights to 0, by Wanda or another pruner (--method).

    Importance is measured on harmless prompts with answers; safety-potential uses harmful
    prompts with and without a safety prompt, magnitude no data.

    Example: regraft prune MODEL --sparsity 0.5 --data vlguard VLGuard/train.json --out pruned
    """
    from regraft import stages
    from regraft.stages.pruning import prune_step
    from regraft.stages.steps import plan_steps

    progress = live_progress()
    named = flags.model_dump(exclude_unset=True)
    settings = by_method(named, lambda name: PRUNERS.get(name).settings_type, default="wanda")
    check_pruning(settings, calibration)
    setup = stages.Setup(compute.opened(model), calibration, compute, progress)
    plan = plan_steps(setup, [prune_step(setup, settings, out)])
    if dry_run:
        show_preview(progress.console, out, plan)
        return
    plan.carry_out()
    pruned = compute.opened(out)
    count = zeros(pruned.checkpoint, pruned.architecture)
    progress.note(
        f"{out}: {count:,} of {pruned.architecture.prunable:,} prunable weights are zero "
        f"({100 * count / pruned.architecture.prunable:.2f} %)."
    )
