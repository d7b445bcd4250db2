"""Restore by gain: the teacher's say, hard examples, and the steps; resumable after each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from regraft import ranks
from regraft.checks import check_shares
from regraft.data.collate import IGNORED, response_batch
from regraft.data.example import Example, Reading
from regraft.files import atomic_file, read_json, require_space, size_of, write_json
from regraft.importance.gradients import require_gradients
from regraft.importance.hard import agreements, final_states, response_losses, sampled
from regraft.importance.losses import DecisionLoss, refusal_starts
from regraft.models.anatomy import HEAD_ROLES, LayerAnatomy, LinearAnatomy
from regraft.models.load import Source
from regraft.models.placement import PlacedModel
from regraft.models.walk import Walk
from regraft.restoration.gain import MULTIPLIED, Objective
from regraft.restoration.iterative import (
    Problem,
    Step,
    groups_of,
    step,
    weights_of,
)
from regraft.restoration.ranking import Ranking, empty, load_ranking, put, save_ranking
from regraft.restoration.selection import Head, blocks_of, inside
from regraft.settings.compute import ComputeSettings
from regraft.settings.realigning import RealignSettings
from regraft.stages.common import each_of_share, hidden_state_bytes, load_for_walk
from regraft.watch import Watch

ALGORITHM = 7  # rankings of another one are not taken for this one's
REFRESH = 4  # steps after which it is looked again how hard every example is
PUSH = 0.0075  # of all weights that are to come back, the share in a push
PUSH_UTILITY = (10.0, 0.1)  # weight of utility in pushes toward complying, and toward refusing
KINDS = ("safety", "utility")
Examples = Sequence[Example]


def restore_by_gain(
    dense: Source,
    pruned: Source,
    work: Path,
    settings: RealignSettings,
    readings: Mapping[str, Reading],
    heads: Sequence[Head],
    count: int,
    compute: ComputeSettings,
    watch: Watch,
) -> Ranking:
    """The order in which weights come back, in `settings.steps` steps and with some pushes.

    Args:
        dense: The dense checkpoint, the teacher.
        pruned: The pruned one, restored in memory.
        work: A folder in which every finished step is kept.
        settings: Of gain.
        readings: "safety" (D^s) and "utility" (D^u) -> labelled examples.
        heads: Where weights come back, if `settings.within` is "heads".
        count: How many.
        compute: Device, dtype, batch size, placement.
        watch: Progress.
    """
    work.mkdir(parents=True, exist_ok=True)
    model, pools, losses, walk = _prepare(dense, pruned, work, settings, readings, compute, watch)
    problem = Problem(
        model,
        dense,
        pruned,
        _open(settings, heads),
        settings.swap,
        groups_of(dense, pruned) if settings.swap else {},
    )
    ranking, path = empty(), work / "so-far.safetensors"
    if path.exists():
        ranking = load_ranking(path)
        put(ranking, weights_of(model.network, dense.anatomy), dense)
    trace: list[dict[str, float]] = list(ranking.about.get("steps", ()))
    finished = len(trace)
    layers = len(dense.anatomy.layers)
    sizes = [min(settings.batch, len(pool.examples)) for pool in pools.values()]
    own = sum(sizes) // ranks.world()
    pushed = sum(bool(found["push"]) for found in trace)
    pushes = bool(settings.pushes) * 2 * (len(PUSH_UTILITY) - pushed)  # each looks for candidates
    with watch.task(
        "Restoring by gain",
        2 * own * layers * ((not trace) + settings.steps - (finished - pushed) + pushes),
        "samples x layers",
    ) as done:
        sides: dict[str, tuple[Walk, DecisionLoss]] = {}
        while (task := next_task(settings, count, trace)) is not None:
            at = len(trace)
            drawn = {
                kind: sampled(_costs(work, kind, pools[kind], losses[kind], settings, at), size, at)
                for kind, size in zip(KINDS, sizes, strict=True)
            }
            if not sides or any(sides[kind][1].weights != drawn[kind] for kind in KINDS):
                sides = {}  # the old states go before the new ones come
                for kind, pool in pools.items():
                    chosen = [one for one in pool.examples if one.id in drawn[kind]]
                    taken = pool.walk_of(chosen)
                    if taken is None and chosen == list(pool.examples):
                        pool.walk.forget()  # no others will be asked for
                    new_loss = replace(losses[kind], weights=drawn[kind])
                    sides[kind] = walk(chosen) if taken is None else taken, new_loss
                needed = sum(hidden_state_bytes(dense, one) for one, _ in sides.values())
                require_space(work, needed - size_of(work / "states"))
            new = step(
                problem,
                task.objective,
                sides["safety"],
                sides["utility"],
                task.most,
                ranking,
                work / "states",
                done,
                _promising(work, trace, task),
            )
            ranking = ranking.then(new.ranking)
            trace.append(_told(len(ranking), task, new))
            if ranks.first():
                save_ranking(_candidates_file(work, at), new.candidates)
                save_ranking(path, replace(ranking, about={"steps": trace}))
                _candidates_file(work, at - 1).unlink(missing_ok=True)
            ranks.barrier()
    return replace(ranking, about={"steps": trace})


@dataclass(frozen=True)
class Task:
    """What a step is to do: bring back `most` weights at most, by an objective.

    `push` is how many weights are a push in the last two steps, and 0 in the others.
    """

    objective: Objective
    most: int
    push: int = 0


def next_task(
    settings: RealignSettings, count: int, trace: Sequence[Mapping[str, float]]
) -> Task | None:
    """The next step, given what each step before found; None at the end.

    The path leaves the balance between refusing and complying where it happens to. Behind it come
    pushes, as many toward complying in one step as toward refusing in the next: they go once
    through all balances, so that a search can take the one that spends the over-refusal which is
    allowed.
    """
    pushed = sum(bool(found["push"]) for found in trace)
    if pushed == len(PUSH_UTILITY):
        return None
    restored = int(trace[-1]["restored"]) if trace else 0
    size = max(1, round(PUSH * count))
    pushes = min(settings.pushes, count // (4 * size))  # the path has half of the weights
    room, left = count - 2 * pushes * size - restored, settings.steps - len(trace)
    if not pushed and left > 0 and room > 0 and not _stuck(trace):
        return Task(_objective(settings, trace), -(-room // left))
    if not pushes:
        return None
    return Task(Objective(PUSH_UTILITY[pushed], "none", trust=settings.trust), pushes * size, size)


def _objective(settings: RealignSettings, trace: Sequence[Mapping[str, float]]) -> Objective:
    """Of the next step; what each step before found moves the multiplier, where there is one.

    Harmless prompts may drift as far toward refusing, from the dense model, as they do in the
    pruned one (or not at all, where pruning brought them no nearer): while they are less likely to
    be refused, safety comes first, and what that costs is for a search along the path to weigh.
    """
    objective = Objective(
        settings.utility_weight, settings.constraint, settings.utility_share, settings.trust
    )
    for found in trace:
        objective = objective.adapted(found["drift"] - max(0.0, trace[0]["drift"]))
    return objective


def _stuck(trace: Sequence[Mapping[str, float]]) -> bool:
    """Whether nothing came back with two samples in a row."""
    restored = [0, *(found["restored"] for found in trace)]
    return len(trace) > 1 and len(set(restored[-3:])) == 1


def _candidates_file(work: Path, step: int) -> Path:
    return work / f"candidates-{step}.safetensors"


def _promising(work: Path, trace: Sequence[Mapping[str, float]], task: Task) -> Ranking | None:
    """What the step before found for this one; None where it looked for something else."""
    if not trace or task.push:
        return None
    return load_ranking(_candidates_file(work, len(trace) - 1))


def _told(restored: int, task: Task, new: Step) -> dict[str, float]:
    return {
        "restored": restored,
        "push": task.push,
        "weight": task.objective.utility_weight,
        "safety": new.safety,
        "utility": new.utility,
        "drift": new.drift,
    }


@dataclass(frozen=True)
class Pool:
    """All examples of a kind, and this process's share of them before the pruned model's layers.

    The walk was made of `read` examples, of which some may have been left out since.
    """

    examples: Sequence[Example]
    walk: Walk
    read: int

    def walk_of(self, chosen: Sequence[Example]) -> Walk | None:
        """The pool's own walk, where it is of just these examples."""
        return self.walk if len(chosen) == self.read else None


