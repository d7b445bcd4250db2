"""Provenance: what an artifact is made from, whether it is done, and its unfinished work.

An artifact carries a description of everything that determines its content: settings, digests of
its inputs, versions. The digest of that description is its key. An artifact with the same key is
done; one with another key is a different artifact and is never overwritten.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import regraft
from regraft import distributed
from regraft.data.example import Reading
from regraft.disk.descriptions import described
from regraft.disk.files import (
    digest,
    discard_leftover,
    leftover_bytes,
    new_folders,
    require_empty,
    require_new,
    size_of,
    to_json,
)
from regraft.disk.locks import locked
from regraft.disk.parsing import read_json, shown
from regraft.errors import PassingError, RegraftError
from regraft.models.load import Source, pick_device
from regraft.progress import Progress
from regraft.settings.base import Settings
from regraft.settings.compute import ComputeSettings

_ONLY_ROUNDING = ("batch_size", "tokens_per_pass")  # settings that change results by rounding only
_PIECES = "by size of image"  # how unfinished work is split; if that changes, it starts again
_installed = cache(version)  # without importing the package
# fields of descriptions that are results and no part of the key
_OUTCOMES = {
    *("violated_groups", "heads", "skipped", "start", "steps", "end", "values", "passes", "replies")
}


def describe(
    stage: str,
    inputs: Mapping[str, str],
    settings: Settings | None = None,
    compute: ComputeSettings | None = None,
    data: Mapping[str, Reading] | None = None,
) -> dict[str, Any]:
    """Describe everything that determines an artifact's content, as JSON values.

    Args:
        inputs: Role -> digest of a file that it is made from.
        data: Role -> the examples used.
    """
    about: dict[str, Any] = {
        "stage": stage,
        "versions": {
            "regraft": regraft.__version__,
            "torch": torch.__version__,
            "transformers": _installed("transformers"),
        },
        "inputs": dict(inputs),
    }
    if settings is not None:
        about["settings"] = settings.model_dump(mode="json")
    if compute is not None:
        device = pick_device(compute.device).type
        about["compute"] = compute.model_dump(mode="json") | {"device": device}
    if data is not None:
        about["data"] = {role: _describe_data(reading) for role, reading in data.items()}
    plain: dict[str, Any] = json.loads(to_json(about))
    return plain


def fingerprints(progress: Progress, **sources: Source) -> dict[str, str]:
    """Digests of checkpoints by their role."""
    return {role: one.checkpoint.fingerprint_shown(progress) for role, one in sources.items()}


def is_done(
    out: Path,
    about: Mapping[str, Any],
    read_about: Callable[[], Mapping[str, Any]] | None = None,
    marker: str = "",
) -> bool:
    """Whether `out` exists and was made from the same inputs and settings.

    Settings that only change rounding may differ, so that a run that was out of memory can go on
    with smaller batches; unfinished work starts again with them.

    Args:
        about: The wanted description.
        read_about: Reads the existing description; by default the JSON in `marker`.
        marker: If `out` is a folder, the name of the file in it that holds its description.

    Raises:
        RegraftError: `out` holds something else.
    """

    def done() -> bool:
        if not holds(out, about, read_about, marker):
            return False
        discard_leftover(out)
        shutil.rmtree(_work_folder(out), ignore_errors=True)  # of a run killed at its very end
        return True

    return distributed.decided(done)


def holds(
    out: Path,
    about: Mapping[str, Any],
    read_about: Callable[[], Mapping[str, Any]] | None = None,
    marker: str = "",
) -> bool:
    """As `is_done`, without removing anything."""
    file = out / marker
    if not file.exists():
        if marker:
            require_new(out)
        return False
    try:
        found = read_about() if read_about else described(read_json(file), str(file))
    except RegraftError as error:
        raise RegraftError(
            f"The output {out} exists, and is not what this command writes "
            f"({str(error).rstrip('.')}). Choose another output or remove it."
        ) from error
    require_same(out, *(but_for_rounding(_identity(one)) for one in (found, about)))
    return True


def made_alike(about: Mapping[str, Any], compute: ComputeSettings) -> bool:
    """Whether an artifact was made with these versions and settings, on this kind of device."""
    now = describe("", {}, compute=compute)
    return all(
        but_for_rounding(about.get(part)) == but_for_rounding(now[part])
        for part in ("versions", "compute")
    )


def require_same(out: Path, existing: Any, wanted: Any) -> None:
    """Raise unless the existing description of `out` is the wanted one."""
    if existing != wanted:
        raise RegraftError(
            f"{out} exists and was made with something else ({difference(existing, wanted)}). "
            "Choose another output or remove it."
        )


def difference(found: Any, wanted: Any, where: str = "") -> str:
    """The first field in which two nested mappings differ, in words."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for name in dict.fromkeys([*wanted, *found]):
            if found.get(name) != wanted.get(name):
                inner = f"{where}.{name}" if where else str(name)
                return difference(found.get(name), wanted.get(name), inner)
    return f"{where}: {shown(found)} there, {shown(wanted)} now"


