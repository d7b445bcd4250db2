"""The same numbers on a GPU as on the CPU.

Without a GPU they run on a pretended device, which finds tensors left on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pico
import pico_today
import pretended
import truth
from disk import write_data
from methods import method
from regraft import stages
from regraft.data.collate import prompt_batch, response_batch
from regraft.evaluation.generate import generate
from regraft.heads.score import score_heads
from regraft.heads.ships import HeadSettings
from regraft.models.layerwise import LayerwisePass
from regraft.models.load import (
    Placement,
    load_model,
    load_placed,
    load_processor,
    open_source,
)
from regraft.pruning.base import PRUNERS, prune_settings
from regraft.pruning.masks import Pattern, assign_patterns
from regraft.pruning.prune import LayerPruning
from regraft.pruning.results import LayerResults
from regraft.pruning.statistics import gather
from regraft.restoration.methods.gain import method as gaining
from regraft.settings.compute import ComputeSettings
from regraft.settings.data import CalibrationSettings
from test_families import TODAY

_ALIKE = ("qwen2_vl", "llava_next-vicuna", "llava_next-llama3")  # to others, for a device


@pytest.fixture(name="accelerator")
def _accelerator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if torch.cuda.is_available():
        return "cuda"
    if "paper_family" in request.fixturenames and request.getfixturevalue("paper_family") in _ALIKE:
        pytest.skip("a device is pretended: one family of each kind is enough there")
    return pretended.device(monkeypatch)


@pytest.fixture(autouse=True)
def exact_matmul() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def test_operands_on_two_devices_are_refused(accelerator: str) -> None:
    here, there = torch.ones(2), torch.ones(2, device=accelerator)
    with pytest.raises(RuntimeError, match="device"):
        here + there
    with pytest.raises(RuntimeError, match="device"):
        there[torch.tensor([0, 1])] = here
    with pytest.raises(TypeError):
        there.numpy()
    assert (here.to(accelerator) + there).tolist() == [2, 2]


def test_heads_and_statistics(
    vlm_family: str, accelerator: str, pico_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    source = open_source(pico_dir(vlm_family))
    processor = load_processor(source)
    examples = pico.write_examples(tmp_path, 3)
    ships, sums = {}, {}
    for device in ("cpu", accelerator):
        model = load_model(source, device=device, dtype="float32")
        prompts = [prompt_batch(processor, examples).to(device)]
        scores = score_heads(
            model,
            source.architecture,
            prompts,
            tmp_path / device,
            HeadSettings(r_max=2, tokens_per_pass=512),
        )
        ships[device] = torch.stack([scores.ships, scores.kl])
        layerwise = LayerwisePass(truth.resident(model), [response_batch(processor, examples)])
        work = tmp_path / f"statistics-{device}"
        sums[device] = gather(
            layerwise, source.architecture, PRUNERS.get("wanda"), work, lambda _: None
        )
    assert ships["cpu"].isfinite().any()
    torch.testing.assert_close(
        ships[accelerator], ships["cpu"], atol=2e-3, rtol=1e-2, equal_nan=True
    )
    for key, expected in sums["cpu"].items():
        torch.testing.assert_close(sums[accelerator][key], expected, rtol=2e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("placement", ["resident", "streamed"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "snip"])
def test_pruning(
    paper_family: str,
    method: str,
    placement: Placement,
    accelerator: str,
    pico_dir: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source = open_source(pico_dir(paper_family))
    processor = load_processor(source)
    batch = response_batch(processor, pico.write_examples(tmp_path, 4, harmful=False))
    zeros = {}
    for device in ("cpu", accelerator):
        model = load_placed(source, dtype="float32", device=device, placement=placement)
        results = LayerResults(tmp_path / device)
        LayerPruning(
            prune_settings(method),
            source,
            LayerwisePass(model, [batch]),
            assign_patterns(source.architecture.linears, Pattern(0.5)),
            results,
        ).run()
        edits = results.edits(source.architecture)
        zeros[device] = torch.cat(
            [
                edits[li.tensor](source.checkpoint.read(li.tensor)).flatten() == 0
                for li in source.architecture.linears
            ]
        )
    same = (zeros["cpu"] == zeros[accelerator]).float().mean()
    assert same > 0.995, f"{100 * (1 - same):.2f} % of the mask differs"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_and_answers(
    paper_family: str,
    dtype: str,
    accelerator: str,
    pico_dir: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source = open_source(pico_dir(paper_family))
    processor = load_processor(source)
    examples = pico.write_examples(tmp_path, 3)
    model = load_model(source, device=accelerator, dtype=dtype)  # type: ignore[arg-type]
    weight_type = next(model.parameters()).dtype
    prompts = [prompt_batch(processor, examples).to(accelerator, weight_type)]
    scores = score_heads(
        model, source.architecture, prompts, tmp_path / "work", HeadSettings(r_max=2)
    )
    assert scores.ships.isfinite().any()
    assert scores.noise is not None and (scores.noise > 0).any()
    answers = generate(
        model, processor, examples, tmp_path / "answers", max_new_tokens=4, batch_size=2
    )
    assert len(answers) == 3


@pytest.mark.parametrize("placement", ["resident", "streamed"])
def test_gain(
    paper_family: str,
    placement: Placement,
    accelerator: str,
    pico_dir: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first step restores nearly the same weights as on the CPU: near-ties may swap."""
    monkeypatch.setattr(gaining, "MOST_STEPS", 2)  # the second is of an edited model
    if accelerator == pretended.NAME and placement == "resident":
        pytest.skip("a device is pretended: a streamed model moves more there")
    dense = open_source(pico_dir(paper_family))
    pruned, _ = truth.pruned_at_random(dense, tmp_path / "pruned", 0.5)
    write_data(tmp_path, 8)
    calibration = CalibrationSettings(data=f"jsonl:{tmp_path / 'data.jsonl'}", samples=4)  # type: ignore[arg-type]
    settings = method(method="gain")
    chosen = {}
    ways = [("cpu", "float32"), (accelerator, "float32")]
    ways += [("cuda", "bfloat16")] if accelerator == "cuda" else []
    for device, dtype in ways:
        found = stages.write_ranking(
            stages.Setup(
                dense,
                calibration,
                ComputeSettings(
                    device=device,
                    dtype=dtype,  # type: ignore[arg-type]
                    batch_size=2,
                    placement=placement,
                ),
            ),
            pruned,
            tmp_path / f"{device}-{dtype}.safetensors",
            settings,
        )
        chosen[device, dtype] = found
    exact, again = chosen["cpu", "float32"], chosen[accelerator, "float32"]
    steps = [one.about["steps"][0] for one in (exact, again)]
    count = min(step["restored"] for step in steps)
    assert count > 10
    one, other = (
        set(zip(found.linear.tolist(), found.position.tolist(), strict=True))
        for found in (exact.first(count), again.first(count))
    )
    assert len(one & other) > 0.8 * count
    assert again.about["start"] == pytest.approx(exact.about["start"], rel=0.01)
    assert steps[1]["gradient"] == pytest.approx(steps[0]["gradient"], rel=0.01)
    assert all(map(len, chosen.values()))


@pytest.mark.parametrize("family", TODAY)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_families_of_today(
    family: str, accelerator: str, pico_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """Experts, linear attention and layers' further inputs are on the device too."""
    source = open_source(pico_dir(family))
    processor = load_processor(source)
    examples = pico.write_examples(tmp_path, 3)
    if family not in pico_today.VLM:
        examples = [replace(one, image=None) for one in examples]
    # indexers choose tokens, which has no gradient
    linears = [li for li in source.architecture.linears if "indexer" not in li.name]
    model = load_placed(source, dtype="float32", device=accelerator, placement="streamed")
    LayerPruning(
        prune_settings("snip"),
        source,
        LayerwisePass(model, [response_batch(processor, examples)]),
        assign_patterns(linears, Pattern(0.5)),
        LayerResults(tmp_path / "pruned"),
    ).run()
    whole = load_model(source, device=accelerator, dtype="float32")
    answers = generate(
        whole, processor, examples, tmp_path / "answers", max_new_tokens=3, batch_size=2
    )
    assert len(answers) == 3
