"""Two processes under torchrun give what one gives."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import distributed_job
import forked
import pico
from disk import write_data
from regraft import distributed
from regraft.heads.score import load_heads
from regraft.models.load import open_source
from regraft.patch.format import load_patch
from regraft.pruning.statistics import load_statistics
from regraft.restoration.ranking import load_ranking

pytestmark = pytest.mark.slow


def launch(processes: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={processes}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of one process and of two."""
    root = tmp_path_factory.mktemp("distributed")
    pico.save("qwen2_vl", root / "dense", torch.bfloat16, "100KB")
    write_data(root / "data", 4)
    (root / "one").mkdir()
    (root / "two").mkdir()
    distributed_job.main(root, root / "one")
    done = launch(2, distributed_job.__file__, root, root / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(p.name for p in (root / "two").glob("world-*")) == ["world-0", "world-1"]
    assert (root / "two" / "world-1").read_text() == "2"
    return root / "one", root / "two"


@pytest.mark.parametrize("method", distributed_job.METHODS)
def test_statistics_are_sums_over_processes(both: tuple[Path, Path], method: str) -> None:
    one, two = (load_statistics(folder / f"statistics-{method}") for folder in both)
    for kind in ("safety", "utility"):
        a, b = getattr(one, kind), getattr(two, kind)
        assert a.samples == b.samples == 4 and a.values.keys() == b.values.keys()
        for key, value in a.values.items():
            torch.testing.assert_close(b.values[key], value, rtol=1e-3, atol=1e-6, msg=key)


@pytest.mark.parametrize("method", distributed_job.METHODS)
def test_masks(both: tuple[Path, Path], method: str) -> None:
    one, two = (open_source(folder / f"pruned-{method}") for folder in both)
    differing = 0
    for linear in one.architecture.linears:
        a, b = (source.checkpoint.read(linear.tensor) for source in (one, two))
        differing += int((((a == 0) != (b == 0)) | ((a - b).abs() > 0.05)).sum())
    # few tokens make H nearly singular, and SparseGPT carries a flipped choice on to its right
    bound = 0.02 if method == "sparsegpt" else 1e-3
    assert differing <= bound * one.architecture.prunable, f"{differing} weights differ"


def test_head_scores(both: tuple[Path, Path]) -> None:
    architecture = open_source(both[0].parent / "dense").architecture
    one, two = (load_heads(folder / "heads", architecture) for folder in both)
    torch.testing.assert_close(two.ships, one.ships)
    torch.testing.assert_close(two.kl, one.kl)


def test_rankings_by_gain(both: tuple[Path, Path]) -> None:
    """Of rounding alone: nearly the same weights, worth nearly the same."""
    one, two = (load_ranking(folder / "ranking") for folder in both)
    assert len(one) > 10
    assert len(two) == pytest.approx(len(one), rel=0.1)
    a, b = (set(zip(r.linear.tolist(), r.position.tolist(), strict=True)) for r in (one, two))
    assert len(a & b) >= 0.9 * max(len(a), len(b))
    first = min(len(one), len(two)) // 2
    torch.testing.assert_close(two.score[:first], one.score[:first], rtol=1e-2, atol=1e-6)


def test_answers_and_what_one_process_writes(both: tuple[Path, Path]) -> None:
    one, two = both
    assert (one / "answers/answers.jsonl").read_bytes() == (
        two / "answers/answers.jsonl"
    ).read_bytes()
    assert load_patch(two / "patch").restored > 0
    tensors = load_file(next((two / "realigned").glob("*.safetensors")))
    assert tensors
    left = {path.name for path in two.iterdir() if path.name.startswith(".")}
    assert not left, f"unfinished work stays behind: {left}"


def _statistics(root: Path, out: Path, batch_size: int) -> tuple[list[int | None], str]:
    """`regraft analyse statistics` by two processes: exit codes, all that they printed."""
    words = ["analyse", "statistics", root / "dense", "--data", root / "data" / "data.jsonl"]
    words += ["--batch-size", batch_size, "--device", "cpu", "--out", out]
    return forked.together(2, *words, folder=out.parent)


def test_too_few_batches_for_the_processes(both: tuple[Path, Path], tmp_path: Path) -> None:
    codes, said = _statistics(both[0].parent, tmp_path / "s.safetensors", batch_size=8)
    assert codes == [2, 2]
    said = " ".join(said.split())
    assert "4 examples make 1 batches of 8, too few for 2 processes" in said
    assert not (tmp_path / "s.safetensors").exists()


def test_the_command_line_speaks_once(both: tuple[Path, Path], tmp_path: Path) -> None:
    codes, said = _statistics(both[0].parent, tmp_path / "s.safetensors", batch_size=2)
    assert codes == [0, 0], said[-3000:]
    assert said.count("Wrote ") == 1
    assert load_statistics(tmp_path / "s.safetensors").utility.samples == 4


@pytest.mark.parametrize(("code", "left"), [(0, True), (None, True), (2, False)])
def test_others_are_left_by_commands_that_went_well(
    code: int | None, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands end with SystemExit; after an error the others may be waiting in a sum."""
    calls: list[str] = []
    launched = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29600"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_, **__: calls.append("in"))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: calls.append("out"))
    with suppress(SystemExit), distributed.joined():
        raise SystemExit(code)
    assert calls == ["in", "out"] if left else ["in"]


def test_one_of_several_is_gone_at_once_after_an_error() -> None:
    """Two processes: one fails while the other waits for it, and their launcher ends both."""
    program = (
        "import sys, regraft.cli as cli, regraft.distributed as distributed\n"
        "from regraft.errors import RegraftError\n"
        "def work(*_, **__):\n"
        "    if distributed.first():\n"
        "        distributed.barrier()\n"
        "    raise RegraftError('the second one failed')\n"
        "cli.application = lambda listed: work\n"
        "cli.main(['prune'])\n"
    )
    port = str(29600 + os.getpid() % 300)
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, **own, "RANK": str(i), "LOCAL_RANK": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in (0, 1)
    ]
    try:
        said = both[1].communicate(timeout=120)[1]
        assert both[1].returncode == 2
        assert "the second one failed" in said
    finally:
        for one in both:
            one.kill()
            one.communicate()
