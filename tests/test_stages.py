"""Stages and runs: done once, refused when something differs, killed anywhere and finished."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import killed
import pico
import truth
from disk import shards, tree, write_data
from methods import a_variant, method
from regraft import loading, stages
from regraft.data.sources import DataSource
from regraft.disk.artifact import ABOUT_FILE
from regraft.disk.files import disk_errors, write_text
from regraft.disk.parsing import read_json
from regraft.errors import PassingError, RegraftError
from regraft.heads.score import load_heads
from regraft.heads.ships import HeadSettings
from regraft.models import checkpoint
from regraft.models.checkpoint import open_checkpoint
from regraft.models.checkpoint_copy import write_edited
from regraft.models.load import Source, open_source
from regraft.patch.format import load_patch
from regraft.progress import Progress
from regraft.pruning.base import prune_settings
from regraft.pruning.prune import zeros
from regraft.pruning.statistics import load_statistics
from regraft.recipes.file import read_recipe, write_recipe
from regraft.recipes.parts import EvaluateSettings
from regraft.recipes.recipe import Recipe
from regraft.restoration import base
from regraft.restoration.ranking import load_ranking
from regraft.runs import pipeline
from regraft.settings import compute
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.evaluating import EvalSettings
from regraft.stages import patching, pruning, ranking, targets
from regraft.stages.provenance import working
from regraft.stages.steps import Step, plan_steps

COMPUTE = ComputeSettings(device="cpu", batch_size=2)
STAGES = ("prune", "heads", "statistics", "rank", "realign", "apply", "revert", "evaluate")
OUTPUTS = {
    "prune": "pruned",
    "heads": "heads",
    "statistics": "statistics",
    "rank": "ranking",
    "realign": "patch",
    "apply": "realigned",
    "revert": "reverted",
    "evaluate": "answers",
}


@dataclass(frozen=True)
class Bench:
    """All stages at pico size in one folder; each argument can be replaced."""

    root: Path
    family: str = "qwen2_vl"

    @property
    def dense(self) -> Source:
        return open_source(self.root / "dense")

    @property
    def pruned(self) -> Source:
        return open_source(self.root / "pruned")

    @property
    def data(self) -> DataSource:
        """Relative, so that a copy of the folder has the same name for it: work inside it."""
        return DataSource(name="jsonl", path=Path("data/data.jsonl"))

    def run(self, stage: str, **changes: Any) -> Any:
        calibration = CalibrationSettings(data=self.data, samples=4)
        at = {name: self.root / folder for name, folder in OUTPUTS.items()}
        arguments: dict[str, dict[str, Any]] = {
            "prune": {"settings": prune_settings(), "calibration": calibration},
            "heads": {"scoring": HeadSettings(r_max=2), "calibration": calibration},
            "statistics": {"calibration": calibration},
            "rank": {
                "settings": method(top_heads=3),
                "calibration": calibration,
                "inputs": stages.Inputs(at["heads"], at["statistics"]),
            },
            "realign": {"settings": method(top_heads=3), "ranking_file": at["rank"]},
            "evaluate": {"suites": [self.data], "settings": EvalSettings(max_new_tokens=3)},
        }
        given = {"out": at[stage], **arguments.get(stage, {})}
        if stage in ("prune", "heads", "statistics", "rank", "realign"):
            given["dense"] = self.dense
        if stage in ("rank", "realign"):
            given["pruned"] = self.pruned
        if stage == "evaluate":
            given["model"] = self.pruned
        if stage in ("apply", "revert"):
            given |= {"operation": stage, "patch_files": at["realign"]}
            given["folder"] = at["prune" if stage == "apply" else "apply"]
        elif stage != "realign":
            given["compute"] = COMPUTE
        given |= changes
        if stage in ("prune", "heads", "statistics", "rank"):
            shared = ("dense", "calibration", "compute", "progress", "scoring")
            parts = {name: given.pop(name) for name in shared if name in given}
            given["setup"] = stages.Setup(**parts)
        if stage == "evaluate":
            own = ("model", "compute", "patch", "text", "progress", "cache")
            given["target"] = stages.Target(**{n: given.pop(n) for n in own if n in given})
        names = {
            "prune": "prune_checkpoint",
            "heads": "write_head_scores",
            "statistics": "write_statistics",
            "rank": "write_ranking",
            "realign": "write_patch",
            "apply": "patch_checkpoint",
            "revert": "patch_checkpoint",
            "evaluate": "evaluate_target",
        }
        return getattr(stages, names[stage])(**given)

    def about(self, stage: str) -> Mapping[str, Any]:
        out = self.root / OUTPUTS[stage]
        if stage == "heads":
            return load_heads(out, self.dense.architecture).about
        if stage == "statistics":
            return load_statistics(out).about
        if stage == "rank":
            return load_ranking(out).about
        if stage == "realign":
            return load_patch(out).about
        if stage == "evaluate":
            return stages.read_evaluation(out).about
        about: dict[str, Any] = read_json(out / ABOUT_FILE)
        return about


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage done once; tests work on a copy."""
    bench = Bench(tmp_path_factory.mktemp("stages") / "bench")
    pico.save(bench.family, bench.root / "dense", torch.bfloat16, "100KB")
    write_data(bench.root / "data", 4)
    with contextlib.chdir(bench.root):
        for stage in STAGES:
            bench.run(stage)
    return bench.root


