"""A new LoRA on the frozen base, created with PEFT."""

from __future__ import annotations

from typing import Any

from loramix.convert.base_model import quiet
from loramix.train.recipe import Lora


def attach(base: Any, shape: Lora) -> Any:
    """Add a new LoRA to the base; only its matrices, in float32, are trained."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=shape.r,
        lora_alpha=shape.lora_alpha,  # PEFT accepts floats
        lora_dropout=shape.lora_dropout,
        use_rslora=shape.use_rslora,
        target_modules=list(shape.target_modules),
        layers_to_transform=shape.layers(base.config.num_hidden_layers),
        task_type="CAUSAL_LM",
    )
    with quiet():
        model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model