@contextmanager
def working(out: Path, about: Mapping[str, Any]) -> Iterator[Path]:
    """Lock `out` for one job, and give the folder for its unfinished work, named by its key.

    The folder is removed when the block succeeds, and on bad input, which leaves nothing behind.
    Finished parts stay if the run is stopped or ends with a `PassingError` such as a full disk. All
    processes of the job enter and leave together.

    Raises:
        RegraftError: another job is working on `out` or has just finished it, or this process does
            not see the folder.
    """
    folder = _work_folder(out)
    work = folder / _key(about)[:16]
    if not distributed.first():
        distributed.barrier()
        if not (folder / "lock").exists():
            raise RegraftError(
                f"Process {distributed.rank()} does not see {folder}, which process 0 has created. "
                "All processes need the same output folder, on a disk that every machine mounts."
            )
        yield work
        distributed.barrier()
        return
    with new_folders(folder / "lock"), locked(folder / "lock", out):
        try:
            _require_unfinished(out)
            distributed.barrier()
            yield work
            distributed.barrier()
        except BaseException as error:
            stopped = isinstance(error, PassingError) or not isinstance(error, RegraftError)
            if stopped and size_of(work):
                raise
            shutil.rmtree(work, ignore_errors=True)
            (folder / "lock").unlink(missing_ok=True)
            with suppress(OSError):  # not empty: unfinished work of other settings
                folder.rmdir()
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _require_unfinished(out: Path) -> None:
    try:
        require_empty(out)
    except PassingError as error:  # it was empty before this process got the lock
        raise PassingError(
            f"Another process has just finished {out}. Run the same command again to use it."
        ) from error


def _describe_data(reading: Reading) -> dict[str, Any]:
    contents: list[bytes | str] = []
    for e in reading.examples:
        image = e.image.name if e.image else None
        row: list[Any] = [e.id, e.instruction, e.response, e.harmful, e.category, image]
        row += [more for more in (e.references, e.choices, e.group) if more]
        row += [{"content": e.content}] if e.content else []
        row += [{"system": e.system}] if e.system else []
        contents += [json.dumps(row), e.image.read_bytes() if e.image else b""]
    return {
        "source": reading.source,
        "read": reading.read,
        "used": len(reading.examples),
        "skipped": dict(reading.skipped),
        "digest": digest(*contents),
    }


def _key(about: Mapping[str, Any]) -> str:
    return digest(_PIECES, json.dumps(_identity(about), sort_keys=True))


def _identity(about: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a description that forms its key: of data the contents, not the place."""
    data = {
        role: {name: value for name, value in account.items() if name != "source"}
        for role, account in about.get("data", {}).items()
    }
    decides = {name: value for name, value in about.items() if name not in _OUTCOMES}
    return {**decides, "data": data}


def but_for_rounding(content: Any) -> Any:
    """JSON values without the settings, nested ones too, that change results by rounding only."""
    if isinstance(content, Mapping):
        kept = {name: one for name, one in content.items() if name not in _ONLY_ROUNDING}
        return {name: but_for_rounding(one) for name, one in kept.items()}
    return [but_for_rounding(one) for one in content] if isinstance(content, list) else content


def evaluated_differently(
    one: str, ours: Mapping[str, Any], other: str, theirs: Mapping[str, Any], *parts: str
) -> Iterator[str]:
    """Sentences on these parts of two evaluations' descriptions, where they differ.

    Settings that only change rounding are left out.
    """
    if ("compute" in ours) != ("compute" in theirs):
        here, served = (one, other) if "compute" in ours else (other, one)
        yield f"{served} was answered by an endpoint, {here} in memory."
    found: list[str] = []
    for part in (part for part in parts if part in ours and part in theirs):
        mine, its = (but_for_rounding(about[part]) for about in (ours, theirs))
        found += [
            f"{name} {its.get(name)} instead of {mine.get(name)}"
            for name in dict.fromkeys([*mine, *its])
            if mine.get(name) != its.get(name)
        ]
    if found:
        yield f"{other} was evaluated differently from {one}: {', '.join(found)}."


def unfinished_bytes(out: Path) -> int:
    """Disk space taken by unfinished work on `out`."""
    return leftover_bytes(out) + size_of(_work_folder(out))


def _work_folder(out: Path) -> Path:
    return out.parent / f".{out.name}.regraft-work"
