"""The command line: one thin command a stage, and `run` for all of them.

A command is imported when it is called or asked for help. To list the commands none is imported, so
that `regraft --help` is there at once: the first line of each one's own help stands here too, and a
test keeps them equal.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

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
        "Run the main job on the bundled model: about ten minutes of one CPU core, no network.",
    ),
    "run": ("running:run", "Run a whole recipe: prune, realign, evaluate, report."),
    "data": ("making_data:app", "Make data: answers to calibration prompts, prompts as images."),
    "prune": (
        "pruning:prune",
        "Set the least important weights to 0, by Wanda or another pruner (--method).",
    ),
    "realign": (
        "realigning:app",
        "Restore pruned weights, so that the model refuses as before: write a patch.",
    ),
    "tune": (
        "tuning:app",
        "Search for a method's settings that give the lowest ASR within bounds, on validation "
        "prompts.",
    ),
    "apply": (
        "patching:apply",
        "Put one or several patches on a pruned checkpoint, or with --revert take them off again.",
    ),
    "export": (
        "patching:export",
        "Write a patch for another tool: an adapter of PEFT, or weight patches of vLLM.",
    ),
    "push": (
        "patching:push",
        "Put a patch on the hub, with a card: what it is for, how it was made and what it does.",
    ),
    "eval": (
        "evaluating:evaluate",
        "Answer suites greedily and report ASR, over-refusal and utility with 95 % intervals.",
    ),
    "check": (
        "evaluating:check",
        "Tell whether a compressed model is as safe as the dense one, within margins: exit code 0 "
        "yes, 1 no, 3 undecided.",
    ),
    "judge": ("judging:app", "Judge saved answers by other judges, or judges by people's labels."),
    "report": (
        "reporting:report",
        "Write a report: JSON, Markdown and one HTML page, of a finished run again or of "
        "evaluations.",
    ),
    "analyse": (
        "analysing:app",
        "Look into models and runs: layers, heads, importance, comparisons, a setting at many "
        "values, defences to compare with.",
    ),
}

GROUPS: Mapping[str, tuple[str, ...]] = {
    "Start here": ("demo", "run"),
    "Check a model": ("check", "eval", "judge", "report"),
    "Prune and restore": ("prune", "realign", "tune"),
    "Patches": ("apply", "export", "push"),
    "Look closer": ("data", "analyse"),
}

# One object a group for all applications of a process: they share the Apps of realign and tune.
_GROUPS = tuple(Group(title, sort_key=place) for place, title in enumerate(GROUPS))


def application(*, listed: bool) -> App:
    """All commands; `listed` with the descriptions that stand here instead of their own helps."""
    found = App(
        name="regraft",
        version=regraft.__version__,
        group_commands=Group("This program", sort_key=len(GROUPS)),
        default_parameter=Parameter(negative=()),
        help=(
            "Check whether compression took a vision-language model's refusals, and restore "
            "them.\n\n"
            "Start with `regraft demo`, which prunes, realigns and reports on a bundled model. "
            "MODEL, DENSE and PRUNED are folders with safetensors, hub ids, or the word demo for "
            "that model. With --debug an error shows where it came from."
        ),
    )
    for group, names in zip(_GROUPS, GROUPS.values(), strict=True):
        for index, name in enumerate(names):
            where, text = COMMANDS[name]
            own = text if listed else None
            found.command(f"regraft.cli.{where}", name=name, help=own, group=group, sort_key=index)
    return found


app = application(listed=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; for how it ends see `exits`."""
    prepare_streams()
    console = Console(stderr=True, emoji=False)
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        with joined():
            words = _joined([word for word in words if word != "--debug"])
            listed = not words or words[0].startswith("-")
            try:
                application(listed=listed)(words, exit_on_error=False, print_error=False)
            finally:
                finish()
    except BaseException as error:  # tokenizers' own panics are no Exceptions
        end(console, error, debug=debug)


def _joined(words: Sequence[str]) -> list[str]:
    """The words with `--data NAME PATH` as `--data NAME:PATH`; settings take a flag's one word."""
    if wrong := [word for word in words if "\0" in word]:
        raise RegraftError(f"{wrong[0]!r} holds a NUL, which nothing here may be called.")
    if wrong := [word for word in words if not is_text(word)]:
        raise RegraftError(f"{wrong[0]!r} is not UTF-8, as all names here must be. Rename it.")
    if not {"--data", "--validation"}.intersection(words):
        return list(words)
    from regraft.data.sources import words_of_first

    found: list[str] = []
    rest = list(words)
    while rest:
        option = found[-1:] in (["--data"], ["--validation"])
        count = words_of_first(rest) if option and not "".join(rest[1:2]).startswith("-") else 1
        found.append(":".join(rest[:count]))
        rest = rest[count:]
    return found
