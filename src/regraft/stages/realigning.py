"""Select the weights that are restored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from regraft import ranks
from regraft.checks import check_top_heads
from regraft.errors import RegraftError
from regraft.files import file_digest
from regraft.heads.score import HeadScores, load_heads
from regraft.keys import describe, difference, is_done, require_same, working
from regraft.models.load import Source, pick_device
from regraft.pruning.statistics import ImportanceStatistics, load_statistics
from regraft.restoration.groups import violated_groups
from regraft.restoration.patch import Patch, load_patch, save_patch
from regraft.restoration.ranking import Ranking, load_ranking, patch_of
from regraft.restoration.realign import Rule, Survey, check_pair, hsr, survey, whole_heads
from regraft.restoration.realign import realign as select
from regraft.restoration.released import P_MAX, released, released_regions
from regraft.restoration.selection import Band, Head, all_heads, random_heads
from regraft.settings.compute import ComputeSettings
from regraft.settings.realigning import SELECTING, RealignSettings
from regraft.watch import Silent, Watch

MARGIN = 0.2  # p_max - p in the paper
TAKEN = ("pruned", "n_m", "groups")


def realign(
    dense: Source,
    pruned: Source,
    out: Path,
    settings: RealignSettings,
    heads_file: Path | None = None,
    statistics_file: Path | None = None,
    compute: ComputeSettings | None = None,
    watch: Watch | None = None,
    *,
    ranking_file: Path | None = None,
    count: int | None = None,
) -> Patch:
    """Select the weights that are restored; writes the patch `out`.

    Args:
        dense: The dense checkpoint.
        pruned: The same network pruned, by whomever.
        out: The patch file.
        settings: The method.
        heads_file: From `heads`; needed to rank heads.
        statistics_file: From `statistics`; needed by "hsr" and "set-difference".
        compute: Only the device counts, for ranking.
        watch: Progress.
        ranking_file: From `rank`; needed where `settings.ranked`, and then nothing else is.
        count: Take so many of the ranking, all by default.

    Raises:
        RegraftError: an input is missing or does not fit.
    """
    watch = watch or Silent()
    check_pair(dense, pruned)
    check_top_heads(dense, settings)
    if settings.ranked:
        return _of_ranking(dense, pruned, out, settings, ranking_file, count)
    require_files(settings, heads_file, statistics_file)
    inputs = {
        "dense": dense.checkpoint.fingerprint,
        "pruned": pruned.checkpoint.fingerprint,
    }
    scores = scores_of(dense, settings, heads_file)
    if scores is not None and heads_file is not None:
        inputs["heads"] = file_digest(heads_file)
    about = describe("realign", inputs, settings)
    chosen = chosen_heads(dense, settings, scores)
    rule: Rule = whole_heads
    if settings.method in SELECTING:
        importance = importance_of(dense, settings, statistics_file)
        if statistics_file is not None and settings.needs_statistics:
            about["inputs"]["statistics"] = file_digest(statistics_file)
        band = partial(band_of, settings)
        rule = hsr(band, *importance)
        if settings.method == "hsr-released":
            rule = released(released_regions(dense.anatomy, chosen), band, *importance)
    about["heads"] = [list(head) for head in chosen]
    looked = survey(dense, pruned)
    about |= taken(looked)
    if not is_done(out, out, about, lambda: load_patch(out).about):
        if looked.doubt:
            watch.note(looked.doubt)
        device = pick_device((compute or ComputeSettings()).device)
        selecting = watch.task("Selecting weights", len(dense.anatomy.layers), "layers")
        with working(out, about):
            if ranks.first():
                with selecting as done:
                    patch = select(
                        dense, pruned, chosen, rule, about=about, device=device, progress=done
                    )
                save_patch(out, with_violations(patch, pruned))
                if not patch.restored:
                    watch.note(f"{out.name}: no pruned weight fits; the patch is empty.")
    return load_patch(out)


def check_made_by(
    out: Path, dense: Source, pruned: Source, settings: RealignSettings, *, searched: bool
) -> None:
    """See, before long work, that a file in the place of a patch is one that these make.

    Raises:
        RegraftError: it is no patch, or was made from other checkpoints or with other settings.
    """
    found = load_patch(out).about
    if searched != (found.get("count") is not None):
        raise RegraftError(
            f"{out} exists and was made {'without' if searched else 'by'} a search. Choose another "
            "output or remove it."
        )
    there = {"inputs": found["inputs"], "settings": found["settings"]}
    inputs = {"dense": dense.checkpoint.fingerprint, "pruned": pruned.checkpoint.fingerprint}
    wanted = {
        "inputs": {**there["inputs"], **inputs},
        "settings": settings.selection().model_dump(mode="json"),
    }
    require_same(out, there, wanted)


def _of_ranking(
    dense: Source,
    pruned: Source,
    out: Path,
    settings: RealignSettings,
    ranking_file: Path | None,
    count: int | None,
) -> Patch:
    if ranking_file is None:
        raise RegraftError(f"{settings.method} with a budget needs a ranking of weights first.")
    ranking = load_ranking(ranking_file)
    require_made_of(ranking, ranking_file, dense, pruned)
    wanted = settings.ranking().model_dump(mode="json")
    if ranking.about["settings"] != wanted:
        raise RegraftError(
            f"{ranking_file} was made with other settings "
            f"({difference(ranking.about['settings'], wanted)}). Rank again, or give its own."
        )
    inputs = {
        "dense": dense.checkpoint.fingerprint,
        "pruned": pruned.checkpoint.fingerprint,
        "ranking": file_digest(ranking_file),
    }
    about = describe("realign", inputs, settings)
    about |= {"heads": ranking.about["heads"], "count": count}
    # of these very checkpoints, so that they need not be read again
    about |= {name: ranking.about[name] for name in TAKEN if name in ranking.about}
    if not is_done(out, out, about, lambda: load_patch(out).about):
        with working(out, about):
            if ranks.first():
                most = settings.how_many(ranking.about["pruned"]) if count is None else count
                patch = patch_of(ranking.first(most), dense, pruned, about)
                save_patch(out, with_violations(patch, pruned))
    return load_patch(out)


def require_made_of(ranking: Ranking, path: Path, dense: Source, pruned: Source) -> None:
    """Raise unless the ranking in the file `path` is of these two checkpoints."""
    for role, source in (("dense", dense), ("pruned", pruned)):
        if ranking.about["inputs"][role] != source.checkpoint.fingerprint:
            raise RegraftError(
                f"{path} was made from another {role} checkpoint than {source.folder}."
            )


def taken(looked: Survey) -> dict[str, Any]:
    """What pruning took, as artifacts tell it: those of `TAKEN`, the last two of N:M patterns."""
    told: dict[str, Any] = {"pruned": looked.restorable}
    if looked.grouping is not None:
        told |= {"n_m": looked.grouping.n_m, "groups": looked.grouping.groups}
    return told


def require_files(
    settings: RealignSettings, heads_file: Path | None, statistics_file: Path | None
) -> None:
    """Raise unless the files are there that the method ranks by."""
    if settings.by_heads and heads_file is None:
        raise RegraftError("Ranking heads needs their scores: run `regraft heads` first.")
    if settings.needs_statistics and statistics_file is None:
        raise RegraftError(
            f"{settings.method.upper()} by {settings.score} needs statistics: run `regraft "
            f"statistics --score {settings.score}` first."
        )


def scores_of(
    dense: Source, settings: RealignSettings, heads_file: Path | None
) -> HeadScores | None:
    """The scores of the dense model's heads, where they decide.

    Raises:
        RegraftError: they were made from another model.
    """
    if not settings.by_heads or heads_file is None:
        return None
    scores = load_heads(heads_file, dense.anatomy)
    _require_made_from(dense, heads_file, scores.about)
    return scores


def with_violations(patch: Patch, pruned: Source) -> Patch:
    """A patch that says how many N:M groups it breaks, where the pruned model has a pattern."""
    if "n_m" not in patch.about:
        return patch
    n, m = map(int, patch.about["n_m"].split(":"))
    count = violated_groups(pruned.checkpoint, patch, n, m)
    return replace(patch, about={**patch.about, "violated_groups": count})


def importance_of(
    dense: Source, settings: RealignSettings, statistics_file: Path | None
) -> tuple[ImportanceStatistics, ImportanceStatistics]:
    """(safety, utility), from the file where the score needs one.

    Raises:
        RegraftError: the file is of another model or another score.
    """
    if not settings.needs_statistics:
        none = ImportanceStatistics(settings.score, {}, 0)
        return none, none
    assert statistics_file is not None
    loaded = load_statistics(statistics_file)
    _require_made_from(dense, statistics_file, loaded.about)
    if loaded.safety.method != settings.score:
        raise RegraftError(
            f"{statistics_file} holds statistics of {loaded.safety.method}, but the score is "
            f"{settings.score}. Make them with `regraft statistics --score {settings.score}`."
        )
    return loaded.safety, loaded.utility


def band_of(settings: RealignSettings, kept: float, *, everything: bool = False) -> Band | None:
    """HSR's thresholds for a matrix of which pruning kept a share `kept`; None where empty.

    With a budget q is left open. `everything` leaves p_max open too: the set difference of Wei et
    al. (2024, arXiv 2402.05162), top q by safety minus top p by utility.
    """
    p = kept if settings.p is None else settings.p
    p_max = min(1.0, p + MARGIN) if settings.p_max is None else settings.p_max
    q = 1.0 if settings.ranked else settings.q
    if settings.method == "hsr-released":
        return Band(q, p, P_MAX, "matrix") if p < P_MAX else None
    p_max = 1.0 if everything else p_max
    return Band(q, p, p_max, settings.scope) if p < p_max else None


def _require_made_from(dense: Source, path: Path, about: Mapping[str, Any]) -> None:
    if about["inputs"]["dense"] != dense.checkpoint.fingerprint:
        raise RegraftError(
            f"{path} was made from another checkpoint than {dense.folder}. Make it again with "
            f"`regraft {about['stage']}` from this one."
        )


def chosen_heads(dense: Source, settings: RealignSettings, scores: HeadScores | None) -> list[Head]:
    """The heads in which weights are restored; none where the method does not go by heads.

    Raises:
        RegraftError: more heads are asked for than there are, or than were scored exactly.
    """
    if not settings.in_heads:
        return []
    if settings.heads == "all":
        return all_heads(dense.anatomy)
    if settings.heads == "random":
        return random_heads(dense.anatomy, settings.top_heads, settings.head_seed)
    assert scores is not None
    ranked = scores.ranked(settings.criterion)
    if settings.top_heads > len(ranked):
        raise RegraftError(
            f"top_heads is {settings.top_heads}, but only {len(ranked)} heads were scored."
        )
    certain = scores.certain(settings.criterion)
    if settings.top_heads > certain:
        raise RegraftError(
            f"top_heads is {settings.top_heads}, but only the {certain} best by "
            f"{settings.criterion} were all scored exactly; other scores are estimates. Score "
            f"heads again with --candidates {settings.top_heads} or more."
        )
    return ranked[: settings.top_heads]
