"""What comes with regraft: a small model, and where it and the demo data set lie."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from regraft.disk.paths import at_home
from regraft.errors import RegraftError

CAVEAT = (
    "A toy: the bundled model has 12 million parameters and refuses by the wording and the length "
    "of a title, not by its meaning. How much of what a method restores is only refusing shows in "
    "its over-refusal on demo:borderline, harmless titles that are worded like harmful ones. This "
    "run shows a refusal behaviour lost and restored. It cannot show that safety is restored, nor "
    "what any method does to a real model."
)


def demo_model() -> Path:
    """Folder of the bundled checkpoint, reader-llava-12m."""
    return bundled("reader-llava-12m")


def is_demo(model: str | Path) -> bool:
    """Whether a model is the bundled one, by the word "demo" or by its folder."""
    return str(model) == "demo" or at_home(Path(model)).resolve() == demo_model().resolve()


def bundled(name: str) -> Path:
    """Folder of that name which comes with regraft."""
    path = Path(str(files("regraft"))) / "demo" / name
    if not path.is_dir():
        raise RegraftError(f"{path} is missing from this installation. Install regraft again.")
    return path
