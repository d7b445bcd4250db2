"""Data sets on the Hugging Face hub, downloaded once."""

from __future__ import annotations

import re
from pathlib import Path

from regraft.errors import RegraftError

PREFIX = "hf:"
_ALONE = (".csv", ".tsv", ".txt")
_ADDRESS = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<inner>.+))?")


MODEL_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@[\w./-]+)?")
"""ORG/NAME of a model, with or without @REVISION."""


def is_on_hub(path: Path) -> bool:
    """Whether a path is the address of a data set on the hub."""
    return path.as_posix().startswith(PREFIX)


def located(path: Path) -> Path:
    """A path as it is, or for "hf:ORG/NAME[@REVISION][/PATH]" where the download lies.

    All of the data set is had, since images lie beside files that name them, but for a table or a
    list of prompts, which is a file by itself.

    Raises:
        RegraftError: the address is malformed, or the data set cannot be had.
    """
    if not is_on_hub(path):
        return path.expanduser()
    text = path.as_posix()
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise RegraftError(
            f"{text!r} names no data set on the hub; expected hf:ORG/NAME, with a revision "
            "(@REVISION) and a path in it where wanted."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    name, inner = match["name"], match["inner"] or ""
    wanted = [inner] if inner.lower().endswith(_ALONE) else None
    try:
        folder = snapshot_download(
            name, repo_type="dataset", revision=match["revision"], allow_patterns=wanted
        )
    except GatedRepoError as error:
        raise RegraftError(
            f"{name} is gated: accept its terms on its page, then `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise RegraftError(
            f"There is no data set {name} on the hub, or it is private: `hf auth login`."
        ) from error
    except (HfHubHTTPError, OSError) as error:  # LocalEntryNotFoundError is an OSError
        raise RegraftError(
            f"{text} could not be had from the hub: {str(error).splitlines()[0]} Without a network "
            "give the path of a copy on disk."
        ) from error
    return Path(folder, inner)
