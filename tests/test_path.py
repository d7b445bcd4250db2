"""The path of gain on disk, in words and drawn, against values worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.errors import RegraftError
from regraft.report.page import render_html, render_markdown
from regraft.report.pooling import study_of
from regraft.report.run import Run, SharedPath
from regraft.report.tables import ending, path_grid
from regraft.report.weight_figures import (
    gradient_points,
    held_out_points,
    path_figure,
    ticks,
    tried_points,
)
from regraft.report.write import report_to_json
from regraft.restoration.methods.gain.objective import Try
from regraft.restoration.methods.gain.path import (
    LIMITS,
    REASONS,
    GainPath,
    Losses,
    Room,
    StepRecord,
    limit_of,
    path_to_json,
    read_path,
    short_of,
)
from test_compare import RUNS
from test_report import REPORT, Outline, svg_texts

ABOUT: dict[str, Any] = {  # as a ranking has it, of a method with other entries beside
    "settings": {"method": "gain"},
    "start": {"safety": 0.5, "utility": 0.25},
    "steps": [
        {
            "restored": 1250,
            "gradient": {"safety": 0.5, "utility": 0.125},
            "held_out": {"safety": 0.25, "utility": 0.125},
            "candidates": 40_000,
            "tries": [[5000, 0.875], [2500, 0.5], [1250, 0.375], [625, 0.4375]],
            "limit": "held-out",
        },
        {
            "restored": 1250,
            "gradient": {"safety": 0.125, "utility": 0.125},
            "held_out": {"safety": 0.25, "utility": 0.125},
            "candidates": 30_000,
            "tries": [[2500, 0.625]],
            "limit": "nothing",
        },
    ],
    "end": "held-out",
}
PATH = read_path(ABOUT)
assert PATH is not None
SHARED = SharedPath("wanda-50", ("gain-0.01", "gain"), PATH, {"gain-0.01": 1250, "gain": 40_000})

losses = st.builds(Losses, *[st.floats(0, 100)] * 2)
tries = st.lists(st.builds(Try, st.integers(1, 10**9), st.floats(0, 100)), max_size=4).map(tuple)
counts = st.integers(0, 10**9)
passed = st.builds(StepRecord, counts, losses, losses, counts, tries, st.sampled_from(list(LIMITS)))
paths = st.builds(
    GainPath,
    losses,
    st.lists(passed, max_size=4).map(tuple),
    st.sampled_from([None, *REASONS]),
)


@given(paths)
def test_what_is_kept_is_read_again(path: GainPath) -> None:
    assert read_path(json.loads(json.dumps(path_to_json(path)))) == path


def test_a_path_is_written_as_rankings_have_it() -> None:
    assert path_to_json(PATH) == {name: ABOUT[name] for name in ("start", "steps", "end")}
    assert (PATH.restored, PATH.taken, PATH.held_out.sum) == (1250, (1250, 0), 0.375)
    bare = GainPath(PATH.start)
    assert (bare.restored, bare.taken, bare.held_out) == (0, (), PATH.start)
    assert read_path({"settings": {"method": "random"}}) is None


@pytest.mark.parametrize(
    "change",
    [
        {"end": "boredom"},
        {"start": {"safety": 1.0}},
        {"steps": [{"restored": 3}]},
        {"steps": [ABOUT["steps"][0] | {"tries": [[1]]}]},
        {"steps": [ABOUT["steps"][0] | {"limit": "boredom"}]},
    ],
)
def test_something_else_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RegraftError, match="has no valid record of its path"):
        read_path(ABOUT | change)


@pytest.mark.parametrize(
    ("taken", "most", "candidates", "room", "limit"),
    [
        (79, 79, 10_000, Room(10_000, "weights"), "first-order"),
        (1, 1, 10_000, Room(10_000, "weights"), "first-order"),
        (158, 158, 158, Room(158, "doubling"), "doubling"),
        (158, 158, 158, Room(158, "weights"), "weights"),
        (158, 158, 158, Room(316, "doubling"), "candidates"),
        (79, 316, 316, Room(316, "doubling"), "held-out"),
        (4, 316, 316, Room(316, "doubling"), "fewest"),
        (1, 9, 316, Room(316, "doubling"), "fewest"),
        (0, 316, 316, Room(316, "doubling"), "nothing"),
        (0, 0, 0, Room(316, "doubling"), "candidates"),
    ],
)
def test_what_limits_a_step(taken, most, candidates, room, limit) -> None:
    assert limit_of(taken, most, candidates, room) == limit


@pytest.mark.parametrize(("restored", "allowed"), [(1250, 1250), (1250, 1000), (1250, None)])
def test_a_path_that_fills_its_budget_is_not_short_of_it(restored, allowed) -> None:
    assert short_of(PATH, restored, allowed) == ""


def test_a_path_that_ends_below_its_budget_says_so() -> None:
    assert short_of(PATH, 1250, 3222) == (
        "1,250 of 3,222 weights allowed by the budget: more weights hardly lower the loss on "
        "held-out prompts"
    )
    assert short_of(replace(PATH, end=None), 1250, 3222) == ""


def test_points_of_the_figure() -> None:
    assert held_out_points(PATH) == ((0, 0.75), (1250, 0.375), (1250, 0.375))
    assert gradient_points(PATH) == ((0, 0.625), (1250, 0.25))
    assert tried_points(PATH) == (
        *((5000, 0.875), (2500, 0.5), (1250, 0.375), (625, 0.4375)),
        (1250 + 2500, 0.625),
    )


def test_the_figure_has_a_panel_a_method_and_a_line_a_seed() -> None:
    one = path_figure([("a <title>", [PATH])])
    assert {"a <title>", "held out", "gradient", "weights restored"} <= set(svg_texts(one))
    two = path_figure([("a <title>", [PATH, replace(PATH, start=Losses(1.0, 1.0))])])
    lines = [text.count("stroke-dasharray") for text in (one, two)]
    assert lines[1] == lines[0] + 1, "the dashed line of the second path"
    assert {"0", "1,000", "2,000", "5,000"} <= set(svg_texts(one))
    assert "b" in svg_texts(path_figure([("a", [PATH]), ("b", [PATH])]))
    assert path_figure([]) == path_figure([("a", [])]) == ""
    assert path_figure([("nothing helps", [GainPath(Losses(0.0, 0.0))])])


def test_ticks_are_round_and_few() -> None:
    assert ticks(625, 5000) == [0, 1000, 2000, 5000]
    assert ticks(3, 40_000) == [0, 10, 100, 1000, 10_000]
    assert ticks(1, 1) == [0, 1]
    assert ticks(7, 9) == [0]


def test_a_row_a_step_and_why_it_ended() -> None:
    fewer, none = LIMITS["held-out"], LIMITS["nothing"]
    assert [tuple(cell.text for cell in row) for row in path_grid("a", SHARED).rows] == [
        ("pruned", "–", "–", "–", "0", "–", "0.750"),
        ("1", "5,000, 2,500, 1,250, 625", "1,250", fewer, "1,250", "0.625", "0.375"),
        ("2", "2,500", "0", none, "1,250", "0.250", "0.375"),
    ]
    assert ending(SHARED) == (
        "The path ended after 2 steps with 1,250 weights restored: more weights hardly lower the "
        "loss on held-out prompts. gain restored 1,250 of the 40,000 weights that its budget "
        "allows."
    )
    first = replace(PATH, steps=(replace(PATH.steps[0], restored=1),), end="candidates")
    assert ending(replace(SHARED, path=first, allowed={})) == (
        "The path ended after 1 step with 1 weight restored: no other weight is predicted to help."
    )
    unended = replace(SHARED, path=replace(first, end=None))
    assert ending(unended).startswith("The path has not ended")


def shown(*paths: SharedPath) -> Run:
    return replace(REPORT, paths=paths)


def test_the_report_shows_a_shared_path_once() -> None:
    study = study_of([shown(SHARED)])
    page, text = render_html(study), render_markdown(study)
    outline = Outline(page)
    rows = [row for row in outline.rows if row[-1] in ("0.750", "0.375")]
    assert [row[0] for row in rows] == ["pruned", "1", "2"]
    assert [a["aria-label"] for tag, a in outline.tags if tag == "svg"].count("Paths of gain") == 1
    assert page.count("The path ended after 2 steps") == text.count("The path ended after") == 1
    assert "**wanda-50: gain-0.01, gain**. The path ended" in text
    row = f"| 1 | 5,000, 2,500, 1,250, 625 | 1,250 | {LIMITS['held-out']} | 1,250 | 0.625 | 0.375 |"
    assert row in text.splitlines()
    (kept,) = report_to_json(study)["runs"][0]["paths"]
    assert kept["methods"] == ["gain-0.01", "gain"] and read_path(kept) == PATH
    assert kept["allowed"] == SHARED.allowed
    for rendered in (render_html(study_of([REPORT])), render_markdown(study_of([REPORT]))):
        assert "Paths of gain" not in rendered


def test_a_comparison_has_a_line_a_seed() -> None:
    later = SharedPath(SHARED.pruning, SHARED.methods, replace(PATH, start=Losses(1.0, 1.0)))
    runs = [
        replace(run, paths=(one,)) for run, one in zip(RUNS, (SHARED, later, SHARED), strict=True)
    ]
    study = study_of(runs)
    assert study.paths == {"wanda-50: gain-0.01, gain": [SHARED, later, SHARED]}
    page = render_html(study)
    assert 'aria-label="Paths of gain"' in page and "two lines per seed" in page
