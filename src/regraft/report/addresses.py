"""What suites and files are called where there is little room, and on other machines."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_ADDRESS = re.compile(r"(?P<name>[\w-]+):(?P<path>.*?)(?P<marks>(?:#[\w-]+)*)", re.DOTALL)
_ANYTHING = ("jsonl", "prompts", "benign")  # readers of files of any data set


def short_names(suites: Iterable[str]) -> dict[str, str]:
    """Suite -> "safebench#even", "vlguard-test": its data set, or the file where that says more.

    With the name of the file behind that of the data set where two would be the same, and whole
    where that does not tell them apart either.
    """
    whole = tuple(suites)
    for shorten in (_short, public_suite):
        found = {suite: shorten(suite) for suite in whole}
        if len(set(found.values())) == len(found):
            return found
    return {suite: suite for suite in whole}


def _short(suite: str) -> str:
    found = _ADDRESS.fullmatch(suite)
    if found is None or found["name"] == "demo":
        return suite
    file = re.sub(r"(?<=.)\.\w+$", "", Path(found["path"]).name)
    return (file if found["name"] in _ANYTHING else found["name"]) + found["marks"]


def public_suite(suite: str) -> str:
    """The suite without the folders of this machine; one of the hub as it is."""
    return suite if ":hf:" in suite else re.sub(r":.*/", ":", suite)


def file_names(source: str) -> str:
    """The same of a reading's source, several paths with commas between them."""
    return ", ".join(Path(one).name for one in source.split(", "))
