"""The results of a run in one zip file that can be sent and checked.

It holds the recipe, results, reports, model card, costs, versions and digests, and the verdict on
every answer, so that the receiver can count the rates again. It holds no weights, no images and, by
default, no texts of prompts or answers. The same run always gives the same bytes.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

import regraft
from regraft import distributed, stages
from regraft.disk.files import atomic_file, digest, file_digest
from regraft.disk.parsing import read_json
from regraft.disk.paths import read_text
from regraft.errors import RegraftError
from regraft.evaluation.results import result_to_json
from regraft.patch.format import load_patch
from regraft.recipes.recipe import Recipe
from regraft.runs.reporting import open_run, read_run, run_folders
from regraft.runs.run_dir import RunDir, evaluation_folders

FORMAT = "regraft-bundle-1"
MANIFEST = "manifest.json"
_DATE = (1980, 1, 1, 0, 0, 0)  # the first that a zip file can hold
_PAGES = ("report.json", "report.md", "report.html")  # of a report over several runs
_CARDS = ("report.json", "card.md")  # the other pages of a single run show prompts and answers
# Replaces all texts in an answer; the other fields suffice to count the rates.
_NO_TEXT: dict[str, Any] = {
    **dict.fromkeys(("system", "instruction", "answer", "reason", "image_digest"), ""),
    **dict.fromkeys(("image", "reference", "request"), None),
}
_README = """\
Results of a run of regraft {version}: {title}

The tables are in report.md, if there are several runs, and in runs/*/card.md.
runs/*/evaluation/* hold the rates of every model (results.json) and the verdict on each answer
(answers.jsonl), {texts}. There are no weights and no images.

To check the digests and count every rate again from the verdicts:

    regraft report THIS_FILE.zip
"""


def _public(value: Any, folders: Sequence[str]) -> Any:
    """JSON values with these folders of this machine removed from all texts, keys included."""
    if isinstance(value, str):
        for folder in folders:
            value = value.replace(folder, "")
        return value
    if isinstance(value, Mapping):
        return {_public(key, folders): _public(one, folders) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_public(one, folders) for one in value]
    return value


def write_bundle(folder: Path, out: Path, *, texts: bool = False) -> None:
    """Write the bundle of a finished run, including one of several seeds or models.

    Args:
        folder: The folder of the run; its report must have been written.
        texts: Whether to include the texts of prompts and answers.

    Raises:
        RegraftError: the run is not finished, or `out` exists or is not a .zip file.
    """
    if out.suffix != ".zip":
        raise RegraftError(f"A bundle is a .zip file; {out} is none. Name it {out.stem}.zip.")
    if out.exists():
        raise RegraftError(f"{out} exists already; a bundle is a new file.")
    _, recipe = open_run(folder)
    files = dict(_files(folder, recipe, texts))
    with_texts = "with prompts and answers" if texts else "without the texts of prompts and answers"
    readme = _README.format(version=regraft.__version__, title=recipe.title, texts=with_texts)
    files["README.txt"] = readme.encode()
    manifest = {
        "format": FORMAT,
        "title": recipe.title,
        "regraft": regraft.__version__,
        "texts": texts,
        "files": {name: digest(content) for name, content in sorted(files.items())},
    }
    if distributed.first():
        with atomic_file(out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for name, content in [(MANIFEST, _json(manifest)), *sorted(files.items())]:
                archive.writestr(_entry(name), content, zipfile.ZIP_DEFLATED, 9)


def _entry(name: str) -> zipfile.ZipInfo:
    """An entry with fixed date, owner and system, so that the same content gives the same bytes."""
    entry = zipfile.ZipInfo(name, _DATE)
    entry.create_system, entry.external_attr = 3, 0o644 << 16
    return entry


def _files(folder: Path, recipe: Recipe, texts: bool) -> Iterator[tuple[str, bytes]]:
    """(name, content) of everything but the manifest."""
    if recipe.seeds or recipe.models:
        folders = _folders(recipe)
        for page in _PAGES:
            if (file := RunDir(folder).report / page).is_file():
                yield page, _text(file, folders)
        yield "recipe.yaml", _recipe(recipe, folders)
    for run in run_folders(folder, recipe):
        name = "run" if run == folder else run.name.removeprefix("model-")
        for inside, content in _run_files(run, texts):
            yield f"runs/{name}/{inside}", content


def _run_files(folder: Path, texts: bool) -> Iterator[tuple[str, bytes]]:
    run_dir, recipe = open_run(folder)
    folders = _folders(recipe)
    read_run(folder)  # raises where the run is not finished
    yield "recipe.yaml", _recipe(recipe, folders)
    for page in _CARDS:
        if not (file := run_dir.report / page).is_file():
            raise RegraftError(f"{file} is missing; write it again: `regraft report {folder}`.")
        yield page, _text(file, folders)
    if run_dir.costs.exists():
        yield "costs.json", _json(_public(read_json(run_dir.costs), folders))
    patches = {}
    for pruning in recipe.prune:
        for one in recipe.variants_of(pruning):
            file = run_dir.patch(pruning.name, one.name)
            about = _public(dict(load_patch(file).about), folders)
            patches[f"{pruning.name}/{one.name}"] = {"sha256": file_digest(file), "about": about}
    if patches:
        yield "patches.json", _json(patches)
    for name, evaluation in evaluation_folders(run_dir, recipe).items():
        for file_name, content in _evaluation(evaluation, folders, texts):
            yield f"evaluation/{name}/{file_name}", content


def _evaluation(folder: Path, folders: Sequence[str], texts: bool) -> Iterator[tuple[str, bytes]]:
    """results.json, with the digests of prompts and answers, and answers.jsonl."""
    found = stages.read_evaluation(folder)
    answers = found.result.answers
    prompts = [
        [one.id, one.system, one.instruction, one.request, one.image_digest] for one in answers
    ]
    content = {
        "about": dict(found.about),
        "result": result_to_json(found.result),
        "answers": file_digest(folder / "answers.jsonl"),
        "prompts": digest(_json(prompts)),
    }
    yield "results.json", _json(_public(content, folders))
    lines = []
    for one in answers:
        shown = replace(one, suite=_public(one.suite, folders), **({} if texts else _NO_TEXT))
        lines.append(json.dumps(asdict(shown), ensure_ascii=False, separators=(",", ":")) + "\n")
    yield "answers.jsonl", "".join(lines).encode()


def _folders(recipe: Recipe) -> list[str]:
    """The folders to remove: the one that all paths share, so that they stay distinct, and home."""
    content = recipe.model_dump(mode="json")
    sources = [content["calibration"]["data"], *content["evaluate"]["suite"]]
    sources += [one["search"]["validation"] for one in content["realign"] if one["search"]]
    sources += [one.get("validation") for one in content["defend"]]
    paths = [str(one).partition(":")[2] for one in sources]
    paths += [content["model"], *(one["model"] for one in content["models"])]
    paths += [content["pruned"] or "", content["published"] or ""]
    local = [Path(one).parent for one in paths if Path(one).is_absolute()]
    shared = Path(os.path.commonpath(local)) if local else Path()
    return [f"{one}{os.sep}" for one in (shared, Path.home()) if len(one.parts) > 1]


def _recipe(recipe: Recipe, folders: Sequence[str]) -> bytes:
    content = _public(recipe.model_dump(mode="json"), folders)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode()


def _text(file: Path, folders: Sequence[str]) -> bytes:
    if file.suffix == ".json":
        return _json(_public(read_json(file), folders))
    return str(_public(read_text(file), folders)).encode()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
