"""Ships and KL (Zhou et al. 2025, arXiv 2410.13708): how much ablating a head changes a model.

    M  = states of the last token of N harmful prompts, after the final norm     [N, d]
    U  = the first r_max left singular vectors of M                              [N, r_max]
    p  = the next token's distribution
    for each layer, for each of its heads h:
        M_h, U_h, p_h = the same with h's query, key and value scaled by eps
        Ships_h = sum of the principal angles between U and U_h
        KL_h    = mean over prompts of KL(p || p_h)

The effect of scaling on the head's output z_h, the D columns it owns in o_proj's input, is computed
exactly for every family, without changing a weight:

- value: z_h -> eps * z_h (attention is linear in the value);
- query or key: the logits are scaled by eps, the same as scaling the softmax scale, so z_h comes
  from one more attention pass with `attention.scaling * eps` ("undifferentiated attention");
- all three: scale * eps^2, then eps * z_h.

Heads do not mix before o_proj, so one pass serves all heads, and under GQA a query head is ablated
alone although it shares its key and value. Scaling takes effect after q_norm and k_norm, where a
family has them.

`states.py` runs the model with each head ablated, `score.py` computes the scores of all heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from regraft.models.architecture import attention_of, decoder_layers
from regraft.models.key_values import fold
from regraft.models.replay import Replay, replaced_forwards, tile_rows
from regraft.settings.base import EXPERT, NAMED, Settings

AblationTarget = Literal["q", "k", "v", "all"]
EPS = 1e-5
Mode = Literal["exact", "screened"]


class HeadSettings(Settings):
    """Head scoring by ablation on D^s prompts."""

    r_max: int = Field(5, ge=1, description="Rank of the subspaces of Ships.")
    target: Annotated[AblationTarget, EXPERT] = Field("all", description="Part of a head to scale.")
    eps: Annotated[float, EXPERT] = Field(EPS, ge=0, lt=1, description="The factor; 0 is off.")
    mode: Annotated[Mode, NAMED] = Field(
        "exact",
        description="exact: ablate every head. screened, faster: estimate all, then ablate the "
        "best.",
    )
    window: Annotated[int, EXPERT] = Field(
        8, ge=1, description="Screening: positions to recompute."
    )
    candidates: Annotated[int, EXPERT] = Field(
        16, ge=1, description="Screening: best heads to ablate."
    )
    tokens_per_pass: Annotated[int | None, EXPERT] = Field(
        None, ge=1, description="Tokens in one pass; fewer need less memory."
    )

    @model_validator(mode="after")
    def _check_mode(self) -> Self:
        if self.mode == "exact" and (name := self.first_set("window", "candidates")):
            raise ValueError(f"`{name}` has no effect when `mode` is exact")
        return self

    def passes(self, heads: int) -> float:
        """Approximate cost of scoring, in forward passes.

        Ablating a head runs the layers after it, half of all on average. An estimate runs them for
        some tokens of a prompt only, at about a sixth of that cost.
        """
        if self.mode == "exact":
            return heads / 2
        return heads / 12 + min(heads, self.candidates) / 2


def most_rank(samples: int, hidden: int) -> int:
    """The highest rank at which subspaces of a space of `samples` dimensions can differ.

    It is below `samples`: as many vectors span the whole space, whatever the states are.
    """
    return min(samples - 1, hidden)


@dataclass(frozen=True)
class HeadOutputs:
    """o_proj's input `[B, S, H*D]` of one layer: intact, and with every head ablated."""

    intact: Tensor
    ablated: Tensor
    head_dim: int


def head_outputs(
    model: nn.Module,
    run: Replay,
    layer: int,
    hidden: Tensor,
    head_dim: int,
    *,
    target: AblationTarget = "all",
    eps: float = EPS,
) -> HeadOutputs:
    """Run one layer's attention on its input `[B, S, d]` and ablate all its heads at once."""
    intact = _o_proj_input(model, run, layer, hidden)
    softmax_factor = {"q": eps, "k": eps, "v": 1.0, "all": eps * eps}[target]
    if softmax_factor == 1.0:
        return HeadOutputs(intact, intact * eps, head_dim)
    attention = attention_of(decoder_layers(model)[layer])
    with _scaled_logits(attention, softmax_factor):
        ablated = _o_proj_input(model, run, layer, hidden)
    return HeadOutputs(intact, ablated * eps if target == "all" else ablated, head_dim)


