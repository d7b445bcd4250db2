"""Tuning: trials are shared and resumed, bounds count, the outcome fits into a recipe."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import forked
import pico
from commands import exit_code
from disk import tree, write_data
from methods import a_variant, method
from regraft import stages
from regraft.data.sources import DataSource
from regraft.disk.parsing import read_json
from regraft.errors import RegraftError
from regraft.evaluation.results import Estimate
from regraft.evaluation.tradeoff import Bounds, Cost, Point, Tried, Tuned, best_first
from regraft.heads.score import load_heads
from regraft.heads.ships import HeadSettings
from regraft.models.load import open_source
from regraft.patch.format import load_patch
from regraft.pruning.base import prune_settings
from regraft.restoration.base import Between, MethodSettings
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.evaluating import EvalSettings
from regraft.settings.searching import BoundSettings, TuneSettings
from regraft.stages import trials as trials_module
from regraft.stages import tuning
from regraft.stages.searching import Search
from regraft.stages.trials import Trials, space_of
from regraft.stages.tuning import tune_method

pytest.importorskip("optuna")
COMPUTE = ComputeSettings(device="cpu", batch_size=4)
EVALUATION = EvalSettings(max_new_tokens=2, full_answers=False)
SPACE = {"x": Between(-1.0, 1.0), "k": Between(1, 8, log=True, whole=True), "w": ("a", "b")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense and a pruned pico model, and data; leave them unchanged."""
    root = tmp_path_factory.mktemp("tuning")
    dense = open_source(pico.save("qwen2_vl", root / "dense", torch.bfloat16))
    data = DataSource(name="jsonl", path=write_data(root / "data", 4))
    calibration = CalibrationSettings(data=data, samples=4)
    stages.prune_checkpoint(
        stages.Setup(dense, calibration, COMPUTE), root / "pruned", prune_settings(order="one-shot")
    )
    return root


@pytest.fixture
def tune(root: Path, tmp_path: Path) -> Callable[..., Tuned]:
    """`tune(method, trials=3)` into `tmp_path`/tuned; settings by their names."""

    def run(settings: MethodSettings, **changes: Any) -> Tuned:
        data = DataSource(name="jsonl", path=root / "data" / "data.jsonl")
        own = {k: changes.pop(k) for k in list(changes) if k in TuneSettings.model_fields}
        given = {
            "out": tmp_path / "tuned",
            "bounds": BoundSettings(validation=data, validation_limit=2, points=2),
        }
        restoration = stages.Setup(
            open_source(root / "dense"),
            CalibrationSettings(data=data, samples=4),
            COMPUTE,
            scoring=changes.pop("scoring", HeadSettings(r_max=2)),
            evaluation=EVALUATION,
        )
        pruned, tuning = open_source(root / "pruned"), TuneSettings(**own)
        return tune_method(restoration, pruned, method=settings, tuning=tuning, **given | changes)

    return run


# --- trials ---


def _trials(folder: Path, seed: int = 0, random: int = 3) -> Trials:
    return Trials(folder, SPACE, TuneSettings(sampler_seed=seed, random_trials=random))


def _goal(settings: Any) -> float:
    return float(settings["x"] ** 2 + settings["k"] + (settings["w"] == "b"))


def _run(trials: Trials, most: int) -> dict[int, Any]:
    """Settings and value of every finished trial, by number."""
    while True:
        with trials.take(most) as trial:
            if trial is None:
                return trials.finished()
            goal = _goal(trial.params)
            trials.finish(trial, goal, {}, {"settings": trial.params, "value": goal})


def test_trials_of_one_worker_are_the_same_with_and_without_a_stop(tmp_path: Path) -> None:
    at_once = _run(_trials(tmp_path / "a"), 8)
    _run(_trials(tmp_path / "b"), 3)
    with pytest.raises(KeyboardInterrupt), _trials(tmp_path / "b").take(8) as trial:
        assert trial is not None
        raise KeyboardInterrupt
    assert _run(_trials(tmp_path / "b"), 8) == at_once
    assert list(at_once) == list(range(8))
    assert _run(_trials(tmp_path / "c", seed=1), 8) != at_once


