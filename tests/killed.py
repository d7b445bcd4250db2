"""Runs that kill themselves: a server that has imported everything and forks one process a run.

Imports take seconds and a small run less than three, so forking lets a test try many moments. The
server itself computes nothing: a process that has used torch's threads must not be forked.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image


class Server:
    """`with Server() as server: server.run(recipe, folder, kill_at=7)`."""

    def __enter__(self) -> Server:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def run(self, recipe: Path, folder: Path, kill_at: int | None = None) -> tuple[int, int]:
        """Run a recipe in a process that kills itself right before its `kill_at`-th change of a
        file in `folder`.

        Returns:
            (exit status, -9 where it was killed; changes that it made, 0 where it was killed).
        """
        return self._done(recipe=str(recipe), folder=str(folder), kill_at=kill_at)

    def copies(self, recipe: Path, folder: Path, into: Path, every: int) -> list[tuple[int, Path]]:
        """Run a recipe once and keep what it would have left, killed again and again.

        Before its first change of a file in `folder`, and every `every` changes from then on, the
        process stops with all its threads, and what surrounds `folder` is copied: to the byte what
        SIGKILL there leaves, since neither writes out what a process still holds in its memory.

        Returns:
            (number of the change, copy of the folder that `folder` is in) of each stop.
        """
        job = {"recipe": str(recipe), "folder": str(folder), "kill_at": None}
        assert self._done(**job, stop_every=every, into=str(into))[0] == 0
        return sorted((int(one.name), one) for one in into.iterdir())

    def _done(self, **job: Any) -> tuple[int, int]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        status, changes = json.loads(self._process.stdout.readline())
        return status, changes


def _changes_files(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        return bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")


def _child(
    recipe: str, folder: str, kill_at: int | None, answer: int, stop_every: int | None
) -> None:
    from regraft.recipes.file import read_recipe
    from regraft.runs import pipeline

    changes = 0

    def progress(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if _changes_files(event, arguments) and folder in str(arguments[0]):
            changes += 1
            if changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if stop_every and changes % stop_every == 1:
                os.kill(os.getpid(), signal.SIGSTOP)

    status = 1
    try:
        signal.alarm(120)
        sys.addaudithook(progress)
        pipeline.run_one(read_recipe(Path(recipe)), Path(folder))
        os.write(answer, str(changes).encode())
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _ended(child: int, folder: Path, into: str | None, stop_every: int | None) -> int:
    """Wait for a child, and copy what it has written so far whenever it stops."""
    moment = 1
    while os.WIFSTOPPED(status := os.waitpid(child, os.WUNTRACED)[1]):
        assert into and stop_every
        shutil.copytree(folder.parent, Path(into) / f"{moment:05d}", symlinks=True)
        moment += stop_every
        os.kill(child, signal.SIGCONT)
    return os.waitstatus_to_exitcode(status)


def _serve() -> None:
    import transformers

    import quick
    from regraft import costs
    from regraft.report import page

    # What every run imports, reads or compiles only when it gets there, so that no fork has to
    for name in ("runs.pipeline", "data.readers.jsonl", "pruning.pruners.wanda"):
        import_module(f"regraft.{name}")
    import_module("regraft.restoration.methods.hsr")
    Image.preinit()
    for template in page._environment().list_templates():
        page._environment().get_template(template)

    # else a busy machine writes the costs of more stages, and no two runs change as many files
    costs._WORTH_TELLING = costs._BETWEEN_WRITES = math.inf

    quick.hasten()
    names = ("AutoProcessor", "AutoModelForImageTextToText", "AutoModelForCausalLM")
    names += ("LlavaForConditionalGeneration", "LlavaProcessor", "CLIPImageProcessor")
    for name in (*names, "CLIPVisionModel", "LlamaModel", "GenerationConfig"):
        getattr(transformers, name)
    with quick.without_figures():
        _answer_jobs()


def _answer_jobs() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        stops, into = job.setdefault("stop_every", None), job.pop("into", None)
        read, write = os.pipe()
        child = os.fork()
        if not child:
            _child(**job, answer=write)
        os.close(write)
        status = _ended(child, Path(job["folder"]), into, stops)
        changes = os.read(read, 100)
        os.close(read)
        print(json.dumps([status, int(changes or 0)]), flush=True)


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    _serve()
