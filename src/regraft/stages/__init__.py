"""The stages: each a function from settings and inputs to one artifact on disk.

An artifact carries the key of all that made it (settings, contents of the inputs, versions). A
stage whose artifact is there with the same key is done and returns at once; an artifact with
another key is never overwritten. Unfinished work waits in a hidden folder beside the artifact,
under its key, and is taken up again after a kill.
"""

from regraft.disk.artifact import ABOUT_FILE
from regraft.evaluation.tradeoff import read_curve
from regraft.stages.answering import calibration_data, imitation_data
from regraft.stages.checking import check, check_compute, clear_check, side
from regraft.stages.defending import defend
from regraft.stages.endpoint import EndpointTarget, open_target
from regraft.stages.evaluating import Evaluation, evaluate, read_evaluation
from regraft.stages.evaluation_cache import EvaluationCache
from regraft.stages.exporting import Tool, export
from regraft.stages.gathering import statistics
from regraft.stages.judging import (
    VERDICTS,
    agreement,
    judge,
    judge_bench,
    opinions,
    own,
)
from regraft.stages.patching import Preview, apply, preview, revert
from regraft.stages.pruning import prune, spilled_bytes
from regraft.stages.ranking import Inputs, write_ranking
from regraft.stages.realigning import realign
from regraft.stages.responding import respond
from regraft.stages.restoring import ArtifactPaths, Restoration, curve_beside
from regraft.stages.scoring import heads
from regraft.stages.searching import Search
from regraft.stages.setup import Setup
from regraft.stages.targets import Evaluable, OnText, Target
from regraft.stages.tuning import tune

__all__ = [
    "ABOUT_FILE",
    "VERDICTS",
    "ArtifactPaths",
    "EndpointTarget",
    "Evaluable",
    "Evaluation",
    "EvaluationCache",
    "Inputs",
    "OnText",
    "Preview",
    "Restoration",
    "Search",
    "Setup",
    "Target",
    "Tool",
    "agreement",
    "apply",
    "calibration_data",
    "check",
    "check_compute",
    "clear_check",
    "curve_beside",
    "defend",
    "evaluate",
    "export",
    "heads",
    "imitation_data",
    "judge",
    "judge_bench",
    "open_target",
    "opinions",
    "own",
    "preview",
    "prune",
    "read_curve",
    "read_evaluation",
    "realign",
    "respond",
    "revert",
    "side",
    "spilled_bytes",
    "statistics",
    "tune",
    "write_ranking",
]
