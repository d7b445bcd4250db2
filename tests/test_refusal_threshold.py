"""The baseline that refuses by a threshold: its scores, its AUC, and the evaluation it writes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pico
import truth
from disk import write_jsonl
from regraft import stages
from regraft.data.collate import response_batch
from regraft.data.example import Example
from regraft.data.sources import DataSource
from regraft.errors import RegraftError
from regraft.models.load import open_source
from regraft.settings.compute import ComputeSettings
from regraft.settings.evaluating import EvalSettings

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import refusal_threshold as script


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auc_is_the_share_of_pairs_in_order(rows: list[tuple[int, bool]]) -> None:
    positive = [score for score, yes in rows if yes]
    negative = [score for score, yes in rows if not yes]
    if not positive or not negative:
        return
    wins = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
    found = script.auc(
        np.array([one for one, _ in rows], float), np.array([yes for _, yes in rows])
    )
    assert found == pytest.approx(wins / (len(positive) * len(negative)))


def test_auc_interval_holds_the_auc_and_narrows_with_prompts() -> None:
    random = np.random.default_rng(1)
    widths = []
    for count in (50, 800):
        positive = np.arange(count) % 2 == 0
        scores = random.normal(size=count) + positive
        low, high = script.auc_interval(scores, positive)
        assert low < script.auc(scores, positive) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_a_threshold_refuses_as_many_as_asked() -> None:
    scores = np.array([-3.0, -1.0, -2.0, -7.0])
    for count in range(5):
        assert int((scores >= script.threshold_at(scores, count)).sum()) == count


def test_scores_are_log_probabilities_of_the_first_tokens(tmp_path: Path) -> None:
    model, processor = pico.build("qwen2_5_vl")
    examples = truth.examples("qwen2_5_vl", tmp_path, 3)
    found = script.refusal_scores(model, processor, examples)
    for example, score in zip(examples, found, strict=True):
        batch = response_batch(processor, [replace(example, response=script.REFUSAL)])
        assert batch.labels is not None
        with torch.no_grad():
            logs = model(**batch.inputs).logits[0, :-1].log_softmax(-1)
        targets = batch.labels[0, 1:]
        first = (targets != -100).nonzero()[:3, 0]
        assert score == pytest.approx(float(logs[first, targets[first]].sum()), rel=1e-4)


def test_it_refuses_above_the_threshold_and_keeps_all_other_answers(
    pico_dir: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pico_dir("qwen2_5_vl")
    prompts = [  # a harmful one with a response is one that the dense model refuses
        Example(f"p{i}", f"Say the number {i}", i < 6, "numbers", response="no" if i < 2 else None)
        for i in range(8)
    ]
    file = write_jsonl(tmp_path / "prompts.jsonl", prompts)
    target = stages.Target(open_source(folder), ComputeSettings(device="cpu"))
    suite, own = DataSource.model_validate(str(file)), tmp_path / "own"
    settings = EvalSettings(max_new_tokens=2, full_answers=False)
    before = stages.evaluate_target(target, own, [suite], settings).result
    out = tmp_path / "out"
    arguments = [str(folder), str(own), "--dense", str(own), "--calibration", str(file)]
    script.main([*arguments, "--out", str(out)])
    after = stages.read_evaluation(out).result
    changed = {one.id for a, one in zip(before.answers, after.answers, strict=True) if a != one}
    refused = {one.id for one in after.answers if one.answer == script.REFUSAL}
    assert refused == changed == {one.id for one in after.answers if one.refused}
    assert sum(one.refused for one in after.answers if one.harmful) == 2
    printed = capsys.readouterr().out
    assert "from 2 of 6 refusals" in printed
    assert "harmless prompts: none, since the dense model refuses 0 and answers 2" in printed
    other = EvalSettings(max_new_tokens=2, full_answers=False, judge="gcg-1")
    stages.evaluate_target(target, tmp_path / "other", [suite], other)
    arguments = [str(folder), str(tmp_path / "other"), *arguments[2:]]
    with pytest.raises(RegraftError, match=r"other was judged by gcg-1, but"):
        script.main([*arguments, "--out", str(tmp_path / "another")])
    with pytest.raises(RegraftError, match="own exists already"):
        script.main([*arguments, "--out", str(own)])
