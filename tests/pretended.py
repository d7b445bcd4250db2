"""A device that computes on the CPU and refuses what a GPU refuses: operands on two devices.

Without a GPU, tests for one run on it, so that a tensor left on the CPU is found anyway. It does
not reproduce a GPU's numbers, speed or memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration

NAME = "pretended"
# Those that take a copy or an index from the CPU.
_MIXED = ("_to_copy", "copy_", "index", "index_put", "index_put_", "_index_put_impl_")
# Those that give a new tensor as large as their numbers say, and not as large as a tensor is.
_MADE = ("arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m")
_registered: list[torch.library.Library] = []  # which forgets its kernels once it is gone


class Pretended(Tensor):
    """A tensor on the device whose numbers are in `held`, a tensor on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        make: Any = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        made: Pretended = make(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a tensor of a device has no array: take .cpu() first")

    __array__ = numpy

    def __repr__(self, **_: Any) -> str:
        return f"{NAME} {self.held!r}"

    def tolist(self) -> Any:
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given: list[Tensor] = []

        def held(value: Any) -> Any:
            if isinstance(value, Tensor):
                given.append(value)
            return _held(value)

        there = _each(held, args)
        settings = {key: _each(held, value) for key, value in (kwargs or {}).items()}
        name = func._schema.name.removeprefix("aten::")
        _require_one_device(name, given)
        device = torch.device(settings.get("device") or NAME)
        if settings.get("device"):
            settings["device"] = "cpu"
        found = _on_cpu(func, name, there, settings)
        if name == "copy_":
            return args[0]
        same = {id(_held(one)): one for one in given}  # what works in place gives back

        def on_device(value: Any) -> Any:
            if not isinstance(value, Tensor) or id(value) in same:
                return same.get(id(value), value)
            return Pretended(value) if device.type == NAME else value

        return _each(on_device, found)


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """Change a value, or all in a list or tuple, in less time than torch's tree_map."""
    if isinstance(value, list | tuple):
        return type(value)(_each(change, one) for one in value)
    return change(value)


def _on_cpu(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    if name == "histc" and not args[0].is_floating_point():  # which GPUs alone count
        return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Pretended) else value


def _require_one_device(name: str, given: list[Tensor]) -> None:
    here = [one for one in given if isinstance(one, Pretended)]
    elsewhere = [one for one in given if not isinstance(one, Pretended) and one.dim()]
    indexed = name.startswith("index") and not isinstance(given[0], Pretended)
    put = "put" in name and given[-1].dim() > 0 and not isinstance(given[-1], Pretended)
    if (here and elsewhere and name not in _MIXED) or (here and (indexed or put)):
        raise RuntimeError(f"{name}: expected all tensors on one device, found {NAME} and cpu")


def _register() -> None:
    """Register the device in this process, without changing existing devices."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")
    _registered.append(library)

    def place(name: str, make: Any) -> None:
        def made(*args: Any, **settings: Any) -> Tensor:
            dtype = settings.get("dtype")
            return Pretended(make(*args[: _numbers(name)], dtype=dtype))

        library.impl(name, made, "PrivateUse1")

    def copied(source: Tensor, out: Tensor, _wait: bool = False) -> Tensor:
        _held(out).copy_(_held(source))
        return out

    place("empty.memory_format", torch.empty)
    place("empty_strided", torch.empty_strided)
    for name in _MADE:
        place(name, getattr(torch, name.partition(".")[0]))
    library.impl("_copy_from", copied, "PrivateUse1")
    library.impl("_local_scalar_dense", lambda one: one.held.item(), "PrivateUse1")


def _numbers(name: str) -> int:
    """How many arguments of an operator determine its result; the others are dtype and device."""
    operator, _, overload = name.partition(".")
    schema = getattr(getattr(torch.ops.aten, operator), overload or "default")._schema
    return sum(not one.kwarg_only for one in schema.arguments)


class _Generator(torch.Generator):
    """Draws on the CPU for the device too."""

    def __new__(cls, device: torch.device | str = "cpu") -> Any:
        at = "cpu" if torch.device(device).type == NAME else device
        return super().__new__(torch.Generator, at)


@cache
def _has_gradients() -> bool:
    """Whether autograd, which looks for devices when it first runs, knows this one."""
    try:
        torch.ones(1, device=NAME, requires_grad=True).sum().backward()
    except RuntimeError:
        return False
    return True


def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the registered device; skips the test if this torch cannot have one."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("needs a GPU, or a torch in which a device can be written in Python")
    if not _registered:
        _register()
    data: Any = inspect.getattr_static(Tensor, "data")

    def replace(self: Tensor, value: Tensor) -> None:
        """As on a GPU, a parameter's numbers may move to another device."""
        if isinstance(self, Pretended) == isinstance(value, Pretended):
            data.__set__(self, value)
        else:
            torch.utils.swap_tensors(self, torch.nn.Parameter(value, self.requires_grad))

    monkeypatch.setattr(Tensor, "data", property(data.__get__, replace))
    monkeypatch.setattr(torch, "Generator", _Generator)
    if not _has_gradients():
        pytest.skip("autograd ran in this process before: run pytest tests/test_cuda.py by itself")
    return NAME
