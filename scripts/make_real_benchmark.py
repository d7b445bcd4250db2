#!/usr/bin/env python3
"""Write the data of `recipes/real-methods.yaml` for a model: prompts, and its own answers to them.

    python scripts/make_real_benchmark.py MODEL --data DATA --out runs/real-data

MODEL is the dense model, a folder or hub id, with or without vision. DATA holds `prompts/`
(AdvBench, HarmBench, JailbreakBench, StrongREJECT, MaliciousInstruct), `figstep/safebench.csv` and
`xstest/xstest_prompts.csv`; `real_prompts.py` says which goes into which split. Written are

- `calibration-0.jsonl`, `-1`, `-2`: the three seeds of calibration, no prompt in two of them. Each
  holds --samples harmful prompts that the dense model refuses and as many harmless ones that it
  answers, with its greedy answers.
- `validation.jsonl`, `test.jsonl`: all prompts of the split. Harmless ones, and harmful ones of
  validation, have the dense model's greedy answer as their response where it is of use.
- `summary.json`: how many of each source, near-duplicates removed, answers left out and why.
- with --images, `test-images/examples.jsonl`: the test prompts as typographic images.

An answer is of use if it refuses a harmful prompt, or answers a harmless one, and is neither blank
nor degenerate (`regraft.stages.answering.judged`). Answers end after --new-tokens: evaluate with as
many, so that similarity to them measures content. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import real_prompts

from regraft.console import ConsoleWatch
from regraft.data.example import Example, Reading
from regraft.data.jsonl import read_jsonl
from regraft.data.sources import DataSource
from regraft.data.typographic import find_font, write_typographic
from regraft.errors import RegraftError
from regraft.evaluation.generate import generate
from regraft.evaluation.keywords import DEFAULT_JUDGE
from regraft.files import digest, write_json, write_text
from regraft.models.load import Source, open_source
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.stages.answering import calibration_data, judged
from regraft.stages.common import load
from regraft.watch import Watch


def build(
    dense: Source,
    data: Path,
    out: Path,
    compute: ComputeSettings,
    watch: Watch,
    *,
    samples: int = 64,
    new_tokens: int = 48,
    images: bool = False,
) -> dict[str, Any]:
    """Write all files; returns what `summary.json` says.

    Raises:
        RegraftError: a source is missing or unreadable, the dense model gives too few answers of
            use, or `images` are wanted for a model without vision.
    """
    if images:
        find_font()
        if not dense.anatomy.has_vision:
            raise RegraftError(f"{dense.folder} reads text only: leave out --images.")
    splits = real_prompts.splits(data)
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {}
    for name, prompts in (("test", splits.test), ("validation", splits.validation)):
        readings = _answered(dense, prompts, out, compute, watch, new_tokens, test=name == "test")
        files[name] = _write(out / f"{name}.jsonl", readings)
    for seed, prompts in enumerate(splits.candidates):
        settings = CalibrationSettings(
            data=_candidates(out, seed, prompts),
            samples=samples,
            seed=seed,
            responses="self",
            max_response_tokens=new_tokens,
        )
        folder = out / "answers" / f"calibration-{seed}"
        readings = [
            calibration_data(dense, settings, compute, folder, watch, harmful=harmful)
            for harmful in (True, False)
        ]
        _require(readings, samples, seed)
        files[f"calibration-{seed}"] = _write(out / f"calibration-{seed}.jsonl", readings)
    if images:
        files["test-images"] = _draw(dense, splits.test, out, compute, watch, new_tokens)
    summary = {
        "model": str(dense.folder),
        "fingerprint": dense.checkpoint.fingerprint,
        "dtype": compute.dtype,
        "new tokens": new_tokens,
        "judge": DEFAULT_JUDGE.name,
        "near-duplicates removed": dict(splits.removed),
        "files": files,
    }
    write_json(out / "summary.json", summary)
    return summary


def _answered(
    dense: Source,
    prompts: Sequence[Example],
    out: Path,
    compute: ComputeSettings,
    watch: Watch,
    new_tokens: int,
    *,
    test: bool,
) -> list[Reading]:
    """The prompts with the answers that are of use as responses; none for harmful test prompts."""
    asked = [one for one in prompts if not (test and one.harmful)]
    answers = _answers(dense, asked, out, compute, watch, new_tokens)
    by_id = {one.id: one for one in answers}
    kept = []
    left_out: Counter[str] = Counter()
    for prompt in prompts:
        found = by_id.get(prompt.id)
        if found is not None and not found.kept:
            left_out[f"{'harmful' if prompt.harmful else 'harmless'}: {found.why}"] += 1
        kept.append(replace(prompt, response=found.answer if found and found.kept else None))
    reading = Reading("the benchmark", tuple(kept), {})
    return [replace(reading, skipped={f"no response ({k})": n for k, n in left_out.items()})]


def _answers(
    dense: Source,
    prompts: Sequence[Example],
    out: Path,
    compute: ComputeSettings,
    watch: Watch,
    new_tokens: int,
) -> list[Any]:
    """The dense model's judged answers to prompts; kept on disk for the next run."""
    content = digest(
        dense.checkpoint.fingerprint,
        *(f"{one.id} {one.instruction}" for one in prompts),
        *map(str, (new_tokens, compute.dtype, compute.batch_size)),
    )
    partial = out / "answers" / content[:16]
    partial.mkdir(parents=True, exist_ok=True)
    model, processor = load(dense, compute, watch)
    with watch.task("Writing references", len(prompts), "answers") as done:
        texts = generate(
            model,
            processor,
            prompts,
            partial,
            max_new_tokens=new_tokens,
            batch_size=compute.batch_size,
            progress=done,
        )
    return [judged(one, text, DEFAULT_JUDGE) for one, text in zip(prompts, texts, strict=True)]


