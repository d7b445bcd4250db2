"""Ordinary text: perplexity and KL against the models' own forward passes, and through a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

import pico
from disk import write_data
from regraft import stages
from regraft.data.sources import DataSource
from regraft.errors import RegraftError
from regraft.evaluation import perplexity as module
from regraft.evaluation.perplexity import (
    load_teacher,
    pooled,
    predict,
    read_documents,
    result_of,
    save_teacher,
)
from regraft.evaluation.results import result_from_json, result_to_json
from regraft.models.load import open_source
from regraft.recipes.file import read_recipe
from regraft.runs import pipeline
from regraft.settings.compute import ComputeSettings
from regraft.settings.evaluating import EvalSettings

DOCUMENTS = ("A cat sat on the mat.", "Rain fell all day and the river rose.", "Nine red boats.")


def _nothing(_: int) -> None: ...


def _distributions(model: torch.nn.Module, processor: object, document: str) -> tuple:
    """(log-probabilities of the next token [T, vocabulary], next tokens [T]) by a plain forward."""
    inputs = processor(text=[document], return_tensors="pt")  # type: ignore[operator]
    with torch.no_grad():
        logits = model(**inputs).logits[0, :-1]
    return F.log_softmax(logits.double(), dim=-1), inputs["input_ids"][0, 1:]


def test_perplexity_and_kl_are_those_of_plain_forward_passes(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_POSITIONS", 3)
    dense, processor = pico.build(family)
    other, _ = pico.build(family)
    generator = torch.Generator().manual_seed(1)
    for name, weight in other.named_parameters():
        if weight.ndim == 2 and "layers" in name:
            mask = torch.rand(weight.shape, generator=generator) < 0.5
            weight.data[mask] = 0
    own, teacher = predict(dense, processor, DOCUMENTS, None, _nothing)
    assert own.kl is None
    found, _ = predict(other, processor, DOCUMENTS, teacher, _nothing)
    assert found.kl is not None
    nll, kl, tokens = 0.0, 0.0, 0
    for document, (own_nll, own_kl, count) in zip(DOCUMENTS, found.documents, strict=True):
        p, targets = _distributions(dense, processor, document)
        q, _ = _distributions(other, processor, document)
        assert count == len(targets)
        assert own_nll == pytest.approx(float(-q.gather(1, targets[:, None]).sum()), rel=1e-4)
        assert own_kl == pytest.approx(
            float(F.kl_div(q, p, log_target=True, reduction="sum")), 1e-3
        )
        nll, kl, tokens = nll + own_nll, kl + (own_kl or 0), tokens + count
    assert found.tokens == tokens
    assert found.perplexity.value == pytest.approx(math.exp(nll / tokens))
    assert found.kl.value == pytest.approx(kl / tokens)
    assert found.kl.n == len(DOCUMENTS)
    assert 0 < found.kl.low <= found.kl.value <= found.kl.high


def test_the_dense_model_diverges_from_itself_by_nothing() -> None:
    model, processor = pico.build("llava")
    model.bfloat16()
    own, teacher = predict(model, processor, DOCUMENTS, None, _nothing)
    again, _ = predict(model, processor, DOCUMENTS, teacher, _nothing)
    assert again.kl is not None
    assert again.kl.value == 0
    assert again.perplexity == own.perplexity


def test_tokens_that_are_impossible_add_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def logits(_model: object, states: torch.Tensor) -> torch.Tensor:
        return states  # as if the head were the identity

    monkeypatch.setattr(module, "logits_of", logits)
    p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    q = torch.tensor([[0.25, 0.75, 0.0]]).log()
    _, kl, _ = module._compare(torch.nn.Identity(), q, torch.tensor([0]), p)
    assert kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))


def test_intervals_are_over_documents() -> None:
    generator = np.random.default_rng(0)
    rows = [(float(a), float(b), 10) for a, b in generator.gamma(4, 1, (40, 2))]
    found = result_of(rows)
    assert found.kl is not None
    means = np.array([kl / 10 for _, kl, _ in rows])
    half = 1.96 * means.std() / math.sqrt(len(means))
    assert found.kl.low == pytest.approx(means.mean() - half, rel=0.1)
    assert found.kl.high == pytest.approx(means.mean() + half, rel=0.1)
    # cut into ten documents each, the same tokens are as many and look far more certain
    apart = result_of([(a / 10, b / 10, 1) for a, b, _ in rows for _ in range(10)])
    assert apart.kl is not None
    assert apart.kl.high - apart.kl.low < 0.5 * (found.kl.high - found.kl.low)


def test_pooled_is_the_mean_over_models() -> None:
    one, other = (
        result_of([(2.0, 1.0, 4), (3.0, 0.5, 2)]),
        result_of([(4.0, 2.0, 4), (5.0, 1.5, 2)]),
    )
    both = pooled([one, other])
    assert both is not None
    assert both.documents == ((3.0, 1.5, 4), (4.0, 1.0, 2))
    assert both.kl is not None
    assert both.kl.value == pytest.approx(2.5 / 6)
    assert pooled([]) is None


def test_a_teacher_survives_the_disk_and_another_head_is_found(tmp_path: Path) -> None:
    model, processor = pico.build("llava")
    _, teacher = predict(model, processor, DOCUMENTS, None, _nothing)
    save_teacher(tmp_path / "states", teacher)
    read = load_teacher(tmp_path / "states", len(DOCUMENTS))
    assert list(read.nlls) == list(teacher.nlls)
    for one, other in zip(read.states, teacher.states, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RegraftError, match=r"on 3 paragraphs .* and the text has 2"):
        load_teacher(tmp_path / "states", 2)
    save_teacher(tmp_path / "short", replace(teacher, nlls=teacher.nlls[:2]))
    with pytest.raises(RegraftError, match="and 2 nlls, and the text has 3"):
        load_teacher(tmp_path / "short", 3)
    one_more = ("Oh. " + DOCUMENTS[0], *DOCUMENTS[1:])  # as of a tokenizer that adds a token
    with pytest.raises(
        RegraftError, match=r"\(tokens, features\), and this model .* differ, so KL"
    ):
        predict(model, processor, one_more, read, _nothing)
    model.get_output_embeddings().weight.data.mul_(3)
    with pytest.raises(RegraftError, match="heads, tokenizers or dtypes differ"):
        predict(model, processor, DOCUMENTS, read, _nothing)


def test_documents_are_separated_by_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("One\nline and two.\n\n\nThree.\n", encoding="utf-8")
    assert read_documents(file) == ("One line and two.", "Three.")
    for content, told in ((b" \n", "holds no text"), (b"\xff", "not UTF-8")):
        file.write_bytes(content)
        with pytest.raises(RegraftError, match=told):
            read_documents(file)
    with pytest.raises(RegraftError, match=r"prose\\x00\.txt' cannot name a file: embedded null"):
        read_documents(tmp_path / "prose\0.txt")
    with pytest.raises(RegraftError, match="is a folder; a file is needed"):
        read_documents(tmp_path)


def test_an_evaluation_measures_it(pico_dir: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_source(pico_dir("llava"))
    suite = DataSource.model_validate(str(write_data(tmp_path / "data", 2)))
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(DOCUMENTS), encoding="utf-8")

    def run(name: str, text: stages.OnText | None) -> stages.Evaluation:
        target = stages.Target(source, ComputeSettings(device="cpu"), text=text)
        settings = EvalSettings(max_new_tokens=2)
        return stages.evaluate_target(target, tmp_path / name, [suite], settings)

    assert run("without", None).result.text is None
    with pytest.raises(RegraftError, match="without --dense"):
        run("other", stages.OnText(file, tmp_path / "without"))
    dense = run("dense", stages.OnText(file)).result
    other = run("other", stages.OnText(file, tmp_path / "dense")).result
    assert dense.text is not None
    assert dense.text.kl is None
    assert other.text is not None
    assert other.text.kl is not None
    assert other.text.kl.value == 0
    assert other.text.perplexity == dense.text.perplexity
    assert not (tmp_path / "other" / "text-states.safetensors").exists()
    assert result_from_json(result_to_json(other), other.answers) == other
    file.write_text("Another text.", encoding="utf-8")
    with pytest.raises(RegraftError, match="was made with something else"):
        run("other", stages.OnText(file, tmp_path / "dense"))


@pytest.mark.usefixtures("undrawn")
def test_a_run_sets_every_model_against_its_dense_one(
    pico_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    data, file = write_data(tmp_path / "data", 3), tmp_path / "text.txt"
    file.write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
model: {pico_dir("llava")}
calibration: {{data: {data}, samples: 2}}
prune: {{method: wanda, sparsity: 0.5}}
realign: [{{method: random, budget: 500, checkpoint: false}}]
evaluate: {{suite: {data}, max_new_tokens: 2, text: text.txt}}
compute: {{device: cpu}}
"""
    )
    report = pipeline.run_one(read_recipe(recipe), tmp_path / "run").runs[0]
    dense, pruned, restored = (variant.result.text for variant in report.variants)
    assert dense is not None and pruned is not None and restored is not None
    assert dense.kl is None
    assert pruned.kl is not None and restored.kl is not None
    assert pruned.kl.value > 0
    assert restored.kl.value > 0
    assert restored.kl.value != pruned.kl.value
    states = [path.parent.name for path in (tmp_path / "run").rglob("text-states.safetensors")]
    assert states == ["dense"]
    assert "| KL to dense |" in (tmp_path / "run" / "report" / "report.md").read_text()
