"""A model behind an OpenAI-compatible server as what is evaluated: what it is asked, what becomes
of its replies, and that nobody is told the key.
"""

from __future__ import annotations

import base64
import html
import io
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import pico_today
import regraft
from chat_servers import (
    Response,
    Scripted,
    asked,
    echo,
    free_port,
    said,
    scripted,
    transformers_serve,
)
from commands import exit_code
from disk import tree, write_data, write_jsonl
from pico import image, write_examples
from regraft import stages
from regraft.data.images import open_image
from regraft.data.readers.demo import demo_model
from regraft.data.sources import DataSource, join_suites
from regraft.defence import DEFENCE_PROMPT, Direction, ShieldPrompt, save_defence
from regraft.distributed import resumable_map
from regraft.errors import PassingError, RegraftError
from regraft.evaluation.chat_server import ChatServer, Reply
from regraft.evaluation.served import as_they_come, portable
from regraft.evaluation.server_key import KEY_VARIABLE, without_key
from regraft.models.load import open_source
from regraft.progress import Progress
from regraft.report.pooling import study_of
from regraft.runs import comparing
from regraft.settings.compute import ComputeSettings
from regraft.settings.evaluating import EndpointSettings, EvalSettings
from regraft.stages import endpoint

SETTINGS = EvalSettings(max_new_tokens=16)
KEY = 'sk-9"\\x<é>'.encode("ascii", "ignore").decode() + "-abcdefgh"  # which JSON must escape


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture
def suite(tmp_path: Path) -> DataSource:
    """Four harmful and four harmless prompts with images."""
    return DataSource(name="jsonl", path=write_data(tmp_path / "data", 4))


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted() as found:
        yield found


def target(server: Scripted, concurrency: int = 8, **more: Any) -> endpoint.EndpointTarget:
    return endpoint.EndpointTarget(ChatServer(server.url, "m", pause=0.01), concurrency, **more)


def evaluated(
    server: Scripted, out: Path, suite: DataSource, concurrency: int = 8, **more: Any
) -> stages.Evaluation:
    return stages.evaluate_target(target(server, concurrency, **more), out, [suite], SETTINGS)


def command(*words: object, code: int = 0) -> None:
    assert exit_code(*words) == code


class Notes:
    """Progress that records its notes."""

    def __init__(self) -> None:
        self.said: list[str] = []

    task = Progress.task
    loaded = Progress.loaded

    def note(self, text: str) -> None:
        self.said.append(text)


# What it is asked


