"""The compute that a method took, in passes over the calibration prompts of its run."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from regraft import distributed
from regraft.costs import CalibrationPass, Cost, if_all_known
from regraft.data.collate import prompt_batch
from regraft.files import read_json, write_json
from regraft.models.load import Source, load_processor
from regraft.progress import Progress
from regraft.provenance import describe, is_done
from regraft.recipe import Recipe
from regraft.recipe_parts import PruningSettings, VariantSettings
from regraft.restoration.base import needs_of
from regraft.run_dir import RunDir
from regraft.settings.data import CalibrationSettings
from regraft.settings.searching import SearchSettings
from regraft.stages import EvaluationCache

SEARCH_REFERENCES = "evaluate for search"  # the dense and the pruned model, on validation prompts


def learns_from_both(recipe: Recipe) -> bool:
    """Whether a method reads harmful and harmless calibration prompts, so that there are both."""
    return any(
        needs.statistics or needs.answers for needs in (needs_of(one) for one in recipe.realign)
    )


def count_pass(
    dense: Source,
    calibration: CalibrationSettings,
    out: Path,
    cache: EvaluationCache,
    progress: Progress,
) -> None:
    """Count the tokens of all calibration prompts; writes a `CalibrationPass` to the file `out`.

    The prompts are those that gain draws, whether they have a response or not, both kinds, without
    responses, each encoded alone, so that no padding is counted.

    Raises:
        RegraftError: see `draw_prompts`; `out` is of other prompts or another model.
    """
    readings = {
        kind: cache.prompts(dense, calibration, harmful=kind == "safety")
        for kind in ("safety", "utility")
    }
    about = describe("calibration pass", {"dense": dense.checkpoint.fingerprint}, data=readings)
    if not is_done(out, out, about, lambda: read_json(out)["about"]) and distributed.first():
        processor = load_processor(dense)
        examples = [one for reading in readings.values() for one in reading.examples]
        tokens = 0
        with progress.task("Counting the tokens of the calibration prompts", len(examples)) as done:
            for example in examples:
                mask = prompt_batch(processor, [example]).inputs["attention_mask"]
                tokens += int(mask.sum())
                done(1)
        found = CalibrationPass(len(examples), tokens, 6 * dense.architecture.prunable * tokens)
        write_json(out, {"about": about, **asdict(found)})
    distributed.barrier()


@dataclass(frozen=True)
class _Need:
    """A stage that a method needs, done for any of these models ("" for the run).

    Where it runs the network, a stage that is missing was not measured; else it took nothing.
    """

    stage: str
    models: tuple[str, ...]
    runs_network: bool = True


def passes_of_variant(
    recipe: Recipe,
    run_dir: RunDir,
    pruning: PruningSettings,
    variant: VariantSettings,
    costs: Sequence[Cost],
    unit: CalibrationPass | None,
) -> float | None:
    """What choosing the weights of a method took, as multiples of `unit`; None if not measured.

    Head scores, statistics, ranking, search and training; what methods share counts fully for each.
    """
    if needs_of(variant).positions and recipe.positions_of(variant) is None:
        return None  # positions that were found elsewhere
    return _passes(_needs(recipe, run_dir, pruning, variant), costs, unit)


def passes_of_defence(
    name: str, costs: Sequence[Cost], unit: CalibrationPass | None, *, by_prompt: bool
) -> float | None:
    """The same of a defence at inference, by its name among all models of the run."""
    return _passes([] if by_prompt else [_Need("defend", (name,))], costs, unit)


def _needs(
    recipe: Recipe, run_dir: RunDir, pruning: PruningSettings, variant: VariantSettings
) -> Iterator[_Need]:
    needs = needs_of(variant)
    if needs.heads:
        yield _Need("score heads", ("",))
    if needs.answers:
        yield _Need("answer", ("",))
    if needs.statistics:
        yield _Need(f"statistics for {needs.statistics}", ("",))
    if (source := recipe.positions_of(variant)) is not None:
        yield from _needs(recipe, run_dir, pruning, source.model_copy(update={"search": None}))
    along = [
        one
        for one in recipe.variants_of(pruning)
        if recipe.ranking_name(one) == recipe.ranking_name(variant)
    ]
    yield _Need("rank", _names(run_dir, pruning, along), needs.answers)
    if (search := variant.search) is not None:
        searches = [one.search for one in recipe.variants_of(pruning) if one.search]
        one_set = len({_prompts(one) for one in searches}) == 1  # or it was of which?
        yield _Need(SEARCH_REFERENCES, (pruning.name,) if one_set else ())
        alike = [one for one in along if one.search and _prompts(one.search) == _prompts(search)]
        yield _Need("search", _names(run_dir, pruning, alike))


def _prompts(search: SearchSettings) -> Hashable:
    """Searches along one ranking on the same prompts share their points."""
    return search.validation, search.validation_limit


def _names(
    run_dir: RunDir, pruning: PruningSettings, variants: Sequence[VariantSettings]
) -> tuple[str, ...]:
    return tuple(run_dir.name(pruning.name, one.name) for one in variants)


def _passes(
    needs: Iterable[_Need], costs: Sequence[Cost], unit: CalibrationPass | None
) -> float | None:
    spent = {(one.stage, one.of): one.flops for one in costs}
    # a stage that several others need was done once
    total = if_all_known(sum, [_flops(need, spent) for need in dict.fromkeys(needs)])
    return None if unit is None or total is None else total / unit.flops


def _flops(need: _Need, spent: Mapping[tuple[str, str], float | None]) -> float | None:
    found = [spent[need.stage, model] for model in need.models if (need.stage, model) in spent]
    total = if_all_known(sum, found)
    return None if need.runs_network and not total else total
