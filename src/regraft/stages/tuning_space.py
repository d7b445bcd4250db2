"""What tuning varies of a method, and within which bounds."""

from __future__ import annotations

from regraft.errors import RegraftError
from regraft.heads.ships import most_rank
from regraft.models.load import Source
from regraft.restoration.base import Between, MethodSettings, Space, method_of
from regraft.settings.scoring import HeadSettings
from regraft.settings.searching import TuneSettings

_MOST_RANK = 10


def space_of(
    dense: Source,
    settings: MethodSettings,
    tuning: TuneSettings,
    scoring: HeadSettings,
    kept: float,
    samples: int,
) -> Space:
    """What is varied: what the method says, and r_max of the scoring of heads.

    Args:
        dense: Whose heads bound their number.
        settings: The method.
        tuning: What stays as given.
        scoring: Of heads; of screened ones, only the candidates may be taken.
        kept: Share of weights that pruning kept.
        samples: Of D^s, which bound r_max.

    Raises:
        RegraftError: there is nothing to tune, or `tuning.keep` names something else.
    """
    method = method_of(settings)
    space = method.space(settings, dense, kept)
    if not space:
        raise RegraftError(f"There is nothing to tune of {settings.method}.")
    if method.needs(settings).heads is not None:
        heads = space.get("top_heads")
        if scoring.mode == "screened" and isinstance(heads, Between):
            space["top_heads"] = Between(1, min(heads.high, scoring.candidates), whole=True)
        most = min(_MOST_RANK, most_rank(samples, dense.architecture.hidden_size))
        space["r_max"] = Between(1, most, whole=True)
    if unknown := sorted(set(tuning.keep) - space.keys()):
        raise RegraftError(
            f"keep: {unknown[0]!r} is not tuned here; {settings.method} tunes {', '.join(space)}."
        )
    left = {name: of for name, of in space.items() if name not in tuning.keep}
    if not left:
        raise RegraftError("keep names every setting, which leaves nothing to tune.")
    return left
