"""The order of the stages: one recipe, one folder, one report. Resumes where it was stopped."""

from __future__ import annotations

from pathlib import Path

from regraft import ranks, stages
from regraft.checks import (
    check_direction_layer,
    check_pattern,
    check_r_max,
    check_shares,
    check_top_heads,
    order_calibration,
    read_validation,
    seen_before,
)
from regraft.data.example import Reading
from regraft.errors import RegraftError
from regraft.files import digest, discard_leftover, require_empty, require_space, write_text
from regraft.folder import RunFolder
from regraft.importance.score import Method
from regraft.keys import difference
from regraft.models.load import Source, open_source, pick_device
from regraft.recipe import (
    CalibrationSettings,
    NamedDefenceSettings,
    Recipe,
    SearchSettings,
    StatisticsSettings,
    VariantSettings,
    read_recipe,
    write_recipe,
)
from regraft.report.model import Report
from regraft.reporting import model_folder, report
from regraft.restoration.realign import check_pair
from regraft.watch import Silent, Watch

__all__ = ["RunFolder", "report", "run"]


def run(
    recipe: Recipe,
    folder: Path,
    watch: Watch | None = None,
    session: stages.Session | None = None,
) -> Report:
    """Prune, score heads, realign, evaluate and report; finished stages are not repeated.

    Args:
        recipe: All settings.
        folder: A new folder, or that of an earlier run of the same recipe.
        watch: Progress.
        session: What evaluations share, if other runs share it too.

    Raises:
        RegraftError: bad input, or the folder holds something else.
    """
    watch = watch or Silent()
    place = RunFolder(folder, several=len(recipe.prune) > 1)
    session = session or stages.Session()
    dense, existing = check(recipe, folder, session)
    claim(folder, recipe)
    for line in _seen_before(recipe, dense, session):
        watch.note(f"Warning: {line}.")
    calibration, compute = recipe.calibration, recipe.compute
    pruned = {
        one.name: existing
        or stages.prune(
            dense,
            place.pruned(one.name),
            one.only(),
            calibration,
            compute,
            watch,
            place.responses,
        )
        for one in recipe.prune
    }
    watch.note("Evaluating the dense model")
    _evaluate(dense, place.dense_evaluation, dense, recipe, watch, session)
    for name, source in pruned.items():
        watch.note(f"Evaluating the {name} model")
        _evaluate(source, place.evaluation(name), dense, recipe, watch, session)
    session.unload()
    if any(one.by_heads for one in recipe.realign):
        stages.heads(dense, place.heads, recipe.heads, calibration, compute, watch)
    for score in _scores(recipe):
        settings = StatisticsSettings(score=score)
        out = place.statistics(score)
        stages.statistics(dense, out, calibration, compute, settings, watch, place.responses)
    for pruning in recipe.prune:
        name, source = pruning.name, pruned[pruning.name]
        for variant in recipe.variants_of(pruning):
            watch.note(f"Realigning: {place.name(name, variant.name)}")
            _realign(place, dense, name, source, variant, recipe, watch, session)
        for defence in recipe.defences_of(pruning):
            watch.note(f"Defending: {place.name(name, defence.name)}")
            _defend(place, dense, name, source, defence, recipe, watch, session)
    session.unload()
    return report(folder)


def _scores(recipe: Recipe) -> list[Method]:
    """Every kind of importance for which something must be gathered first."""
    scores = [one.score for one in recipe.realign if stages.needs_statistics(one)]
    return list(dict.fromkeys(scores))


def check(recipe: Recipe, folder: Path, session: stages.Session) -> tuple[Source, Source | None]:
    """Find now, before anything is written, what would stop the run hours later.

    Returns:
        The dense model, and the pruned one where the recipe names it.

    Raises:
        RegraftError: bad input.
    """
    place = RunFolder(folder, several=len(recipe.prune) > 1)
    trust = recipe.compute.trust_remote_code
    dense = open_source(model_folder(recipe.model), trust_remote_code=trust)
    existing = None
    if recipe.pruned is not None:
        existing = open_source(recipe.pruned, trust_remote_code=trust)
        check_pair(dense, existing)
    _check(recipe, dense, place, session)
    return dense, existing


