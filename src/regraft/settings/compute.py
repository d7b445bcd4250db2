"""Where and how a model is run."""

from __future__ import annotations

from pydantic import Field

from regraft.models.load import DTypeName, Placement, Source, pick_device, stored_dtype
from regraft.settings.base import Settings


class ComputeSettings(Settings):
    """Where and how to run the model."""

    device: str = Field("auto", description="cpu, cuda, cuda:1; auto is the accelerator.")
    dtype: DTypeName = Field(
        "auto",
        description="auto: float32 on a CPU, the checkpoint's own elsewhere. On a CPU with AMX "
        "(amx_bf16 in lscpu) bfloat16 is faster, without it slower.",
    )
    batch_size: int = Field(8, ge=1, description="Examples in one forward pass.")
    placement: Placement = Field(
        "resident",
        description="resident: the whole model on the device. streamed, for larger ones: a layer "
        "at a time, or where that cannot be, spread over devices and host memory (accelerate).",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the checkpoint."
    )

    def dtype_of(self, source: Source) -> str:
        """The dtype that a model will be loaded in, such as "bfloat16"."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if pick_device(self.device).type == "cpu" else stored_dtype(source)
