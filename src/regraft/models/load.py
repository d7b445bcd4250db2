"""From a folder or hub id to a model with its weights, its processor and its architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from regraft import distributed
from regraft.data.collate import Batch
from regraft.errors import RegraftError
from regraft.files import read_json
from regraft.models.architecture import Architecture
from regraft.models.checkpoint import Checkpoint, open_checkpoint
from regraft.models.describe import read_architecture
from regraft.models.placement import PlacedModel
from regraft.models.resolve import auto_class, bad_config, quiet, read_config, resolve

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
Placement = Literal["resident", "streamed"]


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found and checked, with no weight in memory."""

    checkpoint: Checkpoint
    architecture: Architecture
    trust_remote_code: bool = False

    @property
    def folder(self) -> Path:
        """The folder on disk."""
        return self.checkpoint.folder


def open_source(model: str | Path, *, trust_remote_code: bool = False) -> Source:
    """Find a checkpoint, check its files and read its architecture without loading weights.

    Args:
        model: A folder, or a hub id such as "Qwen/Qwen2.5-VL-7B-Instruct" (downloaded once), with
            a revision where wanted: "ID@main".
        trust_remote_code: Run Python code that comes with the checkpoint.

    Raises:
        RegraftError: what makes the checkpoint unusable.
    """
    checkpoint = open_checkpoint(resolve(model))
    with torch.device("meta"), quiet(), bad_config(checkpoint.folder):
        config = read_config(checkpoint.folder, trust_remote_code)
        network = auto_class(config, checkpoint.folder).from_config(
            config, trust_remote_code=trust_remote_code
        )
    if getattr(config, "tie_word_embeddings", False):
        network.tie_weights()
    try:
        architecture = read_architecture(network, checkpoint)
    except RegraftError as error:
        where = "" if str(checkpoint.folder) in str(error) else f"{checkpoint.folder}: "
        raise RegraftError(f"{where}{error}") from error
    return Source(checkpoint, architecture, trust_remote_code)


def linear_layers(source: Source) -> set[str]:
    """Dotted names of all linear layers of the model in memory; loads no weights."""
    with torch.device("meta"), quiet(), bad_config(source.folder):
        config = read_config(source.folder, source.trust_remote_code)
        network = auto_class(config, source.folder).from_config(
            config, trust_remote_code=source.trust_remote_code
        )
    return {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}


def stored_dtype(source: Source) -> str:
    """The checkpoint's own, by its config as for transformers, or else its weights: "bfloat16"."""
    config = read_json(source.folder / "config.json")
    weight = source.checkpoint.record(next(source.architecture.linears).tensor)
    named = config.get("dtype") or config.get("torch_dtype") or str(weight.torch_dtype)
    return str(named).removeprefix("torch.")


def load_model(
    source: Source, *, dtype: DTypeName = "auto", device: str = "auto", split: bool = False
) -> nn.Module:
    """Load the weights for inference, in eval mode, gradients off.

    Args:
        source: The opened checkpoint.
        dtype: "auto" is float32 on CPU and the checkpoint's own dtype on an accelerator.
        device: "auto" is the accelerator where there is one, else "cpu".
        split: Spread the layers over all accelerators, and host memory where they do not suffice.

    Raises:
        RegraftError: a prunable weight in memory is not the one on disk, a tensor is missing or
            has another shape than config.json gives it, or a model is to be split without
            accelerate.
    """
    target = pick_device(device)
    split = split and target.type != "cpu"
    if split:
        require_split()
    model = _load_weights(source, dtype, target, split)
    return model if split else model.to(target)


def load_placed(
    source: Source, *, dtype: DTypeName, device: str, placement: Placement
) -> PlacedModel:
    """Load a model that is run layer by layer; see `load_model`.

    A "streamed" model stays in host memory: in its checkpoint's dtype that is pages of the files.
    """
    target, streamed = pick_device(device), placement == "streamed"
    model = _load_weights(source, dtype, target, split=False)
    if not streamed:
        model = model.to(target)
    return PlacedModel(model, target, next(model.parameters()).dtype, streamed)


def _load_weights(source: Source, dtype: DTypeName, target: torch.device, split: bool) -> nn.Module:
    """The model on CPU, or spread."""
    with quiet():
        config = read_config(source.folder, source.trust_remote_code)
        model, loading = auto_class(config, source.folder).from_pretrained(
            source.folder,
            config=config,
            dtype=_torch_dtype(dtype, target),
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `_check_loading` names the tensor
            device_map="auto" if split else None,
            max_memory=_memory_of(target) if split else None,
        )
    _check_loading(source.folder, loading)
    model.requires_grad_(False).eval()
    _check_weights(model, source)
    network: nn.Module = model
    return network


