"""The documentation's table of all types matches what trying them gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import transformers as T  # noqa: N812
from torch import Tensor

import pico
import truth
import types_table
from regraft.data.collate import Batch
from regraft.errors import RegraftError
from regraft.evaluation.greedy import answer
from regraft.models.architecture import text_decoder
from regraft.models.load import load_model, open_answering, open_source
from test_families import assert_patched_alike

COMMITTED = types_table.PAGE.read_text(encoding="utf-8")
OF_THE_PAGE = f"transformers {transformers.__version__}," in COMMITTED


def test_the_page_has_every_type_of_its_version() -> None:
    block = COMMITTED.partition(types_table.BEGIN)[2].partition(types_table.END)[0]
    stated = re.search(r"Of the (\d+) types of transformers (\S+), (\d+) evaluate", block)
    assert stated and int(stated[3]) >= 85
    rows = re.findall(r"^\| `(\S+)` \| (.+?) \|", block, re.MULTILINE)
    assert len(rows) == int(stated[1])
    assert sum(cell.startswith("yes") for _, cell in rows) == int(stated[3])
    if stated[2] == transformers.__version__:
        assert [name for name, _ in rows] == list(types_table.TYPES)


@pytest.mark.slow
def test_the_page_says_what_is_found() -> None:
    if not OF_THE_PAGE:
        pytest.skip(f"the page is of another version than transformers {transformers.__version__}")
    transformers.logging.set_verbosity_error()
    rows = [types_table.look(kind) for kind in types_table.TYPES]
    tried = [row for row in rows if not row.evaluates.startswith("not tried")]  # for want of timm
    missing = [row.name for row in tried if row.markdown() not in COMMITTED]
    assert missing == [], "regenerate the page: python tests/types_table.py --write"
    if len(tried) == len(rows):
        assert types_table.table(rows) in COMMITTED


# One of each kind of cache: all keys and values, a window, a recurrence, convolutions, shared keys,
# experts, an encoder, a `generate` of its own.
KINDS = (
    *("llava", "gemma3", "qwen3_5", "lfm2_vl", "gemma4", "qwen3_vl_moe", "t5gemma2", "kosmos-2"),
)


@torch.no_grad()
def most_likely(model: Any, ids: Tensor, count: int) -> list[int]:
    """Greedy decoding by whole passes without a cache."""
    own, encodes = model.generation_config, model.config.is_encoder_decoder
    start = own.bos_token_id if own.decoder_start_token_id is None else own.decoder_start_token_id
    found, written = torch.tensor([[start]]) if encodes else ids, []
    part = getattr(model, "text_model", model)  # Kosmos-2 as a whole wants an image
    for _ in range(count):
        given = {"input_ids": ids, "decoder_input_ids": found} if encodes else {"input_ids": found}
        logits = part(**given, attention_mask=torch.ones_like(given["input_ids"]), use_cache=False)
        written.append(int(logits.logits[0, -1].argmax()))
        found = torch.cat([found, torch.tensor([written[-1:]])], dim=1)
    return written


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_most_likely_tokens(kind: str, tmp_path: Path) -> None:
    """Also if the checkpoint's config samples, penalises repetition and stops early."""
    reason = types_table.saved(kind, tmp_path / "model")
    if reason and kind == "kosmos-2" and not OF_THE_PAGE:  # 5.15 to 5.17: with an image only
        pytest.skip(f"transformers {transformers.__version__}: {reason}")
    assert reason == ""
    model = load_model(open_answering(tmp_path / "model"), device="cpu")
    for part in (model, *model.modules()):
        if (config := getattr(part, "generation_config", None)) is not None:
            config.update(do_sample=True, repetition_penalty=5.0, max_length=3)
            config.eos_token_id = None
    _, *alone = types_table.prompts(kind, model.config)
    for one in alone:
        (found,) = answer(model, types_table.Ids(), one, types_table.TOKENS)
        expected = most_likely(model, one["input_ids"], types_table.TOKENS)
        assert found.split() == [str(token) for token in expected]


# Layer by layer


@pytest.mark.parametrize(
    "kind",
    # a language model inside that makes the logits, latent attention, several states a token
    ["blip-2", "kimi_k25", "gemma4"],
)
def test_layers_one_by_one_are_the_whole_model(kind: str, tmp_path: Path) -> None:
    assert types_table.saved(kind, tmp_path / "model") == ""
    assert types_table._prunes(kind, tmp_path / "model", [])[0] == ""


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (T.BloomForCausalLM, T.BloomConfig(n_head=4)),  # layers in `h`
        (T.MptForCausalLM, T.MptConfig(n_heads=4, d_model=64)),  # `blocks`
        (T.BertLMHeadModel, T.BertConfig(is_decoder=True, intermediate_size=96)),  # `layer`
        (T.RwkvForCausalLM, T.RwkvConfig()),  # three outputs of a layer
    ],
)
def test_lists_of_layers_have_several_names(build: Any, settings: Any, tmp_path: Path) -> None:
    small = {"vocab_size": 320, "hidden_size": 64, "num_attention_heads": 4}
    torch.manual_seed(0)
    settings.update(small | {"num_hidden_layers": 3, "initializer_range": 0.12})
    build(settings).save_pretrained(tmp_path / "dense")
    source = open_source(tmp_path / "dense")
    inputs = types_table.prompts("", source.config)[0]
    model = load_model(source, device="cpu")
    assert types_table.calibrated(model, source.architecture, inputs, tmp_path) == []
    assert_patched_alike(tmp_path)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("t5gemma2", "reads prompts with an encoder"),
        ("inkling2_loop", "Layer 2 of .* runs more than once"),
    ],
)
def test_what_cannot_be_calibrated_is_pruned_by_magnitude(
    kind: str, why: str, tmp_path: Path
) -> None:
    """The reason is given before any layer runs; weights are found, pruned and restored."""
    if kind not in types_table.TYPES:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    assert types_table.saved(kind, tmp_path / "dense") == ""
    source = open_source(tmp_path / "dense")
    model, batch = load_model(source), Batch(types_table.prompts(kind, source.config)[0], None, ())
    with (
        truth.unchanged(model),
        pytest.raises(RegraftError, match=f"{why}.* Prune by magnitude and restore at random"),
    ):
        truth.layerwise(model, [batch])
    assert_patched_alike(tmp_path)


def test_layers_that_run_twice_are_refused(tmp_path: Path) -> None:
    model = load_model(open_source(pico.save("llama", tmp_path / "llama")))
    layers = text_decoder(model).layers
    layers[2] = layers[1]
    batch = Batch({"input_ids": torch.arange(20, 28)[None]}, None, ("a",))
    with pytest.raises(RegraftError, match="Layer 1 of LlamaForCausalLM runs more than once"):
        truth.layerwise(model, [batch])
