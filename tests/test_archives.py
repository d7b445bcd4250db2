"""Zip archives and the hub: what is unpacked where, and what is refused."""

from __future__ import annotations

import gc
import json
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from regraft.data import sources
from regraft.data.readers.vlguard import read_vlguard
from regraft.data.sources import DataSource, of_split, read
from regraft.data.storage import CACHE_VARIABLE, cached_image, kept_if_read, located, unpacked
from regraft.errors import PassingError, RegraftError
from regraft.stages.reading import read_suites


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def _zip(path: Path, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("__", "/"), content)
    return path


def test_an_archive_is_unpacked_once(tmp_path: Path, cache: Path) -> None:
    archive = _zip(tmp_path / "a.zip", a__b=b"1", c=b"2")
    folder = unpacked(archive)
    assert folder.is_relative_to(cache)
    assert (folder / "a" / "b").read_bytes() == b"1"
    (folder / "c").write_bytes(b"touched")
    assert unpacked(archive) == folder
    assert (folder / "c").read_bytes() == b"touched"
    _zip(archive, c=b"other")
    assert (unpacked(archive) / "c").read_bytes() == b"other"


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/out", "C:/out", "..\\out"])
def test_paths_that_leave_the_folder(tmp_path: Path, cache: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("good", b"1")
        info = zipfile.ZipInfo("x")
        info.filename = name
        archive.writestr(info, b"2")
    with pytest.raises(RegraftError, match="leaves the folder it is unpacked into"):
        unpacked(tmp_path / "a.zip")
    assert not cache.exists() or not any(cache.rglob("good"))
    assert not (tmp_path / "out").exists()


def test_links_and_broken_archives(tmp_path: Path, cache: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(RegraftError, match="'link' is a link"):
        unpacked(tmp_path / "a.zip")
    whole = _zip(tmp_path / "b.zip", a=b"x" * 1000).read_bytes()
    for content in (whole[: len(whole) // 2], b"no zip"):
        (tmp_path / "b.zip").write_bytes(content)
        with pytest.raises(RegraftError, match="not a whole zip file"):
            unpacked(tmp_path / "b.zip")
    damaged = whole.replace(b"x" * 1000, b"x" * 999 + b"y")
    (tmp_path / "b.zip").write_bytes(damaged)
    with pytest.raises(RegraftError, match="not a whole zip file"):
        unpacked(tmp_path / "b.zip")
    assert not any(path.name.startswith("b-") for path in cache.rglob("*"))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
def test_damage_is_told_whatever_the_compression(tmp_path: Path, cache: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("a", bytes(range(256)) * 40)
    whole = bytearray((tmp_path / "a.zip").read_bytes())
    for i in range(45, 75):
        whole[i] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(whole)
    with pytest.raises(RegraftError, match="not a whole zip file"):
        unpacked(tmp_path / "a.zip")


def test_a_name_that_the_disk_cannot_hold(tmp_path: Path, cache: Path) -> None:
    _zip(tmp_path / "a.zip", **{"x" * 300: b"1"})
    with pytest.raises(RegraftError, match=r"the entry 'x+' cannot be unpacked: .*too long"):
        unpacked(tmp_path / "a.zip")


def test_a_folder_may_be_called_zip(tmp_path: Path) -> None:
    (tmp_path / "a.zip").mkdir()
    (tmp_path / "a.zip" / "xstest_prompts.csv").write_text(
        "id,prompt,type,label,focus,note\n1,Hi?,homonyms,safe,,\n"
    )
    source = DataSource.model_validate(f"xstest:{tmp_path / 'a.zip'}")
    assert [one.instruction for one in read(source).examples] == ["Hi?"]


def _vlguard(folder: Path) -> None:
    folder.mkdir()
    rows = [{"id": "1", "image": "f/1.png", "safe": False, "harmful_category": "c"}]
    rows[0]["instr-resp"] = [{"instruction": "i", "response": "r"}]  # type: ignore[assignment]
    (folder / "test.json").write_text(json.dumps(rows))


@pytest.mark.parametrize("inside", ["", "test/"])
def test_vlguards_images_may_be_in_its_archive(tmp_path: Path, cache: Path, inside: str) -> None:
    _vlguard(tmp_path / "v")
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    content = (tmp_path / "1.png").read_bytes()
    _zip(tmp_path / "v" / "test.zip", **{f"{inside}f/1.png": content})
    (example,) = read_vlguard(tmp_path / "v" / "test.json").examples
    assert example.image is not None
    assert example.image.is_relative_to(cache)
    assert example.image.read_bytes() == content


def test_vlguards_archive_counts_where_the_other_split_is_unpacked(
    tmp_path: Path, cache: Path
) -> None:
    """Also where the unpacked one has an image of the same name."""
    _vlguard(tmp_path / "v")
    (tmp_path / "v" / "train" / "f").mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "v" / "train" / "f" / "1.png")
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "1.png")
    content = (tmp_path / "1.png").read_bytes()
    with zipfile.ZipFile(tmp_path / "v" / "test.zip", "w") as archive:
        archive.writestr("test/f/1.png", content)
    (example,) = read_vlguard(tmp_path / "v" / "test.json").examples
    assert example.image is not None
    assert example.image.read_bytes() == content
    (tmp_path / "v" / "test" / "f").mkdir(parents=True)
    own = tmp_path / "v" / "test" / "f" / "1.png"
    Image.new("RGB", (4, 4), "green").save(own)
    (example,) = read_vlguard(tmp_path / "v" / "test.json").examples
    assert example.image == own


def test_vlguards_archive_is_left_alone_beside_a_folder_of_images(
    tmp_path: Path, cache: Path
) -> None:
    _vlguard(tmp_path / "v")
    own = tmp_path / "v" / "images" / "f" / "1.png"
    own.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4), "green").save(own)
    (tmp_path / "v" / "test.zip").write_bytes(b"cut off")
    (example,) = read_vlguard(tmp_path / "v" / "test.json").examples
    assert example.image == own
    assert not cache.exists() or not list(cache.iterdir())


def test_splits_of_a_zipped_vlguard(tmp_path: Path, cache: Path) -> None:
    archive = tmp_path / "x.zip"
    source = DataSource.model_validate(f"vlguard:{archive}")
    with zipfile.ZipFile(archive, "w") as whole:
        whole.writestr("VLGuard/train.json", "[]")
    with pytest.raises(RegraftError, match=rf"^{archive}: .*no test\.json, only train\.json"):
        read(source, "test")
    assert not list(cache.rglob("train.json"))
    with zipfile.ZipFile(archive, "a") as whole:
        whole.writestr("VLGuard/test.json", "[]")
    for split in ("train", "test"):
        path = of_split(source, split).path  # type: ignore[arg-type]
        assert path is not None
        assert path.name == f"{split}.json"
        assert path.is_relative_to(cache)


def test_splits_of_vlguard_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    source = DataSource.model_validate("vlguard:hf:org/VLGuard#unsafe")
    (tmp_path / "train.json").write_text("[]")
    assert str(of_split(source, "train")) == f"vlguard:{tmp_path / 'train.json'}#unsafe"
    with pytest.raises(RegraftError, match=r"no test\.json, only train\.json"):
        of_split(source, "test")
    named = DataSource.model_validate("vlguard:hf:org/VLGuard/train.json")
    assert of_split(named, "test") == named


def test_a_data_set_may_be_a_zip_file(tmp_path: Path) -> None:
    header = b"id,prompt,type,label\n1,p,t,safe\n"
    archive = _zip(tmp_path / "x.zip", xstest__xstest_prompts=b"", __MACOSX__x=b"")
    with zipfile.ZipFile(archive, "w") as whole:
        whole.writestr("xstest-main/xstest_prompts.csv", header)
        whole.writestr("__MACOSX/x", b"")
    reading = read(DataSource.model_validate(f"xstest:{archive}"))
    assert [example.id for example in reading.examples] == ["xstest-1"]


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, **how: Any) -> str:
        asked.append((name, how))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "xstest_prompts.csv").write_text("id,prompt,type,label\n1,p,t,unsafe\n")
    source = DataSource.model_validate("xstest:hf:org/x.test@v1/xstest_prompts.csv#harmful")
    assert str(source) == "xstest:hf:org/x.test@v1/xstest_prompts.csv#harmful"
    assert len(read(source).examples) == 1
    how = {
        "repo_type": "dataset",
        "revision": "v1",
        "allow_patterns": ["xstest_prompts.csv"],
        "ignore_patterns": None,
    }
    assert asked == [("org/x.test", how)]
    assert located(Path("hf:org/x")) == tmp_path
    located(Path("hf:org/x/sets/test.json"))
    assert [how["allow_patterns"] for _, how in asked[1:]] == [None, None], "images lie beside"
    assert located(Path("~/x")) == Path.home() / "x"


