"""MLflow, from a background thread: a slow or dead server costs curve points, never training time.

One job is one MLflow run. The driver opens it (`start_run`), rank 0 of the workers writes to it by its id, also after a
restart, and the driver ends it (`end_run`). MLflow itself is imported inside the functions: it costs seconds.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from valley.errors import TrackingError
from valley.training.settings import RunSettings

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

_MAX_POINTS = 20_000
_POINTS_A_CALL = 1_000
_PARAMS_A_CALL = 100
_MAX_VALUE_CHARS = 6_000
_RETRY_S = 5.0
_PERMANENT = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE", "PERMISSION_DENIED"}


def tracking_uri(settings: RunSettings) -> str:
    """Returns the MLflow URI of a run: the setting, else `$MLFLOW_TRACKING_URI`, else SQLite beside the run folder.

    MLflow's own default is a database in the *current* folder, which in a cluster's worker is a scratch folder.
    """
    uri = settings.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return f"sqlite:///{Path(settings.output).parent.absolute() / 'mlflow.db'}"
    return f"sqlite:///{path.absolute()}" if (path := _sqlite_path(uri)) else uri


def check_tracking_uri(uri: str, num_nodes: int) -> None:
    """Refuses a tracking URI that not every node can write to.

    Raises:
        TrackingError: a file or an SQLite database with more than one node.
    """
    if num_nodes > 1 and (_is_file_store(uri) or uri.startswith("sqlite:")):
        raise TrackingError(
            f"tracking.uri: {uri} lies on one node's disk and the cluster has {num_nodes} nodes; "
            "give the address of an MLflow server (`mlflow server`, or set tracking.enabled=false)"
        )


def ui_command(uri: str) -> str:
    """Returns the shell command that opens MLflow's page on what was tracked."""
    if uri.startswith("http"):
        return f"open {uri}"
    mlflow = Path(sys.executable).with_name("mlflow")  # so that it can be pasted where no environment is active
    return shlex.join([str(mlflow), "ui", "--backend-store-uri", uri])


@dataclass(frozen=True)
class MlflowRun:
    """One run on one server; small enough to travel to the workers."""

    uri: str
    run_id: str


def start_run(settings: RunSettings, *, num_nodes: int = 1, run_id: str | None = None) -> MlflowRun | None:
    """Opens the MLflow run of a job, in the driver, before any worker starts.

    Creating the database and the experiment here keeps several processes from racing on SQLite's migrations.

    Args:
        settings: the run's settings.
        num_nodes: nodes of the cluster.
        run_id: the run to go on with, when the job goes on; where nobody knows it, a new one says what it continues.

    Returns:
        The run; None when tracking is off.

    Raises:
        TrackingError: the URI cannot serve, or nobody answers there.
    """
    if not settings.tracking.enabled:
        return None
    uri = tracking_uri(settings)
    check_tracking_uri(uri, num_nodes)
    from mlflow.entities import RunStatus
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = make_client(uri)
        if run_id is not None and _is_known(client, run_id):
            client.update_run(run_id, status=RunStatus.to_string(RunStatus.RUNNING))
            return MlflowRun(uri, run_id)
        tags = {} if run_id is None else {"valley.continues": run_id}
        if settings.tracking.parent:
            tags["mlflow.parentRunId"] = settings.tracking.parent
        name = settings.tracking.run_name or Path(settings.output).name
        run = client.create_run(_experiment(client, uri, settings.tracking.experiment), run_name=name, tags=tags)
        return MlflowRun(uri, run.info.run_id)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise TrackingError(f"tracking.uri: {uri} cannot be used: {_first_line(error)}") from error