def test_no_two_workers_have_one_trial_and_no_more_than_asked_for(tmp_path: Path) -> None:
    a, b = _trials(tmp_path), _trials(tmp_path)
    with a.take(2) as first, b.take(2) as second, a.take(2) as third:
        assert first is not None
        assert second is not None
        assert {first.number, second.number} == {0, 1}
        assert third is None
        b.finish(second, 1.0, {})
    with b.take(2) as left:
        assert left is not None
        assert (left.number, left.params) == (first.number, first.params)


def test_a_trial_finished_while_another_worker_reaches_for_it_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, held = _trials(tmp_path), _trials(tmp_path), ExitStack()
    first = held.enter_context(a.take(2))
    assert first is not None
    lock = b._lock

    def finished_before(*words: Any) -> None:
        if not a.finished():
            a.finish(first, 1.0, {}, 1.0)
            held.close()
        lock(*words)

    monkeypatch.setattr(b, "_lock", finished_before)
    with b.take(2) as second:
        assert second is not None
        assert second.number == 1
        b.finish(second, 2.0, {}, 2.0)
    assert b.finished() == {0: 1.0, 1: 2.0}


def test_a_failed_trial_does_not_count(tmp_path: Path) -> None:
    trials = _trials(tmp_path)
    with pytest.raises(ValueError, match="bad luck"), trials.take(1):
        raise ValueError("bad luck")
    assert trials.failed() == 1
    assert list(_run(trials, 1)) == [1]


