"""The paper's matrix at pico size: six families, three pruners, realigned and answered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pico
from disk import write_data
from methods import method, restored
from regraft import stages
from regraft.data.sources import DataSource
from regraft.errors import RegraftError
from regraft.heads.ships import HeadSettings
from regraft.models.load import open_source
from regraft.pruning.base import prune_settings
from regraft.pruning.prune import zeros
from regraft.pruning.statistics import StatisticsSettings
from regraft.restoration.base import Method
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.evaluating import EvalSettings

pytestmark = pytest.mark.slow
COMPUTE = ComputeSettings(device="cpu", batch_size=2)
PRUNERS: tuple[Method, ...] = ("wanda", "sparsegpt", "snip")


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A sharded bfloat16 checkpoint, its data and head scores, made once a family."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            root = made[family] = tmp_path_factory.mktemp(family)
            pico.save(family, root / "dense", torch.bfloat16, "100KB")
            write_data(root / "data", 4)
            dense, calibration = open_source(root / "dense"), _calibration(root)
            assert len(dense.checkpoint.shards) > 1
            stages.write_head_scores(
                stages.Setup(dense, calibration, COMPUTE, scoring=HeadSettings(r_max=2)),
                root / "heads",
            )
        return made[family]

    return make


def _calibration(root: Path) -> CalibrationSettings:
    data = DataSource(name="jsonl", path=root / "data" / "data.jsonl")
    return CalibrationSettings(data=data, samples=4)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_prune_score_realign_apply_reload_answer(
    paper_family: str, pruner: Method, scored: Callable[[str], Path], tmp_path: Path
) -> None:
    root = scored(paper_family)
    dense, calibration = open_source(root / "dense"), _calibration(root)
    settings = prune_settings(method=pruner, sparsity=0.6)
    pruned = stages.prune_checkpoint(
        stages.Setup(dense, calibration, COMPUTE), tmp_path / "pruned", settings
    )
    share = zeros(pruned.checkpoint, pruned.architecture) / pruned.architecture.prunable
    assert share == pytest.approx(0.6, abs=0.02)

    wanted = StatisticsSettings(score=pruner)
    stages.write_statistics(
        stages.Setup(dense, calibration, COMPUTE), tmp_path / "statistics", wanted
    )
    patch = restored(
        dense,
        pruned,
        tmp_path / "patch",
        method(score=pruner, top_heads=4, q=0.8),
        root / "heads",
        tmp_path / "statistics",
        COMPUTE,
    )
    assert 0 < patch.restored < patch.about["pruned"]
    for name, tensor in patch.tensors.items():
        at = tensor.positions
        assert torch.equal(tensor.values, dense.checkpoint.read(name).flatten()[at])

    realigned = open_source(
        stages.patch_checkpoint("apply", pruned.folder, tmp_path / "patch", tmp_path / "out")
    )
    filled = zeros(pruned.checkpoint, pruned.architecture) - zeros(
        realigned.checkpoint, dense.architecture
    )
    assert filled == patch.restored
    suites, short = [calibration.data], EvalSettings(max_new_tokens=3)
    answered = {
        name: stages.evaluate_target(
            stages.Target(source, COMPUTE), tmp_path / f"{name}-answers", suites, short
        ).result
        for name, source in (("pruned", pruned), ("realigned", realigned))
    }
    target = stages.Target(pruned, COMPUTE, tmp_path / "patch")
    in_memory = stages.evaluate_target(target, tmp_path / "patched-answers", suites, short).result
    texts = {name: [a.answer for a in result.answers] for name, result in answered.items()}
    assert len(texts["pruned"]) == 8
    assert [a.answer for a in in_memory.answers] == texts["realigned"]


def test_scores_rank_differently(scored: Callable[[str], Path], tmp_path: Path) -> None:
    """The same pruned model, realigned by each score: other weights are restored."""
    root = scored("qwen2_5_vl")
    dense, calibration = open_source(root / "dense"), _calibration(root)
    pruned = stages.prune_checkpoint(
        stages.Setup(dense, calibration, COMPUTE), tmp_path / "pruned", prune_settings()
    )
    found = {}
    for score in (*PRUNERS, "magnitude"):
        settings = method(score=score, top_heads=8, q=0.9)
        file = None
        if score != "magnitude":
            file = tmp_path / f"statistics-{score}"
            stages.write_statistics(
                stages.Setup(dense, calibration, COMPUTE), file, StatisticsSettings(score=score)
            )
        patch = restored(
            dense, pruned, tmp_path / f"patch-{score}", settings, root / "heads", file, COMPUTE
        )
        assert patch.restored
        found[score] = {(n, int(i)) for n, t in patch.tensors.items() for i in t.positions}
    assert len({frozenset(one) for one in found.values()}) == len(found)


def test_statistics_of_another_score_are_refused(
    scored: Callable[[str], Path], tmp_path: Path
) -> None:
    root = scored("qwen2_5_vl")
    dense, calibration = open_source(root / "dense"), _calibration(root)
    stages.write_statistics(stages.Setup(dense, calibration, COMPUTE), tmp_path / "wanda")
    settings = prune_settings(method="magnitude")
    pruned = stages.prune_checkpoint(
        stages.Setup(dense, calibration, COMPUTE), tmp_path / "pruned", settings
    )
    with pytest.raises(RegraftError, match="holds statistics of wanda, and importance by snip is"):
        restored(
            dense,
            pruned,
            tmp_path / "patch",
            method(score="snip"),
            root / "heads",
            tmp_path / "wanda",
        )
