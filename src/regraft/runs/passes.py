"""The compute of choosing a method's weights, in passes over the run's calibration prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from regraft import distributed
from regraft.costs import CalibrationPass, Cost
from regraft.data.collate import prompt_batch
from regraft.disk.descriptions import about_of
from regraft.disk.files import digest, write_json
from regraft.models.architecture import Architecture
from regraft.models.load import load_processor
from regraft.recipes.parts import PruningSettings, VariantSettings
from regraft.recipes.recipe import Recipe
from regraft.restoration.base import needs_of
from regraft.runs.run_dir import RunDir
from regraft.settings.searching import SearchSettings
from regraft.stages import Setup
from regraft.stages.provenance import describe, fingerprints, is_done

SEARCH_REFERENCES = "evaluate for search"  # the dense and the pruned model, on validation prompts


def has_passes(recipe: Recipe, architecture: Architecture) -> bool:
    """Whether compute is shown in passes: if a method uses both harmful and harmless prompts.

    Not for a mixture of experts, where a token runs through a part of the weights only.
    """
    mixture = any(one.expert is not None for one in architecture.linears)
    needs = [needs_of(one) for one in recipe.realign]
    return not mixture and any(one.statistics or one.answers for one in needs)


def count_pass(setup: Setup, out: Path) -> None:
    """Count the tokens of all calibration prompts; write a `CalibrationPass` to the file `out`.

    The prompts are those that gain draws: harmful and harmless ones, with or without a response in
    the data. They are encoded without responses and one by one, so that no padding is counted.

    Raises:
        RegraftError: see `draw_prompts`; `out` was made from other prompts or another model.
    """
    dense, readings = setup.dense, setup.imitated()
    about = describe("calibration pass", fingerprints(setup.progress, dense=dense), data=readings)
    if not is_done(out, about, lambda: about_of(out)) and distributed.first():
        processor = load_processor(dense)
        examples = [one for reading in readings.values() for one in reading.examples]
        tokens, title = 0, "Counting the tokens of the calibration prompts"
        with setup.progress.task(title, len(examples)) as done:
            for example in examples:
                mask = prompt_batch(processor, [example]).inputs["attention_mask"]
                tokens += int(mask.sum())
                done(1)
        found = CalibrationPass(len(examples), tokens, 6 * dense.architecture.prunable * tokens)
        write_json(out, {"about": about, **asdict(found)})
    distributed.barrier()


@dataclass(frozen=True)
class _Need:
    """A stage that a method needs, made for one of these models ("" for the whole run).

    A stage without a recorded cost was not measured if it runs the network; otherwise it is free.
    """

    stage: str
    models: tuple[str, ...]
    runs_network: bool = True


@dataclass(frozen=True)
class MethodPasses:
    """The compute of choosing the weights of methods, in passes over the calibration prompts.

    `unit` is one such pass; None if it was not measured.
    """

    recipe: Recipe
    run_dir: RunDir
    costs: Sequence[Cost]
    unit: CalibrationPass | None

    def of_variant(self, pruning: PruningSettings, variant: VariantSettings) -> float | None:
        """The passes of a variant: head scores, statistics, ranking, search and training.

        A stage that variants share counts fully for each. None if not measured.
        """
        if needs_of(variant).positions and self.recipe.source_of_positions(variant) is None:
            return None  # the positions are of another run
        return self._sum(self._needs(pruning, variant))

    def of_defence(self, name: str, *, by_prompt: bool) -> float | None:
        """The passes of an inference-time defence, by its name among all models of the run."""
        return self._sum([] if by_prompt else [_Need("defend", (name,))])

    def _needs(self, pruning: PruningSettings, variant: VariantSettings) -> Iterator[_Need]:
        recipe, needs = self.recipe, needs_of(variant)
        if needs.heads:
            yield _Need("score heads", ("",))
        if needs.answers:
            yield _Need("answer", ("",))
        if needs.statistics:
            yield _Need(f"statistics for {needs.statistics}", ("",))
        if (source := recipe.source_of_positions(variant)) is not None:
            yield from self._needs(pruning, source.model_copy(update={"search": None}))
        variants, name = recipe.variants_of(pruning), recipe.ranking_name(variant)
        same_ranking = [one for one in variants if recipe.ranking_name(one) == name]
        yield _Need("rank", self._names(pruning, same_ranking), needs.answers)
        if (search := variant.search) is not None:
            # The recorded cost does not say on which of several sets of prompts it was spent.
            one_set = len({prompts_name(one.search) for one in variants if one.search}) == 1
            yield _Need(SEARCH_REFERENCES, (pruning.name,) if one_set else ())
            sharing = [
                one
                for one in same_ranking
                if one.search and prompts_name(one.search) == prompts_name(search)
            ]
            yield _Need("search", self._names(pruning, sharing))

    def _names(
        self, pruning: PruningSettings, variants: Iterable[VariantSettings]
    ) -> tuple[str, ...]:
        return tuple(self.run_dir.name(pruning.name, one.name) for one in variants)

    def _sum(self, needs: Iterable[_Need]) -> float | None:
        spent = [self._flops(need) for need in dict.fromkeys(needs)]  # a shared stage ran once
        known = [one for one in spent if one is not None]
        if self.unit is None or len(known) < len(spent):
            return None
        return sum(known) / self.unit.flops

    def _flops(self, need: _Need) -> float | None:
        found = [one for one in self.costs if one.stage == need.stage and one.of in need.models]
        total = sum(one.flops for one in found)
        return None if need.runs_network and not total else total


def prompts_name(search: SearchSettings) -> str:
    """A name for the validation prompts: searches on the same prompts share evaluated points."""
    return digest(search.model_dump_json(include={"validation", "validation_limit"}))[:8]
