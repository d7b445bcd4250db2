"""What tuning varies of a method, and within which bounds."""

from __future__ import annotations

from regraft.errors import RegraftError
from regraft.heads.ships import most_rank
from regraft.models.load import Source
from regraft.settings.realigning import RealignSettings
from regraft.settings.scoring import HeadSettings
from regraft.settings.searching import TuneSettings
from regraft.stages.optimising import Between, Space


def space_of(
    dense: Source,
    method: RealignSettings,
    tuning: TuneSettings,
    scoring: HeadSettings,
    kept: float,
    samples: int,
) -> Space:
    """What is varied: fields of `RealignSettings`, and r_max of `HeadSettings`.

    Args:
        dense: Whose heads bound their number.
        method: The method.
        tuning: The ranges.
        scoring: Of heads; of screened ones, only the candidates may be taken.
        kept: Share of weights that pruning kept.
        samples: Of D^s, which bound r_max.

    Raises:
        RegraftError: `tuning.keep` names something else, or leaves nothing.
    """
    p = kept if method.p is None else method.p
    space: dict[str, Between | tuple[str, ...]] = {}
    if method.method == "set-difference":
        space |= {"p": _from(kept, tuning.p_range, 0.999), "scope": ("row", "matrix")}
    else:
        if not method.ranked:
            space["q"] = Between(*tuning.q_range, log=True)
        space |= {
            "p_max": _from(p, tuning.p_max_range, 1.0),
            "scope": ("row", "matrix", "head"),
        }
        if method.heads != "all":
            most = sum(layer.heads for layer in dense.anatomy.layers)
            if scoring.mode == "screened" and method.by_heads:
                most = min(most, scoring.candidates)
            space["top_heads"] = _up_to(tuning.top_heads_range, most)
        if method.by_heads:
            space["criterion"] = ("ships", "kl")
            most = most_rank(samples, dense.anatomy.hidden_size)
            space["r_max"] = _up_to(tuning.r_max_range, most)
    if unknown := sorted(set(tuning.keep) - space.keys()):
        raise RegraftError(
            f"keep: {unknown[0]!r} is not tuned here; {method.method} tunes {', '.join(space)}."
        )
    left = {name: of for name, of in space.items() if name not in tuning.keep}
    if not left:
        raise RegraftError("keep names every setting, which leaves nothing to tune.")
    return left


def _from(start: float, span: tuple[float, float], most: float) -> Between:
    return Between(min(start + span[0], most), min(start + span[1], most))


def _up_to(span: tuple[int, int], most: int) -> Between:
    return Between(min(span[0], most), min(span[1], most), whole=True)
