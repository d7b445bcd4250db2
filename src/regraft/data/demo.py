"""The folders bundled with regraft: a small model and the demo data set."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from regraft.disk.paths import at_home, real
from regraft.errors import RegraftError

CAVEAT = (
    "A toy: the bundled model has 12 million parameters and refuses by the wording and the length "
    "of a title, not by its meaning. Its over-refusal on demo:borderline, harmless titles worded "
    "like harmful ones, shows how far a method restores refusing as such. This run shows a refusal "
    "behaviour lost and restored. It cannot show that safety is restored, nor what any method does "
    "to a real model."
)


def demo_model() -> Path:
    """Folder of the bundled checkpoint, reader-llava-12m."""
    return bundled("reader-llava-12m")


def is_demo(model: str | Path) -> bool:
    """Whether a model is the bundled one, named "demo" or by its folder."""
    return str(model) == "demo" or real(at_home(Path(model))) == real(demo_model())


def bundled(name: str) -> Path:
    """Folder bundled with regraft under this name."""
    path = Path(str(files("regraft"))) / "demo" / name
    if not path.is_dir():
        raise RegraftError(f"{path} is missing from this installation. Install regraft again.")
    return path