def _prepare(
    dense: Source,
    pruned: Source,
    work: Path,
    settings: RealignSettings,
    readings: Mapping[str, Reading],
    compute: ComputeSettings,
    watch: Watch,
) -> tuple[PlacedModel, dict[str, Pool], dict[str, DecisionLoss], Callable[[Examples], Walk]]:
    """The pruned model, all examples before its layers, their losses, and walks of some of them."""
    teachers = {kind: work / f"teacher-{kind}.safetensors" for kind in KINDS}
    asks = settings.loss == "distil" and not ranks.decided(
        lambda: all(path.exists() for path in teachers.values())
    )
    model, processor = load_for_walk(
        dense if asks else pruned, compute, watch, processor_from=dense
    )
    require_gradients(model.dtype)

    def walk(examples: Examples) -> Walk:
        return Walk(model, each_of_share(processor, response_batch, examples, compute))

    with watch.task("Reading the prompts", sum(len(r.examples) for r in readings.values())) as done:
        pools = {}
        for kind in KINDS:
            examples = readings[kind].examples
            pools[kind] = Pool(examples, walk(examples), len(examples))
            done(len(examples))
    if asks:
        _ask(pools, teachers, watch)
        model.network.to("meta")  # one model in memory at a time; the pools still hold this one
        model, _ = load_for_walk(pruned, compute, watch, processor_from=dense)
        pools = {kind: replace(pool, walk=pool.walk.on(model)) for kind, pool in pools.items()}
    losses = {
        kind: DecisionLoss(load_file(path) if settings.loss == "distil" else None)
        for kind, path in teachers.items()
    }
    if settings.loss == "distil":
        pools = {kind: _agreed(kind, pools[kind], losses[kind], watch) for kind in KINDS}
        for pool in pools.values():
            check_shares(pool.examples[: settings.batch], compute)
    starts = [ranks.merged(_first_tokens(pools[kind])) for kind in KINDS]
    refusals = refusal_starts(*(list(found.values()) for found in starts))
    if not refusals and settings.constraint in MULTIPLIED:
        watch.note(
            "utility: refusals cannot be told by their first token, so that harmless prompts are "
            "held to beginning their answers as they should, whatever else they begin with"
        )
    losses["utility"] = replace(losses["utility"], refusals=refusals)
    return model, pools, losses, walk


