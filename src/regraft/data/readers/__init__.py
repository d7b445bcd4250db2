"""Data sets by name: a file each, which holds its reader and registers it.

A new one is one file, here or in a package of its own that names it under the entry-point group
`regraft.datasets`:

    def read_mine(path: Path, split: str | None) -> Reading: ...

    PLUGIN = Dataset(read_mine)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from regraft.data.example import Reading
from regraft.registry import Registry

Kind = Literal["harmful", "harmless"]
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Dataset:
    """A data set that is read by its name, as in NAME:PATH#SPLIT.

    Args:
        read: From the file or folder that PATH names (downloaded and unpacked), and the SPLIT or
            None, to all of its examples. Raises RegraftError on bad input.
        splits: What SPLIT may be; None leaves that to `read`.
        only: The kind of all prompts where there is but one.
        bundled: It comes with its package and takes no PATH; `read` gets an empty one.
        split_file: Of a folder with one file to learn from and one to evaluate on: the file of
            either, which `read` then gets. Raises RegraftError where it is missing.
    """

    read: Callable[[Path, str | None], Reading]
    splits: tuple[str, ...] | None = ()
    only: Kind | None = None
    bundled: bool = False
    split_file: Callable[[Path, Split], Path] | None = None


DATASETS = Registry("data set", "regraft.data.readers", "regraft.datasets", Dataset)
