"""Our model in memory, as lmms-eval wants models: its tasks by name, and nothing is loaded again.

lmms-eval brings more than a hundred packages, so that it is an extra (`pip install
'regraft[harness]'`) and imported only here, when it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from regraft.data.collate import batches, prompt_batch
from regraft.data.example import Example
from regraft.errors import RegraftError
from regraft.evaluation.greedy import answer
from regraft.models.load import placed

_DEFAULT_TOKENS = 128
_UNASKED = "\n\n"  # what lmms-eval fills in where a task names no stop; its own models ignore it


@dataclass(frozen=True)
class Request:
    """One prompt of a task: text, its images, how long the answer is, where it is cut."""

    text: str
    images: tuple[Image.Image, ...]
    max_new_tokens: int
    until: tuple[str, ...] = ()


def answers_to(
    model: nn.Module, processor: Any, requests: Sequence[Request], batch_size: int
) -> list[str]:
    """Answer greedily, in order; prompts of like length and equal limits share a batch.

    Raises:
        RegraftError: a prompt has several images.
    """
    for one in requests:
        if len(one.images) > 1:
            raise RegraftError(
                f"A prompt of the task has {len(one.images)} images, {one.text[:60]!r}...; tasks "
                "with one image or none are supported."
            )
    texts: dict[int, str] = {}
    kinds = sorted({(one.max_new_tokens, bool(one.images)) for one in requests})
    for kind in kinds:
        fit = [i for i, r in enumerate(requests) if (r.max_new_tokens, bool(r.images)) == kind]
        for places in batches(sorted(fit, key=lambda i: len(requests[i].text)), batch_size):
            images = {Path(str(i)): requests[i].images[0] for i in places if kind[1]}
            examples = [_example(i, requests[i], kind[1]) for i in places]
            batch = placed(prompt_batch(processor, examples, images), model)
            found = answer(model, processor, batch.inputs, kind[0])
            texts |= {
                i: cut(text, requests[i].until) for i, text in zip(places, found, strict=True)
            }
    return [texts[i] for i in range(len(requests))]


def cut(text: str, until: Sequence[str]) -> str:
    """`text` before the first of the stop strings in it."""
    ends = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return text[: min(ends)].strip() if ends else text


def _example(i: int, request: Request, image: bool) -> Example:
    return Example(str(i), request.text, False, "", Path(str(i)) if image else None)


def require_harness() -> None:
    """Raise unless lmms-eval is installed.

    Raises:
        RegraftError: it is not, or one of its own needs is missing.
    """
    try:
        import lmms_eval.api.model  # noqa: F401
    except ImportError as error:
        raise RegraftError(
            f"lmms-eval is needed: pip install 'regraft[harness]' ({error})."
        ) from error


def harness_model(model: nn.Module, processor: Any, batch_size: int) -> Any:
    """An instance of lmms-eval's `lmms` that answers with this model.

    Raises:
        RegraftError: lmms-eval is not installed.
    """
    require_harness()
    from lmms_eval.api.model import lmms

    class InMemory(lmms):  # type: ignore[misc]
        """One image a prompt, greedy answers; no likelihoods."""

        def generate_until(self, requests: list[Any]) -> list[str]:
            return answers_to(
                model, processor, [_request(self, r.args) for r in requests], batch_size
            )

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            raise RegraftError("Tasks by likelihood are not supported: name one that generates.")

        def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
            raise RegraftError("Tasks of several rounds are not supported.")

    return InMemory()


def _request(harness: Any, arguments: tuple[Any, ...]) -> Request:
    """From lmms-eval's (context, settings, doc_to_visual, number, task, split)."""
    text, settings, visuals, number, task, split = arguments
    found = visuals(harness.task_dict[task][split][number]) or []
    if others := [one for one in found if not isinstance(one, Image.Image)]:
        raise RegraftError(
            f"{task} shows a {type(others[0]).__name__}, {str(others[0])[:60]!r}, instead of an "
            "image; tasks with one image or none are supported."
        )
    images = tuple(one.convert("RGB") for one in found)
    return Request(text.replace("<image>", "").strip(), images, *_limits(settings))


def _limits(settings: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    until = settings.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    return (
        int(settings.get("max_new_tokens") or _DEFAULT_TOKENS),
        tuple(stop for stop in stops if stop != _UNASKED),
    )


def run_tasks(
    model: nn.Module,
    processor: Any,
    tasks: Sequence[str],
    batch_size: int,
    *,
    limit: int | None = None,
    include: Path | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run lmms-eval's tasks one after the other; yields each with its results.

    Args:
        model: In eval mode.
        processor: Its processor.
        tasks: Names, such as "mmbench_en_dev_static" and "docvqa_val".
        batch_size: Prompts in one pass.
        limit: Prompts of each task.
        include: A folder of tasks of one's own; lmms-eval's are then left out.

    Raises:
        RegraftError: lmms-eval is not installed, knows no such task, or a task needs more than one
            image or likelihoods.
    """
    ours = harness_model(model, processor, batch_size)
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(
        "ERROR",
        include_path=None if include is None else str(include),
        include_defaults=include is None,
    )
    if unknown := [one for one in tasks if one not in manager.all_tasks]:
        raise RegraftError(
            f"lmms-eval knows no task {unknown[0]!r}; `python -m lmms_eval --tasks list` lists all."
        )
    for task in tasks:
        found = simple_evaluate(
            model=ours,
            tasks=[task],
            task_manager=manager,
            limit=limit,
            batch_size=batch_size,
            log_samples=False,
            verbosity="ERROR",
        )
        yield task, found["results"][task]
