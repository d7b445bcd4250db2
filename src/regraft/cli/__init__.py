"""The command line: one thin command per stage, and `run` for all of them.

A command is imported only when it is called or its help is shown. To keep `regraft --help` fast,
the first line of each command's help is repeated here; a test keeps both equal.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from cyclopts import App, Group, Parameter
from rich.console import Console

import regraft
from regraft.cli.exits import end, finish, joined, prepare_streams
from regraft.disk.paths import is_text
from regraft.errors import RegraftError

__all__ = ["app", "main"]

COMMANDS: Mapping[str, tuple[str, str]] = {
    "demo": (
        "running:demo",
        "Run an example recipe on the bundled model: about ten minutes on a CPU core, no network.",
    ),
    "run": ("running:run", "Run a whole recipe: prune, realign, evaluate, report."),
    "data": ("making_data:app", "Make data: the model's answers to prompts, or prompts as images."),
    "prune": (
        "pruning:prune",
        "Set the least important weights to 0, by Wanda or another pruner (--method).",
    ),
    "realign": (
        "realigning:app",
        "Restore pruned weights so that the model refuses as before; writes a patch.",
    ),
    "tune": (
        "realigning:tune_app",
        "Search for a method's settings that give the lowest ASR within bounds, on validation "
        "prompts.",
    ),
    "apply": (
        "patching:apply",
        "Apply patches to a pruned checkpoint, or remove them again with --revert.",
    ),
    "export": (
        "patching:export",
        "Convert a patch for another tool: a PEFT adapter or vLLM weight patches.",
    ),
    "push": (
        "patching:push",
        "Upload a patch to the hub with a card: what it is for, how it was made, what it does.",
    ),
    "eval": (
        "evaluating:evaluate",
        "Evaluate a model on test suites: ASR, over-refusal and utility with 95 % intervals.",
    ),
    "check": (
        "evaluating:check",
        "Check whether a compressed model is as safe as the dense one, within margins: exit code "
        "0 yes, 1 no, 3 undecided.",
    ),
    "judge": (
        "judging:app",
        "Judge saved answers with other judges, or measure judges against human labels.",
    ),
    "report": (
        "running:report",
        "Write a report (JSON, Markdown, HTML) on evaluations, or rewrite that of a finished run.",
    ),
    "analyse": (
        "analysing:app",
        "Analyse models and runs: layers, heads, importance, comparisons, sweeps, baseline "
        "defences.",
    ),
}

GROUPS: Mapping[str, tuple[str, ...]] = {
    "Start here": ("demo", "run"),
    "Check a model": ("check", "eval", "judge", "report"),
    "Prune and restore": ("prune", "realign", "tune"),
    "Patches": ("apply", "export", "push"),
    "Data and analyses": ("data", "analyse"),
}

# The same objects for all applications of a process, since they share the Apps of some commands.
_GROUPS = tuple(Group(title, sort_key=place) for place, title in enumerate(GROUPS))
_OPTIONS = Group("Options", sort_key=len(GROUPS))


def shown_default(default: object) -> str | None:
    """A default as help shows it; None for one that only means "not given"."""
    if isinstance(default, tuple):
        default = ", ".join(map(str, default)) or None
    return None if default is None or default is False else str(default)


def application(*, listed: bool) -> App:
    """Build the application; if `listed`, with the descriptions above as the commands' helps."""
    built = App(
        name="regraft",
        version=regraft.__version__,
        suppress_keyboard_interrupt=False,  # cyclopts would end the program without our message
        default_parameter=Parameter(negative=(), show_default=shown_default),
        help=(
            "Check whether compression removed a vision-language model's refusals, and restore "
            "them.\n\n"
            "Start with `regraft demo`, which prunes, realigns and evaluates a bundled model. "
            "MODEL, DENSE and PRUNED are folders with safetensors, hub ids, or `demo` for that "
            "model. With --debug, errors come with a traceback."
        ),
    )
    for flag in ("--help", "--version"):
        built[flag].group = _OPTIONS
    for group, names in zip(_GROUPS, GROUPS.values(), strict=True):
        for index, name in enumerate(names):
            where, text = COMMANDS[name]
            own = text if listed else None
            built.command(f"regraft.cli.{where}", name=name, help=own, group=group, sort_key=index)
    return built


app = application(listed=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `exits` describes how it ends."""
    prepare_streams()
    console = Console(stderr=True, emoji=False)
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        with joined():
            words = _joined([word for word in words if word != "--debug"])
            listed = not words or words[0].startswith("-")
            if not listed:
                _require_command(words[0])
            try:
                application(listed=listed)(words, exit_on_error=False, print_error=False)
            finally:
                finish()
    except BaseException as error:  # a panic of tokenizers is no Exception
        end(console, error, debug=debug)


def _require_command(name: str) -> None:
    """Raise if there is no such command; cyclopts would import all of them to say so."""
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, 1)
        meant = f"; did you mean {near[0]}?" if near else "."
        raise RegraftError(f"There is no command {name!r}{meant} Commands: {', '.join(COMMANDS)}.")


def _joined(words: Sequence[str]) -> list[str]:
    """Join `--data NAME PATH` to `--data NAME:PATH`, since a setting takes one word of a flag."""
    if wrong := [word for word in words if "\0" in word]:
        raise RegraftError(f"{wrong[0]!r} has a NUL character, which no argument may have.")
    if wrong := [word for word in words if not is_text(word)]:
        encoding = sys.getfilesystemencoding()
        locale = f"Python takes names for {encoding} in this locale: set PYTHONUTF8=1."
        fix = "Rename it." if encoding == "utf-8" else locale
        raise RegraftError(f"{wrong[0]!r} is not UTF-8, as all names must be. {fix}")
    if not {"--data", "--validation"}.intersection(words):
        return list(words)
    from regraft.data.sources import words_of_first

    joined_words: list[str] = []
    rest = list(words)
    while rest:
        option = joined_words[-1:] in (["--data"], ["--validation"])
        count = words_of_first(rest) if option and not "".join(rest[1:2]).startswith("-") else 1
        joined_words.append(":".join(rest[:count]))
        rest = rest[count:]
    return joined_words
