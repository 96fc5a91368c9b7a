#!/usr/bin/env python3
"""Measures this project against its peers, in one run, on this machine: decode, train, features, serve, soak.

The result is printed; `--write` puts it into BENCHMARKS.md, with command, machine and date.
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path


def decode(arguments: argparse.Namespace) -> str:
    """Decoding: CPU seconds a video, from file to 224-pixel frames."""
    from valley.performance.decode import run_decode_benchmark

    return run_decode_benchmark(arguments.output)


def train(arguments: argparse.Namespace) -> str:
    """The training step: supervised-only head against full logits, Ray Data against memory."""
    from valley.performance.train import run_train_benchmark

    return run_train_benchmark(arguments.output)


def features(arguments: argparse.Namespace) -> str:
    """The feature store: epochs from it against epochs from videos."""
    from valley.performance.features import run_features_benchmark

    return run_features_benchmark(arguments.output)


def serve(arguments: argparse.Namespace) -> str:
    """Serving: the engine against `generate`, by itself and under load over HTTP."""
    from valley.performance.serve import run_serve_benchmark

    return run_serve_benchmark(arguments.output)


def soak(arguments: argparse.Namespace) -> str:
    """Serving on Ray for long: mixed and hostile requests, a killed replica, a rolling update."""
    from valley.performance.soak import run_soak

    return run_soak(arguments.output)


BENCHMARKS: dict[str, tuple[str, Callable[[argparse.Namespace], str]]] = {
    "decode": ("Decoding", decode),
    "train": ("Training step", train),
    "features": ("Feature store", features),
    "serve": ("Serving", serve),
    "soak": ("Serving for long", soak),
}


def main() -> int:
    """Runs the benchmark that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BENCHMARKS, help="what to measure")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="folder of files and raw figures")
    parser.add_argument("--write", action="store_true", help="put the result into BENCHMARKS.md")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    title, run = BENCHMARKS[arguments.name]
    body = run(arguments)
    print(body)
    if arguments.write:
        from valley.performance.report import write_section

        words = [word for word in sys.argv[1:] if word != "--write"]
        write_section(Path("BENCHMARKS.md"), title, shlex.join(["python", "jobs/benchmark.py", *words]), body)
    return 0


if __name__ == "__main__":
    sys.exit(main())
