"""Reading and checking a bundle: its digests, and its rates counted again from the verdicts."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from regraft.disk.files import digest
from regraft.disk.parsing import from_json, json_object
from regraft.disk.paths import is_name, require_file
from regraft.errors import RegraftError
from regraft.evaluation.keywords import DEFAULT_JUDGE
from regraft.evaluation.results import EvalResult, read_answers, result_from_json
from regraft.evaluation.summary import summarise
from regraft.report.pooling import study_of
from regraft.report.run import Run, Variant
from regraft.report.study import plain
from regraft.runs.bundle import FORMAT, MANIFEST

_MAX_BYTES = 2**31  # that a bundle may unpack to
_ROUNDING = 1e-9  # differences between machines
_RATES = ("asr", "over_refusal", "utility")
_ROW_FIGURES = {  # field of a row -> its name in errors
    **{rate: rate for rate in (*_RATES, "mean_asr")},
    "rsr": "RSR",
    "mean_rsr": "RSR of means",
}


class _Manifest(TypedDict):
    """The content of manifest.json."""

    format: str
    title: str
    regraft: str
    texts: bool
    files: dict[str, str]


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and checked.

    `digest` is the manifest's, and so covers all content. `evaluations` maps run and model, such as
    "runs/qwen2.5-vl/wanda-50/hsr", to the result. `page` is the report over several runs, or the
    card of a single run, as Markdown.
    """

    title: str
    version: str
    digest: str
    files: int
    evaluations: Mapping[str, EvalResult]
    page: str


def read_bundle(path: Path) -> Bundle:
    """Read a bundle; check every digest, and count every rate again from the answers' verdicts.

    The verdicts themselves cannot be checked without the texts of the answers, nor the answers
    without the models.

    Raises:
        RegraftError: it is no bundle, a file is missing, added or changed, or a rate differs from
            what its answers give.
    """
    content = _unpacked(path)
    manifest = _manifest(path, content)
    results = {}
    for name in sorted(content):
        folder, _, file = name.rpartition("/")
        if file == "results.json" and "/evaluation/" in name:
            answers = content.get(f"{folder}/answers.jsonl")
            if answers is None:
                raise RegraftError(f"{path}: {folder} has no answers.jsonl.")
            model = folder.replace("/evaluation/", "/", 1)
            results[model] = _checked_result(f"{path}: {folder}", content[name], answers)
    if not results:
        raise RegraftError(f"{path} holds no evaluation.")
    for name in sorted(one for one in content if one.rpartition("/")[2] == "report.json"):
        page = json_object(content[name], f"{path}: {name}")
        try:
            _check_page(f"{path}: {name}", page, results, name.rpartition("/")[0])
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            raise RegraftError(f"{path}: {name} is no report of regraft ({error!r}).") from error
    pages = sorted(name for name in content if name == "report.md" or name.endswith("/card.md"))
    return Bundle(
        title=manifest["title"],
        version=manifest["regraft"],
        digest=digest(content[MANIFEST]),
        files=len(content),
        evaluations=results,
        page=content[pages[0]].decode(errors="replace") if pages else "",
    )


def _unpacked(path: Path) -> dict[str, bytes]:
    require_file(path, "A bundle is needed.")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [one.filename for one in entries]
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise RegraftError(f"{path}: {twice[0]} is there twice.")
            if bad := [name for name in names if not all(map(is_name, name.split("/")))]:
                raise RegraftError(f"{path}: {bad[0]!r} is no name of a file in a bundle.")
            if sum(one.file_size for one in entries) > _MAX_BYTES:
                largest = max(entries, key=lambda one: one.file_size).filename
                raise RegraftError(f"{path}: {largest} is larger than any file of a bundle.")
            return {name: archive.read(name) for name in names}
    except RegraftError:
        raise
    except Exception as error:  # decoders raise all kinds of errors on a broken archive
        raise RegraftError(f"{path} is damaged or no zip file: {error}") from error


