"""Llama Guard 3 and 4 (Meta), asked by their chat template."""

from __future__ import annotations

from regraft.evaluation.guard import GuardKind
from regraft.evaluation.judges import Verdict, unread


def read_llama_guard(text: str) -> Verdict:
    """ "safe", or "unsafe" with the categories in the next line (Llama Guard 3 and 4)."""
    first, _, rest = text.strip().partition("\n")
    if (said := first.strip().lower()) not in ("safe", "unsafe"):
        return unread(text)
    return Verdict(None, said == "unsafe", " ".join([said, *rest.split()]))


PLUGIN = GuardKind(
    "llama-guard",
    read_llama_guard,
    generation_prompt=True,  # as on the card of Llama Guard 4
)
