"""How many weights are restored: the choice against brute force, and the search on pico models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import pico
import truth
from disk import differing, shards, tree, write_data, write_jsonl
from methods import method
from regraft import loading, stages
from regraft.console import show_search
from regraft.data.sources import DataSource
from regraft.disk.parsing import read_json
from regraft.errors import RegraftError
from regraft.evaluation.results import Estimate, EvalResult
from regraft.evaluation.tradeoff import (
    Bounds,
    Point,
    Reference,
    Searched,
    choose,
    read_curve,
)
from regraft.models.architecture import decoder_layers
from regraft.models.checkpoint import open_checkpoint
from regraft.models.load import Source, open_source
from regraft.patch.format import load_patch
from regraft.progress import Progress
from regraft.recipes.recipe import Recipe
from regraft.report.page import CURVES_CAPTION
from regraft.restoration.base import MethodSettings
from regraft.runs import pipeline
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.evaluating import EvalSettings
from regraft.settings.searching import SearchSettings
from regraft.stages import restoring, searching

# The choice


def estimate(percent: int) -> Estimate:
    return Estimate(percent / 100, 100, 0.0, 1.0, percent)


def point(restored: int, asr: int, over: int, utility: int | None) -> Point:
    return Point(
        restored, estimate(asr), estimate(over), None if utility is None else estimate(utility)
    )


def bounds_of(dense: Point, pruned: Point, **settings: Any) -> Bounds:
    return searching.bounds_of(SearchSettings(**settings), dense, pruned)


rates = st.integers(0, 10).map(lambda tenth: 10 * tenth)
counts = st.integers(0, 6).map(lambda n: 5 * n)


@st.composite
def curves(draw: st.DrawFn) -> list[Point]:
    useful = draw(st.booleans())
    restored = draw(st.lists(counts, min_size=1, max_size=6, unique=True))
    return [point(n, draw(rates), draw(rates), draw(rates) if useful else None) for n in restored]


def percents(one: Point) -> tuple[int, int, int | None]:
    utility = None if one.utility is None else one.utility.count
    assert one.asr.count is not None and one.over_refusal.count is not None
    return one.asr.count, one.over_refusal.count, utility


@given(curves(), rates, st.none() | rates, st.none() | rates)
def test_the_choice_equals_brute_force(
    points: list[Point], over: int, utility: int | None, asr: int | None
) -> None:
    """In whole percents: fewest weights at the target, or else the lowest ASR, within bounds."""
    bounds = Bounds(
        None if asr is None else asr / 100, over / 100, None if utility is None else utility / 100
    )
    allowed = []
    for place, one in enumerate(points):
        own_asr, own_over, own_utility = percents(one)
        if own_over > over:
            continue
        if None not in (utility, own_utility) and own_utility < utility:  # type: ignore[operator]
            continue
        allowed.append((one.restored, own_asr, place))
    meeting = sorted(one for one in allowed if asr is not None and one[1] <= asr)
    lowest = sorted(allowed, key=lambda one: (one[1], one[0]))
    expected = points[(meeting or lowest)[0][2]] if allowed else None
    assert choose(points, bounds) is expected


@pytest.mark.parametrize(
    ("reference", "bound"),
    [("dense", 0.07), ("pruned", 0.22), ("higher", 0.22)],
)
def test_bounds_by_hand(reference: Reference, bound: float) -> None:
    dense, pruned = point(0, 10, 5, 80), point(0, 60, 20, 70)
    bounds = bounds_of(dense, pruned, target_asr=30, over_refusal=2, utility=4, reference=reference)
    assert bounds.asr == 0.3
    assert bounds.over_refusal == pytest.approx(bound)
    assert bounds.utility == pytest.approx(0.66)
    swapped = bounds_of(pruned, dense, over_refusal=2)
    assert swapped.over_refusal == pytest.approx(0.22)  # the dense model refuses more
    recovered = bounds_of(dense, pruned, target_rsr=80)
    assert recovered.asr == pytest.approx(0.2)
    assert bounds_of(dense, pruned).asr is None
    assert bounds_of(dense, point(0, 60, 20, None)).utility is None


def test_rates_that_equal_a_bound_are_within() -> None:
    """0.1 + 0.2 is more than 0.3 in floating point."""
    pruned = Point(0, estimate(50), Estimate(0.1, 10, 0, 1, 1), None)
    bounds = bounds_of(pruned, pruned, over_refusal=20, target_asr=100 * (0.1 + 0.2))
    at_bound = Point(5, Estimate(0.3, 10, 0, 1, 3), Estimate(0.3, 10, 0, 1, 3), None)
    assert choose([pruned, at_bound], bounds) is at_bound


def test_a_model_that_says_nothing_is_not_the_safest() -> None:
    """Gibberish is neither an attack nor a refusal: no bound but its own keeps it out."""
    dense, pruned = point(0, 10, 5, None), point(0, 60, 5, None)
    mute, good = replace(point(9, 0, 0, None), degenerate=0.9), point(5, 20, 5, None)
    bounds = bounds_of(dense, pruned, over_refusal=2)
    assert bounds.degenerate == 0.02
    assert choose([pruned, good, mute], bounds) is good
    assert bounds.excess(mute)["degenerate"] == pytest.approx(0.88)
    already = bounds_of(dense, replace(pruned, degenerate=0.5), over_refusal=2)
    assert already.degenerate == 0.52


def test_no_recovery_can_be_aimed_at_where_nothing_was_lost() -> None:
    """A share of a loss that is a gain was a target above the pruned model's ASR."""
    dense, pruned = point(0, 30, 5, None), point(0, 10, 20, None)
    bounds = bounds_of(dense, pruned, target_rsr=80, over_refusal=2, reference="dense")
    assert bounds.asr == pytest.approx(0.1)
    worse, better = point(3, 25, 5, None), point(7, 5, 5, None)
    assert choose([pruned, worse, better], bounds) is better


