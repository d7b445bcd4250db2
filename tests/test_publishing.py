"""Patches on the hub: what is uploaded, by whose login, and back, against a local fake of it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import save_file

from commands import exit_code
from disk import tree
from regraft.errors import RegraftError
from regraft.patch.format import Patch, TensorPatch, load_patch, save_patch
from regraft.runs import publishing
from regraft.stages.patching import patch_file
from test_evaluations import evaluation, examples

TOKEN = "hf_secret_of_the_test"
NAME = "me/model-gain"
ABOUT = {
    "stage": "realign",
    "settings": {"method": "gain", "budget": 2.0, "count": None},
    "inputs": {"dense": "d" * 64, "pruned": "e" * 64},
    "pruned": 20_000,
    "versions": {"regraft": "0.1.0"},
}


@dataclass
class Hub:
    """A fake of the hub: repositories of small files, for who has the token."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    address: str = ""

    def answer(self, path: str, token: str | None, body: bytes) -> Any:
        """Status, headers and content; JSON unless it is bytes."""
        self.asked.append(path)
        if path == "/api/validate-yaml":  # asked by anyone
            return 200, {}, {"errors": [], "warnings": []}
        if token != f"Bearer {TOKEN}":
            return 401, {"X-Error-Message": "Invalid username or password."}, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.files[name] = {".gitattributes": b""}
            self.private[name] = asked.get("private", asked.get("visibility") == "private")
            return 200, {}, {"url": f"{self.address}/{name}"}
        name = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
        if name not in self.files:
            return 404, {"X-Error-Code": "RepoNotFound"}, {}
        return self._of(name, path.partition(name)[2], body)

    def _of(self, name: str, action: str, body: bytes) -> Any:
        held = self.files[name]
        revision = sha1(b"".join(held.values())).hexdigest()
        if action.startswith("/tree/"):
            entries = [
                {"type": "file", "path": one, "size": len(content), "oid": "0" * 40}
                for one, content in held.items()
            ]
            return 200, {}, entries
        if action.startswith("/preupload/"):
            asked = json.loads(body)["files"]
            modes = [{**one, "uploadMode": "regular", "shouldIgnore": False} for one in asked]
            return 200, {}, {"files": modes}
        if action.startswith("/commit/"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    held[entry["value"]["path"]] = content
            return 200, {}, {"commitUrl": f"{self.address}/{name}", "commitOid": "1" * 40}
        if action.startswith("/resolve/"):
            content = held[action.split("/", 3)[3]]
            headers = {"ETag": f'"{sha1(content).hexdigest()}"', "X-Repo-Commit": revision}
            return 200, headers, content
        siblings = [{"rfilename": one} for one in held]
        return 200, {}, {"id": name, "sha": revision, "siblings": siblings}


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            path, token = self.path.partition("?")[0], self.headers.get("Authorization")
            status, headers, content = state.answer(path, token, self.rfile.read(length))
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_HEAD = _serve  # noqa: N815

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    """In a folder with other things that nobody asked to upload."""
    pruned = torch.zeros(4, 8, dtype=torch.bfloat16)
    pruned[0] = 1
    tensor = TensorPatch.of(pruned, torch.tensor([8, 9, 30]), torch.ones(3, dtype=torch.bfloat16))
    folder = tmp_path / "work"
    folder.mkdir()
    save_patch(folder / "gain.safetensors", Patch({"a.weight": tensor}, ABOUT))
    (folder / "secret.txt").write_text("not for the hub")
    return folder / "gain.safetensors"


@pytest.fixture
def run(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """The program with the fake for a hub; exit code, and all that it printed on one line."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    def go(*words: object, token: str = TOKEN) -> tuple[int, str]:
        monkeypatch.setenv("HF_TOKEN", token)
        code = exit_code(*words)
        said = capsys.readouterr()
        return code, " ".join((said.out + said.err).split())

    return go


Run = Callable[..., tuple[int, str]]


def test_a_patch_goes_to_the_hub_and_comes_back(
    hub: Hub, run: Run, patch: Path, tmp_path: Path
) -> None:
    code, said = run("push", patch, NAME, "--dense", "org/base")
    assert (code, said) == (0, f"Uploaded: {hub.address}/{NAME}")
    held = hub.files[NAME]
    assert held.keys() == {".gitattributes", "patch.safetensors", "README.md"}
    assert held["patch.safetensors"] == patch.read_bytes()
    assert hub.private == {NAME: True}
    assert all(TOKEN.encode() not in content for content in held.values())
    assert f"regraft apply pruned {NAME} --out realigned" in held["README.md"].decode()

    hub.asked.clear()
    pruned = torch.zeros(4, 8, dtype=torch.bfloat16)
    pruned[0] = 1
    (tmp_path / "pruned").mkdir()
    save_file({"a.weight": pruned}, tmp_path / "pruned" / "model.safetensors")
    for named, out in ((NAME, "from-hub"), (f"{NAME}@main", "revision"), (patch, "from-file")):
        code, said = run("apply", tmp_path / "pruned", named, "--out", tmp_path / out)
        assert code == 0, said
    weights = {
        (tmp_path / one / "model.safetensors").read_bytes()
        for one in ("from-hub", "revision", "from-file")
    }
    assert len(weights) == 1
    asked = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert asked == {"patch.safetensors"}, "only the patch is downloaded"


def test_a_second_push_replaces_patch_and_card(hub: Hub, run: Run, patch: Path) -> None:
    assert run("push", patch, NAME, "--dense", "org/base", "--public")[0] == 0
    assert hub.private == {NAME: False}
    hub.files[NAME]["notes.txt"] = b"mine"
    assert run("push", patch, NAME, "--dense", "org/other", "--replace")[0] == 0
    assert b"org/other" in hub.files[NAME]["README.md"]
    assert hub.files[NAME]["notes.txt"] == b"mine"
    assert hub.private == {NAME: False}, "an existing repository stays as it is"


def test_what_is_not_replaced_unless_asked(hub: Hub, run: Run, patch: Path) -> None:
    files = {"patch.safetensors": b"another", "README.md": b"mine"}
    hub.files[NAME] = dict(files)
    code, said = run("push", patch, NAME)
    assert code == 2
    assert f"{NAME} holds README.md already, and is left as it is" in said
    assert "Choose another name, or add --replace." in said
    assert hub.files[NAME] == files
    assert run("push", patch, NAME, "--replace")[0] == 0
    assert hub.files[NAME]["patch.safetensors"] == patch.read_bytes()


def test_what_the_hub_refuses(hub: Hub, run: Run, patch: Path, tmp_path: Path) -> None:
    mine = {"README.md": b"mine", "model.safetensors": b"weights"}
    hub.files["me/a-model"] = dict(mine)
    code, said = run("push", patch, "me/a-model")
    assert code == 2
    assert "me/a-model holds README.md already" in said
    assert hub.files["me/a-model"] == mine
    with pytest.raises(RegraftError, match=r"its repository holds no patch\.safetensors"):
        patch_file(Path("me/a-model"))
    wrong = "hf_wrong_token"
    code, said = run("push", patch, NAME, token=wrong)
    assert code == 2
    assert f"{NAME} could not be uploaded" in said
    assert "Log in with `hf auth login` or HF_TOKEN" in said
    assert wrong not in said
    assert NAME not in hub.files


def test_a_dry_run_writes_what_would_be_uploaded(
    patch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    words = ("push", patch, NAME, "--pruned", "org/pruned", "--dry-run", folder)
    assert exit_code(*words) == 0
    assert "Nothing was uploaded" in capsys.readouterr().out
    assert tree(folder).keys() == {"patch.safetensors", "README.md"}
    assert (folder / "patch.safetensors").read_bytes() == patch.read_bytes()
    card = (folder / "README.md").read_text()
    assert "3 pruned weights of the dense model" in card
    assert "| gain: budget 2.0 |" in card
    assert "3 of 20,000 pruned ones, 1.5 per 10,000, in 1 tensors" in card
    assert "hf download org/pruned --local-dir pruned" in card
    assert "## Measured" not in card
    for digest in ("d" * 64, "e" * 64):
        assert digest in card
    assert str(tmp_path) not in card
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata == {"library_name": "regraft", "tags": ["regraft", "pruning", "safety"]}
    with pytest.raises(RegraftError, match="is not empty"):
        publishing.write(patch, card, folder)


def test_the_card_of_trained_values_does_not_call_them_dense(patch: Path) -> None:
    assert "The values are exact dense values" in publishing.render(patch, NAME)
    trained = patch.with_name("trained.safetensors")
    save_patch(trained, Patch(load_patch(patch).tensors, {**ABOUT, "values": "trained"}))
    card = publishing.render(trained, NAME)
    assert "trained values of 3 pruned weights" in card
    assert "the values are trained, not the dense model's" in card
    assert "dense values" not in card


def test_rates_of_evaluations_are_in_the_card(patch: Path, tmp_path: Path) -> None:
    asked = examples(tmp_path / "data")
    folders = [
        evaluation(tmp_path / name, asked, attacks=attacks, refusals=1)
        for name, attacks in (("before", 15), ("after", 5))
    ]
    card = publishing.render(patch, NAME, dense="org/base", evaluated=folders)
    rows = [line.split("|") for line in card.splitlines() if line.startswith(("| 1. ", "| 2. "))]
    assert [row[1].strip() for row in rows] == ["1. before", "2. after"]
    assert "75.0 %" in rows[0][2]
    assert "25.0 %" in rows[1][2]
    assert "A lower ASR is no proof of safety" in card
    assert all(one.instruction not in card for one in asked), "no prompt is published"
    assert str(tmp_path) not in card
    other = evaluation(tmp_path / "other", asked[:-1], attacks=1, refusals=1)
    with pytest.raises(RegraftError, match="cannot be compared"):
        publishing.render(patch, NAME, evaluated=[*folders, other])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gain.safetensors", "no-owner"], "'no-owner' is no name on the hub; expected OWNER/NAME"),
        (["gain.safetensors", "a/b@main"], "'a/b@main' is no name on the hub"),
        (["gain.safetensors", NAME, "--dense", "/home/me/model"], "is no name on the hub"),
        (["gain.safetensors", ""], "'' is no name on the hub"),
        (["gain.safetensors", NAME, "--pruned", ""], "'' is no name on the hub"),
        (["none.safetensors", NAME], "does not exist"),
        (["secret.txt", NAME], "is damaged and cannot be read (a patch)"),
    ],
)
def test_bad_input(
    patch: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(patch.parent)
    assert exit_code("push", *words, "--dry-run", "out") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("out").exists()


def test_without_a_network(patch: Path, tmp_path: Path) -> None:
    """The tests are offline, and so the library says."""
    with pytest.raises(RegraftError, match=r"could not be uploaded: .*offline"):
        publishing.upload(patch, "---\n---\n", NAME)
    with pytest.raises(RegraftError, match="is not a folder here and could not be downloaded"):
        patch_file(Path(NAME))
    assert patch_file(Path("no/such.safetensors")) == Path("no/such.safetensors")
