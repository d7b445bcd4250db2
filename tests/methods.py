"""Settings of restoration methods by name, as tests write them; HSR if none is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regraft import stages
from regraft.models.load import Source
from regraft.patch.format import Patch
from regraft.progress import Progress
from regraft.recipes.parts import VariantSettings, parse_variant
from regraft.restoration.base import METHODS, MethodSettings
from regraft.settings.compute import ComputeSettings


def method(method: str = "hsr", **given: Any) -> MethodSettings:
    """The settings of a method."""
    return METHODS.get(method).settings_type(method=method, **given)


def a_variant(method: str = "hsr", **given: Any) -> VariantSettings:
    """One realigned model of a recipe."""
    return parse_variant({"method": method, **given})


def restored(
    dense: Source,
    pruned: Source,
    out: Path,
    settings: MethodSettings,
    heads: Path | None = None,
    statistics: Path | None = None,
    compute: ComputeSettings | None = None,
    progress: Progress | None = None,
) -> Patch:
    """The patch `out` of a method that reads no prompts; its ranking lies beside it."""
    ranking, inputs = out.with_name(f"{out.name}.ranking"), stages.Inputs(heads, statistics)
    setup = stages.Setup(
        dense, compute=compute or ComputeSettings(), progress=progress or Progress()
    )
    stages.write_ranking(setup, pruned, ranking, settings, inputs)
    return stages.write_patch(dense, pruned, out, settings, ranking)
