"""What regraft can do with every image-text-to-text type of the installed transformers, by trying.

For each type a tiny model with random weights is made from its default config, saved, opened,
loaded and evaluated on prompts. Its decoder is run layer by layer on the same prompts and compared
with a whole forward pass, and what pruning and restoring need is gathered from every linear:
squares of inputs and gradients. The table in docs/families.md is written by

    python tests/types_table.py --write

and says only what was found this way. With names of types, only their results are printed.
"""

from __future__ import annotations

import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import truth
from regraft.data.collate import IGNORED, Batch
from regraft.errors import RegraftError
from regraft.evaluation.greedy import answer
from regraft.models.architecture import Architecture, LinearArchitecture
from regraft.models.generation import takes_padding
from regraft.models.load import load_model, open_answering, open_source
from regraft.models.places import of_tensor
from regraft.pruning.base import PRUNERS
from regraft.pruning.gradients import layer_gradients
from regraft.pruning.statistics import gather

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- types: begin -->", "<!-- types: end -->"
TYPES = tuple(sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
VOCABULARY = 320
TOKENS = 4
_SECONDS = 90  # for one type
_MOST = 160  # characters of a reason
_WITH_IMAGE = ("blip", "blip-2", "idefics", "instructblip")  # which take no prompt without one


def _all(names: str, size: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), size)


