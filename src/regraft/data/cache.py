"""Images that a data set keeps inside a table, as files in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from regraft.files import atomic_file

CACHE_VARIABLE = "REGRAFT_CACHE"


def cache_folder() -> Path:
    """REGRAFT_CACHE, else `regraft` in the place where this system keeps caches."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regraft"


def cached_file(content: bytes, suffix: str) -> Path:
    """A file with this content, named after its digest; it is written once."""
    name = hashlib.sha256(content).hexdigest()[:32]
    path = cache_folder() / "images" / f"{name}{suffix}"
    if not (path.is_file() and path.stat().st_size == len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)
    return path
