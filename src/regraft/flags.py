"""Checks of combinations of flags, and of the arguments of api.py, which have the same names.

In a recipe the nesting shows what a setting belongs to (bounds are below `search`), but flags are
flat. Each function here refuses flags that contradict others or would have no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regraft.errors import RegraftError
from regraft.evaluation.chat_server import ENDPOINT
from regraft.heads.ships import HeadSettings
from regraft.pruning.base import PruneSettings
from regraft.restoration.base import Budgeted, MethodSettings, needs_of
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.evaluating import EndpointSettings
from regraft.settings.searching import BoundSettings

DEFAULT_VALIDATION_TOKENS = 64


def refuse_compute(compute: ComputeSettings, why: str) -> None:
    """Refuse compute settings where no model runs here."""
    if (found := compute.first_set(*ComputeSettings.model_fields)) is not None:
        raise RegraftError(f"{why}: leave out --{found.replace('_', '-')}.")


def check_pruning(settings: PruneSettings, calibration: CalibrationSettings) -> None:
    """Refuse settings of the data for a pruner that uses none."""
    if not settings.kinds and calibration != CalibrationSettings():
        raise RegraftError(
            f"{settings.method} uses no data: settings of the data would have no effect."
        )


def check_endpoint(
    models: Sequence[object], compute: ComputeSettings, endpoint: EndpointSettings
) -> None:
    """Refuse compute settings if all models are endpoints, and endpoint settings if none is."""
    served = {isinstance(one, str) and one.startswith(ENDPOINT) for one in models}
    if False not in served:
        refuse_compute(compute, "An endpoint runs as its server was started")
    if True not in served and endpoint != EndpointSettings():
        raise RegraftError("--concurrency is for requests to an endpoint: leave it out.")


def check_realign(
    settings: MethodSettings,
    scoring: HeadSettings,
    heads_file: Path | None,
    statistics_file: Path | None,
    *,
    search: bool,
    max_new_tokens: int,
) -> None:
    """Refuse a search without a number to choose, and what would have no effect."""
    if search and not settings.searchable:
        raise RegraftError(
            "--search chooses a number of weights: give a --budget too."
            if isinstance(settings, Budgeted)
            else f"{settings.method} has no number of weights to choose: leave --search out."
        )
    if not search and max_new_tokens != DEFAULT_VALIDATION_TOKENS:
        raise RegraftError("--max-new-tokens is for answers in a search: add --search.")
    needs = needs_of(settings)
    if heads_file is not None and needs.heads is None:
        raise RegraftError("These settings use no head scores: leave out --heads-file.")
    if statistics_file is not None and needs.statistics is None:
        raise RegraftError(
            f"{settings.method} as set here uses no statistics: leave out --statistics-file."
        )
    if heads_file is not None and scoring != HeadSettings():
        raise RegraftError("--heads-file has the scores: settings of scoring would have no effect.")
    _check_scoring(settings, scoring)


def check_tuning(settings: MethodSettings, bounds: BoundSettings, scoring: HeadSettings) -> None:
    """Refuse settings that no trial would use."""
    _check_scoring(settings, scoring)
    if not settings.searchable and bounds.first_set("points", "most"):
        raise RegraftError(
            "Without a --budget there is no number to try: leave out --points, --most."
        )


def _check_scoring(settings: MethodSettings, scoring: HeadSettings) -> None:
    if needs_of(settings).heads is None and scoring != HeadSettings():
        raise RegraftError(
            "These settings score no heads: settings of scoring would have no effect."
        )
