"""A study to report.json, report.md, report.html, figures and a model card.

The same study always gives the same bytes: there are no times and no random ids in it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from regraft import distributed
from regraft.data.storage import MODEL_ID
from regraft.disk.files import write_json, write_text
from regraft.errors import RegraftError
from regraft.report import tables
from regraft.report.addresses import public_suite
from regraft.report.drawing import standalone
from regraft.report.examples import shown_group
from regraft.report.page import (
    apply_command,
    figures,
    page_environment,
    render_html,
    render_markdown,
)
from regraft.report.run import Run, Variant
from regraft.report.study import Study, plain
from regraft.report.summary import controls, summary


def check_report_folder(folder: Path) -> None:
    """Raise RegraftError where a report would be put among other files."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "report.json").exists():
        raise RegraftError(
            f"The output folder {folder} holds something else than a report. Choose a new folder."
        )


def write_report(study: Study, folder: Path) -> None:
    """Write `report.json`, `.md` and `.html` and figures into `folder`, replacing older ones.

    A run of one seed and model has `card.md` too. The JSON holds every number of the page; of the
    answers only the examples and those of the filter are on the page, of a single run. Of several
    processes the first one writes.

    Raises:
        RegraftError: a file cannot be written.
    """
    if not distributed.first():
        return
    drawn = figures(study)
    page, text = render_html(study, drawn), render_markdown(study)
    write_json(folder / "report.json", report_to_json(study))
    write_text(folder / "report.md", text)
    for figure in drawn:
        file = folder / f"{figure.name}.svg"
        if figure.name and figure.svg:
            write_text(file, standalone(figure.svg))
        elif figure.name:
            file.unlink(missing_ok=True)
    if study.run is not None and not study.run.unrelated:
        write_text(folder / "card.md", render_card(study))
    write_text(folder / "report.html", page)


def report_to_json(study: Study) -> dict[str, Any]:
    """The study as JSON values, without answers; a row names its models."""
    found: dict[str, Any] = plain(study)
    return {
        **found,
        "judge": study.judge,
        "seeds": list(study.seeds),
        "summary": list(summary(study)),
    }


def render_card(study: Study) -> str:
    """A model card for the hub: metadata that it reads, and the results with intervals.

    To be put beside the realigned weights as README.md.
    """
    run = study.runs[0]
    chosen = card_variant(run)
    suites = ", ".join(map(public_suite, run.dense.result.suite.split(", ")))
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        **({"base_model": base} if (base := _hub_id(run.model)) else {}),
        "tags": ["regraft", "safety", *(() if chosen.changed else ("pruning", "sparse"))],
        "model-index": [{"name": run.title, "results": _card_results(chosen, suites)}],
    }
    text = (
        page_environment()
        .get_template("card.md.j2")
        .render(
            study=study,
            run=run,
            metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
            base=run.model if _hub_id(run.model) else Path(run.model).name,
            of=chosen,
            among=len(_led(run)),
            suites_shown=suites,
            grids=tables.results(study, brief=True),
            summary=(*summary(study), *controls(study)),
            command=apply_command(run, chosen, "MODEL"),
        )
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def card_variant(run: Run) -> Variant:
    """Of the models that lead their pruning the one with the lowest ASR, or else a pruned one.

    Where there is none either, it is the dense model.
    """

    def attacked(variant: Variant) -> float:
        asr = variant.result.asr
        return 1.0 if asr is None else asr.value

    led = _led(run)
    return min(led, key=attacked) if led else (shown_group(run) or [run.dense])[0]


def _led(run: Run) -> list[Variant]:
    """Those a card may be of: the first of each pruning.

    Not the one of lowest ASR among all: more are tried than anyone means to ship, controls too.
    """
    firsts = [group[1] for group in run.groups if len(group) > 1]
    return [variant for variant in firsts if not variant.inference_time]


def _hub_id(model: str) -> str | None:
    """Of a model from the hub its id without a revision, as the hub takes it; None of a folder."""
    found = MODEL_ID.fullmatch(model)
    return found[1] if found and not Path(model).exists() else None


def _card_results(chosen: Variant, suites: str) -> list[dict[str, Any]]:
    """In the form that the hub reads."""
    named = (
        ("asr", "attack success rate", chosen.result.asr),
        ("over_refusal", "over-refusal", chosen.result.over_refusal),
        ("utility", "utility", chosen.result.utility),
    )
    metrics = [
        {"type": kind, "name": name, "value": round(100 * estimate.value, 2)}
        for kind, name, estimate in named
        if estimate is not None
    ]
    return [
        {
            "task": {"type": "image-text-to-text"},
            "dataset": {"name": suites, "type": "safety"},
            "metrics": metrics,
        }
    ]