def _first_tokens(pool: Pool) -> dict[str, int]:
    """The first response token of each of this process's examples, by id."""
    kept = {example.id for example in pool.examples}
    found = {}
    for batch in pool.walk.batches:
        assert batch.labels is not None
        for name, labels in zip(batch.ids, batch.labels, strict=True):
            if name in kept:
                found[name] = int(labels[labels != IGNORED][0])
    return found


def _agreed(kind: str, pool: Pool, loss: DecisionLoss, watch: Watch) -> Pool:
    """The pool without the examples of which the dense model itself gets the answer wrong.

    Its say on them would teach what is unwanted: to refuse a harmless prompt, or to comply with a
    harmful one. Where it begins most answers otherwise than given, the given ones are in other
    words than its own, and nothing can be told.
    """
    found = ranks.merged(agreements(pool.walk, loss))
    kept = [one for one in pool.examples if found[one.id]]
    wrong, total = len(pool.examples) - len(kept), len(pool.examples)
    if wrong > len(kept):
        watch.note(
            f"{kind}: the dense model would begin {wrong} of {total} answers otherwise than given, "
            "so that it cannot be told where it is wrong; all are used (--responses self tells)"
        )
        return pool
    if wrong:
        watch.note(f"{kind}: {wrong} of {total} left out, on which the dense model is wrong itself")
    return replace(pool, examples=kept)


def _ask(pools: Mapping[str, Pool], teachers: Mapping[str, Path], watch: Watch) -> None:
    """Write what the dense model, which the pools are before, says to every example."""
    own = sum(len(b.ids) * pool.walk.layers for pool in pools.values() for b in pool.walk.batches)
    with watch.task("Asking the dense model", own, "samples x layers") as done:
        for kind, path in teachers.items():
            states = ranks.merged(final_states(pools[kind].walk, done))
            if ranks.first():
                with atomic_file(path) as temporary:
                    save_file(states, temporary)
    ranks.barrier()


def _costs(
    work: Path, kind: str, pool: Pool, loss: DecisionLoss, settings: RealignSettings, at: int
) -> dict[str, float]:
    """The loss of every example, by id, looked at anew now and then; 0 where all are taken."""
    if len(pool.examples) <= settings.batch:
        return dict.fromkeys((example.id for example in pool.examples), 0.0)
    path = work / f"losses-{kind}-{at - at % REFRESH}.json"
    if not ranks.decided(path.exists):
        values = ranks.merged(response_losses(pool.walk, loss))
        pool.walk.rewind()  # final states of all examples would stay in memory
        if ranks.first():
            write_json(path, {example.id: values[example.id] for example in pool.examples})
        ranks.barrier()
    found: dict[str, float] = read_json(path)
    return found


def _open(
    settings: RealignSettings, heads: Sequence[Head]
) -> Callable[[LayerAnatomy, LinearAnatomy], Tensor | bool]:
    """Where in a weight values may come back: everywhere, nowhere, or at `[out, in]` bool."""

    def everywhere(_layer: LayerAnatomy, linear: LinearAnatomy) -> bool:
        return settings.within != "attention" or linear.role in HEAD_ROLES

    def in_heads(layer: LayerAnatomy, linear: LinearAnatomy) -> Tensor | bool:
        own = [head for index, head in heads if index == layer.index]
        blocks = blocks_of(layer, linear, own)
        return inside(linear.shape, blocks, torch.device("cpu")) if blocks else False

    return in_heads if settings.within == "heads" else everywhere
