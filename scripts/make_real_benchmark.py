#!/usr/bin/env python3
"""Write the data of `recipes/real-methods.yaml`: prompts, and the dense model's answers to them.

    python scripts/make_real_benchmark.py MODEL --data DATA --out runs/real-data

MODEL is the dense model, a folder or hub id, with or without vision. DATA holds `prompts/`
(AdvBench, HarmBench, JailbreakBench, StrongREJECT, MaliciousInstruct), `figstep/safebench.csv` and
`xstest/xstest_prompts.csv`; `real_prompts.py` says which source goes into which split. The script
writes

- `calibration-0.jsonl`, `-1`, `-2`: one file per calibration seed (--seeds 1 writes the first
  alone), no prompt in two of them, at least --samples of each kind with a response.
- `validation.jsonl`, `test.jsonl`, `confirmation.jsonl` (a second test): their prompts.
- `summary.json`: how many of each source, near-duplicates removed, answers left out and why.
- with --images, `test-images/examples.jsonl`: the test prompts as typographic images.

A prompt has the dense model's greedy answer as its response if the answer is usable: it refuses a
harmful prompt or answers a harmless one, and is neither blank nor degenerate
(`regraft.stages.answering.judged`). Harmful prompts of the two tests have no response. Methods that
learn from responses draw prompts that have one; gain draws from all, since it learns from any
answer of the dense model. Answers end after --new-tokens: use the same limit in the evaluation, so
that similarity to them measures content. A stopped run can be continued.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

import real_prompts

from regraft.console import ConsoleProgress
from regraft.data.example import Example, Reading
from regraft.data.formats import read_jsonl
from regraft.data.typographic import find_font, write_typographic
from regraft.disk.files import digest, write_json, write_text
from regraft.errors import RegraftError
from regraft.evaluation.generate import generate
from regraft.evaluation.keywords import DEFAULT_JUDGE
from regraft.loading import load
from regraft.models.load import Source, open_source
from regraft.progress import Progress
from regraft.settings.compute import ComputeSettings
from regraft.stages.answering import Response, judged

Summary = dict[str, Any]


@dataclass(frozen=True)
class Maker:
    """Writes the benchmark's files for one model.

    Args:
        dense: The model that answers the prompts.
        out: The output folder.
        compute: Device, dtype, batch size.
        progress: Progress.
        samples: Least number of calibration prompts with a response, per kind and seed.
        new_tokens: Length limit of an answer.
        seeds: How many calibration seeds to write a file for.
    """

    dense: Source
    out: Path
    compute: ComputeSettings
    progress: Progress
    samples: int = 64
    new_tokens: int = 24
    seeds: int = real_prompts.SEEDS

    def build(self, data: Path, *, images: bool = False, font: Path | None = None) -> Summary:
        """Write all files; returns what `summary.json` says.

        Raises:
            RegraftError: a source is missing or unreadable, the dense model gives too few usable
                answers, or `images` is set for a model without vision.
        """
        if images:
            find_font(font)
            if not self.dense.has_vision:
                raise RegraftError(f"{self.dense.folder} reads text only: leave out --images.")
        splits = real_prompts.splits(data)
        self.out.mkdir(parents=True, exist_ok=True)
        files = {}
        for name, prompts, references_only in (
            ("test", splits.test, True),
            ("validation", splits.validation, False),
            ("confirmation", splits.confirmation, True),
        ):
            reading = self._answered(prompts, references_only=references_only)
            files[name] = _write(self.out / f"{name}.jsonl", reading)
        for seed, prompts in enumerate(splits.candidates[: self.seeds]):
            name = f"calibration-{seed}"
            files[name] = _write(self.out / f"{name}.jsonl", self._calibration(seed, prompts))
        if images:
            files["test-images"] = self._draw(splits.test, font)
        summary = {
            "model": str(self.dense.folder),
            "fingerprint": self.dense.checkpoint.fingerprint,
            "dtype": self.compute.dtype,
            "new tokens": self.new_tokens,
            "judge": DEFAULT_JUDGE.name,
            "near-duplicates removed": dict(splits.removed),
            "files": files,
        }
        write_json(self.out / "summary.json", summary)
        return summary

    def _answered(self, prompts: Sequence[Example], *, references_only: bool) -> Reading:
        """The prompts, with usable answers as responses.

        With `references_only` only the harmless ones are answered. `skipped` counts the answers
        that are left out; their prompts stay.
        """
        asked = [one for one in prompts if not (references_only and one.harmful)]
        answers = {one.id: one for one in self._answers(asked)}
        left_out = Counter(
            f"no response ({'harmful' if one.harmful else 'harmless'}: {answers[one.id].why})"
            for one in asked
            if not answers[one.id].kept
        )
        kept = {name: answer.answer for name, answer in answers.items() if answer.kept}
        examples = tuple(replace(one, response=kept.get(one.id)) for one in prompts)
        return Reading("the benchmark", examples, left_out)

    def _answers(self, prompts: Sequence[Example]) -> list[Response]:
        """The dense model's judged answers; finished batches are kept for a resumed run."""
        content = digest(
            self.dense.checkpoint.fingerprint,
            *(f"{one.id} {one.instruction} {one.request}" for one in prompts),
            *map(str, (self.new_tokens, self.compute.dtype, self.compute.batch_size)),
        )
        partial = self.out / "answers" / content[:16]
        partial.mkdir(parents=True, exist_ok=True)
        model, processor = self._loaded
        with self.progress.task("Writing references", len(prompts), "answers") as done:
            texts = generate(
                model,
                processor,
                prompts,
                partial,
                max_new_tokens=self.new_tokens,
                batch_size=self.compute.batch_size,
                advance=done,
            )
        return [judged(one, text) for one, text in zip(prompts, texts, strict=True)]

    @cached_property
    def _loaded(self) -> tuple[nn.Module, Any]:
        """The dense model and its processor, loaded once for all files."""
        return load(self.dense, self.compute, self.progress)

    def _calibration(self, seed: int, prompts: Sequence[Example]) -> Reading:
        """All prompts of the seed, with enough usable answers of each kind."""
        reading = self._answered(prompts, references_only=False)
        for harmful, does in ((True, "refuses"), (False, "answers")):
            found = [one for one in reading.examples if one.harmful == harmful and one.response]
            if len(found) < self.samples:
                raise RegraftError(
                    f"Calibration seed {seed}: the dense model {does} {len(found)} of the "
                    f"prompts that it should, and {self.samples} are needed. Lower --samples."
                )
        return reading

    def _draw(self, prompts: Sequence[Example], font: Path | None) -> dict[str, Any]:
        """The test prompts as images, with the dense model's answers to the harmless ones."""
        folder = self.out / "test-images"
        table = folder / "examples.jsonl"
        if not table.exists():
            bare = tuple(replace(one, response=None) for one in prompts)
            write_typographic(Reading("test", bare), folder, self.progress, font)
        drawn = read_jsonl(table).examples
        reading = self._answered(drawn, references_only=True)
        if left := len(prompts) - len(drawn):
            reading = replace(reading, skipped={**reading.skipped, "not drawn": left})
        return _write(table, reading)


