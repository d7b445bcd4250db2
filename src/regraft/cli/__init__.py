"""The command line: one thin command a stage, and `run` for all of them.

A command is imported when it is called or asked for help. To list the commands none is imported, so
that `regraft --help` is there at once: the first line of each one's own help stands here too, and a
test keeps them equal.
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
        "Run the main job on the bundled model: about ten minutes of one CPU core, no network.",
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
        "Restore pruned weights, so that the model refuses as before: write a patch.",
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
    "analyse": (
        "analysing:app",
        "Look into models and runs: heads, importance, comparisons, a setting at many values.",
    ),
}


def application(*, listed: bool) -> App:
    """All commands; `listed` with the descriptions that stand here instead of their own helps."""
    found = App(
        name="regraft",
        version=regraft.__version__,
        help=(
            "Restore the refusals that pruning took from a vision-language model.\n\n"
            "Start with `regraft demo`, which prunes, realigns and reports on a bundled model. "
            "MODEL, DENSE and PRUNED are folders with safetensors, hub ids, or the word demo for "
            "that model."
        ),
    )
    for index, (name, (where, text)) in enumerate(COMMANDS.items()):
        own = text if listed else None
        found.command(f"regraft.cli.{where}", name=name, help=own, sort_key=index)
    return found


app = application(listed=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 on bad input, having written nothing."""
    console = Console(stderr=True, emoji=False)
    try:
        with joined():
            words = _joined(sys.argv[1:] if arguments is None else arguments)
            listed = not words or words[0].startswith("-")
            application(listed=listed)(words, exit_on_error=False, print_error=False)
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
        on_cpu = "DefaultCPUAllocator" in str(error)
        if type(error).__name__ != "OutOfMemoryError" and not on_cpu:
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
