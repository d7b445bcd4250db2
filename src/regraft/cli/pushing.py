"""A patch on the hub: `regraft push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from regraft.cli.options import watching

Evaluations = Annotated[tuple[Path, ...], Parameter(consume_multiple=True)]


def push(
    patch: Path,
    repository: str,
    *,
    dense: str | None = None,
    pruned: str | None = None,
    evaluation: Evaluations = (),
    public: bool = False,
    replace: bool = False,
    dry_run: Path | None = None,
) -> None:
    """Put a patch on the hub, with a card: what it is for, how it was made and what it does.

    Nothing but the patch and the card is uploaded, to a repository that is made if it is not there.
    The login is the hub's: `hf auth login` or HF_TOKEN. `regraft apply pruned OWNER/NAME` takes
    the patch from there.

    Example: regraft push gain.safetensors me/model-gain --dense org/model --dry-run folder

    Parameters
    ----------
    patch
        From `regraft realign`.
    repository
        OWNER/NAME on the hub.
    dense
        Hub id of the dense model.
    pruned
        Hub id of the pruned checkpoint, where it is on the hub.
    evaluation
        Folders of `regraft eval`, one or several, whose rates go into the card; all after the first
        are compared with it.
    public
        Make a new repository public; it is private otherwise.
    replace
        Put it in the place of a patch for another checkpoint, or among files of something else;
        such a repository is left as it is otherwise.
    dry_run
        Write what would be uploaded to this new folder; upload nothing.
    """
    from regraft.runs import publishing

    card = publishing.render(patch, repository, dense=dense, pruned=pruned, evaluated=evaluation)
    with watching() as progress:
        if dry_run is not None:
            publishing.write(patch, card, dry_run)
            progress.note(f"Nothing was uploaded. What would be: {dry_run}")
            return
        address = publishing.upload(patch, card, repository, public=public, replace=replace)
        progress.note(f"Uploaded: {address}")
