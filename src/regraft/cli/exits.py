"""How the program ends on an error: a message on standard error, and an exit code.

2    bad input or an impossible request: the message says what and where
70   a fault of regraft: a report with the details is saved, and the message has its path
130  interrupted
141  the reader of standard output closed it, as `head` does
"""

from __future__ import annotations

import errno
import os
import platform
import re
import sys
import tempfile
import traceback
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import NoReturn, TextIO

from cyclopts import CycloptsError
from pydantic import ValidationError
from rich.console import Console

import regraft
from regraft.errors import RegraftError, is_device_memory, is_host_memory
from regraft.launcher import processes

BAD, FAULT, INTERRUPTED, BROKEN_PIPE = 2, 70, 130, 141
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # characters that control a terminal
_SHORTEST_SECRET = 8  # characters; shorter values may be ordinary words
_MEMORY = (
    "is out of memory. Lower --batch-size (in a recipe: compute.batch_size) or, in scoring heads, "
    "--tokens-per-pass (heads.tokens_per_pass); finished work stays. "
)
_DEVICE = (
    f"The device {_MEMORY}Or, with a new output, keep one layer at a time on the device: "
    "--placement streamed (compute.placement)."
)
_HOST = (
    f"This machine {_MEMORY}Or, with a new output, use a smaller dtype, --dtype bfloat16 "
    "(compute.dtype), or leave the weights in their files, --placement streamed "
    "(compute.placement)."
)


_THREADS = (
    "No more threads can be started: this process may use too little memory or too few threads. "
    "Raise the limits (`ulimit -v`, `ulimit -u`, or the container's); finished work stays."
)


def joined() -> AbstractContextManager[None]:
    """Join the other processes, if a launcher started this one as one of several.

    Raises:
        RegraftError: the launcher's environment variables are invalid.
    """
    if processes() < 2:
        return nullcontext()  # without importing torch, so that help is fast
    from regraft import distributed

    return distributed.joined()


def prepare_streams() -> None:
    """Make standard output and error writable, even if this process was started without them.

    Otherwise the next file that is opened would get the number of a closed stream, and what is
    printed would go into it. Characters outside the terminal's encoding are printed as escapes.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
        stream: TextIO = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def finish() -> None:
    """Flush standard output here, since an error in Python's own flush at exit would be lost.

    Raises:
        OSError: it cannot be written.
    """
    try:
        sys.stdout.flush()
    except OSError:
        _silence()
        raise


def fail(console: Console, message: str, code: int = BAD) -> NoReturn:
    shown = _CONTROL.sub(lambda found: repr(found[0])[1:-1], message.strip())
    with suppress(OSError, SystemExit):  # the latter of rich, see `end`
        console.print("[bold red]Error:[/] ", end="")
        console.print(shown, markup=False, highlight=False, soft_wrap=True)
    leave(code)


def end(console: Console, error: BaseException, *, debug: bool) -> NoReturn:
    """End the program after an error, with a message for the user and, if `debug`, a traceback."""
    if debug and not isinstance(error, SystemExit):
        sys.stderr.write(_redacted("".join(traceback.format_exception(error))))
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
        error = error.__context__  # for which rich ends with 1, the code of a failed check
    if isinstance(error, SystemExit):
        raise error
    if isinstance(error, KeyboardInterrupt):
        console.print("Interrupted. The same command continues where it stopped.")
        leave(INTERRUPTED)
    if isinstance(error, BrokenPipeError):
        _silence()
        leave(BROKEN_PIPE)
    message = _message(error)
    if message is not None:
        fail(console, message)
    fail(console, _report(error), FAULT)


def _message(error: BaseException) -> str | None:
    """The message for an error that the user can do something about; None for other errors."""
    if isinstance(error, ValidationError):
        from regraft.settings.base import explain

        return explain(error, flags=True)
    if isinstance(error, RegraftError):
        return str(error)
    if isinstance(error, CycloptsError):
        inner = error.__cause__
        return _message(inner) if isinstance(inner, ValidationError) else str(error)
    if is_device_memory(error):
        return _DEVICE
    if is_host_memory(error):
        return _HOST
    if str(error) == "can't start new thread":
        return _THREADS
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno == errno.ENOMEM:
            return _HOST
        place = error.filename or "Standard output or a file cannot be written"
        return f"{place}: {error.strerror}."
    if model := _model_in_transformers(error):
        return (
            f"transformers cannot run {model} ({_summary(error)}). A value of its config.json, its "
            "processor, its tokenizer or its chat template is wrong, or it was made for another "
            "version of transformers; otherwise it is a fault of regraft. --debug shows where."
        )
    return None


def _model_in_transformers(error: BaseException) -> str:
    """The model whose code in transformers raised the error; "" if other code raised it.

    That code does not check the values of a config.json.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]
    packages = (str(one.f_globals.get("__name__")).partition(".")[0] for one in frames)
    # Other frames may be of torch, or of a package for quantised weights.
    if next((one for one in packages if one in ("transformers", "regraft")), "") != "transformers":
        return ""
    owners = (frame.f_locals.get("self") for frame in frames)
    configs = (getattr(one, "config", None) for one in owners)
    folders = (getattr(one, "name_or_path", "") for one in configs)
    folder = next(filter(None, folders), "")
    if not folder:
        return "the model"
    from regraft.models.model_settings import disagreement

    return f"the model of {folder}{disagreement(Path(folder))}"


def _summary(error: BaseException) -> str:
    return _redacted(f"{type(error).__name__}: {error}").partition("\n")[0][:200]


def _report(error: BaseException) -> str:
    """Save the details of a fault to a file; return the message for the user."""
    details = _redacted("".join(traceback.format_exception(error)))
    about = f"regraft {regraft.__version__}, Python {platform.python_version()}\n"
    try:
        number, name = tempfile.mkstemp(".txt", "regraft-fault-")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:  # noqa: PTH123
            file.write(about + details)
    except OSError:
        where = "--debug shows the details"
    else:
        report_id = Path(name).stem.removeprefix("regraft-fault-")
        where = f"Report {report_id}: the details are in {name}, and --debug shows them"
    whose = "This is a fault of regraft, or a file that it should have refused"
    if package := _plugin(error):
        whose = f"This is a fault of a plug-in, in the package {package}"
    return f"{whose} ({_summary(error)}). {where}. Finished work stays."


def _plugin(error: BaseException) -> str:
    """The package of a plug-in whose code raised the error; "" if other code raised it."""
    groups = [one for one in entry_points().groups if one.startswith("regraft.")]
    found = (plugin for group in groups for plugin in entry_points(group=group))
    packages = {re.split(r"\W", one.value, maxsplit=1)[0] for one in found}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]
    names = (str(one.f_globals.get("__name__")).partition(".")[0] for one in frames)
    # Other frames may be of torch, or of another library that either calls.
    innermost = next((one for one in names if one in {*packages, "regraft"}), "")
    return innermost if innermost != "regraft" else ""


def _redacted(text: str) -> str:
    """Replace secrets from the environment in a text; they are used stripped of white space."""
    for name, value in os.environ.items():
        if any(one in name.upper() for one in _SECRET):
            for key in (value, value.strip()):
                text = text.replace(key, "***") if len(key) >= _SHORTEST_SECRET else text
    return text


def _silence() -> None:
    """Discard what is still buffered, which Python would flush at exit."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


def leave(code: int) -> NoReturn:
    """Flush the output and end this process."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _silence()
    if "torch" not in sys.modules:
        raise SystemExit(code)
    from regraft import distributed

    distributed.leave(code)
