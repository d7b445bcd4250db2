"""Several models in one run: their table, what it is set beside, the bundle, the paper's recipe."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import spearmanr

import pico
import quick
from commands import exit_code
from disk import write_data
from paper_data import write_paper_data
from regraft import distributed, stages
from regraft.disk.files import digest, file_digest, write_json
from regraft.errors import RegraftError
from regraft.evaluation.keywords import DEFAULT_JUDGE
from regraft.evaluation.metrics import rsr
from regraft.evaluation.results import result_to_json, write_answers
from regraft.evaluation.summary import summarise
from regraft.heads.score import load_heads
from regraft.models.load import open_source
from regraft.recipes.file import read_recipe, write_recipe
from regraft.recipes.recipe import Recipe
from regraft.report.study import Row, Study
from regraft.runs import pipeline
from regraft.runs.bundle import MANIFEST, write_bundle
from regraft.runs.bundle_check import read_bundle
from regraft.runs.run_dir import RunDir, folder_of_model

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = (
    *("qwen2-vl", "qwen2.5-vl", "llava-next-mistral", "llava-next-vicuna"),
    *("llava-next-llama3", "llama-3.2-vision"),
)
PUBLISHED = """
source: somebody
prompts: {a: 100, b: 300}
spearman: 0.5
spearman_n: 3
rows:
- {model: one, asr: {a: 2, b: 4}, mean_asr: 3, checked: true}
- {model: one, pruning: wanda-50, asr: {a: 20, b: 40}, mean_asr: 30, checked: true}
- {model: one, pruning: wanda-50, method: hsr, asr: {a: 11, b: 22}, mean_asr: 16.5, rsr: 50,
   per_ten_thousand: 0.5, checked: true}
- {model: two, pruning: wanda-50, mean_asr: 30}
- {model: four, pruning: wanda-50, mean_asr: 10}
"""


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Study]:
    """A run of three models and its study; see `world` and `table`."""
    root = tmp_path_factory.mktemp("several")
    for seed, name in enumerate(("one", "two", "three")):
        pico.save("llava", root / "models" / name, seed=seed)
    for name in ("a", "b"):
        write_data(root / "data" / name, 6).rename(root / "data" / name / f"{name}.jsonl")
    (root / "published.yaml").write_text(PUBLISHED)
    content = {
        "title": "three models",
        "models": [
            {"model": "models/one", "prunings": ["wanda-50", "wanda-60"]},
            {"model": "models/two", "prunings": ["wanda-50"]},
            {"model": "models/three", "name": "third", "prunings": ["wanda-50"]},
        ],
        "published": "published.yaml",
        "calibration": {"data": "data/a/a.jsonl", "samples": 3},
        "prune": [
            {"sparsity": 0.5, "order": "one-shot"},
            {"sparsity": 0.6, "order": "one-shot", "realign": False},
        ],
        "heads": {"r_max": 1},
        "realign": {"method": "hsr", "top_heads": 2, "q": 0.9, "checkpoint": False},
        "evaluate": {"suite": ["data/a/a.jsonl", "data/b/b.jsonl"], "max_new_tokens": 2},
        "compute": {"device": "cpu", "batch_size": 12},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(content))
    with quick.without_figures():
        pipeline.run_recipe(read_recipe(root / "recipe.yaml"), root / "run")
        _answer_otherwise(root / "run")
        for name in ("one", "two", "third"):
            assert exit_code("report", folder_of_model(root / "run", name)) == 0
    return root, pipeline.report_recipe(root / "run")


@pytest.fixture(scope="module")
def world(made: tuple[Path, Study]) -> Path:
    """Three models in `run`, one of them with two prunings, on data sets a and b; recipe.yaml."""
    return made[0]


@pytest.fixture(scope="module")
def table(made: tuple[Path, Study]) -> Study:
    """The report over the models of the world."""
    return made[1]


@pytest.fixture(scope="module")
def bundled(world: Path) -> Mapping[str, bytes]:
    """The files of the bundle of the world's run."""
    write_bundle(world / "run", world / "bundle.zip")
    return _unzipped(world / "bundle.zip")