@pytest.fixture
def bench(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    copy = Bench(Path(shutil.copytree(finished, tmp_path / "bench")))
    monkeypatch.chdir(copy.root)
    return copy


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    paths = sorted(folder.rglob("*"))
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in paths}


@pytest.mark.parametrize("stage", STAGES)
def test_finished_stage_is_not_repeated(
    bench: Bench, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the work was done again")

    for module, names in {
        loading: ("load_model", "load_placed", "load_processor"),
        base.Context: ("matrices",),
        ranking: ("patch_of",),
        patching: ("write_plan",),
        pruning: ("write_edited",),
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, never)
    before = _stamps(bench.root)
    bench.run(stage)
    assert _stamps(bench.root) == before


DIFFERENCES: list[tuple[str, Callable[[Bench], dict[str, Any]], str]] = [
    ("prune", lambda _: {"settings": prune_settings(sparsity=0.6)}, "settings.sparsity: 0.5 there"),
    (
        "prune",
        lambda b: {"calibration": CalibrationSettings(data=b.data, samples=3)},
        "data.utility",
    ),
    (
        "prune",
        lambda b: {"calibration": CalibrationSettings(data=b.data, samples=4, seed=1)},
        "data.utility.digest",
    ),
    ("prune", lambda b: {"dense": b.pruned}, "inputs.dense"),
    (
        "prune",
        lambda _: {"compute": ComputeSettings(device="cpu", dtype="bfloat16")},
        "compute.dtype: .auto. there",
    ),
    ("heads", lambda _: {"scoring": HeadSettings(r_max=3)}, "settings.r_max: 2 there, 3 now"),
    (
        "statistics",
        lambda b: {"calibration": CalibrationSettings(data=b.data, samples=2)},
        "data.safety",
    ),
    ("rank", lambda _: {"settings": method(top_heads=2)}, "settings.top_heads: 3 there, 2 now"),
    ("realign", lambda _: {"count": 5}, "count: null there, 5 now"),
    ("apply", lambda b: {"folder": b.root / "realigned"}, "before.stage: .prune. there, .apply."),
    ("revert", lambda b: {"folder": b.root / "pruned"}, "before.stage: .apply. there, .prune."),
    ("revert", lambda b: {"out": b.root / "realigned"}, "stage: .apply. there, .revert. now"),
    ("apply", lambda b: {"out": b.root / "reverted"}, "stage: .revert. there, .apply. now"),
    ("evaluate", lambda _: {"settings": EvalSettings()}, "settings.max_new_tokens: 3 there"),
    ("evaluate", lambda b: {"patch": b.root / "patch"}, "inputs.patch: null there"),
    ("evaluate", lambda b: {"model": b.dense}, "inputs.model"),
]


@pytest.mark.parametrize(("stage", "change", "message"), DIFFERENCES)
def test_other_settings_or_inputs_are_refused(
    bench: Bench, stage: str, change: Callable[[Bench], dict[str, Any]], message: str
) -> None:
    before = tree(bench.root)
    with pytest.raises(RegraftError, match=f"made with something else .{message}"):
        bench.run(stage, **change(bench))
    assert tree(bench.root) == before


def test_a_patch_is_of_the_method_that_ranked(bench: Bench) -> None:
    with pytest.raises(RegraftError, match=r"other settings \(top_heads: 3 there, 2 now\)"):
        bench.run("realign", out=bench.root / "new", settings=method(top_heads=2))
    assert not (bench.root / "new").exists()


def test_changed_chat_template_is_another_model(bench: Bench) -> None:
    template = bench.root / "pruned" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(RegraftError, match=r"inputs\.model"):
        bench.run("evaluate")


def test_changed_image_is_other_data(bench: Bench) -> None:
    pico.image(99).save(next((bench.root / "data" / "images").glob("harmful-0-0*")))
    with pytest.raises(RegraftError, match=r"data\.suite\.digest"):
        bench.run("evaluate")


@pytest.mark.parametrize("stage", ["prune", "heads", "statistics", "evaluate"])
def test_every_row_is_accounted_for(bench: Bench, stage: str) -> None:
    accounts = bench.about(stage)["data"]
    assert accounts
    for role, account in accounts.items():
        assert account["read"] == account["used"] + sum(account["skipped"].values()), role
        assert account["read"] == 8


def test_limit_is_accounted_for(bench: Bench, tmp_path: Path) -> None:
    settings = EvalSettings(max_new_tokens=2, limit=3)
    done = bench.run("evaluate", settings=settings, out=tmp_path / "few")
    account = done.about["data"]["suite"]
    assert (account["read"], account["used"]) == (8, 6)
    assert account["skipped"] == {"beyond the limit": 2}, "three of each kind stay"
    assert len(done.result.answers) == 6


def test_nothing_hidden_is_left(bench: Bench) -> None:
    assert not [name for name in tree(bench.root) if "regraft-" in name]


@pytest.mark.parametrize("stage", ["prune", "heads", "evaluate"])
def test_leftovers_of_a_run_killed_at_its_end_go(bench: Bench, stage: str) -> None:
    out = bench.root / OUTPUTS[stage]
    before = tree(bench.root)
    for name in (f".{out.name}.regraft-work/0123", f".{out.name}.regraft-tmp"):
        (out.parent / name).mkdir(parents=True)
    bench.run(stage)
    assert tree(bench.root) == before


def test_bad_input_after_work_began_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text-only prompts never reach Mllama's cross-attention: told only when its turn comes."""
    mllama = Bench(tmp_path / "mllama", "mllama")
    pico.save("mllama", mllama.root / "dense")
    write_data(mllama.root / "data", 4, images=False)
    monkeypatch.chdir(mllama.root)
    before = tree(mllama.root)
    with pytest.raises(RegraftError, match=r"layers\.1\.cross_attn.* never used"):
        mllama.run("prune", out=mllama.root / "new" / "pruned")
    assert tree(mllama.root) == before


def test_stopping_keeps_the_work(bench: Bench, tmp_path: Path) -> None:
    """Ctrl-C is no error: the next call goes on."""
    seen = []

    class Stops:
        def task(self, *_: Any) -> Any:
            return self

        def __enter__(self) -> Callable[[int], None]:
            return self

        def __exit__(self, *_: Any) -> None:
            return None

        def __call__(self, steps: int) -> None:
            seen.append(steps)
            if len(seen) == 4:
                raise KeyboardInterrupt

        def note(self, _: str) -> None:
            return None

        def loaded(self, _: Any) -> None:
            return None

    out = tmp_path / "out" / "pruned"
    with pytest.raises(KeyboardInterrupt):
        bench.run("prune", out=out, progress=Stops())
    kept = [name for name in tree(tmp_path / "out") if "layer_" in name]
    assert kept, "the masks of finished layers were thrown away"
    bench.run("prune", out=out)
    bench.run("prune", out=tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")
    assert tree(tmp_path / "out").keys() == {"pruned"} | {f"pruned/{n}" for n in tree(out)}


def test_a_patch_is_put_on_once(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For answers, the likelihood of references and that of ordinary text together."""
    (tmp_path / "text.txt").write_text("A text.\n\nAnother one.", encoding="utf-8")
    own, put_on = targets.patched, []

    def counted(*arguments: Any) -> Any:
        put_on.append(arguments)
        return own(*arguments)

    monkeypatch.setattr(targets, "patched", counted)
    done = bench.run(
        "evaluate",
        settings=EvalSettings(max_new_tokens=2, perplexity=True),
        patch=bench.root / "patch",
        text=stages.OnText(tmp_path / "text.txt"),
        out=tmp_path / "out",
    )
    assert done.result.perplexity is not None
    assert done.result.text is not None
    assert len(put_on) == 1


def test_evaluation_with_a_patch_in_memory(bench: Bench, tmp_path: Path) -> None:
    """Same answers and same sparsity as the written checkpoint, also where it is on already."""
    realigned = open_source(bench.root / "realigned")
    written = bench.run("evaluate", model=realigned, out=tmp_path / "a")
    patch = bench.root / "patch"
    in_memory = bench.run("evaluate", patch=patch, out=tmp_path / "b")
    twice = bench.run("evaluate", model=realigned, patch=patch, out=tmp_path / "c")
    assert written.result == in_memory.result == twice.result
    counted = {one.about["zeros"] for one in (written, in_memory, twice)}
    assert counted == {zeros(realigned.checkpoint, realigned.architecture)}
    with pytest.raises(RegraftError, match="dense is not the base of this patch"):
        bench.run("evaluate", model=bench.dense, patch=patch, out=tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_revert_gives_the_pruned_shards(bench: Bench) -> None:
    assert shards(bench.root / "reverted") == shards(bench.root / "pruned")
    assert shards(bench.root / "realigned") != shards(bench.root / "pruned")
    assert bench.about("revert")["stage"] == "revert"
    assert bench.about("revert")["before"] == bench.about("apply")
    assert bench.about("apply")["before"] == bench.about("prune")


def test_preview_writes_nothing_and_tells_the_truth(bench: Bench, tmp_path: Path) -> None:
    folder, out, patch_file = bench.root / "pruned", tmp_path / "out", bench.root / "patch"
    (tmp_path / ".out.regraft-tmp").mkdir()
    before = tree(tmp_path)
    plan, size = patching.preview("apply", folder, [patch_file], out)
    assert tree(tmp_path) == before
    patch = load_patch(patch_file)
    assert (plan.applied, patch.removed) == ((0,), 0)
    assert plan.weights == patch.restored
    assert size == open_checkpoint(folder).bytes
    stages.patch_checkpoint("apply", folder, patch_file, out)
    old, changed = shards(folder), shards(out)
    assert set(plan.shards) == {name for name in old if old[name] != changed[name]}
    assert patching.preview("apply", folder, [patch_file], out)[1] == 0
    back, _ = patching.preview("revert", out, [patch_file], tmp_path / "back")
    assert (back.applied, back.weights) == ((patch.restored,), patch.restored)
    assert not patching.preview("revert", folder, [patch_file], tmp_path / "back")[0].changes


def test_preview_refuses_what_the_command_refuses(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    patches = [bench.root / "patch"]
    with pytest.raises(RegraftError, match="is not the base of this patch"):
        patching.preview("apply", bench.root / "dense", patches, tmp_path / "new")
    with pytest.raises(RegraftError, match="taken is not empty"):
        patching.preview("apply", bench.root / "pruned", patches, tmp_path / "taken")


def test_weights_that_no_patch_touches_are_checked_as_they_are_copied(
    bench: Bench, tmp_path: Path
) -> None:
    source = open_checkpoint(bench.root / "pruned")
    touched = load_patch(bench.root / "patch").tensors
    name = next(one for one in source.tensors if one not in touched)
    spoilt = write_edited(source, tmp_path / "spoilt", {name: lambda one: one.fill_(torch.nan)})
    before = tree(tmp_path)
    job = "apply", spoilt.folder, [bench.root / "patch"], tmp_path / "out"
    assert patching.preview(*job)[0].weights
    with pytest.raises(RegraftError, match=f"the tensor {name} holds numbers that are NaN"):
        stages.patch_checkpoint(*job)
    assert tree(tmp_path) == before


# A run, killed


@dataclass(frozen=True)
class Killable:
    """A recipe at pico size, the folder of an uninterrupted run, how often it changes files, and
    what it left in its folder: name -> digest."""

    server: killed.Server
    recipe: Path
    finished: Path
    changes: int
    left: Mapping[str, str]

    def run(self, folder: Path, kill_at: int | None = None) -> int:
        return self.server.run(self.recipe, folder, kill_at)[0]


def _recipe(root: Path) -> Recipe:
    data = DataSource(name="jsonl", path=root / "data" / "data.jsonl")
    return Recipe(
        model=str(root / "dense"),
        calibration=CalibrationSettings(data=data, samples=4),
        prune=prune_settings(sparsity=0.6),
        heads=HeadSettings(r_max=2),
        realign=(
            a_variant(name="hsr", top_heads=3, q=0.9),
            a_variant(name="control", heads="random", top_heads=3, checkpoint=False),
        ),
        evaluate=EvaluateSettings(suite=(data,), max_new_tokens=2, limit=2),  # two batches
        compute=ComputeSettings(device="cpu", batch_size=2),
    )


@pytest.fixture(scope="module")
def killable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killable]:
    """Its report has no figures: drawing them takes most of the time of such a small run."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    root = tmp_path_factory.mktemp("killed")
    pico.save("llava", root / "dense", torch.bfloat16, "100KB")
    write_data(root / "data", 4)
    recipe = root / "recipe.yaml"
    recipe.write_text(write_recipe(_recipe(root)), encoding="utf-8")
    with killed.Server() as server:
        status, changes = server.run(recipe, root / "whole")
        assert status == 0
        yield Killable(server, recipe, root / "whole", changes, tree(root / "whole"))


def _moments(changes: int, count: int) -> Iterator[int]:
    """`count` moments spread over the run, each drawn from its own part."""
    draw = random.Random(2505)
    for i in range(count):
        yield draw.randint(1 + i * changes // count, (i + 1) * changes // count)


def _same(killable: Killable, folder: Path, when: str) -> None:
    """The same files, to the byte except for times."""
    expected, found = killable.left, tree(folder)
    assert found.keys() == expected.keys(), f"{when}: {sorted(found.keys() ^ expected.keys())}"
    results = [
        json.loads((one / "report" / "report.json").read_text(encoding="utf-8"))
        for one in (killable.finished, folder)
    ]
    for result in results:  # what is counted from costs, of all starts together
        (run,) = result["runs"]
        assert run.pop("costs"), when
        for one in (*run["variants"], *(row for t in result["tables"] for row in t["rows"])):
            one.pop("passes")
    assert results[0] == results[1], f"{when}: another report"
    timed = {"costs.json", *(f"report/report.{kind}" for kind in ("json", "md", "html"))}
    assert timed < found.keys()
    changed = [name for name in found.keys() - timed if found[name] != expected[name]]
    assert not changed, f"{when}: other bytes in {changed}"


def test_uninterrupted_run_is_repeatable(killable: Killable, tmp_path: Path) -> None:
    assert killable.changes > 60, "the moments are not seen"
    assert killable.run(tmp_path / "run") == 0
    _same(killable, tmp_path / "run", "a second run")
    assert not [name for name in tree(tmp_path) if "regraft-" in name]


def _kill_and_finish(killable: Killable, folder: Path, moment: int) -> None:
    when = f"killed before change {moment} of {killable.changes}"
    assert killable.run(folder, moment) == -signal.SIGKILL, when
    _finish(killable, folder, when)
    shutil.rmtree(folder)


def _finish(killable: Killable, folder: Path, when: str) -> None:
    assert killable.run(folder) == 0, f"{when}: it does not go on"
    _same(killable, folder, when)


def test_killed_once_anywhere(killable: Killable, tmp_path: Path) -> None:
    for moment in _moments(killable.changes, 4):
        _kill_and_finish(killable, tmp_path / "run", moment)


@pytest.mark.slow
def test_killed_once_everywhere(killable: Killable, tmp_path: Path) -> None:
    """Before every eighth change of a file in the whole run, all by one run (`Server.copies`)."""
    home, into = tmp_path / "home", tmp_path / "copies"
    folder = home / "run"
    home.mkdir()
    copies = killable.server.copies(killable.recipe, folder, into, every=8)
    assert [moment for moment, _ in copies] == list(range(1, killable.changes + 1, 8))
    for moment, copy in copies:
        shutil.rmtree(home)
        copy.rename(home)
        _finish(killable, folder, f"killed before change {moment} of {killable.changes}")


def test_a_copy_is_what_a_kill_leaves(killable: Killable, tmp_path: Path) -> None:
    home, into = tmp_path / "home", tmp_path / "copies"
    home.mkdir()
    copies = killable.server.copies(killable.recipe, home / "run", into, every=150)
    assert len(copies) > 2
    for moment, copy in copies:
        shutil.rmtree(home)
        home.mkdir()
        assert killable.run(home / "run", moment) == -signal.SIGKILL
        left, copied = (
            {n: d for n, d in tree(o).items() if "costs" not in n} for o in (home, copy)
        )
        assert left == copied, f"before change {moment}"


def test_killed_again_and_again(killable: Killable, tmp_path: Path) -> None:
    """Killed every few changes, so that nearly every stage is taken up more than once."""
    folder, times, draw = tmp_path / "run", 0, random.Random(16104)
    while status := killable.run(folder, draw.randint(5, 70)):
        assert status == -signal.SIGKILL
        times += 1
        assert times < 40, "it makes no progress"
    assert times > 3, "it was hardly killed"
    _same(killable, folder, f"killed {times} times")


def test_finished_run_only_writes_its_report(killable: Killable, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(killable.finished, tmp_path / "run"))
    before = _stamps(folder)
    assert killable.run(folder) == 0
    changed = {name for name, stamp in _stamps(folder).items() if before[name] != stamp}
    assert {Path(name).relative_to(folder).parts[0] for name in changed} <= {"report"}
    _same(killable, folder, "called again")


def test_run_on_an_existing_pruned_checkpoint(killable: Killable, tmp_path: Path) -> None:
    """The recipe names it; nothing of it is written."""
    existing = {"pruned": str(killable.finished / "pruned")}
    recipe = read_recipe(killable.recipe).model_copy(update=existing)
    before = tree(killable.finished)
    made = pipeline.run_one(recipe, tmp_path / "run").runs[0]
    assert tree(killable.finished) == before
    assert not (tmp_path / "run" / "pruned").exists()
    results = [
        json.loads((folder / "evaluation" / "hsr" / "results.json").read_text())["result"]
        for folder in (killable.finished, tmp_path / "run")
    ]
    assert results[0] == results[1]
    assert [variant.name for variant in made.variants] == ["dense", "pruned", "hsr", "control"]


def test_a_run_opens_its_pruned_model_once(
    killable: Killable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its stages together, and the report again, which needs only the architecture.

    All bytes of a model are read once to tell it apart from others.
    """
    opened, digested = [], []

    def counted(own: Callable[..., Any], calls: list[Path]) -> Callable[..., Any]:
        return lambda path, *more, **named: (calls.append(Path(path)), own(path, *more, **named))[1]

    monkeypatch.setattr(compute, "open_source", counted(compute.open_source, opened))
    monkeypatch.setattr(checkpoint, "file_digest", counted(checkpoint.file_digest, digested))
    recipe, pruned = read_recipe(killable.recipe), tmp_path / "run" / "pruned"
    pipeline.run_one(recipe, tmp_path / "run")
    assert opened.count(pruned) == 2
    for folder in (Path(recipe.model), pruned):
        assert {digested.count(folder / name) for name in open_checkpoint(folder).shards} == {1}


def test_heads_with_estimated_scores_are_not_taken(bench: Bench) -> None:
    """Screening scores some heads exactly; to take more of them is an error, not a guess."""
    out = bench.root / "screened"
    settings = HeadSettings(r_max=2, mode="screened", window=2, candidates=2)
    scores = bench.run("heads", out=out, scoring=settings)
    exact = scores.certain("ships")
    assert 2 <= exact <= int(scores.exact.count_nonzero()) <= 4
    inputs = stages.Inputs(out, bench.root / "statistics")
    few = bench.run("rank", out=bench.root / "few", inputs=inputs, settings=method(top_heads=exact))
    assert len(few.about["heads"]) == exact
    with pytest.raises(RegraftError, match=f"the {exact} best by ships were all scored"):
        bench.run(
            "rank", out=bench.root / "many", inputs=inputs, settings=method(top_heads=exact + 1)
        )


@pytest.mark.parametrize("method", ["sparsegpt", "snip"])
def test_disk_too_full_for_scratch_is_told_before_the_work(
    bench: Bench, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for the output but not for what the method keeps meanwhile."""
    free = bench.dense.checkpoint.bytes + 2**20  # which its other files fit into
    usage = shutil.disk_usage(bench.root)
    folders = []

    def little(folder: Any) -> Any:
        folders.append(Path(folder))
        return usage._replace(free=free if len(folders) == 1 else 1)

    monkeypatch.setattr(shutil, "disk_usage", little)
    out = bench.root / "new"
    with pytest.raises(RegraftError, match="The disk is too full"):
        bench.run("prune", out=out, settings=prune_settings(method=method))
    assert len(folders) == 2 and not out.exists()
    assert not list(bench.root.glob(".new*"))


@pytest.mark.parametrize("begun", [True, False])
def test_finished_work_stays_where_the_disk_is_full(tmp_path: Path, begun: bool) -> None:
    out, about = tmp_path / "out", {"stage": "x"}
    with pytest.raises(PassingError, match="disk is full"), working(out, about) as work:
        if begun:
            write_text(work / "part", "hours of work")
        with disk_errors(out):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert any(tmp_path.rglob("part")) == begun
    assert any(tmp_path.iterdir()) == begun
    with working(out, about) as work:
        assert (work / "part").exists() == begun
    assert not any(tmp_path.iterdir())


def test_calibration_on_both_kinds_is_another_model(bench: Bench) -> None:
    """Refusals count too: the account names both data sets, and other weights go."""
    settings = prune_settings(calibrate_on="both")
    both = bench.run("prune", out=bench.root / "both", settings=settings)
    about = read_json(bench.root / "both" / ABOUT_FILE)
    assert set(about["data"]) == {"utility", "safety"}
    linears = list(bench.dense.architecture.linears)
    assert any(
        not torch.equal(both.checkpoint.read(li.tensor), bench.pruned.checkpoint.read(li.tensor))
        for li in linears
    )


def test_an_empty_folder_is_no_finished_step(tmp_path: Path) -> None:
    step = Step("prune", "", tmp_path / "out", lambda: None)
    assert not step.done
    step.out.mkdir()
    assert not step.done
    (step.out / "model.safetensors").touch()
    assert step.done


def test_a_step_that_another_worker_finishes_while_it_is_planned(bench: Bench) -> None:
    class Finishing(Step):
        asked = iter([False])
        done = property(lambda self: next(self.asked, True))

    step = Finishing("rank", "", bench.root / "none", lambda: None)
    assert not plan_steps(stages.Setup(bench.dense), [step]).left


# What the stages of a run share


def test_the_bundled_prompts_of_a_shared_cache_are_for_the_bundled_model(bench: Bench) -> None:
    """Recipes of several models share the data sets that were read."""
    bundled, cache = stages.Setup(open_source("demo")), stages.EvaluationCache()
    assert replace(bundled, cache=cache).imitated()["safety"].examples
    with pytest.raises(RegraftError, match="No calibration prompts are named"):
        replace(bundled, dense=bench.dense, cache=cache).imitated()


def test_prompts_of_the_bundled_model_are_noted_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whichever evaluation comes first, such as one of a search."""
    notes: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda _, text: notes.append(text))
    setup = stages.Setup(bench.dense)
    suite = DataSource.model_validate("demo:validation")
    for model in (bench.dense, bench.pruned):
        setup.target(model).warn([suite, suite.model_copy(update={"kind": "harmful"})])
    assert ["bundled images" in note for note in notes] == [True]


def test_states_of_all_processes_need_room(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They write to one disk."""
    _, model, processor, _ = truth.opened(bench.dense.folder)
    batch = truth.make_batch("left", bench.family, processor, tmp_path)
    layerwise = truth.layerwise(model, [batch])
    alone = loading.hidden_state_bytes(bench.dense, layerwise)
    monkeypatch.setattr(loading.distributed, "total", lambda tensor: 3 * tensor)
    assert loading.hidden_state_bytes(bench.dense, layerwise) == 3 * alone > 0


def test_a_budget_is_not_a_weight_short_by_rounding() -> None:
    """0.57 per 10,000 of 7 million are 399; as a float the product is just below."""
    assert int(0.57 * 7_000_000 / 10_000) == 398
    assert method("random", budget=0.57).how_many(7_000_000) == 399


def test_what_a_method_records_of_its_ranking_is_no_part_of_the_key(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Methods of other packages may record what they like."""
    kind = base.METHODS.get("random")
    true = type(kind).rank

    def recording(self: Any, settings: Any, context: Any) -> Any:
        found = true(self, settings, context)
        return replace(found, about={**found.about, "epochs": 3})

    monkeypatch.setattr(type(kind), "rank", recording)
    setup, settings = stages.Setup(bench.dense, compute=COMPUTE), method("random", count=5)
    given = setup, bench.pruned, tmp_path / "ranking", settings
    first = stages.write_ranking(*given)
    assert first.about["epochs"] == 3
    monkeypatch.setattr(type(kind), "rank", pytest.fail)
    assert torch.equal(stages.write_ranking(*given).position, first.position)
