"""N:M groups: detection and violations against loops over groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import truth
from methods import method, restored
from regraft.models.load import open_source
from regraft.patch.format import Patch, TensorPatch
from regraft.patch.groups import Grouping, common_grouping, grouping_of, violated_groups
from regraft.pruning.masks import Pattern


def most_kept(weight: np.ndarray, m: int) -> int:
    return max(
        int(np.count_nonzero(row[i : i + m])) for row in weight for i in range(0, len(row), m)
    )


arrays = hnp.arrays(np.float32, (2, 32), elements=st.sampled_from([0.0, -0.0, 1.0]))
tiled = hnp.arrays(np.float32, (4,), elements=st.sampled_from([0.0, -0.0, 1.0]))


@given(arrays | tiled.map(lambda group: np.tile(group, (2, 8))))
def test_grouping_equals_loops(weight: np.ndarray) -> None:
    found = grouping_of(torch.from_numpy(weight))
    kept = np.count_nonzero(weight)
    fitting = [
        m
        for m in range(2, 65)
        if weight.shape[1] % m == 0
        and m < weight.shape[1]
        and 0 < most_kept(weight, m) < m
        and kept >= 0.95 * most_kept(weight, m) * weight.size / m
    ]
    if not fitting:
        assert found is None
    else:
        m = fitting[0]
        assert found == Grouping(most_kept(weight, m), m, weight.size // m)


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_pruning_without_a_pattern_is_none(sparsity: float) -> None:
    """In 2,000 rows some group of 64 is full or not by chance; sizes give it away."""
    score = torch.rand(2000, 512, generator=torch.Generator().manual_seed(0))
    assert grouping_of(score.masked_fill(score < sparsity, 0)) is None
    narrow = score[:, :48].contiguous()
    least = narrow.topk(int(48 * sparsity), dim=1, largest=False).indices
    assert grouping_of(narrow.scatter(1, least, 0.0)) is None, "as many in each row"


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (4, 8), (1, 4), (3, 16), (16, 32), (20, 32)])
def test_pruned_matrices_are_recognised(n: int, m: int) -> None:
    score = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    weight = score.masked_fill(Pattern.parse_n_m(f"{n}:{m}").mask(score), 0).bfloat16()
    found = grouping_of(weight)
    assert found is not None
    assert (found.n_m, found.groups) == (f"{n}:{m}", 64 * 64 // m)
    assert grouping_of(score) is None
    assert grouping_of(score[:, :63].contiguous()) is None


def test_the_pattern_of_most_weights_counts() -> None:
    found = [Grouping(2, 4, 10), Grouping(2, 4, 5), Grouping(4, 8, 12)]
    assert common_grouping(found) == Grouping(2, 4, 15)
    assert common_grouping([*found, None]) is None, "half of them may be chance"
    assert common_grouping([None, None]) is None
    assert common_grouping([]) is None


def test_violated_groups_equal_loops(pico_dir, tmp_path: Path) -> None:
    """Restore at random in a 2:4 checkpoint and count again on the patched weights."""
    from regraft.models.checkpoint_copy import write_edited

    source = truth.opened(pico_dir("qwen2_vl")).source
    edits = {
        li.tensor: lambda w: w.masked_fill(Pattern.parse_n_m("2:4").mask(w.float().abs()), 0)
        for li in source.architecture.linears
    }
    pruned = write_edited(source.checkpoint, tmp_path / "pruned", edits)
    pruned_source = open_source(tmp_path / "pruned")
    generator = torch.Generator().manual_seed(1)
    tensors, expected = {}, 0
    for linear in list(source.architecture.linears)[:5]:
        after, before = pruned.read(linear.tensor), source.checkpoint.read(linear.tensor)
        chosen = (after == 0) & (torch.rand(after.shape, generator=generator) < 0.05)
        positions = chosen.flatten().nonzero().flatten()
        tensors[linear.tensor] = TensorPatch.of(after, positions, before.flatten()[positions])
        patched = torch.where(chosen, before, after)
        expected += sum(
            int(np.count_nonzero(group)) > 2 for group in patched.reshape(-1, 4).numpy()
        )
    assert expected > 5
    assert violated_groups(pruned_source, Patch(tensors, {}), 2, 4) == expected
    assert violated_groups(pruned_source, Patch(tensors, {}), 1, 4) == 0, "none has that pattern"


def test_realign_tells_of_violated_groups(pico_dir, tmp_path: Path) -> None:
    from regraft.models.checkpoint_copy import write_edited
    from regraft.models.load import open_source
    from regraft.patch.format import load_patch

    source = truth.opened(pico_dir("qwen2_vl")).source
    edits = {
        li.tensor: lambda w: w.masked_fill(Pattern.parse_n_m("2:4").mask(w.float().abs()), 0)
        for li in source.architecture.linears
    }
    write_edited(source.checkpoint, tmp_path / "pruned", edits)
    pruned = open_source(tmp_path / "pruned")
    settings = method(heads="all", method="hsr-a")
    restored(source, pruned, tmp_path / "patch", settings)
    about = load_patch(tmp_path / "patch").about
    attention = [li for li in source.architecture.linears if li.name.startswith("self_attn")]
    assert about["n_m"] == "2:4"
    assert about["groups"] == source.architecture.prunable // 4
    assert about["violated_groups"] == sum(li.shape[0] * li.shape[1] for li in attention) // 4
    again = restored(source, pruned, tmp_path / "patch", settings)
    assert again.about == about
