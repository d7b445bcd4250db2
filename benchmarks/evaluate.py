"""Throughput of evaluation, in prompts per second, compared with a loop over single prompts.

    python benchmarks/evaluate.py                                # the bundled model, its test set
    python benchmarks/evaluate.py --suite safebench:PATH --limit 200 --batch-size 32
    python benchmarks/evaluate.py --model Qwen/Qwen2.5-VL-7B-Instruct --suite vlguard:PATH

All ways run in one process on the same prompts, in the same dtype.

- `plain`: the simple loop, one prompt at a time through processor and `generate`, full answers.
- `batched`: regraft's evaluation with full answers.
- `again`: the same for a second version of the model, which reuses the outputs for images.
- `ended`: every judged answer ends once its verdict is certain.

`same` is the share of answers (for `ended`: of verdicts) equal to those of `plain`; batching
changes rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measuring import device_name, save, timed, whole
from rich.console import Console
from rich.table import Table

from regraft.data.collate import prompt_batch
from regraft.data.example import Example
from regraft.data.sources import DataSource, read
from regraft.evaluation.generate import Answerer
from regraft.evaluation.greedy import answer
from regraft.evaluation.keywords import DEFAULT_JUDGE
from regraft.models.load import load_model, load_processor, open_source, pick_device, placed


def plain(model: Any, processor: Any, examples: Sequence[Example], tokens: int) -> list[str]:
    """One prompt after the other."""
    found = []
    for example in examples:
        batch = placed(prompt_batch(processor, [example]), model)
        found += answer(model, processor, batch.inputs, tokens)
    return found


def main() -> None:
    """Run all four ways, print the table, save JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--suite", default="demo:test")
    parser.add_argument("--limit", type=whole, default=None)
    parser.add_argument("--batch-size", type=whole, default=32)
    parser.add_argument("--max-new-tokens", type=whole, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    device = pick_device(options.device)
    source = open_source(options.model)
    model = load_model(source, dtype=options.dtype, device=options.device)
    processor = load_processor(source)
    examples = read(DataSource.model_validate(options.suite)).examples[: options.limit]
    size, tokens = options.batch_size, options.max_new_tokens
    shared = Answerer(processor, examples, batch_size=size)
    ending = Answerer(processor, examples, batch_size=size, judge=DEFAULT_JUDGE, memo_bytes=0)
    plain(model, processor, examples[:2], 2)  # kernels are chosen on first use
    runs: dict[str, Callable[[], list[str]]] = {
        "plain": lambda: plain(model, processor, examples, tokens),
        "batched": lambda: shared.answers(model, max_new_tokens=tokens),
        "again": lambda: shared.answers(model, max_new_tokens=tokens),
        "ended": lambda: ending.answers(model, max_new_tokens=tokens),
    }
    rows: list[dict[str, Any]] = []
    first: list[str] = []
    for name, run in runs.items():
        seconds, answers = timed(device, run)
        first = first or answers
        said = list(map(DEFAULT_JUDGE.refuses, answers)) if name == "ended" else answers
        wanted = list(map(DEFAULT_JUDGE.refuses, first)) if name == "ended" else first
        same = sum(a == b for a, b in zip(said, wanted, strict=True)) / len(examples)
        rows.append({"what": name, "seconds": seconds, "same": same})
    figures = {"n": len(examples), "device": device_name(device), "rows": rows}
    title = f"{options.model}, {options.suite}, n = {len(examples)}, batch {size}"
    title += f", {figures['device']}"
    table = Table("", "prompts a second", "against plain", "same %", title=title)
    for row in rows:
        ratio = rows[0]["seconds"] / row["seconds"]
        rate = len(examples) / row["seconds"]
        table.add_row(row["what"], f"{rate:.2f}", f"{ratio:.2f}", f"{100 * row['same']:.1f}")
    Console().print(table)
    save(options.json, {**vars(options), "json": None, **figures})


if __name__ == "__main__":
    main()