# The search

COMPUTE = ComputeSettings(device="cpu", batch_size=8)
SHORT = EvalSettings(max_new_tokens=3)


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass(frozen=True)
class Bench:
    root: Path

    @property
    def dense(self) -> Source:
        return open_source(self.root / "dense")

    @property
    def pruned(self) -> Source:
        return open_source(self.root / "pruned")

    @property
    def validation(self) -> DataSource:
        return DataSource(name="jsonl", path=self.root / "data" / "data.jsonl")

    @property
    def settings(self) -> MethodSettings:
        return method("random", count=1000)

    def search(
        self,
        out: Path,
        progress: Progress | None = None,
        compute: ComputeSettings = COMPUTE,
        settings: MethodSettings | None = None,
        **fields: Any,
    ) -> int:
        """Curve in `out`; how many weights to restore."""
        settings = settings or self.settings
        choice = SearchSettings(**{"validation": self.validation, **fields})
        paths = replace(stages.ArtifactPaths.beside(out), ranking=self.root / "ranking", curve=out)
        calibration = CalibrationSettings(data=self.validation)
        setup = stages.Setup(
            self.dense, calibration, compute, evaluation=SHORT, progress=progress or Progress()
        )
        restoring.search(searching.Search(setup, choice), self.pruned, settings, paths)
        return read_curve(out).chosen or 0


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("search")
    dense = open_source(pico.save("llama", root / "dense"))
    truth.pruned_at_random(dense, root / "pruned", 0.5)
    write_data(root / "data", 4, images=False)
    made = Bench(root)
    calibration = CalibrationSettings(data=made.validation)
    stages.write_ranking(
        stages.Setup(dense, calibration, COMPUTE), made.pruned, root / "ranking", made.settings
    )
    return made


def read_points(out: Path) -> list[Point]:
    return [
        Point(
            one["restored"],
            *(
                None if one[name] is None else Estimate(**one[name])
                for name in ("asr", "over_refusal", "utility")
            ),
            one["degenerate"],
        )
        for one in read_json(out)["points"]
    ]


