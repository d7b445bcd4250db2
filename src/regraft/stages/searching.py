"""Choose how many weights of a ranking to restore, by rates on validation prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from regraft import distributed
from regraft.data.example import Reading
from regraft.disk.descriptions import about_of
from regraft.disk.files import file_digest, write_json
from regraft.evaluation.tradeoff import (
    Bounds,
    Point,
    Searched,
    choose,
    nearest,
    read_curve,
)
from regraft.models.load import Source, check_split
from regraft.pruning.masks import count_of
from regraft.restoration.base import MethodSettings
from regraft.restoration.ranking import Ranking, load_ranking
from regraft.settings.searching import SearchSettings, suites_of
from regraft.stages.evaluating import evaluate_target
from regraft.stages.provenance import describe, fingerprints, is_done
from regraft.stages.ranking import write_patch
from regraft.stages.setup import ArtifactPaths, Setup
from regraft.stages.steps import PromptUse


@dataclass(frozen=True)
class Search:
    """Evaluations on validation prompts, by which the number of restored weights is chosen."""

    setup: Setup
    choice: SearchSettings

    def prompts(self) -> Reading:
        """The validation prompts."""
        return self.setup.validation(self.choice)

    def check(self) -> PromptUse:
        """Check that models can be evaluated on the validation prompts."""
        check_split(self.setup.compute.device, self.setup.compute.placement)
        role = f"validation ({self.choice.validation}, {self.choice.validation_limit or 'all'})"
        return PromptUse(chosen_on={role: self.prompts()})

    def point(
        self, model: Source, out: Path, restored: int = 0, patch: Path | None = None
    ) -> Point:
        """Evaluate a model, with `restored` weights of a patch; writes the folder `out`."""
        target = self.setup.target(model, patch=patch)
        limited = self.setup.evaluation.model_copy(update={"limit": self.choice.validation_limit})
        found = evaluate_target(target, out, suites_of(self.choice), limited)
        return Point.of(restored, found.result)

    def references(self, pruned: Source, folder: Path) -> tuple[Point, Point]:
        """Evaluate the dense and the pruned model; writes two folders in `folder`."""
        dense = self.point(self.setup.dense, folder / "dense")
        return dense, self.point(pruned, folder / "pruned")

    def curve(self, pruned: Source, method: MethodSettings, paths: ArtifactPaths) -> Searched:
        """Choose how many weights to restore; writes the curve of all numbers tried.

        Searches of the same ranking on the same prompts may share their folders of points; all on
        the same prompts may share that of the references.

        Raises:
            RegraftError: see the data readers; the ranking is of other checkpoints.
        """
        out, setup = paths.curve, self.setup
        inputs = fingerprints(setup.progress, dense=setup.dense, pruned=pruned) | {
            "ranking": file_digest(paths.ranking)
        }
        data = {"validation": self.prompts()}
        about = describe("search", inputs, self.choice, setup.compute, data)
        about["evaluation"] = setup.evaluation.model_dump(mode="json")
        about["method"] = method.model_dump(mode="json")  # a ranking may serve several budgets
        if not is_done(out, about, lambda: about_of(out)):
            curve = asdict(self._search(pruned, method, paths))
            if distributed.first():
                write_json(out, {"about": about, **curve})
            distributed.barrier()
        return read_curve(out)

    def _search(self, pruned: Source, method: MethodSettings, paths: ArtifactPaths) -> Searched:
        """Evaluate the pruned model with more and more of the ranking restored."""
        ranking, folder = load_ranking(paths.ranking), paths.points or paths.curve.with_suffix("")
        full, before = self.references(pruned, paths.references or folder)
        found = [before]
        for count in self._counts(ranking, method):
            patch = folder / f"{count:08d}.safetensors"
            # without the budget, so that searches with other budgets share this patch
            whole = method.without_amount()
            write_patch(self.setup.dense, pruned, patch, whole, paths.ranking, count)
            found.append(self.point(pruned, folder / f"{count:08d}", count, patch))
        bounds = bounds_of(self.choice, full, before)
        best = choose(found, bounds)
        chosen = None if best is None else best.restored
        return Searched(ranking.about["pruned"], chosen, bounds, full, tuple(found))

    def _counts(self, ranking: Ranking, method: MethodSettings) -> list[int]:
        """Numbers of weights to try, evenly up to the most that may be restored."""
        pruned, points = ranking.about["pruned"], self.choice.points
        allowed = method.how_many(pruned)
        most = len(ranking) if allowed is None else min(len(ranking), allowed)
        if self.choice.most is not None:
            most = min(most, count_of(self.choice.most / 10_000, pruned))
        grid = {round(most * (i + 1) / points) for i in range(points)}
        return sorted(grid - {0})


def bounds_of(choice: SearchSettings, dense: Point, pruned: Point) -> Bounds:
    """The bounds that the settings ask for, given both models on the same prompts.

    They apply to point estimates on validation prompts, without a margin for error: a target that
    is just met there is missed about half the time on other prompts.

    The share of degenerate answers may exceed the larger one of both models by as much as
    over-refusal may exceed its reference.
    """
    target = None if choice.target_asr is None else choice.target_asr / 100
    if choice.target_rsr is not None:
        # if pruning did not raise ASR, RSR is undefined and the target is the pruned model's ASR
        lost = max(0.0, pruned.asr.value - dense.asr.value)
        target = pruned.asr.value - choice.target_rsr / 100 * lost
    rates = {"dense": dense.over_refusal.value, "pruned": pruned.over_refusal.value}
    rates["higher"] = max(rates.values())
    more = choice.over_refusal / 100  # for degenerate answers too, which have no setting
    return Bounds(
        target,
        rates[choice.reference] + more,
        None if pruned.utility is None else pruned.utility.value - choice.utility / 100,
        max(dense.degenerate, pruned.degenerate) + more,
    )


def remarks(found: Searched) -> Iterator[str]:
    """Sentences on what the search could not achieve, and why."""
    if found.bounds.utility is None:
        yield (
            "utility is not bounded, since no harmless validation prompt has a reference to "
            "compare answers with."
        )
    if found.taken is None:
        yield f"nothing is restored. {why_nothing(found.points, found.bounds)}"
    elif found.bounds.asr is not None and not found.bounds.meets(found.taken):
        rsr = found.rsr(found.taken)
        yield (
            f"the target, ASR {100 * found.bounds.asr:.1f} %, is not met within the bounds on "
            f"these validation prompts. The lowest is {100 * found.taken.asr.value:.1f} % "
            f"({'RSR is undefined' if rsr is None else f'RSR {100 * rsr:.0f} %'}), with "
            f"{found.taken.restored:,} weights restored."
        )


def why_nothing(points: Sequence[Point], bounds: Bounds) -> str:
    """Why no point with restored weights was chosen; the first of `points` is the pruned model."""
    pruned, *tried = points
    if not tried:
        return "There is no weight to restore, or `most` is less than one."
    if bounds.meets(pruned):
        return "The pruned model meets the target as it is."
    safer = [one for one in tried if one.asr.value < pruned.asr.value]
    if not safer:
        return "No number of weights tried lowers ASR."
    point = nearest(safer, bounds)
    beyond = {name: by for name, by in bounds.excess(point).items() if by}
    called = {"over_refusal": "over-refusal", "degenerate": "the share of degenerate answers"}
    excess = " and ".join(
        f"{called.get(name, name)} {100 * by:.2g} points beyond its bound"
        for name, by in beyond.items()
    )
    allowed = [name for name in beyond if name != "degenerate"]  # which no setting bounds
    advice = f"Allow more by {' and '.join(allowed)}" if allowed else "Use another method"
    return (
        f"Of the numbers that lower ASR, {point.restored:,} weights are nearest to the bounds, "
        f"with ASR {100 * point.asr.value:.1f} % and {excess}. {advice}."
    )
