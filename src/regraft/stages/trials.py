"""Trials by a seeded TPE sampler, which several processes share (Optuna, in an SQLite file).

A worker holds a file lock on the trial that it is at. Where it is killed the lock is free and the
trial still running: the next worker takes it over, with its number and its settings. What is drawn
depends on the seed, how many were drawn before and which of these have finished, so that one worker
draws the same with and without a kill.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.disk.files import disk_errors, locked, require_empty, write_json
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
_PATIENCE = 120  # seconds for which a process waits for another one that writes to the file
_PASSING = ("is full", "is locked", "readonly")  # what SQLite says of a sound file
_TRIED = "tried"  # what is kept of a finished trial, among its attributes


class Trials:
    """The trials in a folder, which need not be there yet.

    Raises:
        RegraftError: Optuna is not installed, or too old.
    """

    def __init__(self, folder: Path, space: Space, settings: TuneSettings) -> None:
        self._folder, self._space, self._settings = folder, space, settings
        self._optuna = optuna = require_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.file = folder / "study.db"
        with exclusive(folder, "study"):
            self._study = self._opened()

    def _opened(self) -> Study:
        optuna = self._optuna
        with self._readable():
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{self.file.absolute()}",
                engine_kwargs={"connect_args": {"timeout": _PATIENCE}},
            )
            found: Study = optuna.create_study(
                study_name="regraft", storage=storage, load_if_exists=True
            )
            return found

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Turn what three packages raise of the file that lies below them into a clear error."""
        try:
            with disk_errors(self.file):
                yield
        except RegraftError:
            raise
        except Exception as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            if any(passing in reason for passing in _PASSING):
                raise PassingError(
                    f"{self.file} cannot be written now ({reason}). The same command goes on from "
                    "here."
                ) from error
            raise RegraftError(
                f"{self.file} is damaged, or no file of trials ({reason}). Choose another folder."
            ) from error

    @contextmanager
    def take(self, most: int) -> Iterator[Trial | None]:
        """A trial that nobody else is at; None where `most` are finished or being worked on.

        `finish` ends it. With an error in the block it has failed and counts no more; where the
        block is stopped or killed it waits for the next worker.
        """
        optuna = self._optuna
        with ExitStack() as held:
            with exclusive(self._folder, "study"):
                frozen = self._left_behind(held) or self._new(most, held)
            if frozen is None:
                yield None
                return
            with self._readable():
                trial = optuna.trial.Trial(self._study, frozen._trial_id)
            try:
                yield trial
            except Exception:
                self._study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
                raise

    def finish(
        self, trial: Trial, value: float, excess: Mapping[str, float], tried: Any = None
    ) -> None:
        """Record what came of a trial.

        Args:
            trial: From `take`.
            value: The lower the better.
            excess: How far it is beyond each bound; above 0 the trial is out of bounds.
            tried: JSON values to be kept with it.
        """
        with self._readable():
            for name, by in excess.items():
                if name not in trial.constraints:  # else a worker died right here
                    trial.set_constraint(name, by)
            trial.set_user_attr(_TRIED, tried)
            self._study.tell(trial, value)

    def finished(self) -> dict[int, Any]:
        """What was kept of every finished trial, by its number.

        Raises:
            RegraftError: another version of regraft wrote it otherwise.
        """
        trials = self._in_state("COMPLETE")
        if any(_TRIED not in one.user_attrs for one in trials):
            raise RegraftError(
                f"{self._folder} was begun by another version of regraft: choose another folder."
            )
        return {one.number: one.user_attrs[_TRIED] for one in trials}

    def failed(self) -> int:
        """How many trials have ended in an error."""
        return len(self._in_state("FAIL"))

    def _in_state(self, *states: str) -> list[FrozenTrial]:
        wanted = [self._optuna.trial.TrialState[state] for state in states]
        with self._readable():
            found: list[FrozenTrial] = self._study.get_trials(deepcopy=False, states=wanted or None)
            return found

    def _left_behind(self, held: ExitStack) -> FrozenTrial | None:
        """A trial whose worker was killed; it is this one's now."""
        for one in self._in_state("RUNNING"):
            try:
                self._hold(one.number, held)
            except RegraftError:  # its worker is alive
                continue
            # Its worker may have finished it just now, which freed the lock.
            if one.number in [again.number for again in self._in_state("RUNNING")]:
                return one
        return None

    def _new(self, most: int, held: ExitStack) -> FrozenTrial | None:
        if len(self._in_state("COMPLETE", "RUNNING")) >= most:
            return None
        drawn = self._in_state()
        with self._readable():
            running = self._draw(drawn)
        self._hold(len(drawn), held)
        with self._readable():
            self._study.add_trial(running)
        return self._in_state()[-1]

    def _draw(self, drawn: list[FrozenTrial]) -> FrozenTrial:
        """A running trial with settings that the sampler takes, given those drawn before.

        It is drawn in a copy of the study, and then added to the study in one transaction: `ask`
        writes one setting after the other, and a kill would leave a trial that has some of them.
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

    def _hold(self, number: int, held: ExitStack) -> None:
        lock = _lock(self._folder, f"trial-{number:04d}")
        held.enter_context(locked(lock, lock))


def space_of(
    dense: Source,
    method: MethodSettings,
    tuning: TuneSettings,
    scoring: HeadSettings,
    kept: float,
    samples: int,
) -> Space:
    """What is varied: what the method says, and r_max of the scoring of heads.

    Args:
        dense: Whose heads bound their number.
        tuning: What stays as given.
        scoring: Of heads; of screened ones, only the candidates may be taken.
        kept: Share of weights that pruning kept.
        samples: Of D^s, which bound r_max.

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
    """Make a folder that of this tuning, or see that it is.

    Raises:
        RegraftError: it holds another one, or something else.
    """
    try:
        require_empty(folder)
    except RegraftError:
        if not (folder / "locks").exists():  # else another worker is here, perhaps at this moment
            raise
    marker = folder / "tune.json"
    with disk_errors(folder), exclusive(folder, "claim"):
        if not marker.exists():
            write_json(marker, about)
        holds(folder, marker, about)


@contextmanager
def alone(folder: Path, seconds: dict[str, float], step: str, of: str) -> Iterator[None]:
    """Surround a step: one worker at a time does it, and what it took is added to `seconds`."""
    with exclusive(folder, f"{step} {of}".strip().replace(" ", "-")):
        start = time.monotonic()
        yield
        seconds[step] = seconds.get(step, 0.0) + time.monotonic() - start


def exclusive(folder: Path, name: str) -> AbstractContextManager[None]:
    """Wait for other processes that tune into this folder to be done with `name`."""
    lock = _lock(folder, name)
    return locked(lock, lock, wait=True)


def _lock(folder: Path, name: str) -> Path:
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