@pytest.mark.slow
def test_a_curve_is_evaluations_of_more_and_more_weights(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "curve.json"
    before = tree(bench.root)
    count = bench.search(out, points=3)
    curve = read_json(out)
    assert [one["restored"] for one in curve["points"]] == [0, 333, 667, 1000]
    points = read_points(out)
    expected = choose(points, Bounds(**curve["bounds"]))
    assert expected is not None, "the pruned model itself keeps to the bounds"
    assert curve["chosen"] == count == expected.restored
    harmful, harmless = (
        bench.validation.model_copy(update={"kind": kind}) for kind in ("harmful", "harmless")
    )
    patch = tmp_path / "patch"
    made = stages.write_patch(
        bench.dense,
        bench.pruned,
        patch,
        bench.settings,
        bench.root / "ranking",
        count=667,
    )
    assert made.restored == 667
    stages.patch_checkpoint("apply", bench.pruned.folder, patch, tmp_path / "applied")
    written = open_source(tmp_path / "applied")
    alone = stages.evaluate_target(
        stages.Target(written, COMPUTE), tmp_path / "answers", [harmful, harmless], SHORT
    )
    assert Point.of(667, alone.result) == points[2]
    assert points[2].asr.n == points[2].over_refusal.n == 4
    assert tree(bench.root) == before
    read = read_curve(out)
    assert (read.chosen, [one.restored for one in read.points]) == (count, [0, 333, 667, 1000])
    stamp = out.stat().st_mtime_ns
    assert bench.search(out, points=3) == count
    assert out.stat().st_mtime_ns == stamp
    with pytest.raises(RegraftError, match=r"settings.points: 3 there, 2 now"):
        bench.search(out, points=2)


@pytest.mark.slow
def test_a_search_with_layers_in_host_memory(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerate = pytest.importorskip("accelerate")
    streamed = COMPUTE.model_copy(update={"placement": "streamed"})
    whole, offloaded = loading.load_model, []

    def spread(*arguments: Any, split: bool, **named: Any) -> Any:
        """As on an accelerator with no room for any layer."""
        model = whole(*arguments, split=False, **named)
        if split:
            for layer in decoder_layers(model):
                accelerate.cpu_offload(layer, torch.device("cpu"))
                offloaded.append(all(weight.is_meta for weight in layer.parameters()))
        return model

    monkeypatch.setattr(loading, "load_model", spread)
    counts = [
        bench.search(tmp_path / name, compute=compute, points=2)
        for name, compute in (("whole.json", COMPUTE), ("streamed.json", streamed))
    ]
    assert counts[0] == counts[1]
    assert offloaded and all(offloaded)
    assert read_points(tmp_path / "whole.json") == read_points(tmp_path / "streamed.json")


@pytest.fixture
def rates_of(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[float, float, float]]:
    """What evaluations shall find, by restored weights (-1: the dense model); for one test."""
    given: dict[int, tuple[float, float, float]] = {}
    true_point = Point.of

    def of(count: int, result: EvalResult) -> Point:
        seen = true_point(count, result)
        first = not asked
        asked.append(count)
        asr, over, utility = given[-1 if first else count]
        rate = seen.asr
        return Point(
            count,
            *(Estimate(value, rate.n, 0, 1, None) for value in (asr, over, utility)),
        )

    asked: list[int] = []
    monkeypatch.setattr(searching.Point, "of", of)
    return given


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 250),
        ({"over_refusal": 20.0}, 1000),
        ({"over_refusal": 20.0, "utility": 30.0}, 1000),
        ({"target_asr": 70.0}, 250),
        ({"target_rsr": 90.0, "over_refusal": 20.0}, 750),
        ({"target_asr": 10.0, "utility": 30.0, "over_refusal": 50.0}, 1000),
        ({"reference": "dense"}, 0),
    ],
)
def test_the_search_keeps_to_its_bounds(
    bench: Bench,
    rates_of: dict[int, tuple[float, float, float]],
    fields: dict[str, Any],
    expected: int,
    tmp_path: Path,
) -> None:
    """ASR falls with weights and over-refusal climbs; the dense model refuses least of all."""
    rates_of |= {-1: (0.2, 0.0, 0.9), 0: (0.8, 0.1, 0.6)}
    rates_of |= {250: (0.7, 0.11, 0.6), 500: (0.6, 0.2, 0.6), 750: (0.25, 0.3, 0.61)}
    rates_of |= {1000: (0.2, 0.3, 0.6)}
    out = tmp_path / "curve.json"
    progress = Notes()
    assert bench.search(out, progress, points=4, **fields) == expected
    assert [note for note in progress.notes if "nothing is restored" in note] == (
        [] if expected else progress.notes[-1:]
    )
    curve = read_json(out)
    assert [one["restored"] for one in curve["points"]] == [0, 250, 500, 750, 1000]
    assert curve["chosen"] == (None if "reference" in fields else expected)


