#!/usr/bin/env python3
"""Stage 2 (paper 4.3): tunes the temporal module, the projector and the language model on instructions.

python jobs/finetune.py --config tiny-finetune model.path=runs/demo/pretrain/model
python jobs/finetune.py --config valley-7b-finetune lora=true lora.rank=128 train.learning_rate=2e-4
ray job submit --working-dir . -- python jobs/finetune.py --config valley-13b-zero3
"""

import sys

from valley.launch import launch_stage

if __name__ == "__main__":
    sys.exit(launch_stage(__doc__ or ""))
