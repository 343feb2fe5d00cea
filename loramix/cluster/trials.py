"""Runs trainings as trials of Ray Tune: some at a time, retried, and resumed after the driver's end.

Tune keeps which trial has ended. What a training has reached is in its run directory, in our own checkpoints, so a
trial that is started again resumes there. Run directories, data and base must be visible to all machines.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramix.errors import Busy, LoramixError

RETRIES = 3
"""How often a trial is started again after its process died."""
_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # one table, not one more for each trial that starts or ends
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no files for TensorBoard
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command, it does not count as finished
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # `FAILED` comes without the others
}
FAILED = "failed"
"""Metric of a trial that cannot succeed: the message of its error."""

Report = Callable[[Mapping[str, Any]], None]
Trial = Callable[[Mapping[str, Any], Any, Report], None]
"""(config, what all trials share, report) -> None; a function of a module."""


@dataclass(frozen=True, slots=True)
class Trials:
    """How trials are run.

    Args:
        key: equal for a run that may resume an earlier one.
        directory: directory of Tune's own state, which is deleted at the end.
        columns: metrics of the table.
        workers: largest number of trials at a time; as many as there are free CPUs if None.
        cpus_per_worker: CPUs of a trial, which are its threads.
    """

    key: Sequence[str]
    directory: Path
    columns: Sequence[str]
    workers: int | None = None
    cpus_per_worker: int = 1

    def run(
        self, trial: Trial, shared: Any, space: Mapping[str, Any], **options: Any
    ) -> list[dict[str, Any]]:
        """Run a trial for each point of a space, or resume an interrupted run.

        Args:
            trial: the training.
            shared: argument of all trials.
            space: Tune's search space.
            **options: arguments of Tune's ``TuneConfig``.

        Returns:
            The last metrics of each trial, with its ``config``.

        Raises:
            LoramixError: a trial failed; the others have ended.
        """
        os.environ.update(_SETTINGS)
        from ray import tune

        digest = hashlib.sha256("\0".join(self.key).encode()).hexdigest()[:16]
        place = self.directory.absolute() / digest
        work = tune.with_resources(
            tune.with_parameters(training, trial=trial, shared=shared, threads=self.cpus_per_worker),
            {"cpu": self.cpus_per_worker},
        )
        tuner = _restored(place, work) or tune.Tuner(
            work,
            param_space=dict(space),
            tune_config=tune.TuneConfig(max_concurrent_trials=self.workers, **options),
            run_config=tune.RunConfig(
                name=digest,
                storage_path=str(place.parent),
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                progress_reporter=self._table(list(space)),
                verbose=1,
            ),
        )
        with redirect_stdout(sys.stderr):
            results = tuner.fit()
        for result in results:
            if result.error is not None:
                reason = (str(result.error).strip().splitlines() or ["no reason"])[-1]
                raise LoramixError(f"{_words(result.config)} failed {RETRIES + 1} times: {reason}")
        shutil.rmtree(place, ignore_errors=True)  # all have ended: the run directories say the rest
        for result in results:
            if FAILED in (result.metrics or {}):
                raise LoramixError(f"{_words(result.config)}: {result.metrics[FAILED]}")
        return [{**(result.metrics or {}), "config": result.config} for result in results]

    def _table(self, parameters: Sequence[str]) -> Any:
        """Return the reporter of one table: a line for each trial."""
        from ray.tune import CLIReporter

        return CLIReporter(
            metric_columns=list(self.columns), parameter_columns=list(parameters), max_report_frequency=30
        )


def _restored(place: Path, work: Any) -> Any:
    """Return the tuner of an interrupted run; None if there is none that can be read."""
    from ray.tune import Tuner

    if not Tuner.can_restore(str(place)):
        return None
    try:
        return Tuner.restore(str(place), work, resume_unfinished=True, restart_errored=True)
    except Exception:
        # cut off while it was written, or by another version of Ray: run directories are enough
        shutil.rmtree(place)
        return None


def _words(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in config.items())


def training(config: dict[str, Any], trial: Trial, shared: Any, threads: int) -> None:
    """Run a trial in its own process."""
    import torch
    from ray import tune

    torch.set_num_threads(threads)  # sums in the same order as in a process of its own
    try:
        trial(config, shared, lambda metrics: tune.report(dict(metrics)))
    except Busy:
        raise  # the process of an earlier attempt is ending
    except LoramixError as error:
        tune.report({FAILED: str(error)})
