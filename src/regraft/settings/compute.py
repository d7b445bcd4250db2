"""Where and how a model is run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from regraft.models.load import (
    DTypeName,
    Placement,
    Source,
    open_source,
    pick_device,
    stored_dtype,
)
from regraft.settings.base import EXPERT, NAMED, Settings


class ComputeSettings(Settings):
    """Where and how to run the model."""

    device: str = Field("auto", description="cpu, cuda or cuda:1; auto picks one.")
    dtype: DTypeName = Field(
        "auto",
        description="auto: float32 on a CPU, else the checkpoint's own. bfloat16 is faster on "
        "CPUs with AMX, or AMD's with AVX-512 BF16.",
    )
    batch_size: int = Field(8, ge=1, description="Examples in one forward pass.")
    placement: Annotated[Placement, NAMED] = Field(
        "resident",
        description="resident: the whole model on the device. streamed, if it does not fit: one "
        "layer at a time, or (answers, heads) spread over host memory.",
    )
    trust_remote_code: Annotated[bool, EXPERT] = Field(
        False, description="Run the checkpoint's own Python code."
    )

    def opened(self, model: str | Path | Source) -> Source:
        """A model by its folder or hub id; its own code runs only if these settings allow it."""
        if isinstance(model, Source):
            return model
        return open_source(model, trust_remote_code=self.trust_remote_code)

    def dtype_of(self, source: Source) -> str:
        """The dtype that a model will be loaded in, such as "bfloat16"."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if pick_device(self.device).type == "cpu" else stored_dtype(source)
