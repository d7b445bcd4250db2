"""Time of each stage as a multiple of bare passes of the same model over the same tokens.

    python benchmarks/stages.py                                       # the bundled model
    python benchmarks/stages.py --model MODEL --dtype bfloat16 --json stages.json

`bare` is the model's own forward pass with logits at the last position only, and for gain its
forward and backward pass through all states, without weight gradients. Both are measured in one
run, without loading models and writing checkpoints. The tokens are those that the stage reads:

- eval: prompts with the answers that it wrote, read in one pass each, so its multiple is the cost
  of writing token by token;
- prune: the calibration data;
- heads: the prompts;
- gain: prompts of both kinds with the start of the dense model's answers. Its time is that of a
  mean step: the total divided by the number of steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measuring import save, timed, whole
from rich.console import Console
from rich.table import Table
from torch import nn

from regraft import stages
from regraft.data.collate import Batch, prompt_batch, response_batch
from regraft.data.example import Example
from regraft.data.sources import DataSource
from regraft.evaluation.greedy import checked_head
from regraft.heads.ships import HeadSettings
from regraft.loading import cut
from regraft.models.load import Source, load_model, load_processor, open_source, placed
from regraft.progress import Advance, Progress
from regraft.pruning.base import prune_settings
from regraft.restoration.methods.gain.method import GainSettings
from regraft.restoration.ranking import load_ranking
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.evaluating import EvalSettings
from regraft.stages import answering
from regraft.stages.answering import imitation_data
from regraft.stages.reading import draw_calibration, read_suites
from regraft.stages.restoring import plan_restoration

NOT_COUNTED = ("Loading", "Writing", "Checking")


class Clock(Progress):
    """Sums the seconds of all tasks except `NOT_COUNTED`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def task(self, what: str, total: int, unit: str = "") -> Iterator[Advance]:
        start = time.perf_counter()
        yield lambda _: None
        if not what.startswith(NOT_COUNTED):
            self.seconds += time.perf_counter() - start


def bare(model: nn.Module, data: Sequence[Batch], *, backward: bool = False) -> float:
    """Seconds of the model's own passes over all batches, after a warm-up on the first."""

    def run(batch: Batch) -> None:
        inputs = dict(placed(batch, model).inputs)
        with torch.set_grad_enabled(backward):
            found = model(**inputs, use_cache=False, logits_to_keep=1).logits
        if backward:
            found.float().logsumexp(-1).sum().backward()

    def input_gradient(_module: Any, _args: Any, states: torch.Tensor) -> torch.Tensor:
        return states.requires_grad_(True) if backward else states

    embedding = model.get_input_embeddings()  # type: ignore[operator]
    hook = embedding.register_forward_hook(input_gradient)
    try:
        with checked_head(model):
            run(data[0])
            return timed(embedding.weight.device, lambda: list(map(run, data)))[0]
    finally:
        hook.remove()


