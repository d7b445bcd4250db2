"""Trials of a seeded TPE sampler, kept in an SQLite file that several processes share (Optuna).

A worker holds a lock on the trial that it is at. Of a worker that was killed the lock is free and
the trial still running: the next worker takes it over, with its number and its settings. One whose
worker was killed while it was drawn is drawn anew, under the next number. Trials are handed out one
at a time, and what is drawn for a trial depends on the seed, how many were drawn before and which
of these have finished, so that one worker draws the same with and without a kill.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.errors import RegraftError
from regraft.files import locked
from regraft.restoration.base import Between, Space

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial

_PATIENCE = 120  # seconds for which a process waits for another one that writes to the file


@dataclass(frozen=True)
class Task:
    """A trial to be done: its settings, and what came out of it so far."""

    number: int
    settings: Mapping[str, Any]
    constraints: dict[str, float] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """A finished trial; `constraints` above 0 are violated."""

    number: int
    settings: Mapping[str, Any]
    value: float
    constraints: Mapping[str, float]
    record: Mapping[str, Any]


class Trials:
    """The trials in the file `path`, which need not be there yet.

    Args:
        path: An SQLite file.
        locks: A folder for locks.
        space: What is varied.
        seed: Of the sampler.
        random: So many trials are at random.

    Raises:
        RegraftError: Optuna is not installed, or too old.
    """

    def __init__(self, path: Path, locks: Path, space: Space, seed: int, random: int) -> None:
        self._locks, self._space, self._seed, self._random = locks, space, seed, random
        locks.mkdir(parents=True, exist_ok=True)
        with self.exclusive("study"):
            self._study = _open(path)

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Wait for other workers at `name` to be done."""
        with self.alone(self._locks, name):
            yield

    @staticmethod
    def alone(locks: Path, name: str) -> AbstractContextManager[None]:
        """`exclusive`, before there are trials."""
        lock = locks / f"{name}.lock"
        return locked(lock, lock, wait=True)

    @contextmanager
    def take(self, most: int) -> Iterator[Task | None]:
        """A trial that nobody else is at; None where `most` are finished or being worked on.

        It is finished, with the value, by `finish`. With an error in the block it has failed and
        counts no more; where the block is stopped or killed it waits for the next worker.
        """
        with ExitStack() as held:
            with self.exclusive("study"):
                trial = self._left_behind(held) or self._new(most, held)
            if trial is None:
                yield None
                return
            try:
                yield Task(trial.number, dict(trial.params))
            except Exception as error:
                from optuna.trial import TrialState

                self._study.set_user_attr(f"error-{trial.number}", str(error))
                self._study.tell(trial.number, state=TrialState.FAIL)
                raise

    def finish(self, task: Task, value: float) -> None:
        """Record the outcome of a trial, the lower the better."""
        from optuna.trial import Trial

        trial = Trial(self._study, self._frozen(task.number)._trial_id)
        for name, excess in task.constraints.items():
            if name not in trial.constraints:  # of a worker killed right here
                trial.set_constraint(name, excess)
        for name, content in task.record.items():
            trial.set_user_attr(name, content)
        self._study.tell(task.number, value)

    def finished(self) -> list[Finished]:
        """Every finished trial, by number."""
        from optuna.trial import TrialState

        return [
            Finished(one.number, one.params, one.value, one.constraints, one.user_attrs)
            for one in self._all(TrialState.COMPLETE)
            if one.value is not None
        ]

    def failed(self) -> int:
        """How many trials have ended in an error."""
        from optuna.trial import TrialState

        return sum(self._drawn(one) for one in self._all(TrialState.FAIL))

    def _drawn(self, trial: FrozenTrial) -> bool:
        return trial.params.keys() == self._space.keys()

    def _all(self, *states: Any) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states or None)

    def _frozen(self, number: int) -> FrozenTrial:
        return next(one for one in self._all() if one.number == number)

    def _left_behind(self, held: ExitStack) -> FrozenTrial | None:
        from optuna.trial import TrialState

        for number in [one.number for one in self._all(TrialState.RUNNING)]:
            try:
                self._hold(number, held)
            except RegraftError:  # its worker is alive
                continue
            one = self._frozen(number)
            if one.state != TrialState.RUNNING:  # finished since, which freed the lock
                continue
            if self._drawn(one):
                return one
            self._study.tell(one.number, state=TrialState.FAIL)  # killed while it was drawn
        return None

    def _new(self, most: int, held: ExitStack) -> Trial | None:
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState

        if len(self._all(TrialState.COMPLETE, TrialState.RUNNING)) >= most:
            return None
        before = self._all()
        entropy = [self._seed, sum(map(self._drawn, before))]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        self._study.sampler = TPESampler(seed=seed, n_startup_trials=self._random)
        self._hold(len(before), held)
        return self._study.ask(_distributions(self._space))

    def _hold(self, number: int, held: ExitStack) -> None:
        lock = self._locks / f"trial-{number:04d}.lock"
        held.enter_context(locked(lock, lock))


def _open(path: Path) -> Study:
    optuna = require_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{path.absolute()}", engine_kwargs={"connect_args": {"timeout": _PATIENCE}}
    )
    study: Study = optuna.create_study(
        study_name="regraft", storage=storage, direction="minimize", load_if_exists=True
    )
    return study


def require_optuna() -> Any:
    """The module optuna.

    Raises:
        RegraftError: it is not installed, or too old.
    """
    try:
        import optuna
    except ImportError as error:
        raise RegraftError(
            "Tuning needs Optuna, which is not installed: pip install 'regraft[tune]'."
        ) from error
    if int(optuna.__version__.partition(".")[0]) < 5:
        raise RegraftError(
            f"Tuning needs Optuna 5 or newer, and {optuna.__version__} is installed: "
            "pip install 'regraft[tune]'."
        )
    return optuna


def _distributions(space: Space) -> dict[str, BaseDistribution]:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    def distribution(of: Between | tuple[str, ...]) -> BaseDistribution:
        if isinstance(of, tuple):
            return CategoricalDistribution(of)
        if of.whole:
            return IntDistribution(int(of.low), int(of.high), log=of.log)
        return FloatDistribution(of.low, of.high, log=of.log)

    return {name: distribution(of) for name, of in space.items()}