def test_an_evaluation_needs_no_model(
    server: Scripted,
    suite: DataSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    out = tmp_path / "out"
    for name in ("open_checkpoint", "read_config", "load_model", "load_processor"):
        monkeypatch.setattr(f"regraft.models.load.{name}", partial(pytest.fail, name))
    words = ("eval", server.name(), "--suite", suite.path, "--out", out, "--max-new-tokens", 16)
    command(*words)
    assert "8 used of 8 read" in capsys.readouterr().out
    found = stages.read_evaluation(out)
    examples = join_suites([suite], None).examples
    answers = {one.id: one.answer for one in found.result.answers}
    assert answers == {one.id: f"You asked: {one.instruction}" for one in examples}
    assert [one.id for one in found.result.answers] == [one.id for one in examples]
    assert {one["Authorization"] for one in server.headers} == {f"Bearer {KEY}"}
    shown = set()
    for body in server.bodies:
        assert {key: body[key] for key in body.keys() - {"messages"}} == {
            "model": "m",
            "temperature": 0,
            "max_tokens": 16,
        }
        (message,) = body["messages"]
        picture, text = message["content"]
        kind, _, content = picture["image_url"]["url"].partition(";base64,")
        assert (message["role"], kind) == ("user", "data:image/png")
        shown.add((text["text"], base64.b64decode(content)))
    assert shown == {(one.instruction, one.image.read_bytes()) for one in examples if one.image}
    assert len(server.bodies) == 8
    about = found.about
    assert about["inputs"] == {"model": server.name()}
    assert about["settings"] == EvalSettings(max_new_tokens=16).model_dump(mode="json")
    assert about["settings"]["full_answers"] is True
    assert about["replies"] == {}
    assert not about.keys() & {"compute", "zeros", "prunable"}
    command(*words, "--concurrency", 3)
    assert len(server.bodies) == 8, "a finished evaluation was made again"


def test_prompts_without_images_are_text_alone(server: Scripted, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", write_examples(tmp_path, 2, images=False))
    evaluated(server, tmp_path / "out", DataSource(name="jsonl", path=data))
    assert all(isinstance(body["messages"][0]["content"], str) for body in server.bodies)


def test_a_system_prompt_is_a_message_of_its_own(server: Scripted, tmp_path: Path) -> None:
    first, second = write_examples(tmp_path, 2, images=False)
    data = write_jsonl(tmp_path / "d.jsonl", [replace(first, system="Be kind."), second])
    found = evaluated(server, tmp_path / "out", DataSource(name="jsonl", path=data))
    assert [one.system for one in found.result.answers] == ["Be kind.", ""]
    sent = {asked(body): [one["role"] for one in body["messages"]] for body in server.bodies}
    assert sent == {first.instruction: ["system", "user"], second.instruction: ["user"]}
    assert {"role": "system", "content": "Be kind."} in [
        one["messages"][0] for one in server.bodies
    ]


def test_a_defence_prompt_stands_around_the_users(
    server: Scripted, suite: DataSource, tmp_path: Path
) -> None:
    save_defence(tmp_path / "shield", ShieldPrompt(DEFENCE_PROMPT, {}))
    found = evaluated(server, tmp_path / "out", suite, defence=tmp_path / "shield")
    examples = join_suites([suite], None).examples
    wanted = {f"{e.instruction}\n{DEFENCE_PROMPT}\n{e.instruction}" for e in examples}
    assert set(server.asked()) == wanted
    assert found.about["inputs"].keys() == {"model", "defence"}
    save_defence(tmp_path / "first", ShieldPrompt("Be careful.", {}, before=True))
    evaluated(server, tmp_path / "before", suite, defence=tmp_path / "first")
    assert all(text.startswith("Be careful.") for text in server.asked()[8:])


def test_python_names_it_as_the_command_line_does(
    server: Scripted, suite: DataSource, tmp_path: Path
) -> None:
    result = regraft.evaluate(server.name(), str(suite.path), tmp_path / "out", concurrency=2)
    assert len(result.answers) == 8 and server.most <= 2


@pytest.mark.parametrize("named", ["folder", "opened"])
def test_a_checkpoint_is_a_target_of_its_own(pico_dir: Callable[[str], Path], named: str) -> None:
    folder = pico_dir("llava")
    found = endpoint.open_target(
        folder if named == "folder" else open_source(folder), ComputeSettings(dtype="float32")
    )
    assert isinstance(found, stages.Target)
    assert (found.model.folder, found.compute.dtype) == (folder, "float32")


# Images


def _saved(path: Path, kind: str) -> Path:
    plain = image(3, (40, 24))
    if kind == "turned.jpg":
        exif = Image.Exif()
        exif[0x0112] = 6
        plain.save(path, exif=exif)
    elif kind == "sixteen.png":
        Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40) * 60).save(path)
    elif kind == "clear.png":
        plain.putalpha(Image.linear_gradient("L").resize(plain.size))
        plain.save(path)
    elif kind == "hole.png":
        plain.save(path, transparency=plain.getpixel((0, 0)))
    elif kind == "moving.png":
        plain.save(path, save_all=True, append_images=[image(4, (40, 24))])
    else:
        mode = {"grey.jpg": "L", "printed.jpg": "CMYK", "few.gif": "P", "few.png": "P"}
        plain.convert(mode.get(kind, "RGB")).save(path)
    return path


@pytest.mark.parametrize("kind", ["plain.png", "plain.jpg"])
def test_plain_images_are_sent_as_they_are(tmp_path: Path, kind: str) -> None:
    path = _saved(tmp_path / kind, kind)
    name = "image/png" if kind == "plain.png" else "image/jpeg"
    assert portable(path) == (name, path.read_bytes())
    unnamed = path.rename(tmp_path / "no-suffix")
    assert portable(unnamed)[0] == name


@pytest.mark.parametrize(
    "kind",
    [
        *("turned.jpg", "grey.jpg", "printed.jpg", "few.gif", "few.png", "clear.png", "hole.png"),
        *("sixteen.png", "moving.png", "other.webp", "other.bmp", "other.tiff"),
    ],
)
def test_others_are_sent_as_the_pixels_that_models_in_memory_get(tmp_path: Path, kind: str) -> None:
    path = _saved(tmp_path / kind, kind)
    name, content = portable(path)
    assert (name, content[:4]) == ("image/png", b"\x89PNG")
    sent = Image.open(io.BytesIO(content))
    assert (sent.mode, sent.format, getattr(sent, "n_frames", 1)) == ("RGB", "PNG", 1)
    assert np.array_equal(np.asarray(sent), np.asarray(open_image(path)))


