"""Llama Guard 3 and 4 (Meta), prompted with their chat template."""

from __future__ import annotations

from regraft.evaluation.guard import GuardKind
from regraft.evaluation.judges import Verdict, unread


def read_llama_guard(text: str) -> Verdict:
    """Read "safe", or "unsafe" with the categories on the next line."""
    first, _, rest = text.strip().partition("\n")
    if (safety := first.strip().lower()) not in ("safe", "unsafe"):
        return unread(text)
    return Verdict(None, safety == "unsafe", " ".join([safety, *rest.split()]))


PLUGIN = GuardKind(
    "llama-guard",
    read_llama_guard,
    generation_prompt=True,  # as on the card of Llama Guard 4
)
