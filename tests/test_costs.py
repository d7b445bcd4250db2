"""What a run costs: counted operations against arithmetic, the ledger, and how it is told."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pico
import truth
from regraft import costs as module
from regraft import distributed
from regraft.costs import Cost, Ledger, Metered, read_costs
from regraft.data.collate import prompt_batch
from regraft.errors import RegraftError
from regraft.progress import Progress
from regraft.report.formatting import duration, memory, operations
from regraft.report.page import render_html, render_markdown
from regraft.report.pooling import study_of
from regraft.report.tables import costs as cost_grids
from test_report import REPORT

CPU = torch.device("cpu")


def test_operations_of_a_forward_and_a_backward_pass() -> None:
    net = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    metered = Metered(Progress())
    metered.loaded(net)
    metered.loaded(net)  # known: not counted twice
    with torch.no_grad():
        net(torch.ones(4, 7))
    forward = 2 * 4 * (7 * 5 + 5 * 3)
    assert metered.flops == forward
    net(torch.ones(4, 7)).sum().backward()
    assert metered.flops == forward + 3 * forward


def test_operations_of_a_convolution() -> None:
    conv = nn.Conv2d(4, 6, kernel_size=3, groups=2, bias=False)
    metered = Metered(Progress())
    metered.loaded(conv)
    with torch.no_grad():
        out = conv(torch.ones(1, 4, 8, 8))
    assert out.shape == (1, 6, 6, 6)
    assert metered.flops == 2 * (6 * 6 * 6) * (4 // 2 * 3 * 3)


def test_a_ledger_adds_what_was_broken_off(tmp_path: Path) -> None:
    net, metered = nn.Linear(2, 2), Metered(Progress())
    metered.loaded(net)
    path = tmp_path / "costs.json"
    ledger = Ledger(path, metered, CPU)
    with pytest.raises(KeyboardInterrupt), ledger.measure("prune", "wanda"):
        net(torch.ones(1, 2).requires_grad_())
        raise KeyboardInterrupt
    with ledger.measure("prune", "wanda"), torch.no_grad():
        net(torch.ones(1, 2))
    with ledger.measure("evaluate", "wanda"):
        pass  # was there already
    (cost,) = read_costs(path)
    assert (cost.stage, cost.of, cost.flops) == ("prune", "wanda", 8 * 3 + 8)
    assert 0 < cost.seconds < 60
    assert cost.peak_bytes > 10**7
    assert re.search(rf", {torch.get_num_threads()} threads?$", cost.device)


@contextmanager
def _at_work(tmp_path: Path, stage: str = "prune") -> Iterator[tuple[nn.Module, Any, Path]]:
    """A layer of 8 operations a forward pass, a task's advance and the file of the costs."""
    net, metered, path = nn.Linear(2, 2), Metered(Progress()), tmp_path / "costs.json"
    metered.loaded(net)
    ledger = Ledger(path, metered, CPU)
    with ledger.measure(stage), metered.task("Pruning", 9) as done, torch.no_grad():
        yield net, done, path


def test_what_a_killed_start_had_spent_is_kept_and_not_counted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BETWEEN_WRITES", 0)

    def flops() -> list[float | None]:
        return [one.flops for one in read_costs(tmp_path / "costs.json")]

    with _at_work(tmp_path) as (net, done, path):
        for steps in (1, 2):
            net(torch.ones(1, 2))
            done(1)
            assert flops() == [8 * steps]
        as_killed = shutil.copyfile(path, tmp_path / "killed.json")
        net(torch.ones(1, 2))
    assert flops() == [8 * 3]
    shutil.copyfile(as_killed, path)
    with _at_work(tmp_path) as (net, done, _):
        net(torch.ones(1, 2))
        done(1)
        done(1)
        assert flops() == [8 * (2 + 1)]
    assert flops() == [8 * (2 + 1)]


def test_nothing_is_left_of_a_start_that_was_killed_as_it_wrote(tmp_path: Path) -> None:
    (tmp_path / ".costs.json.regraft-tmp").write_text("[")
    with _at_work(tmp_path):
        pass  # done before, so that nothing is spent and written
    assert list(tmp_path.iterdir()) == []


def test_a_stage_at_work_is_not_written_at_every_step(tmp_path: Path) -> None:
    with _at_work(tmp_path) as (net, done, path):
        for _ in range(9):
            net(torch.ones(1, 2))
            done(1)
        assert not path.exists()


def test_operations_are_those_of_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 3)

    def gathered(own: Cost) -> list[Cost]:
        return [own, replace(own, flops=100.0, peak_bytes=2**50), replace(own, flops=20.0)]

    monkeypatch.setattr(distributed, "gathered", gathered)
    with _at_work(tmp_path) as (net, _, path):
        net(torch.ones(1, 2))
    (cost,) = read_costs(path)
    assert (cost.flops, cost.peak_bytes) == (8 + 100 + 20, 2**50)
    assert cost.device.startswith("3 x ")

    def hangs(_: Cost) -> list[Cost]:
        raise AssertionError("the others are not here")

    monkeypatch.setattr(distributed, "gathered", hangs)
    with pytest.raises(KeyboardInterrupt), _at_work(tmp_path, "apply") as (net, _, path):
        net(torch.ones(1, 2))
        raise KeyboardInterrupt
    assert [one.flops for one in read_costs(path)] == [8 + 100 + 20, 3 * 8]


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BETWEEN_WRITES", 0)
    monkeypatch.setattr(distributed, "first", lambda: False)
    with _at_work(tmp_path) as (net, done, path):
        net(torch.ones(1, 2))
        done(1)
    assert not path.exists()


