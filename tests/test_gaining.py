"""The path of gain on pico models: steps, held-out prompts, budgets, resuming, swaps."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import pico
import truth
from disk import shards, tree, write_jsonl
from methods import method
from regraft import stages
from regraft.cli.realigning import _below_budget
from regraft.data.collate import response_batch
from regraft.data.example import KINDS, Example, Reading, hold_out
from regraft.data.sources import DataSource
from regraft.errors import RegraftError
from regraft.evaluation.tradeoff import read_curve
from regraft.models.checkpoint import open_checkpoint
from regraft.models.checkpoint_copy import write_edited
from regraft.models.load import Source, load_model, load_processor, open_source
from regraft.patch.apply import patched
from regraft.patch.format import load_patch
from regraft.patch.pair import restorable
from regraft.progress import Progress, Task
from regraft.pruning.base import prune_settings
from regraft.pruning.prune import zeros
from regraft.recipes.recipe import Recipe
from regraft.restoration import teacher
from regraft.restoration.base import MethodSettings
from regraft.restoration.methods.gain import method as gaining
from regraft.restoration.methods.gain import objective as gain
from regraft.restoration.methods.gain import step as gain_step
from regraft.restoration.methods.gain.path import (
    LIMITS,
    REASONS,
    GainPath,
    Losses,
    StepRecord,
    path_to_json,
    read_path,
)
from regraft.restoration.ranking import KEPT, Ranking, empty, load_ranking, patch_of
from regraft.runs import pipeline
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.stages.answering import imitation_data
from regraft.stages.reading import draw_prompts

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from quantise import quantised

INF = math.inf
METHODS: dict[str, dict[str, Any]] = {
    "half": {"method": "magnitude", "sparsity": 0.5},
    "2:4": {"method": "magnitude", "n_m": "2:4"},
    "4:8": {"method": "magnitude", "n_m": "4:8"},
}
COMPUTE = ComputeSettings(device="cpu", batch_size=2)
STREAMED = COMPUTE.model_copy(update={"placement": "streamed"})
GAIN = method(method="gain")
TOKENS = (1, 1, 0.3, 0.3, 0.3, 0.3)


@dataclass(frozen=True)
class Bench:
    """A pico model, pruned by magnitude in several ways or quantised, and data; float32 on disk."""

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
        self, out: Path, settings: MethodSettings = GAIN, way: str = "half", **changes: Any
    ) -> Ranking:
        given = {"calibration": self.calibration, "compute": COMPUTE} | changes
        return stages.write_ranking(
            stages.Setup(self.dense, **given), self.pruned(way), out, settings
        )

    def losses(self, ranking: Ranking, *, held_out: bool, way: str = "half") -> Losses:
        """Mean divergence from the dense model at the start of answers, by whole forwards."""
        pruned, processor = self.pruned(way), load_processor(self.dense)
        dense, model = load_model(self.dense), load_model(pruned)
        patch = patch_of(ranking, self.dense, pruned) if len(ranking) else None
        means = []
        answers = self.root.with_name(f"{self.root.name}-answers")
        answered = imitation_data(stages.Setup(self.dense, self.calibration, COMPUTE), answers)
        for reading in answered.values():
            own = hold_out(reading.examples, gaining.HELD_OUT, self.calibration.seed)[held_out]
            with patched(model, pruned.architecture, patch) if patch else nullcontext():
                means.append(
                    sum(_divergence(dense, model, processor, one) for one in own) / len(own)
                )
        return Losses(*means)


def _divergence(dense: Any, model: Any, processor: Any, example: Example) -> float:
    batch = response_batch(processor, [example])
    mask = batch.labels[0, 1:] != -100
    wanted, own = (
        truth.full_forward(one, batch.inputs).logits[0, :-1][mask].double().log_softmax(-1)
        for one in (dense, model)
    )
    costs = (wanted.exp() * (wanted - own)).sum(dim=-1).tolist()
    return sum(weight * cost for weight, cost in zip(TOKENS, costs, strict=False))


def _prompts(root: Path, images: bool) -> list[Example]:
    """Four of each kind, two sources a kind, with texts of their own and no response."""
    return [
        replace(one, instruction=f"{one.instruction} {kind}", response=None)
        for kind, harmful in (("badly", True), ("well", False))
        for one in pico.write_examples(root / "data" / "images", 4, harmful, images)
    ]


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    made: dict[str, Bench] = {}

    def bench(family: str) -> Bench:
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            dense = open_source(pico.save(family, root / "dense", max_shard_size="300KB"))
            write_jsonl(root / "data" / "data.jsonl", _prompts(root, family in pico.VLM_FAMILIES))
            made[family] = Bench(root)
            for way, fields in METHODS.items():
                settings = prune_settings(**fields)
                stages.prune_checkpoint(
                    stages.Setup(dense, made[family].calibration, COMPUTE), root / way, settings
                )
            edits = {
                linear.tensor: lambda weight: quantised(weight, 2, 32)
                for linear in dense.architecture.linears
            }
            (embeddings,) = (
                one for one in dense.checkpoint.tensors if one.endswith("embed_tokens.weight")
            )
            edits[embeddings] = lambda weight: quantised(weight, 4, 32)
            write_edited(dense.checkpoint, root / "2 bits", edits)
        return made[family]

    return bench


@pytest.fixture(autouse=True)
def half_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that of four prompts of two sources one source is held out whole."""
    monkeypatch.setattr(gaining, "HELD_OUT", 0.5)


