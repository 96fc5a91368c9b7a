"""A comparison on Ray: Ray Tune starts the trials, and each trains as it would by itself, on its share.

    files → feature stores, once → Tune: one function a trial → stages, questions → report

A trial's function does little itself. Where the stages run on Ray, their workers, decoders and tasks are what takes
CPUs and GPUs, and the function next to none; where they run in one plain process, that process is the function's.

Killed, a comparison goes on from what lies in its folder, and not from Tune's own record of it: finished trials are
known by their results, and unfinished runs by their checkpoints. So points and seeds may be added as well.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from valley.comparison.compare import conclude, open_comparison
from valley.comparison.settings import CompareSettings
from valley.comparison.trial import Machinery, is_finished, is_stopped, mark_stopped, read_accuracy, run_trial
from valley.comparison.trials import Trial, list_encodings, list_trials
from valley.distributed.cluster import connect, free_resources, num_nodes
from valley.distributed.encode import encode_on_ray
from valley.distributed.train import run_on_ray
from valley.errors import ClusterError
from valley.evaluation.evaluate import run_evaluation
from valley.evaluation.questions import read_questions
from valley.evaluation.settings import EvaluationSettings
from valley.training.encoding import encode_plain
from valley.training.mlflow_tracker import MlflowRun, run_status
from valley.training.run import run_plain

logger = logging.getLogger(__name__)

FUNCTION_CPUS = 0.01
"""Of a trial's function that only waits for others."""
_LOOK_S = 2.0
_NEVER = 1_000_000
"""Reports after which ASHA would end a trial though it is not behind."""
_FORCED_END_S = 10


def compare_on_ray(settings: CompareSettings) -> str:
    """Compares on the cluster that the settings name, or on a local one; returns what there is to say.

    Raises:
        ValleyError: settings, data, model, storage or cluster cannot be used, or trials failed.
    """
    trials = list_trials(settings)
    read_questions(
        settings.evaluation.questions, max_questions=1
    )  # a wrong path is told before, not after the training
    # A function that is told to stop does so when it next reports; what it has started ends with its process.
    os.environ.setdefault("TUNE_FORCE_TRIAL_CLEANUP_S", str(_FORCED_END_S))
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # MLflow has it all; Tune reads its own JSON
    connect(settings.finetune.cluster)
    todo, run = open_comparison(settings, trials, num_nodes=num_nodes())
    with run_status(run):
        failures: list[str] = []
        if todo:
            share = _share(free_resources(), settings)
            for job in list_encodings([trial for trial in todo if not is_finished(trial)], settings):
                logger.info("features\n%s", encode_plain(job) if job.cluster.num_workers == 0 else encode_on_ray(job))
            failures = _tune(settings, todo, run, share)
        return conclude(settings, trials, run, failures)


