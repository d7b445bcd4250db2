"""Gradients of the response loss for one decoder layer at a time, from the last to the first.

The backward pass starts from kept layer inputs, and each layer is computed again on its way, so
only one layer's gradients are ever in memory; the weights themselves never require a gradient:
dL/dW = dY^T X.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from regraft.models.experts import ExpertLinear, opened
from regraft.models.layerwise import LayerwisePass
from regraft.models.placement import PlacedModel
from regraft.models.replay import Shared, hooked, is_input, logits_of
from regraft.progress import Advance
from regraft.pruning.inputs import overflow, require_same_layers

Loss = Callable[[PlacedModel, Tensor, Tensor, str], Tensor]
"""(model, normed final states `[S, d]`, labels `[S]`, id of the example) -> a scalar, float32."""
Product = Callable[[Tensor, Tensor], Tensor]
"""(dL/dY `[B, T, out]`, X `[B, T, in]`) of B samples -> what is added up, `[k * out, in]`."""


def predicting(labels: Tensor) -> Tensor:
    """Positions whose logits predict response tokens: those before them. `[N]` int64.

    The logits at position t predict the token at t + 1.
    """
    return (labels[1:] != IGNORED).nonzero().flatten()


def mean_cross_entropy(model: PlacedModel, final: Tensor, labels: Tensor, _id: str) -> Tensor:
    """Mean over response tokens: the loss that models are trained with, and SNIP's."""
    positions = predicting(labels)
    logits = logits_of(model.network, final[positions], gradient=True)  # [N, vocabulary]
    return F.cross_entropy(logits.float(), labels[positions + 1])


def signed(dy: Tensor, x: Tensor) -> Tensor:
    """The sum over samples of dL/dW."""
    return product(dy.flatten(0, 1), x.flatten(0, 1))


def signed_and_squared(dy: Tensor, x: Tensor) -> Tensor:
    """The sum over samples of dL/dW, and below it the sum over tokens of its square.

    The squares are the diagonal of the empirical Fisher matrix. `[2 * out, in]`
    """
    dy, x = dy.flatten(0, 1), x.flatten(0, 1)
    return torch.cat([product(dy, x), product(dy.float().square(), x.float().square())])


def require_gradients(dtype: torch.dtype) -> None:
    """Raise for float16, in which gradients vanish."""
    if dtype == torch.float16:
        raise RegraftError(
            "Gradients are too small for float16 and would vanish. Use --dtype bfloat16 or float32."
        )


