"""What makes the processes of tests quick: they do without what no test looks at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import ProcessorMixin

from regraft import registry
from regraft.report import drawing, rate_figures, weight_figures


def hasten() -> None:
    """Change this process: one thread, no wait for the disk, plug-ins looked for only once."""
    torch.set_num_threads(1)
    # Processes die here, not machines: nothing is lost by not waiting for the disk.
    os.fsync = lambda _: None
    # Plug-ins are looked for among all that is installed: milliseconds, many times a test.
    registry.entry_points = cache(registry.entry_points)  # type: ignore[assignment]
    # transformers writes out what it loads for a log that is not kept: a tenth of a small run.
    for kind in (PreTrainedConfig, GenerationConfig, ImageProcessingMixin, ProcessorMixin):
        kind.__repr__ = object.__repr__  # type: ignore[method-assign]


@contextmanager
def without_figures() -> Iterator[None]:
    """Reports without figures, which take most of the time of a report."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (drawing, rate_figures, weight_figures):
            patch.setattr(module, "to_svg", lambda *_, **__: "<svg/>")
        yield