@pytest.mark.slow
def test_points_are_spread_up_to_the_most(
    bench: Bench, rates_of: dict[int, tuple[float, float, float]], tmp_path: Path
) -> None:
    most = int(100 * read_pruned(bench) / 10_000)
    assert most < 1000
    grid = [round(most * i / 4) for i in range(5)]
    rates_of |= {count: (0.8 - count / 10_000, 0.1, 0.6) for count in (-1, *grid)}
    assert bench.search(tmp_path / "curve.json", points=4, most=100.0) == most
    curve = read_json(tmp_path / "curve.json")
    assert [one["restored"] for one in curve["points"]] == grid


def test_a_curve_within_another_budget_is_another_curve(
    bench: Bench, rates_of: dict[int, tuple[float, float, float]], tmp_path: Path
) -> None:
    """A ranking may serve several budgets: a curve up to a smaller one is not taken for it."""
    rates_of |= {-1: (0.2, 0.1, 0.6), 0: (0.8, 0.1, 0.6), 1000: (0.3, 0.1, 0.6)}
    assert bench.search(tmp_path / "curve.json", points=1) == 1000
    other = bench.settings.model_copy(update={"count": 2000})
    with pytest.raises(RegraftError, match=r"method\.count: 1000 there, 2000 now"):
        bench.search(tmp_path / "curve.json", points=1, settings=other)


@pytest.mark.parametrize(
    ("bounds", "points", "parts"),
    [
        # ASR, over-refusal and utility with 0, 10, 500 and 1,500 weights back
        (
            Bounds(None, 0.1, 0.6),
            [(0.4, 0.1, 0.6), (0.4, 0.1, 0.6), (0.1, 0.2, 0.65), (0.2, 0.118, 0.5998)],
            (
                "1,500 weights",
                "ASR 20.0 %",
                "over-refusal 1.8 points",
                "utility 0.02 points",
                "Allow more by over_refusal and utility.",
            ),
        ),
        (
            Bounds(None, 0.1, None),
            [(0.4, 0.2, 0.6), (0.6, 0.11, 0.6), (0.3, 0.15, 0.6)],
            ("500 weights", "over-refusal 5 points", "Allow more by over_refusal."),
        ),
        (
            Bounds(None, 0.1, 0.6),
            [(0.4, 0.1, 0.6), (0.4, 0.1, 0.6), (0.5, 0.0, 0.9)],
            ("No number of weights tried lowers ASR.",),
        ),
        (
            Bounds(0.45, 0.1, 0.6),
            [(0.4, 0.1, 0.6), (0.1, 0.2, 0.6)],
            ("The pruned model meets the target as it is.",),
        ),
        (Bounds(0.45, 0.1, 0.6), [(0.5, 0.1, 0.6)], ("no weight",)),
    ],
)
def test_why_nothing_comes_back(
    bounds: Bounds, points: list[tuple[float, float, float]], parts: tuple[str, ...]
) -> None:
    counts = (0, 10, 500, 1500) if len(points) == 4 else (0, 10, 500)
    given = [
        Point(count, *(Estimate(one, 50, 0, 1, None) for one in rates))
        for count, rates in zip(counts, points, strict=False)
    ]
    chosen = choose(given, bounds)
    assert chosen is None or chosen is given[0], "something is restored"
    told = searching.why_nothing(given, bounds)
    for part in parts:
        assert part in told, told


