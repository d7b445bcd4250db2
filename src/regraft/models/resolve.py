"""Resolve the name of a model to its folder, its config and its class in transformers.

Errors of transformers and the hub become `RegraftError`s here. Quantised checkpoints answer prompts
and are never pruned. transformers runs them with the package of each quantisation method, and says
if that is missing; some methods need an accelerator.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from regraft.data.storage import MODEL_ID, from_hub
from regraft.disk.parsing import read_json, shown
from regraft.errors import RegraftError
from regraft.models.checkpoint import SETTINGS_FILES
from regraft.models.foreign import foreign
from regraft.models.model_settings import check_settings

_NOT_FROM_HUB = ["original/*", "consolidated*"]
_HUB_FILES = [f"*{suffix}" for suffix in (".safetensors", *SETTINGS_FILES)]


def resolve(model: object) -> Path:
    """A model's folder, by its path, ORG/NAME[@REVISION] (downloaded once) or the word "demo"."""
    name = fspath(model) if isinstance(model, PathLike) else model
    if not isinstance(name, str):
        kind = type(model).__name__
        raise RegraftError(f"A model is named by its folder, a hub id or 'demo', not by {kind}.")
    folder = Path(name)
    if model == "demo":
        # a data set's module, which importing a method must not load
        from regraft.data.readers.demo import demo_model

        folder = demo_model()
    with suppress(OSError, ValueError):  # not a valid name of a folder
        if folder.exists():
            return folder
    if not isinstance(model, str) or not MODEL_ID.fullmatch(model):
        raise RegraftError(
            f"The model folder {model} does not exist. Give a folder that holds config.json and "
            "safetensors, or a hub id such as Qwen/Qwen2.5-VL-7B-Instruct."
        )
    name, _, revision = model.partition("@")
    return from_hub(name, revision or None, _HUB_FILES, _NOT_FROM_HUB)


def read_config(folder: Path, trust_remote_code: bool) -> Any:
    """Check a model's settings and read its config.

    Raises:
        RegraftError: the config is missing or invalid, or needs code that is not trusted.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, __version__

    if not (folder / "config.json").is_file():
        raise RegraftError(f"{folder} holds no config.json: it is not a model folder.")
    check_settings(folder)
    stated = read_json(folder / "config.json", lenient=True)
    kind = stated.get("model_type")
    if not (kind is None or kind in CONFIG_MAPPING or "auto_map" in stated):
        raise RegraftError(
            f"{folder / 'config.json'}: model_type is {shown(kind)}, which transformers "
            f"{__version__} does not know. Update transformers if the model is newer; if not, take "
            "the config.json of the base model."
        )
    if (folder / "generation_config.json").is_file():
        with foreign(folder, "its generation_config.json", "Take that of the base model."):
            GenerationConfig.from_pretrained(folder)
    with foreign(folder, "its config.json", "Take that of the base model."):
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:
            if "trust_remote_code" not in str(error):
                raise
            raise RegraftError(
                f"{folder} comes with its own Python code. Read it and, if you trust it, run it "
                "with --trust-remote-code."
            ) from error


def auto_class(config: Any, folder: Path) -> Any:
    """AutoModelForImageTextToText or AutoModelForCausalLM."""
    return _classes(config, folder)[0]


def takes_images(config: Any, folder: Path) -> bool:
    """Whether a model of this type takes images, according to its class in transformers."""
    from transformers import AutoModelForImageTextToText

    auto, kind = _classes(config, folder)
    if kind is None:
        return auto is AutoModelForImageTextToText
    # In older versions some types with a vision tower inherit "text" from the base class (Qwen3.5)
    inherited = kind.input_modalities == "text" and hasattr(config, "vision_config")
    return inherited or "image" in kind.input_modalities


def require_greedy(config: Any, folder: Path) -> None:
    """Raise unless such models generate token by token; diffusion and action models do not."""
    from transformers import GenerationMixin

    _, kind = _classes(config, folder)
    if kind is not None and not issubclass(kind, GenerationMixin):
        raise RegraftError(
            f"{folder} is of type {config.model_type}, whose {kind.__name__} does not write one "
            "token after the other: it gives no greedy answers to evaluate."
        )


def _classes(config: Any, folder: Path) -> tuple[Any, Any]:
    """(auto class, class in transformers or None if the model comes with its own code)."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    remote = getattr(config, "auto_map", None) or {}
    for auto, mapping in (
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    ):
        if type(config) in mapping:
            return auto, mapping[type(config)]
        if auto.__name__ in remote:
            return auto, None
    raise RegraftError(
        f"{folder} is of type {config.model_type}: neither a vision-language model nor a causal "
        "language model, so there are no refusals to restore."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' log, progress bars and warnings inside the block."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=UserWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def quantisation_of(config: Any) -> str | None:
    """The quantisation method in config.json, such as "compressed-tensors"; None if unquantised."""
    quantisation = _quantization_config(config)
    if quantisation is None:
        return None
    if quantisation.get("load_in_4bit") or quantisation.get("load_in_8bit"):  # old: unnamed
        return "bitsandbytes"
    method = quantisation.get("quant_method", "a method that config.json does not name")
    return str(getattr(method, "value", method))


def check_quantised(config: Any, folder: Path) -> None:
    """Check that transformers can run this quantisation with the packages and devices here.

    Raises:
        RegraftError: the method is unknown, or a package or device is missing.
    """
    method = quantisation_of(config)
    if method is None:
        return
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

    names = AUTO_QUANTIZATION_CONFIG_MAPPING
    where = f"{folder} is quantised ({method}, by quantization_config of its config.json)"
    known = {name.removesuffix("_4bit").removesuffix("_8bit") for name in names}
    if method not in known:
        raise RegraftError(
            f"{where}, which transformers cannot run: it knows {', '.join(sorted(known))}. Give a "
            "checkpoint in one of these, or one that is not quantised."
        )
    try:
        with quiet():
            stated = dict(_quantization_config(config) or {})
            quantiser = AutoHfQuantizer.from_config(stated, pre_quantized=True)
            quantiser.validate_environment(device_map=None, weights_only=True)
    except Exception as error:  # transformers raises all kinds
        reason = " ".join(str(error).split()).rstrip(".")
        if isinstance(error, ModuleNotFoundError):  # other errors name the package themselves
            reason += f" (pip install {error.name})"
        raise RegraftError(f"{where} and cannot be run here: {reason}.") from error


def require_unquantised(config: Any, folder: Path) -> None:
    """Raise if weights are quantised: such models can be neither pruned nor restored."""
    method = quantisation_of(config)
    if method is not None:
        raise RegraftError(
            f"{folder} is quantised ({method}): it can be evaluated, but has no weights of its own "
            "to prune, rank or restore. Give the checkpoint that it was quantised from, or one "
            "that was dequantised to bfloat16 or float32."
        )


def _quantization_config(config: Any) -> dict[str, Any] | None:
    """The `quantization_config` of the model or of its text part."""
    text = config.get_text_config(decoder=True)
    for one in (config, text):
        found = getattr(one, "quantization_config", None)
        if found is not None:
            return dict(found if isinstance(found, dict) else found.to_dict())
    return None
