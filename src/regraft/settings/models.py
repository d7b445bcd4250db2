"""The models of a run of several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pydantic import Field, field_validator, model_validator

from regraft.settings.base import Settings, checked_name


class ModelSettings(Settings):
    """One model of a run of several; its folder or hub id alone is enough."""

    model: str = Field(min_length=1, description="A folder, a hub id, or 'demo'.")
    name: str = Field(
        "",
        description="What to call it in tables and folders; if not given, the last part of its "
        "folder or hub id.",
    )
    prunings: tuple[str, ...] = Field(
        (), description="Names of the prunings that it is run with; all if not given."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_id(cls, given: Any) -> Any:
        given = {"model": given} if isinstance(given, str) else given
        if not isinstance(given, Mapping) or given.get("name"):
            return given
        if not isinstance(model := given.get("model"), str):
            return given
        return {**given, "name": PurePath(model.partition("@")[0]).name}

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return checked_name(name)
