"""From a job's command line to its run: on Ray, in one plain process, or only its plan; and to the evaluation."""

from __future__ import annotations

import os
import socket

from valley.command import parse_command, run_command
from valley.comparison.settings import CompareSettings
from valley.errors import SettingsError
from valley.evaluation.questions import read_questions
from valley.evaluation.settings import EvaluationSettings
from valley.model.saved import saved_folder
from valley.serving.settings import ServeSettings
from valley.training.encoding import EncodeSettings, encode_plain, plan_encoding
from valley.training.settings import RunSettings
from valley.training.two_stages import TwoStages, run_two_stages


def launch_stage(description: str) -> int:
    """Runs the training stage that the command line describes.

    Args:
        description: what the job does, for `--help`.

    Returns:
        The exit status of the job.
    """

    def job() -> None:
        command = parse_command(RunSettings, description)
        _say(plan(command.settings) if command.dry_run else train(command.settings))

    return run_command(job)


def launch_two_stages(description: str) -> int:
    """Runs both training stages, the second from what the first has made; see `launch_stage`."""

    def job() -> None:
        command = parse_command(TwoStages, description)
        settings = command.settings
        if command.dry_run:
            for name, stage in settings.planned.items():
                _say(f"{name.upper()}\n{plan(stage)}")
        else:
            _say(run_two_stages(settings, train))

    return run_command(job)


def launch_evaluation(description: str) -> int:
    """Asks a saved model the questions that the command line names; see `launch_stage`."""

    def job() -> None:
        command = parse_command(EvaluationSettings, description)
        settings = command.settings
        if command.dry_run:
            questions, rejects = read_questions(settings.questions, settings.max_questions)
            _say(f"{len(questions)} questions to {settings.model}, {len(rejects)} unreadable")
        else:
            from valley.evaluation.evaluate import run_evaluation

            _say(run_evaluation(settings))

    return run_command(job)


def launch_encoding(description: str) -> int:
    """Fills the feature store that the command line describes; see `launch_stage`."""

    def job() -> None:
        command = parse_command(EncodeSettings, description)
        settings = command.settings
        if command.dry_run:
            _say(str(plan_encoding(settings)))
        elif settings.cluster.num_workers == 0:
            _say(encode_plain(settings))
        else:
            from valley.distributed.encode import encode_on_ray

            _say(encode_on_ray(settings))

    return run_command(job)


def launch_comparison(description: str) -> int:
    """Compares the trainings that the command line describes; see `launch_stage`."""

    def job() -> None:
        command = parse_command(
            CompareSettings, description, switches={"resume": "go on with the comparison in the output folder"}
        )
        if command.dry_run:
            from valley.comparison.compare import plan_comparison

            _say(plan_comparison(command.settings))
        else:
            from valley.distributed.compare import compare_on_ray

            _say(compare_on_ray(command.settings))

    return run_command(job)


def launch_serving(description: str) -> int:
    """Serves the model that the command line names until it is interrupted; see `launch_stage`."""

    def job() -> None:
        command = parse_command(ServeSettings, description)
        settings = command.settings
        if settings.plain or not (settings.ray.address or os.environ.get("RAY_ADDRESS")):  # it is this machine's
            saved_folder(settings.model)
            if not command.dry_run:
                _check_free(settings.host, settings.port)
        if command.dry_run:
            _say(settings.describe())
        elif settings.plain:
            from valley.serving.plain import serve_plain

            serve_plain(settings)
        else:
            from valley.distributed.serve import serve_on_ray

            serve_on_ray(settings)

    return run_command(job)


def _check_free(host: str, port: int) -> None:
    """Checks a port before a model is loaded: Ray would share it with another server of the same user.

    Raises:
        SettingsError: it cannot be listened on.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise SettingsError([f"port: {port} on {host}: {error.strerror}"]) from None


def train(settings: RunSettings) -> str:
    """Runs one training stage where its settings say; returns its summary as text.

    Raises:
        ValleyError: settings, data, model, storage or cluster cannot be used.
    """
    if settings.cluster.num_workers == 0:
        from valley.training.run import run_plain

        return run_plain(settings)
    from valley.distributed.train import run_on_ray

    return run_on_ray(settings)


def plan(settings: RunSettings) -> str:
    """Returns what a stage is going to do, from metadata alone.

    Raises:
        ValleyError: settings, data or model cannot be used.
    """
    from valley.training.plan import plan_run

    return str(plan_run(settings))


def _say(text: str) -> None:
    print(text)  # noqa: T201 - the last word of a job
