"""What would stop a run hours later, found before it writes anything."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from regraft import stages
from regraft.checks import (
    check_direction_layer,
    check_gradients,
    check_pattern,
    loaded_dtype,
    read_validation,
    seen_before,
)
from regraft.data.collate import prompt_batch
from regraft.data.example import Reading
from regraft.evaluation.perplexity import read_documents
from regraft.files import require_space
from regraft.loading import check_shares
from regraft.models.load import Source, check_split, load_processor, open_source
from regraft.patch.pair import check_pair
from regraft.provenance import unfinished_bytes
from regraft.pruning.base import PRUNERS, GradientPruner, PruneSettings, prune_settings
from regraft.recipe import Recipe
from regraft.reporting import model_folder
from regraft.restoration.base import needs_of
from regraft.restoration.ranking import load_ranking
from regraft.run_dir import RunDir
from regraft.settings.scoring import HeadSettings
from regraft.stages.evaluating import check_for_vllm
from regraft.stages.needing import check_method, learnt_by

_LOOKED_AT = 4  # prompts whose length tells that of all


def check(
    recipe: Recipe, folder: Path, cache: stages.EvaluationCache
) -> tuple[Source, Source | None]:
    """Find now, before anything is written, what would stop the run hours later.

    Returns:
        The dense model, and the pruned one where the recipe names it.

    Raises:
        RegraftError: bad input.
    """
    run_dir = RunDir(folder, several=len(recipe.prune) > 1)
    trust = recipe.compute.trust_remote_code
    dense = open_source(model_folder(recipe.model), trust_remote_code=trust)
    existing = None
    if recipe.pruned is not None:
        existing = open_source(recipe.pruned, trust_remote_code=trust)
        check_pair(dense, existing)
    if recipe.evaluate.backend == "vllm":
        for model in filter(None, (dense, existing)):
            check_for_vllm(model, recipe.compute)
    _check(recipe, dense, run_dir, cache)
    return dense, existing


def seen_before_in(recipe: Recipe, dense: Source, cache: stages.EvaluationCache) -> list[str]:
    """What of the test prompts anything is learnt or chosen from, and of those chosen on learnt."""
    learnt: dict[str, Reading] = {}
    for harmful in _kinds_drawn(recipe):
        learnt |= cache.learnt_from(dense, recipe.calibration, harmful=harmful)
    for variant in recipe.realign:
        learnt |= learnt_by(dense, needs_of(variant), recipe.calibration, cache)
    chosen_on: dict[str, Reading] = {}
    for variant in recipe.realign:
        if (search := variant.search) is not None:
            role = f"validation ({search.validation}, {search.validation_limit or 'all'})"
            suites = stages.suites_of(search)
            chosen_on[role] = cache.reading(dense, suites, search.validation_limit)
    for defence in recipe.defend:
        if defence.searches:
            chosen_on[f"{defence.name}'s validation"] = read_validation(dense, defence)
    evaluated = cache.reading(dense, recipe.evaluate.suite, recipe.evaluate.limit)
    return [
        *seen_before(evaluated, learnt | chosen_on),
        *(
            f"{role}: {line}"
            for role, reading in chosen_on.items()
            for line in seen_before(reading, learnt, "chosen on")
        ),
    ]


def _check(recipe: Recipe, dense: Source, run_dir: RunDir, cache: stages.EvaluationCache) -> None:
    check_split(recipe.compute.device, recipe.compute.placement)
    for pruning in () if recipe.pruned else recipe.prune:
        if _takes_gradients(pruning):
            label = PRUNERS.get(pruning.method).label
            check_gradients(dense, recipe.compute, f"{pruning.name} ({label})")
    for variant in recipe.realign:
        check_method(dense, variant, recipe.calibration, recipe.compute, cache, recipe.heads)
        if (file := needs_of(variant).positions) and recipe.positions_of(variant) is None:
            load_ranking(Path(file))
        if variant.search is not None:
            evaluation = recipe.evaluate.only().in_memory()
            stages.Search(dense, variant.search, evaluation, recipe.compute, cache=cache).check()
    for harmful in _kinds_drawn(recipe):
        drawn = cache.drawn(dense, recipe.calibration, harmful=harmful)
        check_shares(drawn.examples, recipe.compute)
    cache.reading(dense, recipe.evaluate.suite, recipe.evaluate.limit)
    if recipe.evaluate.text is not None:
        read_documents(recipe.evaluate.text)
    for defence in recipe.defend:
        check_direction_layer(dense, defence)
        if defence.searches:
            read_validation(dense, defence)
    if recipe.pruned is None:
        for pruning in recipe.prune:
            check_pattern(dense, pruning)
    kept, most = bytes_needed(recipe, dense, run_dir.path)
    require_space(run_dir.path, max(most, kept + _state_bytes(recipe, dense, run_dir, cache)))


def unread_in(recipe: Recipe) -> list[str]:
    """What of the recipe changes nothing."""
    named = [] if recipe.pruned else [(one.name, one.unread()) for one in recipe.prune]
    named += [(one.name, one.unread()) for one in recipe.defend]
    named += [(one, getattr(recipe, one).unread()) for one in ("calibration", "heads", "evaluate")]
    if recipe.pruned and recipe.prune[0].only() != prune_settings():
        named.append(("prune", f"it changes nothing, since `pruned` is {recipe.pruned}"))
    if recipe.heads != HeadSettings() and not any(needs_of(one).heads for one in recipe.realign):
        named.append(("heads", "they change nothing, since nothing goes by scored heads"))
    return [f"{name}: {found}" for name, found in named if found is not None]


def _state_bytes(
    recipe: Recipe, dense: Source, run_dir: RunDir, cache: stages.EvaluationCache
) -> int:
    """About what a backward pass keeps of all layers' inputs, going by a few prompts of each kind.

    The states of a 7B model and 128 prompts of each kind are as large as its checkpoint or larger.
    What is done needs none, and what a killed pass has left counts.
    """
    passes = [one for one in _backward_passes(recipe, run_dir) if not one[0].exists()]
    if not passes:
        return 0
    processor = load_processor(dense)
    itemsize = getattr(torch, loaded_dtype(dense, recipe.compute)).itemsize
    of_token = len(dense.architecture.layers) * dense.architecture.hidden_size * itemsize

    @functools.cache
    def tokens(imitates: bool, harmful: bool) -> float:
        """Of all prompts of one kind, as long as the first are on average."""
        draw = cache.prompts if imitates else cache.drawn
        examples = draw(dense, recipe.calibration, harmful=harmful).examples
        some = [
            prompt_batch(processor, [one]).inputs["input_ids"].numel()
            for one in examples[:_LOOKED_AT]
        ]
        return len(examples) * sum(some) / max(1, len(some))

    needed = 0
    for out, imitates, together in passes:
        kinds = [[tokens(imitates, one) for one in some] for some in together]
        size = int(max(map(sum, kinds)) * of_token) - unfinished_bytes(out)
        needed = max(needed, size)
    return needed


def _backward_passes(
    recipe: Recipe, run_dir: RunDir
) -> Iterator[tuple[Path, bool, Sequence[Sequence[bool]]]]:
    """Outputs that need one, whether they imitate, and of which kinds (those kept together)."""
    for pruning in () if recipe.pruned else recipe.prune:
        if _takes_gradients(pruning):
            yield run_dir.pruned(pruning.name), False, [[one == "safety" for one in pruning.kinds]]
    for needs in map(needs_of, recipe.realign):
        if needs.statistics and needs.gradients and not needs.answers:
            yield run_dir.statistics(needs.statistics), False, [(True,), (False,)]
    for pruning in recipe.prune:
        for one in recipe.variants_of(pruning):
            if needs_of(one).answers:
                ranking = run_dir.ranking(pruning.name, recipe.ranking_name(one))
                yield ranking, True, [(True, False)]


def bytes_needed(recipe: Recipe, dense: Source, folder: Path) -> tuple[int, int]:
    """Of checkpoints not yet written, and with what pruning keeps meanwhile the most at once."""
    run_dir = RunDir(folder, several=len(recipe.prune) > 1)
    most = kept = unfinished = 0
    for pruning in recipe.prune:
        pruned = run_dir.pruned(pruning.name)
        if recipe.pruned is None and not pruned.exists():
            kept += dense.checkpoint.bytes
            most = max(most, kept + stages.spilled_bytes(dense, pruning))
            unfinished += unfinished_bytes(pruned)
        for variant in recipe.variants_of(pruning):
            realigned = run_dir.realigned(pruning.name, variant.name)
            if recipe.on_disk(variant) and not realigned.exists():
                kept += dense.checkpoint.bytes
                unfinished += unfinished_bytes(realigned)
        most = max(most, kept)
    return kept - unfinished, most - unfinished


def _takes_gradients(pruning: PruneSettings) -> bool:
    return isinstance(PRUNERS.get(pruning.method), GradientPruner)


def _kinds_drawn(recipe: Recipe) -> list[bool]:
    """Which calibration prompts pruning and defences learn from, harmful (True) and harmless."""
    always = any(one.method == "refusal-direction" for one in recipe.defend)
    on_both = recipe.pruned is None and any("safety" in one.kinds for one in recipe.prune)
    wanted = {True: on_both, False: recipe.pruned is None}
    return [harmful for harmful, also in wanted.items() if always or also]
