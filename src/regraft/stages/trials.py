"""Trials of a seeded TPE sampler, shared by several processes (Optuna, in an SQLite file).

A worker, one start of `regraft tune`, holds a file lock on its trial. If it is killed, the lock is
released while the trial still counts as running: the next worker takes it over, with its number and
settings. A draw depends on the seed, the number of draws before and which of these have finished,
so that a single worker draws the same trials with and without a kill.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.disk.files import disk_errors, require_empty, write_json
from regraft.disk.locks import locked
from regraft.errors import PassingError, RegraftError
from regraft.heads.ships import HeadSettings, most_rank
from regraft.models.load import Source
from regraft.restoration.base import Between, MethodSettings, Space, method_of, needs_of
from regraft.settings.searching import TuneSettings
from regraft.stages.provenance import holds

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial

_MOST_RANK = 10
_PATIENCE = 120  # seconds to wait while another process writes to the file
_PASSING = ("is full", "is locked", "readonly")  # SQLite's errors for an undamaged file
_TRIED = "tried"  # attribute of a finished trial that holds its outcome


class Trials:
    """The trials in a folder, which is created if need be.

    Raises:
        RegraftError: Optuna is not installed, or too old.
    """

    def __init__(self, folder: Path, space: Space, settings: TuneSettings) -> None:
        self._folder, self._space, self._settings = folder, space, settings
        self._optuna = optuna = require_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.file = folder / "study.db"
        with exclusive(folder, "study"), self._readable():
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{self.file.absolute()}",
                engine_kwargs={"connect_args": {"timeout": _PATIENCE}},
            )
            self._study: Study = optuna.create_study(
                study_name="regraft", storage=storage, load_if_exists=True
            )

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Turn errors of Optuna, SQLAlchemy and SQLite about the file into a clear one."""
        try:
            with disk_errors(self.file):
                yield
        except RegraftError:
            raise
        except Exception as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            if any(passing in reason for passing in _PASSING):
                raise PassingError(
                    f"{self.file} cannot be written now ({reason}). The same command continues "
                    "from here."
                ) from error
            raise RegraftError(
                f"{self.file} is damaged or no file of trials ({reason}). Choose another folder."
            ) from error

    @contextmanager
    def take(self, most: int) -> Iterator[Trial | None]:
        """A trial that no other worker is running; None once `most` are finished or running.

        `finish` completes it. If the block raises an error, the trial has failed and no longer
        counts; if the block is stopped or killed, the next worker takes the trial over.
        """
        optuna = self._optuna
        with ExitStack() as locks:
            with exclusive(self._folder, "study"):
                frozen = self._left_behind(locks) or self._new(most, locks)
            if frozen is None:
                yield None
                return
            with self._readable():
                trial = optuna.trial.Trial(self._study, frozen._trial_id)
            try:
                yield trial
            except Exception:
                with suppress(RegraftError), self._readable():  # else the next worker takes it over
                    self._study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
                raise

    def finish(
        self, trial: Trial, value: float, excess: Mapping[str, float], tried: Any = None
    ) -> None:
        """Record the outcome of a trial.

        Args:
            value: The lower the better.
            excess: How far it is beyond each bound; above 0 the trial is out of bounds.
            tried: JSON values to save with it.
        """
        with self._readable():
            for name, by in excess.items():
                if name not in trial.constraints:  # else saved by a worker that died right here
                    trial.set_constraint(name, by)
            trial.set_user_attr(_TRIED, tried)
            self._study.tell(trial, value)

    def finished(self) -> dict[int, Any]:
        """The saved outcome of every finished trial, by its number; None where there is none."""
        return {one.number: one.user_attrs.get(_TRIED) for one in self._in_state("COMPLETE")}

    def failed(self) -> int:
        """How many trials have ended in an error."""
        return len(self._in_state("FAIL"))

    def _in_state(self, *states: str) -> list[FrozenTrial]:
        wanted = [self._optuna.trial.TrialState[state] for state in states]
        with self._readable():
            found: list[FrozenTrial] = self._study.get_trials(deepcopy=False, states=wanted or None)
            return found

    def _left_behind(self, locks: ExitStack) -> FrozenTrial | None:
        """A trial whose worker was killed, taken over by this one; None if there is none."""
        for one in self._in_state("RUNNING"):
            try:
                self._lock(one.number, locks)
            except RegraftError:  # its worker is alive
                continue
            # Its worker may have finished it just now, which freed the lock.
            if one.number in [again.number for again in self._in_state("RUNNING")]:
                return one
        return None

    def _new(self, most: int, locks: ExitStack) -> FrozenTrial | None:
        if len(self._in_state("COMPLETE", "RUNNING")) >= most:
            return None
        drawn = self._in_state()
        with self._readable():
            running = self._draw(drawn)
        self._lock(len(drawn), locks)
        with self._readable():
            self._study.add_trial(running)
        return self._in_state()[-1]

    def _draw(self, drawn: list[FrozenTrial]) -> FrozenTrial:
        """A running trial with settings that the sampler draws, given the earlier trials.

        It is drawn in a copy of the study and then added to the study in one transaction: `ask`
        writes one setting after the other, and a kill would leave a trial without some of them.
        """
        optuna, own = self._optuna, self._settings
        seed = int(np.random.SeedSequence([own.sampler_seed, len(drawn)]).generate_state(1)[0])
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=own.random_trials)
        copy = optuna.create_study(sampler=sampler)
        copy.add_trials(drawn)
        asked = copy.ask(self._distributions())
        running: FrozenTrial = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            params=asked.params,
            distributions=asked.distributions,
        )
        return running

    def _distributions(self) -> dict[str, BaseDistribution]:
        kinds = self._optuna.distributions

        def distribution(of: Between | tuple[str, ...]) -> Any:
            if isinstance(of, tuple):
                return kinds.CategoricalDistribution(of)
            if of.whole:
                return kinds.IntDistribution(int(of.low), int(of.high), log=of.log)
            return kinds.FloatDistribution(of.low, of.high, log=of.log)

        return {name: distribution(of) for name, of in self._space.items()}

    def _lock(self, number: int, locks: ExitStack) -> None:
        lock = _lock_file(self._folder, f"trial-{number:04d}")
        locks.enter_context(locked(lock, lock))


