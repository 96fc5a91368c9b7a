"""What every test shares: shape checks on, quiet libraries, and one local Ray cluster for the whole session."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)

from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Shapes and dtypes in signatures are checked on every call that a test makes.
install_import_hook(["valley.media", "valley.data", "valley.model", "valley.training"], "shape_checks.check")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local cluster with more logical CPUs than the machine has, shared by all tests that need Ray."""
    import ray

    # Ray's workers must find the test modules whose fakes they unpickle.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent / "ray"), str(Path(__file__).parents[1])])
    ray.init(address="local", num_cpus=8, object_store_memory=400 << 20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
