"""The cards of a realigned model and of a patch for the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from regraft.data.storage import MODEL_ID
from regraft.disk.files import file_digest
from regraft.patch.format import Patch, load_patch
from regraft.patch.pair import is_changed
from regraft.report import tables
from regraft.report.examples import shown_group
from regraft.report.formatting import Grid, public_suite
from regraft.report.page import apply_command, render
from regraft.report.run import Run, Variant
from regraft.report.study import Study
from regraft.report.summary import controls, summary
from regraft.restoration.methods.fine_tune import TRAINED_VALUES, is_trained


def render_card(study: Study) -> str:
    """Render a model card: metadata for the hub, and the results with intervals.

    It belongs beside the realigned weights as README.md.
    """
    run = study.runs[0]
    chosen = card_variant(run)
    seen = any(answer.image for answer in run.dense.result.answers)
    task = "image-text-to-text" if seen else "text-generation"
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": task,
        **({"base_model": base} if (base := _hub_id(run.model)) else {}),
        "tags": ["regraft", "safety", *(() if chosen.changed else ("pruning", "sparse"))],
        "model-index": [
            {"name": run.title, "results": _card_results(chosen, _suites(study), task)}
        ],
    }
    return _rendered(
        "card.md.j2",
        metadata,
        study,
        run=run,
        base=run.model if _hub_id(run.model) else Path(run.model).name,
        of=chosen,
        candidates=len(_candidates(run)),
        summary=(*summary(study), *controls(study)),
        command=apply_command(run, chosen, "MODEL"),
    )


def _rendered(template: str, metadata: Mapping[str, Any], study: Study | None, **more: Any) -> str:
    """A card with metadata in front and, if there is a `study`, its tables of rates."""
    return render(
        template,
        **more,
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        grids=tables.results(study, brief=True) if study else (),
        judge=study.judge if study else "",
        suites=_suites(study) if study else "",
    )


def _suites(study: Study) -> str:
    return ", ".join(map(public_suite, study.runs[0].dense.result.suites))


def card_variant(run: Run) -> Variant:
    """The model that the card is about: the candidate with the lowest ASR.

    Without candidates it is a pruned model, and without these the dense one.
    """

    def attacked(variant: Variant) -> float:
        asr = variant.result.asr
        return 1.0 if asr is None else asr.value

    candidates = _candidates(run)
    return min(candidates, key=attacked) if candidates else (shown_group(run) or [run.dense])[0]


def _candidates(run: Run) -> list[Variant]:
    """The first realigned model of each pruning.

    The others are often controls or baselines that nobody means to ship.
    """
    firsts = [group[1] for group in run.groups if len(group) > 1]
    return [variant for variant in firsts if not variant.inference_time]


def _hub_id(model: str) -> str | None:
    """The id of a model on the hub, without a revision; None for a folder."""
    found = MODEL_ID.fullmatch(model)
    return found[1] if found and not Path(model).exists() else None


def _card_results(chosen: Variant, suites: str, task: str) -> list[dict[str, Any]]:
    """The results of a model in the form of the hub's metadata."""
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
    dataset = {"name": suites, "type": "safety"}
    return [{"task": {"type": task}, "dataset": dataset, "metrics": metrics}]


def render_patch_card(
    path: Path,
    repository: str,
    file: str,
    dense: str | None,
    pruned: str | None,
    study: Study | None,
) -> str:
    """Render the card of a patch: what it is for, how it was made and how to apply it.

    It is called `file` in the hub's `repository` (OWNER/NAME). `dense` and `pruned` are the hub ids
    of the models that it was made from, if known; `study` has rates for a table.
    """
    patch = load_patch(path)
    metadata = {
        "library_name": "regraft",
        **({"base_model": dense} if dense else {}),
        "tags": ["regraft", "pruning", "safety"],
    }
    models = {"Dense model": dense, "Compressed checkpoint": pruned}
    named = f"{file}, {path.stat().st_size:,} bytes, SHA-256 {file_digest(path)}"
    facts = [*((role, one) for role, one in models.items() if one), *_facts(patch, named)]
    return _rendered(
        "patch_card.md.j2",
        metadata,
        study,
        title=repository.partition("/")[2],
        repository=repository,
        patch=patch,
        changed=is_changed(patch),
        trained=TRAINED_VALUES if is_trained(patch) else "",
        dense=dense or "the dense model",
        pruned=pruned,
        versions=patch.about.get("versions", {}),
        facts=Grid.of("", ("", ""), facts),
    )


def _facts(patch: Patch, file: str) -> Iterator[tuple[str, str]]:
    about: Mapping[str, Any] = patch.about
    settings: dict[str, Any] = dict(about.get("settings", {}))
    if method := settings.pop("method", None):
        given = ", ".join(f"{key} {one}" for key, one in settings.items() if one is not None)
        yield "Method", f"{method}: {given}" if given else str(method)
    restored, pruned = patch.restored, about.get("pruned")
    share = ""
    if isinstance(pruned, int) and pruned:
        kind = "changed" if is_changed(patch) else "pruned"
        share = f" of {pruned:,} {kind} ones, {10_000 * restored / pruned:.2g} per 10,000"
    yield "Restored weights", f"{restored:,}{share}, in {len(patch.tensors)} tensors"
    yield "File", file
    for role, digest in about.get("inputs", {}).items():
        what = f"{role} model" if role in ("dense", "pruned") else role
        yield f"Digest of the {what}", str(digest)
    if versions := about.get("versions"):
        yield "Made with", ", ".join(f"{name} {version}" for name, version in versions.items())