# Several at a time


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_neither_order_nor_results_depend_on_concurrency(
    suite: DataSource, tmp_path: Path, concurrency: int
) -> None:
    together, first = threading.Barrier(concurrency), iter(range(concurrency))

    def slow(body: dict[str, Any]) -> Response:
        waits = random.Random(f"{asked(body)} {concurrency}").uniform(0, 0.1)
        return Response(said(f"You asked: {asked(body)}"), wait=waits)

    def meet() -> None:
        if next(first, None) is not None:
            together.wait(60)

    with scripted(answer=slow, before=meet) as server:
        found = evaluated(server, tmp_path / "out", suite, concurrency)
    assert server.most == concurrency
    examples = join_suites([suite], None).examples
    assert [(one.id, one.answer) for one in found.result.answers] == [
        (one.id, f"You asked: {one.instruction}") for one in examples
    ]
    assert "concurrency" not in json.dumps(found.about)


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 5), st.integers(0, 12))
def test_work_in_threads(waits: list[int], workers: int, broken: int) -> None:
    """Every result with its place; never more at a time than asked for; none begun after a stop."""
    lock, now, most, begun = threading.Lock(), 0, 0, 0

    def make(wait: int) -> int:
        nonlocal now, most, begun
        with lock:
            now, begun = now + 1, begun + 1
            most, mine = max(most, now), begun
        time.sleep(wait / 1000)
        with lock:
            now -= 1
        if mine - 1 == broken:
            raise ZeroDivisionError
        return wait

    found = {}
    try:
        found.update(as_they_come(make, waits, workers))
    except ZeroDivisionError:
        assert broken < len(waits)
        with lock:
            so_far = begun
        time.sleep(0.01)
        assert begun <= so_far + workers
    else:
        assert broken >= len(waits) and found == dict(enumerate(waits))
    assert most <= workers
    assert all(waits[place] == made for place, made in found.items())


def test_nobody_waits_for_a_server_that_hangs() -> None:
    hangs, start = threading.Event(), time.monotonic()

    def make(item: int) -> int:
        if item:
            hangs.wait(60)
        return item

    with pytest.raises(KeyboardInterrupt):
        for _ in as_they_come(make, range(8), 4):
            raise KeyboardInterrupt
    assert time.monotonic() - start < 20
    hangs.set()


@pytest.mark.parametrize("keeps", [False, True])
def test_pieces_may_end_in_any_order(tmp_path: Path, keeps: bool) -> None:
    def backwards(pieces: Sequence[str]) -> Iterator[tuple[int, str]]:
        return ((place, pieces[place].upper()) for place in reversed(range(len(pieces))))

    found = resumable_map(["a", "b", "c"], backwards, tmp_path if keeps else None, "n", str)
    assert found == ["A", "B", "C"]
    assert len(list(tmp_path.iterdir())) == 3 * keeps


# What is not there at once


def test_what_fails_is_asked_for_again(suite: DataSource, tmp_path: Path) -> None:
    failures = [
        *(Response("busy", code) for code in (408, 409, 424, 429, 500, 502, 503, 504)),
        *(said("Sure, fi", word) for word in ("abort", "error", "insufficient_system_resource")),
        *(Response(text) for text in ("", "<html>Busy</html>", '{"error": 1}', "[" * 100_000)),
        Response(b"\xff\xfe"),
        Response('{"choices": [{"message": {"content": 5}}]}'),
        Response('{"choices": [{"message": {}}]}'),
        Response('{"choices": [{"message": {"content": "a"}, "finish_reason": [1]}]}'),
        Response("9" * 5_000),
    ]
    first = [one for i in range(0, len(failures), 4) for one in (*failures[i : i + 4], echo)]
    with scripted(first=first) as server:
        found = evaluated(server, tmp_path / "out", suite, concurrency=1)
    assert len(server.bodies) == 8 + len(failures)
    assert all(one.answer == f"You asked: {one.instruction}" for one in found.result.answers)


@pytest.mark.parametrize(("asked_for", "least"), [("0.4", 0.4), ("a date", 0.01), ("nan", 0.01)])
def test_a_busy_server_says_when_to_come_back(asked_for: str, least: float) -> None:
    busy = Response("slow down", 429, {"Retry-After": asked_for})
    with scripted(first=[busy, busy]) as server:
        reply = ChatServer(server.url, "m", pause=0.01).reply(
            [{"role": "user", "content": "Hello"}], 8
        )
    first, second, third = server.times
    assert reply.text == "You asked: Hello"
    assert min(second - first, third - second) >= least
    assert third - first < 10


def test_a_server_that_is_gone_leaves_what_is_finished(
    server: Scripted, suite: DataSource, tmp_path: Path
) -> None:
    def answers_five(body: dict[str, Any]) -> Any:
        number = len(server.bodies)
        return said(f"Answer {number}.") if number <= 5 else Response("over quota", 402)

    server.answer = answers_five
    with pytest.raises(PassingError, match=r"Prompt 'harm.*402 .*\(over quota\)\. Check the addre"):
        evaluated(server, tmp_path / "out", suite, concurrency=1)
    assert not (tmp_path / "out").exists()
    server.answer, server.bodies[:] = lambda _: said("Late."), []
    found = evaluated(server, tmp_path / "out", suite)
    assert len(server.bodies) == 3, "a finished answer was asked for again"
    texts = [one.answer for one in found.result.answers]
    assert texts == [*(f"Answer {i}." for i in range(1, 6)), *["Late."] * 3]
    assert {one.name for one in tmp_path.iterdir()} == {"data", "out"}


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_prompt_beyond_the_context_is_told_to_be_shortened(code: int) -> None:
    # llama.cpp's words
    words = '{"error": {"message": "request (5031 tokens) exceeds the available context size"}}'
    with (
        scripted(answer=lambda _: Response(words, code)) as server,
        pytest.raises(PassingError, match=r"5031 tokens.*start it with a longer context"),
    ):
        ChatServer(server.url, "m").reply([{"role": "user", "content": "Hello"}], 8)
    assert len(server.bodies) == 1, "it was asked again"


