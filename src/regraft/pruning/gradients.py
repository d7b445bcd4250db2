"""Gradients of the response loss for one decoder layer at a time, from the last to the first.

    forward, saving every layer's input to disk
    dL/d(final states) of every sample's loss
    for each layer, last to first:
        recompute the layer from its saved input and backpropagate through it
        dL/dW = dY^T X for each of its linears

Only one layer's gradients are ever in memory, and weights never require a gradient themselves.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from regraft import distributed
from regraft.data.collate import IGNORED, Batch
from regraft.disk.artifact import load_unfinished
from regraft.disk.files import disk_errors
from regraft.errors import RegraftError
from regraft.models.architecture import Architecture, LayerArchitecture, LinearArchitecture
from regraft.models.experts import ExpertLinear, observed
from regraft.models.layerwise import LayerwisePass
from regraft.models.placement import PlacedModel
from regraft.models.replay import Shared, logits_of
from regraft.progress import Advance
from regraft.pruning.inputs import overflow, require_same_layers

Loss = Callable[[PlacedModel, Tensor, Tensor, str], Tensor]
"""(model, normed final states `[S, d]`, labels `[S]`, id of the example) -> a scalar, float32."""
Product = Callable[[Tensor, Tensor], Tensor]
"""(dL/dY `[B, T, out]`, X `[B, T, in]`) of B samples -> summand over batches, `[k * out, in]`."""
Gradients = list[Tensor | None]
"""dL/d(each of `Shared.tensors`); None where the loss does not depend on it."""


def predicting(labels: Tensor) -> Tensor:
    """Positions whose logits predict response tokens, `[N]` int64.

    The logits at position t predict the token at t + 1.
    """
    return (labels[1:] != IGNORED).nonzero().flatten()


def mean_cross_entropy(model: PlacedModel, final: Tensor, labels: Tensor, _id: str) -> Tensor:
    """Mean over response tokens: the usual training loss, and SNIP's."""
    positions = predicting(labels)
    logits = logits_of(model.network, final[positions], gradient=True)  # [N, vocabulary]
    return F.cross_entropy(logits.float(), labels[positions + 1])


def signed(dy: Tensor, x: Tensor) -> Tensor:
    """Sum over samples of dL/dW, the plain gradient. `[out, in]`."""
    return product(dy.flatten(0, 1), x.flatten(0, 1))


def signed_and_squared(dy: Tensor, x: Tensor) -> Tensor:
    """Sum over samples of dL/dW, stacked on the sum over tokens of its square, `[2 * out, in]`.

    The squares are the diagonal of the empirical Fisher matrix.
    """
    dy, x = dy.flatten(0, 1), x.flatten(0, 1)
    return torch.cat([product(dy, x), product(dy.float().square(), x.float().square())])


def require_gradients(dtype: torch.dtype) -> None:
    """Raise for float16, in which gradients underflow."""
    if dtype == torch.float16:
        raise RegraftError(
            "Gradients are too small for float16 and would vanish. Use --dtype bfloat16 or float32."
        )


_BACKWARD = 3  # in forward passes: recompute the layer, and its gradients by inputs and by weights
BOTH_WAYS = 1 + _BACKWARD


