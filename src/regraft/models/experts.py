"""Run experts one by one through a module a matrix, so that each can be observed and pruned.

Families keep the weights of all experts of a layer in 3-D parameters, `[E, out, in]` or its
transpose, and multiply them in one fused kernel. For the length of a block the same is computed
expert by expert: every token takes the experts that the router chose, and each expert's matrices
are modules that hooks can be put on. An expert to which no token goes runs on none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from regraft.data.collate import Batch
from regraft.models.architecture import LinearArchitecture
from regraft.models.replay import replaced_forwards

FIRST, LAST = ("gate_up_proj", "up_proj"), "down_proj"


class ExpertLinear(nn.Module):
    """One matrix `[out, in]` of one expert.

    `tokens` are those that its rows of input belong to, `[n]` int64, ascending, of `of` in all.
    """

    tokens: Tensor
    of: int

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """`[n, in]` -> `[n, out]`, without the bias."""
        return F.linear(inputs, self.weight)


def transposed(experts: nn.Module) -> bool | None:
    """Whether weights of all experts are `[E, in, out]`; None for a module that is no such one."""
    if not any(hasattr(experts, name) for name in FIRST) or not hasattr(experts, LAST):
        return None
    if _is_llama4(experts):
        return True
    known = hasattr(experts, "_apply_gate") and hasattr(experts, "is_transposed")
    return bool(experts.is_transposed) if known else None


def parameters_of(experts: nn.Module) -> list[str]:
    """Names of the 3-D parameters that hold experts' matrices; none of another module."""
    if transposed(experts) is None:
        return []
    names = (*FIRST, LAST)
    return [name for name, one in experts.named_parameters(recurse=False) if name in names]


@contextmanager
def opened(
    linears: Mapping[LinearArchitecture, nn.Module], batch: Batch
) -> Iterator[Mapping[LinearArchitecture, nn.Module]]:
    """Run experts one by one in the block, on a batch on the device.

    `linears` come with the modules that own them, and are yielded with the module that multiplies
    by each alone, which for those of experts is a new one.
    """
    found: dict[LinearArchitecture, nn.Module] = {
        linear: module for linear, module in linears.items() if linear.expert is None
    }
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for experts in dict.fromkeys(m for li, m in linears.items() if li.expert is not None):
        own = [li for li, module in linears.items() if module is experts]
        alone = {li: ExpertLinear(li.weight(experts)) for li in own}
        found |= alone
        run = _Experts(experts, alone, _tokens_of_kind(own[0], batch))
        forwards[experts] = run.scaled_before if _is_llama4(experts) else run.routed
    with replaced_forwards(forwards):
        yield found


def _tokens_of_kind(expert: LinearArchitecture, batch: Batch) -> tuple[Tensor, int] | None:
    """Which of a batch's tokens its layer's experts are given, `[n]` int64, and how many it has.

    None for all. Ernie 4.5 VL has experts for text tokens and others for vision tokens.
    """
    kinds = batch.inputs.get("moe_mm_token_type_ids")  # [B, S], 0 is text
    if kinds is None:
        return None
    given = kinds.flatten().ne(0) == expert.reads_vision
    return given.nonzero().flatten(), kinds.numel()


def _is_llama4(experts: nn.Module) -> bool:
    return type(experts).__name__ == "Llama4TextExperts"


class _Experts:
    """The matrices of a layer's experts, those that are observed and those that are not."""

    def __init__(
        self,
        module: nn.Module,
        alone: Mapping[LinearArchitecture, ExpertLinear],
        given: tuple[Tensor, int] | None = None,
    ) -> None:
        self.module: Any = module
        self.given = given
        self.first = next(name for name in FIRST if hasattr(module, name))
        self.alone: dict[tuple[str, int], list[ExpertLinear]] = {}
        for linear, one in alone.items():
            assert linear.expert is not None
            self.alone.setdefault((linear.parameter, linear.expert), []).append(one)
        self.count = len(getattr(module, LAST))

    def product(self, name: str, expert: int, inputs: Tensor, tokens: Tensor, of: int) -> Tensor:
        """Inputs `[n, in]` of some tokens times one expert's matrix, with its bias."""
        whole: Tensor
        parts = self.alone.get((name, expert))
        if parts is None:  # not observed
            weight = getattr(self.module, name)[expert]
            whole = inputs @ (weight if transposed(self.module) else weight.T)
        else:
            if self.given is not None:
                tokens, of = self.given[0][tokens], self.given[1]
            for part in parts:
                part.tokens, part.of = tokens, of
            whole = torch.cat([part(inputs) for part in parts], dim=-1)
        bias = getattr(self.module, f"{name}_bias", None)
        if bias is not None:
            whole = whole + bias[expert]
        return whole

    def routed(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """As `transformers.integrations.moe` has it, for hidden states `[T, d]`.

        `chosen` are the experts of each token and `weights` theirs, `[T, k]`.
        """
        total, module = torch.zeros_like(hidden), self.module
        for expert in range(self.count):
            tokens, place = torch.where(chosen == expert)
            inner = self.product(self.first, expert, hidden[tokens], tokens, len(hidden))
            inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
            out = self.product(LAST, expert, inner, tokens, len(hidden))
            if getattr(module, "has_post_expert_norm", False):
                out = module.post_expert_norm(out)
            out = out * weights[tokens, place, None]
            total = total.index_add(0, tokens, out.to(total.dtype))
        return total

    def scaled_before(self, hidden: Tensor) -> Tensor:
        """As Llama4TextExperts has it: every token for every expert, `[E * T, d]`, times its score.

        The score of an expert that was not chosen is 0, and so is what it puts out.
        """
        rows = hidden.view(self.count, -1, hidden.shape[-1])
        outputs = []
        for expert, row in enumerate(rows):
            tokens = row.detach().ne(0).any(dim=-1).nonzero().flatten()
            gate_up = self.product(self.first, expert, row[tokens], tokens, len(row))
            gate, up = gate_up.chunk(2, dim=-1)
            inner = up * self.module.act_fn(gate)
            out = self.product(LAST, expert, inner, tokens, len(row))
            outputs.append(torch.zeros_like(row).index_add(0, tokens, out))
        return torch.cat(outputs)