def same(one: Ranking, other: Ranking) -> bool:
    names = ("linear", "position", "removed", "score")
    return all(torch.equal(getattr(one, n), getattr(other, n)) for n in names)


def approx(losses: Losses | Mapping[str, float]) -> Any:
    given = losses if isinstance(losses, Mapping) else vars(losses)
    return pytest.approx(dict(given), rel=1e-3, abs=1e-5)


# The path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "way"),
    [("mllama", "half"), ("qwen2_vl", "half"), ("llama", "half"), ("qwen2_vl", "2 bits")],
)
def test_restoring_lowers_the_losses(family, way, benches, tmp_path, monkeypatch):
    """As told of the path, by whole forward passes; streamed the same, and no file changes."""
    monkeypatch.setattr(gaining, "MOST_STEPS", 3)
    bench = benches(family)
    before = tree(bench.root)
    ranking = bench.rank(tmp_path / "resident", way=way)
    assert len(ranking) > 10, "nothing helps"
    about = ranking.about
    kind = "changed" if way == "2 bits" else "pruned"
    assert about.get("kind", "pruned") == kind
    pruned, restored = (bench.losses(one, held_out=True, way=way) for one in (empty(), ranking))
    assert about["start"] == approx(pruned)
    assert about["steps"][-1]["held_out"] == approx(restored)
    assert about["steps"][0]["gradient"] == approx(bench.losses(empty(), held_out=False, way=way))
    assert restored.sum < 0.95 * pruned.sum
    control = bench.rank(tmp_path / "control", method(method="random", count=len(ranking)), way)
    assert restored.sum < bench.losses(control, held_out=True, way=way).sum
    streamed = bench.rank(tmp_path / "streamed", way=way, compute=STREAMED)
    assert same(streamed, ranking)
    assert tree(bench.root) == before, "a weight was written into the checkpoint's file"
    pairs = zip(ranking.linear.tolist(), ranking.position.tolist(), strict=True)
    assert len(set(pairs)) == len(ranking), "a weight is restored twice"
    for index, linear in enumerate(bench.dense.architecture.linears):
        free = restorable(
            bench.dense.checkpoint.read(linear.tensor),
            bench.pruned(way).checkpoint.read(linear.tensor),
            kind,
        )
        assert free.flatten()[ranking.position[ranking.linear == index]].all()
    assert not list(tmp_path.glob(".*")), "unfinished work is left behind"


