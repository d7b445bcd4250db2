"""Checkpoints whose weights are quantised: what they need to be run here.

transformers runs them, with a package of each method's own, and says what it lacks; some methods
are for accelerators only. They answer prompts and are never pruned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regraft.errors import RegraftError
from regraft.models.resolve import quiet

_REFUSED = (ImportError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, OSError)


def quantisation_of(config: Any) -> str | None:
    """How the weights are quantised by config.json, such as "compressed-tensors"; None if not."""
    stated = _stated(config)
    if stated is None:
        return None
    if stated.get("load_in_4bit") or stated.get("load_in_8bit"):  # older bitsandbytes name no more
        return "bitsandbytes"
    method = stated.get("quant_method", "a method that config.json does not name")
    return str(getattr(method, "value", method))


def check_quantised(config: Any, folder: Path) -> None:
    """See that transformers can run what is quantised so, with the packages and devices here.

    Raises:
        RegraftError: the method is unknown, or what it lacks in transformers' own words, which
            name the package.
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
            quantiser = AutoHfQuantizer.from_config(dict(_stated(config) or {}), pre_quantized=True)
            quantiser.validate_environment(device_map=None, weights_only=True)
    except _REFUSED as error:
        reason = " ".join(str(error).split()).rstrip(".")
        if isinstance(error, ModuleNotFoundError):  # the others name the package themselves
            reason += f" (pip install {error.name})"
        raise RegraftError(f"{where} and cannot be run here: {reason}.") from error


def require_unquantised(config: Any, folder: Path) -> None:
    """Raise where weights are quantised, which are neither pruned nor restored."""
    method = quantisation_of(config)
    if method is not None:
        raise RegraftError(
            f"{folder} is quantised ({method}): it can be evaluated, but has no weights of its own "
            "to prune, rank or restore. Give the checkpoint that it was quantised from, or one "
            "that was dequantised to bfloat16 or float32."
        )


def _stated(config: Any) -> dict[str, Any] | None:
    """What config.json says of it, in the model's config or that of its text part."""
    text = config.get_text_config(decoder=True)
    for one in (config, text):
        found = getattr(one, "quantization_config", None)
        if found is not None:
            return dict(found if isinstance(found, dict) else found.to_dict())
    return None
