"""The card of a patch: what it is for, what it was made by, how it is put on, what it does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from regraft.evaluation.metrics import per_ten_thousand
from regraft.patch.format import Patch
from regraft.patch.pair import is_changed
from regraft.report import tables
from regraft.report.addresses import public_suite
from regraft.report.formatting import Grid
from regraft.report.page import page_environment
from regraft.report.study import Study


@dataclass(frozen=True)
class Published:
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


def render_patch_card(of: Published, study: Study | None = None) -> str:
    """The card, with metadata that the hub reads and, with a `study`, its table of rates."""
    metadata = {
        "library_name": "regraft",
        **({"base_model": of.dense} if of.dense else {}),
        "tags": ["regraft", "pruning", "safety"],
    }
    suites = study.runs[0].dense.result.suite.split(", ") if study else []
    text = (
        page_environment()
        .get_template("patch_card.md.j2")
        .render(
            metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
            title=of.repository.partition("/")[2],
            patch=of.patch,
            changed=is_changed(of.patch),
            dense=of.dense or "the dense model",
            pruned=of.pruned,
            versions=of.patch.about.get("versions", {}),
            facts=Grid.of("", ("", ""), _facts(of)),
            commands=_commands(of),
            grids=tables.results(study, brief=True) if study else (),
            judge=study.judge if study else "",
            suites=", ".join(map(public_suite, suites)),
        )
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _commands(of: Published) -> str:
    pruned = of.pruned or "PRUNED"
    return "\n".join(
        (
            f"hf download {pruned} --local-dir pruned",
            f"regraft apply pruned {of.repository} --out realigned",
            "regraft eval realigned --suite SUITE --out evaluation",
        )
    )


def _facts(of: Published) -> Iterator[tuple[str, str]]:
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
