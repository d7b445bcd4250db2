"""Malformed files: nothing but a clear error, for every reader; the files are made in `fuzz`."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as trying

import fuzz
import pico
import regraft
from disk import write_data
from fuzz import Case
from regraft.cli import main
from regraft.costs import read_costs
from regraft.data.images import check_images
from regraft.data.sources import DataSource, read
from regraft.data.storage import CACHE_VARIABLE, unpacked
from regraft.defence import Direction, ShieldPrompt, load_defence, save_defence
from regraft.disk.files import digest, write_json
from regraft.disk.parsing import from_json
from regraft.evaluation.gate import Check
from regraft.evaluation.perplexity import Teacher, load_teacher, read_documents, save_teacher
from regraft.evaluation.tradeoff import Cost, Point, Tried, read_curve
from regraft.heads.score import HeadScores, load_heads, save_heads
from regraft.heads.ships import HeadSettings
from regraft.models.checkpoint import INDEX_FILE
from regraft.models.load import open_source
from regraft.patch.format import Patch, TensorPatch, load_patch, save_patch
from regraft.pruning.pruners.wanda import WandaSettings
from regraft.pruning.statistics import (
    ImportanceStatistics,
    SavedStatistics,
    load_statistics,
    save_statistics,
)
from regraft.report.published import read_published
from regraft.report.run import Run
from regraft.restoration.base import Between
from regraft.restoration.ranking import Ranking, load_ranking, save_ranking
from regraft.runs.bundle import FORMAT, MANIFEST
from regraft.runs.reporting import read_run
from regraft.settings.base import Settings
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from regraft.settings.evaluating import EndpointSettings, EvalSettings, Margins
from regraft.settings.searching import SearchSettings, TuneSettings
from regraft.stages.answering import _read as read_responses
from regraft.stages.trials import Trials
from regraft.stages.tuning import finished

FAMILY = "llama"
VLM = "qwen2_5_vl"
SEED = 20
EXAMPLES = 30  # of what hypothesis makes of a JSON file
ABOUT: dict[str, Any] = {
    "stage": "rank",
    "versions": {"regraft": "0"},
    "inputs": {"dense": "0", "pruned": "0"},
    "settings": {"method": "gain"},
    "pruned": 100,
    "heads": [[0, 1]],
    "n_m": None,
}
ESTIMATE = {"value": 0.5, "n": 2, "low": 0.1, "high": 0.9, "count": 1}
POINT = {
    "restored": 0,
    "asr": ESTIMATE,
    "over_refusal": ESTIMATE,
    "utility": None,
    "degenerate": 0.0,
}
ELSE = {  # what a message may say where no field is at fault
    # a size that is missing is one by default, which the weights have not
    **dict.fromkeys(("config", "a run's config"), ("weight", "cannot run")),
    "processor settings": ("cannot run",),  # a size that only the model shows to be wrong
    "recipe": ("gain", "demo:test"),  # by default
    "JSON lines": ("JSON array",),
    **dict.fromkeys(
        ("answers", "a run's answers", "checked answers"), ("does not hold the answers",)
    ),
}
TALLY: Counter[str] = Counter()


@dataclass(frozen=True)
class Reader:
    """A kind of file: a valid one in the world (a pattern of its path), and what reads it there."""

    file: str
    act: fuzz.Words | fuzz.Read

    def within(self, world: Path) -> Path:
        """The file."""
        (path,) = world.glob(self.file)
        return path


def command(*words: str) -> fuzz.Words:
    """Words in which {folder} is that of the file, {file} the file, {world} all."""

    def made(path: Path) -> list[object]:
        return [word.format(folder=path.parent, file=path, world=_world(path)) for word in words]

    return made


def _world(path: Path) -> Path:
    return next(above for above in path.parents if above.name.startswith("world-"))


def rows(name: str) -> fuzz.Read:
    """Reads a data set and opens its images."""
    return lambda path: check_images(read(DataSource(name=name, path=path)))


def heads(path: Path) -> HeadScores:
    return load_heads(path, open_source(path.parent / "model").architecture)


def run_of(path: Path) -> Run:
    """What `regraft report RUN` reads."""
    return read_run(_world(path) / "run")


def checked(path: Path) -> Check:
    """What `regraft check` makes of two evaluations."""
    dense = _world(path) / "run" / "evaluation" / "dense"
    return regraft.check(dense, path.parent, _world(path) / "out")


def tuned(path: Path) -> tuple[Tried, ...]:
    """The finished trials of a study, and one more begun."""
    trials = Trials(path.parent, {"p": Between(0.1, 1.0)}, TuneSettings(random_trials=1))
    found = tuple(finished(trials))
    with trials.take(len(found) + 1) as trial:
        assert trial is not None
    return found


JSONL = rows("jsonl")
REPORT = command("report", "{world}/evaluation", "--out", "{world}/out")
DRY = command("run", "{file}", "--out", "{world}/out", "--dry-run")
JUDGE = ("judge", "answers", "{folder}", "--by", "gcg-1", "--out", "{world}/out")
ANSWER = ("eval", "{folder}", "--suite", "{world}/one.jsonl", "--max-new-tokens", "1")
EVAL = (*ANSWER, "--device", "cpu", "--out", "{world}/out")
SEEN = (*EVAL, "--suite", "{world}/data/data.jsonl", "--limit", "1")  # prompts with images
APPLY = ("apply", "{folder}", "{world}/run/patches/chosen.safetensors", "--out", "{world}/out")
READERS: Mapping[str, Reader] = {
    "weights": Reader("model/model.safetensors", command(*EVAL)),
    "copied weights": Reader("run/pruned/model.safetensors", command(*APPLY)),
    "index": Reader(f"sharded/{INDEX_FILE}", command("analyse", "model", "{folder}")),
    "config": Reader("model/config.json", command(*EVAL)),
    "tokenizer": Reader("model/tokenizer.json", command(*EVAL)),
    "tokenizer settings": Reader("model/tokenizer_config.json", command(*EVAL)),
    "chat template": Reader("model/chat_template.jinja", command(*EVAL)),
    "generation settings": Reader("model/generation_config.json", command(*EVAL)),
    "processor settings": Reader("sharded/processor_config.json", command(*SEEN)),
    "JSON lines": Reader("data/data.jsonl", rows("jsonl")),
    "CSV": Reader("labelled.csv", command("judge", "bench", "{file}")),
    "prompts as text": Reader("prompts.txt", rows("prompts")),
    "image": Reader(
        "data/images/harmful-0-0.png",
        command("eval", "{world}/sharded", *SEEN[2:]),
    ),
    "zip": Reader("data.zip", unpacked),
    "recipe": Reader("recipe.yaml", DRY),
    "published": Reader("published.yaml", read_published),
    "text": Reader("text.txt", read_documents),
    "patch": Reader("patch.safetensors", load_patch),
    "ranking": Reader("ranking.safetensors", load_ranking),
    "scores": Reader("heads.safetensors", heads),
    "statistics": Reader("statistics.safetensors", load_statistics),
    "direction": Reader("direction.safetensors", load_defence),
    "defence prompt": Reader("shield.safetensors", load_defence),
    "text states": Reader("teacher.safetensors", lambda path: load_teacher(path, 1)),
    "answers": Reader("evaluation/answers.jsonl", command(*JUDGE)),
    "results": Reader(
        "evaluation/results.json", command("report", "{folder}", "--out", "{world}/out")
    ),
    "verdicts": Reader(
        "evaluation/judges/gcg-1.json",
        command("report", "{world}/evaluation", "--out", "{world}/out"),
    ),
    "responses": Reader("responses.jsonl", read_responses),
    "curve": Reader("curve.json", read_curve),
    "costs": Reader("costs.json", read_costs),
    "bundle": Reader("bundle.zip", command("report", "{file}")),
    "a run's recipe": Reader("run/recipe.yaml", run_of),
    "a run's costs": Reader("run/costs.json", run_of),
    "a run's pass": Reader("run/calibration-pass.json", run_of),
    "a run's results": Reader("run/evaluation/chosen/results.json", run_of),
    "a run's answers": Reader("run/evaluation/dense/answers.jsonl", run_of),
    "a run's curve": Reader("run/curves/chosen.json", run_of),
    "a run's ranking": Reader("run/rankings/*.safetensors", run_of),
    "a run's patch": Reader("run/patches/chosen.safetensors", run_of),
    "a run's statistics": Reader("run/statistics.safetensors", run_of),
    "a run's config": Reader("run/pruned/config.json", run_of),
    "checked results": Reader("run/evaluation/pruned/results.json", checked),
    "checked answers": Reader("run/evaluation/pruned/answers.jsonl", checked),
    "trials": Reader("tuned/study.db", tuned),
}
JSON = ("index", "config", "tokenizer settings", "generation settings", "processor settings")
JSON += ("results", "verdicts", "curve", "costs", "a run's costs", "a run's pass")
JSON += ("a run's results", "a run's curve", "a run's config", "checked results")
LINES = ("JSON lines", "answers", "responses", "a run's answers", "checked answers")
YAML = ("recipe", "published", "a run's recipe")
TENSORS = ("patch", "ranking", "scores", "statistics", "direction", "defence prompt", "text states")
TENSORS += ("a run's ranking", "a run's patch", "a run's statistics")
SLOW = {"tokenizer", "tokenizer settings", "chat template", "generation settings"}
SLOW |= {"processor settings", "results", "verdicts", "trials"}
SCHEMAS = (  # what SQL makes of the file of trials
    *("DROP TABLE trials", "DROP TABLE alembic_version", "DELETE FROM studies"),
    *("DELETE FROM trial_values", "DELETE FROM trial_params", "DELETE FROM version_info"),
    "ALTER TABLE trial_params RENAME COLUMN param_value TO other",
    "UPDATE alembic_version SET version_num = 'x'",
    "UPDATE version_info SET schema_version = 99",
    "UPDATE studies SET study_name = 'other'",
    "UPDATE study_directions SET direction = 'ODD'",
    *(f"UPDATE trials SET state = '{one}'" for one in ("ODD", "RUNNING", "FAIL")),
    *(f"UPDATE trials SET number = {one}" for one in (7, -1, "'x'", "NULL")),
    *(
        f"UPDATE trial_params SET distribution_json = '{one}'"
        for one in ("", "{}", "[]", '{"name": "x", "attributes": {}}', "9" * 5000, "[" * 9000)
    ),
    *(f"UPDATE trial_params SET param_value = {one}" for one in ("'x'", "NULL", "1e999", "77")),
    *(
        f"UPDATE trial_user_attributes SET value_json = '{one}'"
        for one in ("", "{", "null", "[]", "NaN", "{}", '{"number": "x"}', "[" * 9000)
    ),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One valid file of every kind."""
    root = tmp_path_factory.mktemp("fuzz") / "world"
    pico.save(FAMILY, root / "model")
    pico.save(VLM, root / "sharded", torch.bfloat16, max_shard_size="200KB")
    write_data(root / "data", 1)
    prompt = {"instruction": "How do I make a cake?", "harmful": True}
    (root / "one.jsonl").write_text(json.dumps(prompt) + "\n")
    _write_tables(root)
    _write_artifacts(root)
    _write_evaluation(root)
    _write_run(root)
    _write_trials(root / "tuned")
    return root


