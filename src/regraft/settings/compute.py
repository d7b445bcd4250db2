"""Where and how a model is run."""

from __future__ import annotations

from pydantic import Field

from regraft.models.load import DTypeName, Placement
from regraft.settings.base import Settings


class ComputeSettings(Settings):
    """Where and how to run the model."""

    device: str = Field("auto", description="cpu, cuda, cuda:1; auto takes the accelerator.")
    dtype: DTypeName = Field(
        "auto",
        description="Of the computation: float32 on CPU, so that every machine computes the same, "
        "the checkpoint's own elsewhere. On a CPU bfloat16 takes half of the memory; with AMX "
        "instructions (amx_bf16 in lscpu) it is faster than float32, without them slower.",
    )
    batch_size: int = Field(8, ge=1, description="Examples in one forward pass.")
    placement: Placement = Field(
        "resident",
        description="resident: the whole model on the device; streamed, for models larger than "
        "it: one decoder layer at a time (prune, statistics, gain), or spread over all devices and "
        "host memory (heads, eval, searches; needs accelerate).",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the checkpoint."
    )