def _candidates(out: Path, seed: int, prompts: Iterable[Example]) -> DataSource:
    """The prompts of a seed on disk, for `calibration_data`."""
    path = out / "answers" / f"candidates-{seed}.jsonl"
    path.parent.mkdir(exist_ok=True)
    write_text(path, "".join(map(_line, prompts)))
    return DataSource(name="jsonl", path=path)


def _require(readings: Sequence[Reading], samples: int, seed: int) -> None:
    """Both kinds are there in the number asked for."""
    for reading, does in zip(readings, ("refuses", "answers"), strict=True):
        if len(reading.examples) < samples:
            raise RegraftError(
                f"Calibration seed {seed}: the dense model {does} {len(reading.examples)} of the "
                f"prompts that it should, and {samples} are wanted. Ask for fewer with --samples."
            )


def _draw(
    dense: Source,
    prompts: Sequence[Example],
    out: Path,
    compute: ComputeSettings,
    watch: Watch,
    new_tokens: int,
) -> dict[str, Any]:
    """The test prompts as images, with what the dense model answers to the harmless ones."""
    folder = out / "test-images"
    table = folder / "examples.jsonl"
    if not table.exists():
        write_typographic(Reading("test", tuple(prompts), {}), folder, watch)
    drawn = [replace(one, response=None) for one in read_jsonl(table).examples]
    readings = _answered(dense, drawn, out, compute, watch, new_tokens, test=True)
    if left := len(prompts) - len(drawn):
        readings[0] = replace(readings[0], skipped=readings[0].skipped | {"not drawn": left})
    return _write(table, readings)


def _write(path: Path, readings: Sequence[Reading]) -> dict[str, Any]:
    """Write the examples; returns how many of each kind and source, and what was left out."""
    examples = [one for reading in readings for one in reading.examples]
    write_text(path, "".join(_line(one, path.parent) for one in examples))
    left_out: Counter[str] = Counter()
    for reading in readings:
        left_out.update({k: n for k, n in reading.skipped.items() if not k.startswith("not harm")})
    return {
        "harmful": _count(one.category for one in examples if one.harmful),
        "harmless": _count(one.category for one in examples if not one.harmful),
        "with response": sum(one.response is not None for one in examples),
        "left out": dict(sorted(left_out.items())),
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
    parser.add_argument("--samples", type=int, default=64, help="calibration, of each kind")
    parser.add_argument("--new-tokens", type=int, default=48, help="length of an answer")
    parser.add_argument("--images", action="store_true", help="test prompts as images too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch-size", type=int, default=16)
    return parser.parse_args()


def main() -> int:
    """Command line."""
    from rich.console import Console

    args = _arguments()
    try:
        compute = ComputeSettings(device=args.device, dtype=args.dtype, batch_size=args.batch_size)
        summary: Mapping[str, Any] = build(
            open_source(args.model),
            args.data,
            args.out,
            compute,
            ConsoleWatch(Console()),
            samples=args.samples,
            new_tokens=args.new_tokens,
            images=args.images,
        )
    except (RegraftError, FileNotFoundError) as error:
        print(f"make_real_benchmark: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