# What is made small, by the name of the setting. Where a default is smaller it stays.
_SIZES: Mapping[str, int] = {
    **_all(
        "hidden_size d_model embed_dim projection_dim out_hidden_size text_hidden_size output_dim "
        "word_embed_proj_dim encoder_hidden_size image_text_hidden_size projector_hidden_size "
        "vision_hidden_size decoder_hidden_size patch_embed_hidden_size moe_hidden_size "
        "projector_input_dim projector_output_dim adapter_input_size adapter_in_dim "
        "adapter_out_dim codebook_dim",
        64,
    ),
    **_all(
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff mlp_dim "
        "dense_intermediate_size intermediate_size_mlp decoder_intermediate_size "
        "alignment_intermediate_size projection_intermediate_size",
        96,
    ),
    **_all(
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
        "share_expert_dim moe_shared_expert_intermediate_size "
        "shared_experts_intermediate_size",
        32,
    ),
    **_all(
        "num_attention_heads attention_heads encoder_attention_heads decoder_attention_heads "
        "num_heads swa_num_attention_heads num_sliding_attention_heads resampler_n_heads "
        "resampler_heads linear_num_heads index_n_heads linear_num_value_heads num_experts "
        "num_local_experts n_routed_experts moe_num_experts",
        4,
    ),
    **_all(
        "num_key_value_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok "
        "moe_topk moe_k resampler_depth aligner_num_add_layers conf_num_hidden_layers "
        "num_query_tokens resampler_n_latents latent_query_num",
        2,
    ),
    **_all(
        "n_group topk_group n_groups first_k_dense_replace",
        1,
    ),
    **_all(
        "head_dim swa_head_dim d_kv kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim "
        "v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim mamba_head_dim "
        "ssm_state_size index_head_dim hidden_size_per_layer_input resampler_head_dim "
        "query_pre_attn_scalar",
        16,
    ),
    **_all(
        "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
        VOCABULARY,
    ),
    "qk_head_dim": 32,
    "mamba_num_heads": 8,
    "index_topk": 8,
    "laurel_rank": 8,
    "num_position_embeddings": 64,
    "position_embedding_size": 64,
    "max_position_embeddings": 512,
    "ngram_vocab_size_base": 500,
    "codebook_size": 64,
    "num_embeddings": 64,
    "base_channels": 32,
    "mel_vocab_size": 32,
}
_LAYERS = (
    *("num_hidden_layers", "num_layers", "n_layers", "depth", "layers", "decoder_num_layers"),
    *("encoder_layers", "decoder_layers", "num_decoder_layers"),
)
_UNASKED = {  # in words, where a text prompt fails
    "instructblipvideo": "takes videos, not images",
    "pix2struct": "takes an image alone, no prompt",
    "pp_formulanet": "takes an image alone, no prompt",
    "udop": "takes the words of a page with their boxes",
    "vision-encoder-decoder": "takes an image alone, no prompt",
}
_MAP = {"<image>": 9, "<|image|>": 9, "<|extra_200|>": 10, "IMGIMGAA": 11}
_SECTIONS = {"mrope_section": [2, 3, 3]}  # of rotary embeddings, in a head of 16 features
_ROPE = {"rope_type": "default", "rope_theta": 1e4, **_SECTIONS}
_BLOCKS = {"text_config.n_layers_per_attn_res_block": 2}  # of which later layers read the input
# What default configs leave out or fix at full size, by type and dotted name.
_EXTRA: Mapping[str, Mapping[str, Any]] = {
    "chameleon": {"vocabulary_map": _MAP},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 32,
    },
    "dots3_note": {
        "text_config.per_layer_config": {
            layer: {
                **_all("num_attention_heads num_key_value_heads", 8),
                **_all("q_lora_rank kv_lora_rank qk_nope_head_dim v_head_dim qk_rope_head_dim", 16),
                "head_dim": 32,
            }
            for layer in (2, 3)
        },
    },
    "emu3": {"vocabulary_map": _MAP},
    "apertus1p5": {"image_token_offset": 100, "audio_token_offset": 164},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": _ROPE}},
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "text_config.num_experts_per_tok": 2,
    },
    "fast_vlm": {
        "vision_config.architecture": "test_efficientnet_ln",
        "vision_config.hidden_size": 256,
        "vision_config.model_args": {},
    },
    "florence2": {
        "vision_config.depths": [1, 1, 1, 1],
        "vision_config.embed_dim": [16, 32, 64, 64],
        "vision_config.num_heads": [2, 2, 4, 4],
        "vision_config.num_groups": [2, 2, 4, 4],
    },
    "muse_spark": {"audio_config.hidden_sizes": [16, 32, 32, 64]},
    "inkling_mm_model": {"vision_config.patch_size": 16},
    "blip-2": {"image_token_index": 9},
    "instructblip": {"image_token_index": 9},
    "glm5_next": {"text_config.index_topk": 16},
    "ernie4_5_vl_moe": {
        "text_config.rope_parameters.mrope_section": [3, 3, 2],
        "text_config.moe_intermediate_size": [32, 16],
    },
    "gemma3n": {
        "vision_config.architecture": "test_efficientnet_ln",
        "vision_config.hidden_size": 256,
        "text_config.layer_types": ["sliding_attention", "full_attention"] * 2,
        "text_config.num_kv_shared_layers": 2,
    },
    "glm4v_moe": {"text_config.rope_parameters.mrope_section": [1, 1, 2]},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [0, 1, 2, 3],
        "downsample_rate": "4/8",
    },
    "hunyuan_vl": {"text_config.head_dim": 16},
    "mistral4": {"head_dim": 32},
    "mllama": {"text_config.cross_attention_layers": [1]},  # which no model ends with
    "inkling2": _BLOCKS,
    "inkling2_loop": _BLOCKS
    | {"text_config.loop_layer_index_start": 2, "text_config.loop_layer_index_end": 4},
    "molmo2": {"adapter_config.vision_feature_layer": [0, 1]},
    "perception_lm": {
        "vision_config.architecture": "test_vit",
        "vision_config.model_args": {"embed_dim": 64, "img_size": [64, 64], "global_pool": ""},
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 12},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 12},
    "step3p7": {"text_config.sliding_window": 16},
    "qwen4_exp": {
        f"text_config.indexer_{name}": size
        for name, size in {
            "n_heads": 4,
            "kv_heads": 1,
            "head_dim": 16,
            "budget": 16,
            "compress_ratio": 4,
        }.items()
    },
}


@dataclass(frozen=True)
class Row:
    """The results for one type: empty fields for success, otherwise the reason."""

    name: str
    kind: str
    evaluates: str
    prunes: str
    heads: str

    def markdown(self) -> str:
        """A line of the table."""
        cells = (self.evaluates or "yes", self.prunes or "yes", self.heads or "yes")
        return f"| `{self.name}` | {' | '.join(cells)} |"


def tiny(kind: str, *, derive: bool) -> Any:
    """The default config of a type, made small.

    Args:
        kind: The type.
        derive: Leave out what is listed layer by layer, so that the class makes it for fewer
            layers; otherwise keep the entries of the first layers that differ.
    """
    config = CONFIG_MAPPING[kind]
    settings = _small(config().to_dict(), derive)
    for name, value in _EXTRA.get(kind, {}).items():
        *path, last = name.split(".")
        block = settings
        for part in path:
            block = block.setdefault(part, {})
        block[last] = value
    settings.pop("transformers_version", None)
    return config.from_dict(settings)


