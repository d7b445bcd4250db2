"""Bad input found before any long work starts."""

from __future__ import annotations

from regraft.data.example import Reading
from regraft.data.sources import distinct
from regraft.errors import RegraftError
from regraft.heads.ships import HeadSettings, most_rank
from regraft.models.load import Source
from regraft.patch.pair import Survey
from regraft.restoration.base import MethodSettings, Needs
from regraft.restoration.selection import all_heads
from regraft.settings.compute import ComputeSettings
from regraft.settings.defending import RefusalDirectionSettings


def check_gradients(source: Source, compute: ComputeSettings, what: str) -> None:
    """Raise where the dtype that a model will be loaded in is one in which gradients vanish."""
    if compute.dtype_of(source) == "float16":
        raise RegraftError(
            f"{what} needs gradients, which vanish in float16, the dtype of {source.folder} or the "
            "one asked for. Use --dtype bfloat16 (in a recipe compute.dtype), or float32."
        )


def check_r_max(dense: Source, settings: HeadSettings, prompts: Reading) -> None:
    """Raise unless subspaces of rank `r_max` of these prompts' states can differ."""
    count = distinct(prompts)
    limit = most_rank(count, dense.architecture.hidden_size)
    if settings.r_max > limit:
        raise RegraftError(
            f"r_max is {settings.r_max}, but {count} different prompts and states of "
            f"{dense.architecture.hidden_size} features allow at most {limit}. Lower r_max or use "
            "more prompts."
        )


def check_heads(dense: Source, needs: Needs, scoring: HeadSettings | None) -> None:
    """Raise unless the model has as many heads as are to be chosen, and they will be scored.

    `scoring` is None where scores are given.
    """
    count = len(all_heads(dense.architecture))
    wanted = max(needs.some_heads, needs.heads.count if needs.heads else 0)
    if wanted and not count:
        raise _no_heads(dense)
    if wanted > count:
        raise RegraftError(f"top_heads is {wanted}; the model has {count} heads.")
    if scoring is None or needs.heads is None:
        return
    check_scoring(dense, scoring)
    if needs.heads.criterion == "released" and scoring.mode != "exact":
        raise RegraftError(
            f"The criterion `released` needs every head scored exactly, and `mode` is "
            f"{scoring.mode}. Leave it out, or rank heads by ships or kl."
        )
    if scoring.mode == "screened" and scoring.candidates < needs.heads.count:
        raise RegraftError(
            f"top_heads is {needs.heads.count}, but of the screened heads only the "
            f"{scoring.candidates} best will be scored exactly. Give --candidates "
            f"{needs.heads.count} or more."
        )


def check_scoring(dense: Source, scoring: HeadSettings) -> None:
    """Raise unless the model has heads that can be scored so.

    Screening follows an ablation through every layer's keys and values.
    """
    if not all_heads(dense.architecture):
        raise _no_heads(dense)
    if scoring.mode == "screened" and dense.architecture.headless:
        raise RegraftError(
            f"{dense.folder}: heads cannot be screened where some layers have none that can be "
            f"told apart ({dense.architecture.headless}). Score them exactly (--mode exact)."
        )


def _no_heads(dense: Source) -> RegraftError:
    return RegraftError(
        f"{dense.folder} has no attention heads that can be told apart "
        f"({dense.architecture.headless}). Restore with a method that needs none, such as gain."
    )


def check_budget(dense: Source, settings: MethodSettings) -> None:
    """Raise where a budget is less than one weight even if all had been pruned."""
    if settings.how_many(dense.architecture.prunable) == 0:
        raise _less_than_one(settings, f"{dense.architecture.prunable:,} prunable")


def check_restorable(settings: MethodSettings, looked: Survey) -> None:
    """Raise where none of the weights that compression took or changed would be restored."""
    if not looked.restorable:
        raise RegraftError(
            "No weight is zero now that was not before, and none differs that could be restored. "
            "Give the dense checkpoint first and the pruned one second."
        )
    if looked.kind == "changed" and (why := settings.only_pruned):
        raise RegraftError(
            f"{settings.method} needs a pruned model, and of this {looked.restorable:,} weights "
            f"are changed, not pruned: {why}."
        )
    if settings.how_many(looked.restorable) == 0:
        raise _less_than_one(settings, f"{looked.restorable:,} {looked.kind}")


def _less_than_one(settings: MethodSettings, weights: str) -> RegraftError:
    """Make the error for a budget by which none of so many weights is restored."""
    budget = getattr(settings, "budget", None)
    return RegraftError(
        f"A budget of {budget} per 10,000 of {weights} weights is less than one weight. "
        "Raise it, or give a count."
    )


def check_direction_layer(source: Source, settings: RefusalDirectionSettings) -> None:
    """Raise unless the model has the layer that a refusal direction is to be added at."""
    count = len(source.architecture.layers)
    if settings.layer is not None and settings.layer >= count:
        raise RegraftError(f"layer is {settings.layer}; the model has layers 0 to {count - 1}.")
