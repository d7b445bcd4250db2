"""regraft restores the refusals that pruning took from a vision-language model.

The stages as functions, each described in `regraft.api`: `prune`, `score_heads`, `realign`,
`apply`, `revert`, `export`, `evaluate`, `check` and `compare`. They are imported when they are
first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regraft.api import (
        apply,
        check,
        compare,
        evaluate,
        export,
        prune,
        realign,
        revert,
        score_heads,
    )

__version__ = "0.1.0"
__all__ = [
    "apply",
    "check",
    "compare",
    "evaluate",
    "export",
    "prune",
    "realign",
    "revert",
    "score_heads",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'regraft' has no attribute {name!r}")
    from regraft import api

    return getattr(api, name)
