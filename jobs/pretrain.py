#!/usr/bin/env python3
"""Stage 1 (paper 4.3): trains the temporal module and the projector on image-text and video-text pairs.

python jobs/pretrain.py --config tiny
python jobs/pretrain.py --config smol 'data.sources=[{path: my.json, root: videos/}]' --dry-run
ray job submit --working-dir . -- python jobs/pretrain.py --config valley-7b
"""

import sys

from valley.command import parse_command, run_command
from valley.training.settings import RunSettings


def main() -> None:
    """Parses the settings and runs the stage: on Ray, in one plain process, or only its plan."""
    command = parse_command(RunSettings, __doc__ or "")
    settings = command.settings
    if command.dry_run:
        from valley.training.plan import plan_run

        print(plan_run(settings))
    elif settings.cluster.num_workers == 0:
        from valley.training.run import run_plain

        print(run_plain(settings))
    else:
        from valley.distributed.train import run_on_ray

        print(run_on_ray(settings))


if __name__ == "__main__":
    sys.exit(run_command(main))
