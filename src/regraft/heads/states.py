"""Last-token states of a model with one head ablated, for all heads, saved layer by layer.

There is one file per layer and batch, so a killed run loses at most the layer it was running.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor, nn

from regraft import distributed
from regraft.data.collate import Batch
from regraft.disk.artifact import load_unfinished, save_unfinished
from regraft.errors import RegraftError
from regraft.heads.ships import HeadSettings, head_outputs, kl_divergence, replay_ablated
from regraft.models.architecture import Architecture, LayerArchitecture, cross_attention_layers
from regraft.models.key_values import last_token_replay, record
from regraft.models.load import placed
from regraft.models.placement import free_bytes
from regraft.models.replay import Replay, logits_of, text_inputs
from regraft.models.window import most_attended, window_at, window_replay
from regraft.progress import Advance, expect

CPU_TOKENS = 16384  # per pass on CPU, where no device memory sets a limit
MOST_TOKENS = 262144  # per pass; more is not faster


@dataclass(frozen=True)
class States:
    """The files of all batches, one folder each."""

    folders: tuple[Path, ...]

    def base(self) -> Tensor:
        """Last-token states of the unablated model, `[N, d]` float32."""
        return torch.cat([load_unfinished(_base_file(folder))["base"] for folder in self.folders])

    def layer(self, index: int) -> dict[str, Tensor] | None:
        """Read one layer; None if it was not requested or did not run in every batch.

        Returns:
            Over N samples and h ablated heads, float32 on CPU: `ablated`, states `[h, N, d]` of the
            last prompt token after the final norm, and `kl`, the divergence from the unablated
            model, `[h, N]`. Unless the model is in float32, `jittered` `[N, d]` and `jittered_kl`
            `[N]` are the same for the unablated model with this layer's input rounded once more.
        """
        files = [_layer_file(folder, index) for folder in self.folders]
        if not all(file.exists() for file in files):
            return None
        parts = [load_unfinished(file) for file in files]
        if any("ablated" not in part for part in parts):
            return None
        sample_dims = {"ablated": 1, "kl": 1, "jittered": 0, "jittered_kl": 0}
        return {n: torch.cat([part[n] for part in parts], sample_dims[n]) for n in parts[0]}


def ablate_heads(
    model: nn.Module,
    architecture: Architecture,
    batches: Sequence[Batch],
    folder: Path,
    how: HeadSettings,
    heads: Mapping[int, Sequence[int]],
    advance: Advance,
) -> States:
    """Run every batch with each of `heads` ablated; layers already in `folder` are not run again.

    Args:
        model: The dense model, left as it was.
        batches: Prompts that end where the answer starts.
        how: How a head is ablated. "screened" recomputes only `window` positions of a prompt; all
            others keep their keys and values.
        heads: Layer -> its heads to ablate; other layers are not run.
        advance: Called for each layer of each batch with samples times `layers_run`.

    Raises:
        RegraftError: states overflow in the model's dtype.
    """
    folders = tuple(folder / f"batch_{i:05d}" for i in range(len(batches)))
    for batch, target in distributed.share(tuple(zip(batches, folders, strict=True))):
        missing = {
            layer.index: heads[layer.index]
            for layer in architecture.layers
            if heads.get(layer.index) and not _layer_file(target, layer.index).exists()
        }
        done = {index: chosen for index, chosen in heads.items() if index not in missing}
        expect(advance, -len(batch.ids) * layers_run(architecture, done))
        if missing or not _base_file(target).exists():
            _run_batch(model, architecture, placed(batch, model), target, how, missing, advance)
    distributed.barrier()
    return States(folders)


@torch.no_grad()
def _run_batch(
    model: nn.Module,
    architecture: Architecture,
    batch: Batch,
    folder: Path,
    how: HeadSettings,
    heads: Mapping[int, Sequence[int]],
    advance: Advance,
) -> None:
    run = _Run.start(model, batch, how)
    if not _base_file(folder).exists():
        _save(_base_file(folder), {"base": run.base})
    for index, chosen in heads.items():
        hidden = run.entering.get(index)
        states = {}
        if hidden is not None:  # Mllama skips its cross-attention without an image
            tokens = how.tokens_per_pass or tokens_that_fit(architecture, hidden)
            states = run.ablated(architecture.layers[index], hidden, chosen, tokens)
            if hidden.dtype in (torch.bfloat16, torch.float16):
                seed = crc32(f"{folder.name} {index}".encode())
                states |= run.jittered(index, hidden, seed)
        if not all(torch.isfinite(tensor).all() for tensor in states.values()):
            raise RegraftError(
                f"Hidden states overflow in this dtype (layer {index}). "
                "Use --dtype bfloat16 or float32."
            )
        _save(_layer_file(folder, index), states)
        advance(len(batch.ids) * layers_run(architecture, {index: chosen}))


def layers_run(architecture: Architecture, heads: Mapping[int, Sequence[int]]) -> int:
    """Number of layer runs for one prompt: each ablated head reruns its own layer and all after."""
    return sum(len(own) * (len(architecture.layers) - index) for index, own in heads.items())


@dataclass(frozen=True)
class _Run:
    """One batch's run of the unablated model, and how to replay parts of it."""

    model: nn.Module
    how: HeadSettings
    replay: Replay
    entering: Mapping[int, Tensor]  # [B, T, d]
    base: Tensor  # [B, d]
    logits: Tensor  # [B, vocabulary]

    @classmethod
    def start(cls, model: nn.Module, batch: Batch, how: HeadSettings) -> _Run:
        text = text_inputs(model, batch.inputs)
        if how.mode == "screened":
            recorded = record(model, text)
            window = window_at(model, recorded, most_attended(model, recorded, how.window))
            run, entering, final = window_replay(model, window), window.entering, window.final
        else:
            recorded = record(model, text, cross_attention_layers(model))
            run = last_token_replay(model, text, recorded.known)
            entering, final = recorded.entering, recorded.final
        base = final[:, -1].contiguous()  # rows are padded on the left
        return cls(model, how, run, entering, base, logits_of(model, base))

    def ablated(
        self, layer: LayerArchitecture, hidden: Tensor, heads: Sequence[int], tokens: int
    ) -> dict[str, Tensor]:
        """Last-token states `[h, B, d]` and KL `[h, B]` with each head ablated."""
        model, index, how = self.model, layer.index, self.how
        outputs = head_outputs(
            model, self.replay, index, hidden, layer.head_dim, target=how.target, eps=how.eps
        )
        copies = max(1, tokens // (hidden.shape[0] * hidden.shape[1]))
        states = torch.cat(
            [
                # a copy, as a view keeps all T positions of every chunk in memory
                replay_ablated(model, self.replay, index, hidden, outputs, chunk)[:, :, -1].clone()
                for chunk in even_chunks(heads, copies)
            ]
        )
        return {"ablated": states, "kl": kl_divergence(self.logits, logits_of(model, states))}

    def jittered(self, index: int, hidden: Tensor, seed: int) -> dict[str, Tensor]:
        """Last-token states `[B, d]` and KL `[B]` with this layer's input rounded once more."""
        states = self.replay(start=index, hidden=rounded_again(hidden, seed))[:, -1].contiguous()
        kl = kl_divergence(self.logits, logits_of(self.model, states))
        return {"jittered": states, "jittered_kl": kl}


def rounded_again(hidden: Tensor, seed: int) -> Tensor:
    """`hidden * (1 + u)` in its dtype, with u uniform in +-half of the dtype's epsilon."""
    generator = torch.Generator(hidden.device).manual_seed(seed)
    uniform = torch.rand(hidden.shape, generator=generator, device=hidden.device) - 0.5
    eps = torch.finfo(hidden.dtype).eps
    return (hidden.float() * (1 + eps * uniform)).to(hidden.dtype)


def tokens_that_fit(architecture: Architecture, hidden: Tensor) -> int:
    """How many tokens of a pass fit in half of the free memory, beside a batch `[B, S, d]`.

    Counts what a decoder layer keeps per token: the outputs of its linears, the MLP's product,
    some hidden states, repeated keys and values, and the token's row of the attention mask.
    """
    device = hidden.device
    if device.type != "cuda":
        return CPU_TOKENS
    widths = [sum(li.shape[0] for li in layer.linears) for layer in architecture.layers]
    widest = max(li.shape[0] for li in architecture.linears)
    repeated = max(2 * layer.heads * layer.head_dim for layer in architecture.layers)
    numbers = max(widths) + widest + repeated + 6 * architecture.hidden_size + 2 * hidden.shape[1]
    return max(1, min(MOST_TOKENS, int(free_bytes(device) / 2 / (numbers * hidden.element_size()))))


def even_chunks(heads: Sequence[int], size: int) -> list[Sequence[int]]:
    """Split heads into even chunks of at most `size`."""
    size = math.ceil(len(heads) / math.ceil(len(heads) / size))
    return [heads[start : start + size] for start in range(0, len(heads), size)]


def _base_file(folder: Path) -> Path:
    return folder / "base.safetensors"


def _layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer:03d}.safetensors"


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_unfinished(path, {name: t.float().cpu().contiguous() for name, t in tensors.items()})
