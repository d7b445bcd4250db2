"""What benchmarks share: time and memory of work, runs in processes of their own, saved figures.

It imports nothing of regraft: against_llm_compressor.py also runs where that is not installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

GIB = 2**30


def whole(text: str) -> int:
    """A command-line value that counts something, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until everything on the device is finished, and the result."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def reset_peak(device: torch.device) -> None:
    """Forget the peak memory of a GPU so far."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def device_peak(device: torch.device) -> float | None:
    """Peak memory of a GPU since `reset_peak`, in GiB; None on a CPU."""
    return torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


def host_bytes(field: str) -> int:
    """Memory of this process, from a field of its status: "RssAnon", "VmHWM" (the peak)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def host_peak() -> float:
    """Peak memory of this process in GiB, file pages included."""
    return host_bytes("VmHWM") / GIB


def in_child(python: str = sys.executable, **options: object) -> dict[str, Any]:
    """Run the script again in a process of its own, with more options; the JSON it prints last."""
    more = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [python, *sys.argv, *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def save(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON, if a path is given."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
