"""The stages: each a function from settings and inputs to one artifact on disk.

An artifact carries a key that covers everything it was made from (settings, contents of the inputs,
versions). A stage that finds its artifact with the same key returns at once; an artifact with
another key is never overwritten. Unfinished work is kept in a hidden folder next to the artifact,
under its key, and continued after a kill.
"""

from regraft.stages.defending import write_defence
from regraft.stages.evaluating import Evaluation, evaluate_target, read_evaluation
from regraft.stages.evaluation_cache import EvaluationCache
from regraft.stages.gathering import write_head_scores, write_statistics
from regraft.stages.patching import patch_checkpoint
from regraft.stages.pruning import prune_checkpoint
from regraft.stages.ranking import write_patch, write_ranking
from regraft.stages.setup import ArtifactPaths, Inputs, Setup
from regraft.stages.targets import OnText, Target

__all__ = [
    "ArtifactPaths",
    "Evaluation",
    "EvaluationCache",
    "Inputs",
    "OnText",
    "Setup",
    "Target",
    "evaluate_target",
    "patch_checkpoint",
    "prune_checkpoint",
    "read_evaluation",
    "write_defence",
    "write_head_scores",
    "write_patch",
    "write_ranking",
    "write_statistics",
]
