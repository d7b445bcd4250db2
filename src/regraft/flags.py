"""What flags must say together, and the arguments of api.py, which have their names.

A recipe says it by the place of a setting: its bounds stand below `search`. Flags stand beside each
other. Each of these functions refuses some that contradict others or would change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regraft.errors import RegraftError
from regraft.evaluation.chat_server import ENDPOINT
from regraft.heads.ships import HeadSettings
from regraft.restoration.base import Budgeted, MethodSettings, needs_of
from regraft.settings.compute import ComputeSettings
from regraft.settings.evaluating import EndpointSettings
from regraft.settings.searching import SearchSettings, TuneSettings

DEFAULT_VALIDATION_TOKENS = 64


def refuse_compute(compute: ComputeSettings, why: str) -> None:
    """Refuse how a model is run here where none is."""
    if (found := compute.first_set(*ComputeSettings.model_fields)) is not None:
        raise RegraftError(f"{why}: leave out --{found.replace('_', '-')}.")


def check_endpoint(
    models: Sequence[object], compute: ComputeSettings, endpoint: EndpointSettings
) -> None:
    """Refuse how models are run here where none is, and how servers are asked where none is."""
    served = {isinstance(one, str) and one.startswith(ENDPOINT) for one in models}
    if False not in served:
        refuse_compute(compute, "An endpoint runs as its server was started")
    if True not in served and endpoint != EndpointSettings():
        raise RegraftError("--concurrency is of requests to an endpoint: leave it out.")


def check_search(search: bool, settings: MethodSettings, max_new_tokens: int) -> None:
    """Refuse a search that nothing can be searched in, and the length of its answers without."""
    if search and not settings.searchable:
        raise RegraftError(
            "--search chooses a number of weights: give a --budget too."
            if isinstance(settings, Budgeted)
            else f"{settings.method} has no number of weights to choose: leave --search out."
        )
    if not search and max_new_tokens != DEFAULT_VALIDATION_TOKENS:
        raise RegraftError("--max-new-tokens is of answers in a search: add --search.")


def check_inputs(
    settings: MethodSettings,
    scoring: HeadSettings,
    heads_file: Path | None,
    statistics_file: Path | None,
) -> None:
    """Refuse head scores, statistics and settings of scoring that are not read."""
    needs = needs_of(settings)
    if heads_file is not None and needs.heads is None:
        raise RegraftError("No scored heads decide here: --heads-file would change nothing.")
    if statistics_file is not None and needs.statistics is None:
        raise RegraftError(
            f"{settings.method} by these settings reads no statistics: --statistics-file would "
            "change nothing."
        )
    if heads_file is not None and scoring != HeadSettings():
        raise RegraftError("--heads-file has scores: settings of scoring would change nothing.")
    _check_scoring(settings, scoring)


def check_tuning(
    settings: MethodSettings,
    tuning: TuneSettings,
    choice: SearchSettings,
    scoring: HeadSettings,
    device: str,
) -> None:
    """Refuse what no trial reads, and two answers to the same question."""
    _check_scoring(settings, scoring)
    if tuning.devices and device not in ("auto", *tuning.devices):
        raise RegraftError("--devices takes the place of --device: leave one of them out.")
    if not settings.searchable and choice.first_set("points", "most"):
        raise RegraftError("Without a --budget there is no ranking of which --points are.")


def _check_scoring(settings: MethodSettings, scoring: HeadSettings) -> None:
    if needs_of(settings).heads is None and scoring != HeadSettings():
        raise RegraftError(
            "No heads are scored for these settings: those of scoring would change nothing."
        )
