"""Data sets by name. Each is one file, which defines its reader and registers it.

To add one, write such a file here, or in a package of your own that names it under the entry-point
group `regraft.datasets`:

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
        read: Reads all examples of the file or folder at PATH (downloaded and unpacked), of SPLIT
            if that is not None. Raises RegraftError on bad input.
        splits: The values SPLIT may have; None leaves that to `read`.
        only: The kind of its prompts if all are of one kind.
        bundled: The data set comes with its package and takes no PATH; `read` gets an empty one.
        split_file: For a data set with one file to learn from and one to evaluate on: maps its
            folder and the split to the file that `read` gets. Raises RegraftError if it is missing.
    """

    read: Callable[[Path, str | None], Reading]
    splits: tuple[str, ...] | None = ()
    only: Kind | None = None
    bundled: bool = False
    split_file: Callable[[Path, Split], Path] | None = None


DATASETS = Registry("data set", "regraft.data.readers", "regraft.datasets", Dataset)
