"""Zeros from pruning are distinguished from those from quantisation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pico
from regraft import stages
from regraft.data.sources import DataSource
from regraft.models.load import open_source
from regraft.progress import Progress
from regraft.pruning.base import prune_settings
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.stages.pruning import excess_zeros


def dense() -> Tensor:
    return torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()


def dequantised(bits: int, group: int, weight: Tensor) -> Tensor:
    """Symmetric round-to-nearest in groups of columns, with a scale for each."""
    groups = weight.float().reshape(len(weight), -1, group)
    scale = groups.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((groups / scale).round() * scale).reshape(weight.shape).bfloat16()


def pruned(weight: Tensor, share: float) -> Tensor:
    """By magnitude, row by row."""
    place = weight.float().abs().argsort(1)[:, : int(share * weight.shape[1])]
    return weight.scatter(1, place, 0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_dequantised_weights_have_no_excess(bits: int, group: int) -> None:
    weight = dequantised(bits, group, dense())
    assert float((weight == 0).float().mean()) > 0.008
    assert excess_zeros(weight) < 0


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_pruned_weights_have(share: float) -> None:
    assert excess_zeros(dense()) < 0
    assert excess_zeros(pruned(dense(), share)) == pytest.approx(share, abs=0.05)


def test_pruned_after_quantisation() -> None:
    assert excess_zeros(pruned(dequantised(4, 128, dense()), 0.5)) > 0.3


def test_by_hand() -> None:
    """Two blocks of 32: three zeros against one of each; two zeros against a value five times."""
    rows = torch.arange(1.0, 65.0)[None]
    rows[0, :3] = 0
    rows[0, 40:42] = 0
    rows[0, 50:55] = 7.0
    assert excess_zeros(rows) == ((3 - 1) + (2 - 5)) / 64


class Notes(Progress):
    """Records notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize("warned", [False, True])
def test_the_warning(warned: bool, tmp_path: Path) -> None:
    folder = pico.save("llama", tmp_path / "model")
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, one in weights.items():
        if ".layers." in name and one.ndim == 2:
            made = pruned(one, 0.5) if warned else dequantised(4, one.shape[1], one)
            weights[name] = made.to(one.dtype)
    save_file(weights, file, metadata={"format": "pt"})
    progress = Notes()
    calibration = CalibrationSettings(data=DataSource.model_validate("demo"))
    compute = ComputeSettings(device="cpu")
    setup = stages.Setup(open_source(folder), calibration, compute, progress)
    stages.prune_checkpoint(setup, tmp_path / "out", prune_settings(method="magnitude"))
    assert any("is zero before pruning" in text for text in progress.texts) is warned
