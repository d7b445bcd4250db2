"""Running sums over the inputs of linears at response tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regraft import distributed
from regraft.data.collate import Batch
from regraft.errors import RegraftError
from regraft.models.architecture import LinearArchitecture
from regraft.models.experts import ExpertLinear, observed


@dataclass
class Sums:
    """Accumulated sums of linears. Linears with the same input, such as q, k and v, share a sum.

    `sums` and `tokens` are stored under the `LinearArchitecture.key` of the first linear that reads
    an input; `source` maps the key of every linear that ran to that key.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)

    @classmethod
    def known(cls, values: Mapping[str, Tensor]) -> Sums:
        """Wrap values computed elsewhere, such as gradients, by `LinearArchitecture.key`."""
        return cls(dict(values), source={key: key for key in values})

    def add(self, linear: LinearArchitecture, part: Tensor, tokens: int) -> None:
        """Add `part`, the summand of `tokens` tokens, to the sum of `linear`."""
        key = linear.key
        self.source[key] = key
        self.sums[key] = self.sums[key].add_(part) if key in self.sums else part
        self.tokens[key] = self.tokens.get(key, 0) + tokens

    def ran(self, linear: LinearArchitecture) -> bool:
        """Whether a linear ran on the calibration data."""
        return linear.key in self.source

    def unseen(self, linear: LinearArchitecture) -> bool:
        """Whether a linear is one of an expert to which the router sent no calibration token."""
        if linear.expert is None:
            return False
        if not self.ran(linear):
            return True
        source = self.source[linear.key]
        return self.tokens[source] == 0 if self.tokens else not self.sums[source].any()

    def of(self, linear: LinearArchitecture) -> Tensor:
        """The sum for a linear.

        Raises:
            RegraftError: it had no inputs, or they overflow.
        """
        source = self.source.get(linear.key)
        if source is None or self.tokens.get(source) == 0:
            raise RegraftError(
                f"{linear.key} was never used by the calibration data, or has no gradient. "
                "Text-only prompts skip cross-attention: calibrate on examples with images. Layers "
                "that only choose tokens have no gradient: leave them dense (--ignore "
                f"'*.{linear.name}')."
            )
        if not torch.isfinite(self.sums[source]).all():
            raise overflow(linear)
        return self.sums[source]

    def gather(self) -> None:
        """Add up the sums of all processes.

        Raises:
            RegraftError: they ran different linears (Mllama's prompts with and without image).
        """
        require_same_layers(self.source)
        for key, total in sorted(self.sums.items()):
            distributed.total(total)
            self.tokens[key] = int(
                distributed.total(torch.tensor(self.tokens[key], device=total.device))
            )

    def observing(
        self,
        linears: Mapping[LinearArchitecture, nn.Module],
        accumulate: Callable[[Tensor, Batch], Tensor],
    ) -> Callable[[Batch], AbstractContextManager[None]]:
        """A batch -> a context in which `accumulate` of its forward passes' inputs is added up.

        Inputs `[B, S, in]` count at response tokens only; for an expert, at those that the router
        sends to it. Vision tokens, which Mllama's cross-attention and Ernie's vision experts read,
        are never response tokens: they count if a response token attends to them. `linears` maps
        linears to the modules that own them.
        """

        def around(batch: Batch) -> AbstractContextManager[None]:
            response, tiles = batch.response, _attended_tiles(batch)
            last: tuple[Tensor, str] | None = None  # the last input, and the first to read it

            def observe(linear: LinearArchitecture) -> Callable[[nn.Module, Any], None]:
                def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                    nonlocal last
                    if last is not None and args[0] is last[0]:
                        self.source[linear.key] = last[1]
                        return
                    last = args[0], linear.key
                    tokens = tiles if linear.reads_vision else response
                    mask = _counted(linear, module, args[0], tokens)
                    counted = args[0][mask].flatten(0, -2)
                    self.add(linear, accumulate(counted, batch), len(counted))

                return hook

            return observed(
                linears, batch, lambda li, one: one.register_forward_pre_hook(observe(li))
            )

        return around


def _counted(
    linear: LinearArchitecture, module: nn.Module, inputs: Tensor, tokens: Tensor | None
) -> Tensor | None:
    """Which of a linear's inputs count, a mask over all their dimensions but the last.

    `inputs` are `[B, S, in]`, or laid out as `[B * S, in]` or `[B, 1, S, in]`; an expert's
    `[n, in]`. `tokens` `[B, S]` bool marks the tokens that count; None counts all.
    """
    if tokens is None:
        return None
    if isinstance(module, ExpertLinear):
        return tokens.flatten()[module.tokens]
    if math.prod(inputs.shape[:-1]) != tokens.numel() and not linear.reads_vision:
        raise RegraftError(
            f"{linear.key} reads inputs of shape {list(inputs.shape)}, which are not the "
            f"{tokens.numel()} tokens of the prompts (an encoder's states?). Leave it dense with "
            f"--ignore '*.{linear.name}'."
        )
    return tokens if linear.reads_vision else tokens.view(inputs.shape[:-1])


def require_same_layers(ran: object) -> None:
    """Raise unless all processes ran the same linears, so that their sums can be added up."""
    if not distributed.same(ran):
        raise RegraftError(
            "The processes ran different layers: one had only prompts without image. Keep examples "
            "with and without an image apart, or use one process."
        )


def overflow(linear: LinearArchitecture) -> RegraftError:
    """The error for inputs or gradients that are not finite."""
    return RegraftError(
        f"The inputs or gradients of {linear.key} overflow in this dtype. "
        "Use --dtype bfloat16 or float32."
    )


def _attended_tiles(batch: Batch) -> Tensor | None:
    """Which of Mllama's image tiles a response token attends to, `[B * images * tiles]` bool.

    The processor pads every image to the largest number of tiles; no token attends to padding.
    """
    mask = batch.inputs.get("cross_attention_mask")  # [B, S, images, tiles]
    if mask is None:
        return None
    return (mask.bool() & batch.response[..., None, None]).any(dim=1).flatten()