def test_a_failure_that_cannot_be_recorded_is_told_and_the_trial_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    trials = _trials(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(trials._study, "tell", full)
        with pytest.raises(ValueError, match="bad luck"), trials.take(1):
            raise ValueError("bad luck")
    assert list(_run(trials, 1)) == [0]


def test_a_trial_killed_while_it_was_drawn_is_drawn_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written in one step, with all its settings, or not at all."""
    at_once = _run(_trials(tmp_path / "a"), 5)
    trials = _trials(tmp_path / "b")
    _run(trials, 2)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trials._study, "add_trial", killed)
        with pytest.raises(KeyboardInterrupt), trials.take(5):
            pass
    assert _run(_trials(tmp_path / "b"), 5) == at_once
    assert trials.failed() == 0


@pytest.mark.parametrize("constrained", [True, False])
def test_the_sampler_heeds_constraints(tmp_path: Path, constrained: bool) -> None:
    """The lower x the better: TPE goes to -1, but to 0 where x >= 0 is asked for."""
    space = {"x": Between(-1.0, 1.0)}
    trials = Trials(tmp_path, space, TuneSettings(random_trials=8))
    for _ in range(30):
        with trials.take(30) as trial:
            assert trial is not None
            x = trial.params["x"]
            trials.finish(trial, x, {"low": max(0.0, -x)} if constrained else {}, x)
    late = torch.tensor([trials.finished()[number] for number in range(20, 30)])
    assert late.median() == pytest.approx(0.0 if constrained else -1.0, abs=0.2)


# --- which trial is best ---


def _rate(value: float) -> Estimate:
    return Estimate(value, 10, max(0.0, value - 0.1), min(1.0, value + 0.1), round(10 * value))


def _point(asr: float, over_refusal: float = 0.0, utility: float = 0.5, restored: int = 1) -> Point:
    return Point(restored, _rate(asr), _rate(over_refusal), _rate(utility))


def test_bounds_come_before_asr() -> None:
    bounds = Bounds(None, 0.1, 0.5)
    points = [
        _point(0.0, over_refusal=0.3),
        _point(0.4),
        _point(0.2, restored=5),
        _point(0.1, utility=0.4),
        _point(0.2, restored=3),
    ]
    tried = [Tried(i, {}, point, bounds.excess(point), Cost()) for i, point in enumerate(points)]
    ordered = best_first(tried)
    assert [one.number for one in ordered] == [4, 2, 1, 3, 0]
    assert [one.within for one in ordered] == [True, True, True, False, False]
    assert ordered[3].excess == pytest.approx({"over_refusal": 0.0, "utility": 0.1})
    assert ordered[4].excess == pytest.approx({"over_refusal": 0.2, "utility": 0.0})
    tuned = Tuned("hsr", ordered, bounds, points[0], _point(0.3), 100, 0)
    assert tuned.best is ordered[0]
    nothing_helps = replace(tuned, before=_point(0.2))
    assert nothing_helps.best is None, "what is no better than the pruned model is recommended"
    nothing = replace(ordered[2], point=_point(0.4, restored=0))
    assert replace(tuned, trials=(nothing, *ordered[3:])).best is None


def test_costs_add_up() -> None:
    total = Cost.total([Cost({"rank": 1.0}, 2, 8), Cost({"rank": 2.0, "heads": 3.0}, 3, 12)])
    assert total == Cost({"rank": 3.0, "heads": 3.0}, 5, 20)


# --- tuning ---


@pytest.fixture
def pruning_harmed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the pruned model's ASR higher than that of any trial: no pico model refuses."""

    true = Search.references

    def references(self: Search, *arguments: Any) -> tuple[Point, Point]:
        dense, pruned = true(self, *arguments)
        return dense, replace(pruned, asr=_rate(1.1))

    monkeypatch.setattr(Search, "references", references)


@pytest.mark.usefixtures("pruning_harmed")
def test_hsr_by_q(tune: Callable[..., Tuned], tmp_path: Path) -> None:
    tuned, out = tune(method(), trials=3), tmp_path / "tuned"
    names = {"q", "p_max", "scope", "top_heads", "criterion", "r_max"}
    assert all(one.settings.keys() == names for one in tuned.trials)
    content = read_json(out / "tuned.json")
    assert [one["number"] for one in content["trials"]] == [one.number for one in tuned.trials]
    assert content["best"]["asr"]["n"] == 2
    assert content["best"]["asr"]["low"] < content["best"]["asr"]["high"]
    cost = content["cost"]
    assert cost["trials"] == 3
    assert cost["prompts"] == 4 * cost["evaluations"]
    answers = list(out.rglob("answers.jsonl"))
    assert cost["evaluations"] == len(answers)
    steps = {"score heads", "statistics for wanda", "rank", "references", "realign", "evaluate"}
    assert steps <= cost["seconds"].keys()
    assert cost["total_seconds"] == pytest.approx(sum(cost["seconds"].values()))
    for one in tuned.trials:
        patch = load_patch(out / "trials" / f"{one.number:04d}" / "patch.safetensors")
        assert patch.restored == one.point.restored
        made = patch.about["settings"]
        assert {k: made[k] for k in names - {"r_max"}} == {
            k: v for k, v in one.settings.items() if k != "r_max"
        }
        scores = out / "heads" / f"r_max-{one.settings['r_max']}.safetensors"
        assert scores.exists()
    _fits_into_a_recipe(tuned, out)


def _fits_into_a_recipe(tuned: Tuned, out: Path) -> Any:
    (item,) = yaml.safe_load((out / "best.yaml").read_text())
    variant = a_variant(**item)
    assert tuned.best is not None
    for name, value in tuned.best.settings.items():
        if name != "r_max":
            assert getattr(variant, name) == value
    return variant


def test_a_second_start_does_the_rest(tune: Callable[..., Tuned], tmp_path: Path) -> None:
    tune(method(), trials=2)
    before = tree(tmp_path / "tuned" / "trials")
    assert {one.number for one in tune(method(), trials=3).trials} == {0, 1, 2}
    after = tree(tmp_path / "tuned" / "trials")
    assert after.items() >= before.items()
    assert {name.partition("/")[0] for name in after.keys() - before.keys()} == {"0002"}
    tune(method(), trials=1)
    assert tree(tmp_path / "tuned" / "trials") == after


def test_a_trial_without_an_outcome_stops_a_start_before_the_next_trial(
    tune: Callable[..., Tuned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(method(), trials=1)
    with closing(sqlite3.connect(tmp_path / "tuned" / "study.db")) as file, file:
        file.execute("DELETE FROM trial_user_attributes")
    monkeypatch.setattr(tuning._Tuning, "_try", lambda *_: pytest.fail("a trial began"))
    with pytest.raises(RegraftError, match=r"study\.db, trial 0: expected a JSON"):
        tune(method(), trials=2)


def test_bounds_decide(
    tune: Callable[..., Tuned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every weight back lowers ASR, and of too many over-refusal is out of bounds."""
    true, most = Search.point, 5000

    def fake(self: Search, model: Any, out: Path, restored: int = 0, patch: Any = None) -> Point:
        if patch is None:
            return true(self, model, out)
        return _point(1 / (1 + restored), float(restored > most), 1.0, restored)

    def with_high_q(*arguments: Any) -> Any:
        return space_of(*arguments) | {"q": Between(0.4, 1.0)}

    monkeypatch.setattr(Search, "point", fake)
    monkeypatch.setattr(tuning, "space_of", with_high_q)
    tuned = tune(method(heads="all"), trials=8)
    restored = [one.point.restored for one in tuned.trials]
    assert max(restored) > most, "a trial out of bounds is what this is about"
    assert tuned.best is not None
    assert tuned.best.point.restored == max(one for one in restored if one <= most)
    assert tuned.best.point.asr.value > min(one.point.asr.value for one in tuned.trials)
    most = -1
    shutil.rmtree(tmp_path / "tuned")
    assert tune(method(heads="all"), trials=2).best is None
    assert read_json(tmp_path / "tuned" / "tuned.json")["best"] is None
    assert not (tmp_path / "tuned" / "best.yaml").exists()


@pytest.mark.usefixtures("pruning_harmed")
def test_set_difference_takes_the_best_prefix(tune: Callable[..., Tuned], tmp_path: Path) -> None:
    ours = method("set-difference", count=40)
    too_many = HeadSettings(r_max=99)  # of the heads, which nothing scores here
    tuned = tune(ours, trials=3, keep=("scope",), scoring=too_many)
    out = tmp_path / "tuned"
    assert all(one.settings.keys() == {"p"} for one in tuned.trials)
    assert all(one.point.restored in (20, 40) for one in tuned.trials)
    variant = _fits_into_a_recipe(tuned, out)
    assert tuned.best is not None
    assert variant.count == tuned.best.point.restored
    assert variant.search is None
    for number in range(3):
        assert len(read_json(out / "trials" / f"{number:04d}" / "curve.json")["points"]) == 3
    assert len(list((out / "references").iterdir())) == 2


def test_equal_settings_share_a_ranking(tune: Callable[..., Tuned], tmp_path: Path) -> None:
    tuned = tune(method("set-difference", count=20), trials=3, keep=("p",))
    scopes = {one.settings["scope"] for one in tuned.trials}
    assert len(list((tmp_path / "tuned" / "rankings").iterdir())) == len(scopes) < 3


def test_what_is_tuned_can_be_set(root: Path) -> None:
    """Every name is a field, or r_max; ranges end where the model or the data do."""
    dense = open_source(root / "dense")
    heads = sum(layer.heads for layer in dense.architecture.layers)
    for name in ("hsr", "hsr-released", "set-difference"):
        settings = method(name, budget=1)
        space = space_of(dense, settings, TuneSettings(), HeadSettings(), 0.5, 4)
        assert space.keys() <= type(settings).model_fields.keys() | {"r_max"}
        assert "q" not in space, "the budget takes its place"
    space = space_of(dense, method(), TuneSettings(), HeadSettings(), 0.5, 4)
    assert space["r_max"] == Between(1, 3, whole=True)
    assert space["top_heads"] == Between(1, min(heads, 32), whole=True)
    assert space["p_max"] == Between(0.55, 1.0)
    few = HeadSettings(mode="screened", candidates=3)
    space = space_of(dense, method(), TuneSettings(), few, 0.5, 4)
    assert space["top_heads"] == Between(1, 3, whole=True)


@pytest.mark.parametrize("mode", ["exact", "screened"])
def test_kept_states_serve_another_rank(
    root: Path, tmp_path: Path, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = open_source(root / "dense")
    data = DataSource(name="jsonl", path=root / "data" / "data.jsonl")
    calibration = CalibrationSettings(data=data, samples=4)

    candidates = {"candidates": 3} if mode == "screened" else {}

    def heads(name: str, r_max: int, states: Path | None = None) -> Any:
        settings = HeadSettings(r_max=r_max, mode=mode, **candidates)
        return stages.write_head_scores(
            stages.Setup(dense, calibration, COMPUTE, scoring=settings), tmp_path / name, states
        )

    heads("a", 1, tmp_path / "states")
    kept = tree(tmp_path / "states")
    again, alone = heads("b", 3, tmp_path / "states"), heads("c", 3)
    for one, other in ((again.ships, alone.ships), (again.kl, alone.kl)):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    now = tree(tmp_path / "states")
    assert now.items() >= kept.items()
    if mode == "exact":
        assert now == kept
        assert load_heads(tmp_path / "a", dense.architecture).about["settings"]["r_max"] == 1


# --- workers ---


def _start(root: str, out: str, trials: int, *more: object) -> None:
    """The same command in a process of its own; prints nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    _main(Path(root), Path(out), trials, *more)


def _main(*words: Any) -> None:
    assert exit_code(*_command(*words)) == 0


def _command(root: Path, out: Path, trials: int, *more: object, method: str = "hsr") -> list[str]:
    data = root / "data" / "data.jsonl"
    words = [
        *("tune", method, root / "dense", root / "pruned", "--out", out, "--trials", trials),
        *("--data", data, "--samples", 4, "--validation", data, "--validation-limit", 2),
        *("--max-new-tokens", 2, "--r-max", 2),
        *("--device", "cpu", "--batch-size", 4),
    ]
    return [str(word) for word in (*words, *more)]


@pytest.mark.slow
def test_two_starts_share_the_trials_and_a_killed_one_leaves_them(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, starts = tmp_path / "tuned", []
    for _ in range(2):
        starts.append(forked.CONTEXT.Process(target=_start, args=(str(root), str(out), 6)))
        starts[-1].start()
    while not (out / "trials" / "0002").exists():  # both are at work
        assert any(one.is_alive() for one in starts)
        starts[0].join(0.05)
    assert starts[0].pid
    os.kill(starts[0].pid, signal.SIGKILL)
    for one in starts:
        one.join()
    assert [one.exitcode for one in starts] == [-signal.SIGKILL, 0]
    content = read_json(out / "tuned.json")
    numbers = {one["number"] for one in content["trials"]}
    assert len(numbers) == len(content["trials"]) == 6
    assert numbers <= set(range(7))  # that which the killed one may have been drawing is left out
    assert content["cost"]["failed"] == 0
    _main(root, out, 6)
    assert read_json(out / "tuned.json") == content
    told = " ".join(capsys.readouterr().out.split())
    assert "hsr: 6 trials, on validation prompts" in told
    assert "those of a best of many are optimistic" in told


# --- errors ---


@pytest.fixture
def refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Run the command line with more words; exit code 2 and nothing written."""

    def run(*words: object, method: str = "hsr") -> str:
        assert exit_code(*_command(root, tmp_path / "refused", 1, *words, method=method)) == 2
        message = " ".join(capsys.readouterr().err.split())
        assert "Traceback" not in message
        assert not (tmp_path / "refused").exists()
        return message

    yield run


def test_bad_input(refused: Callable[..., str]) -> None:
    assert "hsr-b" in refused(method="hsr-b")
    assert "--p-range" in refused("--p-range", 0.1)
    assert "less than one weight" in refused("--budget", 1e-5)
    assert "keep: 'swap' is not tuned here" in refused("--keep", "swap")
    assert "--target-asr" in refused("--target-asr", 3)  # it looks for the lowest
    assert "--r-max" in refused(method="set-difference")  # which scores no heads
    assert "These settings score no heads" in refused("--heads", "all")  # --r-max 2
    assert "gain" in refused(method="gain")  # which has nothing to tune
    assert "responses" in refused("--responses", "given", "--max-response-tokens", 9)


@pytest.mark.parametrize(
    ("given", "kept", "message"),
    [
        ({"criterion": "released"}, ("criterion",), "needs every head scored exactly"),
        ({"top_heads": 2}, ("top_heads",), "top_heads is 2, but of the screened heads only the 1"),
        ({"top_heads": 10_000}, ("top_heads",), "top_heads is 10000; the model has"),
        ({"heads": "random", "top_heads": 10_000}, ("top_heads",), "top_heads is 10000; the model"),
    ],
)
def test_what_no_trial_can_do_is_refused_before_the_first(
    tune: Callable[..., Tuned],
    tmp_path: Path,
    given: dict[str, Any],
    kept: tuple[str, ...],
    message: str,
) -> None:
    screened = HeadSettings(mode="screened", candidates=1)
    with pytest.raises(RegraftError, match=message):
        tune(method(**given), keep=kept, scoring=HeadSettings() if "heads" in given else screened)
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize("name", ["random", "gain"])
def test_methods_that_have_nothing_to_tune(tune: Callable[..., Tuned], name: str) -> None:
    with pytest.raises(RegraftError, match=f"nothing to tune of {name}"):
        tune(method(name, budget=2))


def test_validation_prompts_that_are_not_named_are_held_out(
    tune: Callable[..., Tuned], tmp_path: Path
) -> None:
    """Of these eight prompts one, which is harmful."""
    with pytest.raises(RegraftError, match="#held-out"):
        tune(method(), bounds=BoundSettings(validation_limit=2, points=2))
    assert not (tmp_path / "tuned").exists()


def test_a_start_beside_another_shares_its_folder(
    tune: Callable[..., Tuned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def claimed_by_another(folder: Path) -> None:
        (folder / "locks").mkdir(parents=True)
        raise RegraftError("is not empty")

    monkeypatch.setattr(trials_module, "require_empty", claimed_by_another)
    assert len(tune(method("set-difference", count=20), trials=1).trials) == 1


def test_without_optuna(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install 'regraft[tune]'" in refused()


def test_a_folder_of_other_settings_is_refused(
    tune: Callable[..., Tuned], root: Path, tmp_path: Path
) -> None:
    data = DataSource(name="jsonl", path=root / "data" / "data.jsonl")
    bounds = BoundSettings(validation=data, validation_limit=2, points=2)
    tune(method(), trials=1)
    before = tree(tmp_path / "tuned")
    with pytest.raises(
        RegraftError, match=r"settings\.method\.score: \"wanda\" there, \"magnitude\""
    ):
        tune(method(score="magnitude"), trials=2)
    with pytest.raises(RegraftError, match=r"settings\.search\.points: 2 there, 3 now"):
        tune(method(), bounds=bounds.model_copy(update={"points": 3}))
    assert tree(tmp_path / "tuned") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(RegraftError, match="not empty"):
        tune(method(), out=tmp_path / "other")
