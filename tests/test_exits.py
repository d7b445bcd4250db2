"""How the program ends: streams that fail, launchers that say nonsense, faults of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from regraft.cli import exits, main
from regraft.cli.exits import BAD, BROKEN_PIPE, FAULT, INTERRUPTED
from regraft.errors import RegraftError
from regraft.launcher import processes

LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
HELP = f"{sys.executable} -m regraft.cli --help"
REFUSED = f"{sys.executable} -m regraft.cli $'\\xff'"  # no text: before commands are imported


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def ended(error: BaseException, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of a command in which this is raised."""

    def application(**_: object) -> object:
        def command(*_: object, **__: object) -> None:
            raise error

        return command

    monkeypatch.setattr("regraft.cli.application", application)
    with pytest.raises(SystemExit) as stopped:
        main(["prune", "demo", *words])
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (f"{HELP} > /dev/full", BAD, "No space left on device"),
        (f"{HELP} >&-", 0, ""),
        (f"{HELP} >&- 2>&-", 0, ""),
        (f"{HELP} | true; exit ${{PIPESTATUS[0]}}", BROKEN_PIPE, ""),
        (f"{REFUSED} 2>&1 | true; exit ${{PIPESTATUS[0]}}", BAD, ""),
        (f"PYTHONIOENCODING=ascii {HELP}", 0, ""),
    ],
)
def test_streams_that_cannot_be_written(command: str, code: int, message: str) -> None:
    """An end without a traceback, and not with 1, the code of a failed check."""
    done = shell(command)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert message in done.stderr
    assert bool(done.stderr) == bool(message)


def test_an_interrupted_command_says_that_it_continues(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("regraft.cli.running.read_recipe", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["run", "recipe.yaml", "--out", "run"])
    assert stopped.value.code == INTERRUPTED
    assert "The same command continues" in capsys.readouterr().err


def test_a_closed_stream_is_not_the_next_file(tmp_path: Path) -> None:
    """Whatever prints would write into the first file that is opened: here it goes nowhere."""
    file = tmp_path / "file"
    code = (
        "from regraft.cli.exits import prepare_streams; prepare_streams(); "
        f"f = open({str(file)!r}, 'wb'); import os; os.write(1, b'printed'); assert f.fileno() > 2"
    )
    assert shell(f'{sys.executable} -c "{code}" >&-').returncode == 0
    assert file.read_bytes() == b""


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; expected a number >= 1"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
        ({"WORLD_SIZE": "\u0662"}, "WORLD_SIZE is '\u0662'"),
        ({"RANK": "2"}, "RANK is '2'; expected a number from 0 to 1"),
        ({"RANK": None}, "RANK is not set"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
    ],
)
def test_nonsense_of_a_launcher(
    changed: dict[str, str | None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {**LAUNCHED, **changed}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(RegraftError, match=re.escape(message)):
        processes()
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == BAD
    assert message in capsys.readouterr().err.replace("\n", "")


def test_faults_have_a_report_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("SOME_API_KEY", "sk-very-secret")
    assert ended(KeyError("sk-very-secret"), monkeypatch) == FAULT
    message = capsys.readouterr().err
    (report,) = tmp_path.iterdir()
    assert message.startswith("Error: This is a fault of regraft")
    assert str(report) in message
    assert report.stem.removeprefix("regraft-fault-") in message.replace(str(report), "")
    assert "Traceback" not in message
    text = report.read_text()
    assert "Traceback" in text
    assert "KeyError" in text
    assert "sk-very-secret" not in text + message

    assert ended(KeyError("x"), monkeypatch, "--debug") == FAULT
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("--debug",)])
def test_a_key_with_a_line_end_around_it_is_told_nobody(
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Programs send it without the space around it, so that messages hold it like that."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("SOME_API_KEY", " sk-very-secret\n")
    assert ended(KeyError("bad key sk-very-secret."), monkeypatch, *words) == FAULT
    message = capsys.readouterr().err
    assert "bad key ***." in message
    assert ("Traceback" in message) == bool(words)
    (report,) = tmp_path.iterdir()
    assert "sk-very-secret" not in report.read_text() + message


def test_a_fault_without_a_place_for_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert ended(ZeroDivisionError(), monkeypatch) == FAULT
    assert "--debug shows the details" in capsys.readouterr().err


class PanicException(BaseException):
    """What a panic of tokenizers is in Python: no Exception."""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), BAD, "This machine is out of memory. Lower --batch-size"),
        (
            RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried"),
            BAD,
            "This machine is out of memory. Lower --batch-size",
        ),
        (RuntimeError("can't start new thread"), BAD, "No more threads can be started"),
        (OSError(12, "Cannot allocate memory"), BAD, "This machine is out of memory"),
        (OSError(36, "File name too long", "n" * 300), BAD, "nnn: File name too long."),
        (PermissionError(13, "Permission denied", "file"), BAD, "file: Permission denied."),
        (RecursionError("too deep"), FAULT, "RecursionError: too deep"),
        (PanicException("index out of range"), FAULT, "index out of range"),
        (KeyboardInterrupt(), INTERRUPTED, "The same command continues"),
        (BrokenPipeError(32, "Broken pipe"), BROKEN_PIPE, ""),
        (RegraftError("file: wrong"), BAD, "Error: file: wrong"),
    ],
)
def test_ends(
    error: BaseException,
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(exits, "_silence", lambda: None)  # pytest's own streams
    assert ended(error, monkeypatch) == code
    said = capsys.readouterr().err
    assert message in said.replace("\n", "")
    assert "Traceback" not in said