def _share(resources: Mapping[str, float], settings: CompareSettings) -> dict[str, float]:
    """What one trial may take.

    Raises:
        ClusterError: less than it needs.
    """
    number = settings.concurrent
    share = {name: amount / number for name, amount in resources.items() if ":" not in name}
    share["GPU"] = float(int(resources.get("GPU", 0)) // number)
    share["CPU"] = resources.get("CPU", 0.0) / number - FUNCTION_CPUS
    if settings.finetune.cluster.num_workers == 0:  # one process, on one node
        largest = max(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
        share["CPU"] = min(share["CPU"], largest)
    if resources.get("GPU", 0) and settings.finetune.cluster.gpu is not False and not share["GPU"]:
        raise ClusterError(f"concurrent: {number} trials at once, but only {resources['GPU']:g} GPUs are free")
    if share["CPU"] < 0.5:
        raise ClusterError(f"concurrent: {number} trials at once, but only {resources.get('CPU', 0):g} CPUs are free")
    return share


def _tune(
    settings: CompareSettings, trials: Sequence[Trial], run: MlflowRun | None, share: Mapping[str, float]
) -> list[str]:
    """Runs trials; returns a line for each that failed."""
    by_name = {trial.name: trial for trial in trials}
    plain = settings.finetune.cluster.num_workers == 0
    gpu = settings.finetune.cluster.gpu is not False and share["GPU"] > 0
    needs = {"CPU": share["CPU"], **({"GPU": 1} if gpu else {})} if plain else {"CPU": FUNCTION_CPUS}
    function = tune.with_parameters(_run, trials=by_name, settings=settings, parent=run, share=dict(share))
    scheduler: Any = FIFOScheduler()
    if stopping := settings.stopping:
        scheduler = ASHAScheduler(
            time_attr="training_iteration",
            metric="accuracy",
            mode="max",
            max_t=_NEVER,
            grace_period=stopping.grace,
            reduction_factor=stopping.reduction,
        )
    tuner = tune.Tuner(
        tune.with_resources(function, needs),
        param_space={"trial": tune.grid_search(list(by_name))},
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            max_concurrent_trials=settings.concurrent,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(Path(settings.output) / "tune"),
            callbacks=[JsonLoggerCallback(), _Marks(by_name)],
            verbose=1,
        ),
    )
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Tune would end as if the trials had failed
    try:
        outcomes = tuner.fit()
    except KeyboardInterrupt:
        left = sum(not is_finished(trial) for trial in trials)
        logger.warning("stopped with %d trials left; the same command with --resume goes on with them", left)
        raise
    ended = [outcomes[index] for index in range(len(outcomes))]
    errors = {outcome.config["trial"]: outcome.error for outcome in ended if outcome.config and outcome.error}
    return [
        f"{name}: {_last_line(errors.get(name))}"
        for name, trial in by_name.items()
        if not (is_finished(trial) or is_stopped(trial))
    ]


def _run(
    config: dict[str, str],
    *,
    trials: Mapping[str, Trial],
    settings: CompareSettings,
    parent: MlflowRun | None,
    share: Mapping[str, float],
) -> None:
    """The function of one trial: runs it on a thread, and reports to Tune what appears in its curve."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", force=True)
    trial = trials[config["trial"]]
    if settings.finetune.cluster.num_workers == 0:
        torch.set_num_threads(max(1, int(share["CPU"] + FUNCTION_CPUS)))
        machinery = Machinery(run_plain, run_evaluation)
    else:
        machinery = Machinery(partial(run_on_ray, resources=share), partial(_evaluate_on_ray, share=share))
    work: Future[None] = Future()

    def carry_out() -> None:
        try:
            if not is_stopped(trial):
                run_trial(trial, settings, parent, machinery)
            work.set_result(None)
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            work.set_exception(error)

    # Not one of a pool's threads: those are waited for when the process ends, and Tune may end it in the middle.
    Thread(target=carry_out, name="trial", daemon=True).start()
    last = 0
    while True:
        ended = work.done()
        for step, accuracy in read_accuracy(trial).items():
            if step > last and not trial.baseline:  # what checks the questions is behind, and is wanted nevertheless
                tune.report({"step": step, "accuracy": accuracy})
                last = step
        if ended:
            return work.result()
        with suppress(TimeoutError):
            work.exception(timeout=_LOOK_S)


def _evaluate_on_ray(settings: EvaluationSettings, share: Mapping[str, float]) -> str:
    """Asks on a GPU of the trial's share when it has one: the function itself has none."""
    gpus = int(share["GPU"] > 0 and settings.device != "cpu")
    # Tune would have it run within what the function holds.
    options = {"num_cpus": min(1.0, share["CPU"]), "num_gpus": gpus, "scheduling_strategy": "DEFAULT"}
    answered: str = ray.get(ray.remote(run_evaluation).options(**options).remote(settings))
    return answered


class _Marks(tune.Callback):
    """Notes which trials Tune has stopped, at once: a comparison that is killed later knows it."""

    def __init__(self, trials: Mapping[str, Trial]) -> None:
        self._trials = trials

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """One that is complete for Tune and has no result was stopped."""
        ours = self._trials[trial.config["trial"]]
        if not (is_finished(ours) or is_stopped(ours)):
            mark_stopped(ours, int(trial.last_result.get("step", 0)))


def _name(trial: TuneTrial) -> str:
    return str(trial.config["trial"])


def _last_line(error: BaseException | None) -> str:
    return (str(error or "").strip() or "it did not begin").splitlines()[-1]