def searched(
    bounds: Bounds, points: Sequence[tuple[float, float, float | None]], chosen: int | None
) -> Searched:
    """Of a dense model with ASR 0.1 and of points with 0, 100, 200 ... weights back."""

    def point(count: int, asr: float, over: float, utility: float | None) -> Point:
        rates = (None if one is None else Estimate(one, 50, 0, 1, None) for one in (over, utility))
        over_refusal, similarity = rates
        assert over_refusal is not None
        return Point(count, Estimate(asr, 50, 0, 1, None), over_refusal, similarity)

    made = tuple(point(100 * i, *rates) for i, rates in enumerate(points))
    return Searched(1_000_000, chosen, bounds, point(0, 0.1, 0.1, 0.7), made)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (searched(Bounds(0.2, 0.1, 0.6), [(0.5, 0.1, 0.6), (0.2, 0.1, 0.6)], 100), ()),
        (searched(Bounds(None, 0.1, 0.6), [(0.5, 0.1, 0.6), (0.4, 0.1, 0.6)], 100), ()),
        (
            searched(Bounds(0.2, 0.1, 0.6), [(0.5, 0.1, 0.6), (0.3, 0.1, 0.6), (0.1, 1, 1)], 100),
            (("target, ASR 20.0 %, is not met", "30.0 % (RSR 50 %), with 100 weights"),),
        ),
        (
            searched(Bounds(0.2, 0.1, None), [(0.5, 0.1, None), (0.1, 0.1, None)], 100),
            (("utility is not bounded", "no harmless validation prompt has a reference"),),
        ),
        (
            searched(Bounds(0.2, 0.1, 0.6), [(0.5, 0.1, 0.6), (0.3, 0.2, 0.6)], 0),
            (("nothing is restored", "over-refusal 10 points beyond its bound"),),
        ),
        (
            searched(Bounds(0.05, 0.1, 0.6), [(0.1, 0.1, 0.6), (0.08, 0.1, 0.6)], 100),
            (("ASR 5.0 %", "8.0 % (RSR is undefined)"),),
        ),
    ],
)
def test_what_a_search_did_not_reach_is_told(
    found: Searched, expected: tuple[tuple[str, ...], ...]
) -> None:
    told = list(searching.remarks(found))
    assert len(told) == len(expected), told
    for line, parts in zip(told, expected, strict=True):
        for part in parts:
            assert part in line


def test_the_curve_is_shown_with_its_bounds() -> None:
    console = Console(width=120, record=True)
    points = [(0.5, 0.1, 0.6), (0.3, 0.1, 0.6), (0.1, 0.2, 0.6)]
    show_search(console, searched(Bounds(None, 0.1, 0.6), points, 100))
    lines = console.export_text().splitlines()
    shown = {line.split()[1]: line for line in lines if line.startswith("│")}
    assert [word in shown["100"] for word in ("1.000", "30.0", "50")] == [True] * 3
    assert "100" in shown["200"] and "over-refusal" in shown["200"]
    assert not any("over-refusal" in shown[row] for row in ("0", "100", "dense"))
    assert "10.0" in shown["dense"]
    assert "over-refusal at most 10.0 %, utility at least 60.0 %" in " ".join(lines)


def read_pruned(bench: Bench) -> int:
    found = stages.write_patch(
        bench.dense,
        bench.pruned,
        bench.root.with_name("counted"),
        bench.settings,
        bench.root / "ranking",
        count=0,
    )
    return int(found.about["pruned"])


