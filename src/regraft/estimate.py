"""How long a run will take: FLOPs of its steps over the speed of this device, a rough guess."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from regraft.data.collate import prompt_batch
from regraft.data.example import Example
from regraft.models.load import Source, load_processor, pick_device
from regraft.settings.compute import ComputeSettings
from regraft.stages.steps import Step

_SIDE = 2048
_SHARE = 0.3  # of the speed of one large product that whole models reach
_LOOKED_AT = 4
_BOTH_WAYS = 3  # a forward and a backward pass take three times a forward pass


def seconds(
    steps: Iterable[Step],
    dense: Source,
    examples: Iterable[Example],
    new_tokens: int,
    compute: ComputeSettings,
) -> float:
    """What the steps that are not done take, within a factor of about three.

    Args:
        steps: Of a run.
        dense: Whose size counts.
        examples: Prompts, of which the first tell how long all are.
        new_tokens: Length of an answer.
        compute: Device and dtype.
    """
    some = list(examples)[:_LOOKED_AT]
    processor = load_processor(dense)
    lengths = [prompt_batch(processor, [one]).inputs["input_ids"].numel() for one in some]
    tokens = sum(lengths) / max(1, len(lengths))
    left = {step.out: step for step in steps if not step.done}.values()  # some share an artifact
    passed = sum(
        step.answers * (tokens + new_tokens) + step.learns * _BOTH_WAYS * tokens for step in left
    )
    return 2 * dense.architecture.parameters * passed / (_SHARE * _speed(dense, compute))


def _speed(dense: Source, compute: ComputeSettings) -> float:
    """FLOPs a second of one large matrix product, in the dtype that models are loaded in."""
    device, dtype = pick_device(compute.device), getattr(torch, compute.dtype_of(dense))
    matrix = torch.ones(_SIDE, _SIDE, device=device, dtype=dtype)
    float((matrix @ matrix)[0, 0])
    start = time.monotonic()
    float((matrix @ matrix)[0, 0])  # which waits for the device
    return 2 * _SIDE**3 / max(time.monotonic() - start, 1e-6)