def _is_known(client: MlflowClient, run_id: str) -> bool:
    """Whether the server has the run: a new machine's own database has not."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        logger.warning("MLflow does not know the run %s that goes on: another one is begun", run_id)
        return False
    return True


def end_run(run: MlflowRun | None, status: Status) -> None:
    """Marks the run as ended; a server that is gone by now is only logged."""
    if run is None:
        return
    from mlflow.exceptions import MlflowException

    try:
        make_client(run.uri).set_terminated(run.run_id, status)
    except (MlflowException, OSError) as error:
        logger.warning("MLflow: the run could not be marked as %s: %s", status, _first_line(error))


@contextmanager
def run_status(run: MlflowRun | None, at_end: Callable[[], Status] = lambda: "FINISHED") -> Iterator[None]:
    """Within: the run. Ends it as what happens within: failed, killed by Ctrl-C, or as `at_end` says."""
    try:
        yield
    except KeyboardInterrupt:
        end_run(run, "KILLED")
        raise
    except BaseException:
        end_run(run, "FAILED")
        raise
    end_run(run, at_end())


class MlflowTracker:
    """Writes to one MLflow run from a thread of its own.

    Points wait in a bounded queue. When the server is slower than the training, the oldest points are dropped and
    counted; when it is gone, it is tried again every few seconds and the error is logged once.
    """

    def __init__(self, run: MlflowRun, *, flush_s: float = 60.0, max_points: int = _MAX_POINTS) -> None:
        self._uri, self._run_id, self._flush_s, self._max_points = run.uri, run.run_id, flush_s, max_points
        self._points: deque[tuple[str, float, int, int]] = deque()
        self._num_sending = 0
        self._params: dict[str, str] = {}
        self._artifacts: deque[tuple[Path, str]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._abandoned = False
        self._in_trouble = False
        self.dropped_points = 0
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def log_params(self, params: Mapping[str, str]) -> None:
        """Queues parameters."""
        with self._changed:
            self._params |= params
            self._changed.notify()

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queues one point a curve; drops the oldest when the queue is full."""
        now_ms = int(time.time() * 1000)
        with self._changed:
            self._points.extend((name, float(value), now_ms, step) for name, value in metrics.items())
            self._drop_oldest()
            self._changed.notify()

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Queues a file or folder; it is read when its turn comes."""
        with self._changed:
            self._artifacts.append((path, folder))
            self._changed.notify()

    def close(self) -> None:
        """Waits for the queue to empty, at most `flush_s` seconds, and says what was lost."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(self._flush_s)
        with self._changed:
            self._abandoned = True
            self._changed.notify()
            lost = len(self._points) + self._num_sending + self.dropped_points
            if lost or self._artifacts or self._params or self._thread.is_alive():
                logger.warning(
                    "MLflow: %d points, %d parameters and %d artifacts did not reach %s",
                    lost, len(self._params), len(self._artifacts), self._uri,
                )  # fmt: skip

    def _work(self) -> None:
        """The thread: sends whatever waits; what fails stays in the queue for the next try."""
        client: MlflowClient | None = None
        while self._wait_for_work():
            try:
                client = client or make_client(self._uri)
                self._send_params(client)
                self._send_points(client)
                self._send_artifacts(client)
                self._in_trouble = False
            except Exception as error:  # noqa: BLE001 - the rim: nothing a tracking server does may end the training
                self._rest(error)

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._points or self._params or self._artifacts):
                if self._closing:
                    return False
                self._changed.wait()
            return not self._abandoned

    def _send_params(self, client: MlflowClient) -> None:
        from mlflow.entities import Param

        while params := dict(islice(self._params.items(), _PARAMS_A_CALL)):
            entities = [Param(key, value[:_MAX_VALUE_CHARS]) for key, value in params.items()]
            self._call(lambda entities=entities: client.log_batch(self._run_id, params=entities))
            with self._changed:
                for key in params:
                    del self._params[key]

    def _send_points(self, client: MlflowClient) -> None:
        from mlflow.entities import Metric

        while batch := self._take_points():
            metrics: list[Metric] = [Metric(name, value, time_ms, step) for name, value, time_ms, step in batch]
            try:
                self._call(lambda metrics=metrics: client.log_batch(self._run_id, metrics=metrics))
            except BaseException:
                self._put_back(batch)
                raise

    def _send_artifacts(self, client: MlflowClient) -> None:
        while self._artifacts:
            path, folder = self._artifacts[0]
            log = client.log_artifacts if path.is_dir() else client.log_artifact
            target = f"{folder}/{path.name}".strip("/") if path.is_dir() else folder
            self._call(lambda log=log, path=path, target=target: log(self._run_id, str(path), target or None))
            with self._changed:
                self._artifacts.popleft()

    def _call(self, send: Any) -> None:
        """Makes one call; what the server will never take is logged and given up, other errors are the caller's."""
        from mlflow.exceptions import MlflowException

        try:
            send()
        except FileNotFoundError as error:
            logger.warning("MLflow: artifact skipped: %s", error)
        except MlflowException as error:
            if error.error_code not in _PERMANENT:
                raise
            logger.warning("MLflow refused: %s", _first_line(error))

    def _take_points(self) -> list[tuple[str, float, int, int]]:
        with self._changed:
            self._num_sending = min(len(self._points), _POINTS_A_CALL)
            return [self._points.popleft() for _ in range(self._num_sending)]

    def _put_back(self, batch: list[tuple[str, float, int, int]]) -> None:
        with self._changed:
            self._num_sending = 0
            self._points.extendleft(reversed(batch))
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        """Keeps the queue within its bound; the lock is held."""
        surplus = len(self._points) - self._max_points
        if surplus <= 0:
            return
        if self.dropped_points == 0:
            logger.warning("MLflow: the queue of %d points is full, the oldest are dropped", self._max_points)
        for _ in range(surplus):
            self._points.popleft()
        self.dropped_points += surplus

    def _rest(self, error: Exception) -> None:
        """Logs the first error of a row of them and waits before the next try."""
        if not self._in_trouble:
            logger.warning("MLflow: %s; training goes on, trying again every %g s", _first_line(error), _RETRY_S)
        self._in_trouble = True
        with self._changed:
            self._changed.wait_for(lambda: self._abandoned, timeout=_RETRY_S)


def make_client(uri: str) -> MlflowClient:
    """Returns a client that tells soon when nobody answers: trying again, for minutes in MLflow, is done here."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if path := _sqlite_path(uri):
        path.parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Returns the experiment's id, after making it when there is none; artifacts of SQLite lie beside the database."""
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    path = _sqlite_path(uri)
    location = (path.parent / "mlartifacts" / name).as_uri() if path else None
    return str(client.create_experiment(name, artifact_location=location))


def _sqlite_path(uri: str) -> Path | None:
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)) if uri.startswith(prefix) else None


def _is_file_store(uri: str) -> bool:
    return urlsplit(uri).scheme in ("", "file") and not uri.startswith("databricks")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
