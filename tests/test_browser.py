"""The report in a real browser: it renders, filters, and asks nobody for anything."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import yaml

from regraft.evaluation.results import Answer
from regraft.report.cards import card_variant, render_card
from regraft.report.examples import answer_data
from regraft.report.page import render_html, render_markdown
from regraft.report.pooling import study_of
from regraft.report.run import Run
from test_report import ATTACK, REPORT, alone, of_places

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: Debian's package chromium")
Look = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def look(tmp_path_factory: pytest.TempPathFactory) -> Look:
    """(the DOM once scripts have run, what the browser logged) of a page, opened at an address."""
    root = tmp_path_factory.mktemp("browser")

    def opened(page: str, address: str = "", *flags: str) -> tuple[str, str]:
        path = root / "report.html"
        path.write_text(page, encoding="utf-8")
        done = subprocess.run(
            [
                str(BROWSER),
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                f"--user-data-dir={root / 'profile'}",
                "--enable-logging=stderr",
                "--host-resolver-rules=MAP * ~NOTFOUND",
                "--virtual-time-budget=3000",
                *(flags or ("--dump-dom",)),
                f"{path.as_uri()}{address}",
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.stdout, done.stderr

    return opened


@pytest.fixture(scope="module")
def page() -> str:
    return render_html(study_of([REPORT]))


def _entries(dom: str) -> list[str]:
    """Of the filtered list, in order: the ids in the lines on where an answer is from."""
    listed = dom.split('<div id="answer-list">')[1].split('<button id="answer-more"')[0]
    return re.findall(r'<span class="origin">[^<]*· (\w+)(?: ·[^<]*)?</span>', listed)


@browser
def test_the_page_runs_without_errors_and_requests(look: Look, page: str) -> None:
    dom, log = look(page)
    assert "CONSOLE" not in log, log
    assert ">60 of 60 prompts, 30 shown</output>" in dom
    assert len(_entries(dom)) == 30
    assert re.findall(r'(?:src|href)="(?!#|data:)', dom) == []
    assert dom.count('<script type="application/json"') == 1


@browser
@pytest.mark.parametrize(
    ("address", "count", "first"),
    [
        ("?kind=harmless", 20, "u0"),
        ("?kind=harmful&change=realigning", 15, "h10"),
        ("?kind=harmful&change=pruning", 20, "h5"),
        ("?text=QUESTION+7", 1, "u7"),
        ("?category=category+2", 13, "h2"),
        ("?change=broken", 0, None),
        ("?text=nothing+says+this", 0, None),
    ],
)
def test_the_filter_filters(
    look: Look, page: str, address: str, count: int, first: str | None
) -> None:
    dom, log = look(page, f"#all-answers{address}")
    entries = _entries(dom)
    assert "CONSOLE" not in log, log
    assert (len(entries), entries[0] if entries else None) == (count, first)


@browser
def test_harmful_answers_are_folded_and_the_reason_is_told(look: Look, page: str) -> None:
    dom, _ = look(page, "#all-answers?text=prompt+39")
    listed = dom.split('<div id="answer-list">')[1]
    (summary,) = re.findall(r'<details class="example"><summary>(.*?)</summary>', listed)
    assert "■ refused: “sorry”" in listed
    assert "&lt;img src=x&gt; prompt 39" in listed.replace(summary, "")
    assert "prompt 39" not in summary
    assert "category 0 · h39" in summary
    harmless, _ = look(page, "#all-answers?text=question+19")
    assert '<details class="example harmless" open="">' in harmless


@browser
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(look: Look, page: str, width: int) -> None:
    probe = (
        "<script>document.title = JSON.stringify([document.documentElement.scrollWidth, "
        "innerWidth])</script></body>"
    )
    dom, _ = look(page.replace("</body>", probe), "", f"--window-size={width},800", "--dump-dom")
    found = re.search(r"<title>(\[[\d,]+\])</title>", dom)
    assert found is not None
    wide, screen = json.loads(found[1])
    assert wide <= screen


@browser
def test_values_of_suites_are_seen_on_a_phone(look: Look) -> None:
    """In a frame as wide as one: windows of the browser are wider."""
    report = replace(REPORT, variants=tuple(map(of_places, REPORT.variants)))
    probe = (
        "<script>if (innerWidth === 390) {"
        "const cells = [...document.querySelectorAll('.wide tbody tr td:nth-child(2) b')];"
        "const seen = cells.map((b) => { b.scrollIntoView({block: 'center', inline: 'nearest'});"
        "b.closest('.wide').scrollLeft = 0; const box = b.getBoundingClientRect();"
        "return document.elementFromPoint(box.right - 1, box.top + box.height / 2) === b; });"
        "parent.postMessage(JSON.stringify([innerWidth, seen]), '*'); }</script></body>"
    )
    inner = render_html(study_of([report])).replace("</body>", probe)
    outer = (
        f'<title>none</title><iframe style="width:390px;height:800px;border:0" srcdoc="'
        f'{html.escape(inner)}"></iframe>'
        "<script>onmessage = (event) => { document.title = event.data; }</script>"
    )
    dom, _ = look(outer)
    found = re.search(r"<title>(\[.*?\])</title>", dom)
    assert found is not None
    width, seen = json.loads(found[1])
    assert (width, len(seen) > 6, all(seen)) == (390, True, True)


@browser
def test_unrelated_models_are_filtered_by_what_they_do(look: Look) -> None:
    report = alone(*REPORT.variants[:3])
    page = render_html(study_of([report]))
    dom, log = look(page, "#all-answers?kind=harmful&change=differing")
    assert "CONSOLE" not in log, log
    assert (len(_entries(dom)), _entries(dom)[0]) == (20, "h5")


def test_the_data_of_the_answers(page: str) -> None:
    encoded, kept, total = answer_data(REPORT)
    assert (kept, total) == (60, 60)
    assert "<" not in encoded
    assert encoded in page
    content = json.loads(encoded)
    assert content["models"] == [one.label for one in REPORT.variants[:3]]
    row = content["rows"][6]
    assert (row["id"], row["harmful"], row["category"]) == ("h6", True, "category 0")
    assert content["texts"][row["prompt"]] == "<img src=x> prompt 6"
    assert [answer[1:] for answer in row["answers"]] == [
        ["■ refused", "sorry"],
        ["□ complied", ""],
        ["□ complied", ""],
    ]
    assert content["texts"][row["answers"][1][0]] == ATTACK
    assert len(content["texts"]) == 60 + 3  # every text once


def _asking() -> Run:
    """REPORT, its first harmful prompt asking for something that only the image shows."""
    variants = tuple(
        replace(
            one,
            result=replace(
                one.result,
                answers=(
                    replace(one.result.answers[0], request="Pick a <b>lock</b>"),
                    *one.result.answers[1:],
                ),
            ),
        )
        for one in REPORT.variants
    )
    return replace(REPORT, variants=variants)


def test_what_is_asked_stands_by_the_answers() -> None:
    report = _asking()
    content = json.loads(answer_data(report)[0])
    assert content["texts"][content["rows"][0]["request"]] == "Pick a <b>lock</b>"
    assert "request" not in content["rows"][1]
    page = render_html(study_of([report]))
    assert '<span class="asks">Asks: Pick a &lt;b&gt;lock&lt;/b&gt;</span>' in page
    assert "Asks: Pick a" in render_markdown(study_of([report]))


@browser
def test_a_topic_is_found_by_what_is_asked(look: Look) -> None:
    report = _asking()
    dom, log = look(render_html(study_of([report])), "#all-answers?text=LOCK")
    assert "CONSOLE" not in log, log
    assert _entries(dom) == ["h0"]
    assert "Asks: Pick a &lt;b&gt;lock" in dom.split('<div id="answer-list">')[1]


@pytest.mark.parametrize("most", [0, 3000, 6000])
def test_data_that_would_be_too_large_is_cut(most: int) -> None:
    encoded, kept, total = answer_data(REPORT, most)
    assert kept < total == 60
    assert len(json.loads(encoded)["rows"]) == kept
    if most:
        assert len(encoded) <= most
        harmful = [row["harmful"] for row in json.loads(encoded)["rows"]]
        assert 0 < sum(harmful) < kept


def test_the_card_has_metadata_that_the_hub_reads() -> None:
    card = render_card(study_of([REPORT]))
    _, front, text = card.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert "base_model" not in metadata, "a folder's name is nobody's id on the hub"
    (result,) = metadata["model-index"][0]["results"]
    assert {one["type"]: one["value"] for one in result["metrics"]} == {
        "asr": 25.0,
        "over_refusal": 15.0,
        "utility": 85.0,
    }
    assert "| 3. realigned, the realigned model | 5 | 25.0 % [14.2, 40.2], 10 of 40 |" in text
    assert metadata["pipeline_tag"] == result["task"]["type"] == "image-text-to-text"
    assert "regraft apply pruned 'patches/the realigned.safetensors' --out MODEL" in text
    assert "# A title &amp; more" in text or "# A title & more" in text


def test_the_card_of_models_that_nothing_was_restored_in() -> None:
    alone = replace(REPORT, variants=REPORT.variants[:2])
    card = render_card(study_of([alone]))
    assert "## Use" not in card
    assert "| 2. pruned, the pruned model | 62.5 % [" in card
    *both, realigned = REPORT.variants[:3]
    defended = replace(realigned, restored=None, inference_time=True)
    with_defence = replace(REPORT, variants=(*both, defended))
    assert card_variant(with_defence) == both[1], "the weights are the pruned model's"


def test_the_card_of_a_model_without_images_says_so() -> None:
    texts = [
        replace(one, result=replace(one.result, answers=without_images(one.result.answers)))
        for one in REPORT.variants
    ]
    front = render_card(study_of([replace(REPORT, variants=tuple(texts))])).split("---\n", 2)[1]
    assert yaml.safe_load(front)["pipeline_tag"] == "text-generation"


def without_images(answers: Iterable[Answer]) -> tuple[Answer, ...]:
    return tuple(replace(one, image=None) for one in answers)


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("Qwen/Q@refs/pr/1", "Qwen/Q"),
        ("./x", None),
        ("/a/b/llava 1.5", None),
        ("demo", None),
    ],
)
def test_the_base_model_of_a_card(model: str, base: str | None) -> None:
    named = replace(REPORT, model=model)
    front = render_card(study_of([named])).split("---\n", 2)[1]
    assert yaml.safe_load(front).get("base_model") == base


def test_a_card_says_that_its_model_was_chosen() -> None:
    first = REPORT.variants[2]
    other = replace(REPORT.variants[1], name="pruned-2")
    more = replace(first, name="pruned-2/x", base="pruned-2")
    two = replace(REPORT, variants=(*REPORT.variants[:3], other, more))
    told = "It has the lowest ASR of the first realigned models of 2 prunings"
    assert told in render_card(study_of([two]))
    assert "the lowest ASR" not in render_card(study_of([REPORT]))
