"""Publishing a patch on the hub: only the patch and its card are uploaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from regraft.data.storage import MODEL_ID
from regraft.disk.artifact import artifact_header
from regraft.disk.descriptions import described
from regraft.disk.files import atomic_folder, file_digest
from regraft.errors import RegraftError
from regraft.patch.format import FORMAT, Patch, load_patch
from regraft.report.cards import PatchFile, render_patch_card
from regraft.report.pooling import study_of
from regraft.runs.comparing import run_of_evaluations
from regraft.stages.patching import PATCH_FILE

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
_FIX = "Choose another name, or add --replace."
_PARSER_ERRORS = (AttributeError, LookupError, TypeError, ValueError)  # on a broken header
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
    found, size = load_patch(patch), patch.stat().st_size
    of = PatchFile(
        found, repository, PATCH_FILE, size, file_digest(patch), dense=dense, pruned=pruned
    )
    study = study_of([run_of_evaluations(evaluated)]) if evaluated else None
    return render_patch_card(of, study)


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

    The repository is created if it does not exist, private unless `public`. One that holds anything
    but a patch for the same checkpoint is refused unless `replace`; other files in it are never
    deleted. The login is the hub's own: HF_TOKEN or `hf auth login`.

    Raises:
        RegraftError: there is no login, no network or no permission to write, or the repository
            holds something else.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _hub_errors(repository), TemporaryDirectory() as folder:
        _fill(Path(folder), patch, card)
        _prepare(api, repository, public, None if replace else load_patch(patch))
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


def _prepare(api: HfApi, repository: str, public: bool, patch: Patch | None) -> None:
    """Create the repository, or check that it holds a patch for the same checkpoint.

    Args:
        api: The hub.
        repository: OWNER/NAME.
        public: Whether a new repository is public.
        patch: The patch to upload; None if anything may be replaced.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        files = set(api.list_repo_files(repository)) - _IGNORED
    except RepositoryNotFoundError:
        api.create_repo(repository, private=not public)
        return
    if patch is None or not files:
        return
    if PATCH_FILE not in files:
        raise RegraftError(
            f"{repository} holds {min(files)} and no {PATCH_FILE}: it is something other than a "
            f"patch, and is left as it is. {_FIX}"
        )
    if (base := _base_of(api, repository)) != patch.about["inputs"]["pruned"]:
        raise RegraftError(
            f"The {PATCH_FILE} of {repository} is for another checkpoint (fingerprint {base[:12]}"
            f"), and is left as it is. {_FIX}"
        )


def _base_of(api: HfApi, repository: str) -> str:
    """The fingerprint of the checkpoint that the patch on the hub is for; reads only its header.

    Raises:
        RegraftError: the file is not a patch.
    """
    from huggingface_hub.errors import SafetensorsParsingError

    where = f"{PATCH_FILE} of {repository}"
    try:
        metadata = api.parse_safetensors_file_metadata(repository, PATCH_FILE).metadata
        about = artifact_header(metadata, FORMAT, "a patch", where).get("about")
        return str(described(about, f"{where}: about")["inputs"]["pruned"])
    except (SafetensorsParsingError, RegraftError, *_PARSER_ERRORS) as error:
        reason = str(error).partition("\n")[0].removesuffix(".")
        raise RegraftError(
            f"The {PATCH_FILE} of {repository} is no patch of regraft ({reason}), and is left as "
            f"it is. {_FIX}"
        ) from error


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