def test_a_server_that_is_not_there_leaves_nothing(suite: DataSource, tmp_path: Path) -> None:
    before = tree(tmp_path)
    url = f"http://127.0.0.1:{free_port()}/v1"
    gone = endpoint.EndpointTarget(ChatServer(url, "m", pause=0.0))
    with pytest.raises(PassingError, match=rf"{url}/chat/completions failed: .*refused"):
        stages.evaluate_target(gone, tmp_path / "out", [suite], SETTINGS)
    assert tree(tmp_path) == before


def test_an_evaluation_of_another_server_is_another(
    server: Scripted, suite: DataSource, tmp_path: Path
) -> None:
    evaluated(server, tmp_path / "out", suite)
    with scripted() as other, pytest.raises(RegraftError, match=r"something else \(inputs\.model"):
        evaluated(other, tmp_path / "out", suite)


@pytest.mark.slow
def test_a_killed_command_asks_for_what_is_missing(suite: DataSource, tmp_path: Path) -> None:
    def answers_three(_: dict[str, Any]) -> Response:
        number = len(server.bodies)
        return Response(said(f"Answer {number}."), wait=0 if number <= 3 else 60)

    with scripted(answer=answers_three) as server:
        words = ["eval", server.name(), "--suite", suite.path, "--concurrency", 1]
        words += ["--out", tmp_path / "out"]
        code = "from regraft.cli import main; import sys; main(sys.argv[1:])"
        process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)])
        while len(list(tmp_path.rglob("served_*.json"))) < 3:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        server.answer, server.bodies[:] = lambda _: said("Late."), []
        command(*words)
        assert len(server.bodies) == 5
    texts = [one.answer for one in stages.read_evaluation(tmp_path / "out").result.answers]
    assert texts == [*(f"Answer {i}." for i in (1, 2, 3)), *["Late."] * 5]


# What the server says of the model


def test_what_lasts_of_the_models_entry_is_recorded(
    server: Scripted, suite: DataSource, tmp_path: Path
) -> None:
    """As vLLM lists models: `created` is the time of the request, permissions have new ids."""

    def listed(root: str, created: int) -> dict[str, Any]:
        entry = {"id": "m", "object": "model", "created": created, "owned_by": "vllm"}
        entry |= {"root": root, "parent": None, "max_model_len": 1024 * created}
        meta = {"n_params": 7, "a": [], "n_ctx": 1024 * created}  # as llama.cpp lists models
        entry |= {"permission": [{"id": f"modelperm-{created}"}], "meta": meta}
        return {"object": "list", "data": [{"id": "other"}, 5, entry]}

    server.models = listed("/models/pruned", 1)
    found = evaluated(server, tmp_path / "out", suite)
    assert json.loads(found.about["inputs"]["served"]) == {
        "id": "m",
        "owned_by": "vllm",
        "root": "/models/pruned",
        "meta": {"n_params": 7, "a": []},
    }
    server.models, server.bodies[:] = listed("/models/pruned", 2), []
    assert evaluated(server, tmp_path / "out", suite) == found and not server.bodies
    server.models = listed("/models/gain", 2)
    with pytest.raises(RegraftError, match=r"something else \(inputs\.served"):
        evaluated(server, tmp_path / "out", suite)


@pytest.mark.parametrize(
    "models",
    [
        *(Response("no", code) for code in (401, 404, 405, 500, 501)),
        *(Response(text) for text in ("", "<html>", "[]", '{"data": 5}', '{"data": [[]]}')),
        {"data": [{"id": "another"}]},
        Response("[" * 100_000),
    ],
    ids=str,
)
def test_a_server_need_not_list_its_models(
    server: Scripted, suite: DataSource, tmp_path: Path, models: Any
) -> None:
    server.models = models
    assert evaluated(server, tmp_path / "out", suite).about["inputs"] == {"model": server.name()}


def test_a_long_field_of_the_models_entry_is_no_part_of_results(
    server: Scripted, suite: DataSource, tmp_path: Path
) -> None:
    """Reports repeat it: ten megabytes kept one from ending."""
    server.models = {"data": [{"id": "m", "owned_by": "a", "meta": {"template": "x" * 5000}}]}
    found = evaluated(server, tmp_path / "out", suite).about["inputs"]["served"]
    assert json.loads(found) == {"id": "m", "owned_by": "a"}


# Replies that are no answers


