"""Run tasks of lmms-eval on a checkpoint, with or without a patch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from regraft import ranks
from regraft.errors import RegraftError
from regraft.evaluation.harness import require_harness, run_tasks
from regraft.evaluation.pieces import in_pieces
from regraft.files import write_json
from regraft.keys import describe, working
from regraft.models.load import Source
from regraft.restoration.apply import patched
from regraft.settings.compute import ComputeSettings
from regraft.stages.common import load, patch_in_memory
from regraft.watch import Watch


def harness(
    model: Source,
    tasks: Sequence[str],
    out: Path,
    compute: ComputeSettings,
    watch: Watch,
    *,
    patch_file: Path | None = None,
    limit: int | None = None,
    include: Path | None = None,
) -> dict[str, Any]:
    """Writes the new file `out` with lmms-eval's results by task, and returns them.

    A killed run goes on with the task that it was at.

    Raises:
        RegraftError: `out` exists, or see `run_tasks`.
    """
    if not tasks:
        raise RegraftError("Name at least one task, such as docvqa_val.")
    if out.exists():
        raise RegraftError(f"{out} exists. Choose another output or remove it.")
    require_harness()
    patch, inputs = patch_in_memory(model, patch_file)
    tasks = list(dict.fromkeys(tasks))
    about = {**describe("harness", inputs, compute=compute), "limit": limit}
    own = {"include": None if include is None else str(include.resolve())}
    with working(out, {**about, **own, "tasks": tasks}) as work:
        network, processor = load(model, compute, watch)

        def made(wanted: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
            names = [tasks[i] for i in wanted]
            ran = run_tasks(
                network, processor, names, compute.batch_size, limit=limit, include=include
            )
            yield from ((tasks.index(task), _plain(found)) for task, found in ran)

        with patched(network, model.anatomy, patch) if patch else nullcontext():
            found = in_pieces(len(tasks), made, work, "task")
        results = dict(zip(tasks, found, strict=True))
        if ranks.first():
            write_json(out, {"about": about, "results": results})
    return results


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    """Numbers and texts; lmms-eval's own notes are left out."""
    return {name: value for name, value in found.items() if isinstance(value, int | float | str)}
