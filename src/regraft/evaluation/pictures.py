"""The images that answers were given to, found again in a folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from regraft.errors import RegraftError
from regraft.evaluation.results import Answer
from regraft.files import file_digest


@dataclass(frozen=True)
class Pictures:
    """Images in `folder`, and where an answer keeps its image's digest, also anywhere below."""

    folder: Path

    def of(self, answer: Answer) -> Path | None:
        """The image of an answer; None where it has none.

        Files of one name, as in VLGuard's and MM-SafetyBench's folders, are told apart by their
        bytes. Answers from before there were digests have theirs in the folder itself.

        Raises:
            RegraftError: it is not there, or with other bytes.
        """
        if answer.image is None:
            return None
        near = self.folder / answer.image
        if not answer.image_digest:
            if not near.is_file():
                raise RegraftError(f"{near}, the image of {answer.id!r}, does not exist.")
            return near
        if near.is_file() and self._digest(near) == answer.image_digest:
            return near
        named = self._below.get(answer.image, [])
        for path in named:
            if self._digest(path) == answer.image_digest:
                return path
        if named:
            raise RegraftError(
                f"{named[0]} is not the image of {answer.id!r}: its bytes are others than those "
                "that were evaluated. Name the folder of the evaluated images with --images."
            )
        raise RegraftError(
            f"{self.folder}: there is no {answer.image}, the image of {answer.id!r}, in it or "
            "below. Name the folder of the evaluated images with --images."
        )

    @cached_property
    def _below(self) -> Mapping[str, list[Path]]:
        """Name -> the files of that name."""
        found = defaultdict(list)
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                found[path.name].append(path)
        return found

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            self._digests[path] = file_digest(path)
        return self._digests[path]

    @cached_property
    def _digests(self) -> dict[Path, str]:
        return {}
