"""`ModelTable` to `models.json`, `models.md` and `models.html`.

The same table always gives the same bytes.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from markupsafe import Markup

from regraft.evaluation.results import Estimate
from regraft.files import write_json, write_text
from regraft.report.model import measured
from regraft.report.models import ModelTable, Row
from regraft.report.words import DASH, share
from regraft.report.write import page_environment
from regraft.report.write_compare import rate_text

UNCHECKED = "†"


def write_models(table: ModelTable, folder: Path, figure: str = "") -> None:
    """Write the table into `folder`, replacing an older one.

    Args:
        table: Of all models.
        folder: Where to.
        figure: SVG of total Ships against lost safety.

    Raises:
        RegraftError: a file cannot be written.
    """
    page, text = _render(table, "html", figure), _render(table, "md").rstrip() + "\n"
    write_json(folder / "models.json", asdict(table))
    write_text(folder / "models.md", text)
    write_text(folder / "models.html", page)


def _render(table: ModelTable, kind: str, figure: str = "") -> str:
    environment = page_environment()
    environment.filters |= {
        "figure": rate_text,
        "count": count_text,
        "restored": restored_text,
        "published_restored": published_restored,
        "published_asr": published_asr,
        "rsr": rsr_text,
        "published_rsr": published_rsr,
        "p": p_text,
        "of_suite": suite_text,
        "published_of_suite": published_of_suite,
    }
    return environment.get_template(f"models.{kind}.j2").render(
        table=table,
        lead=lead(table),
        correlation=correlation_text(table),
        figure=Markup(figure),
        notes=notes(table),
    )


def lead(table: ModelTable) -> str:
    """What the page is, in a sentence."""
    count = len(table.models)
    beside = f" beside {table.published.source}" if table.published else ""
    return f"{count} model{'s' if count > 1 else ''}{beside}; judged by {table.judge}."


def count_text(estimate: Estimate | None) -> str:
    """How many prompts."""
    found = measured(estimate)
    return DASH if found is None else str(found.n)


def restored_text(row: Row) -> str:
    """Restored weights per 10,000 pruned ones."""
    return share(row.per_ten_thousand)


def rsr_text(row: Row) -> str:
    """RSR in per cent with its interval."""
    if row.rsr is None:
        return DASH
    return "undefined" if row.rsr.value is None else _with(row.rsr.value, row.rsr_interval)


def p_text(row: Row) -> str:
    """ "0.012", "< 0.001" at its smallest."""
    if row.p is None:
        return DASH
    return "< 0.001" if row.p < 0.001 else f"{row.p:.3f}"


def published_restored(row: Row) -> str:
    """Restored per 10,000, as published."""
    beside = row.published
    if beside is None or beside.row.per_ten_thousand is None:
        return DASH
    return _marked(f"{beside.row.per_ten_thousand:.3f}", row)


def published_asr(row: Row) -> str:
    """The published mean ASR in per cent, with the interval computed here."""
    beside = row.published
    if beside is None or beside.row.mean_asr is None:
        return DASH
    around = None if beside.asr is None else (beside.asr.low, beside.asr.high)
    return _marked(_with(beside.row.mean_asr, around, 2), row)


def published_rsr(row: Row) -> str:
    """The published RSR in per cent, with the interval computed here."""
    beside = row.published
    if beside is None or beside.row.rsr is None:
        return DASH
    return _marked(_with(beside.row.rsr, beside.rsr_interval, 2), row)


def suite_text(row: Row, suite: str) -> str:
    """ASR of a data set of attacks, else its utility or else its over-refusal, per cent."""
    rates = row.measured.by_suite.get(suite)
    if rates is None:
        return DASH
    kinds = (rates.asr, rates.utility, rates.over_refusal)
    return rate_text(next((one for one in kinds if measured(one) is not None), None))


def published_of_suite(row: Row, suite: str) -> str:
    """The published figure of a data set, per cent; of attacks with the interval computed here."""
    beside, name = row.published, suite.partition("#")[0]
    if beside is None:
        return DASH
    if name in beside.row.asr:
        found = beside.by_suite.get(name)
        around = None if found is None else (found.low, found.high)
        return _marked(_with(beside.row.asr[name], around, 2), row)
    if name in beside.row.utility:
        return _marked(_with(beside.row.utility[name], None, 2), row)
    return DASH


def _with(value: float, around: tuple[float, float] | None, digits: int = 1) -> str:
    between = f" [{100 * around[0]:.1f}, {100 * around[1]:.1f}]" if around else ""
    return f"{100 * value:.{digits}f}{between}"


def _marked(text: str, row: Row) -> str:
    """With a dagger behind the figure where it was not checked."""
    if row.published is None or row.published.row.checked:
        return text
    figure, bracket, rest = text.partition(" [")
    return f"{figure} {UNCHECKED}{bracket}{rest}"


def correlation_text(table: ModelTable) -> str:
    """Spearman's rho in a sentence, beside the published one."""
    found = table.correlation
    if found is None:
        return ""
    if found.rho is None:
        text = "Spearman's rho is not defined: all values of one are equal"
    else:
        chance = "no p value" if found.p is None else f"exact p = {found.p:.3f}"
        text = f"Spearman's rho {found.rho:.4f} ({chance}, n = {len(found.points)})"
    published = table.published
    if published is not None and published.spearman is not None:
        text += f"; published: {published.spearman:.4f} (n = {published.spearman_n})"
    return f"{text}.{f' {found.note}' if found.note else ''}"