def _torch_dtype(dtype: DTypeName, target: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if target.type == "cpu" else "auto"
    found: torch.dtype = getattr(torch, dtype)
    return found


def _check_loading(folder: Path, loading: Mapping[str, Any]) -> None:
    """Raise where transformers would go on with random values in place of those of the file."""
    if mismatched := sorted(loading["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise RegraftError(
            f"{folder}: {name} is {list(stored)} in the file, config.json describes "
            f"{list(wanted)}"
            + (f" ({len(mismatched) - 1} more differ)" if mismatched[1:] else "")
            + ". Weights and config belong to different models: export the whole model again."
        )
    if missing := sorted(loading["missing_keys"]):
        raise RegraftError(
            f"{folder} holds no weights for {missing[0]}"
            + (f" and {len(missing) - 1} more" if missing[1:] else "")
            + ", which config.json asks for. Export the whole model again."
        )


def load_processor(source: Source) -> Any:
    """Load the processor (the tokenizer of a text-only model)."""
    from transformers import AutoProcessor, AutoTokenizer

    auto = AutoProcessor if source.architecture.has_vision else AutoTokenizer
    return _processor_of(source.folder, auto, trust_remote_code=source.trust_remote_code)


def _processor_of(folder: Path, auto: Any, *, trust_remote_code: bool) -> Any:
    try:
        with quiet():
            return auto.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise RegraftError(
            f"{folder}: the processor could not be loaded ({str(error).splitlines()[0]}). "
            "If the files are missing, copy tokenizer and processor files of the base model there."
        ) from error


def load_judge(
    model: str | Path, *, dtype: DTypeName = "auto", device: str = "auto"
) -> tuple[nn.Module, Any]:
    """A model of any architecture that transformers knows, for inference, and its processor.

    It is not to be pruned, so that nothing need be known of its layers. Safetensors only, and no
    code that comes with it.

    Raises:
        RegraftError: see `open_source`; the processor cannot be loaded.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    checkpoint = open_checkpoint(resolve(model))
    target = pick_device(device)
    with quiet(), bad_config(checkpoint.folder):
        config = read_config(checkpoint.folder, trust_remote_code=False)
        auto = auto_class(config, checkpoint.folder)
        network = auto.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=_torch_dtype(dtype, target),
            use_safetensors=True,
        )
    reader = AutoProcessor if auto is AutoModelForImageTextToText else AutoTokenizer
    processor = _processor_of(checkpoint.folder, reader, trust_remote_code=False)
    return network.requires_grad_(False).eval().to(target), processor


def judge_fingerprint(model: str | Path) -> str:
    """The fingerprint of a judge's checkpoint; nothing is loaded."""
    return open_checkpoint(resolve(model)).fingerprint


def placed(batch: Batch, model: nn.Module) -> Batch:
    """The batch on the model's device, pixels in its dtype.

    Where every weight waits off the devices accelerate's hooks take the batch to them.
    """
    parameters = list(model.parameters())
    first = next((p for p in parameters if not p.is_meta), None)
    device = torch.device("cpu") if first is None else first.device
    return batch.to(device, (first if first is not None else parameters[0]).dtype)


def has_processor(source: Source) -> bool:
    """Whether the folder comes with a tokenizer and, for a vision model, an image processor."""
    names = {path.name for path in source.folder.iterdir()}
    images = {"processor_config.json", "preprocessor_config.json"}
    return "tokenizer_config.json" in names and bool(
        names & images or not source.architecture.has_vision
    )


def transformers_version() -> str:
    """The installed version of transformers, which need not be imported for it."""
    return version("transformers")


def pick_device(device: str) -> torch.device:
    """ "auto" -> the accelerator where there is one, else the CPU.

    Raises:
        RegraftError: a device that this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RegraftError(f"The device {device!r} cannot be used here: {reason}") from error
    return picked


def _check_weights(model: nn.Module, source: Source) -> None:
    modules = dict(model.named_modules())
    for linear in source.architecture.linears:
        weight = modules[linear.module].weight
        assert isinstance(weight, torch.Tensor)
        if not weight.is_floating_point():
            raise RegraftError(f"{source.folder}: {linear.tensor} is quantised; give a dense one.")
    first = next(source.architecture.linears)
    weight = modules[first.module].weight
    assert isinstance(weight, torch.Tensor)
    if weight.is_meta:  # a split model's layer that waits on disk
        return
    if not torch.equal(source.checkpoint.read(first.tensor).to(weight.dtype), weight.cpu()):
        raise RegraftError(
            f"{source.folder}: tensor {first.tensor} on disk is not the weight of {first.module} "
            "in memory; this key layout is not supported."
        )


def _memory_of(target: torch.device) -> dict[int | str, int] | None:
    """What may be used of one device, where one is named, and of host memory; None for all."""
    index: int | None = target.index
    if index is None:
        return None
    from accelerate.utils import get_max_memory  # type: ignore[import-untyped]

    return {name: size for name, size in get_max_memory().items() if name in (index, "cpu")}


def check_split(device: str, placement: str) -> None:
    """`require_split` where a model that is too large for one device is to answer prompts."""
    on_cpu = pick_device(device).type == "cpu"
    if placement == "streamed" and not on_cpu:
        require_split()


def require_split() -> None:
    """Raise unless a model can be spread over devices and host memory.

    Raises:
        RegraftError: there are several processes, or accelerate is not installed.
    """
    if distributed.world() > 1:
        raise RegraftError(
            "With --placement streamed, heads, evaluation and the dense answers that gain imitates "
            "spread the model over all devices, so there is room for one process only. Use one, or "
            "--placement resident."
        )
    if find_spec("accelerate") is None:
        raise RegraftError(
            "With --placement streamed, heads, evaluation and the dense answers that gain imitates "
            "spread the model over devices and host memory with accelerate: pip install "
            "'regraft[streamed]'."
        )
