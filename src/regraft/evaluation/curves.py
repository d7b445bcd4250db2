"""The trade-off curve of a search as a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regraft.errors import RegraftError
from regraft.evaluation.summary import estimate_from_json
from regraft.evaluation.tradeoff import Bounds, Point, Searched
from regraft.files import read_json

_RATES = ("asr", "over_refusal", "utility")


def curve_to_json(found: Searched) -> dict[str, Any]:
    """A curve as JSON values."""
    return {
        "pruned": found.pruned,
        "chosen": found.chosen,
        "bounds": asdict(found.bounds),
        "dense": point_to_json(found.dense),
        "points": [point_to_json(one) for one in found.points],
    }


def read_curve(path: Path) -> Searched:
    """The inverse of `curve_to_json`, from a file.

    Raises:
        RegraftError: the file is missing or holds no curve.
    """
    content = read_json(path)
    try:
        return Searched(
            point_from_json(content["dense"], f"{path}: dense"),
            tuple(
                point_from_json(one, f"{path}: points.{i}")
                for i, one in enumerate(content["points"])
            ),
            Bounds(**content["bounds"]),
            content["chosen"],
            int(content["pruned"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RegraftError(
            f"{path} holds no validation curve; expected `pruned`, `chosen`, `bounds`, `dense` and "
            f"`points`, each with `restored`, `asr`, `over_refusal` and `utility` ({error!r})."
        ) from error


def point_to_json(point: Point) -> dict[str, Any]:
    """A point as JSON values."""
    rates = {name: getattr(point, name) for name in _RATES}
    return {
        "restored": point.restored,
        **{name: None if rate is None else asdict(rate) for name, rate in rates.items()},
        "degenerate": point.degenerate,
    }


def point_from_json(content: Mapping[str, Any], where: str) -> Point:
    """The inverse of `point_to_json`; `where` names it in errors.

    Raises:
        RegraftError: a field of a rate is missing or of the wrong type.
        KeyError: a rate is missing.
        ValueError: ASR or over-refusal was not measured.
    """
    asr, over_refusal, utility = (
        estimate_from_json(content[name], f"{where}.{name}") for name in _RATES
    )
    if asr is None or over_refusal is None:
        raise ValueError(f"{where} lacks ASR or over-refusal")
    silent = float(content.get("degenerate", 0.0))
    return Point(int(content["restored"]), asr, over_refusal, utility, silent)
