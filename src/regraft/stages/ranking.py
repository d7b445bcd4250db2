"""A method's ranking of the restorable weights, and the patch of its first weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from regraft import distributed
from regraft.data.example import Reading
from regraft.disk.files import file_digest
from regraft.errors import RegraftError
from regraft.heads.score import load_heads
from regraft.models.load import Source
from regraft.patch.format import Patch, load_patch, save_patch
from regraft.patch.groups import violated_groups
from regraft.patch.pair import Survey, check_pair
from regraft.progress import SILENT, Progress
from regraft.pruning.statistics import load_statistics
from regraft.restoration.base import Context, MethodSettings, Needs, method_of, needs_of
from regraft.restoration.ranking import KEPT, Ranking, load_ranking, patch_of, save_ranking
from regraft.stages.answering import imitation_data, responses_folder
from regraft.stages.provenance import (
    describe,
    difference,
    fingerprints,
    is_done,
    require_same,
    working,
)
from regraft.stages.reading import note_prompts
from regraft.stages.setup import Inputs, Setup

# fields of a ranking's `about` that its patches repeat; the last three describe gain's path
_COPIED = ("heads", "pruned", "kind", "n_m", "groups", "values", "passes", "start", "steps", "end")


def write_ranking(
    setup: Setup,
    pruned: Source,
    out: Path,
    settings: MethodSettings,
    inputs: Inputs | None = None,
) -> Ranking:
    """Rank the restorable weights; writes the file `out`.

    Args:
        settings: The method and, by its budget, how many weights to rank.

    Raises:
        RegraftError: an input is missing or does not fit, or the budget is less than one weight.
    """
    dense, inputs, seed = setup.dense, inputs or Inputs(), setup.calibration.seed
    method, wanted, needs = method_of(settings), settings.without_amount(), needs_of(settings)
    check_pair(dense, pruned)
    digests, loaded = read_inputs(dense, pruned, settings, needs, inputs)
    survey = setup.cache.surveyed(dense, pruned, setup.progress)
    check_restorable(settings, survey)
    answered: dict[str, Reading] | None = None
    if needs.answers:
        answered = imitation_data(setup, inputs.responses or responses_folder(out))
        # again, since prompts with blank answers were dropped
        method.check(settings, dense, seed, setup.compute, answered)
    pair = fingerprints(setup.progress, dense=dense, pruned=pruned)
    compute = setup.compute if answered else None
    about = describe("rank", {**pair, **digests}, wanted, compute, answered)
    about |= {"algorithm": method.algorithm, "seed": seed, **_compression(survey)}

    def made_from() -> dict[str, Any]:  # without what the method recorded
        found = load_ranking(out).about
        return {name: found[name] for name in about if name in found}

    if not is_done(out, about, made_from):
        _announce(setup.progress, survey, answered)
        count = wanted.how_many(survey.restorable)
        with working(out, about) as work:
            common = seed, setup.compute, setup.progress, work
            context = Context(dense, pruned, survey, count, *common, answered=answered, **loaded)
            found = method.rank(wanted, context)
            _remark(setup.progress, out, found, count)
            if distributed.first():
                save_ranking(out, replace(found, about={"heads": [], **found.about, **about}))
    return load_ranking(out)


def read_inputs(
    dense: Source, pruned: Source, settings: MethodSettings, needs: Needs, inputs: Inputs
) -> tuple[dict[str, str], dict[str, Any]]:
    """Read the files that a method needs and check that they are of these checkpoints.

    Returns:
        Digests of the files, and fields of `Context`.

    Raises:
        RegraftError: one is missing, was made from something else, or lacks what is needed.
    """
    digests, loaded = dict[str, str](), dict[str, Any]()
    if needs.heads is not None:
        if inputs.heads is None:
            raise RegraftError(
                "Ranking heads needs their scores: run `regraft analyse heads` first."
            )
        loaded["heads"] = load_heads(inputs.heads, dense.architecture)
        _require_made_from(dense, inputs.heads, loaded["heads"].about)
        loaded["heads"].best(needs.heads.criterion, needs.heads.count)
        digests["heads"] = file_digest(inputs.heads)
    if (score := needs.statistics) is not None:
        again = f"run `regraft analyse statistics --score {score}`"
        if inputs.statistics is None:
            raise RegraftError(f"Importance by {score} needs statistics: {again} first.")
        found = load_statistics(inputs.statistics)
        _require_made_from(dense, inputs.statistics, found.about)
        if found.safety.method != score:
            raise RegraftError(
                f"{inputs.statistics} holds statistics of {found.safety.method}, and importance by "
                f"{score} is needed: {again}."
            )
        loaded["statistics"] = found
        digests["statistics"] = file_digest(inputs.statistics)
    if needs.positions is not None:
        file = inputs.positions or Path(needs.positions)
        loaded["positions"] = load_ranking(file)
        require_made_of(loaded["positions"], file, dense, pruned)
        require_positions(settings, loaded["positions"], file)
        digests["ranking"] = file_digest(file)
    return digests, loaded


def require_made_of(ranking: Ranking, path: Path, dense: Source, pruned: Source) -> None:
    """Raise unless the ranking in the file `path` is of these two checkpoints."""
    require_source(ranking, path, "dense", dense)
    require_source(ranking, path, "pruned", pruned)
    sizes = torch.tensor([math.prod(linear.shape) for linear in dense.architecture.linears])
    inside = ranking.linear < len(sizes)
    most = sizes[ranking.linear.clamp(max=len(sizes) - 1)]
    inside &= (ranking.position < most) & (ranking.removed < most)
    if not inside.all():
        raise RegraftError(
            f"{path} is damaged: {int((~inside).sum()):,} of its weights are not in the model."
        )


def require_source(ranking: Ranking, path: Path, role: str, source: Source) -> None:
    """Raise unless the ranking was made from this checkpoint, "dense" or "pruned"."""
    if ranking.about["inputs"][role] != source.checkpoint.fingerprint:
        raise RegraftError(f"{path} was made from another {role} checkpoint than {source.folder}.")


def require_positions(settings: MethodSettings, ranking: Ranking, path: Path) -> None:
    """Raise unless a ranking has the positions that a method takes from it."""
    if (ranking.removed != KEPT).any():
        raise RegraftError(
            f"{path} has swaps, which prune a kept weight for each; give a ranking made without "
            "--swap."
        )
    count = settings.how_many(ranking.about["pruned"])
    if count is not None and count > len(ranking):
        raise RegraftError(
            f"{path} has {len(ranking):,} weights, and {count:,} are to be trained. Lower --budget "
            "or --count, or leave it out to train them all."
        )


def _compression(survey: Survey) -> dict[str, Any]:
    """What compression did, as fields of a ranking's description.

    Changed pairs have a `kind`, N:M patterns `n_m` and `groups`.
    """
    fields: dict[str, Any] = {"pruned": survey.restorable}
    if survey.kind == "changed":
        fields["kind"] = survey.kind
    if survey.grouping is not None:
        fields |= {"n_m": survey.grouping.n_m, "groups": survey.grouping.groups}
    return fields


def _require_made_from(dense: Source, path: Path, about: Mapping[str, Any]) -> None:
    if about["inputs"]["dense"] != dense.checkpoint.fingerprint:
        raise RegraftError(
            f"{path} was made from another checkpoint than {dense.folder}. Make it again with "
            f"`regraft analyse {about['stage']}` from this one."
        )


def _announce(progress: Progress, survey: Survey, answered: Mapping[str, Reading] | None) -> None:
    progress.note(f"The model is {survey.described}.")
    if survey.doubt:
        progress.note(survey.doubt)
    note_prompts(progress.note, answered or {})


def _remark(progress: Progress, out: Path, found: Ranking, count: int | None) -> None:
    if not len(found):
        progress.note(f"{out.name}: no weight qualifies; nothing will be restored.")
    elif count is not None and len(found) < count:
        progress.note(
            f"{out.name}: only {len(found):,} weights qualify, fewer than the {count:,} of the "
            "budget."
        )


def check_budget(dense: Source, settings: MethodSettings) -> None:
    """Raise if a budget would be less than one weight even if all weights were pruned."""
    if settings.how_many(dense.architecture.prunable) == 0:
        raise _less_than_one(settings, f"{dense.architecture.prunable:,} prunable")


def check_restorable(settings: MethodSettings, survey: Survey) -> None:
    """Raise if no weight can be restored, or none by this method and budget."""
    if not survey.restorable:
        raise RegraftError(
            "No weight can be restored: no prunable weight is zero in the second checkpoint alone, "
            "or differs otherwise. Give the dense checkpoint first and the pruned one second."
        )
    if survey.kind == "changed" and (why := settings.only_pruned):
        raise RegraftError(
            f"{settings.method} needs a pruned model, but {survey.restorable:,} weights of this "
            f"one are changed, not pruned: {why}."
        )
    if settings.how_many(survey.restorable) == 0:
        raise _less_than_one(settings, f"{survey.restorable:,} {survey.kind}")


def _less_than_one(settings: MethodSettings, weights: str) -> RegraftError:
    """The error for a budget by which none of so many weights is restored."""
    budget = getattr(settings, "budget", None)
    return RegraftError(
        f"A budget of {budget} per 10,000 of {weights} weights is less than one weight. "
        "Raise it, or give a count."
    )


def write_patch(
    dense: Source,
    pruned: Source,
    out: Path,
    settings: MethodSettings,
    ranking_file: Path,
    count: int | None = None,
) -> Patch:
    """Restore the first weights of a ranking; writes the patch `out`.

    Args:
        settings: The method that made the ranking; its budget gives the number of weights.
        count: Number of weights, in place of the budget's.

    Raises:
        RegraftError: the ranking is of other checkpoints or settings.
    """
    ranking = load_ranking(ranking_file)
    require_made_of(ranking, ranking_file, dense, pruned)
    wanted = settings.without_amount().model_dump(mode="json")
    if ranking.about["settings"] != wanted:
        raise RegraftError(
            f"{ranking_file} was made with other settings "
            f"({difference(ranking.about['settings'], wanted)}). Rank again, or use its settings."
        )
    inputs = fingerprints(SILENT, dense=dense, pruned=pruned)  # known by now
    inputs["ranking"] = file_digest(ranking_file)
    about = describe("realign", inputs, settings) | {"count": count}
    about |= {name: ranking.about[name] for name in _COPIED if name in ranking.about}
    if not is_done(out, about, lambda: load_patch(out).about):
        with working(out, about):
            if distributed.first():
                most = settings.how_many(ranking.about["pruned"]) if count is None else count
                first = ranking if most is None else ranking.first(most)
                patch = patch_of(first, dense, pruned, about)
                save_patch(out, _with_violations(patch, pruned))
    return load_patch(out)


def check_made_by(
    setup: Setup, pruned: Source, out: Path, settings: MethodSettings, *, searched: bool
) -> None:
    """Check, before long work, that the existing patch `out` was made in the same way.

    Raises:
        RegraftError: it is no patch, or was made from other checkpoints or with other settings.
    """
    found = load_patch(out).about
    if searched != (found.get("count") is not None):
        raise RegraftError(
            f"{out} exists and was made {'without' if searched else 'by'} a search. Choose another "
            "output or remove it."
        )
    inputs = found["inputs"] | fingerprints(setup.progress, dense=setup.dense, pruned=pruned)
    wanted = {**found, "inputs": inputs, "settings": settings.model_dump(mode="json")}
    require_same(out, found, wanted)


def _with_violations(patch: Patch, pruned: Source) -> Patch:
    """Note in a patch how many N:M groups it breaks, if the pruned model has a pattern."""
    if "n_m" not in patch.about:
        return patch
    n, m = map(int, patch.about["n_m"].split(":"))
    count = violated_groups(pruned, patch, n, m)
    return replace(patch, about={**patch.about, "violated_groups": count})
