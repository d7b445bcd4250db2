"""Settings: YAML to settings and back, defaults, relative paths, errors by field."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

import regraft
from methods import a_variant, method
from regraft.data.sources import DataSource
from regraft.errors import RegraftError
from regraft.heads.ships import HeadSettings
from regraft.pruning.base import all_settings, prune_settings
from regraft.pruning.masks import Pattern
from regraft.pruning.pruners.wanda import WandaSettings
from regraft.recipes import file as recipe_file
from regraft.recipes.file import explained_recipe, read_recipe, write_recipe
from regraft.recipes.parts import (
    ModelSettings,
    VariantSettings,
    parse_pruning,
    parse_variant,
)
from regraft.recipes.recipe import Recipe
from regraft.restoration.base import METHODS, own_settings
from regraft.runs.pipeline import unused_in
from regraft.settings.base import Settings, explain
from regraft.settings.defending import DEFENCES
from regraft.settings.searching import SearchSettings

FULL = Recipe(
    title='A "title": with #signs, ü',
    model="/models/x",
    pruned="/models/y",
    prune=prune_settings(n_m="2:4"),
    heads=HeadSettings(eps=1e-7, target="v"),
    realign=(
        a_variant(name="a", q=0.25, p=0.0),
        a_variant(name="b", method="hsr-a", heads="random", checkpoint=False),
    ),
)


MATRIX = Recipe(
    prune=(
        parse_pruning({"sparsity": 0.3}),
        parse_pruning({"sparsity": 0.625}),
        parse_pruning({"n_m": "2:4"}),
        parse_pruning({"method": "sparsegpt"}),
        parse_pruning({"order": "one-shot", "name": "mine"}),
    ),
    realign=(),
)


@pytest.mark.parametrize("recipe", [Recipe(), FULL, MATRIX], ids=["default", "full", "matrix"])
def test_yaml_and_back(tmp_path: Path, recipe: Recipe) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(write_recipe(recipe), encoding="utf-8")
    assert read_recipe(path) == recipe
    assert write_recipe(read_recipe(path)) == write_recipe(recipe)


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("recipes/*.yaml")), ids=str)
def test_example_recipes(path: Path) -> None:
    read_recipe(path)


def test_bundled_recipe() -> None:
    recipe = read_recipe(Path(regraft.__file__).parent / "demo" / "demo.yaml")
    assert recipe.model == "demo"
    assert recipe.evaluate.suite == tuple(
        DataSource(name="demo", split=split) for split in ("test", "borderline")
    )
    names = [variant.name for variant in recipe.realign]
    assert names == ["gain", "hsr", "hsr-random-heads"], "the report leads with the first"


def test_recipe_of_the_model_card() -> None:
    recipe = read_recipe(Path(__file__).parents[1] / "recipes" / "reader-card.yaml")
    assert [one.name for one in recipe.prune] == [
        *(f"wanda-{percent}" for percent in (30, 40, 50, 60, 70)),
        *("wanda-2-4", "sparsegpt-50", "sparsegpt-60", "snip-50"),
    ]
    safebench, harmless = recipe.evaluate.suite
    assert (safebench.name, safebench.split) == ("safebench", "even")
    assert str(harmless) == "demo:test#harmless"


def _read(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path)


def test_recipe_of_nothing_is_all_defaults_and_an_empty_file_none(tmp_path: Path) -> None:
    assert _read(tmp_path, "{}") == _read(tmp_path, "# model: demo") == Recipe()
    with pytest.raises(RegraftError, match=r"yaml is empty; expected settings, each a name"):
        _read(tmp_path, " \n")
    with pytest.raises(RegraftError, match="expected settings, each a name and a value"):
        _read(tmp_path, "[]")


@pytest.mark.parametrize("text", ["2:4", "'2:4'", '"2:4"', "4:8", "10:20"])
def test_n_m_needs_no_quotes(tmp_path: Path, text: str) -> None:
    """YAML 1.1 reads 2:4 as the number 124 in base 60."""
    n, m = map(int, text.strip("\"'").split(":"))
    (pruning,) = _read(tmp_path, f"prune: {{n_m: {text}}}").prune
    pattern = pruning.pattern()
    assert pattern.n_m == (n, m)
    assert pattern == Pattern.parse_n_m(f"{n}:{m}")


@pytest.mark.parametrize("text", ["{sparsity: 0.6}", "[{sparsity: 0.6}]"])
def test_one_pruning_is_called_pruned(tmp_path: Path, text: str) -> None:
    recipe = _read(tmp_path, f"prune: {text}")
    assert recipe.prune == (parse_pruning({"sparsity": 0.6, "name": "pruned"}),)
    assert recipe == _read(tmp_path, "prune: {sparsity: 0.6, name: pruned}")
    assert recipe == Recipe.model_validate({"prune": prune_settings(sparsity=0.6)})
    assert yaml.safe_load(write_recipe(recipe))["prune"][0]["sparsity"] == 0.6


def test_several_prunings_are_called_by_method_and_sparsity() -> None:
    names = [one.name for one in MATRIX.prune]
    assert names == ["wanda-30", "wanda-62.5", "wanda-2-4", "sparsegpt-50", "mine"]
    assert [one["name"] for one in yaml.safe_load(write_recipe(MATRIX))["prune"]] == names


def test_pruning_gives_its_criterion_alone() -> None:
    one = parse_pruning({"name": "x", "sparsity": 0.3})
    assert one.only() == prune_settings(sparsity=0.3)
    assert type(one.only()) is WandaSettings


def test_numbers(tmp_path: Path) -> None:
    recipe = _read(tmp_path, "heads: {eps: 1e-4, r_max: 7}\ncalibration: {samples: 1_000}")
    assert recipe.heads.eps == 1e-4
    assert recipe.heads.r_max == 7
    assert recipe.calibration.samples == 1000


def test_paths_are_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "recipes"
    (here / "models" / "x").mkdir(parents=True)
    (here / "recipe.yaml").write_text(
        "model: models/x\npruned: ../pruned\ncalibration: {data: 'vlguard:v/train.json'}\n"
        "evaluate: {suite: 'safebench:s#even'}\n"
        "realign: [{method: gain}, {name: a, method: fine-tune, positions: there},\n"
        "  {name: b, method: fine-tune, positions: gain}]\n"
    )
    (here / "there").touch()
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(Path("recipes/recipe.yaml"))
    assert recipe.model == str(here / "models" / "x")
    assert recipe.pruned == str(here / ".." / "pruned")
    assert recipe.calibration.data.path == here / "v" / "train.json"
    assert [one.positions for one in recipe.realign[1:]] == [str(here / "there"), "gain"]
    assert recipe.evaluate.suite == (DataSource(name="safebench", path=here / "s", split="even"),)


def test_parts_behind_the_name_of_a_suite(tmp_path: Path) -> None:
    text = "evaluate: {suite: ['vlguard#safe-safe:v', 'xstest:x#harmless', [xstest#harmful, x]]}"
    suites = _read(tmp_path, text).evaluate.suite
    assert [(one.name, one.path, one.split, one.kind) for one in suites] == [
        ("vlguard", tmp_path / "v", "safe-safe", None),
        ("xstest", tmp_path / "x", None, "harmless"),
        ("xstest", tmp_path / "x", None, "harmful"),
    ]


@pytest.mark.parametrize(
    "bundled",
    ["model: demo", "model: x/y\ncalibration: {data: 'demo:calibration'}"],
    ids=["model", "data"],
)
def test_bundled_validation_prompts_are_for_bundled_models_and_data(
    tmp_path: Path, bundled: str
) -> None:
    """They are written out, as they were before there was a choice, so that keys stay the same."""
    text = (
        "realign: [{name: r, method: random, count: 4, search: {points: 1}}]\n"
        "defend: [{name: d, method: refusal-direction}]\n"
    )
    written = _read(tmp_path, f"{bundled}\n{text}").model_dump(mode="json")
    assert written["realign"][0]["search"]["validation"] == "demo:validation"
    assert written["defend"][0]["validation"] == "demo:validation"


def test_what_chooses_nothing_needs_no_validation_prompts(tmp_path: Path) -> None:
    text = """
    model: x/y
    calibration: {data: a.jsonl}
    defend:
    - {name: shield}
    - {name: given, method: refusal-direction, layer: 1, strength: 1}
    - {name: own, method: refusal-direction, validation: v.jsonl}
    """
    defend = _read(tmp_path, text).model_dump(mode="json")["defend"]
    own = f"jsonl:{tmp_path / 'v.jsonl'}"
    assert "validation" not in defend[0]
    assert [one["validation"] for one in defend[1:]] == [None, own]


def test_what_is_done_to_which_pruning(tmp_path: Path) -> None:
    text = """
    prune: [{name: a}, {name: b}, {name: c, realign: false}]
    realign: [{name: all}, {name: one, prunings: [b]}]
    defend: [{name: everywhere}, {name: here, prunings: [a]}]
    """
    recipe = _read(tmp_path, text)
    done = {
        pruning.name: [
            one.name for one in (*recipe.variants_of(pruning), *recipe.defences_of(pruning))
        ]
        for pruning in recipe.prune
    }
    assert done == {"a": ["all", "everywhere", "here"], "b": ["all", "one", "everywhere"], "c": []}


@pytest.mark.parametrize(
    ("given", "budget"),
    [
        ({"method": "gain"}, 5.0),
        ({"method": "random", "budget": None}, 5.0),
        ({"method": "gain", "search": {"target_rsr": 90}}, 5.0),
        ({"method": "gain", "count": 9}, None),
        ({"method": "set-difference", "budget": 2}, 2.0),
        ({"method": "hsr"}, None),
        ({"method": "fine-tune"}, 5.0),
        ({"method": "fine-tune", "positions": "ranking"}, None),
        ({}, 5.0),
    ],
)
def test_a_method_with_a_budget_has_one(given: dict[str, Any], budget: float | None) -> None:
    found: Any = parse_variant(given)
    assert found.budget == budget
    assert method(**own_settings(found).model_dump()).budget == budget


def test_home_and_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = _read(tmp_path, "model: ~/m\npruned: ~/p\nevaluate: {suite: 'safebench:~/s'}")
    assert recipe.model == "/home/someone/m"
    assert recipe.pruned == "/home/someone/p"
    assert recipe.evaluate.suite[0].path == Path("/home/someone/s")
    assert _read(tmp_path, "model: Qwen/Qwen2.5-VL-7B-Instruct").model.startswith("Qwen/")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("sparsity: 0.5", ["sparsity: unknown setting"]),
        ("modle: demo", ["modle: unknown setting; did you mean model?"]),
        ("prune: {sparcity: 0.5}", ["prune.sparcity: unknown setting", "did you mean sparsity?"]),
        ("realign:", ["realign: no value is given; leave the setting out, or write [] for none"]),
        ("evaluate: {suite: }", ["evaluate.suite: no value is given"]),
        ("realign: {method: hsr, q: 50}", ["50 % is 0.5"]),
        ("realign: {method: gain, search: {over_refusal: .nan}}", ["over_refusal", "finite"]),
        ("realign: {method: gain, search: {over_refusal: -500}}", ["over_refusal", "-100"]),
        ("realign: {method: gain, search: {target_rsr: 0.9}}", ["target_rsr", "equal to 1 "]),
        (
            "realign: {method: set-difference, score: magnitude}",
            ["realign.score: unknown setting of method set-difference"],
        ),
        ("realign: {method: hsrr}", ["realign.method: There is no", "method 'hsrr'; expected"]),
        (
            "realign: {budget: 1, q: 1}",
            ["realign.q: unknown setting of method gain (no `method` is named)"],
        ),
        ("realign: {method: 3}", ["realign.method: There is no restoration method '3'; expected"]),
        (
            "prune: [{name: a, realign: false}, {name: b, sparsity: 0.6}]\n"
            "realign: {method: gain, prunings: [a]}",
            ["'gain' is for 'a' alone, which is only evaluated"],
        ),
        ("prune: {method: snip, damp: 1}", ["prune.damp: unknown setting of method snip"]),
        (
            "prune: [{method: wander}]",
            ["prune.0.method: There is no pruner 'wander'; expected magnitude"],
        ),
        ("prune: 3", ["prune: expected settings, each a name and a value"]),
        ("prune: {sparsity: 1}", ["prune.sparsity", "less than 1", "got 1"]),
        ("prune: [{sparsity: 0.5}, {sparsity: 1}]", ["prune.1.sparsity", "less than 1"]),
        ("prune: []", ["prune: the list is empty"]),
        ("prune: [{}, {}]", ["prune: 2 prunings are called 'wanda-50'", "`name` of its own"]),
        ("prune: {name: dense}", ["prune.name", "not be 'dense'"]),
        ("prune: [{name: a/b}, {}]", ["prune.0.name", "'a/b'"]),
        ("prune: {name: gain}", ["`prune` and one of `realign` are both called 'gain'"]),
        ("prune: [{name: a}, {name: gain}]", ["`prune` and one of `realign`", "called 'gain'"]),
        ("pruned: x\nprune: [{n_m: 2:4}, {}]", ["`pruned` names", "`prune` has 2 prunings"]),
        ("prune: {sparsity: abc, scope: head}", ["prune.sparsity", "prune.scope", "'head'"]),
        ("realign: [{name: a}, {name: a}]", ["names of `realign` must differ", "'a'"]),
        ("realign: [{name: dense}]", ["realign.0.name", "'dense'"]),
        ("realign: [{prunings: [b]}]", ["'gain' is for the pruning 'b'", "prunings are pruned"]),
        ("defend: [{prunings: [b]}]", ["'adashield' is for the pruning 'b'"]),
        ("against: [gain]", ["`against` is for the comparison over `seeds`"]),
        ("seeds: [0]\nagainst: [snip]", ["`against` names 'snip'; expected some of gain"]),
        ("realign: [{method: hsr, q: 0}]", ["realign.0.q", "greater than 0"]),
        ("evaluate: {suite: safebench}", ["evaluate.suite", "safebench needs a path"]),
        ("evaluate: {keywords: sorry}", ["evaluate.keywords", "'sorry'"]),
        ("calibration: {samples: 0}", ["calibration.samples", "got 0"]),
        ("calibration: {samples: true}", ["calibration.samples: expected a number (got True)"]),
        ("realign: [{method: random, count: true}]", ["count: expected a number (got True)"]),
        ("prune: {sparsity: false}", ["prune.sparsity: expected a number (got False)"]),
        ("prune: {sparsity: 60}", ["prune.sparsity", "less than 1; 60 % is 0.6"]),
        (
            "realign: {method: hsr, top-heads: 3}",
            ["realign.top-heads: unknown setting of", "did you mean top_heads?"],
        ),
        ("seeds: 3", ["seeds: expected a list"]),
        ("realign: 3", ["realign: expected settings"]),
        ("model: a\nmodel: b", ["'model' appears twice", "line 2"]),
        ("realign: [{method: gain}, {method: gain}]", ["must differ", "['gain', 'gain']"]),
    ],
)
def test_errors_name_the_field(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(RegraftError) as caught:
        _read(tmp_path, text)
    for part in ("recipe.yaml", *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "hsr-a", "search": {}}, "'hsr-a' has no number of weights to search"),
        ({"method": "hsr", "search": {}}, "give it a `budget` too"),
        ({"method": "hsr", "budget": 3, "q": 0.1}, "takes the place of `q`"),
        ({"method": "hsr", "heads": "all", "criterion": "kl"}, "`criterion` has no effect when"),
        ({"method": "hsr", "passes": 4}, r"passes\s+unknown setting of method hsr"),
        ({"method": "hsr-a", "score": "snip"}, r"score\s+unknown setting of method hsr-a"),
        ({"method": "gain", "q": 0.1}, r"q\s+unknown setting of method gain"),
        ({"method": "gain", "top_heads": 3}, r"top_heads\s+unknown setting of method gain"),
        ({"method": "random", "top_heads": 3}, r"top_heads\s+unknown setting of method random"),
        (
            {"method": "set-difference", "draw_seed": 4},
            r"draw_seed\s+unknown setting of method set",
        ),
    ],
)
def test_variants_that_ask_for_what_does_nothing(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_variant(fields)


def test_flags_are_named_as_flags() -> None:
    with pytest.raises(ValidationError) as caught:
        HeadSettings(r_max=0)
    assert explain(caught.value, flags=True).strip().startswith("--r-max: ")
    assert explain(caught.value).strip().startswith("r_max: ")


def test_variant_gives_its_selection_alone() -> None:
    one = a_variant(name="x", checkpoint=False, q=0.3)
    assert own_settings(one) == method(q=0.3)
    assert type(own_settings(one)) is METHODS.get("hsr").settings_type


@pytest.mark.parametrize("field", ["sparsity", "scope", "n_m", "order"])
def test_settings_are_frozen(field: str) -> None:
    value: Any = "x"
    with pytest.raises(ValidationError, match="frozen"):
        setattr(prune_settings(), field, value)


def test_written_recipe_is_plain_yaml() -> None:
    assert yaml.safe_load(write_recipe(FULL))["prune"][0]["n_m"] == "2:4"


def test_an_explained_recipe_is_the_default_one(tmp_path: Path) -> None:
    text = explained_recipe()
    assert _read(tmp_path, text) == _read(tmp_path, "{}")
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize(
    "settings",
    [SearchSettings(), *(one() for one in DEFENCES.values()), ModelSettings(model="ORG/NAME")],
)
def test_blocks_that_are_there_as_comments_are_valid(settings: Settings) -> None:
    lines = list(recipe_file._block(settings, ""))
    assert type(settings).model_validate(yaml.safe_load("\n".join(lines))) == settings
    text = explained_recipe()
    assert all(f" {line}\n" in text for line in lines if not line.startswith("#"))


def test_every_setting_is_explained() -> None:
    text = explained_recipe()
    blocks = (
        *(type(parse_pruning({"method": name})) for name in all_settings()),
        *(METHODS.get(name).settings_type for name in METHODS.names()),
        VariantSettings,
        *DEFENCES.values(),
        HeadSettings,
        ModelSettings,
    )
    for settings in (Recipe, *blocks):
        for name in settings.model_fields:
            assert re.search(rf"# .*\n(# )?[ #-]*{name}:", text), name


def test_methods_name_what_has_no_name(tmp_path: Path) -> None:
    realign = "realign: [{}, {method: hsr}, {name: gain-2}]"
    recipe = _read(tmp_path, f"{realign}\ndefend: {{method: adashield}}")
    assert [one.name for one in recipe.realign] == ["gain", "hsr", "gain-2"]
    assert [one.name for one in recipe.defend] == ["adashield"]
    assert _read(tmp_path, "realign: {method: random}").realign[0].name == "random"


def test_a_folder_here_is_not_one_beside_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the form of a hub id it was taken from wherever the command ran."""
    (tmp_path / "here" / "runs" / "pruned").mkdir(parents=True)
    (tmp_path / "there" / "runs" / "own").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(RegraftError, match=r"there is no .*there/runs/pruned\. Write .*here/runs"):
        _read(tmp_path / "there", "pruned: runs/pruned")
    found = _read(tmp_path / "there", "pruned: runs/own\nmodel: org/name")
    assert (found.pruned, found.model) == (str(tmp_path / "there" / "runs" / "own"), "org/name")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prune: {n_m: 2:4, scope: matrix}", "`scope` has no effect when `n_m` is 2:4"),
        ("prune: {n_m: 2:4, sparsity: 0.6}", "prune: `n_m` 2:4 takes the place of `sparsity` 0.6"),
        (
            "calibration: {max_response_tokens: 5, responses: given}",
            "calibration: `max_response_tokens` has no effect",
        ),
        ("evaluate: {keywords: [sorry], judge: gcg-1}", "take the place of the judge gcg-1"),
        ("heads: {window: 3}\nrealign: {method: hsr}", "heads: `window` has no effect when"),
        ("defend: {method: adashield, strength: 2}", "unknown setting of method adashield"),
        ("defend: {method: refusal-direction, strength: 1.0e+7}", "strength"),
        ("defend: {method: refusal-direction, strengths: [1, 1.0e+7]}", "strengths must be in"),
        ("defend: {strength: 2}", "unknown setting of method adashield"),
        ("defend: {method: refusal-direction, prompt: x}", "unknown setting of method refusal-"),
        (
            "defend: {method: refusal-direction, strength: 2, strengths: [1]}",
            "`strengths` change nothing where a `strength` is given",
        ),
        (
            "defend: {method: refusal-direction, layer: 1, strength: 2, validation_limit: 3}",
            "`validation_limit` has no effect when `layer` and `strength` are given",
        ),
        ("defend: {method: shield}", "There is no defence 'shield'; expected adashield, safety-"),
    ],
)
def test_settings_that_cannot_stand_together(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RegraftError, match=re.escape(said)):
        _read(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", None),
        ("calibration: {max_response_tokens: 5, responses: self}", None),
        ("pruned: ./x\nprune: {sparsity: 0.6}", "prune: it has no effect, since `pruned` is"),
        ("heads: {r_max: 3}\nrealign: {method: gain}", "heads: they have no effect, since"),
        ("heads: {r_max: 3}\nrealign: {method: hsr}", None),
        ("pruned: ./x", None),
        ("realign: {method: set-difference, scope: matrix}", None),
        ("realign: {method: hsr, heads: random, repeats: 2}", None),
        ("defend: {method: adashield}", None),
        ("defend: {method: refusal-direction, layer: 1, strength: 2}", None),
    ],
)
def test_settings_that_change_nothing_are_told(tmp_path: Path, text: str, said: str | None) -> None:
    """Not refused: one recipe may be run again with another model or method."""
    found = unused_in(_read(tmp_path, text))
    assert not found if said is None else len(found) == 1 and said in found[0]


@pytest.mark.parametrize("text", ["model: {{ x }}", "? [a, b]\n: c"])
def test_odd_keys_are_no_valid_yaml(tmp_path: Path, text: str) -> None:
    with pytest.raises(RegraftError, match="not valid YAML"):
        _read(tmp_path, text)
