"""Every number that regraft computes is the one that is committed; tests/goldens.py says how."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import goldens

FIX = "if the change is meant, write them anew with `python tests/goldens.py --write`"


@pytest.mark.slow
@pytest.mark.parametrize("name", goldens.RUNS)
def test_digests(name: str, tmp_path: Path) -> None:
    """Masks, weights, scores, statistics, rankings, patches and answers of a whole run."""
    golden = goldens.golden(name)
    if other := goldens.other_machine(golden):
        pytest.skip(f"sums may be rounded differently on another machine: {other}")
    changed = goldens.differences(golden["digests"], goldens.RUNS[name](tmp_path))
    assert not changed, f"{FIX}:\n" + "\n".join(changed)


def test_demo_table() -> None:
    """The figures of a finished `regraft demo`, to the digit."""
    if (run := os.environ.get("REGRAFT_DEMO_RUN")) is None:
        pytest.skip(
            "takes ten minutes: run `OMP_NUM_THREADS=1 regraft demo` and set REGRAFT_DEMO_RUN to "
            "its folder"
        )
    golden = goldens.golden("demo")
    if other := goldens.other_machine(golden, goldens.machine_of_demo(Path(run))):
        pytest.skip(f"sums may be rounded differently on another machine: {other}")
    changed = goldens.differences(golden["table"], goldens.demo_table(Path(run)))
    assert not changed, f"{FIX} --demo {run}:\n" + "\n".join(changed)


def test_digest_sees_names_dtypes_shapes_and_bits() -> None:
    zeros = torch.zeros(2, 2)
    others = (
        {"b": zeros},
        {"a": zeros.half()},
        {"a": zeros.to(torch.int32)},
        {"a": zeros.reshape(4)},
        {"a": -zeros},
        {"a": zeros, "b": zeros},
        {},
    )
    digests = {goldens.digest(one) for one in ({"a": zeros}, *others)}
    assert len(digests) == 1 + len(others)
    assert goldens.digest({"a": zeros, "b": -zeros}) == goldens.digest({"b": -zeros, "a": zeros})
    transposed = torch.arange(4).reshape(2, 2).T
    assert goldens.digest({"a": transposed}) == goldens.digest({"a": transposed.contiguous()})


def test_differences_name_what_changed_went_and_came() -> None:
    then, now = {"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 0, "d": 3}
    assert goldens.differences(then, now) == ["b: changed", "c: gone", "d: new"]
    assert goldens.differences(then, then) == []


def test_another_machine_is_named() -> None:
    here = goldens.machine()
    assert goldens.other_machine({"machine": here}) == ""
    other = goldens.other_machine({"machine": here | {"torch": "1.0"}})
    assert other == f"torch 1.0 there and {torch.__version__} here"