def claim(folder: Path, recipe: Recipe) -> None:
    """Write the recipe into a new folder, or check that the folder is of this recipe.

    Raises:
        RegraftError: the folder holds something else.
    """
    if ranks.first():
        _claim(RunFolder(folder), recipe)
    ranks.barrier()


def _check(recipe: Recipe, dense: Source, place: RunFolder, session: stages.Session) -> None:
    pick_device(recipe.compute.device)
    _check_gain(recipe, dense, session)
    for variant in recipe.realign:
        if variant.search is not None:
            stages.check_search(dense, variant.search, recipe.compute, session)
    for harmful in _kinds_drawn(recipe):
        drawn = session.drawn(dense, recipe.calibration, harmful=harmful)
        check_shares(drawn.examples, recipe.compute)
        if harmful and any(one.by_heads for one in recipe.realign):
            check_r_max(dense, recipe.heads, len(drawn.examples))
    session.reading(dense, recipe.evaluate.suite, recipe.evaluate.limit)
    for variant in recipe.realign:
        check_top_heads(dense, variant)
    for defence in recipe.defend:
        check_direction_layer(dense, defence)
        if defence.searches:
            read_validation(dense, defence)
    checkpoints = [
        place.realigned(pruning.name, variant.name)
        for pruning in recipe.prune
        for variant in recipe.variants_of(pruning)
        if _on_disk(variant, recipe)
    ]
    if recipe.pruned is None:
        for pruning in recipe.prune:
            check_pattern(dense, pruning)
            checkpoints.append(place.pruned(pruning.name))
    for checkpoint in checkpoints if ranks.first() else ():
        discard_leftover(checkpoint)
    missing = sum(not folder.exists() for folder in checkpoints)
    require_space(place.path, missing * dense.checkpoint.bytes)


def _kinds_drawn(recipe: Recipe) -> list[bool]:
    """Which calibration prompts whole stages learn from, harmful (True), harmless or both.

    Gain draws as well, but learns from a batch of them at a time.
    """
    always = bool(_scores(recipe)) or any(
        one.method == "refusal-direction" for one in recipe.defend
    )
    by_heads = any(one.by_heads for one in recipe.realign)
    on_both = recipe.pruned is None and any(one.calibrate_on == "both" for one in recipe.prune)
    wanted = {True: by_heads or on_both, False: recipe.pruned is None}
    return [harmful for harmful, also in wanted.items() if always or also]


def _seen_before(recipe: Recipe, dense: Source, session: stages.Session) -> list[str]:
    """What of the test prompts anything is learnt or chosen from."""
    drawn = {(recipe.calibration, harmful): None for harmful in _kinds_drawn(recipe)}
    for one in recipe.realign:
        if one.method == "gain":
            drawn |= {(_calibration(recipe, one), harmful): None for harmful in (True, False)}
    used: dict[str, Reading] = {}
    for calibration, harmful in drawn:
        role = f"{'harmful' if harmful else 'harmless'} calibration"
        if calibration.responses == "self":  # any may be needed, until enough answers are kept
            used[f"{role} (self)"] = order_calibration(dense, calibration, harmful=harmful)
        else:
            used[role] = session.drawn(dense, calibration, harmful=harmful)
    for variant in recipe.realign:
        if (search := variant.search) is not None:
            role = f"validation ({search.validation}, {search.validation_limit or 'all'})"
            suites = stages.suites_of(search)
            used[role] = session.reading(dense, suites, search.validation_limit)
    for defence in recipe.defend:
        if defence.searches:
            used[f"{defence.name}'s validation"] = read_validation(dense, defence)
    evaluated = session.reading(dense, recipe.evaluate.suite, recipe.evaluate.limit)
    return seen_before(evaluated, used)


def _check_gain(recipe: Recipe, dense: Source, session: stages.Session) -> None:
    by_gain = [one for one in recipe.realign if one.method == "gain"]
    for calibration in dict.fromkeys(_calibration(recipe, one) for one in by_gain):
        for harmful in (True, False):
            examples = session.drawn(dense, calibration, harmful=harmful).examples
            for one in by_gain:
                check_shares(examples[: one.batch], recipe.compute)


def _calibration(recipe: Recipe, variant: VariantSettings) -> CalibrationSettings:
    if variant.responses is None:
        return recipe.calibration
    return recipe.calibration.model_copy(update={"responses": variant.responses})


