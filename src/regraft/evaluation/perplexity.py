"""Perplexity of the references of prompts and of ordinary text.

Neither depends on how answers are worded or judged, and no answer is generated. On ordinary text
KL(dense || model) is measured too: the mean over positions of the divergence between the two
distributions of the next token, in nats; 0 for the dense model.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from regraft.data.collate import IGNORED, Batch, batches, response_batch
from regraft.data.example import Example
from regraft.disk.artifact import read_artifact, require_finite, write_artifact
from regraft.disk.parsing import from_json
from regraft.disk.paths import read_text
from regraft.distributed import resumable_map
from regraft.errors import RegraftError
from regraft.evaluation.metrics import bootstrap_ratio
from regraft.evaluation.results import Estimate, TextResult
from regraft.models.load import placed
from regraft.models.replay import logits_of, replay, text_inputs
from regraft.progress import Advance, expect

Nll = tuple[float, int]  # sum over the response's tokens, in nats; number of tokens
_RESPONSE_POSITIONS = 256  # whose logits are in memory at a time
_POSITIONS = 128  # the same for ordinary text, with the logits of two models
_MOST = math.log(sys.float_info.max)  # nats per token whose exp is finite
_TOLERANCE = 1e-3  # between the dense model's nats per token with its own head and with this one
_UNLIKE = (
    "the heads, tokenizers or dtypes differ, so KL cannot be measured. Evaluate both on the same "
    "text and dtype."
)
_KIND, _WHAT = "text-states", "the dense model's states on a text"


def response_nlls(
    model: nn.Module,
    processor: Any,
    examples: Sequence[Example],
    batch_size: int,
    *,
    first: int | None = None,
    partial: Path | None = None,
    advance: Advance = lambda _: None,
) -> list[Nll]:
    """Negative log-likelihood of every response, in order; logits at response tokens only.

    It is that of the `first` tokens of each response, by default of all. Examples with and without
    an image are in separate batches, which some models need. Finished batches found in the scratch
    folder `partial`, of the same `first`, are not computed again. `advance` is called with the
    number of examples just done.

    Raises:
        RegraftError: see `response_batch`; or the model's numbers overflow.
    """
    groups = ([e for e in examples if (e.image is not None) == image] for image in (False, True))
    chunks = [one for group in groups for one in batches(group, batch_size)]

    def measure(missing: Sequence[Sequence[Example]]) -> Iterator[tuple[int, list[Nll]]]:
        for i, chunk in enumerate(missing):
            nlls = _of_batch(model, processor, chunk, first)
            for example, (total, count) in zip(chunk, nlls, strict=True):
                _require_finite(f"response of {example.id}", total / max(1, count))
            yield i, nlls
            advance(len(chunk))

    found = resumable_map(
        chunks, measure, partial, "nll", list[Nll], lambda chunk: expect(advance, -len(chunk))
    )
    by_id = {
        example.id: nll
        for chunk, nlls in zip(chunks, found, strict=True)
        for example, nll in zip(chunk, nlls, strict=True)
    }
    return [by_id[example.id] for example in examples]


def perplexity(nlls: Sequence[Nll]) -> Estimate:
    """exp of the mean negative log-likelihood per token, with a bootstrap interval over examples.

    Raises:
        ValueError: there is no response token.
    """
    if not any(count for _, count in nlls):
        raise ValueError("Perplexity needs at least one response token.")
    mean = bootstrap_ratio(*zip(*nlls, strict=True))
    return Estimate(math.exp(mean.value), mean.n, math.exp(mean.low), math.exp(mean.high))


@torch.no_grad()
def _of_batch(
    model: nn.Module, processor: Any, examples: Sequence[Example], first: int | None
) -> list[Nll]:
    batch = placed(response_batch(processor, examples), model)
    assert batch.labels is not None
    final = replay(model, text_inputs(model, batch.inputs))
    final = final[:, -batch.labels.shape[1] :]  # [B, S, d], without GIT's image before the prompt
    targets = batch.labels[:, 1:]  # [B, S - 1], what positions 0 .. S - 2 predict
    counted = targets != IGNORED
    if first is not None:
        counted &= counted.cumsum(1) <= first
    rows, positions = counted.nonzero(as_tuple=True)  # [N], [N]
    nll = torch.cat(
        [
            F.cross_entropy(
                logits_of(model, final[rows[part], positions[part]]).float(),
                targets[rows[part], positions[part]],
                reduction="none",
            )
            for part in torch.arange(len(rows), device=rows.device).split(_RESPONSE_POSITIONS)
        ]
    ).double()  # [N]
    totals = torch.zeros(len(examples), dtype=torch.float64, device=nll.device)
    totals.index_add_(0, rows, nll)
    counts = torch.bincount(rows, minlength=len(examples))
    return list(zip(totals.tolist(), counts.tolist(), strict=True))


def _require_finite(what: str, nats: float) -> None:
    """Raise where the nats per token are NaN, or so many that perplexity overflows."""
    if not nats <= _MOST:  # true for NaN
        raise RegraftError(
            f"The {what} has no finite perplexity: numbers overflow in this dtype. Use --dtype "
            "bfloat16 or float32."
        )


@dataclass(frozen=True)
class Teacher:
    """The dense model's normed final states `[T, d]` and negative log-likelihood of each document.

    The output head, which pruning does not change, turns states into distributions; states are far
    smaller than logits.
    """

    states: Sequence[Tensor]
    nlls: Sequence[Nll]


def read_documents(path: Path) -> tuple[str, ...]:
    """Read the documents of a text file, which blank lines separate.

    Raises:
        RegraftError: the file is missing, is not UTF-8, or holds no text.
    """
    text = read_text(path, "A text file is needed.").replace("\r\n", "\n")
    documents = tuple(" ".join(one.split()) for one in text.split("\n\n") if one.strip())
    if not documents:
        raise RegraftError(f"{path} holds no text; expected paragraphs separated by blank lines.")
    return documents


@torch.no_grad()
def predict(
    model: nn.Module,
    processor: Any,
    documents: Sequence[str],
    teacher: Teacher | None,
    advance: Advance,
) -> tuple[TextResult, Teacher]:
    """Perplexity of the documents and, with a `teacher`, KL(teacher || model).

    Documents are encoded one by one, without a chat template. Logits are in the model's dtype,
    their log-softmax in float32 and sums in float64. Also returns this model as a teacher.

    Raises:
        RegraftError: a document has fewer than two tokens, the numbers overflow, or the teacher's
            states do not fit this model's tokens or head.
    """
    rows: list[tuple[float, float | None, int]] = []
    states: list[Tensor] = []
    for i, document in enumerate(documents):
        final, targets = _encoded(model, processor, document)
        if teacher is not None and teacher.states[i].shape != final.shape:
            raise RegraftError(
                f"On the text {document[:40]!r} the dense model has states "
                f"{list(teacher.states[i].shape)} (tokens, features), and this model "
                f"{list(final.shape)}: {_UNLIKE}"
            )
        dense = None if teacher is None else teacher.states[i].to(final)
        nll, kl, dense_nll = _compare(model, final, targets, dense)
        if teacher is not None:
            _require_fit(document, dense_nll / len(targets), teacher.nlls[i][0] / len(targets))
        for nats in (nll / len(targets), kl / len(targets)):
            _require_finite(f"text {document[:40]!r}", nats)
        rows.append((nll, None if teacher is None else kl, len(targets)))
        states.append(final.cpu())
        advance(1)
    return result_of(rows), Teacher(states, [(nll, count) for nll, _, count in rows])


def result_of(rows: Sequence[tuple[float, float | None, int]]) -> TextResult:
    """Estimates over documents: (summed negative log-likelihood, summed KL or None, tokens).

    Intervals are bootstrapped over documents, since the tokens of one are not independent.
    """
    kls = [(kl, count) for _, kl, count in rows if kl is not None]
    return TextResult(
        perplexity=perplexity([(nll, count) for nll, _, count in rows]),
        kl=bootstrap_ratio(*zip(*kls, strict=True)) if kls else None,
        tokens=sum(count for _, _, count in rows),
        documents=tuple(rows),
    )


def pooled(results: Sequence[TextResult]) -> TextResult | None:
    """Average several models on the same documents, document by document; None without models."""
    if not results:
        return None
    rows = []
    for same in zip(*(one.documents for one in results), strict=True):
        kls = [kl for _, kl, _ in same if kl is not None]
        nll = sum(nll for nll, _, _ in same) / len(same)
        rows.append((nll, sum(kls) / len(kls) if kls else None, same[0][2]))
    return result_of(rows)


def save_teacher(path: Path, teacher: Teacher) -> None:
    tensors = {f"{i:05}": states for i, states in enumerate(teacher.states)}
    write_artifact(path, _KIND, {"nlls": [list(one) for one in teacher.nlls]}, tensors)


def load_teacher(path: Path, documents: int) -> Teacher:
    """Read the teacher of a text with this number of documents.

    Raises:
        RegraftError: the file is missing, damaged, or of another text.
    """
    header, tensors = read_artifact(path, _KIND, _WHAT)
    names = [f"{i:05}" for i in range(len(tensors))]
    if unexpected := sorted(tensors.keys() - {*names}):
        raise RegraftError(
            f"{path} is damaged: the tensor {unexpected[0]} is none of 00000 to {names[-1]}."
        )
    nlls = from_json(tuple[tuple[float, int], ...], header["nlls"], f"{path}: nlls in its header")
    if not len(tensors) == len(nlls) == documents:
        raise RegraftError(
            f"{path} holds the dense model's states on {len(tensors)} paragraphs (tensors from "
            f"00000 on) and {len(nlls)} nlls, and the text has {documents} paragraphs. Evaluate "
            "the dense model on this text first."
        )
    require_finite(path, tensors)
    return Teacher([tensors[name] for name in names], nlls)


def _encoded(model: nn.Module, processor: Any, document: str) -> tuple[Tensor, Tensor]:
    """Final states `[T, d]` at all but the last token, and the next tokens `[T]`."""
    encoded: Mapping[str, Tensor] = dict(processor(text=[document], return_tensors="pt"))
    inputs = placed(Batch(encoded, None, ("text",)), model).inputs
    ids = inputs["input_ids"][0]
    if len(ids) < 2:
        raise RegraftError(f"The text {document!r} is a single token; perplexity needs two.")
    return replay(model, text_inputs(model, inputs))[0, :-1], ids[1:]


def _compare(
    model: nn.Module, final: Tensor, targets: Tensor, teacher: Tensor | None
) -> tuple[float, float, float]:
    """(negative log-likelihood, KL, the teacher's negative log-likelihood), summed over tokens."""
    nll = kl = teacher_nll = 0.0
    for start in range(0, len(targets), _POSITIONS):
        part = slice(start, start + _POSITIONS)
        own = F.log_softmax(logits_of(model, final[part]).float(), dim=-1)  # [P, vocabulary]
        nll += _nll(own, targets[part])
        if teacher is not None:
            dense = F.log_softmax(logits_of(model, teacher[part]).float(), dim=-1)
            share = dense.exp()
            each = torch.where(share > 0, share * (dense - own), 0.0).sum(-1)  # [P]
            kl += float(each.double().sum())
            teacher_nll += _nll(dense, targets[part])
    return nll, kl, teacher_nll


def _nll(logs: Tensor, targets: Tensor) -> float:
    return -float(logs.gather(1, targets[:, None]).double().sum())


def _require_fit(document: str, found: float, stored: float) -> None:
    """Raise where the dense model's nats per token differ with this model's head."""
    if not abs(found - stored) <= _TOLERANCE * max(1.0, stored):
        raise RegraftError(
            f"On the text {document[:40]!r} the dense model's states give {found:.3f} nats per "
            f"token with this model's output head, and {stored:.3f} with its own: {_UNLIKE}"
        )