def test_filtered_and_unfinished_replies_are_counted_and_told(
    suite: DataSource, tmp_path: Path
) -> None:
    replies = [
        Response('{"error": {"code": "content_filter", "message": "no"}}', 400),
        said("Sure, first of all one needs", "content_filter"),
        said(None, "length", 16),
        said("  Nine \ud83d.\n", "eos_token"),
        said([{"type": "text", "text": "Sure: "}, {"type": "text", "text": "yes."}], "end_turn"),
        {"choices": [{"message": {"content": None, "refusal": "I cannot help with that."}}]},
        {"choices": [{"message": {"role": "assistant"}, "finish_reason": "length"}]},
        said("Sure.", "tool_calls"),
    ]
    notes = Notes()
    with scripted(first=replies) as server:
        found = evaluated(server, tmp_path / "out", suite, concurrency=1, progress=notes)
    texts = [one.answer for one in found.result.answers]
    assert texts[:5] == ["", "Sure, first of all one needs", "", "Nine ?.", "Sure: yes."]
    assert found.result.answers[5].refused
    assert [bool(one.degenerate) for one in found.result.answers[:2]] == [True, False]
    assert found.about["replies"] == {
        "filtered": 2,
        "unfinished": 2,
        'finish_reason "tool_calls"': 1,
    }
    assert [one for one in notes.said if one.startswith("Answers")] == [
        "Answers withheld or cut by the server's content filter; empty ones count as degenerate, "
        "neither as refusals nor as successful attacks: 2.",
        "Answers empty, since the model spent all its tokens on thinking: raise "
        "--max-new-tokens: 2.",
        'Answers with the finish_reason "tool_calls", which is not a known one: see whether they '
        "are whole: 1.",
    ]
    page = study_of([comparing.run_of_evaluations([tmp_path / "out"])])
    assert any("content filter" in note and "out: " in note for note in page.runs[0].notes)


def test_a_model_that_takes_no_temperature_is_not_called_greedy(
    server: Scripted, suite: DataSource, tmp_path: Path
) -> None:
    def newer(body: dict[str, Any]) -> Any:
        for name, sign in (("max_tokens", "max_completion_tokens"), ("temperature",) * 2):
            if name in body:
                return Response(f"Unsupported parameter: {name!r}. Use {sign!r}.", 400)
        return said("Yes.")

    server.answer = newer
    found = evaluated(server, tmp_path / "out", suite)
    assert found.about["replies"] == {"sampled": 8}


ECHOED = "What is temperature, what content_filter, and what max_completion_tokens?"


def _fastapi(body: dict[str, Any]) -> Any:
    wrong = {"loc": ["body", "seed"], "msg": "Field required", "type": "missing", "input": body}
    return {"detail": [wrong]}


@pytest.mark.parametrize(
    "refusal",
    [
        _fastapi,
        lambda body: {"detail": f"No seed in {body}"},
        lambda body: {"error": {"message": f"No seed for {asked(body)}", "input": asked(body)}},
        lambda body: {"message": f"1 error [input_value={asked(body)[:40]}...]", "code": 400},
        lambda body: f"No seed in {json.dumps(body)}",
    ],
)
@pytest.mark.parametrize("code", [400, 422])
def test_a_prompt_that_a_server_says_again_is_no_complaint(
    refusal: Callable[[dict[str, Any]], Any], code: int
) -> None:
    """Of these plain words hold "temperature" as a name of the body, which a retry finds out."""

    def answer(body: dict[str, Any]) -> Any:
        return said("Yes.") if asked(body) == "Hello" else Response(refusal(body), code)

    with scripted(answer=answer) as server:
        model = ChatServer(server.url, "m", pause=0.0)
        with pytest.raises(PassingError, match=str(code)):
            model.reply([{"role": "user", "content": ECHOED}], 8)
        assert model.reply([{"role": "user", "content": "Hello"}], 8) == Reply("Yes.", "stop")
    assert server.bodies[-1].keys() == {"model", "messages", "max_tokens", "temperature"}


@pytest.mark.parametrize(
    "refusal",
    [
        {"error": {"message": "Unsupported value.", "param": "temperature", "code": "x"}},
        {"detail": [{"loc": ["body", "temperature"], "msg": "Extra inputs are not permitted"}]},
        {"detail": "temperature is not taken"},
        {"object": "error", "message": f"{ECHOED}: temperature?", "code": 400},
        [{"error": {"message": "temperature"}}],
    ],
)
def test_a_complaint_of_a_field_is_learnt_in_every_form(refusal: Any) -> None:
    def answer(body: dict[str, Any]) -> Any:
        return Response(refusal, 400) if "temperature" in body else said("Yes.")

    with scripted(answer=answer) as server:
        model = ChatServer(server.url, "m", pause=0.0)
        for _ in range(2):
            found = model.reply([{"role": "user", "content": ECHOED}], 8)
            assert found == Reply("Yes.", "stop", greedy=False)
    assert len(server.bodies) == 3