def layer_gradients(
    layerwise: LayerwisePass,
    architecture: Architecture,
    scratch: Path,
    wanted: Callable[[LinearArchitecture], bool],
    advance: Advance,
    *,
    add: Product = signed,
    loss: Loss = mean_cross_entropy,
) -> Iterator[tuple[LayerArchitecture, dict[str, Tensor]]]:
    """Mean over samples of `add`, from the last layer to the first.

    Args:
        layerwise: The labelled samples, before the first layer.
        scratch: A folder for layer inputs (samples x tokens x layers x hidden size); emptied during
            the backward pass.
        wanted: Which linears to take gradients of.
        advance: Called each time a layer has seen a batch: with its number of samples forward, and
            `_BACKWARD` times that backward, `BOTH_WAYS` times the samples per layer in all.

    Yields:
        The layer, and `LinearArchitecture.key` -> mean of `add`, float32 on the device. Linears
        that no sample used are missing.

    Raises:
        RegraftError: the dtype is float16, or gradients overflow.
    """
    require_gradients(layerwise.model.dtype)
    total = int(distributed.total(torch.tensor(layerwise.samples)))
    _forward(layerwise, architecture, scratch, advance)
    gradients = _loss_gradients(layerwise, loss)
    of_shared: list[Gradients] = [[None] * len(one.tensors()) for one in layerwise.shared]
    for layer in reversed(architecture.layers):
        linears = layerwise.linears(layer, wanted)
        sums: dict[str, Tensor] = {}
        with layerwise.model.layer(layer.index):
            for i, batch in enumerate(layerwise.batches):
                path = _path(scratch, layer.index, i)
                with _summing(linears, layerwise.model.place(batch), add, sums):
                    gradients[i], of_shared[i] = _backward(
                        layerwise, i, layer.index, path, gradients[i], of_shared[i]
                    )
                path.unlink()
                advance(_BACKWARD * len(batch.ids))
        yield layer, _means(sums, layer, total)


def _backward(
    layerwise: LayerwisePass, i: int, layer: int, path: Path, gradient: Tensor, of_shared: Gradients
) -> tuple[Tensor, Gradients]:
    """Backpropagate batch i through a layer: gradients of what it hands on -> of what it receives.

    `gradient` is that of the state, `[B, S, d]`; `of_shared` are those of what layers share. `path`
    has what the layer received.
    """
    device, shared = layerwise.model.device, layerwise.shared[i]

    def leaf(one: Tensor) -> Tensor:
        one = one.to(device).detach()
        return one.requires_grad_() if one.is_floating_point() else one

    saved = {name: leaf(one) for name, one in load_unfinished(path).items()}
    kinds = (kind for kind in shared.key_values if f"{kind}.0" in saved)
    received = Shared(
        {kind: (saved[f"{kind}.0"], saved[f"{kind}.1"]) for kind in kinds},
        tuple(saved.get(f"more.{k}") for k in range(len(shared.more))),
        {index: leaf(one) for index, one in shared.inputs.items()},
    )
    hidden, handed_on = saved["hidden"], copy(received)
    output = layerwise.replay(i, layer, hidden, handed_on, gradient=True)
    roots = [(output, gradient.to(device))]
    for one, part in zip(handed_on.tensors(), of_shared, strict=True):
        if one is not None and part is not None and one.requires_grad:
            roots.append((one, part))
    torch.autograd.backward([one for one, _ in roots], [part for _, part in roots])
    of_received = [None if one is None else one.grad for one in received.tensors()]
    assert hidden.grad is not None
    return hidden.grad.to(gradient.device), of_received


