"""What methods need of calibration data and the model, looked at before any long work."""

from __future__ import annotations

from regraft.checks import check_budget, check_gradients, check_heads, check_r_max
from regraft.data.example import Reading
from regraft.loading import check_shares
from regraft.models.load import Source
from regraft.restoration.base import MethodSettings, Needs, method_of
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.scoring import HeadSettings
from regraft.stages.evaluation_cache import EvaluationCache


def check_method(
    dense: Source,
    settings: MethodSettings,
    calibration: CalibrationSettings,
    compute: ComputeSettings,
    cache: EvaluationCache,
    scoring: HeadSettings | None,
    *,
    gathers: bool = True,
) -> None:
    """Find what would stop a restoration after hours.

    Args:
        dense: The dense checkpoint.
        settings: The method.
        calibration: Prompts of both kinds.
        compute: Device, dtype, batch size.
        cache: Has read the data already, or keeps them for what comes.
        scoring: How heads will be scored; None where scores are given.
        gathers: Whether statistics are still to be gathered.

    Raises:
        RegraftError: bad input.
    """
    method = method_of(settings)
    needs = method.needs(settings)
    check_heads(dense, needs, scoring)
    check_budget(dense, settings)
    if needs.answers or (needs.gradients and gathers):
        check_gradients(dense, compute, f"Realigning by {settings.method}")
    for harmful in kinds_drawn(needs, scored=scoring is None, gathered=not gathers):
        drawn = cache.drawn(dense, calibration, harmful=harmful)
        check_shares(drawn.examples, compute)
        if harmful and needs.heads is not None and scoring is not None:
            check_r_max(dense, scoring, drawn)
    prompts = {}
    if needs.answers:
        imitated = cache.imitated(dense, calibration).values()
        prompts = dict(zip(("safety", "utility"), imitated, strict=True))
    method.check(settings, dense, calibration.seed, compute, prompts)


def learnt_by(
    dense: Source,
    needs: Needs,
    calibration: CalibrationSettings,
    cache: EvaluationCache,
    *,
    scored: bool = False,
    gathered: bool = False,
) -> dict[str, Reading]:
    """The calibration prompts that a method learns from, by their role."""
    learnt: dict[str, Reading] = {}
    for harmful in kinds_drawn(needs, scored=scored, gathered=gathered):
        learnt |= cache.learnt_from(dense, calibration, harmful=harmful)
    if needs.answers:
        learnt |= cache.imitated(dense, calibration)
    return learnt


def kinds_drawn(needs: Needs, *, scored: bool = False, gathered: bool = False) -> tuple[bool, ...]:
    """Which prompts with responses are drawn: harmful ones (True), harmless ones, or both."""
    if needs.statistics and not gathered:
        return (True, False)
    return (True,) if needs.heads and not scored else ()
