"""Perplexity of references: the loss that transformers computes, on every family, and its file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import pico
import truth
from disk import write_data
from regraft import stages
from regraft.data.collate import response_batch
from regraft.data.sources import DataSource
from regraft.errors import RegraftError
from regraft.evaluation import perplexity as module
from regraft.evaluation.perplexity import perplexity, response_nlls
from regraft.models.load import open_source
from regraft.settings.compute import ComputeSettings
from regraft.settings.evaluating import EvalSettings
from regraft.stages.reading import read_suites


def test_nll_is_the_loss_of_each_example_alone(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RESPONSE_POSITIONS", 5)
    model, processor = pico.build(family)
    examples = truth.examples(family, tmp_path, 3)
    found = response_nlls(model, processor, examples, 2)
    assert len(found) == 3
    for example, (total, count) in zip(examples, found, strict=True):
        batch = response_batch(processor, [example])
        assert batch.labels is not None
        with torch.no_grad():
            loss = model(**batch.inputs, labels=batch.labels).loss
        assert count == int((batch.labels[:, 1:] != -100).sum())
        assert total / count == pytest.approx(float(loss), rel=1e-4)


def test_perplexity_by_hand() -> None:
    found = perplexity([(2.0, 4), (1.0, 1)])
    assert found.value == pytest.approx(math.exp(3 / 5))
    assert found.n == 2
    assert found.low == pytest.approx(math.exp(0.5))
    assert found.high == pytest.approx(math.exp(1.0))
    many = np.random.default_rng(0).gamma(4, 1, 200)
    wide = perplexity([(float(one), 3) for one in many])
    assert wide.low < wide.value < wide.high
    with pytest.raises(ValueError, match="at least one response token"):
        perplexity([])


@pytest.mark.parametrize("total", [math.nan, math.inf, 720.0 * 3])
def test_what_is_not_finite_is_told_with_its_example(
    pico_dir: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    total: float,
) -> None:
    source = open_source(pico_dir("llava"))
    suite = DataSource.model_validate(str(write_data(tmp_path / "data", 2)))
    asked = [one for one in read_suites(source, [suite], None).examples if not one.harmful]
    monkeypatch.setattr(module, "_of_batch", lambda *_: [(1.0, 3), (total, 3)])
    settings = EvalSettings(max_new_tokens=2, perplexity=True)
    compute = ComputeSettings(device="cpu", batch_size=2)
    told = f"response of {asked[1].id} has no finite .* --dtype bfloat16 or float32"
    with pytest.raises(RegraftError, match=told):
        stages.evaluate_target(stages.Target(source, compute), tmp_path / "out", [suite], settings)


def test_evaluate_measures_it_where_asked(
    pico_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(pico_dir("llava"))
    suite = DataSource.model_validate(str(write_data(tmp_path / "data", 3)))
    compute = ComputeSettings(device="cpu", batch_size=2)

    def run(name: str, **changes: bool) -> stages.Evaluation:
        settings = EvalSettings(max_new_tokens=2, **changes)  # type: ignore[arg-type]
        return stages.evaluate_target(
            stages.Target(source, compute), tmp_path / name, [suite], settings
        )

    assert run("without").result.perplexity is None
    whole = run("with", perplexity=True).result
    assert whole.perplexity is not None
    asked = [one for one in whole.answers if one.nll is not None]
    assert [one.harmful for one in asked] == [False] * 3
    total = sum(one.nll or 0 for one in asked) / sum(one.nll_tokens or 0 for one in asked)
    assert whole.perplexity.value == pytest.approx(math.exp(total))
    own = module._of_batch

    def stops(*arguments: object) -> object:
        if stopped.pop():
            raise KeyboardInterrupt
        return own(*arguments)  # type: ignore[arg-type]

    stopped = [True, False]
    monkeypatch.setattr(module, "_of_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", perplexity=True)
    monkeypatch.setattr(module, "_of_batch", own)
    run("stopped", perplexity=True)
    for file in ("answers.jsonl", "results.json"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "with" / file).read_bytes()
