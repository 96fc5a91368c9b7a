#!/usr/bin/env python3
"""Serves a trained model over HTTP: OpenAI's chat completions with videos and images, and a chat page.

python jobs/serve.py model=runs/demo/finetune            # on a local Ray cluster
python jobs/serve.py model=runs/demo/finetune plain=true # in this one process, without Ray

Then http://127.0.0.1:8000 is the chat page, and http://127.0.0.1:8000/v1 what OpenAI's client takes for its base_url.
"""

import os
import sys

# Pools of threads beside the engine's would have its threads sleep at every barrier.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from valley.launch import launch_serving

if __name__ == "__main__":
    sys.exit(launch_serving(__doc__ or ""))