def _small(settings: Mapping[str, Any], derive: bool) -> dict[str, Any]:
    deep = next((settings[n] for n in _LAYERS if isinstance(settings.get(n), int)), 0)
    kept = _kept_layers(settings, deep, derive)
    small: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            small[name] = _small(value, derive)
            if name == "rope_parameters" and "text" not in value:
                small[name] |= _SECTIONS if value.get("rope_type") == "default" else {}
        elif isinstance(value, list) and deep and len(value) == deep:
            small |= {} if derive else {name: [value[i] for i in kept]}
        elif type(value) is not int or not isinstance(name, str):  # Aria has a number as a name
            small[name] = value
        elif name in _LAYERS:
            small[name] = len(kept) if value == deep else min(value, len(kept))
        elif name in _SIZES:
            small[name] = min(value, _SIZES[name])
        elif name.endswith(("token_id", "token_index", "image_id")) and value >= VOCABULARY:
            small[name] = 200 + value % 97
        else:
            small[name] = value
    if settings.get("num_key_value_heads") == settings.get("num_attention_heads"):
        small |= {"num_key_value_heads": 4} if "num_key_value_heads" in small else {}
    small.pop("per_layer_config", None)
    return small


def _kept_layers(settings: Mapping[str, Any], deep: int, derive: bool) -> list[int]:
    listed = [v for v in settings.values() if isinstance(v, list) and deep and len(v) == deep]
    if derive or not listed:
        return list(range(min(deep, 6 if listed else 4)))
    kinds: dict[str, int] = {}
    for layer in range(deep):
        kinds.setdefault(repr([one[layer] for one in listed]), layer)
    kept = sorted(kinds.values())[:6]
    kept += [layer for layer in range(deep) if layer not in kept][: max(0, 4 - len(kept))]
    return sorted(kept)


class Ids:
    """A tokenizer whose words are token ids."""

    pad_token_id = 0
    eos_token_id = None

    def batch_decode(self, rows: Sequence[Sequence[int]], **_: Any) -> list[str]:
        """Ids in decimals, padding behind the answer removed."""
        return [" ".join(map(str, row)).removesuffix(" 0" * row.count(0)) for row in rows]


def saved(kind: str, folder: Path) -> str:
    """Write a tiny checkpoint of a type, with weights that make answers differ.

    Returns:
        Why its own `generate` does not answer; empty if it does.
    """
    name, model, reason = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind], None, ""
    for derive in (True, False):
        try:
            torch.manual_seed(0)
            model = getattr(transformers, name)(tiny(kind, derive=derive)).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(0, 0.12)
            if isinstance(model, transformers.GenerationMixin):
                given = prompts(kind, model.config)[0]
                model.generate(**given, max_new_tokens=1, do_sample=False)
            reason = ""
            break
        except Exception as error:
            reason = f"no: {_UNASKED[kind]}" if kind in _UNASKED else _reason(error, folder)
    if model is None:
        raise RuntimeError(reason)
    model.save_pretrained(folder)
    return reason


def prompts(kind: str, config: Any) -> list[dict[str, torch.Tensor]]:
    """Three prompts of different lengths as one batch, then each alone; with images if need be."""
    if kind in _WITH_IMAGE:
        seeing = _with_image(kind, config)
        return [seeing, *({n: t[i : i + 1] for n, t in seeing.items()} for i in range(3))]
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(20, 60, (n,), generator=generator) for n in (7, 11, 4)]
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(width - len(r)).long(), r]) for r in rows])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    alone = [
        {"input_ids": row[None], "attention_mask": torch.ones(1, len(row)).long()} for row in rows
    ]
    return [batch, *alone]


