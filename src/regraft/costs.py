"""Costs of a run: time, floating point operations, peak memory and device of each stage."""

from __future__ import annotations

import math
import platform
import resource
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from regraft import distributed
from regraft.disk.files import discard_leftover, write_json
from regraft.disk.parsing import from_json, read_json
from regraft.progress import Progress, Task, expect

T = TypeVar("T")
_Positive = Annotated[int, Field(ge=1)]
_WORTH_RECORDING = 1.0  # seconds; a shorter stage that runs no model was already finished
_BETWEEN_WRITES = 60.0  # seconds


@dataclass(frozen=True)
class Cost:
    """Cost of one stage on one model, summed over all starts of the run.

    Attributes:
        stage: Name of the stage, such as "prune".
        of: The model that it made or evaluated; "" for a stage of the whole run.
        seconds: Wall clock time.
        flops: Floating point operations of linear layers and convolutions, two for each product;
            a backward pass counts twice its forward pass. Not counted are the products inside
            attention, of experts whose weights are one tensor, and the linear algebra of SparseGPT.
        peak_bytes: Peak memory of one accelerator, or of one process where there is none.
        device: Name of the device, and the number of processes.
    """

    stage: str
    of: str
    seconds: float
    flops: float
    peak_bytes: int
    device: str

    def __add__(self, other: Cost) -> Cost:
        """Add an earlier start and a later one.

        The device is that of the last start that computed; peaks on other devices are dropped.
        """
        last = self if other.flops == 0 else other  # no FLOPs: it only found the stage finished
        peaks = [one.peak_bytes for one in (self, other) if one.device == last.device]
        return replace(
            last,
            seconds=self.seconds + other.seconds,
            flops=self.flops + other.flops,
            peak_bytes=max(peaks),
        )


@dataclass(frozen=True)
class CalibrationPass:
    """One forward and backward pass over all calibration prompts of a run, harmful and harmless.

    Attributes:
        prompts: Number of prompts.
        tokens: Their tokens, including image tokens, without responses.
        flops: 6 for each prunable weight of the decoder and token: 2 forward and, as in `Cost`,
            twice as many backward (C = 6 N D; Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
            The vision tower and the LM head are not counted.
    """

    prompts: _Positive
    tokens: _Positive
    flops: _Positive


class Metered(Progress):
    """Progress that counts the floating point operations of every model that is `loaded`.

    It uses hooks rather than `torch.utils.flop_counter`, which intercepts every operator: a run on
    a pico model (prune, gain, evaluate) took 5.4 s of CPU time with it and 2.2 s with hooks.

    Attributes:
        flops: The number counted so far.
        advanced: Called whenever a task advances.
    """

    def __init__(self, progress: Progress) -> None:
        self.flops = 0.0
        self.advanced: Callable[[], None] = lambda: None
        self._inner = progress
        self._known: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    @contextmanager
    def task(self, what: str, total: int, unit: str = "") -> Iterator[Task]:
        """Start a task of the wrapped progress that calls `advanced` too."""
        with self._inner.task(what, total, unit) as advance:

            def advance_both(done: int) -> None:
                advance(done)
                self.advanced()

            yield Task(advance_both, partial(expect, advance))

    def note(self, text: str) -> None:
        self._inner.note(text)

    def loaded(self, network: nn.Module) -> None:
        """Count the operations of this model from now on."""
        self._inner.loaded(network)
        if network in self._known:
            return
        self._known.add(network)
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                module.register_forward_hook(self._count)

    def _count(self, module: nn.Module, _args: Any, output: Any) -> None:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or not isinstance(output, Tensor):
            return  # layers with packed weights or several outputs are not counted
        products = output.numel() * math.prod(weight.shape[1:])
        self.flops += 2 * products * (3 if output.requires_grad else 1)


class Ledger:
    """The costs of a run, in a file to which every finished or interrupted stage is added.

    A running stage is saved too, at most once a minute when a task advances; a killed process loses
    the cost since then.
    """

    def __init__(self, path: Path, metered: Metered, device: torch.device) -> None:
        self._path, self._metered, self._device = path, metered, device

    @contextmanager
    def measure(self, stage: str, model: str = "") -> Iterator[None]:
        """Charge the block to a stage. All processes must enter and leave it together."""
        earlier = None
        if distributed.first():
            discard_leftover(self._path)
            earlier = self._read().get((stage, model))
        spent = self._meter(stage, model)
        writing, written = threading.Lock(), time.monotonic()

        def save_estimate() -> None:
            with suppress(Exception):  # the stage, or its own error, matters more
                # Assumes that the other processes, whose share is as large, spent the same.
                self._save(earlier, _combined([spent()] * distributed.world()))

        def advanced() -> None:
            nonlocal written
            with writing:  # tasks may advance in several threads
                if time.monotonic() - written >= _BETWEEN_WRITES:
                    written = time.monotonic()
                    save_estimate()

        self._metered.advanced = advanced
        try:
            yield
        except BaseException:
            save_estimate()
            raise
        finally:
            self._metered.advanced = lambda: None
        self._save(earlier, _combined(distributed.gathered(spent())))

    def _meter(self, stage: str, model: str) -> Callable[[], Cost]:
        """Return a function that gives the cost of this process from now until its call."""
        gpus: Sequence[int] = ()
        if self._device.type == "cuda":
            torch.cuda.init()
            gpus = range(torch.cuda.device_count())
        for gpu in gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        start, before = time.monotonic(), self._metered.flops

        def spent() -> Cost:
            seconds, flops = time.monotonic() - start, self._metered.flops - before
            peak = max(map(torch.cuda.max_memory_allocated, gpus)) if gpus else _resident()
            return Cost(stage, model, seconds, flops, peak, _device_name(self._device))

        return spent

    def _read(self) -> dict[tuple[str, str], Cost]:
        return {(one.stage, one.of): one for one in read_costs(self._path)}

    def _save(self, earlier: Cost | None, cost: Cost) -> None:
        if distributed.first() and (cost.flops or cost.seconds >= _WORTH_RECORDING):
            total = cost if earlier is None else earlier + cost
            costs = self._read() | {(cost.stage, cost.of): total}
            write_json(self._path, [asdict(one) for one in costs.values()])


def read_costs(path: Path) -> list[Cost]:
    """Read the costs of a run; empty if the file is missing.

    Raises:
        RegraftError: the file holds something else.
    """
    return _read(path, list[Cost], "costs of a run") if path.exists() else []


def read_pass(path: Path) -> CalibrationPass | None:
    """Read the size of a run's calibration pass; None if the file is missing.

    Raises:
        RegraftError: the file holds something else.
    """
    return _read(path, CalibrationPass, "calibration pass") if path.exists() else None


def _read(path: Path, kind: type[T], what: str) -> T:
    where = f"{path} holds no {what}; remove it and continue the run"
    return from_json(kind, read_json(path), where)


def _device_name(device: torch.device) -> str:
    """The device's model name, with the number of processes if there are several."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"
    return name if distributed.world() == 1 else f"{distributed.world()} x {name}"


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


def _combined(costs: Sequence[Cost]) -> Cost:
    """The cost of all processes together; the time is that of the first."""
    return replace(
        costs[0],
        flops=sum(one.flops for one in costs),
        peak_bytes=max(one.peak_bytes for one in costs),
    )