@pytest.mark.slow
@pytest.mark.parametrize("swap", [False, True])
def test_what_every_step_did(swap, benches, tmp_path):
    """It restored the best number that it tried; the first step that does not help is the last."""
    ranking = benches("mllama").rank(tmp_path / "ranking", GAIN.model_copy(update={"swap": swap}))
    steps, end = ranking.about["steps"], ranking.about["end"]
    assert len(steps) >= 3 and end in ("held-out", "steps")
    before, loss = 0, Losses(**ranking.about["start"]).sum
    falls, taken_before = [], 0
    for step in steps:
        tries, now = step["tries"], Losses(**step["held_out"]).sum
        taken = step["restored"] - before
        best = min([*tries, (0, loss)], key=lambda one: one[1])
        assert [taken, now] == pytest.approx(best)
        score = ranking.score[before : step["restored"]]
        assert (score > 0).all() and (score.diff() <= 0).all()
        assert taken <= tries[0][0] <= step["candidates"]
        predicted = float(score.double().sum())
        assert step["limit"] == limit_by_hand(taken, taken_before, step)
        taken_before = taken
        assert taken == 1 or predicted <= Losses(**step["gradient"]).sum / 2, "beyond first order"
        falls.append((loss - now) / loss)
        before, loss = step["restored"], now
    assert before == len(ranking)
    least = gaining.LEAST_FALL
    assert all(fall >= least for fall in falls[:-1])
    assert falls[-1] < least if end == "held-out" else len(steps) == gaining.MOST_STEPS


def limit_by_hand(taken: int, before: int, step: Mapping[str, Any]) -> str:
    """From the figures of a step alone; of a path that is far below its limit of weights."""
    numbers = [number for number, _ in step["tries"]]
    if taken == 0:
        return "nothing" if step["candidates"] else "candidates"
    if taken < numbers[0]:
        fewest = len(numbers) == gain.MOST_TRIES or numbers[-1] == 1
        return "fewest" if fewest and taken == numbers[-1] else "held-out"
    if taken < step["candidates"]:
        return "first-order"
    return "doubling" if taken == 2 * before else "candidates"


