"""Training, in PyTorch: one LoRA per skill, then the gate. Never imported at run time."""

import os

# read when torch loads: threads that spin for each other made a gate's training four times as long beside another job
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("TQDM_DISABLE", "1")  # read when torch imports tqdm; its bars would disturb ours
