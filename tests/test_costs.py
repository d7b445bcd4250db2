"""What a run costs: counted operations against arithmetic, the ledger, and how it is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pico
import truth
from regraft.costs import Cost, Ledger, Metered, read_costs
from regraft.data.collate import prompt_batch
from regraft.errors import RegraftError
from regraft.report import spent
from regraft.watch import Silent

CPU = torch.device("cpu")


def test_operations_of_a_forward_and_a_backward_pass() -> None:
    net = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    metered = Metered(Silent())
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
    metered = Metered(Silent())
    metered.loaded(conv)
    with torch.no_grad():
        out = conv(torch.ones(1, 4, 8, 8))
    assert out.shape == (1, 6, 6, 6)
    assert metered.flops == 2 * (6 * 6 * 6) * (4 // 2 * 3 * 3)


def test_a_ledger_adds_what_was_broken_off(tmp_path: Path) -> None:
    net, metered = nn.Linear(2, 2), Metered(Silent())
    metered.loaded(net)
    path = tmp_path / "costs.json"
    ledger = Ledger(path, metered, CPU)
    with pytest.raises(KeyboardInterrupt), ledger.of("prune", "wanda"):
        net(torch.ones(1, 2).requires_grad_())
        raise KeyboardInterrupt
    with ledger.of("prune", "wanda"), torch.no_grad():
        net(torch.ones(1, 2))
    with ledger.of("evaluate", "wanda"):
        pass  # was there already
    (cost,) = read_costs(path)
    assert (cost.stage, cost.of, cost.flops) == ("prune", "wanda", 8 * 3 + 8)
    assert 0 < cost.seconds < 60
    assert cost.peak_bytes > 10**7
    assert cost.device.endswith(f"{torch.get_num_threads()} threads")


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
    assert spent.by_stage(costs) == (
        (cost("prune", "", 1, 10, 5), 1),
        (cost("evaluate", "", 5, 50, 9), 2),
    )
    assert spent.total(costs) == cost("in all", "", 6, 60, 9)
    assert spent.devices(costs) == "card"


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
    assert spent.duration(seconds) == told


def test_amounts() -> None:
    assert spent.operations(2.344e12) == "2.34 TFLOP"
    assert spent.operations(9.999e14) == "1 PFLOP"
    assert spent.operations(512) == "512 FLOP"
    assert spent.memory(3 * 2**29) == "1.5 GiB"
    assert spent.memory(79 * 2**30) == "79 GiB"


@pytest.mark.parametrize("family", [*pico.PAPER_FAMILIES, "llava"])
def test_operations_of_a_model_are_those_that_torch_counts(family: str, tmp_path: Path) -> None:
    """Image included; matrix products outside of linear layers, of attention, left out."""
    model, processor = pico.build(family)
    batch = prompt_batch(processor, truth.examples(family, tmp_path, 2))
    metered = Metered(Silent())
    metered.loaded(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**batch.inputs)
    by_operation = counter.get_flop_counts()["Global"]
    kinds = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)
    assert metered.flops == sum(by_operation.get(kind, 0) for kind in kinds) > 0
