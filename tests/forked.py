"""Commands in processes of their own, forked from one that has imported everything.

Imports take seconds and small work less. This is for tests of which a process is the point, but
not how it begins: kills, and several processes at once.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("quick", "regraft.cli", "regraft.runs.pipeline", "regraft.report.write"),
        *("transformers.models.auto.modeling_auto", "transformers.models.auto.processing_auto"),
        *("transformers.models.llava.modeling_llava", "transformers.models.clip.modeling_clip"),
        *("transformers.models.llama.modeling_llama", "torch.distributed"),
        *("transformers.models.qwen2_vl.modeling_qwen2_vl", "optuna", "transformers.generation"),
    ]
)


def start(
    *words: object, said: Path | None = None, environment: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """Start `regraft` with these words; all that it prints goes into the file `said`, else errors
    to where pytest's go, and the rest nowhere. Its reports have no figures."""
    given = [*map(str, words)], said, dict(environment or {})
    process = CONTEXT.Process(target=_run, args=given)
    process.start()
    return process


def _run(words: Sequence[str], said: Path | None, environment: Mapping[str, str]) -> None:
    file = os.open(said or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    if said:
        os.dup2(file, 2)
    os.environ.update(environment)
    import quick
    from regraft.cli import main

    quick.hasten()
    with quick.without_figures():
        main([*words])


def together(count: int, *words: object, folder: Path) -> tuple[list[int | None], str]:
    """Run `regraft` in `count` processes, as a launcher starts them.

    Returns:
        (exit codes, all that they printed).
    """
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    said = [folder / f"said-{rank}" for rank in range(count)]
    processes = [
        start(
            *words,
            said=said[rank],
            environment=common | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"},
        )
        for rank in range(count)
    ]
    for process in processes:
        process.join(300)
        process.kill()
        process.join()
    return [one.exitcode for one in processes], "".join(one.read_text() for one in said)
