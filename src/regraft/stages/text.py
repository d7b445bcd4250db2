"""What an evaluation measures on ordinary text, against that of the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from regraft.errors import RegraftError
from regraft.evaluation.perplexity import (
    Teacher,
    load_teacher,
    predict,
    read_documents,
    save_teacher,
)
from regraft.evaluation.results import TextResult
from regraft.files import digest, file_digest
from regraft.progress import Progress

STATES = "text-states.safetensors"  # in the folder of a dense model's evaluation


@dataclass(frozen=True)
class OnText:
    """Ordinary text to measure on: a file of documents separated by blank lines.

    `dense` is the folder of the dense model's evaluation on the same text, from which KL is
    measured. An evaluation without it keeps the states by which others measure theirs.
    """

    file: Path
    dense: Path | None = None

    def digests(self) -> dict[str, str]:
        """Of all that decides the result.

        Raises:
            RegraftError: the text is missing, or the dense model was not evaluated on one.
        """
        found = {"text": digest(*read_documents(self.file))}
        if self.dense is None:
            return found
        states = self.dense / STATES
        if not states.is_file():
            raise RegraftError(
                f"{self.dense} holds no evaluation of the dense model on a text: there is no "
                f"{STATES} in it. Evaluate the dense model first, with --text and without --dense."
            )
        return found | {"dense on text": file_digest(states)}

    def predicted(
        self, network: nn.Module, processor: Any, progress: Progress
    ) -> tuple[TextResult, Teacher]:
        """See `predict`."""
        documents = read_documents(self.file)
        teacher = None if self.dense is None else load_teacher(self.dense / STATES, len(documents))
        with progress.task("Reading ordinary text", len(documents), "documents") as done:
            return predict(network, processor, documents, teacher, done)

    def keep(self, teacher: Teacher, folder: Path) -> None:
        """Write the states of a dense model into the folder of its evaluation."""
        if self.dense is None:
            save_teacher(folder / STATES, teacher)
