"""Restoration by gain: its maths against brute force, and on pico models from prompts to bytes."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

import pico
import truth
from disk import shards, tree, write_data
from regraft import stages
from regraft.checks import draw_calibration
from regraft.data.collate import response_batch
from regraft.data.example import Example
from regraft.data.sources import DataSource
from regraft.evaluation.curves import read_curve
from regraft.importance.gradients import layer_gradients
from regraft.importance.hard import response_losses
from regraft.importance.losses import DecisionLoss
from regraft.models.anatomy import HEAD_ROLES
from regraft.models.checkpoint import open_checkpoint
from regraft.models.load import Source, load_model, load_processor, open_source
from regraft.pruning.pruner import zeros
from regraft.restoration import iterative
from regraft.restoration.apply import patched
from regraft.restoration.gain import (
    Objective,
    backtrack,
    gain,
    removal_cost,
    swaps_in_groups,
    swaps_in_rows,
)
from regraft.restoration.joint import Effects, joined
from regraft.restoration.patch import load_patch
from regraft.restoration.ranking import KEPT, Ranking, empty, load_ranking, patch_of
from regraft.restoration.selection import blocks_of, inside, random_heads, restorable
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.evaluating import EvalSettings
from regraft.settings.pruning import PruneSettings
from regraft.settings.realigning import RealignSettings
from regraft.settings.searching import SearchSettings
from regraft.stages import gaining
from regraft.watch import Silent

INF = math.inf
STEP = 0.01  # norms compute in float32, whatever the model does

# Gain and cost


def test_gain_is_the_slope_of_the_loss(pico_dir, tmp_path):
    """Central differences of the loss of the whole model in float64, one weight at a time."""
    opened = truth.opened(pico_dir("qwen2_vl"))
    model = copy.deepcopy(opened.model)
    modules = dict(model.named_modules())
    generator = torch.Generator().manual_seed(1)
    dense = {}
    for li in opened.anatomy.linears:
        weight = modules[li.module].weight
        dense[li.key] = weight.detach().clone()
        weight.data[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    examples = truth.examples("qwen2_vl", tmp_path, 2)
    rows = [response_batch(opened.processor, [example]) for example in examples]
    walk = truth.walk(model, rows)
    layers = layer_gradients(
        walk, opened.anatomy, tmp_path / "states", lambda _: True, lambda _: None
    )
    predicted = {
        key: gain(gradient, dense[key], modules[f"{li.module}"].weight.detach())
        for layer, part in layers
        for li in layer.linears
        for key, gradient in part.items()
        if li.key == key
    }
    precise = model.double()

    def loss():
        total = 0.0
        for batch in rows:
            inputs = batch.to("cpu", torch.float64).inputs
            with torch.no_grad():
                logits = precise(**inputs, use_cache=False).logits[0, :-1]
            total += float(F.cross_entropy(logits, batch.labels[0, 1:], ignore_index=-100))
        return total / len(rows)

    def slope(weight, change):
        weight.data += STEP * change
        above = loss()
        weight.data -= 2 * STEP * change
        below = loss()
        weight.data += STEP * change
        return (above - below) / (2 * STEP)

    for layer, role in ((0, "q_proj"), (1, "down_proj"), (3, "k_proj")):
        li = opened.anatomy.layers[layer].linear(role)
        weight, worth = modules[li.module].weight, predicted[li.key]
        back = torch.where(weight == 0, dense[li.key].double() - weight.detach(), 0)
        best = int(worth.masked_fill(weight.detach() != 0, -INF).argmax())
        one = torch.zeros_like(back)
        one.view(-1)[best] = back.view(-1)[best]
        for change, expected in ((one, worth.view(-1)[best]), (back, worth[back != 0].sum())):
            assert abs(float(expected)) > 1e-5
            assert -slope(weight, change) == pytest.approx(float(expected), rel=5e-3, abs=1e-5)


def test_removal_cost_is_exact_for_a_quadratic_loss():
    draw = torch.Generator().manual_seed(0)
    weight, gradient, curvature = torch.randn(3, 4, 5, generator=draw)
    curvature.abs_()

    def loss(at):
        return (gradient * (at - weight) + curvature * (at - weight) ** 2 / 2).sum()

    cost = removal_cost(gradient, curvature, weight)
    assert cost.dtype == torch.float32
    for i in range(4):
        for j in range(5):
            without = weight.clone()
            without[i, j] = 0
            assert float(cost[i, j]) == pytest.approx(float(loss(without)), rel=1e-5, abs=1e-5)


numbers = st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0]) | st.floats(-4, 4, width=32)


@st.composite
def rows_of(draw, width):
    """Each weight pruned (a worth, no cost), kept (a cost) or neither; `[rows, width]` each."""
    count = draw(st.integers(1, 3))
    keys, cost = torch.full((count, width), -INF), torch.full((count, width), INF)
    for i in range(count):
        kinds = draw(st.lists(st.sampled_from("ppkkn"), min_size=width, max_size=width))
        for j, kind in enumerate(kinds):
            if kind != "n":
                (keys if kind == "p" else cost)[i, j] = draw(numbers)
    return keys, cost


def best_pairing(worth, prices, count):
    """The most that `count` returns, each for another removal, are worth; all pairings."""
    totals = (
        sum(w - p for w, p in zip(back, gone, strict=True))
        for back in itertools.permutations(worth, count)
        for gone in itertools.permutations(prices, count)
    )
    return max(totals, default=None)


@settings(max_examples=60)
@given(rows_of(7), st.integers(1, 9))
def test_swaps_in_rows_are_the_best_pairings(case, most):
    """However many are taken of the best, no other pairing of as many is worth more."""
    keys, cost = case
    worth, removed = swaps_in_rows(keys, cost, most)
    assert worth.shape == removed.shape == keys.shape
    rows, columns = keys.shape
    for i in range(rows):
        back = [j for j in range(columns) if worth[i, j] > -INF]
        gone = [int(removed[i, j]) for j in back]
        assert all(removed[i, j] == KEPT for j in range(columns) if j not in back)
        assert all(i * columns <= at < (i + 1) * columns for at in gone)
        assert len(set(gone)) == len(gone), "a kept weight goes twice"
        prices = cost[i][cost[i] < INF].tolist()
        worths = keys[i][keys[i] > -INF].tolist()
        assert len(back) == min(most, len(prices), len(worths))
        for j, at in zip(back, gone, strict=True):
            assert keys[i, j] > -INF and cost.view(-1)[at] < INF
            assert worth[i, j] == keys[i, j] - cost.view(-1)[at]
        taken = sorted(worth[i][back].tolist(), reverse=True)
        for count in range(1, min(len(taken), 3) + 1):
            expected = best_pairing(worths, prices, count)
            assert sum(taken[:count]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("m", [4, 8])
@settings(max_examples=60)
@given(data=st.data())
def test_swaps_in_groups_are_the_best_single_ones(m, data):
    keys, cost = data.draw(rows_of(2 * m))
    worth, removed = swaps_in_groups(keys, cost, m)
    columns = keys.shape[1]
    for i in range(len(keys)):
        for start in range(0, columns, m):
            group = range(start, start + m)
            back = [j for j in group if worth[i, j] > -INF]
            pairs = [
                float(keys[i, j] - cost[i, k])
                for j in group
                for k in group
                if keys[i, j] > -INF and cost[i, k] < INF
            ]
            assert len(back) == bool(pairs)
            for j in back:
                row, k = divmod(int(removed[i, j]), columns)
                assert row == i and k in group
                assert worth[i, j] == keys[i, j] - cost[i, k] == max(pairs)
            assert all(removed[i, j] == KEPT for j in group if j not in back)


def test_objective_keys():
    safety, utility = torch.tensor([1.0, 2.0, 3.0, -1.0]), torch.tensor([0.5, -0.1, 0.0, 4.0])
    free = Objective(utility_weight=2, constraint="none").keys(safety, utility)
    torch.testing.assert_close(free, torch.tensor([2.0, 1.8, 3.0, 7.0]))
    bound = Objective(utility_weight=2, constraint="utility-gain", share=0).keys(safety, utility)
    torch.testing.assert_close(bound, torch.tensor([2.0, -INF, 3.0, 7.0]))
    shared = Objective(utility_weight=2, constraint="both", share=0.25).keys(safety, utility)
    torch.testing.assert_close(shared, torch.tensor([2.0, -INF, -INF, 7.0]))


def test_the_multiplier_follows_over_refusal():
    for constraint in ("lagrangian", "both"):
        objective = Objective(utility_weight=2, constraint=constraint)
        assert objective.adapted(0).utility_weight == 2
        twice = objective.adapted(math.log(2) / 8)
        assert twice.utility_weight == pytest.approx(4)
        assert twice.adapted(-math.log(2) / 8).utility_weight == pytest.approx(2)
        assert 0 < objective.adapted(-1).utility_weight < 2 < objective.adapted(1).utility_weight
    for constraint in ("utility-gain", "none"):
        assert Objective(constraint=constraint).adapted(1) == Objective(constraint=constraint)


def test_harmless_prompts_may_drift_as_far_as_pruning_left_them():
    def weight(*drifts):
        trace = [{"drift": drift} for drift in drifts]
        settings = RealignSettings(method="gain", count=1, constraint="lagrangian")
        return gaining._objective(settings, trace).utility_weight

    start = weight()
    assert weight(0.1) == start
    assert weight(0.1, 0.13) == pytest.approx(start * math.exp(8 * 0.03))
    assert weight(0.1, 0.13, 0.07) == pytest.approx(start)
    assert weight(-0.1, 0.01) == pytest.approx(start * math.exp(-8 * 0.09)), "as the dense model"


@given(st.lists(st.integers(1, 64).map(lambda n: n / 8), max_size=8), st.integers(1, 40))
def test_a_step_ends_where_first_order_does(keys, share):
    """Never further than the trust allows, but for the first weight."""
    keys.sort(reverse=True)
    objective = Objective(utility_weight=3, trust=share / 16)
    count = objective.within_trust(torch.tensor(keys), objective.value(2.0, 1.0))
    limit = share / 16 * (2.0 + 3 * 1.0)
    fitting = [k for k in range(len(keys) + 1) if sum(keys[:k]) <= limit]
    assert count == max(1, fitting[-1])


@given(st.integers(0, 200), st.randoms(use_true_random=False))
def test_backtracking_takes_what_was_seen_to_help(count, random):
    """The last of a falling run of halvings, and nothing where none helps."""
    seen: list[int] = []
    values = {n: random.choice([0.5, 0.9, 1.0, 1.5]) for n in range(1, count + 1)}

    def value(n):
        seen.append(n)
        return values[n]

    taken = backtrack(value, 1.0, torch.ones(count))  # each alone is predicted to bring it to 0
    assert seen == [count >> i for i in range(len(seen))]
    tried = [n for n in (count >> i for i in range(8)) if n]
    helping = [i for i, n in enumerate(tried) if values[n] < 1]
    if not helping:
        assert taken == 0 and seen == tried
        return
    end = helping[0]
    while end + 1 < len(tried) and values[tried[end + 1]] < values[tried[end]]:
        end += 1
    assert taken == tried[end]
    assert seen == tried[: end + 2], "a try too many"


@given(
    st.lists(st.integers(1, 32).map(lambda n: n / 64), min_size=1, max_size=40),
    st.randoms(use_true_random=False),
)
def test_backtracking_tries_no_less_than_could_be_better(worth, random):
    """What predictions at their best would not beat is not tried, and nothing is lost by that."""
    worth.sort(reverse=True)
    promised = [0.0, *itertools.accumulate(worth)]
    # predictions hold but for the overshoot of many together: never better than promised
    share = {n: random.choice([0.25, 0.5, 1.0]) for n in range(1, len(worth) + 1)}
    seen: list[int] = []

    def value(n):
        seen.append(n)
        return 50 - promised[n] * share[n]

    taken = backtrack(value, 50.0, torch.tensor(worth))
    every = backtrack(
        lambda n: 50 - promised[n] * share[n], 50.0, torch.tensor([99.0] * len(worth))
    )
    assert taken == every
    if share[len(worth)] == 1:
        assert seen == [len(worth)], "all as promised, and less was tried"


def test_too_long_a_step_is_cut():
    """A parabola: first order says go to 2, its minimum is at 1."""

    def slope(n):
        return torch.full((n,), 2 / 64)

    assert backtrack(lambda n: (n / 64 - 1) ** 2, 1.0, slope(128)) == 64
    assert backtrack(lambda n: (n / 64 - 1) ** 2, 1.0, slope(100)) == 50
    assert backtrack(lambda n: 1.0 + n, 1.0, slope(128)) == 0


def test_examples_on_which_the_teacher_is_wrong_are_left_out(monkeypatch):
    notes: list[str] = []

    class Told(Silent):
        def note(self, text):
            notes.append(text)

    pool = gaining.Pool([Example(name, "?", False, "title") for name in "abcde"], None, 5)
    for wrong, kept in (("", "abcde"), ("bd", "ace"), ("bcd", "abcde")):
        notes.clear()
        told = {name: name not in wrong for name in "abcde"}
        monkeypatch.setattr(gaining, "agreements", lambda *_, told=told: told)
        left = gaining._agreed("utility", pool, DecisionLoss(), Told())
        assert [one.id for one in left.examples] == list(kept)
        assert len(notes) == bool(wrong)
    assert "all are used" in notes[0]


def test_pushes_come_behind_the_path():
    """In every way in which the path can end; and the next step depends on the trace alone."""
    settings = RealignSettings(method="gain", count=1000, steps=4, pushes=3, trust=0.5)

    def run(*restored, count=1000, settings=settings):
        trace = []
        for now in restored:
            task = gaining.next_task(settings, count, trace)
            assert task is not None, "the path has ended"
            before = trace[-1]["restored"] if trace else 0
            assert 0 <= now - before <= task.most
            trace.append({"restored": now, "push": task.push, "drift": 0.1})
        return [one["push"] for one in trace], gaining.next_task(settings, count, trace)

    size = round(gaining.PUSH * 1000)
    done, task = run(100, 300, 500)
    assert done == [0] * 3 and not task.push and task.most == 1000 - 2 * 3 * size - 500
    assert task.objective == Objective(trust=0.5)
    done, task = run(100, 300, 500, 700)  # all steps done
    assert done == [0] * 4 and task.push == size and task.most == 3 * size
    assert task.objective == Objective(10, "none", trust=0.5)
    done, task = run(100, 300, 500, 700, 706)
    assert done == [0] * 4 + [size] and task.push == size and task.most == 3 * size
    assert task.objective == Objective(0.1, "none", trust=0.5)
    assert run(100, 300, 500, 700, 706, 712) == ([0] * 4 + [size] * 2, None)
    path = 1000 - 2 * 3 * size
    done, task = run(path // 4, path // 2, path // 2, path)  # the path is full
    assert task.push == size and task.most == 3 * size
    done, task = run(100, 100, 100)  # nothing helps any more
    assert done == [0] * 3 and task.push
    done, task = run(100, 100, 100, 104)
    assert done == [0] * 3 + [size] and task.push, "the path goes on behind a push"
    assert run(100, 100, 100, 100, 100)[1] is None
    assert run(1, 2, 3, count=3) == ([0] * 3, None), "too few weights for a push"
    many = settings.model_copy(update={"pushes": 20})  # of one weight each, and 15 at most
    done, task = run(0, count=60, settings=many)
    assert done == [0] and not task.push and task.most == 60 // 2 // 3, "half is the path's"
    none = settings.model_copy(update={"pushes": 0})
    assert run(250, 500, 750, 1000, settings=none)[1] is None


@pytest.mark.parametrize(
    ("restored", "stuck"),
    [
        ([], False),
        ([0], False),
        ([5, 9, 9], False),
        ([5, 9, 9, 12], False),
        ([0, 0], True),
        ([5, 9, 9, 9], True),
    ],
)
def test_two_steps_without_a_return_end_it(restored, stuck):
    assert gaining._stuck([{"restored": n} for n in restored]) == stuck


# On models

METHODS: dict[str, dict[str, Any]] = {
    "half": {"method": "magnitude", "sparsity": 0.5},
    "2:4": {"method": "magnitude", "n_m": "2:4"},
    "4:8": {"method": "magnitude", "n_m": "4:8"},
}
COMPUTE = ComputeSettings(device="cpu", batch_size=2)
STREAMED = COMPUTE.model_copy(update={"placement": "streamed"})
GAIN = RealignSettings(method="gain", count=60, steps=6, batch=4, trust=0.2)


@dataclass(frozen=True)
class Bench:
    """A pico model, pruned by magnitude in several ways, and data; float32 on disk."""

    root: Path

    @property
    def dense(self) -> Source:
        return open_source(self.root / "dense")

    def pruned(self, way: str = "half") -> Source:
        return open_source(self.root / way)

    @property
    def calibration(self) -> CalibrationSettings:
        data = DataSource(name="jsonl", path=self.root / "data" / "data.jsonl")
        return CalibrationSettings(data=data, samples=4)

    def rank(
        self, out: Path, settings: RealignSettings = GAIN, way: str = "half", **changes: Any
    ) -> Ranking:
        given = {"calibration": self.calibration, "compute": COMPUTE} | changes
        return stages.rank(self.dense, self.pruned(way), out, settings, **given)

    def divergences(self, ranking: Ranking | None = None) -> dict[str, float]:
        """KL from the dense model over the response tokens of D^s and D^u, full forwards."""
        pruned, processor = self.pruned(), load_processor(self.dense)
        dense, model = load_model(self.dense), load_model(pruned)
        patch = patch_of(ranking, self.dense, pruned) if ranking is not None else None
        found = {}
        for harmful in (True, False):
            reading = draw_calibration(self.dense, self.calibration, harmful=harmful)
            total, tokens = 0.0, 0
            for example in reading.examples:
                batch = response_batch(processor, [example])
                mask = batch.labels[0, 1:] != -100
                wanted = truth.full_forward(dense, batch.inputs).logits[0, :-1][mask]
                with patched(model, pruned.anatomy, patch) if patch else nullcontext():
                    own = truth.full_forward(model, batch.inputs).logits[0, :-1][mask]
                wanted, own = wanted.log_softmax(-1), own.log_softmax(-1)
                total += float((wanted.exp() * (wanted - own)).sum())
                tokens += len(own)
            found["safety" if harmful else "utility"] = total / tokens
        return found


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    made: dict[str, Bench] = {}

    def bench(family: str) -> Bench:
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            dense = open_source(pico.save(family, root / "dense", max_shard_size="300KB"))
            vision = family in pico.VLM_FAMILIES
            write_data(root / "data", 4, images=vision)
            made[family] = Bench(root)
            for way, fields in METHODS.items():
                settings = PruneSettings(**fields)
                stages.prune(dense, root / way, settings, made[family].calibration, COMPUTE)
        return made[family]

    return bench


def same(one: Ranking, other: Ranking) -> bool:
    names = ("linear", "position", "removed", "score")
    return all(torch.equal(getattr(one, n), getattr(other, n)) for n in names)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mllama", "qwen2_vl", "llama"])
def test_restoring_brings_the_losses_down(family, benches, tmp_path):
    """On the calibration data, by whole forward passes; streamed the same, and no file changes."""
    bench = benches(family)
    before = tree(bench.root)
    ranking = bench.rank(tmp_path / "resident")
    assert len(ranking) > 10, "the trust region lets nothing come back"
    pruned, restored = bench.divergences(), bench.divergences(ranking)
    assert sum(restored.values()) < 0.97 * sum(pruned.values())
    control = bench.rank(tmp_path / "control", RealignSettings(method="random", count=len(ranking)))
    assert sum(restored.values()) < sum(bench.divergences(control).values())
    streamed = bench.rank(tmp_path / "streamed", compute=STREAMED)
    assert same(streamed, ranking)
    assert tree(bench.root) == before, "a weight was written into the checkpoint's file"
    pairs = zip(ranking.linear.tolist(), ranking.position.tolist(), strict=True)
    assert len(set(pairs)) == len(ranking), "a weight comes back twice"
    for index, linear in enumerate(bench.dense.anatomy.linears):
        free = restorable(
            bench.dense.checkpoint.read(linear.tensor),
            bench.pruned().checkpoint.read(linear.tensor),
        )
        assert free.flatten()[ranking.position[ranking.linear == index]].all()
    assert not list(tmp_path.glob(".*")), "unfinished work is left behind"


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("loss", "pushes"), [("distil", 0), ("given", 0), ("distil", 3)])
def test_stopped_and_taken_up_again(when, loss, pushes, benches, tmp_path, monkeypatch):
    """The same file; finished steps are not repeated, whether stopped before or after a write."""
    bench = benches("llama")
    path = 5 if pushes else 7  # so that it is stopped around the first push
    wanted = GAIN.model_copy(update={"loss": loss, "batch": 2, "steps": path, "pushes": pushes})
    steps: list[int] = []
    true_step, true_save = gaining.step, gaining.save_ranking

    def counted(*arguments: Any) -> Ranking:
        steps.append(len(arguments[5]))
        return true_step(*arguments)

    saved: list[str] = []

    def stopping(path: Path, ranking: Ranking) -> None:
        saved.append(path.stem)
        last = saved.count("so-far") == 6
        if last and when == "before":
            raise KeyboardInterrupt
        true_save(path, ranking)
        if last:
            raise KeyboardInterrupt

    monkeypatch.setattr(gaining, "step", counted)
    whole = bench.rank(tmp_path / "a" / "ranking", wanted)
    needed = list(steps)
    assert len(needed) >= 7, "too few steps to stop among them"
    steps.clear()
    with monkeypatch.context() as patch:
        patch.setattr(gaining, "save_ranking", stopping)
        with pytest.raises(KeyboardInterrupt):
            bench.rank(tmp_path / "b" / "ranking", wanted)
    (kept,) = (tmp_path / "b").rglob("so-far.safetensors")
    assert len(load_ranking(kept).about["steps"]) == (5 if when == "before" else 6)
    steps.clear()
    again = bench.rank(tmp_path / "b" / "ranking", wanted)
    assert steps == needed[5 if when == "before" else 6 :]
    assert same(again, whole)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    steps.clear()
    bench.rank(tmp_path / "b" / "ranking", wanted)
    assert not steps, "finished work was done again"


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["all are back", "nothing helps"])
def test_stopped_right_at_the_end(ending, benches, tmp_path, monkeypatch):
    """After the last step, before the ranking is written: no further step, and the same file."""
    bench = benches("llama")
    enough = {"count": 2, "steps": 9} if ending == "all are back" else {"trust": 1e-9, "steps": 9}
    wanted = GAIN.model_copy(update=enough)
    if ending == "nothing helps":
        monkeypatch.setattr(iterative, "backtrack", lambda *_: 0)
    whole = bench.rank(tmp_path / "a" / "ranking", wanted)
    steps = len(whole.about["steps"])
    assert steps == 2 and len(whole) == (2 if ending == "all are back" else 0)
    true_save = gaining.save_ranking

    def stopping(path: Path, ranking: Ranking) -> None:
        true_save(path, ranking)
        if path.stem == "so-far" and len(ranking.about["steps"]) == steps:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gaining, "save_ranking", stopping)
        with pytest.raises(KeyboardInterrupt):
            bench.rank(tmp_path / "b" / "ranking", wanted)
    monkeypatch.setattr(gaining, "step", lambda *_: pytest.fail("a step too many"))
    assert same(bench.rank(tmp_path / "b" / "ranking", wanted), whole)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("swap", [False, True])
def test_every_step_lowers_what_it_is_to_lower(swap, benches, tmp_path):
    """The whole calibration set is the sample, so the next step sees what this one did."""
    settings = GAIN.model_copy(update={"swap": swap, "trust": 1.0, "steps": 9})
    steps = benches("mllama").rank(tmp_path / "ranking", settings).about["steps"]
    assert len(steps) > 3
    before = 0
    for now, then in itertools.pairwise(steps):
        old, new = (one["safety"] + now["weight"] * one["utility"] for one in (now, then))
        assert new < old if now["restored"] > before else new == pytest.approx(old, rel=1e-6)
        before = now["restored"]


def test_a_swap_removes_what_neither_loss_needs(benches):
    """Also where a removal is predicted to help, and however little utility weighs just now."""
    bench = benches("llama")
    index = 3
    linear = list(bench.dense.anatomy.linears)[index]
    weight = bench.pruned().checkpoint.read(linear.tensor).float()
    rows, columns = linear.shape
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(2 * rows, columns, generator=generator) for _ in range(2)]
    for one in gradients:
        one[rows:].abs_()
    objective = Objective(utility_weight=0.05, constraint="none")
    problem = iterative.Problem(None, bench.dense, bench.pruned(), lambda *_: True, swap=True)
    over_all = iterative._Pass(problem, objective, (), 1, empty(), lambda _: None)
    dense = bench.dense.checkpoint.read(linear.tensor).float()
    keys, removed = over_all._candidates(index, linear, dense, weight, True, gradients)
    moved = sum(
        (-g[:rows] * weight + g[rows:] * weight**2 / 2).abs() for g in gradients
    ).masked_fill(weight == 0, INF)
    for row in range(rows):
        chosen = removed[row][removed[row] != KEPT]
        assert len(chosen) > 1, "too few swaps to tell"
        least = moved[row].topk(len(chosen), largest=False).indices + row * columns
        assert set(chosen.tolist()) == set(least.tolist())
    assert (keys > 0).any() and ((keys > 0) <= (removed != KEPT)).all()


@pytest.mark.slow
@pytest.mark.parametrize("swap", [False, True])
def test_what_candidates_do_to_each_prompt(swap, benches, tmp_path, monkeypatch):
    """Central differences of the losses of single prompts, along what comes back and what goes."""
    seen: list[Any] = []

    def spied(self: Any, asked: Ranking) -> Any:
        found = look(self, asked)
        if len(asked):
            seen.append((self, asked, found.effects))
        return found

    look = iterative._Pass.look
    monkeypatch.setattr(iterative._Pass, "look", spied)
    monkeypatch.setattr(iterative, "backtrack", lambda *_: 0)
    settings = GAIN.model_copy(update={"swap": swap, "steps": 1, "count": 4, "constraint": "none"})
    benches("llama").rank(tmp_path / "ranking", settings)
    over_all, asked, effects = seen[0]
    problem = over_all.problem
    weights = iterative.weights_of(problem.model.network, problem.dense.anatomy)
    linears = list(problem.dense.anatomy.linears)
    checked = 0
    for j in range(0, len(asked), 7):
        index, back, gone = (int(one[j]) for one in (asked.linear, asked.position, asked.removed))
        flat, dense = weights[index].view(-1), problem.dense.checkpoint.read(linears[index].tensor)
        before = flat.clone()
        change = torch.zeros_like(flat)
        change[back] = dense.reshape(-1)[back] - before[back]
        assert (gone != KEPT) == swap
        if swap:
            change[gone] = -before[gone]
        for side, found in zip(over_all.sides, effects, strict=True):
            losses = []
            for sign in (1, -1):
                flat.copy_(before + sign * 0.05 * change)
                values = response_losses(side.walk, side.loss)
                losses.append([values[name] for batch in side.walk.batches for name in batch.ids])
            flat.copy_(before)
            for e, (above, below) in enumerate(zip(*losses, strict=True)):
                slope = (below - above) / 0.1 / len(losses[0])
                assert float(found.gains[e, j]) == pytest.approx(slope, rel=0.05, abs=2e-5)
                checked += abs(slope) > 1e-4
    assert checked > 10


@pytest.mark.slow
def test_a_search_looks_around_every_push(benches, tmp_path):
    bench = benches("llama")
    settings = GAIN.model_copy(update={"pushes": 3, "steps": 2})
    steps = bench.rank(tmp_path / "ranking", settings).about["steps"]
    assert [one["push"] for one in steps] == [0, 0, 1, 1]
    assert tuple(one["weight"] for one in steps[2:]) == gaining.PUSH_UTILITY
    choice = SearchSettings(validation=bench.calibration.data, points=1)
    short = EvalSettings(max_new_tokens=1)
    stages.search(
        bench.dense,
        bench.pruned(),
        tmp_path / "ranking",
        tmp_path / "curve.json",
        choice,
        settings,
        short,
        COMPUTE,
    )
    tried = [point.restored for point in read_curve(tmp_path / "curve.json").points]
    path, between, end = (int(one["restored"]) for one in steps[1:])
    assert path <= between <= end > path
    assert tried == [0, *range(path, end + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("within", ["attention", "heads"])
def test_weights_come_back_where_they_may(within, benches, tmp_path):
    bench = benches("qwen2_vl")
    fields = {"within": within, "heads": "random", "top_heads": 5, "steps": 2, "count": 20}
    settings = GAIN.model_copy(update=fields)
    ranking = bench.rank(tmp_path / "ranking", settings)
    assert len(ranking) > 1
    heads = random_heads(bench.dense.anatomy, 5, 0) if within == "heads" else []
    assert ranking.about["heads"] == [list(head) for head in heads]
    layers = {li.key: layer for layer in bench.dense.anatomy.layers for li in layer.linears}
    for index, linear in enumerate(bench.dense.anatomy.linears):
        own = ranking.position[ranking.linear == index]
        assert not len(own) or linear.role in HEAD_ROLES
        if within == "heads":
            layer = layers[linear.key]
            blocks = blocks_of(layer, linear, [h for i, h in heads if i == layer.index])
            assert inside(linear.shape, blocks, torch.device("cpu")).flatten()[own].all()


def kept_in_groups(source: Any, linear: Any, m: int) -> torch.Tensor:
    return (source.read(linear.tensor) != 0).reshape(-1, m).sum(dim=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "way"), [("qwen2_vl", "half"), ("qwen2_vl", "2:4"), ("llama", "4:8")]
)
def test_swaps_keep_the_sparsity(family, way, benches, tmp_path):
    """As many zeros on disk, in every row and N:M group; reverting gives the pruned bytes."""
    bench = benches(family)
    settings = GAIN.model_copy(update={"swap": True, "count": 40, "steps": 3})
    ranking = bench.rank(tmp_path / "ranking", settings, way)
    assert len(ranking) > 3
    assert (ranking.removed != KEPT).all()
    for column in (ranking.position, ranking.removed):
        pairs = list(zip(ranking.linear.tolist(), column.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
    dense, pruned = bench.dense, bench.pruned(way)
    patch = tmp_path / "patch"
    made = stages.realign(dense, pruned, patch, settings, ranking_file=tmp_path / "ranking")
    assert made.restored == made.removed == len(ranking)
    assert made.about.get("violated_groups", 0) == 0
    assert ("n_m" in made.about) == (way != "half")
    stages.apply(pruned.folder, patch, tmp_path / "applied")
    applied = open_checkpoint(tmp_path / "applied")
    assert zeros(applied, pruned.anatomy) == zeros(pruned.checkpoint, pruned.anatomy)
    changed = 0
    for linear in pruned.anatomy.linears:
        before, after = pruned.checkpoint.read(linear.tensor), applied.read(linear.tensor)
        assert torch.equal((before == 0).sum(dim=1), (after == 0).sum(dim=1)), "a row"
        new = (before == 0) & (after != 0)
        assert torch.equal(after[new], dense.checkpoint.read(linear.tensor)[new])
        same_value = (before == after) | new | ((before != 0) & (after == 0))
        assert same_value.all(), "a weight that stays has another value"
        changed += int(new.sum())
        if way != "half":
            n, m = map(int, way.split(":"))
            assert (kept_in_groups(applied, linear, m) <= n).all()
            assert torch.equal(
                kept_in_groups(applied, linear, m),
                kept_in_groups(pruned.checkpoint, linear, m),
            )
    assert changed == len(ranking)
    stages.revert(tmp_path / "applied", patch, tmp_path / "off")
    assert shards(tmp_path / "off") == shards(pruned.folder)
    assert load_patch(patch).removed == len(ranking)


@pytest.mark.slow
def test_a_constraint_and_a_pool_larger_than_the_batch(benches, tmp_path, monkeypatch):
    """Weights that cost utility stay out, also with examples that weigh differently."""
    bench = benches("llama")
    every = {"batch": 2, "steps": 1, "count": 10**6, "trust": 1e6}
    settings = GAIN.model_copy(update=every)
    monkeypatch.setattr(iterative, "backtrack", lambda _value, _now, worth: len(worth))

    def each_by_itself(effects: Effects, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        worth, order = effects.gains.double().sum(dim=0).sort(descending=True, stable=True)
        return order[:count], worth[:count].float()

    monkeypatch.setattr(iterative, "together", each_by_itself)
    bound, free = (
        bench.rank(tmp_path / name, settings.model_copy(update={"constraint": name}))
        for name in ("utility-gain", "none")
    )
    scores = [
        dict(zip(zip(r.linear.tolist(), r.position.tolist(), strict=True), r.score, strict=True))
        for r in (bound, free)
    ]
    assert 100 < len(bound) < 0.9 * len(free), "the constraint binds nothing"
    for at, score in scores[0].items():
        assert score > 0 and scores[1][at] == pytest.approx(float(score), rel=1e-4)


@pytest.mark.slow
def test_the_constraint_holds_of_what_is_seen_now(benches, tmp_path, monkeypatch):
    """Candidates are a step old, and of other prompts: some would cost utility by now."""
    offered: list[tuple[torch.Tensor, ...]] = []

    def spied(sides: Any, shares: Any, chosen: torch.Tensor, device: torch.device) -> Effects:
        offered.append((*(side.mean for side in sides), chosen))
        return joined(sides, shares, chosen, device)

    monkeypatch.setattr(iterative, "joined", spied)
    settings = GAIN.model_copy(update={"batch": 2, "constraint": "utility-gain", "steps": 4})
    benches("llama").rank(tmp_path / "ranking", settings)
    dropped = 0
    for _, utility, chosen in offered:
        assert (utility[chosen] >= 0).all() and len(chosen) == (utility >= 0).sum()
        dropped += len(utility) - len(chosen)
    assert dropped > 0
