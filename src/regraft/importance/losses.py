"""What a response costs: the losses whose gradients say which weights matter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from regraft.data.collate import IGNORED
from regraft.models.placement import PlacedModel
from regraft.models.replay import logits_of

_TIMES = 10  # how much more often refusals begin so

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
    """The probability of a wrong first token, of a model and of the dense one.

    Of a refusal's, where those are known, else of any other than the response's: over harmless
    prompts a smooth over-refusal. `weight` is how much the example counts.
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
        refusals: Tokens that refusals begin with, see `refusal_starts`; empty where unknown.
    """

    teacher: Mapping[str, Tensor] | None = None
    decision: int = 2
    tail: float = 0.01
    weights: Mapping[str, float] = field(default_factory=dict)
    refusals: tuple[int, ...] = ()

    def __call__(self, model: PlacedModel, final: Tensor, labels: Tensor, name: str) -> Tensor:
        """The loss of one response."""
        positions = predicting(labels)
        logits = logits_of(model.network, final[positions], gradient=True).float()  # [N, V]
        weights = torch.full((len(positions),), self.tail, device=logits.device)
        weights[: self.decision] = 1
        cost = (weights * self._costs(model, logits, labels[positions + 1], name)).sum()
        return self.weights.get(name, 1.0) * cost

    def misses(self, model: PlacedModel, final: Tensor, labels: Tensor, name: str) -> Misses:
        """How likely it is that the answer begins wrongly."""
        position = predicting(labels)[:1]
        token = int(labels[position + 1])
        dense = None
        if self.teacher is not None:
            dense = self._wrong(token, model, self.teacher[name][:1].to(final.device, model.dtype))
        own = self._wrong(token, model, final[position].detach())
        return Misses(self.weights.get(name, 1.0), own, dense)

    def agrees(self, model: PlacedModel, labels: Tensor, name: str) -> bool:
        """Whether the teacher's likeliest first token is the response's."""
        assert self.teacher is not None, "there is no teacher to agree"
        first = labels[predicting(labels)[:1] + 1]
        state = self.teacher[name][:1].to(model.device, model.dtype)
        return int(logits_of(model.network, state)[0].argmax()) == int(first)

    def _wrong(self, token: int, model: PlacedModel, state: Tensor) -> float:
        """From one normed final state `[1, d]`."""
        likely = logits_of(model.network, state).float().softmax(dim=-1)[0]  # [V]
        wrong = [one for one in self.refusals if one != token]
        return float(likely[wrong].sum()) if self.refusals else 1 - float(likely[token])

    def _costs(self, model: PlacedModel, logits: Tensor, tokens: Tensor, name: str) -> Tensor:
        """Of each token, `[N]`."""
        if self.teacher is None:
            return F.cross_entropy(logits, tokens, reduction="none")
        states = self.teacher[name].to(logits.device, model.dtype)
        wanted = logits_of(model.network, states).float().log_softmax(dim=-1)  # [N, V]
        own = logits.log_softmax(dim=-1)
        return F.kl_div(own, wanted, reduction="none", log_target=True).sum(dim=-1)


def refusal_starts(refusals: Sequence[int], others: Sequence[int]) -> tuple[int, ...]:
    """The first tokens that tell refusals from other answers.

    Those at least ten times as frequent at the start of refusals; none where they are together less
    than half of these, so that nothing can be told by first tokens.

    Args:
        refusals: First token of each refusal.
        others: Of each other answer.
    """
    here, there = Counter(refusals), Counter(others)
    found = [
        token
        for token, count in here.items()
        if count * len(others) >= _TIMES * there[token] * len(refusals)
    ]
    covered = sum(here[token] for token in found)
    return tuple(sorted(found)) if 2 * covered >= len(refusals) else ()