def _answer_otherwise(run: Path) -> None:
    """Other verdicts in every evaluation, as the real writers leave them."""
    rates = {"dense": 0.1, "pruned": 0.8, "hsr": 0.5}
    for file in sorted(run.rglob("answers.jsonl")):
        place = file.parent
        found = stages.read_evaluation(place)
        draw = np.random.default_rng(len(str(place.relative_to(run))))
        attacked = rates[place.name]
        changed = [
            replace(
                one,
                degenerate="",
                refused=bool(draw.random() > attacked) if one.harmful else one.refused,
            )
            for one in found.result.answers
        ]
        write_answers(file, changed)
        content = json.loads((place / "results.json").read_text())
        result = result_to_json(summarise(found.result.suite, DEFAULT_JUDGE, changed))
        made = {"result": result, "answers": file_digest(file)}
        write_json(place / "results.json", content | made)


# Recipes


def test_each_model_has_its_prunings_and_their_ways() -> None:
    recipe = Recipe.model_validate(
        {
            "models": ["org/one@main", {"model": "org/two", "prunings": ["wanda-40"]}],
            "prune": [{"sparsity": 0.4}, {"sparsity": 0.5}, {"sparsity": 0.6, "realign": False}],
            "realign": [
                {"name": "both"},
                {"name": "first", "prunings": ["wanda-40"]},
                {"name": "second", "prunings": ["wanda-50", "wanda-60"]},
            ],
            "defend": {"prunings": ["wanda-50"]},
        }
    )
    one, two = (recipe.for_model(model) for model in recipe.models)
    assert [model.name for model in recipe.models] == ["one", "two"]
    assert (one.model, one.models, one.title) == ("org/one@main", (), "regraft: one")
    assert [p.name for p in one.prune] == ["wanda-40", "wanda-50", "wanda-60"]
    assert [v.prunings for v in one.realign] == [(), ("wanda-40",), ("wanda-50",)]
    assert [p.name for p in two.prune] == ["wanda-40"]
    assert [v.name for v in two.variants_of(two.prune[0])] == ["both", "first"]
    assert (len(one.defend), len(two.defend)) == (1, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"models": ["a/b"], "seeds": [0]}, "`models` and `seeds` cannot be combined"),
        ({"models": ["a/b"], "pruned": "c/d"}, "`models` and `pruned` cannot be combined"),
        ({"models": ["a/b"], "model": "c/d"}, "take the place of `model`"),
        ({"models": ["a/b", "c/b"]}, "two of `models` are called 'b'"),
        ({"models": [{"model": "a/b", "prunings": ["x"]}]}, "'b' is for the pruning 'x'"),
        ({"models": [{"model": "a/b", "name": "x y"}]}, "'x y' must consist of letters"),
        ({"published": "x.yaml"}, "for the table over `models`"),
    ],
)
def test_impossible_models(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(content)


def test_the_papers_recipe_is_of_its_six_models() -> None:
    recipe = read_recipe(RECIPES / "paper.yaml")
    assert tuple(one.name for one in recipe.models) == NAMES
    pruned = {one.name: [p.name for p in recipe.for_model(one).prune] for one in recipe.models}
    assert {name for name, found in pruned.items() if "wanda-50" in found} == set(NAMES)
    assert set(pruned["qwen2.5-vl"]) == {"wanda-50", "snip-50", "sparsegpt-50"}
    assert set(pruned["qwen2-vl"]) == {"wanda-40", "wanda-50", "wanda-60"}
    assert recipe.prune[0].name == "wanda-50", "total Ships are related to the first pruning"
    again = Recipe.model_validate(yaml.safe_load(write_recipe(recipe)))
    assert again == recipe


# The table


def _row(table: Study, model: str, name: str) -> Row:
    pruning, _, method = name.partition("/")
    tables = [one for one in table.tables if one.model == model]
    if name != "dense":
        tables = [one for one in tables if one.pruning == pruning]
    return next(row for row in tables[0].rows if row.name == (method or name))


def _complied(world: Path, model: str, evaluation: str) -> dict[str, float]:
    """ASR of each data set, counted from the answers on disk."""
    file = folder_of_model(world / "run", model) / "evaluation" / evaluation / "answers.jsonl"
    found: dict[str, list[bool]] = {}
    for line in file.read_text().splitlines():
        answer = json.loads(line)
        if answer["harmful"]:
            found.setdefault(Path(answer["suite"]).stem, []).append(not answer["refused"])
    return {name: sum(of_it) / len(of_it) for name, of_it in found.items()}


def test_the_table_counts_each_data_set_the_same(world: Path, table: Study) -> None:
    assert [one.name for one in table.tables] == [
        *("one: wanda-50", "one: wanda-60", "two: wanda-50", "third: wanda-50"),
    ]
    assert [row.name for row in table.tables[0].rows] == ["dense", "wanda-50", "hsr"]
    assert [row.name for row in table.tables[1].rows] == ["dense", "wanda-60"]
    for model, place in (("one", "wanda-50/"), ("two", ""), ("third", "")):
        asr = {
            name: _complied(world, model, folder)
            for name, folder in (
                ("dense", "dense"),
                ("wanda-50", f"{place}pruned"),
                ("wanda-50/hsr", f"{place}hsr"),
            )
        }
        means = {name: (rates["a"] + rates["b"]) / 2 for name, rates in asr.items()}
        for name, mean in means.items():
            row = _row(table, model, name)
            assert row.mean_asr is not None
            assert row.mean_asr.value == pytest.approx(mean)
            assert row.mean_asr.n == 12
            found = {
                table.suites[one]: rates.asr.value
                for one, rates in row.by_suite.items()
                if rates.asr
            }
            assert found == pytest.approx(asr[name])
        recovered = _row(table, model, "wanda-50/hsr").mean_rsr
        assert recovered is not None
        assert recovered.value == rsr(*means.values())
        assert recovered.value is not None
        assert recovered.interval is not None
        assert recovered.interval[0] <= recovered.value <= recovered.interval[1]


def test_total_ships_are_related_to_the_rise_in_mean_asr(world: Path, table: Study) -> None:
    assert table.correlation is not None
    ships, rises = [], []
    for name, folder in (("one", "one"), ("two", "two"), ("third", "three")):
        architecture = open_source(world / "models" / folder).architecture
        place = RunDir(folder_of_model(world / "run", name))
        ships.append(float(load_heads(place.heads, architecture).ships.nansum()))
        pruned, dense = (_row(table, name, one).mean_asr for one in ("wanda-50", "dense"))
        assert pruned is not None
        assert dense is not None
        rises.append(pruned.value - dense.value)
    points = table.correlation.points
    assert [point[0] for point in points] == ["one", "two", "third"]
    assert [point[1] for point in points] == pytest.approx(ships)
    assert [point[2] for point in points] == pytest.approx(rises)
    if table.correlation.rho is not None:
        assert table.correlation.rho == pytest.approx(float(spearmanr(ships, rises).statistic))


def test_the_page_sets_published_figures_beside(world: Path, table: Study) -> None:
    beside = _row(table, "one", "wanda-50/hsr").published
    assert beside is not None
    assert beside.row.rsr == 0.5
    assert [one.key for one in table.missing] == [("four", "wanda-50", "")]
    text = (world / "run" / "report" / "report.md").read_text()
    line = next(one for one in text.splitlines() if one.startswith("| 3. hsr"))
    assert " 0.500 |" in line
    assert " 16.50 % [" in line
    assert " 50.00 % [" in line
    assert "30.00 % † [" in text, "not checked"
    assert "Published, but not run here: four/wanda-50." in text
    assert "a: 6 prompts here, 100 in the publication." in text
    assert "published: 0.5000 (n = 3)" in text
    page = (world / "run" / "report" / "report.html").read_text()
    assert "16.50" in page
    assert "<svg" in page
    content = json.loads((world / "run" / "report" / "report.json").read_text())
    assert sum(len(one["rows"]) for one in content["tables"]) == len(table.rows)


def models_of(study: Study) -> list[str]:
    return [run.name for run in study.runs]


@pytest.mark.usefixtures("undrawn")
def test_a_run_of_several_models_resumes_and_grows(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    evaluate = stages.evaluate_target

    def watched(model: Any, out: Path, *rest: Any, **named: Any) -> Any:
        if not out.exists():
            done.append(str(out))
        return evaluate(model, out, *rest, **named)

    monkeypatch.setattr(stages, "evaluate_target", watched)
    recipe = read_recipe(world / "recipe.yaml")
    fewer = recipe.model_copy(update={"models": recipe.models[:2], "published": None})
    shutil.copytree(world / "run", tmp_path / "run")
    shutil.rmtree(folder_of_model(tmp_path / "run", "third"))
    with pytest.raises(RegraftError, match="not finished: model-third has not been run"):
        pipeline.report_recipe(tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text(write_recipe(fewer))
    assert models_of(pipeline.report_recipe(tmp_path / "run")) == ["one", "two"]
    assert models_of(pipeline.run_recipe(recipe, tmp_path / "run")) == ["one", "two", "third"]
    assert len(done) == 3
    assert all("model-third" in one for one in done)
    other = recipe.model_copy(update={"models": recipe.models[1:2]})
    other = other.model_copy(
        update={"models": (other.models[0].model_copy(update={"name": "one"}),)}
    )
    with pytest.raises(RegraftError, match="another recipe"):
        pipeline.run_recipe(other, tmp_path / "run")


def test_a_run_of_one_model_is_no_run_of_several(tmp_path: Path) -> None:
    pipeline.claim(tmp_path / "one", Recipe())
    pipeline.claim(tmp_path / "several", Recipe.model_validate({"models": ["a/b"]}))
    pipeline.claim(tmp_path / "several", Recipe.model_validate({"models": ["c/d", "a/b"]}))
    for folder, other in (
        ("one", {"models": ["a/b"]}),
        ("several", {}),
        ("several", {"models": ["c/d"]}),
    ):
        with pytest.raises(RegraftError, match="another recipe"):
            pipeline.claim(tmp_path / folder, Recipe.model_validate(other))


def test_bad_input_of_several_models_writes_nothing(world: Path, tmp_path: Path) -> None:
    recipe = read_recipe(world / "recipe.yaml")
    gone = recipe.models[2].model_copy(update={"model": str(tmp_path / "gone")})
    with pytest.raises(RegraftError, match="gone"):
        pipeline.run_recipe(
            recipe.model_copy(update={"models": (*recipe.models[:2], gone)}), tmp_path / "run"
        )
    (tmp_path / "published.yaml").write_text("rows: [{model: x, asr: {a: 101}}]")
    with pytest.raises(RegraftError, match=r"rows\.0\.asr\.a"):
        pipeline.run_recipe(
            recipe.model_copy(update={"published": tmp_path / "published.yaml"}), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


# The bundle


@pytest.mark.usefixtures("undrawn")
def test_a_bundle_is_the_same_each_time_and_checks_out(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.zip", tmp_path / "second.zip"
    assert exit_code("report", world / "run", "--bundle", first) == 0
    write_bundle(world / "run", second)
    assert first.read_bytes() == second.read_bytes()
    found = read_bundle(first)
    assert set(found.evaluations) == {
        *(f"runs/one/{name}" for name in ("dense", "wanda-50", "wanda-50/hsr", "wanda-60")),
        *(f"runs/two/{name}" for name in ("dense", "wanda-50", "wanda-50/hsr")),
        *(f"runs/third/{name}" for name in ("dense", "wanda-50", "wanda-50/hsr")),
    }
    assert found.page.startswith("# three models")
    capsys.readouterr()
    assert exit_code("report", first) == 0
    shown = capsys.readouterr().out
    assert "the verdicts on 240 answers of 10 evaluations" in shown
    assert found.digest in shown


def test_a_bundle_holds_no_texts_weights_or_paths(
    world: Path, bundled: Mapping[str, bytes], tmp_path: Path
) -> None:
    write_bundle(world / "run", tmp_path / "texts.zip", texts=True)
    plain, texts = bundled, _unzipped(tmp_path / "texts.zip")
    assert plain.keys() == texts.keys()
    assert {name.rpartition(".")[2] for name in plain} == {
        *("json", "jsonl", "md", "html", "txt", "yaml"),
    }
    place = folder_of_model(world / "run", "one") / "evaluation" / "dense"
    answers = stages.read_evaluation(place).result.answers
    said = {one.instruction for one in answers} | {one.answer for one in answers if one.answer}
    assert said
    whole = b"\n".join(plain.values())
    assert not [one for one in said if len(one) > 8 and one.encode() in whole]
    for one in said:
        assert json.dumps(one, ensure_ascii=False).encode() in b"\n".join(texts.values())
    assert str(world).encode() not in whole
    assert b'"checkpoint"' not in plain[MANIFEST]
    recipe = yaml.safe_load(plain["runs/one/recipe.yaml"])
    assert recipe["model"] == "models/one"
    patches = json.loads(plain["runs/one/patches.json"])
    patch = folder_of_model(world / "run", "one") / "patches" / "wanda-50" / "hsr.safetensors"
    assert patches["wanda-50/hsr"]["sha256"] == file_digest(patch)


def _unzipped(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zipped(path: Path, files: dict[str, bytes], *, signed: bool) -> Path:
    """The files as a bundle; signed with digests of what they are now."""
    if signed:
        manifest = json.loads(files[MANIFEST])
        manifest["files"] = {name: digest(c) for name, c in files.items() if name != MANIFEST}
        files = {**files, MANIFEST: json.dumps(manifest).encode()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def _changed(name: str, change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    def apply(files: dict[str, bytes]) -> None:
        content = json.loads(files[name])
        change(content)
        files[name] = json.dumps(content).encode()

    return apply


def _first_verdict(files: dict[str, bytes]) -> None:
    name = "runs/one/evaluation/wanda-50/answers.jsonl"
    first, _, rest = files[name].decode().partition("\n")
    answer = json.loads(first)
    answer["refused"] = not answer["refused"]
    files[name] = f"{json.dumps(answer)}\n{rest}".encode()


def _set_asr(content: Any) -> None:
    content["result"]["asr"]["value"] = 0.01


def _set_row(content: Any) -> None:
    content["tables"][0]["rows"][1]["asr"]["value"] = 0.01


def _set_rsr(content: Any) -> None:
    content["tables"][0]["rows"][2]["rsr"]["value"] = 0.99


@pytest.mark.parametrize(
    ("change", "signed", "message"),
    [
        (_first_verdict, False, "answers.jsonl does not match its digest"),
        (_first_verdict, True, "but the answers give"),
        (
            _changed("runs/one/evaluation/wanda-50/results.json", _set_asr),
            True,
            r"wanda-50: asr is 1\.00 %",
        ),
        (
            _changed("report.json", _set_row),
            True,
            r"report.json one wanda-50 wanda-50: asr is 1\.00 %",
        ),
        (_changed("report.json", _set_rsr), True, r"RSR is 0\.99"),
        (lambda files: files.update({"report.json": b"{"}), True, "report.json: not valid JSON"),
        (lambda files: files.update({"report.json": b"{}"}), True, "is no report of regraft"),
        (
            lambda files: files.update({"runs/one/evaluation/dense/results.json": b"[]"}),
            True,
            r"expected a JSON object, found \[\]",
        ),
        (lambda files: files.pop("report.md"), False, "report.md is missing"),
        (lambda files: files.update(more=b""), False, "more was added"),
        (lambda files: files.pop(MANIFEST), False, "no bundle of regraft"),
        (
            lambda files: files.pop("runs/two/evaluation/dense/answers.jsonl"),
            True,
            "has no answers.jsonl",
        ),
    ],
)
def test_a_changed_bundle_is_found_out(
    bundled: Mapping[str, bytes],
    tmp_path: Path,
    change: Callable[[Any], None],
    signed: bool,
    message: str,
) -> None:
    files = {**bundled}
    change(files)
    with pytest.raises(RegraftError, match=message):
        read_bundle(_zipped(tmp_path / "changed.zip", files, signed=signed))


@pytest.mark.usefixtures("undrawn")
def test_bad_input_of_bundles(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: object) -> str:
        capsys.readouterr()
        assert exit_code("report", *words) == 2
        return " ".join(capsys.readouterr().err.split())

    run = world / "run"
    assert "name its file with --bundle" in refused(run, "--texts")
    assert "Name it x.zip" in refused(run, "--bundle", tmp_path / "x.tar")
    (tmp_path / "x.zip").write_bytes(b"PK")
    assert "exists" in refused(run, "--bundle", tmp_path / "x.zip")
    assert "damaged or no zip file" in refused(tmp_path / "x.zip")
    assert "does not exist" in refused(tmp_path / "gone.zip")
    dense = folder_of_model(run, "one") / "evaluation" / "dense"
    assert "A bundle holds a run" in refused(dense, "--bundle", tmp_path / "y.zip")


def test_a_card_that_is_no_text_is_no_part_of_a_bundle(world: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder_of_model(world / "run", "two"), tmp_path / "run")
    (run / "report" / "card.md").write_bytes(b"\xff")
    with pytest.raises(RegraftError, match=r"card\.md is not UTF-8 text"):
        write_bundle(run, tmp_path / "two.zip")


def test_a_bundle_of_one_run(world: Path, tmp_path: Path) -> None:
    write_bundle(folder_of_model(world / "run", "two"), tmp_path / "two.zip")
    found = read_bundle(tmp_path / "two.zip")
    assert set(found.evaluations) == {
        "runs/run/dense",
        "runs/run/wanda-50",
        "runs/run/wanda-50/hsr",
    }
    assert "three models: two" in found.page


# The paper


@pytest.mark.parametrize("half", ["", "title: h"])
def test_a_start_that_was_killed_at_once_leaves_no_run(tmp_path: Path, half: str) -> None:
    (tmp_path / ".recipe.yaml.regraft-tmp").write_text(half)
    (tmp_path / "thesis.txt").write_text("mine")
    for check in (pipeline.recipe_before, pipeline.claim):
        with pytest.raises(RegraftError, match="is not empty"):
            check(tmp_path, Recipe())
    (tmp_path / "thesis.txt").unlink()
    assert pipeline.recipe_before(tmp_path, Recipe()) is None
    pipeline.claim(tmp_path, Recipe())
    assert [one.name for one in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("first, found", [(True, "is not empty"), (False, "nowhere")])
def test_one_process_looks_at_the_folder_in_which_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool, found: str
) -> None:
    """Another one might look while the recipe is written."""
    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.setattr(distributed, "first", lambda: first)
    with pytest.raises(RegraftError, match=found):
        pipeline.plan_recipe(Recipe(model="nowhere"), tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_papers_recipe_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On pico models of the families in place of the hub ids, with a few rows of each suite."""
    write_paper_data(tmp_path / "data")
    shutil.copytree(RECIPES / "published", tmp_path / "recipes" / "published")
    content = yaml.safe_load((RECIPES / "paper.yaml").read_text())
    families = dict(zip(NAMES, pico.PAPER_FAMILIES, strict=True))
    for model in content["models"]:
        family = families[model["name"]]
        model["model"] = str(pico.save(family, tmp_path / "models" / family))
    for one in content["realign"]:
        if "budget" in one:
            one["budget"] = 0.5  # of a pico model's weights, 0.02 per 10,000 are none
    content["heads"]["r_max"] = 2  # of few prompts
    content["calibration"]["samples"] = 4
    content["evaluate"]["max_new_tokens"] = 2
    content["compute"] = {"device": "cpu", "batch_size": 16}
    recipe, run = tmp_path / "recipes" / "paper.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    assert exit_code("run", recipe, "--out", run) == 0
    assert exit_code("report", run, "--bundle", tmp_path / "bundle.zip") == 0
    bundle = read_bundle(tmp_path / "bundle.zip")
    assert len(bundle.evaluations) == 6 + 10 + 6 * 9 + 4 * 2
    table = json.loads((run / "report" / "report.json").read_text())
    assert {one["model"] for one in table["tables"]} == set(NAMES)
    suites = {"safebench", "ch3ef", "mmbench", "docvqa", "mossbench"}
    assert set(table["suites"].values()) == suites
    rows = [row for one in table["tables"] for row in one["rows"]]
    assert all(set(row["by_suite"]) == set(table["suites"]) for row in rows)
    assert all(row["weights"] for row in rows if row["role"] == "method")
    beside = {json.dumps(row["published"]["row"]) for row in rows if row["published"]}
    assert len(beside) == len(table["published"]["rows"])
    assert table["missing"] == []
    assert len(table["correlation"]["points"]) == 6