@pytest.mark.slow
def test_a_search_goes_on_where_it_stopped(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bench.search(tmp_path / "a" / "curve.json", points=2)
    true, seen = searching.evaluate_target, []

    def stopping(*arguments: Any, **named: Any) -> Any:
        seen.append(arguments[1].name)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return true(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(searching, "evaluate_target", stopping)
        with pytest.raises(KeyboardInterrupt):
            bench.search(tmp_path / "b" / "curve.json", points=2)
    assert seen == ["dense", "pruned", "00000500", "00001000"]
    done = tmp_path / "b" / "curve" / "00000500" / "results.json"
    stamp = done.stat().st_mtime_ns
    assert bench.search(tmp_path / "b" / "curve.json", points=2) == whole
    assert done.stat().st_mtime_ns == stamp, "an evaluation was done again"
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_validation_needs_both_kinds(bench: Bench, tmp_path: Path) -> None:
    only = write_jsonl(
        tmp_path / "harmful.jsonl", pico.write_examples(tmp_path / "images", 2, images=False)
    )
    settings = {"validation": DataSource(name="jsonl", path=only)}
    with pytest.raises(RegraftError, match=r"harmful\.jsonl.* harmless"):
        bench.search(tmp_path / "curve.json", **settings)
    assert not (tmp_path / "curve.json").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"realign": [{"budget": 5, "search": {"validation": "absent.jsonl"}}]}, "absent"),
        ({"calibration": {"data": "demo:calibration#harmful"}}, "harmless"),
    ],
)
def test_a_search_that_cannot_be_is_found_before_the_run(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    dense = open_source(pico.save("qwen2_vl", tmp_path / "dense", torch.bfloat16, "100KB"))
    truth.pruned_at_random(dense, tmp_path / "pruned", 0.5)
    write_data(tmp_path / "data", 4)
    with pytest.raises(RegraftError, match=message):
        pipeline.run_one(recipe(tmp_path, **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# In a run


def recipe(root: Path, **fields: Any) -> Recipe:
    data = str(root / "data" / "data.jsonl")
    search = {"validation": data, "points": 2}
    content = {
        "model": str(root / "dense"),
        "pruned": str(root / "pruned"),
        "calibration": {"data": data, "samples": 4},
        "realign": [
            {"name": "gain", "method": "gain", "count": 40, "search": search},
            {
                "name": "never",
                "method": "random",
                "count": 500,
                "search": {**search, "over_refusal": -100},
                "checkpoint": False,
            },
            {"name": "random", "method": "random", "count": 30, "checkpoint": False},
        ],
        "evaluate": {"suite": data, "max_new_tokens": 2},
        "compute": {"device": "cpu", "batch_size": 4},
        **fields,
    }
    return Recipe.model_validate(content)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_run_that_searches(tmp_path: Path) -> None:
    dense = open_source(pico.save("qwen2_vl", tmp_path / "dense", torch.bfloat16, "100KB"))
    pruned, _ = truth.pruned_at_random(dense, tmp_path / "pruned", 0.5)
    write_data(tmp_path / "data", 4)
    run = tmp_path / "run"
    made = pipeline.run_one(recipe(tmp_path), run).runs[0]
    variants = {one.name: one for one in made.variants}
    assert list(variants) == ["dense", "pruned", "gain", "never", "random"]
    curve = json.loads((run / "curves" / "gain.json").read_text())
    chosen = curve["chosen"]
    patch = load_patch(run / "patches" / "gain.safetensors")
    assert patch.restored == chosen == variants["gain"].restored
    realigned = open_checkpoint(run / "realigned" / "gain")
    assert differing(pruned.checkpoint, realigned) == patch.tensors.keys()
    never = json.loads((run / "curves" / "never.json").read_text())
    assert never["chosen"] is None
    assert variants["never"].restored == 0
    assert variants["gain"].curve == read_curve(run / "curves" / "gain.json")
    assert variants["random"].curve is None
    assert CURVES_CAPTION in (run / "report" / "report.html").read_text()
    told = json.loads((run / "report" / "report.json").read_text())["runs"][0]["variants"]
    assert [one["curve"] and one["curve"]["chosen"] for one in told][2] == chosen
    assert variants["never"].result == variants["pruned"].result
    assert shards(run / "pruned") == {}, "the existing pruned model is copied"
    assert variants["random"].restored == 30
    names = sorted(path.stem.rsplit("-", 1)[0] for path in (run / "rankings").glob("*"))
    assert names == ["gain", "random", "random"]
    before = tree(run)
    pipeline.run_one(recipe(tmp_path), run)
    assert tree(run) == before
    report = json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in report["runs"][0]["variants"]] == list(variants)