@pytest.mark.parametrize("end", ["candidates", "weights"])
def test_other_ends(end, benches, tmp_path, monkeypatch):
    notes: list[str] = []

    class Told(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    if end == "candidates":
        monkeypatch.setattr(gain_step, "worth_of", lambda safety, _: torch.full_like(safety, -INF))
    else:
        monkeypatch.setattr("regraft.restoration.methods.gain.method.path_limit", lambda _: 2)
    found = benches("llama").rank(tmp_path / "ranking", progress=Told())
    assert found.about["end"] == end
    assert len(found) == (0 if end == "candidates" else 2)
    if end == "candidates":
        (step,) = found.about["steps"]
        assert step["tries"] == [] and step["held_out"] == found.about["start"]
    assert any(REASONS[end] in note for note in notes)
    (described,) = (note for note in notes if "weights tried" in note)
    (step,) = found.about["steps"]
    assert step["limit"] == end and described.endswith(LIMITS[end])
    patch = stages.write_patch(
        benches("llama").dense,
        benches("llama").pruned(),
        tmp_path / "patch",
        GAIN,
        ranking_file=tmp_path / "ranking",
    )
    assert read_path(patch.about) == read_path(found.about)
    settings = GAIN.model_copy(update={"count": 3, "budget": None})
    told = f"{patch.restored} of 3 weights allowed by the budget: {REASONS[end]}"
    assert _below_budget(patch, settings) == told
    enough = settings.model_copy(update={"count": 2})
    assert (_below_budget(patch, enough) == "") == (end == "weights")


class Told(Progress):
    """Every task as a list: what was announced, then units done, and those beyond in a tuple."""

    def __init__(self) -> None:
        self.tasks: dict[str, list[Any]] = {}

    @contextmanager
    def task(self, what: str, total: int, unit: str = "") -> Iterator[Task]:
        heard = self.tasks.setdefault(what, [total])
        yield Task(heard.append, lambda more: heard.append((more,)))


def test_progress_moves_while_numbers_are_tried(benches, tmp_path, monkeypatch):
    """With each number tried; as much is done as is announced, or told of before it is done."""
    bench, told, tries = benches("llama"), Told(), []
    true = gain_step.line_search

    def heard(value: Callable[[int], float], now: float, most: int) -> Any:
        (*_, (_, units)) = told.tasks.items()
        seen = [len(units)]

        def watched(number: int) -> float:
            loss = value(number)
            seen.append(len(units))
            return loss

        found = true(watched, now, most)
        tries.append(seen)
        return found

    monkeypatch.setattr(gaining, "MOST_STEPS", 3)
    monkeypatch.setattr(gain_step, "line_search", heard)
    about = bench.rank(tmp_path / "ranking", progress=told).about
    steps = [units for what, units in told.tasks.items() if what.startswith("Step")]
    layers, before = bench.dense.architecture.layers, []
    assert len(steps) == len(tries) == len(about["steps"]) >= 2
    for (announced, *units), seen, step in zip(steps, tries, about["steps"], strict=True):
        number = len(step["tries"])
        assert len(seen) == number + 1
        assert all(after > earlier for earlier, after in pairwise(seen)), "it stands still"
        done = sum(one for one in units if isinstance(one, int))
        more = sum(one[0] for one in units if isinstance(one, tuple))
        expected = round(sum(before) / len(before)) if before else 2
        a_try = 4 * len(layers)  # two held-out prompts of each kind
        assert announced == 4 * 4 * len(layers) + expected * a_try
        assert done == 4 * 4 * len(layers) + number * a_try
        assert more == max(0, number - expected) * a_try
        so_far, total = 0, announced
        for one in units:
            so_far, total = (
                (so_far + one, total) if isinstance(one, int) else (so_far, total + one[0])
            )
            assert so_far <= total, "more is done than there is"
        before.append(number)


def test_how_long_a_path_may_be():
    assert [gaining.path_limit(n) for n in (7, 20_000, 10**7, 10**9)] == [7, 10**4, 10**4, 10**6]


def path_of(*held_out: float, restored: Sequence[int] = ()) -> GainPath:
    """A path with these held-out losses, at the start and after each step of one more weight."""
    start, *after = (Losses(0, loss) for loss in held_out)
    counts = restored or range(1, len(after) + 1)
    steps = (
        StepRecord(count, start, loss, 9, (), "held-out")
        for count, loss in zip(counts, after, strict=True)
    )
    return GainPath(start, tuple(steps))


@pytest.mark.parametrize(
    ("losses", "end"),
    [
        ([1], None),
        ([1, 0.98], None),
        ([1, 0.991], "held-out"),
        ([1, 0.5, 0.496], "held-out"),
        ([1, 0.5, 0.49], None),
        ([1, 0], None),
        ([-1e-9, -1e-9], "held-out"),
        ([32, 16, 8, 4, 2, 1], "steps"),
    ],
)
def test_a_path_ends_where_a_step_takes_less_than_a_hundredth_of_the_loss(losses, end):
    assert gaining._end(path_of(*losses), most=100) == end
    if len(losses) == 2 and end is None:
        assert gaining._end(path_of(*losses), most=1) == "weights"


def test_a_step_has_room_for_twice_the_one_before():
    assert gaining._room(path_of(1), 100) == (100, "weights")
    assert gaining._room(path_of(1, 0.5, 0.2, restored=[10, 13]), 100) == (6, "doubling")
    assert gaining._room(path_of(1, 0.5, restored=[60]), 100) == (40, "weights")


def test_a_step_needs_no_room_for_files_that_it_overwrites(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(gaining, "hidden_state_bytes", lambda *_: 500)
    monkeypatch.setattr(gaining, "require_space", lambda *given: asked.append(given))
    side = gain_step.Prompts(None, None, None)
    problem = gain_step.Problem(None, None, None, (side, side), tmp_path / "states")
    gaining._require_space(problem)
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "of a killed step").write_bytes(bytes(300))
    gaining._require_space(problem)
    assert asked == [(tmp_path, 1000), (tmp_path, 700)]


def test_gradients_are_of_the_prompts_that_are_not_held_out(benches, tmp_path, monkeypatch):
    fitted, held = set(), set()
    layer_gradients, together = gain_step.layer_gradients, gain_step.losses_together

    def gradients(layerwise: Any, *arguments: Any, **named: Any) -> Any:
        fitted.update(name for batch in layerwise.batches for name in batch.ids)
        return layer_gradients(layerwise, *arguments, **named)

    def losses(sides: Any, advance: Any) -> Any:
        held.update(
            name for layerwise, _ in sides for batch in layerwise.batches for name in batch.ids
        )
        return together(sides, advance)

    monkeypatch.setattr(gaining, "MOST_STEPS", 2)
    monkeypatch.setattr(gain_step, "layer_gradients", gradients)
    monkeypatch.setattr(gain_step, "losses_together", losses)
    bench = benches("llama")
    bench.rank(tmp_path / "ranking")
    splits = [
        hold_out(draw_prompts(bench.dense, bench.calibration, kind).examples, 0.5, 0)
        for kind in KINDS
    ]
    assert fitted == {one.id for fit, _ in splits for one in fit}
    assert held == {one.id for _, out in splits for one in out}


def test_what_does_not_help_on_held_out_prompts_is_not_restored(benches, tmp_path, monkeypatch):
    """Held-out answers of the pruned model itself: every change is one for the worse."""
    bench = benches("llama")
    true = gain_step.line_search
    searched = []

    def from_nothing(value: Callable[[int], float], now: float, most: int) -> Any:
        weights = gain_step.weights_of(network[0], bench.dense.architecture)
        before = [weight.clone() for weight in weights]
        found = true(lambda n: now + value(n), now, most)
        searched.append((before, found))
        return found

    network: list[Any] = []
    step = gaining.step

    def spied(problem: Any, *rest: Any) -> Any:
        network.append(problem.model.network)
        found = step(problem, *rest)
        for weight, old in zip(
            gain_step.weights_of(network[0], bench.dense.architecture), searched[0][0], strict=True
        ):
            assert torch.equal(weight, old), "a try is left in the model"
        return found

    monkeypatch.setattr(gain_step, "line_search", from_nothing)
    monkeypatch.setattr(gaining, "step", spied)
    ranking = bench.rank(tmp_path / "ranking")
    assert len(ranking) == 0 and ranking.about["end"] == "held-out"
    (step_,) = ranking.about["steps"]
    most = step_["tries"][0][0]
    assert len(step_["tries"]) == min(gain.MOST_TRIES, most.bit_length())
    assert step_["held_out"] == ranking.about["start"]
    patch = stages.write_patch(
        bench.dense, bench.pruned(), tmp_path / "patch", GAIN, ranking_file=tmp_path / "ranking"
    )
    assert patch.restored == 0


@pytest.mark.parametrize("loss", [math.nan, INF])
def test_a_model_whose_loss_is_not_finite_is_refused(loss, benches, tmp_path, monkeypatch):
    monkeypatch.setattr(gaining, "held_out_losses", lambda *_: Losses(loss, 1.0))
    with pytest.raises(RegraftError, match=r"held-out prompts is (nan|inf): .* Use float32"):
        benches("llama").rank(tmp_path / "ranking")


def test_a_try_whose_loss_is_not_finite_is_not_taken():
    taken, tries = gain.line_search(lambda n: math.nan if n > 2 else 0.5, 1.0, 8)
    assert taken == 2 and [one.number for one in tries] == [2, 1]


# Held-out prompts


def of(categories: Sequence[str], harmful: bool = True) -> Reading:
    given = [
        Example(f"{harmful}-{i}", "?", harmful, name, response="No.")
        for i, name in enumerate(categories)
    ]
    return Reading("file", tuple(given))


def test_whole_sources_are_held_out_and_named(monkeypatch):
    notes: list[str] = []

    class Told(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    names = ["advbench"] * 12 + ["harmbench"] * 2 + ["strongreject"] * 2
    monkeypatch.setattr(gaining, "HELD_OUT", 0.25)
    fit, held = gaining._split("safety", of(names), Told(), 0)
    assert {one.category for one in fit} == {"advbench"}
    assert {one.category for one in held} == {"harmbench", "strongreject"}
    gaining._split("utility", of(["alpaca"] * 8), Told(), 0)
    assert notes == [
        "harmful prompts: 12 for gradients, 4 held out (4 of harmbench, strongreject)",
        "harmless prompts: 6 for gradients, 2 held out (2 drawn)",
    ]


def test_one_prompt_of_a_kind_is_too_few(benches, tmp_path, monkeypatch):
    """Found before the pruned model is loaded."""
    bench = benches("llama")
    one = [
        *pico.write_examples(tmp_path, 3, images=False),
        *pico.write_examples(tmp_path, 1, harmful=False, images=False),
    ]
    data = DataSource(name="jsonl", path=write_jsonl(tmp_path / "data.jsonl", one))
    monkeypatch.setattr(
        teacher, "load_layerwise", lambda *_, **__: pytest.fail("a model is loaded")
    )
    with pytest.raises(RegraftError, match=r"harmless.*: .* at least 2; got 1\. .*samples"):
        bench.rank(tmp_path / "ranking", calibration=CalibrationSettings(data=data, samples=4))
    assert not (tmp_path / "ranking").exists() and not list(tmp_path.glob(".*"))


# Budgets


def budgets(data):
    """Variants of gain in a recipe; two search among several budgets."""
    search = {"validation": data, "points": 2}
    every = (
        {"name": "few", "count": 20},
        {"name": "some", "budget": 20},
        {"name": "most", "count": 60_000},
        {"name": "searched", "count": 50_000, "search": search},
        {"name": "searched-more", "count": 60_000, "search": search},
    )
    return [{"method": "gain", "checkpoint": False} | one for one in every]


def places(patch):
    """(tensor, position) of all weights of a patch."""
    return {(name, at) for name, one in patch.tensors.items() for at in one.positions.tolist()}


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_budgets_take_the_first_part_of_one_path(benches, tmp_path, monkeypatch):
    """In a run with searches too, whose points are of several budgets."""
    bench, walked = benches("llama"), []
    restore = gaining.Gain.rank

    def counted(*arguments: Any, **named: Any) -> Ranking:
        walked.append(1)
        return restore(*arguments, **named)

    monkeypatch.setattr(gaining.Gain, "rank", counted)
    data = str(bench.root / "data" / "data.jsonl")
    every = budgets(data)
    content = {
        "model": str(bench.root / "dense"),
        "pruned": str(bench.root / "half"),
        "calibration": {"data": data, "samples": 4},
        "realign": every,
        "evaluate": {"suite": data, "max_new_tokens": 2},
        "compute": {"device": "cpu", "batch_size": 4},
    }
    made = pipeline.run_one(Recipe.model_validate(content), tmp_path / "run").runs[0]
    assert len(walked) == 1
    (file,) = (tmp_path / "run" / "rankings").glob("gain-*")
    path = load_ranking(file)
    settings = path.about["settings"]
    assert settings["budget"] is None and settings["count"] is None
    (shared,) = made.paths
    assert (shared.pruning, shared.methods) == ("pruned", tuple(one["name"] for one in every))
    assert path_to_json(shared.path).items() <= path.about.items()
    restored = {one.name: one.restored for one in made.variants}
    assert (restored["few"], restored["most"]) == (20, len(path))
    assert restored["some"] == 20 * path.about["pruned"] // 10_000 < len(path)
    linears = list(bench.dense.architecture.linears)
    for name in ("few", "some", "most"):
        patch = load_patch(tmp_path / "run" / "patches" / f"{name}.safetensors")
        first = path.first(restored[name])
        taken = zip(first.linear.tolist(), first.position.tolist(), strict=True)
        assert places(patch) == {(linears[i].tensor, at) for i, at in taken}
    for name in ("searched", "searched-more"):
        curve = read_curve(tmp_path / "run" / "curves" / f"{name}.json")
        assert [one.restored for one in curve.points] == [0, round(len(path) / 2), len(path)]


# Stopped and taken up again


@pytest.mark.slow
@pytest.mark.parametrize(("when", "swap"), [("before", False), ("after", True)])
def test_stopped_anywhere_and_taken_up_again(when, swap, benches, tmp_path, monkeypatch):
    """The same file; finished steps are not repeated, nor is the dense model asked again."""
    monkeypatch.setattr(gaining, "MOST_STEPS", 3)
    bench, settings = benches("llama"), GAIN.model_copy(update={"swap": swap})
    started: list[int] = []
    asked: list[int] = []
    step, save, states = gaining.step, gaining.save_ranking, teacher.final_states

    def counted(*arguments: Any) -> Any:
        started.append(len(arguments[2]))  # so many are restored
        return step(*arguments)

    def asking(*arguments: Any) -> Any:
        asked.append(1)
        return states(*arguments)

    monkeypatch.setattr(gaining, "step", counted)
    monkeypatch.setattr(teacher, "final_states", asking)
    whole = bench.rank(tmp_path / "whole" / "ranking", settings)
    needed = list(started)
    assert len(needed) == len(whole.about["steps"]) >= 3, "too few steps to stop among them"
    for last in range(1, len(needed) + 1):
        saved: list[int] = []

        def stopping(path: Path, ranking: Ranking, last: int = last, saved: Any = saved) -> None:
            saved.append(1)
            stops = len(saved) == last
            if stops and when == "before":
                raise KeyboardInterrupt
            save(path, ranking)
            if stops:
                raise KeyboardInterrupt

        folder = tmp_path / f"stopped-{last}"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(gaining, "save_ranking", stopping)
            bench.rank(folder / "ranking", settings)
        started.clear()
        asked.clear()
        assert same(bench.rank(folder / "ranking", settings), whole)
        assert started == needed[last - 1 if when == "before" else last :]
        assert not asked, "the dense model is asked again"
        assert tree(folder) == tree(tmp_path / "whole")
    started.clear()
    bench.rank(
        tmp_path / "whole" / "ranking", GAIN.model_copy(update={"swap": swap, "budget": 1.0})
    )
    assert not started, "finished work was done again"


# Candidates and swaps


def drawn_gradients(rows: int, columns: int) -> list[torch.Tensor]:
    """Of both losses, with squares below."""
    generator = torch.Generator().manual_seed(0)
    both = [torch.randn(2 * rows, columns, generator=generator) for _ in range(2)]
    for one in both:
        one[rows:].abs_()
    return both


@pytest.mark.parametrize("swap", [False, True])
def test_candidates_are_pruned_weights_that_help_and_cost_no_utility(swap, benches):
    """Each weight by itself; none that was removed before, nor, in a swap, one restored before."""
    bench, index = benches("llama"), 3
    linear = list(bench.dense.architecture.linears)[index]
    dense = bench.dense.checkpoint.read(linear.tensor).float()
    current = bench.pruned().checkpoint.read(linear.tensor).float()
    free = restorable(dense, current).flatten().nonzero().flatten()
    kept = (current.flatten() != 0).nonzero().flatten()
    back, gone = free[::5].clone(), kept[:: len(kept) // len(free[::5])][: len(free[::5])].clone()
    current.view(-1)[back] = dense.reshape(-1)[back]  # a step before
    current.view(-1)[back[::2]] = 0  # as where the model's dtype rounds them to 0
    if swap:
        current.view(-1)[gone] = 0
    n = len(back)
    removed_before = gone if swap else torch.full((n,), KEPT)
    taken = Ranking(torch.full((n,), index), back, removed_before, torch.ones(n))
    gradients = drawn_gradients(*linear.shape)
    problem = gain_step.Problem(None, bench.dense, bench.pruned(), (), Path(), swap)
    found, removed = gain_step._worth(problem, linear, dense, current, taken, gradients)
    rows = linear.shape[0]
    safety, utility = (g[:rows] * (current - dense) for g in gradients)
    wanted = torch.full_like(dense, -INF)
    was_free = restorable(dense, bench.pruned().checkpoint.read(linear.tensor).float())
    for at in was_free.flatten().nonzero().flatten().tolist():
        s, u = float(safety.view(-1)[at]), float(utility.view(-1)[at])
        if at not in set(back.tolist()) and u >= 0 and s + u > 0:
            wanted.view(-1)[at] = s + u
    assert (wanted > 0).sum() > 100
    if not swap:
        assert removed is None
        torch.testing.assert_close(found, wanted)
        return
    chosen = found > -INF
    assert chosen.sum() > 10 and (wanted[chosen] > 0).all()
    partners = removed[chosen]
    assert (current.view(-1)[partners] != 0).all(), "pruned already"
    assert not set(partners.tolist()) & set(back.tolist()), "restored before"
    cost = sum((-g[:rows] * current + g[rows:] * current**2 / 2).abs() for g in gradients)
    torch.testing.assert_close(found[chosen], wanted[chosen] - cost.view(-1)[partners])


def test_a_swap_removes_what_neither_loss_needs(benches):
    """Also where a removal is predicted to help."""
    bench, index = benches("llama"), 3
    linear = list(bench.dense.architecture.linears)[index]
    weight = bench.pruned().checkpoint.read(linear.tensor).float()
    rows, columns = linear.shape
    gradients = drawn_gradients(rows, columns)
    problem = gain_step.Problem(None, bench.dense, bench.pruned(), (), Path(), swap=True)
    dense = bench.dense.checkpoint.read(linear.tensor).float()
    worth, removed = gain_step._worth(problem, linear, dense, weight, empty(), gradients)
    moved = sum(
        (-g[:rows] * weight + g[rows:] * weight**2 / 2).abs() for g in gradients
    ).masked_fill(weight == 0, INF)
    for row in range(rows):
        chosen = removed[row][removed[row] != KEPT]
        assert len(chosen) > 1, "too few swaps to tell"
        least = moved[row].topk(len(chosen), largest=False).indices + row * columns
        assert set(chosen.tolist()) == set(least.tolist())
    assert (worth > 0).any() and ((worth > 0) <= (removed != KEPT)).all()


def kept_in_groups(source: Any, linear: Any, m: int) -> torch.Tensor:
    return (source.read(linear.tensor) != 0).reshape(-1, m).sum(dim=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "way"), [("qwen2_vl", "half"), ("qwen2_vl", "2:4"), ("llama", "4:8")]
)
def test_swaps_keep_the_sparsity(family, way, benches, tmp_path):
    """As many zeros on disk, in every row and N:M group; reverting gives the pruned bytes."""
    bench = benches(family)
    settings = GAIN.model_copy(update={"swap": True, "budget": None, "count": 10_000})
    ranking = bench.rank(tmp_path / "ranking", settings, way)
    assert len(ranking) > 3
    assert (ranking.removed != KEPT).all()
    for column in (ranking.position, ranking.removed):
        pairs = list(zip(ranking.linear.tolist(), column.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
    dense, pruned = bench.dense, bench.pruned(way)
    patch = tmp_path / "patch"
    made = stages.write_patch(dense, pruned, patch, settings, ranking_file=tmp_path / "ranking")
    assert made.restored == made.removed == len(ranking)
    assert made.about.get("violated_groups", 0) == 0
    assert ("n_m" in made.about) == (way != "half")
    stages.patch_checkpoint("apply", pruned.folder, patch, tmp_path / "applied")
    applied = open_checkpoint(tmp_path / "applied")
    assert zeros(applied, pruned.architecture) == zeros(pruned.checkpoint, pruned.architecture)
    changed = 0
    for linear in pruned.architecture.linears:
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
    stages.patch_checkpoint("revert", tmp_path / "applied", patch, tmp_path / "off")
    assert shards(tmp_path / "off") == shards(pruned.folder)
    assert load_patch(patch).removed == len(ranking)