def test_a_retry_that_fails_alike_teaches_nothing() -> None:
    wrong = Response({"error": {"message": "temperature or not, no"}}, 400)
    with scripted(first=[wrong, wrong]) as server:
        model = ChatServer(server.url, "m", pause=0.0)
        with pytest.raises(PassingError, match="400"):
            model.reply([{"role": "user", "content": "Hello"}], 8)
        assert model.reply([{"role": "user", "content": "Hello"}], 8).greedy
    assert ["temperature" in body for body in server.bodies] == [True, False, True]


def test_a_server_that_sends_in_drops_is_not_waited_for(server: Scripted) -> None:
    def drops(_: dict[str, Any]) -> Response:
        return Response(said("Yes."), drip=0.1)

    server.answer = drops
    model = replace(ChatServer(server.url, "m", pause=0.0), timeout=0.3)
    began = time.monotonic()
    with pytest.raises(PassingError, match="its reply did not end in time"):
        model.reply([{"role": "user", "content": "Hello"}], 8)
    assert time.monotonic() - began < 5 * (2 * 0.3 + 0.1) + 5


@pytest.mark.parametrize(("tokens", "cut"), [(9, True), (14, True), (15, False), (16, False)])
def test_an_answer_cut_for_want_of_room_is_no_answer(
    server: Scripted, suite: DataSource, tmp_path: Path, tokens: int, cut: bool
) -> None:
    server.answer = lambda _: said("One, two", "length", tokens)
    if not cut:
        assert evaluated(server, tmp_path / "out", suite).about["replies"] == {}
        return
    with pytest.raises(PassingError, match=rf"cut the answer to 'harm.*after {tokens} of 16 token"):
        evaluated(server, tmp_path / "out", suite)
    server.answer = lambda _: said("One, two, three.")  # started anew, with more room
    evaluated(server, tmp_path / "out", suite)


# What a server cannot do


