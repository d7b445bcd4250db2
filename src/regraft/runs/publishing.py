"""Publishing a patch on the hub: only the patch and its card are uploaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from regraft.data.storage import MODEL_ID
from regraft.disk.files import atomic_folder
from regraft.errors import RegraftError
from regraft.report.cards import render_patch_card
from regraft.report.pooling import study_of
from regraft.runs.comparing import run_of_evaluations
from regraft.stages.patching import PATCH_FILE

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
_IGNORED = {".gitattributes"}  # which the hub puts into a new repository


def render(
    patch: Path,
    repository: str,
    *,
    dense: str | None = None,
    pruned: str | None = None,
    evaluated: Sequence[Path] = (),
) -> str:
    """Render the card of a patch.

    Args:
        evaluated: Folders of `regraft eval`, for a table of rates; the others are compared with the
            first.

    Raises:
        RegraftError: the file is no patch, an id is invalid, or evaluations cannot be compared.
    """
    for named in (repository, dense, pruned):
        if named is None:
            continue
        if not MODEL_ID.fullmatch(named) or "@" in named:
            raise RegraftError(
                f"{named!r} is no name on the hub; expected OWNER/NAME, such as Qwen/Qwen2.5-VL-7B."
            )
    study = study_of([run_of_evaluations(evaluated)]) if evaluated else None
    return render_patch_card(patch, repository, PATCH_FILE, dense, pruned, study)


def write(patch: Path, card: str, folder: Path) -> None:
    """Write the files that `upload` would upload to the new folder `folder`.

    Raises:
        RegraftError: it is not empty.
    """
    with atomic_folder(folder) as temporary:
        _fill(temporary, patch, card)


def upload(
    patch: Path, card: str, repository: str, *, public: bool = False, replace: bool = False
) -> str:
    """Upload a patch and its card in one commit; return the address of the repository.

    The repository is created if it does not exist, private unless `public`. One that holds files is
    refused unless `replace`; other files in it are never deleted. The login is the hub's own:
    HF_TOKEN or `hf auth login`.

    Raises:
        RegraftError: there is no login, no network or no permission to write, or the repository
            holds files.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _hub_errors(repository), TemporaryDirectory() as folder:
        _fill(Path(folder), patch, card)
        _prepare(api, repository, public, replace)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[PATCH_FILE, CARD],
            commit_message="A patch of regraft and its card",
        )
    return f"{api.endpoint}/{repository}"


def _fill(folder: Path, patch: Path, card: str) -> None:
    shutil.copyfile(patch, folder / PATCH_FILE)
    (folder / CARD).write_text(card, encoding="utf-8")


def _prepare(api: HfApi, repository: str, public: bool, replace: bool) -> None:
    """Create the repository; if it exists, raise RegraftError unless its files may be replaced."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        files = set(api.list_repo_files(repository)) - _IGNORED
    except RepositoryNotFoundError:
        api.create_repo(repository, private=not public)
        return
    if files and not replace:
        raise RegraftError(
            f"{repository} holds {min(files)} already, and is left as it is. Choose another name, "
            "or add --replace."
        )


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Turn errors of the hub's library into a `RegraftError`, which never contains a token."""
    try:
        yield
    except RegraftError:
        raise
    except Exception as error:  # may be of its HTTP library, which differs by version
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = "Try again, or write the folder alone with --dry-run FOLDER."
        if status in (401, 403):
            fix = "Log in with `hf auth login` or HF_TOKEN as a user who may write to it."
        raise RegraftError(f"{repository} could not be uploaded: {reason} {fix}") from error