@pytest.mark.parametrize(
    "error",
    [LocalEntryNotFoundError("offline"), RuntimeError("lost"), TimeoutError()],
    ids=["no network", "as hf_xet's", "without a word"],
)
def test_the_hub_without_a_network(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    reason = str(error) or "TimeoutError"
    with pytest.raises(
        RegraftError, match=rf"could not be downloaded from the hub: {reason}\..*a copy on"
    ):
        located(Path("hf:org/x/test.json"))
    with pytest.raises(RegraftError, match="names no data set on the hub"):
        located(Path("hf:org"))


def test_a_zip_of_one_file(tmp_path: Path) -> None:
    archive = _zip(tmp_path / "p.zip", deep__p=b"")
    with zipfile.ZipFile(archive, "w") as whole:
        whole.writestr("deep/p.csv", b"goal\nDo\n")
    reading = read(DataSource.model_validate(f"prompts:{archive}"))
    assert [example.instruction for example in reading.examples] == ["Do"]


def test_damage_inside_an_archive(tmp_path: Path, cache: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as whole:
        whole.writestr("a", bytes(range(256)) * 400)
    content = bytearray(archive.read_bytes())
    content[60:90] = bytes(30)
    archive.write_bytes(bytes(content))
    with pytest.raises(RegraftError, match="not a whole zip file"):
        unpacked(archive)
    assert not any(path.name.startswith("a-") for path in cache.rglob("*"))


def test_processes_that_unpack_at_once(tmp_path: Path, cache: Path) -> None:
    archive = _zip(tmp_path / "a.zip", **{f"d__{i}": b"x" * 1000 for i in range(300)})
    code = "import sys; from pathlib import Path; from regraft.data.storage import unpacked; "
    code += "from regraft.data.storage import cached_image; print(unpacked(Path(sys.argv[1]))); "
    code += "[cached_image(str(i).encode()) for i in range(100)]"
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, str(archive)], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    said = {job.communicate()[0] for job in jobs}
    assert [job.returncode for job in jobs] == [0, 0, 0]
    assert len(said) == 1


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(RegraftError, match=f"a file where a folder .* {CACHE_VARIABLE}"):
        cached_image(b"x")


def test_what_is_refused_leaves_the_cache(tmp_path: Path, cache: Path) -> None:
    _zip(tmp_path / "a.zip", **{"a.jsonl": b'{"instruction": 5}'})
    with pytest.raises(RegraftError, match=r"a\.zip"):
        read_suites(None, [DataSource(name="jsonl", path=tmp_path / "a.zip")], None)
    assert {path.name for path in cache.rglob("*") if path.is_file()} == {".lock"}


def test_a_full_disk_is_no_bad_archive(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what is finished of a run is kept."""
    _zip(tmp_path / "a.zip", **{"a.jsonl": b'{"instruction": "q", "harmful": true}'})

    def full(*_: Any) -> None:
        raise PassingError("The disk is full.")

    monkeypatch.setattr(sources, "_read", full)
    with pytest.raises(PassingError, match=r"^The disk is full\.$"):
        read(DataSource(name="jsonl", path=tmp_path / "a.zip"))


def test_folders_in_folders(tmp_path: Path, cache: Path) -> None:
    archive = _zip(tmp_path / "a.zip", **{"a/" * 1500 + "x.jsonl": b""})
    with pytest.raises(RegraftError, match=r"a\.zip: the entry 'a/a/.* .*is 1,501 folders deep"):
        unpacked(archive)
    assert not [path for path in cache.rglob("*") if path.name.startswith("a-")]


def test_what_inner_blocks_wrote_goes_if_an_outer_one_fails_and_else_is_forgotten() -> None:
    with kept_if_read(), kept_if_read():
        kept = cached_image(b"kept")
    assert kept.exists()
    assert not [one for one in gc.get_referrers(kept) if isinstance(one, list)]
    with pytest.raises(RegraftError, match="late"), kept_if_read():
        with kept_if_read():
            refused = cached_image(b"refused")
        assert refused.exists()
        raise RegraftError("late")
    assert kept.exists() and not refused.exists()