def _evaluate(
    model: Source,
    out: Path,
    dense: Source,
    recipe: Recipe,
    watch: Watch,
    session: stages.Session,
    patch: Path | None = None,
    defence: Path | None = None,
) -> None:
    stages.evaluate(
        model,
        out,
        recipe.evaluate.suite,
        recipe.evaluate.only(),
        recipe.compute,
        patch,
        processor_from=dense,
        watch=watch,
        session=session,
        defence_file=defence,
    )


def _realign(
    place: RunFolder,
    dense: Source,
    pruning: str,
    pruned: Source,
    settings: VariantSettings,
    recipe: Recipe,
    watch: Watch,
    session: stages.Session,
) -> None:
    patch, method = place.patch(pruning, settings.name), settings.selection()
    files = (
        place.heads if settings.by_heads else None,
        place.statistics(settings.score) if stages.needs_statistics(settings) else None,
    )
    ranking, count = None, None
    if settings.ranked:
        calibration = _calibration(recipe, settings)
        ranking = place.ranking(pruning, _ranking_name(settings, calibration))
        if not ranking.exists():
            session.unload()
        stages.rank(
            dense,
            pruned,
            ranking,
            method,
            calibration,
            *files,
            recipe.compute,
            watch,
            place.responses,
        )
        if settings.search is not None:
            count = stages.search(
                dense,
                pruned,
                ranking,
                place.curve(pruning, settings.name),
                settings.search,
                method,
                recipe.evaluate.only(),
                recipe.compute,
                watch,
                session,
                references=place.points(pruning, _prompts_name(settings.search)),
                points_folder=place.points(
                    pruning, f"{ranking.stem}-{_prompts_name(settings.search)}"
                ),
            )
    stages.realign(
        dense,
        pruned,
        patch,
        method,
        *files,
        recipe.compute,
        watch,
        ranking_file=ranking,
        count=count,
    )
    out = place.evaluation(pruning, settings.name)
    if not _on_disk(settings, recipe):
        _evaluate(pruned, out, dense, recipe, watch, session, patch)
        return
    written = stages.apply(pruned.folder, patch, place.realigned(pruning, settings.name), watch)
    realigned = open_source(written, trust_remote_code=recipe.compute.trust_remote_code)
    _evaluate(realigned, out, dense, recipe, watch, session)


def _ranking_name(settings: VariantSettings, calibration: CalibrationSettings) -> str:
    """Variants that differ in what they take of a ranking share it."""
    of_data = calibration.responses if settings.method == "gain" else ""
    return f"{settings.method}-{digest(settings.selection().model_dump_json(), of_data)[:8]}"


def _prompts_name(search: SearchSettings) -> str:
    """Searches that differ in what they choose by share what they try."""
    return digest(search.model_dump_json(include={"validation", "validation_limit"}))[:8]


def _defend(
    place: RunFolder,
    dense: Source,
    pruning: str,
    pruned: Source,
    settings: NamedDefenceSettings,
    recipe: Recipe,
    watch: Watch,
    session: stages.Session,
) -> None:
    file = place.defence(pruning, settings.name)
    if settings.method == "refusal-direction" and not file.exists():
        session.unload()
    stages.defend(pruned, file, settings.only(), recipe.calibration, recipe.compute, watch, dense)
    out = place.evaluation(pruning, settings.name)
    _evaluate(pruned, out, dense, recipe, watch, session, defence=file)


def _on_disk(variant: VariantSettings, recipe: Recipe) -> bool:
    """Whether the realigned checkpoint is written: a streamed model takes no patch in memory."""
    return variant.checkpoint or recipe.compute.placement == "streamed"


def _claim(place: RunFolder, recipe: Recipe) -> None:
    if place.recipe.exists():
        if read_recipe(place.recipe) != recipe:
            found, wanted = (
                one.model_dump(mode="json") for one in (read_recipe(place.recipe), recipe)
            )
            raise RegraftError(
                f"{place.path} holds a run of another recipe "
                f"({difference(found, wanted)}). Choose another output folder."
            )
        return
    discard_leftover(place.recipe)
    require_empty(place.path)
    write_text(place.recipe, write_recipe(recipe))
