"""Run experts one by one, each matrix as a module, so that each can be observed and pruned.

Families keep the weights of all experts of a layer in 3-D parameters, `[E, out, in]` or its
transpose, and multiply them in one fused kernel. Inside a block the same is computed expert by
expert: every token goes to the experts that the router chose, and each expert's matrices are
modules that take hooks. An expert that gets no token runs on an empty input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.hooks import RemovableHandle

from regraft.data.collate import Batch
from regraft.models.architecture import LinearArchitecture
from regraft.models.replay import hooked, replaced_forwards

FIRST, LAST = ("gate_up_proj", "up_proj"), "down_proj"


class ExpertLinear(nn.Module):
    """One matrix `[out, in]` of one expert.

    `tokens` are the indices of the tokens of its last input, one per row, `[n]` int64 ascending;
    `of` is the number of tokens in the batch.
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
    """Whether experts' weights are `[E, in, out]`; None for a module that holds no experts."""
    if not any(hasattr(experts, name) for name in FIRST) or not hasattr(experts, LAST):
        return None
    if _is_llama4(experts):
        return True
    known = hasattr(experts, "_apply_gate") and hasattr(experts, "is_transposed")
    return bool(experts.is_transposed) if known else None


def parameters_of(experts: nn.Module) -> list[str]:
    """Names of the 3-D parameters that hold experts' matrices; empty for other modules."""
    if transposed(experts) is None:
        return []
    names = (*FIRST, LAST)
    return [name for name, one in experts.named_parameters(recurse=False) if name in names]


@contextmanager
def observed(
    linears: Mapping[LinearArchitecture, nn.Module],
    batch: Batch,
    hook: Callable[[LinearArchitecture, nn.Module], RemovableHandle],
) -> Iterator[None]:
    """Observe linears inside the block, on a batch on the device; experts run one by one.

    `linears` maps each linear to the module that owns its weight. `hook` registers a hook on the
    module that computes only this linear, which for an expert's is a new `ExpertLinear`.
    """
    modules: dict[LinearArchitecture, nn.Module] = {
        linear: module for linear, module in linears.items() if linear.expert is None
    }
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for experts in dict.fromkeys(m for li, m in linears.items() if li.expert is not None):
        own = [li for li, module in linears.items() if module is experts]
        separate = {li: ExpertLinear(li.weight(experts)) for li in own}
        modules |= separate
        run = _Experts(experts, separate, _tokens_of_kind(own[0], batch))
        forwards[experts] = run.scaled_before if _is_llama4(experts) else run.routed
    with replaced_forwards(forwards), hooked(hook(li, one) for li, one in modules.items()):
        yield


def _tokens_of_kind(expert: LinearArchitecture, batch: Batch) -> tuple[Tensor, int] | None:
    """(indices `[n]` int64 of the tokens that an expert's module gets, tokens in the batch).

    None if it gets all. Ernie 4.5 VL has separate experts for text and for vision tokens.
    """
    kinds = batch.inputs.get("moe_mm_token_type_ids")  # [B, S], 0 is text
    if kinds is None:
        return None
    received = kinds.flatten().ne(0) == expert.reads_vision
    return received.nonzero().flatten(), kinds.numel()


def _is_llama4(experts: nn.Module) -> bool:
    return type(experts).__name__ == "Llama4TextExperts"


class _Experts:
    """Forwards that compute a layer's experts one by one, observed or not."""

    def __init__(
        self,
        module: nn.Module,
        separate: Mapping[LinearArchitecture, ExpertLinear],
        received: tuple[Tensor, int] | None,
    ) -> None:
        self.module: Any = module
        self.received = received
        self.first = next(name for name in FIRST if hasattr(module, name))
        self.separate: dict[tuple[str, int], list[ExpertLinear]] = {}
        for linear, one in separate.items():
            assert linear.expert is not None
            self.separate.setdefault((linear.parameter, linear.expert), []).append(one)
        self.count = len(getattr(module, LAST))

    def product(self, name: str, expert: int, inputs: Tensor, tokens: Tensor, of: int) -> Tensor:
        """Multiply inputs `[n, in]` of `tokens` by one expert's matrix and add its bias."""
        output: Tensor
        parts = self.separate.get((name, expert))
        if parts is None:  # not observed
            weight = getattr(self.module, name)[expert]
            output = inputs @ (weight if transposed(self.module) else weight.T)
        else:
            if self.received is not None:
                tokens, of = self.received[0][tokens], self.received[1]
            for part in parts:
                part.tokens, part.of = tokens, of
            output = torch.cat([part(inputs) for part in parts], dim=-1)
        bias = getattr(self.module, f"{name}_bias", None)
        if bias is not None:
            output = output + bias[expert]
        return output

    def routed(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The forward of `transformers.integrations.moe`, for hidden states `[T, d]`.

        `chosen` are the experts of each token and `weights` their weights, `[T, k]`.
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
        """Llama4TextExperts' forward: every token for every expert, `[E * T, d]`, times its score.

        An expert that was not chosen has score 0, so its input and output are 0.
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
