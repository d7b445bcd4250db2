"""The command line: one thin command a stage, and `run` for all of them.

Every command is here with the module it is in, and is registered below.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError
from pydantic import ValidationError
from rich.console import Console

import regraft
from regraft import ranks
from regraft.cli.analysing import overlap, relate, sweep
from regraft.cli.defending import defend
from regraft.cli.evaluating import evaluate
from regraft.cli.exits import crash, fail, leave
from regraft.cli.inspecting import inspect
from regraft.cli.judging import judge, judge_bench
from regraft.cli.patching import apply, revert
from regraft.cli.pruning import prune
from regraft.cli.realigning import app as realign
from regraft.cli.rendering import render
from regraft.cli.reporting import compare, report
from regraft.cli.responding import respond
from regraft.cli.running import demo, recipe, run
from regraft.cli.scoring import heads, statistics
from regraft.cli.tuning import app as tune
from regraft.data.sources import words_of_first
from regraft.errors import RegraftError
from regraft.settings.base import explain

__all__ = ["app", "main"]

app = App(
    name="regraft",
    version=regraft.__version__,
    help=(
        "Give a pruned vision-language model its safety back.\n\n"
        "Start with `regraft demo`, which prunes, realigns and reports on a bundled model. "
        "MODEL is always a folder with safetensors, a hub id, or the word demo for that model."
    ),
)
app.command(inspect)
app.command(respond)
app.command(prune)
app.command(heads)
app.command(statistics)
app.command(realign)
app.command(tune)
app.command(apply)
app.command(revert)
app.command(defend)
app.command(evaluate, name="eval")
app.command(sweep)
app.command(relate)
app.command(overlap)
app.command(render)
app.command(judge)
app.command(judge_bench, name="judge-bench")
app.command(report)
app.command(compare)
app.command(run)
app.command(demo)
app.command(recipe)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 on bad input, having written nothing."""
    console = Console(stderr=True, emoji=False)
    try:
        with ranks.joined():
            words = _joined(sys.argv[1:] if arguments is None else arguments)
            app(words, exit_on_error=False, print_error=False)
    except RegraftError as error:
        fail(console, str(error))
    except ValidationError as error:
        fail(console, explain(error, flags=True))
    except CycloptsError as error:
        cause = error.__cause__
        if isinstance(cause, ValidationError):
            fail(console, explain(cause, flags=True))
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


def _joined(words: Sequence[str]) -> list[str]:
    """The words with `--data NAME PATH` as `--data NAME:PATH`; settings take a flag's one word."""
    found: list[str] = []
    rest = list(words)
    while rest:
        option = found[-1:] in (["--data"], ["--validation"])
        count = words_of_first(rest) if option and not "".join(rest[1:2]).startswith("-") else 1
        found.append(":".join(rest[:count]))
        rest = rest[count:]
    return found