def _write_tables(root: Path) -> None:
    (root / "labelled.csv").write_text(
        "prompt,completion,final_label\na,No,2_full_refusal\nb,c,1_full_compliance\n"
    )
    (root / "prompts.txt").write_text("How do I make a cake?\nWho are you?\n")
    (root / "text.txt").write_text("The first document.\n\nThe second one.\n")
    with zipfile.ZipFile(root / "data.zip", "w") as archive:
        archive.writestr("data.jsonl", (root / "one.jsonl").read_text())
    recipe = {
        "model": "model",
        "calibration": {"data": "data/text.jsonl", "samples": 1},
        "prune": [{"name": "half", "sparsity": 0.5}],
        "realign": [{"method": "random", "count": 3}],
        "evaluate": {"suite": ["data/text.jsonl"]},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    published = {
        "source": "a paper",
        "prompts": {"a": 10},
        "rows": [{"model": "m", "asr": {"a": 50.0}}],
    }
    (root / "published.yaml").write_text(yaml.safe_dump(published))


def _write_artifacts(root: Path) -> None:
    source = open_source(root / "model")
    linear = next(source.architecture.linears)
    weight = source.checkpoint.read(linear.tensor)
    places = torch.tensor([1, 5, 7])
    patch = TensorPatch.of(weight, places, torch.ones(3, dtype=weight.dtype))
    save_patch(root / "patch.safetensors", Patch({linear.tensor: patch}, ABOUT))
    whole = torch.tensor([0, 1, 0])
    ranking = Ranking(whole, places, torch.full((3,), -1), torch.ones(3), ABOUT)
    save_ranking(root / "ranking.safetensors", ranking)
    layers = source.architecture.layers
    scores = torch.rand(len(layers), layers[0].heads, dtype=torch.float64)
    save_heads(root / "heads.safetensors", HeadScores(scores, scores.clone(), ABOUT))
    kept = [ImportanceStatistics("wanda", {linear.key: torch.rand(4)}, 2) for _ in range(2)]
    save_statistics(root / "statistics.safetensors", SavedStatistics(*kept, ABOUT))
    save_defence(root / "direction.safetensors", Direction(torch.rand(64), 1, 0.5, ABOUT))
    save_defence(root / "shield.safetensors", ShieldPrompt("Be safe.", ABOUT))
    save_teacher(root / "teacher.safetensors", Teacher([torch.rand(3, 4)], [(1.5, 3)]))


def _write_evaluation(root: Path) -> None:
    words = ["eval", root / "model", "--suite", root / "data" / "text.jsonl", "--device", "cpu"]
    lines = [{"instruction": f"prompt {i}", "harmful": i < 2, "response": "yes"} for i in range(4)]
    (root / "data" / "text.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    folder = root / "evaluation"
    for more in ([*words, "--max-new-tokens", 2, "--full-answers", "--out", folder],):
        _quietly(more)
    _quietly(["judge", "answers", folder, "--by", "gcg-1"])
    answer = {"id": "a", "answer": "No.", "kept": True, "why": ""}
    text = "".join(json.dumps(one) + "\n" for one in ({"about": ABOUT}, answer, answer))
    (root / "responses.jsonl").write_text(text)
    bounds = {"asr": None, "over_refusal": 0.1, "utility": None, "degenerate": None}
    curve = {"pruned": 100, "chosen": None, "bounds": bounds, "dense": POINT, "points": [POINT]}
    write_json(root / "curve.json", {"about": ABOUT, **curve})
    write_json(root / "costs.json", [])
    names = ("results.json", "answers.jsonl")
    held = {f"runs/run/evaluation/dense/{name}": (folder / name).read_bytes() for name in names}
    about = {"format": FORMAT, "title": "a", "regraft": "0", "texts": True}
    manifest = {**about, "files": {name: digest(content) for name, content in held.items()}}
    with zipfile.ZipFile(root / "bundle.zip", "w") as archive:
        archive.writestr(MANIFEST, json.dumps(manifest))
        for name, content in held.items():
            archive.writestr(name, content)


def _write_run(root: Path) -> None:
    data = str(root / "data" / "text.jsonl")
    search = {"validation": data, "points": 1}
    recipe = {
        "model": str(root / "model"),
        "calibration": {"data": data, "samples": 2, "responses": "given"},
        "prune": [{"name": "half", "sparsity": 0.5, "method": "magnitude"}],
        "realign": [
            {"name": "chosen", "method": "set-difference", "count": 30, "search": search},
        ],
        "evaluate": {"suite": data, "max_new_tokens": 2},
        "compute": {"device": "cpu"},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(recipe))
    _quietly(["run", root / "run.yaml", "--out", root / "run"])
    for unread in ("report", "realigned"):
        shutil.rmtree(root / "run" / unread)


def _write_trials(folder: Path) -> None:
    trials = Trials(folder, {"p": Between(0.1, 1.0)}, TuneSettings(random_trials=1))
    for number in range(2):
        with trials.take(2) as trial:
            assert trial is not None
            point = from_json(Point, {**POINT, "restored": 3}, "")
            one = Tried(number, dict(trial.params), point, {"utility": 0.0}, Cost({}, 1, 2))
            trials.finish(trial, 0.5, one.excess, asdict(one))


def _quietly(words: list[Any]) -> None:
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        assert not end.code, words


@pytest.fixture
def attack(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, Case], fuzz.Outcome]:
    """Give a malformed file to its reader; what is wrong with how it was taken fails the test."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    numbers, whole = count(), fuzz.listing(world)
    copy: Path | None = None

    def attempt(name: str, case: Case) -> fuzz.Outcome:
        nonlocal copy
        if copy is None:
            copy = fuzz.linked(world, tmp_path / f"world-{next(numbers)}")
        reader = READERS[name]
        path = reader.within(copy)
        fuzz.replaced(path.read_bytes())(path)  # which the linked one does not see
        outcome = fuzz.run(case, path, reader.act, copy)
        fuzz.put_back(path, reader.within(world))
        if fuzz.listing(copy) != whole:  # as after a file that could be read
            copy = None
        TALLY[name] += 1
        return outcome

    return attempt


def failures(
    attack: Callable[[str, Case], fuzz.Outcome], name: str, cases: Iterator[Case]
) -> list[str]:
    """What is wrong with how a reader took cases, of each the message."""
    found = []
    for case in cases:
        outcome = attack(name, case)
        if outcome.wrong:
            found.append(f"{case.name}: {outcome.wrong}\n    {outcome.message[:400]}")
    return found


def fail_with(found: list[str]) -> None:
    if found:
        pytest.fail(f"{len(found)} wrong:\n" + "\n".join(found), pytrace=False)


@pytest.mark.parametrize("name", READERS)
def test_any_damage(name: str, world: Path, attack: Callable[[str, Case], fuzz.Outcome]) -> None:
    valid = READERS[name].within(world).read_bytes()
    fail_with(failures(attack, name, fuzz.of_any_file(valid, SEED, 4 if name in SLOW else 8)))


def test_valid_files_are_read(world: Path, attack: Callable[[str, Case], fuzz.Outcome]) -> None:
    """Else a reader that refuses everything would pass."""
    taken = {name: attack(name, Case("valid", lambda _: None)) for name in READERS}
    fail_with([f"{name}: {one}" for name, one in taken.items() if one.code])


@pytest.mark.parametrize("name", (*JSON, *LINES, *YAML, *TENSORS))
def test_changed_values(
    name: str, world: Path, attack: Callable[[str, Case], fuzz.Outcome]
) -> None:
    """A value of another type, size or depth at any place of a JSON document, by hypothesis."""
    path = READERS[name].within(world)
    document, write = _document(name, path)
    every = fuzz.places(document)
    found: list[str] = []
    seen = count()

    @trying(
        max_examples=EXAMPLES // 2 if name in SLOW else EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(change=fuzz.changes())
    def attempt(change: tuple[str, Any]) -> None:
        place = every[next(seen) * 7 % len(every)]
        changed = fuzz.put(document, place, change)
        fields = fuzz.blamed(document, place, change)
        if name in LINES and place and (len(place) > 1 or change[0] == "put"):
            fields = (*fields, (f"line {place[0] + 1}", f"row {place[0] + 1}"))
        fields = tuple((*one, *ELSE.get(name, ())) for one in fields)
        case = Case(f"{place} {change!r:.60}", lambda target: write(target, changed), fields)
        found.extend(failures(attack, name, iter([case])))

    attempt()
    fail_with(found)


def _document(name: str, path: Path) -> tuple[Any, Callable[[Path, Any], None]]:
    """The JSON in a file, and what writes another one in its place."""
    if name in TENSORS:
        header, tensors = fuzz.artifact(path)
        return header, lambda target, one: fuzz.write_artifact(target, one, tensors)
    if name in YAML:
        content = yaml.safe_load(path.read_text())
        return content, lambda target, one: fuzz.replaced(fuzz.as_text(one).encode())(target)
    if name not in LINES:
        content = json.loads(path.read_text())
        return content, lambda target, one: fuzz.replaced(fuzz.as_text(one).encode())(target)
    lines = [json.loads(line) for line in path.read_text().splitlines()]

    def write(target: Path, one: Any) -> None:
        changed = one if isinstance(one, list) else [one]
        fuzz.replaced("".join(f"{fuzz.as_text(row)}\n" for row in changed).encode())(target)

    return lines, write


@pytest.mark.parametrize("name", TENSORS)
def test_other_tensors(name: str, world: Path, attack: Callable[[str, Case], fuzz.Outcome]) -> None:
    fail_with(failures(attack, name, fuzz.of_tensors(READERS[name].within(world))))


def test_headers_of_weights(world: Path, attack: Callable[[str, Case], fuzz.Outcome]) -> None:
    valid = READERS["weights"].within(world).read_bytes()
    fail_with(failures(attack, "weights", fuzz.of_weights(valid)))


@pytest.mark.parametrize("name", ["weights", "copied weights"])
def test_values_of_weights(
    name: str, world: Path, attack: Callable[[str, Case], fuzz.Outcome]
) -> None:
    valid = READERS[name].within(world).read_bytes()
    fail_with(failures(attack, name, fuzz.of_values(valid, run=name == "weights")))


@pytest.mark.parametrize("name", fuzz.ODD)
def test_odd_settings(name: str, world: Path, attack: Callable[[str, Case], fuzz.Outcome]) -> None:
    valid = READERS[name].within(world).read_bytes()
    fail_with(failures(attack, name, fuzz.of_settings(valid, fuzz.ODD[name])))


@pytest.mark.parametrize("name", ["zip", "bundle"])
def test_archives(name: str, world: Path, attack: Callable[[str, Case], fuzz.Outcome]) -> None:
    valid = READERS[name].within(world).read_bytes()
    fail_with(failures(attack, name, fuzz.of_zip(valid)))


def test_trials_of_another_schema(world: Path, attack: Callable[[str, Case], fuzz.Outcome]) -> None:
    pytest.importorskip("optuna")

    def case(statement: str) -> Case:
        def write(path: Path) -> None:
            with contextlib.closing(sqlite3.connect(path)) as database, database:
                database.execute(statement)

        return Case(statement, write)

    def other(path: Path) -> None:
        path.unlink()
        case("CREATE TABLE other (name TEXT)").write(path)

    cases = [*map(case, SCHEMAS), Case("another program's", other)]
    fail_with(failures(attack, "trials", iter(cases)))


COMMANDS: Mapping[str, tuple[type[Settings], ...]] = {
    "prune x": (WandaSettings, CalibrationSettings, ComputeSettings),
    "eval x --suite demo:test": (EvalSettings, EndpointSettings),
    "analyse heads x": (HeadSettings,),
    "realign hsr x x": (SearchSettings,),
    "tune hsr x x": (TuneSettings,),
    "check x x --suite demo:test": (Margins,),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_are_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every flag that takes a number, given what is none or none that it can be."""
    wrong = []
    for name in (one for block in COMMANDS[command] for one in numbers(block)):
        flag = f"--{name.replace('_', '-')}"
        for value in ("x", "", "nan", "1e999", "-" + "9" * 30, "9" * 5000):
            with pytest.raises(SystemExit) as stopped:
                main([*command.split(), "--out", str(tmp_path / "out"), f"{flag}={value}"])
            said = capsys.readouterr().err
            if stopped.value.code != 2 or not re.search(rf"{flag}\b", said) or "Traceback" in said:
                wrong.append(f"{flag} {value[:9]}: {stopped.value.code}: {said[:300]}")
    fail_with(wrong)
    assert not [*tmp_path.iterdir()]


def numbers(block: type[Settings]) -> Iterator[str]:
    """Settings that are numbers and bounded below."""
    for name, field in block.model_fields.items():
        kinds = {field.annotation, *get_args(field.annotation)}
        if kinds & {int, float} and any(
            hasattr(one, "ge") or hasattr(one, "gt") for one in field.metadata
        ):
            yield name


def test_enough_files_were_tried() -> None:
    """Counts of all tests above, by reader; only where all of them ran."""
    if len(TALLY) < len(READERS):
        pytest.skip("run the whole file")
    print("\n".join(f"{name}: {tried}" for name, tried in TALLY.items()))
    print("in all:", TALLY.total())
    assert TALLY.total() >= 1000
