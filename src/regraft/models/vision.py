"""Record the output of a model's vision part and replay it, to run the text decoder alone.

Only the text decoder is pruned or patched, so the vision part's output stays the same. In
transformers `get_image_features` returns it, or, in Mllama, the projector. With code that is not
transformers' own, nothing is recorded, and the vision part runs each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import RegraftError
from regraft.models.architecture import language_model, output_head, text_decoder
from regraft.models.checkpoint import bits
from regraft.models.placement import moved, tensors_of, tensors_within
from regraft.models.replay import replaced_forwards

_UNUSED = ("last_hidden_state", "hidden_states", "attentions")  # if there is a pooler_output


@dataclass(frozen=True)
class VisionOutput:
    """The vision part's output for one batch of images, with its tensors in host memory.

    `kind` is the output class of transformers that holds them; None if `content` was returned as
    it is.
    """

    kind: type[Any] | None
    content: Any
    device: torch.device

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in tensors_within(self.content))

    def restored(self) -> Any:
        """Rebuild what the vision part returned, except fields that the text decoder ignores."""
        content = moved(self.content, self.device)
        if self.kind is None:
            return content
        named = {field.name for field in fields(self.kind)}
        needed = {field.name: None for field in fields(self.kind) if field.default is MISSING}
        own = {name: one for name, one in content.items() if name in named}
        output = self.kind(**needed | own)  # timm's class requires fields that were not kept
        for name in content.keys() - named:  # an attribute that Idefics3 adds in transformers 5.15
            setattr(output, name, content[name])
        return output


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[VisionOutput]]:
    """Record what the vision part returns, one item per call, inside the block."""
    outputs: list[VisionOutput] = []
    inner = _inner(model)

    def keep(result: Any) -> Any:
        outputs.append(_kept(result))
        return result

    with ExitStack() as stack:
        features: Any = getattr(inner, "get_image_features", None)
        projector: Any = getattr(inner, "multi_modal_projector", None)
        if inner is not None and features is not None:
            stack.enter_context(_replaced(inner, lambda *a, **k: keep(features(*a, **k))))
        elif projector is not None and hasattr(inner, "vision_model"):
            hook = projector.register_forward_hook(lambda _module, _args, result: keep(result))
            stack.enter_context(hook)
        yield outputs


@contextmanager
def replayed(model: nn.Module, output: VisionOutput | None) -> Iterator[None]:
    """Make the vision part return `output` inside the block; None has no effect."""
    inner = _inner(model)
    if output is None or inner is None:
        yield
        return
    result = output.restored()
    if hasattr(inner, "get_image_features"):
        with _replaced(inner, lambda *_args, **_kwargs: result):
            yield
        return
    from transformers.modeling_outputs import BaseModelOutput

    vision, projector = inner.vision_model, inner.multi_modal_projector
    assert isinstance(vision, nn.Module) and isinstance(projector, nn.Module)
    states = BaseModelOutput(last_hidden_state=result)
    with replaced_forwards({vision: lambda *_, **__: states, projector: lambda states: states}):
        yield


def without_pixels(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs for `replayed`, with pixels, which only the vision part reads, as expanded zeros."""
    return {
        name: tensor.new_zeros(()).expand(tensor.shape) if name.startswith("pixel") else tensor
        for name, tensor in inputs.items()
    }


def vision_state(model: nn.Module) -> tuple[Any, ...] | None:
    """A fingerprint of the vision part's weights: sum of bits, dtype, device and shape of each.

    Covers every parameter and buffer outside the text decoder and the output embedding. None if
    some are not in memory (a model split by accelerate), or if the text decoder is not found.
    """
    try:
        parts = text_decoder(model), output_head(language_model(model))
    except RegraftError:
        return None
    decoder = {id(tensor) for one in parts if one is not None for tensor in tensors_of(one)}
    outside = [tensor for tensor in tensors_of(model) if id(tensor) not in decoder]
    if any(tensor.is_meta for tensor in outside):
        return None
    kinds = [(str(one.dtype), str(one.device), tuple(one.shape)) for one in outside]
    return tuple(zip(kinds, [_bit_sum(one) for one in outside], strict=True))


def _inner(model: nn.Module) -> nn.Module | None:
    """The model without its output head; None unless it is of transformers' own classes."""
    inner = getattr(model, "base_model", None)
    own = type(model).__module__.startswith("transformers.")
    return inner if own and isinstance(inner, nn.Module) else None


@contextmanager
def _replaced(inner: nn.Module, features: Callable[..., Any]) -> Iterator[None]:
    """Replace `get_image_features`; its signature stays, because `generate` reads it."""
    inner.__dict__["get_image_features"] = wraps(inner.get_image_features)(features)  # type: ignore[arg-type]
    try:
        yield
    finally:
        del inner.__dict__["get_image_features"]


def _kept(result: Any) -> VisionOutput:
    kind, content = None, result
    if isinstance(result, dict):
        kind, content = type(result), dict(vars(result))
        if content.get("pooler_output") is not None:
            content = {name: one for name, one in content.items() if name not in _UNUSED}
    device = next(tensors_within(content)).device
    return VisionOutput(kind, moved(content, torch.device("cpu")), device)


def _bit_sum(tensor: Tensor) -> int:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return int(bits(tensor.detach().contiguous()).sum(dtype=torch.int64))
