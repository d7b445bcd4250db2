"""Every stage that several processes share, in the folder given: run by `torchrun` or alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from methods import method, restored
from regraft import distributed, stages
from regraft.data.sources import DataSource
from regraft.heads.ships import HeadSettings
from regraft.models.load import open_source
from regraft.pruning.base import prune_settings
from regraft.pruning.statistics import StatisticsSettings
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.evaluating import EvalSettings

METHODS = ("wanda", "sparsegpt", "snip")
COMPUTE = ComputeSettings(device="cpu", batch_size=1)


def main(root: Path, out: Path) -> None:
    """Run all stages on `root`/dense and `root`/data, and write into `out`."""
    dense = open_source(root / "dense")
    data = DataSource(name="jsonl", path=root / "data" / "data.jsonl")
    calibration = CalibrationSettings(data=data, samples=4)
    for name in METHODS:
        stages.write_statistics(
            stages.Setup(dense, calibration, COMPUTE),
            out / f"statistics-{name}",
            StatisticsSettings(score=name),
        )
        settings = prune_settings(method=name, scope="row")
        pruned = stages.prune_checkpoint(
            stages.Setup(dense, calibration, COMPUTE), out / f"pruned-{name}", settings
        )
    stages.write_head_scores(
        stages.Setup(dense, calibration, COMPUTE, scoring=HeadSettings(r_max=2)), out / "heads"
    )
    restored(
        dense,
        pruned,
        out / "patch",
        method(top_heads=3, score="wanda"),
        out / "heads",
        out / "statistics-wanda",
        COMPUTE,
    )
    gain = method(method="gain", count=40)
    stages.write_ranking(stages.Setup(dense, calibration, COMPUTE), pruned, out / "ranking", gain)
    stages.patch_checkpoint("apply", pruned.folder, out / "patch", out / "realigned")
    target = stages.Target(dense, COMPUTE)
    stages.evaluate_target(target, out / "answers", [data], EvalSettings(max_new_tokens=4))
    (out / f"world-{distributed.rank()}").write_text(str(distributed.world()))


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    with distributed.joined():
        main(Path(sys.argv[1]), Path(sys.argv[2]))
