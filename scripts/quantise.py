"""Round a checkpoint's weights to a few bits and write them as floats (for docs/quantisation.md).

Weights are rounded to nearest in groups, without calibration: the min-max grid that weight-only
quantisers start from. It is a script and not a pruner of regraft, since it has no `sparsity`, `n_m`
or `scope`, and since any tool's quantised model, written as floats, can be used instead.

    python scripts/quantise.py MODEL OUT --bits 4
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from regraft.errors import RegraftError
from regraft.models.checkpoint_copy import write_edited
from regraft.models.load import open_source

GROUP = 128


def quantised(weight: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """Round each group of a row to 2^bits evenly spaced levels, one of which is 0.

    With l <= 0 <= h the least and the greatest weight of the group, the step is
    s = (h - l) / (2^bits - 1) and the zero point z = round(-l / s); a weight w becomes
    s (clamp(round(w / s) + z, 0, 2^bits - 1) - z), in float32.

    Args:
        weight: `[out, in]`, any float dtype; not modified.
        bits: Bits per weight, at least 2.
        group: Consecutive inputs that share a grid; the last of a row may be shorter.

    Returns:
        `[out, in]` in the weight's dtype.
    """
    most = 2**bits - 1
    parts = []
    for part in weight.float().split(group, dim=1):
        low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
        step = (high - low) / most
        step = step.masked_fill(step == 0, 1)  # a group of zeros
        zero = (-low / step).round()
        parts.append(((part / step).round().add(zero).clamp(0, most) - zero) * step)
    return torch.cat(parts, dim=1).to(weight.dtype)


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("model", help="Folder or hub id of the dense model.")
    parser.add_argument("out", type=Path, help="New folder.")
    parser.add_argument("--bits", type=int, default=4, choices=range(2, 9))
    parser.add_argument("--group", type=int, default=GROUP, help="Inputs that share a grid.")
    args = parser.parse_args()
    if args.group < 1:
        parser.error(f"argument --group: {args.group} inputs; it must be at least 1")
    source = open_source(args.model)
    if odd := [one.tensor for one in source.architecture.linears if one.stored is not None]:
        raise RegraftError(
            f"{odd[0]} holds several matrices, or a transposed one; expected [out, in]. This "
            "script does not round such models."
        )
    write_edited(
        source.checkpoint,
        args.out,
        {
            linear.tensor: lambda weight: quantised(weight, args.bits, args.group)
            for linear in source.architecture.linears
        },
    )


if __name__ == "__main__":
    try:
        main()
    except RegraftError as error:
        sys.exit(f"quantise: error: {error}")