def _with_image(kind: str, config: Any) -> dict[str, torch.Tensor]:
    """Three prompts of one length with an image each, as the processor would return them."""
    generator = torch.Generator().manual_seed(1)
    size = config.vision_config.image_size
    pixels = torch.rand(3, 3, size, size, generator=generator)
    ids = torch.randint(20, 60, (3, 8), generator=generator)
    if kind in ("blip-2", "instructblip"):
        places = torch.full((3, config.num_query_tokens), config.image_token_index)
        ids = torch.cat([places, ids], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if kind == "kosmos-2":
        inputs["image_embeds_position_mask"] = torch.zeros_like(ids)
        inputs["image_embeds_position_mask"][:, : config.latent_query_num] = 1
    if kind == "instructblip":
        inputs |= {f"qformer_{name}": inputs[name] for name in ("input_ids", "attention_mask")}
    if kind == "idefics":
        inputs["pixel_values"] = pixels[:, None]
        inputs["image_attention_mask"] = torch.ones(3, ids.shape[1], 1)
    return inputs


def look(kind: str) -> Row:
    """Make, load, evaluate and describe one type."""
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        try:
            with _in_time():
                reason = saved(kind, folder)
        except (RuntimeError, TimeoutError) as error:
            reason = str(error)
            return Row(kind, name, reason, reason, "no")
        loaded: list[Any] = []
        evaluates = reason or _evaluates(kind, folder, loaded)
        return Row(kind, name, evaluates, *_prunes(kind, folder, loaded))


def _evaluates(kind: str, folder: Path, loaded: list[Any]) -> str:
    """Why it cannot be evaluated; the model is put into `loaded` if it loads."""
    try:
        with _in_time():
            source = open_answering(folder)
            model = load_model(source, device="cpu")  # which compares weights with the file's
            loaded.append(model)
            batch, *alone = prompts(kind, source.config)
            together = answer(model, Ids(), batch, TOKENS)
            each = [answer(model, Ids(), one, TOKENS)[0] for one in alone]
    except Exception as error:
        return _reason(error, folder)
    if not all(0 < len(one.split()) <= TOKENS for one in each):
        return "no: answers of another length than asked for"
    if takes_padding(model) and together != each:
        return "no: padding changes its answers"
    return "" if takes_padding(model) else "yes, prompt by prompt"


def _prunes(kind: str, folder: Path, loaded: Sequence[Any]) -> tuple[str, str]:
    """Why it cannot be pruned and restored, and why heads cannot be scored."""
    try:
        with _in_time():
            source = open_source(folder)
            model = loaded[0] if loaded else load_model(source, device="cpu")
    except Exception as error:
        return _reason(error, folder), "no"
    heads = _heads(source.architecture)
    try:
        with _in_time():
            seeing = kind in (*_WITH_IMAGE, "kosmos-2")
            config = source.config
            inputs = _with_image(kind, config) if seeing else prompts(kind, config)[0]
            unmoved = calibrated(model, source.architecture, inputs, folder)
    except Exception as error:
        if kind in _UNASKED:
            return f"by magnitude; with data not tried: {_UNASKED[kind]}", "no"
        return f"by magnitude only{_reason(error, folder)[2:]}", "no"
    return f"yes; not by gradients (SNIP) {', '.join(unmoved)}" if unmoved else "", heads


def _heads(architecture: Architecture) -> str:
    """Which layers have heads that can be scored, and why the others have none."""
    count = sum(1 for layer in architecture.layers if layer.heads)
    of = len(architecture.layers)
    if count == of:
        return ""
    return _cut(f"{f'{count} of {of} layers' if count else 'no'}: {architecture.headless}")


@torch.no_grad()
def calibrated(
    model: Any, architecture: Architecture, inputs: Mapping[str, torch.Tensor], folder: Path
) -> list[str]:
    """Run what pruning and restoring need from calibration data, and compare it with a whole pass.

    Returns:
        Names within layers of linears that have no gradient.

    Raises:
        AssertionError: a layer's input differs, or a linear outside of experts was not reached.
    """
    labels = inputs["input_ids"].clone()
    labels[:, : -TOKENS + 1] = IGNORED
    batch = Batch(inputs, labels, tuple(map(str, range(len(labels)))))
    batch_pass = truth.layerwise(model, [batch])
    whole, real = truth.full_forward(model, inputs), inputs["attention_mask"].bool()
    for index in range(len(architecture.layers) + 1):
        found, wanted = batch_pass.states[0], whole.entering.get(index)
        if index == len(architecture.layers):
            wanted = whole.final
        if wanted is not None:  # Mllama skips layers without an image
            if found.shape[:2] == real.shape:
                found, wanted = found[real], wanted[real]
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5), f"layer {index} differs"
        if index < len(architecture.layers):
            batch_pass.run_layer(index, lambda _: None)
    wanda = PRUNERS.get("wanda")
    layerwise = truth.layerwise(model, [batch])
    known = gather(layerwise, architecture, wanda, folder / "wanda", lambda _: None)
    gradients: dict[str, torch.Tensor] = {}
    with torch.enable_grad():
        layerwise.rewind()
        for _, found in layer_gradients(
            layerwise, architecture, folder / "gradients", lambda _: True, lambda _: None
        ):
            gradients |= found
    ran = [li for li in architecture.linears if li.expert is None and li.layer in whole.entering]
    for linear, wanted in whole_gradients(model, ran, batch).items():
        found = gradients.get(linear.key, torch.zeros_like(wanted))
        largest = float(wanted.abs().max())
        same = torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * largest + 1e-9)
        assert same, f"the gradient of {linear.key} differs"
    missing = [linear.key for linear in ran if linear.key not in known]
    assert not missing, f"nothing is known of {missing}"
    return list(dict.fromkeys(li.name for li in ran if li.key not in gradients))


