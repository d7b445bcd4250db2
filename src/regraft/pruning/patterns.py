"""Which pattern each weight matrix gets: one for all, others for some, none for the ignored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from regraft.errors import RegraftError
from regraft.models.anatomy import LinearAnatomy
from regraft.pruning.masks import Pattern, Scope


def parse_override(text: str, scope: Scope) -> tuple[str, Pattern]:
    """Read "layers.0.*=0.3" or "*.down_proj=2:4".

    Raises:
        RegraftError: it is neither.
    """
    glob, _, value = text.partition("=")
    try:
        if not glob:
            raise ValueError
        return glob, Pattern.parse_n_m(value) if ":" in value else Pattern(float(value), scope)
    except ValueError as error:
        raise RegraftError(
            f'{text!r} is no override; write it like "layers.0.*=0.3" or "*.down_proj=2:4".'
        ) from error


def assign_patterns(
    linears: Iterable[LinearAnatomy],
    default: Pattern,
    overrides: Sequence[tuple[str, Pattern]] = (),
    ignored: Sequence[str] = (),
) -> Mapping[LinearAnatomy, Pattern]:
    """The pattern of every weight that is to be pruned.

    Args:
        linears: All prunable weights.
        default: For those that no override names.
        overrides: (glob over `LinearAnatomy.key`, pattern); the last that fits counts.
        ignored: Globs of weights that stay dense.

    Raises:
        RegraftError: a glob fits nothing, N:M does not divide a row, or nothing is left to prune.
    """
    linears = list(linears)
    for glob in (*ignored, *(glob for glob, _ in overrides)):
        if not any(fnmatchcase(linear.key, glob) for linear in linears):
            raise RegraftError(
                f"{glob!r} fits no prunable weight; they are named like "
                f"{linears[0].key} and {linears[-1].key}."
            )
    patterns = {
        linear: next(
            (p for glob, p in reversed(overrides) if fnmatchcase(linear.key, glob)), default
        )
        for linear in linears
        if not any(fnmatchcase(linear.key, glob) for glob in ignored)
    }
    if not patterns:
        raise RegraftError("Every prunable weight is ignored: there is nothing to prune.")
    for linear, pattern in patterns.items():
        pattern.fits(linear.shape, linear.key)
    return patterns