def _forward(
    layerwise: LayerwisePass, architecture: Architecture, scratch: Path, advance: Advance
) -> None:
    """Run the batches through all layers and save every layer's inputs in `scratch`."""
    try:
        with disk_errors(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
            for layer in architecture.layers:
                for i, state in enumerate(layerwise.states):
                    shared = layerwise.shared[i]
                    # Later layers may replace these; recorded inputs of layers never change.
                    replaced = {
                        f"{name}.{k}": one.clone(memory_format=torch.contiguous_format)
                        for name, several in {**shared.key_values, "more": shared.more}.items()
                        for k, one in enumerate(several)
                        if one is not None
                    }
                    tensors = {"hidden": state.contiguous(), **replaced}
                    save_file(tensors, _path(scratch, layer.index, i))
                with layerwise.model.layer(layer.index):
                    layerwise.run_layer(layer.index, advance)
    except RegraftError:  # a later attempt starts again, and may need the disk space
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _loss_gradients(layerwise: LayerwisePass, loss: Loss) -> list[Tensor]:
    """dL/d(normed final states) `[B, S, d]` of each batch, L the sum of its samples' losses.

    Consumes the states of `layerwise`, which are as large as the gradients.
    """
    gradients = []
    states = layerwise.states[::-1]
    layerwise.states = []
    with layerwise.model.frame():
        for batch in layerwise.batches:
            labels, state = batch.labels, states.pop()
            assert labels is not None, "a batch of prompts has no responses"
            final = state.to(layerwise.model.device).detach().requires_grad_()
            for row in range(len(labels)):  # only one sample's logits in memory at a time
                own = labels[row].to(layerwise.model.device)
                loss(layerwise.model, final[row], own, batch.ids[row]).backward()
            assert final.grad is not None
            gradients.append(final.grad.to(state.device))
    return gradients


def _summing(
    linears: Mapping[LinearArchitecture, nn.Module],
    batch: Batch,
    add: Product,
    sums: dict[str, Tensor],
) -> AbstractContextManager[None]:
    """Context in which a batch's backward pass adds `add` of each linear to `sums`, by its key."""
    samples = len(batch.ids)

    def observe(linear: LinearArchitecture) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        first = 0  # the linear's first row in the module's weight, which may hold several linears
        if linear.held is not None and linear.expert is None:
            first = linear.held.first // linear.held.row
        own = slice(first, first + linear.shape[0])

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs = args[0].detach()
            if not output.requires_grad:  # Mllama's vision keys, values: hidden states do not enter
                output = output.detach().requires_grad_()

            def add_up(gradient: Tensor) -> None:
                dy = by_sample(module, gradient[..., own], samples)
                part = add(dy, by_sample(module, inputs, samples))
                key = linear.key
                sums[key] = sums[key].add_(part) if key in sums else part

            output.register_hook(add_up)
            return output

        return hook

    return observed(linears, batch, lambda li, one: one.register_forward_hook(observe(li)))


def by_sample(module: nn.Module, values: Tensor, samples: int) -> Tensor:
    """A linear's inputs or outputs, reshaped to `[B, T, n]` for B samples.

    For an expert T is the largest number of tokens that the router sends to it from one sample;
    other samples are padded with zeros.
    """
    if not isinstance(module, ExpertLinear):
        return values.reshape(samples, -1, values.shape[-1])
    sample = module.tokens // (module.of // samples)  # [n], ascending
    count = torch.bincount(sample, minlength=samples)  # [B]
    place = torch.arange(len(sample), device=sample.device) - (count.cumsum(0) - count)[sample]
    filled = values.new_zeros(samples, int(count.max()), values.shape[-1])
    filled[sample, place] = values
    return filled


def _means(sums: dict[str, Tensor], layer: LayerArchitecture, total: int) -> dict[str, Tensor]:
    """Sums over all processes divided by `total` samples, in place."""
    require_same_layers(sorted(sums))
    for linear in layer.linears:
        if linear.key in sums:
            distributed.total(sums[linear.key]).div_(total)
            if not torch.isfinite(sums[linear.key]).all():
                raise overflow(linear)
    return sums


def product(dy: Tensor, x: Tensor) -> Tensor:
    """dY^T X `[out, in]` float32 of `[T, out]` and `[T, in]`, accumulated in float32.

    On a CPU, where `mm` has no `out_dtype`, a bfloat16 product is rounded to bfloat16 once: a
    relative error of 2^-9 per batch, as of the inputs, in a fifth of the time with AMX.
    """
    if dy.is_cuda and dy.dtype != torch.float32:
        return torch.mm(dy.T, x, out_dtype=torch.float32)
    return torch.mm(dy.T, x).float()


def _path(scratch: Path, layer: int, batch: int) -> Path:
    return scratch / f"layer_{layer:03d}_batch_{batch:05d}_rank_{distributed.rank()}.safetensors"