def replay_ablated(
    model: nn.Module,
    run: Replay,
    layer: int,
    hidden: Tensor,
    outputs: HeadOutputs,
    heads: Sequence[int],
) -> Tensor:
    """Run from `layer` to the end with each of `heads` ablated in turn, all in one batch.

    Args:
        run: `replay` of the whole batch, or a replay of `key_values` or `window`.
        hidden: Input of the layer, `[B, S, d]`.
        outputs: From `head_outputs` on the same input.
        heads: Query heads, one for each copy of the batch.

    Returns:
        Normed final states `[len(heads), B, T, d]`, at the positions that `run` returns.
    """
    attention = attention_of(decoder_layers(model)[layer])
    o_proj = attention.o_proj
    copies, size = len(heads), outputs.head_dim

    def forward(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
        z = tile_rows(outputs.intact[None], copies).flatten(0, 1).clone()  # [k*B, S, H*D]
        rows = z.view(copies, -1, *z.shape[1:])
        for row, head in enumerate(heads):
            columns = slice(head * size, (head + 1) * size)
            rows[row, ..., columns] = outputs.ablated[..., columns]
        if len(hidden_states) < len(z):  # copies lie along the positions
            z = fold(z, copies)
        return o_proj(z), None  # type: ignore[operator]

    used = hidden[:, -outputs.intact.shape[1] :]  # the last layer may run at the last position only
    with replaced_forwards({attention: forward}):
        final = run(start=layer, hidden=tile_rows(used, copies))
    return final.view(copies, -1, *final.shape[1:])


@torch.no_grad()
def _o_proj_input(model: nn.Module, run: Replay, layer: int, hidden: Tensor) -> Tensor:
    o_proj: Any = attention_of(decoder_layers(model)[layer]).o_proj
    seen: list[Tensor] = []
    with o_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0])):
        run(start=layer, hidden=hidden, stop=layer + 1)
    return seen[0]


@contextmanager
def _scaled_logits(attention: nn.Module, factor: float) -> Any:
    before: Any = attention.scaling
    attention.scaling = before * factor
    try:
        yield
    finally:
        attention.scaling = before


def left_subspace(states: Tensor, r_max: int) -> Tensor:
    """First `r_max` left singular vectors of `states`: `[..., samples, r_max]`, float64.

    `states` are `[..., samples, hidden]`, of any float dtype; r_max <= min(samples, hidden).
    """
    u: Tensor = torch.linalg.svd(states.double(), full_matrices=False).U
    return u[..., :r_max]


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Principal angles between the column spaces of two orthonormal bases, in radians.

    Angles above 45 degrees come from the cosine, smaller ones from the sine, because arccos loses
    half the digits there (Bjorck & Golub 1973; scipy.linalg.subspace_angles does the same). `a` and
    `b` are `[..., n, r]`, float64, broadcast; the angles `[..., r]`, ascending.
    """
    overlap = a.transpose(-1, -2) @ b  # [..., r, r]
    cosines = torch.linalg.svdvals(overlap).clamp(max=1.0)  # descending
    sines = torch.linalg.svdvals(b - a @ overlap).clamp(max=1.0).flip(-1)  # ascending
    return torch.where(cosines**2 >= 0.5, torch.asin(sines), torch.acos(cosines))


def ships(base: Tensor, ablated: Tensor, r_max: int) -> Tensor:
    """Data-set level Ships: the sum of principal angles between before and after (eq. 8 to 10).

    Args:
        base: Final hidden states of the last prompt token, `[samples, hidden]`.
        ablated: The same with each head ablated, `[heads, samples, hidden]`.
        r_max: Rank of the compared left singular subspaces.

    Returns:
        `[heads]`, float64, radians in [0, r_max * pi / 2].
    """
    reference = left_subspace(base, r_max)
    return torch.stack(
        [principal_angles(reference, left_subspace(one, r_max)).sum() for one in ablated]
    )


def first_feature_angles(base: Tensor, ablated: Tensor) -> Tensor:
    """Compute what HSR's released code uses in place of Ships: the angle of hidden feature 0 alone.

    Its SVD is commented out; it normalises the columns of the states and takes the first column.
    It returns degrees, from a float32 arccos that cannot resolve angles below 0.02 degrees. The
    arguments are those of `ships`.

    Returns:
        `[heads]`, float64, radians in [0, pi / 2]: the angle between the lines spanned by the
        samples' values of feature 0 before and after. NaN if that feature is 0 in all samples.
    """
    before, after = (states[..., :1].double() for states in (base, ablated))
    before, after = (
        one / torch.linalg.vector_norm(one, dim=-2, keepdim=True) for one in (before, after)
    )
    angles = principal_angles(before.nan_to_num(), after.nan_to_num())  # the SVD takes no NaN
    return angles.masked_fill((before + after).isnan().any(dim=-2), torch.nan).squeeze(-1)


def kl_divergence(base_logits: Tensor, ablated_logits: Tensor) -> Tensor:
    """KL(p_base || p_ablated) of next-token distributions, in nats, `[..., samples]` float32.

    The logits are `[samples, vocabulary]` and `[..., samples, vocabulary]`.
    """
    log_p = torch.log_softmax(base_logits.float(), dim=-1)
    log_q = torch.log_softmax(ablated_logits.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
