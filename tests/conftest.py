"""Fixtures that every test may use."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start: the cores are taken

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

import pico
import quick

quick.hasten()
settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


# Files that take longest, in order: a worker that began one last would keep the others waiting.
# Before them the one whose device autograd must know when it first runs in a process.
LONGEST = (
    "test_cuda",
    *("test_end_to_end", "test_families", "test_stages", "test_fuzz", "test_types_table"),
    *("test_several", "test_goldens", "test_noninferiority", "test_answerer", "test_cli"),
    *("test_gaining", "test_selection", "test_window", "test_distributed", "test_endpoint"),
    *("test_ranking", "test_paper", "test_compare", "test_replay", "test_analysis"),
    *("test_defence", "test_tuning", "test_method_plugin", "test_real_benchmark", "test_check"),
    *("test_reader_benchmark", "test_ships", "test_exporting", "test_pruner"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; `--no-loadscope-reorder` keeps them there."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def shared_folder() -> Path:
    """Where real data sets and the reader model lie: `REGRAFT_SHARED`, or `../shared`."""
    beside_repository = Path(__file__).resolve().parents[2] / "shared"
    return Path(os.environ.get("REGRAFT_SHARED", beside_repository))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with `data/` and `models/`; the test is skipped where it is missing."""
    folder = shared_folder()
    if not (folder / "data").is_dir():
        pytest.skip(f"needs the shared data sets: set REGRAFT_SHARED (looked in {folder})")
    return folder


@pytest.fixture(scope="session")
def pico_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`pico_dir(name)`: a float32 pico checkpoint, written once a session; leave it unchanged."""
    return cache(lambda name: pico.save(name, tmp_path_factory.mktemp("pico") / name))


@pytest.fixture
def undrawn() -> Iterator[None]:
    """Reports without figures in a whole test."""
    with quick.without_figures():
        yield


@pytest.fixture(params=pico.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family, one test each."""
    return str(request.param)


@pytest.fixture(params=pico.VLM_FAMILIES)
def vlm_family(request: pytest.FixtureRequest) -> str:
    """Every vision-language family, one test each."""
    return str(request.param)


@pytest.fixture(params=pico.PAPER_FAMILIES)
def paper_family(request: pytest.FixtureRequest) -> str:
    """Every family that the HSR paper covers, one test each."""
    return str(request.param)
