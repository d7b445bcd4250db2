"""A dense checkpoint and one pruned from it: other pairs are refused, or noted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pico
import truth
from disk import rewrite
from methods import method, restored
from regraft import stages
from regraft.errors import RegraftError
from regraft.models.checkpoint import SINGLE_FILE
from regraft.models.checkpoint_copy import Edit, write_edited
from regraft.models.load import Source, load_model, open_source
from regraft.patch.pair import check_pair, survey
from regraft.progress import Progress
from regraft.pruning.masks import Pattern
from regraft.pruning.pruners.sparsegpt import PLUGIN as SPARSEGPT
from regraft.pruning.pruners.sparsegpt import inverse_factor, sparsegpt_prune

DOUBT = "The pruned model's kept weights are not the dense model's"


@pytest.fixture
def dense(tmp_path: Path) -> Source:
    return open_source(pico.save("llava", tmp_path / "dense", torch.bfloat16))


@pytest.fixture
def pruned(dense: Source, tmp_path: Path) -> Source:
    return truth.pruned_at_random(dense, tmp_path / "pruned", 0.5)[0]


def edited(source: Source, target: Path, edits: dict[str, Edit]) -> Source:
    write_edited(source.checkpoint, target, edits)
    return open_source(target)


def tuned(source: Source, target: Path, *, decoder: bool) -> Source:
    """As after a fine-tune of the prunable weights, or of all others; zeros stay."""
    prunable = {linear.tensor for linear in source.architecture.linears}
    draw = torch.Generator().manual_seed(1)

    def tune(weight: Tensor) -> Tensor:
        noise = 0.01 * torch.randn(weight.shape, generator=draw)
        return (weight.float() * (1 + noise)).to(weight.dtype)

    names = [n for n in source.checkpoint.tensors if (n in prunable) == decoder]
    return edited(source, target, dict.fromkeys(names, tune))


# Refused


def test_other_vocabulary(pruned: Source, tmp_path: Path) -> None:
    model, _ = pico.build("llava")
    model.resize_token_embeddings(model.config.text_config.vocab_size + 64)
    model.save_pretrained(tmp_path / "wider")
    with pytest.raises(RegraftError, match=r"wider and .*pruned .*embed_tokens.weight is \[\d+, "):
        check_pair(open_source(tmp_path / "wider"), pruned)


def test_text_model_of_a_vision_language_model(
    dense: Source, pruned: Source, tmp_path: Path
) -> None:
    text = open_source(pico.save("llama", tmp_path / "text"))
    message = (
        r"text are different models: .*vision_.*\] in the first \(llava\) and .*second \(llama\)"
    )
    with pytest.raises(RegraftError, match=message):
        check_pair(dense, text)
    with pytest.raises(
        RegraftError, match=r"in the first \(llama\) and missing in the .*\(llava\)"
    ):
        check_pair(text, pruned)


def test_other_vision_tower(pico_dir: Callable[[str], Path], tmp_path: Path) -> None:
    model, _ = pico.build("llava")
    model.config.vision_config.num_hidden_layers = 4
    deeper = type(model)(model.config)
    deeper.save_pretrained(tmp_path / "deeper")
    with pytest.raises(
        RegraftError, match=r"vision.*layers\.3.* is missing in the first \(llava\) and \["
    ):
        check_pair(open_source(pico_dir("llava")), open_source(tmp_path / "deeper"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["dense", "pruned"])
def test_weights_that_are_not_finite(
    dense: Source, pruned: Source, which: str, value: float, tmp_path: Path
) -> None:
    name = list(dense.architecture.linears)[9].tensor

    def spoil(weight: Tensor) -> Tensor:
        weight[3, 5] = value
        return weight

    source = dense if which == "dense" else pruned
    bad = edited(source, tmp_path / "bad", {name: spoil})
    pair = (bad, pruned) if which == "dense" else (dense, bad)
    with pytest.raises(RegraftError, match=rf"bad: the tensor {name} holds numbers that"):
        survey(*pair)
    with pytest.raises(RegraftError, match=rf"bad: the tensor {name} holds numbers that"):
        restored(*pair, tmp_path / "patch", method("hsr-a", heads="all"))


# Noted


def test_honest_pairs(dense: Source, pruned: Source, tmp_path: Path) -> None:
    """Of another dtype, too."""
    single = open_source(pico.save("llava", tmp_path / "single"))
    assert survey(dense, pruned).doubt is None
    assert survey(single, pruned).doubt is None
    assert survey(dense, truth.pruned_at_random(single, tmp_path / "other", 0.5)[0]).doubt is None


@pytest.mark.parametrize("n_m", [None, (2, 4)])
def test_sparsegpt_changes_what_it_keeps(
    dense: Source, n_m: tuple[int, int] | None, tmp_path: Path
) -> None:
    draw = torch.Generator().manual_seed(0)

    def prune(weight: Tensor) -> Tensor:
        inputs = torch.randn(200, weight.shape[1], generator=draw) + 1
        factor = inverse_factor(SPARSEGPT.accumulate(inputs), 200)
        pattern = Pattern(0.5, n_m=n_m) if n_m else Pattern(0.5, "row")
        return sparsegpt_prune(weight, factor, pattern).to(weight.dtype)

    pruned = edited(
        dense, tmp_path / "pruned", {linear.tensor: prune for linear in dense.architecture.linears}
    )
    linear = next(pruned.architecture.linears)
    before, after = (one.checkpoint.read(linear.tensor) for one in (dense, pruned))
    assert (before == after)[after != 0].float().mean() < 0.2
    assert survey(dense, pruned).doubt is None


@pytest.mark.parametrize("decoder", [True, False], ids=["prunable weights", "all others"])
def test_pruned_from_another_fine_tune(
    dense: Source, pruned: Source, decoder: bool, tmp_path: Path
) -> None:
    doubt = survey(dense, tuned(pruned, tmp_path / "tuned", decoder=decoder)).doubt
    assert doubt is not None and doubt.startswith(DOUBT)


def test_exports_with_other_names_are_compared_outside_the_decoder_too(
    dense: Source, pruned: Source, tmp_path: Path
) -> None:
    model = load_model(pruned, dtype="bfloat16", device="cpu")
    model.save_pretrained(tmp_path / "newer", save_original_format=False)
    newer = open_source(tmp_path / "newer")
    assert not dense.checkpoint.tensors.keys() & newer.checkpoint.tensors.keys()
    assert survey(dense, newer).doubt is None
    vision = [name for name in newer.checkpoint.tensors if "vision" in name]
    other = edited(newer, tmp_path / "other", dict.fromkeys(vision, lambda one: one * 1.01))
    assert survey(dense, other).doubt is not None


@pytest.mark.parametrize("stage", ["realign", "rank"])
def test_stages_tell_of_it(dense: Source, pruned: Source, stage: str, tmp_path: Path) -> None:
    class Heard(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    def run(source: Source, name: str) -> None:
        if stage == "realign":
            settings = method(method="hsr-a", heads="random", top_heads=2)
            restored(dense, source, tmp_path / name, settings, progress=Heard())
        else:
            settings = method(method="random", count=9)
            stages.write_ranking(
                stages.Setup(dense, progress=Heard()), source, tmp_path / name, settings
            )

    notes: list[str] = []
    run(pruned, "honest")
    assert not any(DOUBT in note for note in notes)
    run(tuned(pruned, tmp_path / "tuned", decoder=True), "other")
    assert sum(DOUBT in note for note in notes) == 1


# Config and weights of one checkpoint


@pytest.mark.parametrize("part", ["embed_tokens", "lm_head", "layers.2.input_layernorm"])
def test_shape_on_disk_is_not_the_configs(part: str, tmp_path: Path) -> None:
    folder = pico.save("llava", tmp_path / "model")
    checkpoint = open_source(folder).checkpoint
    name = next(n for n in checkpoint.tensors if f"{part}.weight" in n and "vision" not in n)
    stored = checkpoint.read(name)
    rewrite(folder, SINGLE_FILE, {name: torch.cat([stored, stored[:3]])})
    rows = len(stored)
    with pytest.raises(
        RegraftError, match=rf"{name} is \[{rows + 3}.* in the file, .* \[{rows}"
    ) as caught:
        open_source(folder)
    assert str(folder) in str(caught.value)


def test_shape_on_disk_outside_the_decoder(tmp_path: Path) -> None:
    folder = pico.save("llava", tmp_path / "model")
    source = open_source(folder)
    name = next(n for n in source.checkpoint.tensors if "linear_2.bias" in n)
    rewrite(folder, SINGLE_FILE, {name: torch.zeros(7)})
    with pytest.raises(
        RegraftError, match=r"model: .*linear_2.bias is \[7\] in the file, .* describes \[64\]"
    ):
        load_model(open_source(folder))
