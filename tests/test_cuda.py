"""The same numbers on an accelerator as on the CPU; skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pico
from regraft.data.collate import prompt_batch, response_batch
from regraft.evaluation.generate import generate
from regraft.heads.score import score_heads
from regraft.importance.statistics import gather
from regraft.models.load import load_model, load_processor, open_source
from regraft.pruning.masks import Pattern
from regraft.pruning.pruner import LayerMasks, Order, prune_wanda

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def exact_matmul() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def test_heads_and_statistics(
    vlm_family: str, pico_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    source = open_source(pico_dir(vlm_family))
    processor = load_processor(source)
    examples = pico.write_examples(tmp_path, 3)
    ships, sums = {}, {}
    for device in ("cpu", "cuda"):
        model = load_model(source, device=device, dtype="float32")
        prompts = [prompt_batch(processor, examples).to(device)]
        scores = score_heads(
            model, source.anatomy, prompts, tmp_path / device, r_max=2, tokens_per_pass=512
        )
        ships[device] = torch.stack([scores.ships, scores.kl])
        sums[device] = gather(
            model, source.anatomy, [response_batch(processor, examples).to(device)]
        ).squares
    assert ships["cpu"].isfinite().any()
    torch.testing.assert_close(ships["cuda"], ships["cpu"], atol=2e-3, rtol=1e-2, equal_nan=True)
    for key, expected in sums["cpu"].items():
        torch.testing.assert_close(sums["cuda"][key], expected, rtol=2e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("order", ["sequential", "one-shot"])
def test_pruning(
    paper_family: str, order: Order, pico_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    source = open_source(pico_dir(paper_family))
    processor = load_processor(source)
    examples = pico.write_examples(tmp_path, 4, harmful=False)
    masks = {}
    for device in ("cpu", "cuda"):
        model = load_model(source, device=device, dtype="float32")
        kept = LayerMasks(tmp_path / device)
        batch = response_batch(processor, examples).to(device)
        prune_wanda(model, source.anatomy, [batch], Pattern(0.5), kept, order=order)
        masks[device] = [kept.load(layer) or {} for layer in source.anatomy.layers]
    same = total = 0
    for a, b in zip(masks["cpu"], masks["cuda"], strict=True):
        for key in a:
            same += int((a[key] == b[key]).sum())
            total += a[key].numel()
    assert same / total > 0.999, f"{total - same} of {total} mask bits differ"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_and_answers(
    paper_family: str, dtype: str, pico_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    source = open_source(pico_dir(paper_family))
    processor = load_processor(source)
    examples = pico.write_examples(tmp_path, 3)
    model = load_model(source, device="cuda", dtype=dtype)  # type: ignore[arg-type]
    weight_type = next(model.parameters()).dtype
    prompts = [prompt_batch(processor, examples).to("cuda", weight_type)]
    scores = score_heads(model, source.anatomy, prompts, tmp_path / "work", r_max=2)
    assert scores.ships.isfinite().any()
    answers = generate(
        model, processor, examples, tmp_path / "answers", max_new_tokens=4, batch_size=2
    )
    assert len(answers) == 3
