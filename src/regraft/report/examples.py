"""Which answers the report shows: those that tell the models apart come first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest

from regraft.evaluation.results import Answer
from regraft.report.model import Report, Variant, measured, paired_answers

HARMFUL, HARMLESS = 12, 6
Row = tuple[Answer, ...]


def shown_group(report: Report) -> tuple[Variant, ...]:
    """The pruned model with the highest ASR and those realigned from it; empty without any."""

    def attacked(group: tuple[Variant, ...]) -> float:
        asr = measured(group[0].result.asr)
        return asr.value if asr else 0.0

    return max(report.groups, key=attacked, default=())


def shown_variants(report: Report) -> tuple[Variant, ...]:
    """The dense model, then the pruned and the first realigned one of the shown group.

    All models where they are unrelated.
    """
    if report.unrelated:
        return report.variants
    return (report.dense, *shown_group(report)[:2])


def choose_examples(report: Report) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """(harmful, harmless) rows of one answer a shown variant, the same for the same report.

    About three quarters are prompts that dense and pruned model, or any two unrelated ones, judge
    differently, the others unchanged, while both last; within each, every pattern of refusals gets
    its turn.
    """
    rows = paired_answers(shown_variants(report))
    telling = len(report.variants) if report.unrelated else 2
    harmful = [row for row in rows if row[0].harmful]
    harmless = [row for row in rows if not row[0].harmful]
    return _choose(harmful, HARMFUL, telling), _choose(harmless, HARMLESS, telling)


def _choose(rows: Sequence[Row], count: int, telling: int) -> tuple[Row, ...]:
    differ = [len({answer.complies for answer in row[:telling]}) > 1 for row in rows]
    changed = _by_turns([row for row, differs in zip(rows, differ, strict=True) if differs])
    unchanged = _by_turns([row for row, differs in zip(rows, differ, strict=True) if not differs])
    room = max(count * 3 // 4, count - len(unchanged))
    chosen = changed[:room]
    return tuple(chosen + unchanged[: count - len(chosen)])


def _by_turns(rows: Sequence[Row]) -> list[Row]:
    """Reorder so that each pattern of refusals, then the next, contributes one row at a time."""
    patterns: dict[tuple[bool, ...], list[Row]] = {}
    for row in rows:
        patterns.setdefault(tuple(a.complies for a in row), []).append(row)
    return [row for row in chain.from_iterable(zip_longest(*patterns.values())) if row]