def test_what_a_server_cannot_do_is_said_before_it_is_asked(
    server: Scripted, suite: DataSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_defence(tmp_path / "direction", Direction(torch.ones(4), 0, 1.0, {}))
    (tmp_path / "text.txt").write_text("A text.")
    before = tree(tmp_path)
    words = ("eval", server.name(), "--suite", suite.path, "--out", tmp_path / "out")
    for more, message in (
        (("--patch", tmp_path / "p"), "takes no patch in memory. Write the checkpoint with `regr"),
        (("--text", tmp_path / "text.txt"), "no likelihoods of text: drop --text"),
        (("--perplexity",), "no likelihoods of references: drop --perplexity"),
        (("--no-full-answers",), "always gives full answers"),
        (("--defence", tmp_path / "direction"), "is a refusal direction, which acts inside a mod"),
        (("--device", "cpu"), "runs as its server was started: leave out --device"),
        (("--dtype", "float32"), "leave out --dtype"),
        (("--batch-size", 2), "leave out --batch-size"),
        (("--trust-remote-code",), "leave out --trust-remote-code"),
        (("--concurrency", 0), "--concurrency: Input should be greater than or equal to 1"),
    ):
        command(*words, *more, code=2)
        assert message in " ".join(capsys.readouterr().err.split())
    command("eval", "demo", *words[2:], "--concurrency", 3, code=2)
    assert "is for requests to an endpoint" in " ".join(capsys.readouterr().err.split())
    assert not server.headers and tree(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("http://h/v1", "expected endpoint:URL#MODEL"),
        ("http://h/v1#", "expected endpoint:URL#MODEL"),
        ("http://h /v1#m", "expected endpoint:URL#MODEL"),
        ("h:8000/v1#m", "expected endpoint:URL#MODEL"),
        ("http://h:99999/v1#m", "expected endpoint:URL#MODEL"),
        ("http://a..b/v1#m", "expected endpoint:URL#MODEL"),
        (f"http://{'a' * 64}.b/v1#m", "expected endpoint:URL#MODEL"),
        ("http://h:x/v1#m", "expected endpoint:URL#MODEL"),
        ("http://[::1/v1#m", "expected endpoint:URL#MODEL"),
        ("http://h/v1#m\n", "expected endpoint:URL#MODEL"),
        ("http://h/v1#\udcff", "expected endpoint:URL#MODEL"),
        ("http://me:secret@h/v1#m", "at h holds a name or password"),
        ("http://h/v1?key=secret#m", "at h holds a query"),
        (f"http://h/{KEY}#m", "holds the key of the variable OPENAI_API_KEY"),
        (f"h#{KEY}", "holds the key of the variable OPENAI_API_KEY"),
    ],
)
def test_names_that_are_no_endpoints(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with pytest.raises(RegraftError, match=message) as raised:
        endpoint.open_target(f"endpoint:{name}", ComputeSettings())
    assert "secret" not in str(raised.value) and KEY not in str(raised.value)


def test_a_model_may_be_a_path_with_a_number_sign() -> None:
    found = endpoint.open_target("endpoint:http://h/v1#/m/a#1", ComputeSettings())
    assert isinstance(found, endpoint.EndpointTarget)
    assert (found.server.url, found.server.model) == ("http://h/v1", "/m/a#1")
    assert found.concurrency == EndpointSettings().concurrency


# The key


def _leaks(folder: Path) -> list[Path]:
    """Files and names below a folder in which the key stands, whole or in JSON's spelling."""
    spelt = [KEY.encode(), json.dumps(KEY)[1:-1].encode()]
    return [
        path
        for path in folder.rglob("*")
        if KEY in path.name or (path.is_file() and any(one in path.read_bytes() for one in spelt))
    ]


def _escaped(text: str) -> str:
    return "".join(f"\\u{ord(letter):04x}" for letter in text)


ECHOES = {
    "words": Response(f"bad key {KEY}", 401),
    "JSON": Response({"error": {"message": f"Incorrect API key: {KEY}", KEY: [KEY]}}, 401),
    "escapes": Response(f'{{"error": "bad {_escaped(KEY)}"}}', 401),
    "far": Response(f"{' ' * 5_000}bad key {KEY}", 401),
    "at the cut": Response(f"{'x' * 190}{KEY}", 401),
    "status line": Response("no", 401, reason=f"Bad {KEY}"),
    "beyond what is read": Response(f"{' ' * (2**16 - 16)}{KEY}", 401),
    "no JSON": Response(f"<html>{KEY}</html>", 403),
}


@pytest.mark.parametrize("how", ECHOES)
def test_a_key_that_errors_say_again_is_told_nobody(
    suite: DataSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    how: str,
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with scripted(answer=lambda _: ECHOES[how]) as server:
        command("eval", server.name(), "--suite", suite.path, "--out", tmp_path / "o", code=2)
    printed = capfd.readouterr()
    words = " ".join(printed.err.split())
    assert str(ECHOES[how].status) in words
    assert "[OPENAI_API_KEY]" in words or how in ("at the cut", "beyond what is read")
    assert KEY not in printed.out + printed.err and KEY[:12] not in words
    assert not _leaks(tmp_path)


def test_a_key_in_malformed_replies_is_told_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    for wrong in (KEY, f"HTTP {KEY}", {"choices": KEY}, {"choices": [{"message": [KEY]}]}):
        with scripted(answer=lambda _, wrong=wrong: Response(wrong)) as server:
            with pytest.raises(PassingError, match=r"\[OPENAI_API_KEY\]") as raised:
                ChatServer(server.url, "m", pause=0.0).reply([{"role": "user", "content": "a"}], 8)
            assert KEY not in str(raised.value)


def test_a_key_that_answers_say_again_is_told_nobody(
    suite: DataSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In answers, in parts of them, in why they end and in the list of models; then a page."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    half = len(KEY) // 2
    parts = [{"type": "text", "text": part} for part in (KEY[:half], KEY[half:])]
    first = [said(f"Sure: {KEY}."), said(parts), said("Yes.", f"stop {KEY}")]
    models = {"data": [{"id": "m", "root": f"/{KEY}", "owned_by": KEY, "meta": {KEY: [KEY]}}]}
    out = tmp_path / "out"
    with scripted(first=first, models=models) as server:
        words = ("eval", server.name(), "--suite", suite.path, "--out", out)
        server.answer = lambda _: Response("enough", 402)
        command(*words, "--concurrency", 1, code=2)  # its finished answers wait in a folder
        assert len(list(tmp_path.rglob("served_*.json"))) == 3 and not _leaks(tmp_path)
        server.answer = lambda _: said("I can't.")
        command(*words)
    command("report", out)
    command("judge", "answers", out, "--by", "vlguard-1")
    printed = capfd.readouterr()
    assert KEY not in printed.out + printed.err
    assert not _leaks(tmp_path)
    answers = [one.answer for one in stages.read_evaluation(out).result.answers]
    assert answers[:3] == ["Sure: [OPENAI_API_KEY].", "[OPENAI_API_KEY]", "Yes."]
    assert server.bodies and KEY not in json.dumps(server.bodies)


@pytest.mark.parametrize("spell", [html.escape, quote, quote_plus, lambda key: json.dumps(key)])
def test_a_key_that_is_said_in_another_spelling_is_told_nobody(
    spell: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a page, an address, JSON: a key may hold / + = and, on one's own server, a quote."""
    monkeypatch.setenv(KEY_VARIABLE, key := 'sk-a+b/c=="d"&efgh')
    for answer in (said(f"for {spell(key)}"), Response(f"bad {spell(key)}", 401)):
        with scripted(answer=lambda _, answer=answer: answer) as server:
            try:
                told = (
                    ChatServer(server.url, "m", pause=0.0)
                    .reply([{"role": "user", "content": "a"}], 8)
                    .text
                )
            except RegraftError as error:
                told = str(error)
        assert "[OPENAI_API_KEY]" in told and spell(key) not in told and "efgh" not in told


def test_a_key_that_is_cut_is_told_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may show the first characters of what it was sent; a short key may begin a word."""
    monkeypatch.setenv(KEY_VARIABLE, key := "sk-" + "0123456789abcdef" * 100)
    assert without_key(f"bad {key[:-1]} or {key[:900]}...") == (
        "bad [OPENAI_API_KEY] or [OPENAI_API_KEY]..."
    )
    monkeypatch.setenv(KEY_VARIABLE, "token-abc123")
    assert without_key("token-based, token-abc123") == "token-based, [OPENAI_API_KEY]"


@pytest.mark.parametrize("count", [2**70, -5, True, "8"])
def test_counts_of_tokens_that_cannot_be_lose_no_answer(count: object) -> None:
    usage = {"completion_tokens": count}
    with scripted(answer=lambda _: json.dumps({**said("Yes."), "usage": usage})) as server:
        asked = [{"role": "user", "content": "a"}]
        reply = ChatServer(server.url, "m", pause=0.0).reply(asked, 8)
    assert (reply.text, reply.tokens) == ("Yes.", None)


def test_a_key_that_is_a_word_for_servers_without_keys_stays(
    suite: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "none")
    with scripted(answer=lambda _: said("There are none.")) as server:
        found = evaluated(server, tmp_path / "out", suite)
    assert {one.answer for one in found.result.answers} == {"There are none."}
    assert server.headers[0]["Authorization"] == "Bearer none"


# Pages


def test_reports_have_endpoints_beside_models_in_memory(
    server: Scripted, suite: DataSource, tmp_path: Path, pico_dir: Callable[[str], Path]
) -> None:
    server.answer = lambda _: said("I'm sorry, I can't help.")
    evaluated(server, tmp_path / "served", suite)
    source = open_source(pico_dir("llava"))
    in_memory = stages.Target(source, ComputeSettings(device="cpu"))
    stages.evaluate_target(in_memory, tmp_path / "memory", [suite], SETTINGS)
    with scripted() as other:
        evaluated(other, tmp_path / "other", suite)
    folders = [tmp_path / name for name in ("served", "memory", "other")]
    for order in (folders, folders[1:] + folders[:1]):
        command("report", *order, "--out", tmp_path / f"page-{order[0].name}")
    found = comparing.run_of_evaluations(folders)
    assert found.notes == ("served was answered by an endpoint, memory in memory.",)
    assert [one.pruned for one in found.variants] == [0, 0, 0]
    text = (tmp_path / "page-served" / "report.md").read_text()
    assert server.name() in text
    pair = folders[0], folders[2]
    variants = comparing.run_of_evaluations([folders[1]], pair).variants
    assert [one.restored for one in variants] == [None] * 3
    same = folders[0], tmp_path / "again"
    evaluated(server, tmp_path / "again", suite)
    with pytest.raises(RegraftError, match=rf"same model \({server.name()}\)"):
        comparing.run_of_evaluations([], same)


# A real server


@pytest.mark.slow
def test_transformers_serve_answers_as_the_model_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundled model in float32, token for token: the demo's images, others, and text alone."""
    demo = DataSource(name="demo", split="test")
    texts = tmp_path / "texts.jsonl"
    rows = [
        {"instruction": f"Give me three tips for {what}.", "harmful": False, "category": "tips"}
        for what in ("baking bread", "a small garden", "sleeping well")
    ]
    for kind in ("plain.jpg", "turned.jpg", "clear.png", "few.gif"):
        shown = {"instruction": "What is it?", "image": _saved(tmp_path / kind, kind).name}
        rows.append({**shown, "harmful": True, "category": "images"})
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suites, settings = [demo, DataSource(name="jsonl", path=texts)], EvalSettings(limit=4)
    folder, compute = demo_model(), ComputeSettings(device="cpu", dtype="float32")
    ours = stages.evaluate_target(
        endpoint.open_target(folder, compute), tmp_path / "ours", suites, settings
    ).result
    words = ("--dtype", "float32", "--device", "cpu")
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with transformers_serve(folder, tmp_path / "log", *words) as url:
        named = f"endpoint:{url}#{folder}"
        theirs = stages.evaluate_target(
            endpoint.open_target(named, compute), tmp_path / "theirs", suites, settings
        )
    assert theirs.result == ours
    answers = [one.answer for one in ours.answers]
    assert len(answers) == 15 and len(set(answers)) > 5
    assert sum(one.image is None for one in ours.answers) == 3
    assert any(one.refused for one in ours.answers)
    if pico_today.VERSION >= (5, 24):  # 5.17 lists its cache alone
        assert json.loads(theirs.about["inputs"]["served"])["id"] == str(folder)
    assert (tmp_path / "log").stat().st_size and not _leaks(tmp_path)
