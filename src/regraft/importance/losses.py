"""What a response costs: the losses whose gradients say which weights matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from regraft.data.collate import IGNORED
from regraft.models.placement import PlacedModel
from regraft.models.replay import logits_of

Loss = Callable[[PlacedModel, Tensor, Tensor, str], Tensor]
"""(model, normed final states `[S, d]`, labels `[S]`, id of the example) -> a scalar, float32."""


def predicting(labels: Tensor) -> Tensor:
    """Positions whose logits predict response tokens: those before them. `[N]` int64.

    The logits at position t predict the token at t + 1.
    """
    return (labels[1:] != IGNORED).nonzero().flatten()


def mean_cross_entropy(model: PlacedModel, final: Tensor, labels: Tensor, _id: str) -> Tensor:
    """Mean over response tokens: the loss that models are trained with, and SNIP's."""
    positions = predicting(labels)
    logits = logits_of(model.network, final[positions], gradient=True)  # [N, vocabulary]
    return F.cross_entropy(logits.float(), labels[positions + 1])


@dataclass(frozen=True)
class Misses:
    """The probability of another first token than the response's, of a model and of the dense one.

    Over harmless prompts that is a smooth over-refusal, over harmful ones a smooth ASR. `weight` is
    how much the example counts.
    """

    weight: float
    own: float
    dense: float | None


@dataclass(frozen=True)
class DecisionLoss:
    """A loss in which the first response tokens weigh 1 each and the others `tail` each.

    Whether an answer refuses is decided at its start; a mean over tokens would count that less in
    a long answer than in a short one, so that the two kinds of prompts would pull unevenly.

    Attributes:
        teacher: Example id -> the dense model's normed final states `[N, d]` where they predict
            response tokens. With them a token costs the divergence KL(dense || model); None takes
            its cross-entropy against the given response.
        decision: How many tokens weigh 1.
        tail: The weight of each later token.
        weights: Example id -> how much it counts; 1 where it is not named.
    """

    teacher: Mapping[str, Tensor] | None = None
    decision: int = 2
    tail: float = 0.01
    weights: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, model: PlacedModel, final: Tensor, labels: Tensor, name: str) -> Tensor:
        """The loss of one response."""
        positions = predicting(labels)
        logits = logits_of(model.network, final[positions], gradient=True).float()  # [N, V]
        weights = torch.full((len(positions),), self.tail, device=logits.device)
        weights[: self.decision] = 1
        cost = (weights * self._costs(model, logits, labels[positions + 1], name)).sum()
        return self.weights.get(name, 1.0) * cost

    def misses(self, model: PlacedModel, final: Tensor, labels: Tensor, name: str) -> Misses:
        """How likely it is that the answer begins otherwise than the response does."""
        position = predicting(labels)[:1]
        token = int(labels[position + 1])
        dense = None
        if self.teacher is not None:
            dense = _other_than(token, model, self.teacher[name][:1].to(final.device, model.dtype))
        own = _other_than(token, model, final[position].detach())
        return Misses(self.weights.get(name, 1.0), own, dense)

    def agrees(self, model: PlacedModel, labels: Tensor, name: str) -> bool:
        """Whether the teacher's likeliest first token is the response's."""
        assert self.teacher is not None, "there is no teacher to agree"
        first = labels[predicting(labels)[:1] + 1]
        state = self.teacher[name][:1].to(model.device, model.dtype)
        return int(logits_of(model.network, state)[0].argmax()) == int(first)

    def _costs(self, model: PlacedModel, logits: Tensor, tokens: Tensor, name: str) -> Tensor:
        """Of each token, `[N]`."""
        if self.teacher is None:
            return F.cross_entropy(logits, tokens, reduction="none")
        states = self.teacher[name].to(logits.device, model.dtype)
        wanted = logits_of(model.network, states).float().log_softmax(dim=-1)  # [N, V]
        own = logits.log_softmax(dim=-1)
        return F.kl_div(own, wanted, reduction="none", log_target=True).sum(dim=-1)


def _other_than(token: int, model: PlacedModel, state: Tensor) -> float:
    """1 - p(token), from one normed final state `[1, d]`."""
    return 1 - float(logits_of(model.network, state).float().softmax(dim=-1)[0, token])
