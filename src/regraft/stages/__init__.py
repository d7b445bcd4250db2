"""The stages: each a function from settings and inputs to one artifact on disk.

An artifact carries a key that covers everything it was made from (settings, contents of the inputs,
versions). A stage that finds its artifact with the same key returns at once; an artifact with
another key is never overwritten. Unfinished work is kept in a hidden folder next to the artifact,
under its key, and continued after a kill.
"""

from regraft.disk.artifact import ABOUT_FILE
from regraft.evaluation.tradeoff import read_curve
from regraft.stages.answering import calibration_data, imitation_data, write_responses
from regraft.stages.checking import check_compressed, check_compute, clear_check, open_side
from regraft.stages.defending import write_defence
from regraft.stages.endpoint import EndpointTarget, open_target
from regraft.stages.evaluating import Evaluation, evaluate_target, read_evaluation
from regraft.stages.evaluation_cache import EvaluationCache
from regraft.stages.gathering import write_head_scores, write_statistics
from regraft.stages.judging import (
    VERDICTS,
    agreement,
    judge_answers,
    measure_judges,
    opinions,
    own_judge,
)
from regraft.stages.patching import Tool, export_patches, patch_checkpoint, preview
from regraft.stages.pruning import prune_checkpoint, spilled_bytes
from regraft.stages.ranking import write_patch, write_ranking
from regraft.stages.restoring import Restoration
from regraft.stages.searching import Search
from regraft.stages.setup import ArtifactPaths, Inputs, Setup
from regraft.stages.targets import OnText, Target
from regraft.stages.tuning import tune_method

__all__ = [
    "ABOUT_FILE",
    "VERDICTS",
    "ArtifactPaths",
    "EndpointTarget",
    "Evaluation",
    "EvaluationCache",
    "Inputs",
    "OnText",
    "Restoration",
    "Search",
    "Setup",
    "Target",
    "Tool",
    "agreement",
    "calibration_data",
    "check_compressed",
    "check_compute",
    "clear_check",
    "evaluate_target",
    "export_patches",
    "imitation_data",
    "judge_answers",
    "measure_judges",
    "open_side",
    "open_target",
    "opinions",
    "own_judge",
    "patch_checkpoint",
    "preview",
    "prune_checkpoint",
    "read_curve",
    "read_evaluation",
    "spilled_bytes",
    "tune_method",
    "write_defence",
    "write_head_scores",
    "write_patch",
    "write_ranking",
    "write_responses",
    "write_statistics",
]
