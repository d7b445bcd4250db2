"""regraft restores the refusals that pruning took from a vision-language model.

The stages are functions, documented in `regraft.api` and imported on first use: `prune`,
`score_heads`, `realign`, `apply`, `revert`, `export`, `evaluate`, `check` and `compare`; so is
`open_source`, which opens a model for several of them.
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
        open_source,
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
    "open_source",
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


def __dir__() -> list[str]:
    """All names, so that they are completed before the first use."""
    return sorted({*globals(), *__all__})
