"""The steps from two checkpoints to a patch: inputs of the method, ranking, search, patch.

Shared by the command line, recipe runs and tuning, which choose the paths of the artifacts and may
time or lock every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from regraft.data.example import KINDS
from regraft.evaluation.tradeoff import read_curve
from regraft.models.load import Source, check_split
from regraft.patch.pair import check_pair
from regraft.pruning.base import PRUNERS
from regraft.pruning.statistics import StatisticsSettings
from regraft.restoration.base import MethodSettings, Needs, method_of, needs_of, own_settings
from regraft.restoration.ranking import load_ranking
from regraft.settings.searching import SearchSettings
from regraft.stages import gathering, ranking
from regraft.stages.answering import imitation_data
from regraft.stages.searching import Search, remarks
from regraft.stages.setup import ArtifactPaths, Setup
from regraft.stages.steps import Planned, PromptUse, Step, plan_steps


def gathering_steps(setup: Setup, needs: Iterable[Needs], paths: ArtifactPaths) -> Iterator[Step]:
    """Inputs of the methods that are not given: head scores, answers, statistics."""
    wanted = list(needs)
    by_heads = [one for one in wanted if one.heads]
    if by_heads and paths.given.heads is None:
        yield _heads(setup, by_heads, paths)
    if any(one.answers for one in wanted):
        yield _answer(setup, paths.responses)
    if paths.given.statistics is None:
        for score in dict.fromkeys(one.statistics for one in wanted if one.statistics):
            yield _statistics(setup, score, paths)


def patch_steps(
    setup: Setup,
    pruned: Callable[[], Source],
    settings: MethodSettings,
    paths: ArtifactPaths,
    choice: SearchSettings | None = None,
    name: str = "",
) -> Iterator[Step]:
    """From a method's inputs to its patch: ranking, search if there is a `choice`, patch.

    Args:
        pruned: Returns the pruned model; called when a step is made, not before.
    """
    own = own_settings(settings)
    yield _rank(setup, pruned, own, paths, name)
    if choice is not None:
        yield Step(
            "search",
            name,
            paths.curve,
            lambda: search(setup, pruned(), own, paths, choice),
            Search(setup, choice).check,
            answers=choice.points * (choice.validation_limit or 0) * 2,
        )
    yield Step(
        "realign",
        name,
        paths.patch,
        lambda: ranking.write_patch(
            setup.dense,
            pruned(),
            paths.patch,
            own,
            paths.ranking,
            None if choice is None else read_curve(paths.curve).chosen or 0,
        ),
    )


def search(
    setup: Setup,
    pruned: Source,
    settings: MethodSettings,
    paths: ArtifactPaths,
    choice: SearchSettings,
) -> None:
    """Choose how many weights to restore, and note what could not be achieved."""
    found = Search(setup, choice).curve(pruned, settings, paths)
    for line in remarks(found):
        setup.progress.note(f"{paths.curve.stem}: {line}")


def _heads(setup: Setup, wanted: Sequence[Needs], paths: ArtifactPaths) -> Step:
    def check() -> PromptUse:
        for needs in wanted:
            gathering.check_heads(setup.dense, needs, setup.scoring)
        gathering.check_r_max(setup.dense, setup.scoring, setup.drawn("safety"))
        return PromptUse(learnt=setup.learnt_from(["safety"]))

    return Step(
        "score heads",
        "",
        paths.heads,
        partial(gathering.write_head_scores, setup, paths.heads, setup.scoring, paths.states),
        check,
        learns=setup.calibration.samples,
        passes=setup.scoring.passes(sum(one.heads for one in setup.dense.architecture.layers)),
        loads_model=True,
    )


def _answer(setup: Setup, folder: Path) -> Step:
    def check() -> PromptUse:
        prompts = setup.imitated().items()
        return PromptUse({f"{KINDS[k]} calibration (imitated)": one for k, one in prompts})

    answers = 2 * setup.calibration.samples
    make = partial(imitation_data, setup, folder)
    return Step("answer", "", folder, make, check, answers=answers, loads_model=True)


def _statistics(setup: Setup, score: str, paths: ArtifactPaths) -> Step:
    pruner, out = PRUNERS.get(score), paths.statistics(score)

    def check() -> PromptUse:
        return PromptUse(learnt=setup.learnt_from())

    def states() -> int:  # the kinds are read one after the other
        if not pruner.by_gradients:
            return 0
        return max(setup.state_bytes([setup.drawn(kind)]) for kind in KINDS)

    return Step(
        f"statistics for {score}",
        "",
        out,
        lambda: gathering.write_statistics(
            setup, out, StatisticsSettings(score=score), paths.responses
        ),
        check,
        learns=2 * setup.calibration.samples,
        passes=gathering.forward_passes(pruner),
        loads_model=True,
        temporary_bytes=states,
    )


def _rank(
    setup: Setup,
    pruned: Callable[[], Source],
    settings: MethodSettings,
    paths: ArtifactPaths,
    name: str,
) -> Step:
    method, needs = method_of(settings), needs_of(settings)
    gathered = None if paths.given.statistics else needs.statistics

    def check() -> PromptUse:
        gathering.check_heads(setup.dense, needs, None)
        ranking.check_budget(setup.dense, settings)
        if needs.positions is not None and paths.given.positions is None:
            load_ranking(Path(needs.positions))
        if needs.answers or (gathered and PRUNERS.get(gathered).by_gradients):
            setup.check_gradients(f"Realigning by {settings.method}")
        if needs.answers:
            check_split(setup.compute.device, setup.compute.placement)
        prompts = setup.imitated() if needs.answers else {}
        method.check(settings, setup.dense, setup.calibration.seed, setup.compute, prompts)
        return PromptUse()

    def states() -> int:  # both kinds are read together
        return setup.state_bytes(setup.imitated().values()) if needs.answers else 0

    return Step(
        "rank",
        name,
        paths.ranking,
        lambda: ranking.write_ranking(
            setup, pruned(), paths.ranking, settings, paths.inputs(needs)
        ),
        check,
        learns=2 * setup.calibration.samples if needs.answers else 0,
        passes=needs.passes,
        loads_model=True,
        temporary_bytes=states,
    )


def plan_restoration(
    setup: Setup,
    pruned: Source,
    settings: MethodSettings,
    paths: ArtifactPaths,
    choice: SearchSettings | None = None,
) -> Planned:
    """The steps of a method's inputs, its ranking and the patch; writes nothing.

    Validation prompts of a search that are not named are held out of the calibration data.

    Raises:
        RegraftError: bad input of any step, found before any long work.
    """
    dense, progress, needs, given = setup.dense, setup.progress, needs_of(settings), paths.given
    if choice is not None:
        choice, setup = setup.choosing(choice)
    steps = [
        *gathering_steps(setup, [needs], paths),
        *patch_steps(setup, lambda: pruned, settings, paths, choice),
    ]
    check_pair(dense, pruned)
    ranking.check_restorable(settings, setup.cache.surveyed(dense, pruned, progress))
    supplied = replace(
        needs,
        heads=needs.heads if given.heads else None,
        statistics=needs.statistics if given.statistics else None,
    )
    ranking.read_inputs(dense, pruned, settings, supplied, given)
    plan = plan_steps(setup, steps)
    for line in plan.prompts.warnings():
        progress.note(f"Warning: {line}.")
    if paths.patch.exists():
        ranking.check_made_by(setup, pruned, paths.patch, settings, searched=choice is not None)
    return plan
