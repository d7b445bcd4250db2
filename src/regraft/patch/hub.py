"""Patches on the hub: one a repository, under one name."""

from __future__ import annotations

from pathlib import Path

from regraft.data.storage import MODEL_ID, from_hub
from regraft.errors import RegraftError

PATCH_FILE = "patch.safetensors"


def patch_file(named: Path) -> Path:
    """The file of a patch: a path as it is, or for OWNER/NAME[@REVISION] its download.

    Nothing but the patch is downloaded. What ends in .safetensors is a path.
    """
    text = named.as_posix()
    if named.exists() or named.suffix == ".safetensors" or not MODEL_ID.fullmatch(text):
        return named
    name, _, revision = text.partition("@")
    file = from_hub(name, revision or None, [PATCH_FILE]) / PATCH_FILE
    if not file.is_file():
        raise RegraftError(
            f"{text} is neither a file here nor a patch on the hub: its repository holds no "
            f"{PATCH_FILE}, under which `regraft push` puts one."
        )
    return file
