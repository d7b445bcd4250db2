"""Check a model's chat template: a template can run for ever, or make gigabytes of one word.

Not found is a template that doubles a text in a loop, or puts a number or a format together from
parts: it can take all memory before its time is up.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes

from regraft.data.collate import lent_template, message
from regraft.errors import RegraftError

_PROBES = {  # texts by role, and the most characters that a template may make of them
    "one word": ({"user": "Hello"}, 20_000),
    "a long prompt": ({"user": "Hello " * 4_000}, 200_000),
    "a system prompt": ({"system": "Hello", "user": "Hello"}, 20_000),  # which it may refuse
}
_MOST_NUMBER = 10**6  # in a template
_FORMAT = re.compile(r"%[-+ #.\d]*|\{[^{}]*:[^{}]*\}")  # of text, in which a number is a width
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # a tag that transformers adds
_PATIENCE = 10.0  # seconds for rendering


def check_template(folder: Path, processor: Any) -> None:
    """Render a few prompts as a test of the template, for a few seconds at most.

    Other faults of a template are reported when a prompt is rendered.

    Raises:
        RegraftError: it is not a valid template, does not end, leaves the word out, or makes far
            too long a text.
    """
    if any(_largest_number(one) > _MOST_NUMBER for one in _templates(processor)):
        why = f"holds a power, or multiplies by more than {_MOST_NUMBER:,}."
        raise _template_error(folder, why)
    rendered: dict[str, str] = {}
    errors: list[str] = []

    def render() -> None:
        for name, (given, _) in _PROBES.items():
            chat = [message(processor, role, text) for role, text in given.items()]
            try:
                lent = lent_template(processor)
                text = processor.apply_chat_template(chat, chat_template=lent, tokenize=False)
                rendered[name] = str(text)
            except Exception as error:
                if type(error).__name__ == "TemplateSyntaxError":  # others may want an image
                    errors.append(str(error))

    thread = threading.Thread(target=render, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    if thread.is_alive():
        raise _template_error(folder, f"has not rendered a prompt in {_PATIENCE:.0f} seconds.")
    if errors:
        raise _template_error(folder, f"is not a valid template: {errors[0]}")
    for name, text in rendered.items():
        if len(text) > _PROBES[name][1]:
            raise _template_error(folder, f"makes {len(text):,} characters of {name}.")
        if "Hello" not in text:
            raise _template_error(folder, "leaves out the user's message.")


def tells_the_date(processor: Any) -> bool:
    """Whether a chat template asks for today's date, so that prompts differ from day to day."""
    return any("strftime_now" in one for one in _templates(processor))


def _largest_number(template: str) -> int:
    """An upper bound of what a template multiplies by: its largest constant or their product.

    Python makes 'a' * 10**10 in one step that no timeout interrupts, jinja2 even while compiling.
    """
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(_GENERATION.sub("", template))
    except (jinja2.TemplateError, RecursionError):  # rendering will report it
        return 1
    if tree.find(nodes.Pow):  # no prompt needs powers
        return _MOST_NUMBER + 1
    converts = any(one.name in ("int", "float") for one in tree.find_all(nodes.Filter))
    values = [one.value for one in tree.find_all(nodes.Const)]
    texts = [one for one in values if isinstance(one, str)]
    texts += [one.data for one in tree.find_all(nodes.TemplateData)]
    formats = [found for one in texts for found in _FORMAT.findall(one)]
    counted = [str(one) for one in values if type(one) is int] + (texts if converts else formats)
    numbers = [int(digits) for one in counted for digits in re.findall(r"\d{1,18}", one)]
    product = 1
    for node in tree.find_all(nodes.Mul):
        for side in (node.left, node.right):
            if isinstance(side, nodes.Const) and isinstance(side.value, int):
                product = min(_MOST_NUMBER + 1, product * max(1, abs(side.value)))
    return max([product, *numbers])


def _templates(processor: Any) -> list[str]:
    """All chat templates of a processor or a tokenizer, which may have several by name."""
    found: list[Any] = []
    for owner in (processor, getattr(processor, "tokenizer", None)):
        own = getattr(owner, "chat_template", None)
        found += own.values() if isinstance(own, dict) else [own]
    return [one for one in found if isinstance(one, str)]


def _template_error(folder: Path, why: str) -> RegraftError:
    return RegraftError(
        f"{folder}: the chat template (chat_template.jinja, or in tokenizer_config.json) {why} "
        "Take that of the base model."
    )
