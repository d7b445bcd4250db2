"""lmms-eval's tasks on our model in memory; with lmms-eval itself where it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import pico
from regraft.cli import main
from regraft.data.collate import prompt_batch
from regraft.data.example import Example
from regraft.errors import RegraftError
from regraft.evaluation.greedy import answer
from regraft.evaluation.harness import Request, _request, answers_to, cut, harness_model

installed = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="needs lmms-eval")


def test_answers_are_those_of_single_prompts(tmp_path: Path) -> None:
    model, processor = pico.build("llava")
    requests, wanted = [], []
    for i, (text, tokens) in enumerate([("What is it now?", 4), ("Why?", 4), ("And this?", 6)]):
        image = pico.image(i)
        image.save(tmp_path / f"{i}.png")
        requests.append(Request(text, (image,), tokens))
        example = Example("x", text, False, "", tmp_path / f"{i}.png")
        inputs = prompt_batch(processor, [example]).inputs
        wanted.append(answer(model, processor, inputs, tokens)[0])
    requests.append(Request("No image here.", (), 4))
    inputs = prompt_batch(processor, [Example("x", "No image here.", False, "")]).inputs
    wanted.append(answer(model, processor, inputs, 4)[0])
    assert answers_to(model, processor, requests, 2) == wanted
    assert len(set(wanted)) > 1


@pytest.mark.parametrize(
    ("until", "text"), [((), "a b. c"), (("c",), "a b."), (("c", " b"), "a"), (("x", ""), "a b. c")]
)
def test_answers_are_cut(until: tuple[str, ...], text: str) -> None:
    assert cut("a b. c", until) == text


class _Harness:
    """What lmms-eval hands over beside a request."""

    task_dict = {"task": {"test": ["doc"]}}  # noqa: RUF012


def _asked(settings: dict[str, Any], *visuals: object) -> Request:
    return _request(_Harness(), ("Why?", settings, lambda _: list(visuals), 0, "task", "test"))


def test_a_stop_that_no_task_asked_for_is_left_out() -> None:
    """lmms-eval fills it in, which would cut reasoning off before its answer."""
    assert _asked({"until": ["\n\n"]}).until == ()
    assert _asked({"until": ["\n\n", "ASSISTANT:"]}).until == ("ASSISTANT:",)
    assert len(_asked({}, pico.image(0)).images) == 1


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(RegraftError, match=r"task shows a str, '/x\.mp4', instead of an image"):
        _asked({}, "/x.mp4")


def test_several_images_are_refused() -> None:
    request = Request("Compare.", (pico.image(0), pico.image(1)), 4)
    with pytest.raises(RegraftError, match=r"2 images, 'Compare\.'"):
        answers_to(torch.nn.Linear(1, 1), None, [request], 1)


@pytest.mark.skipif(find_spec("lmms_eval") is not None, reason="lmms-eval is installed")
def test_without_lmms_eval() -> None:
    with pytest.raises(RegraftError, match=r"pip install 'regraft\[harness\]'"):
        harness_model(torch.nn.Linear(1, 1), None, 1)


TASK = """
task: local_anls
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_visual: !function task_utils.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "answers"
generation_kwargs:
  max_new_tokens: 6
metric_list:
  - metric: anls
    aggregation: mean
    higher_is_better: true
"""
VISUAL = """
from PIL import Image


def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""


@installed
def test_a_task_of_ones_own_through_lmms_eval(
    pico_dir: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its ANLS is 1 where the references are what the model answers."""
    model, processor = pico.build("llava")
    rows = []
    for i in range(5):
        path = tmp_path / f"{i}.png"
        pico.image(i).save(path)
        text = f"What is {'really ' * i}this?"
        example = Example("x", text, False, "", path)
        said = answer(model, processor, prompt_batch(processor, [example]).inputs, 6)[0]
        right = said if i % 2 else "certainly something else altogether"
        rows.append({"question": text, "image": str(path), "answers": [right]})
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "local_anls.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    (tasks / "task_utils.py").write_text(VISUAL)
    out = tmp_path / "out.json"
    words = ["harness", str(pico_dir("llava")), "local_anls", "--include", str(tasks)]
    words += ["--out", str(out), "--device", "cpu", "--batch-size", "2"]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0
    results = json.loads(out.read_text())["results"]["local_anls"]
    assert results["anls,none"] == pytest.approx(2 / 5)
    with pytest.raises(SystemExit) as stopped:
        main([*words[:2], "no_such_task", *words[3:5], "--out", str(tmp_path / "x.json")])
    assert stopped.value.code == 2
    assert "knows no task 'no_such_task'" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