def space_of(
    dense: Source,
    method: MethodSettings,
    tuning: TuneSettings,
    scoring: HeadSettings,
    kept: float,
    samples: int,
) -> Space:
    """The search space: the method's own, and r_max if it needs head scores.

    Args:
        scoring: How heads are scored; if screened, only the candidates may be chosen.
        kept: Share of weights that pruning kept.
        samples: Number of D^s prompts, which bounds r_max.

    Raises:
        RegraftError: there is nothing to tune, or `tuning.keep` names something else.
    """
    space = method_of(method).space(method, dense, kept)
    if not space:
        raise RegraftError(f"There is nothing to tune of {method.method}.")
    if needs_of(method).heads is not None:
        heads = space.get("top_heads")
        if scoring.mode == "screened" and isinstance(heads, Between):
            space["top_heads"] = Between(1, min(heads.high, scoring.candidates), whole=True)
        most = min(_MOST_RANK, most_rank(samples, dense.architecture.hidden_size))
        space["r_max"] = Between(1, most, whole=True)
    if unknown := sorted(set(tuning.keep) - space.keys()):
        raise RegraftError(
            f"keep: {unknown[0]!r} is not tuned here; {method.method} tunes {', '.join(space)}."
        )
    left = {name: of for name, of in space.items() if name not in tuning.keep}
    if not left:
        raise RegraftError("keep names every setting, which leaves nothing to tune.")
    return left


def claim(folder: Path, about: Mapping[str, Any]) -> None:
    """Mark a folder as that of this tuning, or check that it is.

    Raises:
        RegraftError: it holds another tuning, or something else.
    """
    try:
        require_empty(folder)
    except RegraftError:
        if not (folder / "locks").exists():  # else other workers have begun, perhaps just now
            raise
    marker = "tune.json"
    with disk_errors(folder), exclusive(folder, "claim"):
        if not (folder / marker).exists():
            write_json(folder / marker, about)
        holds(folder, about, marker=marker)


@contextmanager
def one_at_a_time(folder: Path, seconds: dict[str, float], step: str, of: str) -> Iterator[None]:
    """Guard of a step: one worker at a time makes it, and its time is added to `seconds`."""
    with exclusive(folder, f"{step} {of}".strip().replace(" ", "-")):
        start = time.monotonic()
        yield
        seconds[step] = seconds.get(step, 0.0) + time.monotonic() - start


def exclusive(folder: Path, name: str) -> AbstractContextManager[None]:
    """Lock `name` among the processes that tune into this folder, waiting for its turn."""
    lock = _lock_file(folder, name)
    return locked(lock, lock, wait=True)


def _lock_file(folder: Path, name: str) -> Path:
    locks = folder / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return locks / f"{name}.lock"


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
