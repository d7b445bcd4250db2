"""From a ranking to the patch that restores the first of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from regraft import distributed
from regraft.disk.files import file_digest
from regraft.errors import RegraftError
from regraft.models.load import Source
from regraft.patch.format import Patch, load_patch, save_patch
from regraft.patch.groups import violated_groups
from regraft.restoration.base import MethodSettings, own_settings
from regraft.restoration.ranking import load_ranking, patch_of
from regraft.stages.provenance import (
    describe,
    difference,
    fingerprints,
    is_done,
    require_same,
    working,
)
from regraft.stages.ranking import require_made_of

# of the ranking, in its patches; the last three are the path of gain
_TOLD = ("heads", "pruned", "kind", "n_m", "groups", "values", "passes", "start", "steps", "end")


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
        settings: The method that made the ranking; its budget says how many.
        count: So many instead.

    Raises:
        RegraftError: the ranking is of other checkpoints or settings.
    """
    ranking = load_ranking(ranking_file)
    require_made_of(ranking, ranking_file, dense, pruned)
    wanted = own_settings(settings).without_amount().model_dump(mode="json")
    if ranking.about["settings"] != wanted:
        raise RegraftError(
            f"{ranking_file} was made with other settings "
            f"({difference(ranking.about['settings'], wanted)}). Rank again, or give its own."
        )
    inputs = fingerprints(dense=dense, pruned=pruned) | {"ranking": file_digest(ranking_file)}
    about = describe("realign", inputs, own_settings(settings)) | {"count": count}
    about |= {name: ranking.about[name] for name in _TOLD if name in ranking.about}
    if not is_done(out, out, about, lambda: load_patch(out).about):
        with working(out, about):
            if distributed.first():
                most = settings.how_many(ranking.about["pruned"]) if count is None else count
                first = ranking if most is None else ranking.first(most)
                patch = patch_of(first, dense, pruned, about)
                save_patch(out, _with_violations(patch, pruned))
    return load_patch(out)


def check_made_by(
    out: Path, dense: Source, pruned: Source, settings: MethodSettings, *, searched: bool
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
    inputs = fingerprints(dense=dense, pruned=pruned)
    wanted = {
        "inputs": {**there["inputs"], **inputs},
        "settings": own_settings(settings).model_dump(mode="json"),
    }
    require_same(out, there, wanted)


def _with_violations(patch: Patch, pruned: Source) -> Patch:
    """A patch that says how many N:M groups it breaks, where the pruned model has a pattern."""
    if "n_m" not in patch.about:
        return patch
    n, m = map(int, patch.about["n_m"].split(":"))
    count = violated_groups(pruned, patch, n, m)
    return replace(patch, about={**patch.about, "violated_groups": count})