@torch.enable_grad()
def whole_gradients(
    model: Any, linears: Sequence[LinearArchitecture], batch: Batch
) -> dict[LinearArchitecture, torch.Tensor]:
    """Gradients of a batch's mean loss, by autograd on the whole model; 0 if there is none."""
    held = {li: model.get_parameter(f"{li.module}.{li.parameter}") for li in linears}
    for weight in held.values():
        weight.requires_grad_()
    labels = batch.labels
    assert labels is not None
    logits = model(**batch.inputs, use_cache=False).logits[:, -labels.shape[1] :]
    losses = [cross_entropy(a[:-1], b[1:]) for a, b in zip(logits.float(), labels, strict=True)]
    weights = list(held.values())
    parts = torch.autograd.grad(torch.stack(losses).mean(), weights, materialize_grads=True)
    for weight in weights:
        weight.requires_grad_(False)
    return {li: of_tensor(part, li.held, li.shape) for li, part in zip(held, parts, strict=True)}


def _reason(error: Exception, folder: Path) -> str:
    """The first line of an error as a cell of the table."""
    text = " ".join(str(error).split())
    if isinstance(error, ImportError) and (package := re.search(r"pip install (\w+)", text)):
        return f"not tried: needs {package[1]}"
    text = text.replace(f"{folder}/", "").replace(f"{folder}: ", "").replace(str(folder), "it")
    text = text if isinstance(error, RegraftError) else f"{type(error).__name__}: {text}"
    text = text.split(": it gives")[0].split(". ")[0].replace("|", "\\|").rstrip(".")
    return f"no: {_cut(text)}"


def _cut(text: str) -> str:
    """Text cut to at most `_MOST` characters, at the end of a clause."""
    if len(text) <= _MOST:
        return text
    ends = [text.rfind(one, 0, _MOST) for one in ("; ", ": ", ", ", " (")]
    end = ends[0] if ends[0] > 0 else max(ends)
    head = text[: end if end > 0 else _MOST]
    return head + ")" * (head.count("(") - head.count(")"))


@contextmanager
def _in_time() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {_SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def table(rows: Sequence[Row]) -> str:
    """The table and its totals, for the page."""
    evaluate, prune, heads = (
        [not cell.startswith("no") for cell in column]
        for column in zip(*((row.evaluates, row.prunes, row.heads) for row in rows), strict=True)
    )
    by_data = sum((row.prunes or "yes").startswith("yes") for row in rows)
    lines = [
        f"Of the {len(rows)} types of transformers {transformers.__version__}, {sum(evaluate)} "
        f"evaluate; {sum(prune)} prune, {by_data} of them by calibration data; {sum(heads)} have "
        "heads that are scored.",
        "",
        "| Type | Evaluates | Prunes, ranks, restores | Scores heads (HSR) |",
        "|---|---|---|---|",
        *(row.markdown() for row in rows),
    ]
    return "\n".join(lines)


def main(words: Sequence[str]) -> None:
    """Print the results of the named types, or of all and write the page."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = []
    for kind in [word for word in words if word != "--write"] or TYPES:
        rows.append(look(kind))
        print(rows[-1].markdown(), flush=True)
    if "--write" in words:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
