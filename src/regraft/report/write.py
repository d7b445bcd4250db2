"""Writing a study as report.json, report.md, report.html, figures and a model card.

The same study always gives the same bytes: the files hold no times and no random ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regraft import distributed
from regraft.disk.files import to_json, write_texts
from regraft.errors import RegraftError
from regraft.report.cards import render_card
from regraft.report.drawing import standalone
from regraft.report.page import figures, render_html, render_markdown
from regraft.report.study import Study, plain
from regraft.report.summary import summary


def check_report_folder(folder: Path) -> None:
    """Raise RegraftError if a folder holds something other than a report."""
    others = folder.is_dir() and any(not one.name.startswith(".") for one in folder.iterdir())
    if others and not (folder / "report.json").exists():
        raise RegraftError(
            f"The output folder {folder} holds something other than a report. Choose a new folder."
        )


def write_report(study: Study, folder: Path) -> None:
    """Write `report.json`, `.md` and `.html` and figures into `folder`, replacing older ones.

    Nothing is replaced unless all could be written. A run of one seed and model, which is not made
    of evaluations, also gets `card.md`. The JSON holds every number of the page. The page of a
    single run has example answers and a filter over all answers. Of several processes the first one
    writes.

    Raises:
        RegraftError: a file cannot be written.
    """
    if not distributed.first():
        return
    drawn = figures(study)
    texts = {
        "report.json": to_json(report_to_json(study)),
        "report.md": render_markdown(study),
        "report.html": render_html(study, drawn),
        **{f"{one.name}.svg": standalone(one.svg) for one in drawn if one.name and one.svg},
    }
    if study.run is not None and study.run.model:
        texts["card.md"] = render_card(study)
    write_texts({folder / name: text for name, text in texts.items()})
    for one in drawn:
        if one.name and not one.svg:
            (folder / f"{one.name}.svg").unlink(missing_ok=True)


def report_to_json(study: Study) -> dict[str, Any]:
    """The study as JSON values, without answers; a row names its models."""
    found: dict[str, Any] = plain(study)
    return {
        **found,
        "judge": study.judge,
        "seeds": list(study.seeds),
        "summary": list(summary(study)),
    }
