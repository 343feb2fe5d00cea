"""Training, in PyTorch: one LoRA per skill, then the gate. Never imported at run time."""