def _manifest(path: Path, content: Mapping[str, bytes]) -> dict[str, Any]:
    where = f"{path}: {MANIFEST}"
    manifest = json_object(content[MANIFEST], where) if MANIFEST in content else {}
    if manifest.get("format") != FORMAT:
        raise RegraftError(f"{path} is no bundle of regraft ({FORMAT}).")
    expected = from_json(_Manifest, manifest, where)["files"]
    found = content.keys() - {MANIFEST}
    if differing := sorted(found ^ expected.keys()):
        what = "is missing" if differing[0] in expected else "was added"
        raise RegraftError(f"{path}: {differing[0]} {what}: it was changed. Ask for it again.")
    if changed := [name for name in sorted(found) if digest(content[name]) != expected[name]]:
        raise RegraftError(
            f"{path}: {changed[0]} does not match its digest; the bundle was changed or damaged. "
            "Ask for it again."
        )
    return manifest


def _checked_result(where: str, results: bytes, answers: bytes) -> EvalResult:
    """Read a result; raise RegraftError unless its answers give its rates."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "answers.jsonl"
        file.write_bytes(answers)
        given = read_answers(file)
    claimed = result_from_json(json_object(results, where).get("result"), given, where)
    counted = summarise(claimed.suite, DEFAULT_JUDGE, given)
    for rate in _RATES:
        _check_same(f"{where}: {rate}", getattr(claimed, rate), getattr(counted, rate))
    for suite in claimed.by_suite.keys() | counted.by_suite.keys():
        for rate in _RATES:
            both = [getattr(one.by_suite.get(suite), rate, None) for one in (claimed, counted)]
            _check_same(f"{where}: {rate} of {suite}", *both)
    return claimed


def _check_same(where: str, claimed: Any, counted: Any) -> None:
    """Raise RegraftError where two rates, or RSRs, differ by more than rounding."""
    stated, found = _figure(claimed), _figure(counted)
    if stated is None or found is None or None in (stated[0], found[0]):
        same = stated == found
    else:
        same = stated[1] == found[1] and abs(stated[0] - found[0]) < _ROUNDING
    if not same:
        raise RegraftError(f"{where} is {_text(stated)}, but the answers give {_text(found)}.")


def _figure(rate: Any) -> tuple[Any, int] | None:
    """(value, n) of an estimate or of its JSON, or (value, 0) of an RSR."""
    content = plain(rate)
    if content is None:
        return None
    return content["value"], content.get("n", 0)


def _text(figure: tuple[Any, int] | None) -> str:
    if figure is None or figure[0] is None:
        return "none"
    value, n = figure
    return f"{100 * value:.2f} % (n = {n})" if n else f"{value:g}"


def _check_page(where: str, page: Any, results: Mapping[str, EvalResult], folder: str) -> None:
    """Check every row of a report.json against the evaluations it is about.

    Args:
        folder: The folder of the file in the bundle; "" for the report over several runs.
    """
    runs = [_run(one, results, folder or _folder_of(one)) for one in page["runs"]]
    counted = study_of(runs, page["against"])
    for table, again in zip(page["tables"], counted.tables, strict=True):
        for row, found in zip(table["rows"], again.rows, strict=True):
            name = " ".join(filter(None, (where, table["model"], table["pruning"], row["name"])))
            for field, title in _ROW_FIGURES.items():
                _check_same(f"{name}: {title}", row[field], getattr(found, field))


def _folder_of(run: Any) -> str:
    """The folder of a run in the bundle, named after its model or its seed."""
    return f"runs/{run['name']}" if run["name"] else f"runs/seed-{run['seed']}"


def _run(run: Any, results: Mapping[str, EvalResult], folder: str) -> Run:
    """A run of a report.json, with the checked results."""
    several = sum(one["base"] == "dense" for one in run["variants"]) > 1
    variants = []
    for one in run["variants"]:
        name, base = one["name"], one["base"]
        inside = name if several or base in (None, "dense") else f"{base}/{name}"
        result = results[f"{folder}/{inside}"]
        variants.append(Variant(name, result, base=base, pruned=one["pruned"]))
    return Run("", "", tuple(variants), recipe=run["recipe"], seed=run["seed"], name=run["name"])
