#!/usr/bin/env python3
"""Stage 1 (paper 4.3): trains the temporal module and the projector on image-text and video-text pairs.

python jobs/pretrain.py --config tiny
python jobs/pretrain.py --config smol 'data.sources=[{path: my.json, root: videos/}]' --dry-run
ray job submit --working-dir . -- python jobs/pretrain.py --config valley-7b
"""

import sys

from valley.launch import launch_stage

if __name__ == "__main__":
    sys.exit(launch_stage(__doc__ or ""))