_BACKWARD = 3  # forward passes' work: the layer once more, and the gradients of its two factors
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
        architecture: Of the model.
        scratch: A folder for layer inputs (samples x tokens x layers x hidden size); emptied as
            the backward pass goes.
        wanted: Which linears to take the gradient of.
        advance: Called each time a layer has seen a batch, with the number of samples forward, and
            backward with as many times more as that takes: `BOTH_WAYS` samples a layer in all.
        add: What to add up of each batch, `signed` for the plain gradient.
        loss: Of one sample.

    Yields:
        The layer, and `LinearArchitecture.key` -> what `add` makes, float32 on the device. A linear
        that no sample used is missing.

    Raises:
        RegraftError: the dtype is float16, or gradients overflow.
    """
    require_gradients(layerwise.model.dtype)
    total = int(distributed.total(torch.tensor(layerwise.samples)))
    _forward(layerwise, architecture, scratch, advance)
    gradients = _loss_gradients(layerwise, loss)
    kept: list[Shared] = [{} for _ in gradients]  # dL/d of what layers share, as far as it is known
    modules = dict(layerwise.model.network.named_modules())
    for layer in reversed(architecture.layers):
        linears = {li: modules[li.module] for li in layer.linears if wanted(li)}
        sums: dict[str, Tensor] = {}
        with layerwise.model.layer(layer.index):
            for i, batch in enumerate(layerwise.batches):
                path = _path(scratch, layer.index, i)
                with _added(linears, layerwise.model.place(batch), add, sums):
                    gradients[i] = _back(layerwise, i, layer.index, path, gradients[i], kept[i])
                path.unlink()
                advance(_BACKWARD * len(batch.ids))
        yield layer, _means(sums, layer, total)


def _back(
    layerwise: LayerwisePass, i: int, layer: int, path: Path, gradient: Tensor, kept: Shared
) -> Tensor:
    """Take batch i back through a layer whose input is in `path`: its output's gradient -> its own.

    `kept` is dL/d of what layers share: of what this one hands on, and then of what it was given.
    `[B, S, d]`
    """
    device = layerwise.model.device

    def leaf(one: Tensor | None) -> Tensor | None:
        one = None if one is None else one.to(device).detach()
        return one.requires_grad_() if one is not None and one.is_floating_point() else one

    entered = load_unfinished(path)
    hidden = leaf(entered["hidden"])
    assert hidden is not None
    given = {
        name: tuple(
            leaf(one if is_input(name) else entered.get(f"{name}.{k}"))
            for k, one in enumerate(several)
        )
        for name, several in layerwise.shared[i].items()
    }
    handed: Shared = dict(given)
    output = layerwise.replay(i, layer, hidden, gradient=True, shared=handed)
    roots: list[tuple[Tensor, Tensor]] = [(output, gradient.to(device))]
    for name, several in handed.items():
        parts = zip(several, kept.get(name, ()), strict=False)
        roots += [(one, part) for one, part in parts if part is not None and one.requires_grad]
    torch.autograd.backward([one for one, _ in roots], [part for _, part in roots])
    for name, several in given.items():
        kept[name] = tuple(None if one is None else one.grad for one in several)
    assert hidden.grad is not None
    return hidden.grad.to(gradient.device)


def _forward(
    layerwise: LayerwisePass, architecture: Architecture, scratch: Path, advance: Advance
) -> None:
    """Take the batches to the end and leave every layer's inputs in `scratch`."""
    try:
        with disk_errors(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
            for layer in architecture.layers:
                for i, state in enumerate(layerwise.states):
                    replaced = {  # by a later layer, as inputs of layers never are
                        f"{name}.{k}": one.clone(memory_format=torch.contiguous_format)
                        for name, several in layerwise.shared[i].items()
                        for k, one in enumerate(several)
                        if one is not None and not is_input(name)
                    }
                    tensors = {"hidden": state.contiguous(), **replaced}
                    save_file(tensors, _path(scratch, layer.index, i))
                with layerwise.model.layer(layer.index):
                    layerwise.advance(layer.index, advance)
    except RegraftError:  # of no use to the next try, which may need the room
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _loss_gradients(layerwise: LayerwisePass, loss: Loss) -> list[Tensor]:
    """dL/d(normed final state) `[B, S, d]` of each batch, L the sum of its samples' losses.

    The states of `layerwise` go on the way: they are as large as the gradients.
    """
    gradients = []
    states = layerwise.states[::-1]
    layerwise.states = []
    with layerwise.model.frame():
        for batch in layerwise.batches:
            labels, state = batch.labels, states.pop()
            assert labels is not None, "a batch of prompts has no responses"
            final = state.to(layerwise.model.device).detach().requires_grad_()
            for row in range(len(labels)):  # one sample's logits at a time in memory
                own = labels[row].to(layerwise.model.device)
                loss(layerwise.model, final[row], own, batch.ids[row]).backward()
            assert final.grad is not None
            gradients.append(final.grad.to(state.device))
    return gradients


@contextmanager
def _added(
    linears: Mapping[LinearArchitecture, nn.Module],
    batch: Batch,
    add: Product,
    sums: dict[str, Tensor],
) -> Iterator[None]:
    """Add to `sums` what `add` makes of each linear, as a backward pass of a batch comes by."""
    rows = len(batch.ids)

    def observe(linear: LinearArchitecture) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        first = 0  # row of what the module puts out
        if linear.held is not None and linear.expert is None:
            first = linear.held.first // linear.held.row
        own = slice(first, first + linear.shape[0])

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs = args[0].detach()
            if not output.requires_grad:  # Mllama's vision keys and values: no hidden state enters
                output = output.detach().requires_grad_()

            def came(gradient: Tensor) -> None:
                of_rows = by_sample(module, gradient[..., own], rows)
                part = add(of_rows, by_sample(module, inputs, rows))
                key = linear.key
                sums[key] = sums[key].add_(part) if key in sums else part

            output.register_hook(came)
            return output

        return hook

    with (
        opened(linears, batch) as modules,
        hooked(module.register_forward_hook(observe(li)) for li, module in modules.items()),
    ):
        yield


def by_sample(module: nn.Module, values: Tensor, samples: int) -> Tensor:
    """What a linear reads or puts out as `[B, T, n]` of B samples.

    Of an expert T is the largest number of tokens that it has of a sample, the others are filled up
    with zeros.
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
    """Sums of all processes over `total` samples, in place."""
    require_same_layers(sorted(sums))
    for linear in layer.linears:
        if linear.key in sums:
            distributed.total(sums[linear.key]).div_(total)
            if not torch.isfinite(sums[linear.key]).all():
                raise overflow(linear)
    return sums


def product(dy: Tensor, x: Tensor) -> Tensor:
    """dY^T X `[out, in]` float32 of `[T, out]` and `[T, in]`, accumulated in float32.

    Of bfloat16 on a CPU, which has no product of another dtype, the result is rounded once to
    bfloat16: a relative error of 2^-9 a batch, no more than the inputs have, at a fifth of the time
    with AMX.
    """
    if dy.is_cuda and dy.dtype != torch.float32:
        return torch.mm(dy.T, x, out_dtype=torch.float32)
    return torch.mm(dy.T, x).float()


def _path(scratch: Path, layer: int, batch: int) -> Path:
    return scratch / f"layer_{layer:03d}_batch_{batch:05d}_rank_{distributed.rank()}.safetensors"
