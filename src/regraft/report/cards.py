"""The cards of a realigned model and of a patch, as the hub shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from regraft.data.storage import MODEL_ID
from regraft.evaluation.metrics import per_ten_thousand
from regraft.patch.format import Patch
from regraft.patch.pair import is_changed
from regraft.report import tables
from regraft.report.examples import shown_group
from regraft.report.formatting import Grid, public_suite
from regraft.report.page import apply_command, render
from regraft.report.run import Run, Variant
from regraft.report.study import Study
from regraft.report.summary import controls, summary


def render_card(study: Study) -> str:
    """A model card for the hub: metadata that it reads, and the results with intervals.

    To be put beside the realigned weights as README.md.
    """
    run = study.runs[0]
    chosen = card_variant(run)
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        **({"base_model": base} if (base := _hub_id(run.model)) else {}),
        "tags": ["regraft", "safety", *(() if chosen.changed else ("pruning", "sparse"))],
        "model-index": [{"name": run.title, "results": _card_results(chosen, _suites(study))}],
    }
    return _rendered(
        "card.md.j2",
        metadata,
        study,
        run=run,
        base=run.model if _hub_id(run.model) else Path(run.model).name,
        of=chosen,
        among=len(_led(run)),
        summary=(*summary(study), *controls(study)),
        command=apply_command(run, chosen, "MODEL"),
    )


def _rendered(template: str, metadata: Mapping[str, Any], study: Study | None, **more: Any) -> str:
    """A card with metadata in front and, with a `study`, the rates that it needs."""
    return render(
        template,
        **more,
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        grids=tables.results(study, brief=True) if study else (),
        judge=study.judge if study else "",
        suites=_suites(study) if study else "",
    )


def _suites(study: Study) -> str:
    return ", ".join(map(public_suite, study.runs[0].dense.result.suite.split(", ")))


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


@dataclass(frozen=True)
class PatchFile:
    """A patch and what it is called on the hub.

    `dense` and `pruned` are hub ids of the models that it was made from, where they are known;
    `size` (bytes) and `digest` (SHA-256) are those of the file `file`.
    """

    patch: Patch
    repository: str
    file: str
    size: int
    digest: str
    dense: str | None = None
    pruned: str | None = None


def render_patch_card(of: PatchFile, study: Study | None = None) -> str:
    """The card of a patch: what it is for, what it was made by, how it is put on, what it does.

    With metadata that the hub reads and, with a `study`, its table of rates.
    """
    metadata = {
        "library_name": "regraft",
        **({"base_model": of.dense} if of.dense else {}),
        "tags": ["regraft", "pruning", "safety"],
    }
    return _rendered(
        "patch_card.md.j2",
        metadata,
        study,
        title=of.repository.partition("/")[2],
        repository=of.repository,
        patch=of.patch,
        changed=is_changed(of.patch),
        dense=of.dense or "the dense model",
        pruned=of.pruned,
        versions=of.patch.about.get("versions", {}),
        facts=Grid.of("", ("", ""), _facts(of)),
    )


def _facts(of: PatchFile) -> Iterator[tuple[str, str]]:
    about: Mapping[str, Any] = of.patch.about
    settings: dict[str, Any] = dict(about.get("settings", {}))
    if of.dense:
        yield "Dense model", of.dense
    if of.pruned:
        yield "Compressed checkpoint", of.pruned
    if method := settings.pop("method", None):
        given = ", ".join(f"{key} {one}" for key, one in settings.items() if one is not None)
        yield "Method", f"{method}: {given}" if given else str(method)
    restored, pruned = of.patch.restored, about.get("pruned")
    share = ""
    if isinstance(pruned, int) and pruned:
        kind = "changed" if is_changed(of.patch) else "pruned"
        share = f" of {pruned:,} {kind} ones, {per_ten_thousand(restored, pruned):.2g} per 10,000"
    yield "Restored weights", f"{restored:,}{share}, in {len(of.patch.tensors)} tensors"
    yield "File", f"{of.file}, {of.size:,} bytes, SHA-256 {of.digest}"
    for role, digest in about.get("inputs", {}).items():
        yield f"Digest of the {role}", str(digest)
    if versions := about.get("versions"):
        yield "Made with", ", ".join(f"{name} {version}" for name, version in versions.items())
