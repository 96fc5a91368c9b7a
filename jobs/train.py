#!/usr/bin/env python3
"""Both stages in one submission: stage 1, stage 2 from what it has made, and the final model.

python jobs/train.py --config tiny output=runs/demo
python jobs/train.py --config valley-7b pretrain.train.learning_rate=1e-3 finetune.lora=true
ray job submit --working-dir . -- python jobs/train.py --config valley-7b
"""

import sys

from valley.launch import launch_two_stages

if __name__ == "__main__":
    sys.exit(launch_two_stages(__doc__ or ""))
