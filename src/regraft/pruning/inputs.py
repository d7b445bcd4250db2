"""Running sums over what weight matrices are fed at response tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from regraft import distributed
from regraft.data.collate import Batch
from regraft.errors import RegraftError
from regraft.models.architecture import LinearArchitecture

Reduce = Callable[[Tensor], Tensor]
"""`[tokens, in]` -> a float32 sum over tokens, such as `sum_of_squares` or `second_moments`."""
Observing = Callable[[Batch], AbstractContextManager[None]]
"""A batch -> a context in which its forward passes are observed."""


class Statistics(Protocol):
    """What was accumulated for some linears."""

    def ran(self, linear: LinearArchitecture) -> bool:
        """Whether anything was fed to a linear."""

    def of(self, linear: LinearArchitecture) -> Tensor:
        """The statistic of a linear.

        Raises:
            RegraftError: nothing was fed to it, or its inputs overflow.
        """


@dataclass(frozen=True)
class Known:
    """Statistics that are there already, by `LinearArchitecture.key`."""

    values: Mapping[str, Tensor]

    def ran(self, linear: LinearArchitecture) -> bool:
        """Whether a linear has a statistic."""
        return linear.key in self.values

    def of(self, linear: LinearArchitecture) -> Tensor:
        """The statistic of a linear.

        Raises:
            RegraftError: it has none.
        """
        if linear.key not in self.values:
            raise unused(linear)
        return self.values[linear.key]


class Accumulator(Statistics, Protocol):
    """Statistics while they are accumulated, for the linears of one layer."""

    def observing(self, linears: Mapping[LinearArchitecture, nn.Module]) -> Observing:
        """Contexts in which forward passes of a batch are added, of these linears."""

    def gather(self) -> None:
        """Add up over all processes."""


@dataclass
class InputSums:
    """Sums over batches, one for each distinct input: q, k and v read the same one.

    `sums` and `tokens` are under the `LinearArchitecture.key` of the first linear that reads an
    input; `source` names that key for every linear that ran.
    """

    reduce: Reduce
    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)

    def add(self, linear: LinearArchitecture, inputs: Tensor) -> None:
        """Add the inputs `[tokens, in]` of one batch."""
        key = linear.key
        self.source[key] = key
        total = self.reduce(inputs)
        self.sums[key] = self.sums[key].add_(total) if key in self.sums else total
        self.tokens[key] = self.tokens.get(key, 0) + len(inputs)

    def ran(self, linear: LinearArchitecture) -> bool:
        """Whether anything was fed to a linear."""
        return linear.key in self.source

    def of(self, linear: LinearArchitecture) -> Tensor:
        """The sum for a linear.

        Raises:
            RegraftError: nothing was fed to it, or its inputs overflow.
        """
        source = self.source.get(linear.key)
        if source is None or not self.tokens[source]:
            raise unused(linear)
        total = self.sums[source]
        if not torch.isfinite(total).all():
            raise overflow(linear)
        return total

    def gather(self) -> None:
        """Add up over all processes.

        Raises:
            RegraftError: some ran other linears (Mllama's prompts with and without image).
        """
        if not distributed.same(sorted(self.source.items())):
            raise different_layers()
        for key, total in sorted(self.sums.items()):
            distributed.total(total)
            self.tokens[key] = int(
                distributed.total(torch.tensor(self.tokens[key], device=total.device))
            )

    def observing(self, linears: Mapping[LinearArchitecture, nn.Module]) -> Observing:
        """Make contexts in which forward passes of a batch are added.

        Inputs `[B, S, in]` count at response tokens only. The vision tokens that Mllama's
        cross-attention reads have no such positions: those count that a response token attends to.

        Args:
            linears: The linears to observe and their modules.
        """

        @contextmanager
        def around(batch: Batch) -> Iterator[None]:
            response, tiles = batch.response, _attended_tiles(batch)
            last: tuple[Tensor, str] | None = None

            def progress(
                linear: LinearArchitecture,
            ) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
                def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                    nonlocal last
                    if last is not None and args[0] is last[0]:
                        self.source[linear.key] = last[1]
                        return
                    last = args[0], linear.key
                    inputs = args[0][tiles if linear.reads_vision else response]
                    self.add(linear, inputs.flatten(0, -2))

                return hook

            hooks = [m.register_forward_pre_hook(progress(linear)) for linear, m in linears.items()]
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()

        return around


def unused(linear: LinearArchitecture) -> RegraftError:
    """The error for a linear that no sample came through."""
    return RegraftError(
        f"{linear.key} was never used by the calibration data (text-only prompts skip "
        "cross-attention); calibrate on examples with images."
    )


def different_layers() -> RegraftError:
    """The error for processes whose sums cannot be added up."""
    return RegraftError(
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

    The processor fills up to the largest number of tiles; those beyond an image are padding.
    """
    mask = batch.inputs.get("cross_attention_mask")  # [B, S, images, tiles]
    if mask is None:
        return None
    return (mask.bool() & batch.response[..., None, None]).any(dim=1).flatten()