def test_a_stage_fails_by_its_own_error_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RegraftError("The disk is full")

    monkeypatch.setattr(module, "write_json", full)
    monkeypatch.setattr(module, "_BETWEEN_WRITES", 0)
    with pytest.raises(ZeroDivisionError), _at_work(tmp_path) as (net, done, _):
        net(torch.ones(1, 2))
        done(1)
        raise ZeroDivisionError
    with pytest.raises(RegraftError, match="disk is full"), _at_work(tmp_path) as (net, _, _):
        net(torch.ones(1, 2))


def test_a_peak_is_of_the_device_that_is_named() -> None:
    old, new = (Cost("prune", "a", 1, 1, peak, name) for peak, name in ((9, "old"), (5, "new")))
    assert (old + new).peak_bytes == 5
    assert (old + replace(new, device="old")).peak_bytes == 9
    assert (old + new).device == "new"


def test_the_peak_of_the_fullest_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks, reset = {0: 5, 1: 9, 2: 7}, []
    for name, does in {
        "init": lambda: None,
        "device_count": lambda: len(peaks),
        "reset_peak_memory_stats": reset.append,
        "max_memory_allocated": peaks.__getitem__,
        "get_device_name": lambda _: "card",
    }.items():
        monkeypatch.setattr(torch.cuda, name, does)
    monkeypatch.setattr(module, "_WORTH_RECORDING", 0)
    path = tmp_path / "costs.json"
    with Ledger(path, Metered(Progress()), torch.device("cuda")).measure("prune"):
        assert reset == [0, 1, 2]
    (cost,) = read_costs(path)
    assert (cost.peak_bytes, cost.device) == (9, "card")


def test_the_report_has_the_costs_by_stage() -> None:
    prune = Cost("prune", "a", 1, 2e12, 2**30, "card")
    apply = Cost("apply", "a", 1, 0, 2**29, "card")
    study = study_of([replace(REPORT, costs=(prune, apply))])
    for render in (render_html, render_markdown):
        page = render(study)
        assert "0 FLOP" in page and "512 MiB" in page
    rows = render_markdown(study).splitlines()
    assert "| apply | 1 | 1.0 s | 0 FLOP | 512 MiB |" in rows
    assert "| total | – | 2.0 s | 2 TFLOP | 1 GiB |" in rows
    header = rows.index("| Stage | Models | Time | Operations | Peak memory |")
    assert rows[header - 1] == "" and rows[header - 2] == "**By stage**"


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    assert read_costs(path) == []
    path.write_text(json.dumps([{"stage": "prune"}]))
    with pytest.raises(RegraftError, match=r"costs\.json holds no costs of a run"):
        read_costs(path)


def test_costs_by_stage() -> None:
    def cost(stage: str, of: str, seconds: float, flops: float, peak: int) -> Cost:
        return Cost(stage, of, seconds, flops, peak, "card")

    costs = [
        cost("prune", "a", 1, 10, 5),
        cost("evaluate", "a", 2, 20, 9),
        cost("evaluate", "b", 3, 30, 7),
    ]
    stages, _ = cost_grids(replace(REPORT, costs=tuple(costs)))
    assert [tuple(cell.text for cell in row) for row in stages.rows] == [
        ("prune", "1", "1.0 s", "10 FLOP", "0 MiB"),
        ("evaluate", "2", "5.0 s", "50 FLOP", "0 MiB"),
        ("total", "–", "6.0 s", "60 FLOP", "0 MiB"),
    ]


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599.7, "1 h 0 min"),
        (3725, "1 h 2 min"),
        (7199, "2 h 0 min"),
    ],
)
def test_durations(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_amounts() -> None:
    assert operations(2.344e12) == "2.34 TFLOP"
    assert operations(9.999e14) == "1 PFLOP"
    assert operations(512) == "512 FLOP"
    assert operations(0) == "0 FLOP"
    assert operations(1.234e21) == "1.23 ZFLOP"
    assert operations(9.996e23) == "1,000 ZFLOP"
    assert operations(1.2345e25) == "12,345 ZFLOP"
    assert memory(2**19 + 1) == "1 MiB"
    assert memory(640 * 2**20) == "640 MiB"
    assert memory(2**30 - 1) == "1 GiB"
    assert memory(3 * 2**29) == "1.5 GiB"
    assert memory(79 * 2**30) == "79 GiB"


@pytest.mark.parametrize("family", [*pico.PAPER_FAMILIES, "llava"])
def test_operations_of_a_model_are_those_that_torch_counts(family: str, tmp_path: Path) -> None:
    """Image included; matrix products outside of linear layers, of attention, left out."""
    model, processor = pico.build(family)
    batch = prompt_batch(processor, truth.examples(family, tmp_path, 2))
    metered = Metered(Progress())
    metered.loaded(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**batch.inputs)
    by_operation = counter.get_flop_counts()["Global"]
    kinds = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)
    assert metered.flops == sum(by_operation.get(kind, 0) for kind in kinds) > 0


def test_seeing_that_a_stage_is_done_takes_nothing_from_it() -> None:
    """A run that is called again elsewhere; and stages of several devices in all."""
    done = Cost("rank", "gain", 900, 1e18, 70 << 30, "H100")
    seen = done + Cost("rank", "gain", 12, 0, 1 << 28, "EPYC")
    assert seen == replace(done, seconds=912)
    again = done + Cost("rank", "gain", 12, 1e9, 5 << 30, "A100")
    assert (again.device, again.peak_bytes, again.flops) == ("A100", 5 << 30, 1e18 + 1e9)
    both = (done, replace(done, device="A100", peak_bytes=1 << 30))
    stages, _ = cost_grids(replace(REPORT, costs=both))
    assert stages.rows[-1][-1].text == "70 GiB", "the highest peak on any device"