def notes(table: ModelTable) -> tuple[str, ...]:
    """What the columns mean, and what is not comparable, in sentences."""
    found = [
        "ASR, mean: attack success rates of the data sets of attacks, each counting the same; n is "
        "their prompts together. By data set: ASR of attacks, utility or else over-refusal of "
        f"harmless prompts. Judged by {table.judge}.",
        "Brackets are 95 % intervals: Wilson's of rates, MOVER's of means over data sets; of RSR "
        "by bootstrap of prompts within each data set, each with the answers of all three models.",
        "p: McNemar's exact test of attack success against the pruned model, of a pruned model "
        "against the dense one, over all harmful prompts; not corrected for the number of tests. "
        "An ASR is to be read with over-refusal and utility: a model that refuses everything has "
        "the lowest.",
    ]
    if table.published:
        found += _of_published(table)
    versions = {str(sorted(one.items())) for one in table.versions.values()}
    if len(versions) > 1:
        found.append("The models were run with different versions or devices; see models.json.")
    return tuple(found)


def _of_published(table: ModelTable) -> list[str]:
    assert table.published is not None
    published = table.published
    prompts = ", ".join(f"{name} {count}" for name, count in published.prompts.items())
    found = [
        f"Published: {published.source}. The intervals of its figures are computed here from its "
        f"numbers of prompts ({prompts}): Wilson's of rates, MOVER's of means; of RSR from "
        "Jeffreys' distributions of the counts, as if models answered independently, since their "
        "answers are not published."
    ]
    rows = [row.published.row for row in table.rows if row.published]
    if not all(one.checked for one in (*rows, *table.missing)):
        found.append(
            f"{UNCHECKED} second-hand: taken from summaries of the publication; not shown to be "
            "rates of whole numbers of prompts, as the other figures are."
        )
    for suite in table.suites:
        theirs = published.prompts.get(suite.partition("#")[0])
        ours = sorted({n for row in table.rows if (n := _attacks(row, suite))})
        if theirs and ours and ours != [theirs]:
            here = ", ".join(map(str, ours))
            found.append(f"{suite}: {here} prompts here, {theirs} in the publication.")
    if table.missing:
        names = ", ".join(
            "/".join(filter(None, one.key)) + ("" if one.pruning else "/dense")
            for one in table.missing
        )
        found.append(f"Published, but not run here: {names}.")
    return found


def _attacks(row: Row, suite: str) -> int:
    """How many attacks of a data set a model was asked."""
    rates = row.measured.by_suite.get(suite)
    asr = None if rates is None else measured(rates.asr)
    return 0 if asr is None else asr.n
