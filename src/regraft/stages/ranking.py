"""Put the weights that could be restored in order, best first, by any method with a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from regraft import ranks
from regraft.checks import check_restorable, check_top_heads, told
from regraft.data.example import Reading
from regraft.files import file_digest
from regraft.keys import describe, is_done, working
from regraft.models.anatomy import Block, LinearAnatomy
from regraft.models.load import Source, pick_device
from regraft.restoration.ranking import (
    Keys,
    Ranking,
    load_ranking,
    save_ranking,
)
from regraft.restoration.ranking import rank as rank_by
from regraft.restoration.realign import check_pair, survey
from regraft.restoration.released import released_keys, released_regions
from regraft.restoration.selection import (
    Head,
    blocks_of,
    hsr_keys,
    kept_share,
    random_keys,
    ties_drawn,
    whole,
)
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.realigning import RealignSettings
from regraft.stages.answering import beside, imitation_data
from regraft.stages.gaining import (
    ALGORITHM,
    GainJob,
    check_gain_prompts,
    path_limit,
    restore_by_gain,
)
from regraft.stages.realigning import (
    band_of,
    chosen_heads,
    importance_of,
    require_files,
    scores_of,
    taken,
)
from regraft.watch import Silent, Watch


def rank(
    dense: Source,
    pruned: Source,
    out: Path,
    settings: RealignSettings,
    calibration: CalibrationSettings,
    heads_file: Path | None = None,
    statistics_file: Path | None = None,
    compute: ComputeSettings | None = None,
    watch: Watch | None = None,
    responses: Path | None = None,
) -> Ranking:
    """Rank the weights that could be restored; writes the file `out`.

    Args:
        dense: The dense checkpoint.
        pruned: The same network pruned, by whomever.
        out: The file.
        settings: The method and how many weights to rank (the budget); gain ranks the same
            whatever the budget, which takes the first of them.
        calibration: Prompts of both kinds, which only gain reads here; random draws by its seed.
        heads_file: From `heads`; needed to rank heads.
        statistics_file: From `statistics`; needed by "hsr", "hsr-released" and "set-difference".
        compute: Device, dtype, batch size and placement of gain; of the others the device counts.
        watch: Progress.
        responses: Folder for the dense model's answers, by default one beside `out`.

    Raises:
        RegraftError: an input is missing or does not fit, or the budget is less than one weight.
    """
    watch, compute = watch or Silent(), compute or ComputeSettings()
    check_pair(dense, pruned)
    check_top_heads(dense, settings)
    require_files(settings, heads_file, statistics_file)
    inputs = {"dense": dense.checkpoint.fingerprint, "pruned": pruned.checkpoint.fingerprint}
    scores = scores_of(dense, settings, heads_file)
    if scores is not None and heads_file is not None:
        inputs["heads"] = file_digest(heads_file)
    if statistics_file is not None and settings.needs_statistics:
        inputs["statistics"] = file_digest(statistics_file)
    looked = survey(dense, pruned)
    check_restorable(settings, looked.restorable)
    readings: dict[str, Reading] = {}
    if settings.method == "gain":
        folder = responses or beside(out)
        readings = imitation_data(dense, calibration, compute, folder, watch)
        check_gain_prompts(readings, calibration.seed, compute)
    about = describe(
        "rank",
        inputs,
        settings.ranking(),
        compute if readings else None,
        readings if readings else None,
    )
    if settings.method == "gain":
        about["algorithm"] = ALGORITHM
    about["seed"] = calibration.seed
    heads = chosen_heads(dense, settings, scores)
    about["heads"] = [list(head) for head in heads]
    about |= taken(looked)
    count = settings.how_many(looked.restorable)
    if not is_done(out, out, about, lambda: load_ranking(out).about):
        if looked.doubt:
            watch.note(looked.doubt)
        for role, reading in zip(
            ("Harmful prompts", "Harmless prompts"), readings.values(), strict=False
        ):
            watch.note(told(role, reading))
        with working(out, about) as work:
            if readings:
                swap, seed = settings.swap, calibration.seed
                job = GainJob(dense, pruned, work, compute, watch, swap, seed)
                ranking = restore_by_gain(job, readings, path_limit(looked.restorable))
            else:
                keys = _keys(dense, settings, heads, statistics_file, calibration.seed)
                with watch.task("Ranking weights", len(dense.anatomy.layers), "layers") as done:
                    ranking = rank_by(
                        dense,
                        pruned,
                        keys,
                        count,
                        device=pick_device(compute.device),
                        progress=done,
                    )
            if len(ranking) < count and not readings:  # gain says why it ended
                watch.note(
                    f"{out.name}: {len(ranking):,} weights are all that fit, fewer than the "
                    f"{count:,} of the budget."
                )
            if ranks.first():
                save_ranking(out, replace(ranking, about={**ranking.about, **about}))
    return load_ranking(out)


def _keys(
    dense: Source,
    settings: RealignSettings,
    heads: Sequence[Head],
    statistics_file: Path | None,
    seed: int,
) -> Keys:
    """The method's own; `seed` is of random weights, and of the order of equal ones."""
    if settings.method == "random":
        return lambda index, _linear, _weight, free: random_keys(
            free, settings.head_seed + 1000 * seed, index
        )
    safety, utility = importance_of(dense, settings, statistics_file)
    regions = _regions(dense, settings, heads)
    shares = released_keys if settings.method == "hsr-released" else hsr_keys
    everything = settings.method == "set-difference"

    def keys(index: int, linear: LinearAnatomy, weight: Tensor, free: Tensor) -> Tensor | None:
        blocks = regions(linear)
        band = band_of(settings, kept_share(weight, free), everything=everything)
        if not blocks or band is None:
            return None
        scorers = safety.scorer(linear, weight), utility.scorer(linear, weight)
        return ties_drawn(shares(free, *scorers, blocks, band), seed, index)

    return keys


def _regions(
    dense: Source, settings: RealignSettings, heads: Sequence[Head]
) -> Callable[[LinearAnatomy], Sequence[Block]]:
    """Where in each weight a value may be restored."""
    if settings.method == "set-difference":
        return lambda linear: [whole(linear)]
    if settings.method == "hsr-released":
        found = released_regions(dense.anatomy, heads)
        return lambda linear: found.get(linear.key, [])
    layer_of = {linear.key: layer for layer in dense.anatomy.layers for linear in layer.linears}
    by_layer: dict[int, list[int]] = {}
    for layer_index, head in heads:
        by_layer.setdefault(layer_index, []).append(head)

    def blocks(linear: LinearAnatomy) -> Sequence[Block]:
        layer = layer_of[linear.key]
        return blocks_of(layer, linear, by_layer.get(layer.index, []))

    return blocks
