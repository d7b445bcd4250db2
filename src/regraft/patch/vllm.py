"""Export a patch as vLLM's `CheckpointWeightPatch`: the same fields, in one safetensors file.

The fields are name, shape, dtype, values and indices; values are assigned. Names are those of the
checkpoint, which vLLM maps to its own sharded and packed weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import Tensor

from regraft.patch.apply import Change
from regraft.patch.format import stored_positions

FILE = "weight_patches.safetensors"
METADATA = "patches"


def weight_patches(changes: Sequence[Change]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a safetensors file with a weight patch for each tensor that changes.

    `patches` in the metadata is a JSON list of {"name", "shape", "dtype"}. For each entry the file
    has `NAME.values`, in the checkpoint's dtype, and `NAME.indices`, ascending flat positions in
    row-major order, int32 or, beyond 2^31, int64; both `[k]`. No value is NaN, by which vLLM marks
    unchanged weights: `load_patch` refuses it.
    """
    fields, tensors = [], {}
    for change in changes:
        name = change.record.name
        dtype = str(change.values.dtype).removeprefix("torch.")
        fields.append({"name": name, "shape": list(change.record.shape), "dtype": dtype})
        tensors[f"{name}.values"] = change.values.contiguous()
        tensors[f"{name}.indices"] = stored_positions(change.positions)
    return {METADATA: json.dumps(fields)}, tensors
