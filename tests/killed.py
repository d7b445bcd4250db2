"""Runs that kill themselves: a server that has imported everything and forks one process a run.

Imports take seconds and a small run less than one, so forking lets a test try many moments. The
server itself computes nothing: a process that has used torch's threads must not be forked.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any


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
        assert self._process.stdin
        assert self._process.stdout
        job = {"recipe": str(recipe), "folder": str(folder), "kill_at": kill_at}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        status, changes = json.loads(self._process.stdout.readline())
        return status, changes


def _changes_files(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        return bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")


def _child(recipe: str, folder: str, kill_at: int | None, answer: int) -> None:
    from regraft.recipes.file import read_recipe
    from regraft.runs import pipeline

    changes = 0

    def progress(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if _changes_files(event, arguments) and folder in str(arguments[0]):
            changes += 1
            if changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

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


def _serve() -> None:
    import torch
    import transformers

    from regraft import costs
    from regraft.report import rate_figures, weight_figures
    from regraft.runs import pipeline  # noqa: F401 - so that no fork has to

    # else a busy machine writes the costs of more stages, and no two runs change as many files
    costs._WORTH_TELLING = costs._BETWEEN_WRITES = math.inf

    torch.set_num_threads(1)
    names = ("AutoProcessor", "AutoModelForImageTextToText", "AutoModelForCausalLM")
    names += ("LlavaForConditionalGeneration", "LlavaProcessor", "CLIPImageProcessor")
    for name in (*names, "CLIPVisionModel", "LlamaModel", "GenerationConfig"):
        getattr(transformers, name)
    for module in (rate_figures, weight_figures):
        module.to_svg = lambda *_: "<svg/>"  # type: ignore[assignment]  # drawing takes most of the time of such a small run
    for line in sys.stdin:
        job = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if not child:
            _child(**job, answer=write)
        os.close(write)
        changes = os.read(read, 100)
        os.close(read)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([status, int(changes or 0)]), flush=True)


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    _serve()
