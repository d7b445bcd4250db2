"""What a response costs: the losses whose gradients say which weights matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from regraft.data.collate import IGNORED
from regraft.models.placement import PlacedModel
from regraft.models.replay import logits_of

TOKEN_WEIGHTS = (1.0, 1.0, 0.3, 0.3, 0.3, 0.3)  # of the first response tokens

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
class DecisionLoss:
    """How far the start of an answer is from the dense model's, token by token.

    Whether an answer refuses is decided at its start. The divergence KL(dense || model) of the
    next-token distribution counts 1 at each of the first two tokens and 0.3 at each of the next
    four; what follows does not count, so that long and short answers weigh alike.

    Attributes:
        teacher: Example id -> the dense model's normed final states `[N, d]` where they predict
            response tokens.
    """

    teacher: Mapping[str, Tensor]

    def __call__(self, model: PlacedModel, final: Tensor, labels: Tensor, name: str) -> Tensor:
        """The loss of one response, in nats, float32."""
        positions = predicting(labels)[: len(TOKEN_WEIGHTS)]
        states = self.teacher[name][: len(positions)].to(final.device, model.dtype)
        wanted = logits_of(model.network, states).float().log_softmax(dim=-1)  # [N, V]
        own = logits_of(model.network, final[positions], gradient=True).float().log_softmax(dim=-1)
        cost = F.kl_div(own, wanted, reduction="none", log_target=True).sum(dim=-1)  # [N]
        return (cost.new_tensor(TOKEN_WEIGHTS[: len(positions)]) * cost).sum()
