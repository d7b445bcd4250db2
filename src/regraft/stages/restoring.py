"""The steps from two checkpoints to a patch: inputs of the method, ranking, search, patch.

Shared by the command line, recipe runs and tuning, which choose the paths of the artifacts and may
time or lock every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from regraft.disk.paths import require_file
from regraft.evaluation.tradeoff import read_curve
from regraft.models.load import Source, check_split
from regraft.patch.pair import check_pair
from regraft.pruning.statistics import StatisticsSettings
from regraft.restoration.base import MethodSettings, Needs, method_of, needs_of, own_settings
from regraft.restoration.ranking import load_ranking
from regraft.settings.searching import SearchSettings
from regraft.stages import ranking
from regraft.stages.answering import imitation_step
from regraft.stages.gathering import check_heads, heads_step, statistics_step
from regraft.stages.provenance import fingerprints
from regraft.stages.searching import Search, remarks
from regraft.stages.setup import ArtifactPaths, Setup
from regraft.stages.steps import Planned, PromptUse, Step, plan_steps


def gathering_steps(setup: Setup, needs: Iterable[Needs], paths: ArtifactPaths) -> Iterator[Step]:
    """Inputs of the methods that are not given: head scores, answers, statistics."""
    wanted = list(needs)
    by_heads = [one for one in wanted if one.heads]
    if by_heads and paths.given.heads is None:
        yield heads_step(setup, paths.heads, by_heads, paths.states)
    if any(one.answers for one in wanted):
        yield imitation_step(setup, paths.responses)
    if paths.given.statistics is None:
        for score in dict.fromkeys(one.statistics for one in wanted if one.statistics):
            settings = StatisticsSettings(score=score)
            yield statistics_step(setup, paths.statistics(score), settings, paths.responses)


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
        searching = Search(setup, choice)
        yield Step(
            "search",
            name,
            paths.curve,
            lambda: search(searching, pruned(), own, paths),
            searching.check,
            answers=lambda: (choice.points + 2) * len(searching.prompts().examples),
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
    searching: Search, pruned: Source, settings: MethodSettings, paths: ArtifactPaths
) -> None:
    """Choose how many weights to restore, and note what could not be achieved."""
    for line in remarks(searching.curve(pruned, settings, paths)):
        searching.setup.progress.note(f"{paths.curve.stem}: {line}")


def _rank(
    setup: Setup,
    pruned: Callable[[], Source],
    settings: MethodSettings,
    paths: ArtifactPaths,
    name: str,
) -> Step:
    method, needs = method_of(settings), needs_of(settings)

    def check() -> PromptUse:
        check_heads(setup.dense, needs, None)
        ranking.check_budget(setup.dense, settings)
        if needs.positions is not None and paths.given.positions is None:
            file = Path(needs.positions)
            found = load_ranking(file)
            fingerprints(setup.progress, dense=setup.dense)  # takes time, so with progress
            ranking.require_source(found, file, "dense", setup.dense)
            ranking.require_positions(settings, found, file)
        if needs.answers:
            setup.check_gradients(f"Realigning by {settings.method}")
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
        learns=lambda: setup.count_imitated() if needs.answers else 0,
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
    for what, file in ("head scores", given.heads), ("importance statistics", given.statistics):
        if file is not None:  # before all weights are read
            require_file(file, f"It should hold {what}.")
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
