"""What a run costs: time, floating point operations and peak memory of its stages, and on what."""

from __future__ import annotations

import math
import platform
import resource
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft import ranks
from regraft.errors import RegraftError
from regraft.files import read_json, write_json
from regraft.watch import Advance, Watch

_WORTH_TELLING = 1.0  # seconds; what takes less and runs no model was there already


@dataclass(frozen=True)
class Cost:
    """Of one stage on one model, all starts of the run together.

    Attributes:
        stage: Such as "prune".
        of: The model that it made or evaluated; "" where it is of the whole run.
        seconds: Wall clock.
        flops: Floating point operations of linear layers and convolutions, two for each product;
            a backward pass counts twice its forward pass. Attention's own products are left out.
        peak_bytes: The most memory in use at a time: of the accelerator, or else of the process.
        device: Its name, and how many processes ran.
    """

    stage: str
    of: str
    seconds: float
    flops: float
    peak_bytes: int
    device: str

    def __add__(self, other: Cost) -> Cost:
        """Both, on the later one's device."""
        return replace(
            other,
            seconds=self.seconds + other.seconds,
            flops=self.flops + other.flops,
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
        )


class Metered:
    """A watch that counts the floating point operations of every model it is told of."""

    def __init__(self, watch: Watch) -> None:
        self.flops = 0.0
        self._watch = watch
        self._known: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def task(self, what: str, total: int, unit: str = "") -> AbstractContextManager[Advance]:
        """Tell the watch inside."""
        return self._watch.task(what, total, unit)

    def note(self, text: str) -> None:
        """Tell the watch inside."""
        self._watch.note(text)

    def loaded(self, network: nn.Module) -> None:
        """Count what the model computes from here on."""
        self._watch.loaded(network)
        if network in self._known:
            return
        self._known.add(network)
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                module.register_forward_hook(self._count)

    def _count(self, module: nn.Module, _args: Any, output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        products = output.numel() * math.prod(weight.shape[1:])
        self.flops += 2 * products * (3 if output.requires_grad else 1)


class Ledger:
    """The costs of a run, in a file that every finished or broken off stage is added to."""

    def __init__(self, path: Path, metered: Metered, device: torch.device) -> None:
        self._path, self._metered, self._device = path, metered, device

    @contextmanager
    def of(self, stage: str, model: str = "") -> Iterator[None]:
        """What happens inside is a cost of this stage."""
        gpu = self._device.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        start, before = time.monotonic(), self._metered.flops
        try:
            yield
        finally:
            seconds, flops = time.monotonic() - start, self._metered.flops - before
            peak = torch.cuda.max_memory_allocated(self._device) if gpu else _resident()
            # every process has its share of the prompts
            cost = Cost(stage, model, seconds, flops * ranks.world(), peak, named(self._device))
            if ranks.first() and (flops or seconds >= _WORTH_TELLING):
                self._add(cost)

    def _add(self, cost: Cost) -> None:
        costs = {(one.stage, one.of): one for one in read_costs(self._path)}
        key = cost.stage, cost.of
        costs[key] = costs[key] + cost if key in costs else cost
        write_json(self._path, [asdict(one) for one in costs.values()])


def read_costs(path: Path) -> list[Cost]:
    """The costs of a run so far; none where the file is missing.

    Raises:
        RegraftError: the file holds something else.
    """
    if not path.exists():
        return []
    try:
        return [Cost(**one) for one in read_json(path)]
    except TypeError as error:
        raise RegraftError(f"{path} holds no costs of a run ({error}). Remove it.") from error


def named(device: torch.device) -> str:
    """What a device is called by its maker, and how many processes use one each."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    return name if ranks.world() == 1 else f"{ranks.world()} x {name}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _resident() -> int:
    """Peak resident memory of this process so far, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