def measured(
    source: Source, options: argparse.Namespace, compute: ComputeSettings, work: Path
) -> list[dict[str, Any]]:
    """One row per stage: its seconds, and those of bare passes over the same tokens."""
    calibration = CalibrationSettings(
        data=options.data, samples=options.samples, responses=options.responses
    )
    suite, count = [options.suite], options.samples
    clocks = {name: Clock() for name in ("eval", "prune", "heads", "gain, a step")}
    asked = read_suites(source, suite, count).examples
    how = EvalSettings(limit=count, max_new_tokens=options.max_new_tokens)
    target = stages.Target(source, compute, progress=clocks["eval"])
    result = stages.evaluate_target(target, work / "ev", suite, how).result
    pruned = stages.prune_checkpoint(
        stages.Setup(source, calibration, compute, clocks["prune"]),
        work / "pruned",
        prune_settings(),
    )
    if options.heads:
        r_max = HeadSettings(r_max=min(5, count // 2))
        scored = stages.Setup(source, calibration, compute, clocks["heads"], scoring=r_max)
        stages.write_head_scores(scored, work / "heads")
    gain, places = GainSettings(count=options.count), stages.ArtifactPaths.beside(work / "gain")
    setup = stages.Setup(source, calibration, compute, progress=clocks["gain, a step"])
    plan_restoration(setup, pruned, gain, places).carry_out()
    steps = max(1, len(load_ranking(places.ranking).about["steps"]))

    said = {answer.id: answer.answer or "." for answer in result.answers}
    answered = [replace(one, response=said[one.id]) for one in asked]
    texts = texts_of(stages.Setup(source, calibration, compute), work, answered)
    if not options.heads:
        del texts["heads"]
    model = load_model(source, dtype=compute.dtype, device=compute.device)
    seconds = {stage: clock.seconds for stage, clock in clocks.items()}
    seconds["gain, a step"] /= steps
    return [compared(model, stage, data, seconds[stage]) for stage, data in texts.items()]


def texts_of(
    setup: stages.Setup, work: Path, answered: Sequence[Example]
) -> dict[str, list[Batch]]:
    """The texts that each stage reads, by its name; `answered` are the evaluation's prompts."""
    source, compute = setup.dense, setup.compute
    responses, processor = work / "pruned.responses", load_processor(source)
    learnt = answering.calibration_data(setup, responses, "utility").examples
    imitated = [one.examples for one in imitation_data(setup, responses).values()]
    prompts = draw_calibration(source, setup.calibration, "safety").examples

    def responses_of(examples: Sequence[Example]) -> list[Batch]:
        return [response_batch(processor, chunk) for chunk in cut(examples, compute)]

    return {
        "eval": responses_of(answered),
        "prune": responses_of(learnt),
        "heads": [prompt_batch(processor, chunk) for chunk in cut(prompts, compute)],
        "gain, a step": [batch for examples in imitated for batch in responses_of(examples)],
    }


def compared(model: nn.Module, stage: str, data: Sequence[Batch], seconds: float) -> dict[str, Any]:
    """The row of a stage: its seconds, and those of bare passes over the same tokens."""
    backward = stage.startswith("gain")
    plain = bare(model, data, backward=backward)
    what = "forward and backward" if backward else "forward"
    tokens = sum(int(batch.inputs["attention_mask"].sum()) for batch in data)
    row = {"stage": stage, "seconds": seconds, "bare": what, "bare_seconds": plain}
    return row | {"tokens": tokens, "multiple": seconds / plain}


def main() -> None:
    """Run all stages, print the table, save JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="demo:calibration", type=DataSource.model_validate)
    parser.add_argument("--suite", default="demo:test", type=DataSource.model_validate)
    parser.add_argument("--responses", choices=("given", "self"), default="given")
    parser.add_argument("--samples", type=whole, default=32, help="prompts of each kind")
    parser.add_argument("--count", type=whole, default=250, help="weights that gain may restore")
    parser.add_argument(
        "--heads",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the slowest stage",
    )
    parser.add_argument("--batch-size", type=whole, default=8)
    parser.add_argument("--max-new-tokens", type=whole, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    compute = ComputeSettings(
        device=options.device, dtype=options.dtype, batch_size=options.batch_size
    )
    source = open_source(options.model)
    with TemporaryDirectory() as work:
        rows = measured(source, options, compute, Path(work))
    title = f"{options.model}, {options.dtype}, {options.samples} prompts of each kind"
    table = Table("stage", "seconds", "tokens", "bare", "seconds", "multiple", title=title)
    for row in rows:
        cells = (f"{row['seconds']:.1f}", f"{row['tokens']:,}", row["bare"])
        table.add_row(row["stage"], *cells, f"{row['bare_seconds']:.2f}", f"{row['multiple']:.2f}")
    Console().print(table)
    about = {name: str(value) for name, value in vars(options).items()}
    content = {**about, "torch": torch.__version__, "threads": torch.get_num_threads()}
    save(options.json, {**content, "rows": rows})


if __name__ == "__main__":
    main()