def _write(path: Path, reading: Reading) -> dict[str, Any]:
    """Write the examples; returns the counts by kind and source, and what was left out."""
    examples = reading.examples
    write_text(path, "".join(_line(one, path.parent) for one in examples))
    return {
        "harmful": _count(one.category for one in examples if one.harmful),
        "harmless": _count(one.category for one in examples if not one.harmful),
        "with response": sum(one.response is not None for one in examples),
        "left out": dict(sorted(reading.skipped.items())),
    }


def _count(categories: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(categories).items()))


def _line(example: Example, folder: Path = Path()) -> str:
    """A row as `regraft` reads it from JSON lines."""
    row = {
        "id": example.id,
        "image": example.image and example.image.relative_to(folder).as_posix(),
        "instruction": example.instruction,
        "response": example.response,
        "harmful": example.harmful,
        "category": example.category,
        "request": example.request,
    }
    kept = {name: value for name, value in row.items() if value is not None}
    return json.dumps(kept, ensure_ascii=False) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="the dense model, a folder or hub id")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="where to write")
    parser.add_argument(
        "--samples",
        type=int,
        default=64,
        help="least number of calibration prompts with a response, per kind and seed",
    )
    parser.add_argument("--new-tokens", type=int, default=24, help="length limit of an answer")
    parser.add_argument(
        "--seeds",
        type=int,
        choices=range(1, real_prompts.SEEDS + 1),
        default=real_prompts.SEEDS,
        help="calibration seeds to write a file for; fewer take less time",
    )
    parser.add_argument("--images", action="store_true", help="also draw the test as images")
    parser.add_argument("--font", type=Path, help="font of the images (default: FreeMono Bold)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch-size", type=int, default=16)
    return parser.parse_args()


def main() -> int:
    """Run the command line."""
    args = _arguments()
    compute = ComputeSettings(device=args.device, dtype=args.dtype, batch_size=args.batch_size)
    try:
        maker = Maker(
            open_source(args.model),
            args.out,
            compute,
            ConsoleProgress(Console()),
            args.samples,
            args.new_tokens,
            args.seeds,
        )
        summary = maker.build(args.data, images=args.images, font=args.font)
    except (RegraftError, FileNotFoundError) as error:
        print(f"make_real_benchmark: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
