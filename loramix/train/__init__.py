"""Training, in PyTorch: one LoRA per skill, then the gate. Never imported at run time."""

import os

from loramix.hardware import limit_spinning

limit_spinning()
os.environ.setdefault("TQDM_DISABLE", "1")  # read when torch imports tqdm; its bars would disturb ours
