"""Fixtures that every test may use."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import pico

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


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
