"""The command line: one thin command a stage, and `run` for all of them.

A command is imported when it is called or asked for help, so that `regraft --help` is there at
once. What it says of itself here is the first line of its own help; a test keeps them equal.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from cyclopts import App, CycloptsError
from pydantic import ValidationError
from rich.console import Console

import regraft
from regraft.cli.exits import crash, fail, joined, leave
from regraft.errors import RegraftError

__all__ = ["app", "main"]

COMMANDS: Mapping[str, tuple[str, str]] = {
    "demo": (
        "running:demo",
        "Run the main job on the bundled model: about six minutes on two CPU cores, no network.",
    ),
    "run": ("running:run", "Run a whole recipe: prune, realign, evaluate, report."),
    "inspect": (
        "inspecting:inspect",
        "Show layers, heads, prunable weights and names on disk; loads no weights.",
    ),
    "data": ("making_data:app", "Make data: answers to calibration prompts, prompts as images."),
    "prune": (
        "pruning:prune",
        "Set the least important weights to 0, by Wanda or another pruner (--method).",
    ),
    "realign": (
        "realigning:app",
        "Restore the pruned weights that carried safety: write their dense values as a patch.",
    ),
    "tune": (
        "tuning:app",
        "Search for a method's settings that give the lowest ASR within bounds, on validation "
        "prompts.",
    ),
    "apply": ("patching:apply", "Put one or several patches on a pruned checkpoint."),
    "revert": (
        "patching:revert",
        "Take one or several patches off a realigned checkpoint; gives the pruned bytes back.",
    ),
    "defend": (
        "defending:defend",
        "Make a defence at inference to compare with: a prompt or a refusal direction.",
    ),
    "eval": (
        "evaluating:evaluate",
        "Answer suites greedily and report ASR, over-refusal and utility with 95 % intervals.",
    ),
    "judge": ("judging:app", "Judge saved answers by other judges, or judges by people's labels."),
    "report": (
        "reporting:report",
        "Write a report: JSON, Markdown and one HTML page, of a finished run again or of "
        "evaluations.",
    ),
    "compare": (
        "reporting:compare",
        "Tell methods apart over finished runs: tests, intervals, verdicts and the trade-off plot.",
    ),
    "analyse": (
        "analysing:app",
        "Look into a model or a run: heads, importance, one setting at several values.",
    ),
}

app = App(
    name="regraft",
    version=regraft.__version__,
    help=(
        "Give a pruned vision-language model its safety back.\n\n"
        "Start with `regraft demo`, which prunes, realigns and reports on a bundled model. "
        "MODEL is always a folder with safetensors, a hub id, or the word demo for that model."
    ),
)
for _name, (_where, _text) in COMMANDS.items():
    app.command(
        f"regraft.cli.{_where}", name=_name, help=_text, sort_key=list(COMMANDS).index(_name)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 on bad input, having written nothing."""
    console = Console(stderr=True, emoji=False)
    try:
        with joined():
            words = _joined(sys.argv[1:] if arguments is None else arguments)
            app(words, exit_on_error=False, print_error=False)
    except RegraftError as error:
        fail(console, str(error))
    except ValidationError as error:
        fail(console, _explained(error))
    except CycloptsError as error:
        cause = error.__cause__
        if isinstance(cause, ValidationError):
            fail(console, _explained(cause))
        fail(console, str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            crash(console)
        fail(
            console,
            "The device is out of memory. Lower --batch-size (in a recipe compute.batch_size), in "
            "scoring heads --tokens-per-pass (heads.tokens_per_pass): what is finished stays. Or, "
            "in a new output, keep one layer at a time on the device: --placement streamed "
            "(compute.placement).",
        )
    except KeyboardInterrupt:
        console.print("Interrupted. The same command continues where it stopped.")
        leave(130)
    except Exception:
        crash(console)


def _explained(error: ValidationError) -> str:
    from regraft.settings.base import explain

    return explain(error, flags=True)


def _joined(words: Sequence[str]) -> list[str]:
    """The words with `--data NAME PATH` as `--data NAME:PATH`; settings take a flag's one word."""
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
