"""Load a model from a folder or hub id: its weights, its processor and its architecture.

To answer prompts, a model only has to load. Its architecture is read on first access.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regraft import distributed
from regraft.data.collate import Batch
from regraft.disk.parsing import read_json
from regraft.errors import RegraftError
from regraft.models.architecture import Architecture, LinearArchitecture
from regraft.models.chat_template import check_template
from regraft.models.checkpoint import Checkpoint, open_checkpoint
from regraft.models.describe import read_architecture
from regraft.models.foreign import foreign, of_processor
from regraft.models.layout import Layout, Tiling, read_layout
from regraft.models.loaded import (
    check_finite,
    check_headers,
    check_loading,
    check_weights,
    describe_unused,
    enough_memory,
    refuse_tokens_without_embedding,
)
from regraft.models.placement import PlacedModel
from regraft.models.resolve import (
    auto_class,
    check_quantised,
    quantisation_of,
    quiet,
    read_config,
    require_greedy,
    require_unquantised,
    resolve,
    takes_images,
)

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
Placement = Literal["resident", "streamed"]
_ADVICE = "Export the whole model again."


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found and checked, without weights in memory."""

    checkpoint: Checkpoint
    trust_remote_code: bool = False

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    def weight(self, linear: LinearArchitecture) -> Tensor:
        """Read one prunable weight `[out, in]`, in its own dtype, on CPU."""
        return self.checkpoint.matrix(linear.tensor, linear.stored, linear.shape)

    @cached_property
    def config(self) -> Any:
        """The config that transformers reads, of any model type."""
        with quiet():
            return read_config(self.folder, self.trust_remote_code)

    @property
    def has_vision(self) -> bool:
        return takes_images(self.config, self.folder)

    @cached_property
    def architecture(self) -> Architecture:
        """The text decoder's architecture, needed to prune, restore or score heads.

        Raises:
            RegraftError: weights are quantised, the model does not answer token by token, or see
                `read_architecture`.
        """
        require_unquantised(self.config, self.folder)
        require_greedy(self.config, self.folder)
        network = self.without_weights
        if getattr(self.config, "tie_word_embeddings", False):
            network.tie_weights()
        try:
            return read_architecture(network, self.checkpoint, self.layout)
        except RegraftError as error:
            where = "" if str(self.folder) in str(error) else f"{self.folder}: "
            raise RegraftError(f"{where}{error}") from error
        except Exception as error:  # of classes built unlike any that we know
            raise RegraftError(
                f"{self.folder}: {type(network).__name__} cannot be described "
                f"({type(error).__name__}: {error}): it can be evaluated, but not pruned."
            ) from error

    @cached_property
    def _on_meta(self) -> Any:
        errors = foreign(self.folder, "the model of its config.json", _ADVICE)
        with torch.device("meta"), quiet(), errors:
            auto, trust = auto_class(self.config, self.folder), self.trust_remote_code
            return auto.from_config(self.config, trust_remote_code=trust)

    @cached_property
    def layout(self) -> Layout:
        """Where each parameter is in the files, by transformers' conversions."""
        with foreign(self.folder, "the names of its tensors", _ADVICE):
            return read_layout(self._on_meta, self.checkpoint)

    @cached_property
    def without_weights(self) -> Any:
        """The model on the meta device; if `comparable`, checked against the files' headers.

        Raises:
            RegraftError: the files do not fit, or no model can be built from config.json.
        """
        if self.comparable:
            check_headers(self._on_meta, self.checkpoint, self.layout)
        return self._on_meta

    @property
    def comparable(self) -> bool:
        """Whether files and model have the same tensors: not if quantised, or of remote code."""
        return quantisation_of(self.config) is None and not self.trust_remote_code

    @cached_property
    def _parameter_tensors(self) -> frozenset[str]:
        """Names on disk of the tensors that parameters are loaded from."""
        try:
            named = self._on_meta.named_parameters(remove_duplicate=False)
            found = [self.layout.get(name, "") for name, _ in named]
        except RegraftError:  # a type that transformers does not know
            return frozenset()
        tilings = (one for one in found if isinstance(one, Tiling))
        return frozenset(piece.tensor for tiling in tilings for piece in tiling.pieces)

    def unbounded(self, tensor: str) -> bool:
        """Whether a tensor may hold infinity: no parameter is known to be loaded from it."""
        return tensor not in self._parameter_tensors

    @cached_property
    def readable_architecture(self) -> Architecture | None:
        """The architecture, or None if it cannot be read, for callers that can do without."""
        try:
            return self.architecture
        except RegraftError:
            return None


def open_source(model: str | Path, *, trust_remote_code: bool = False) -> Source:
    """Find a checkpoint, check its files and read its architecture without loading weights.

    Args:
        model: A folder, a hub id such as "Qwen/Qwen2.5-VL-7B-Instruct" (downloaded once), with an
            optional revision, "ID@main", or "demo" for the bundled model.
        trust_remote_code: Run Python code that comes with the checkpoint.

    Raises:
        RegraftError: the checkpoint is unusable, or cannot be pruned; the message says why.
    """
    source = Source(open_checkpoint(resolve(model)), trust_remote_code)
    _ = source.architecture
    return source


def open_answering(model: str | Path, *, trust_remote_code: bool = False) -> Source:
    """Find a checkpoint that only has to answer prompts, of any type that transformers loads.

    Raises:
        RegraftError: the checkpoint is unusable, for example because a package is not installed.
    """
    source = Source(open_checkpoint(resolve(model)), trust_remote_code)
    require_greedy(source.config, source.folder)
    check_quantised(source.config, source.folder)
    if source.comparable:
        _ = source.without_weights
    return source


