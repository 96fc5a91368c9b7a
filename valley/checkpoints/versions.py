"""Which software made something."""

from __future__ import annotations

import functools
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_NAMED = ("valley", "torch", "transformers")


@functools.cache
def software_versions() -> dict[str, str]:
    """Returns the versions of what a model's weights depend on, and this project's commit; what is known of them."""
    found = {}
    for name in _NAMED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from files that are not installed
            continue
    commit = project_commit()
    return {**found, "commit": commit} if commit else found


def project_commit() -> str | None:
    """Returns the commit of this project's checkout; None when it does not run from one."""
    package = Path(__file__).resolve().parent.parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(package), "rev-parse", "--show-toplevel", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return None
    # An installed package may lie in the checkout of some other project.
    return answer[1] if Path(answer[0]) == package.parent else None