def stored_dtype(source: Source) -> str:
    """The checkpoint's own dtype ("bfloat16"), by its config or, failing that, its weights."""
    config = read_json(source.folder / "config.json", lenient=True)
    named = config.get("dtype") or config.get("torch_dtype")
    if not named:
        weight = source.checkpoint.record(next(source.architecture.linears).tensor)
        named = str(weight.torch_dtype)
    return str(named).removeprefix("torch.")


def load_model(
    source: Source,
    *,
    dtype: DTypeName = "auto",
    device: str = "auto",
    split: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> nn.Module:
    """Load the weights for inference, in eval mode, gradients off.

    Args:
        dtype: "auto" is float32 on CPU and the checkpoint's own dtype on an accelerator.
        device: "auto" is "cuda" if torch finds one, else "cpu".
        split: Spread the layers over all accelerators, and over host memory if these are too small.
        note: Called with a warning if the files have weights that the model does not use.

    Raises:
        RegraftError: other weights were loaded, memory is too small, or accelerate is missing.
    """
    target = pick_device(device)
    split = split and target.type != "cpu"
    if split:
        require_split()
    model = _load_weights(source, dtype, target, split, note)
    if not (split or quantisation_of(source.config)):
        model = model.to(target)
    check_finite(source.folder, model)  # after the move: faster on an accelerator
    return model


def load_placed(
    source: Source, *, dtype: DTypeName, device: str, placement: Placement
) -> PlacedModel:
    """Load a model to be run layer by layer; see `load_model`.

    A "streamed" model stays in host memory; in the checkpoint's own dtype it is memory-mapped.
    """
    target, streamed = pick_device(device), placement == "streamed"
    model = _load_weights(source, dtype, target, split=False)
    if not streamed:
        model = model.to(target)
    check_finite(source.folder, model)
    return PlacedModel(model, target, next(model.parameters()).dtype, streamed)


def _load_weights(
    source: Source,
    dtype: DTypeName,
    target: torch.device,
    split: bool,
    note: Callable[[str], None] = lambda _: None,
) -> nn.Module:
    """Load the model on CPU, split over devices or, if quantised, on its device."""
    one_device = None
    if quantisation_of(source.config) and target.type != "cpu":
        require_accelerate("Quantised weights go to an accelerator")
        one_device = {"": target}
    with quiet(), enough_memory(source.folder), foreign(source.folder, "the model", _ADVICE):
        network: nn.Module
        network, loading = auto_class(source.config, source.folder).from_pretrained(
            source.folder,
            config=deepcopy(source.config),  # loading changes it
            dtype="float32" if dtype == "auto" and target.type == "cpu" else dtype,
            trust_remote_code=source.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_loading` names the tensor
            device_map="auto" if split else one_device,
            max_memory=_memory_limits(target) if split else None,
        )
    check_loading(source.folder, loading)
    if unused := describe_unused(source.folder, loading):
        note(unused)
    if (architecture := source.readable_architecture) is not None:
        check_weights(network, source.checkpoint, architecture)
    refuse_tokens_without_embedding(network, source.folder)
    return network.requires_grad_(False).eval()


def load_processor(source: Source) -> Any:
    """Load the processor (the tokenizer of a text-only model)."""
    from transformers import AutoProcessor, AutoTokenizer

    auto = AutoProcessor if source.has_vision else AutoTokenizer
    with of_processor(source.folder), quiet():
        processor = auto.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
    check_template(source.folder, processor)
    return processor


def placed(batch: Batch, model: nn.Module) -> Batch:
    """The batch on the model's device, pixels in the dtype of its first float.

    If every weight is offloaded, accelerate's hooks move the batch.
    """
    parameters = [one for one in model.parameters() if one.is_floating_point()]
    first = next((p for p in parameters if not p.is_meta), parameters[0])
    return batch.to("cpu" if first.is_meta else first.device, first.dtype)


def has_processor(source: Source) -> bool:
    """Whether the folder has a tokenizer and, for a vision model, an image processor."""
    names = {path.name for path in source.folder.iterdir()}
    images = {"processor_config.json", "preprocessor_config.json"}
    return "tokenizer_config.json" in names and bool(names & images or not source.has_vision)


def pick_device(device: str) -> torch.device:
    """Resolve a device; "auto" is "cuda" if torch finds one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RegraftError(f"The device {device!r} cannot be used here: {reason}") from error
    if picked.type == "meta":
        raise RegraftError("The device 'meta' cannot be used here: it holds no numbers.")
    return picked


def _memory_limits(target: torch.device) -> dict[int | str, int] | None:
    """Usable bytes of the one device that is named, and of host memory; None for all devices."""
    index: int | None = target.index
    if index is None:
        return None
    from accelerate.utils import get_max_memory  # type: ignore[import-untyped]

    return {name: size for name, size in get_max_memory().items() if name in (index, "cpu")}


def check_split(device: str, placement: str) -> None:
    """`require_split` if answering prompts will split the model over devices."""
    if pick_device(device).type != "cpu" and placement == "streamed":
        require_split()


def require_split() -> None:
    """Raise unless a model can be split over devices and host memory."""
    which = "With --placement streamed, heads, evaluation and the dense answers that gain imitates"
    if distributed.world() > 1:
        raise RegraftError(
            f"{which} spread the model over all devices, so there is room for one process only. "
            "Use one process, or --placement resident."
        )
    require_accelerate(f"{which} spread the model over devices and host memory")


def require_accelerate(what: str) -> None:
    """Raise if accelerate, which `what` needs, is not installed."""
    if find_spec("accelerate") is None:
        raise RegraftError(f"{what} with accelerate: pip install 'regraft[streamed]'.")
