"""The diffusion model: a small class-conditional UNet of diffusers, its adapters, and DDIM sampling.

Knows nothing about fonts. A picture (1, 32, 32) enters as four planes (4, 16, 16), which costs a quarter of the time.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.loaders.peft import PeftAdapterMixin
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from loramix.paths import atomic_path

# several adapters on one model are meant here
warnings.filterwarnings("ignore", message="Already found a `peft_config`")

STEPS = 3
"""Denoising steps: few, since errors of a blend add up from step to step."""
GUIDANCE = 2.6
"""Factor of the difference between the predictions with and without a letter; 1 is no guidance."""
RANK = 8
TARGETS = ["conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "to_q", "to_k", "to_v", "to_out.0"]
TARGETS += ["time_emb_proj", "linear_1", "linear_2"]

Weights = Mapping[str, float]
"""Adapter to scale; an empty mapping is the bare base."""


class StyleUNet(UNet2DModel, PeftAdapterMixin):
    """UNet2DModel with the adapter methods that diffusers gives to its larger models."""


def new_unet(n_classes: int) -> StyleUNet:
    """An untrained base of 0.9 million weights; class ``n_classes`` means that no letter is named."""
    return StyleUNet(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(48, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
        num_class_embeds=n_classes + 1,
    )


def new_scheduler() -> DDIMScheduler:
    """The noise schedule, which training and sampling share."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )


def planes(pictures: torch.Tensor) -> torch.Tensor:
    """(B, 1, 32, 32) to (B, 4, 16, 16)."""
    return F.pixel_unshuffle(pictures, 2)


def save_base(unet: StyleUNet, path: Path) -> None:
    """Write the weights; whole or not at all."""
    with atomic_path(path) as temporary:
        save_file({key: value.contiguous() for key, value in unet.state_dict().items()}, temporary)


def load_base(path: Path, n_classes: int) -> StyleUNet:
    """Read a frozen base."""
    unet = new_unet(n_classes)
    unet.load_state_dict(load_file(path))
    return unet.eval().requires_grad_(False)


def weights_sha256(unet: StyleUNet) -> str:
    """SHA-256 of the base's weights by name, adapters left out."""
    digest = hashlib.sha256()
    for key, value in sorted(unet.state_dict().items()):
        if "lora_" not in key:
            name = key.replace(".base_layer", "")
            digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def lora_config() -> LoraConfig:
    """LoRA on all convolutions and linear layers; rank 8, alpha 8."""
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)


def add_adapter(unet: StyleUNet, name: str) -> list[torch.nn.Parameter]:
    """Add an untrained adapter and make it the only one that trains and acts.

    Returns:
        Its parameters.
    """
    unet.add_adapter(lora_config(), name)
    unet.set_adapters([name], [1.0])
    own = [value for key, value in unet.named_parameters() if f".{name}." in key]
    unet.requires_grad_(False)
    for value in own:
        value.requires_grad_(True)
    return own


def save_adapter(unet: StyleUNet, name: str, path: Path) -> None:
    """Write an adapter's matrices as safetensors."""
    state = get_peft_model_state_dict(unet, adapter_name=name)
    with atomic_path(path) as temporary:
        save_file({key: value.detach().contiguous() for key, value in state.items()}, temporary)


def load_adapter(unet: StyleUNet, name: str, path: Path) -> None:
    """Add an adapter from its file."""
    unet.add_adapter(lora_config(), name)
    set_peft_model_state_dict(unet, load_file(path), adapter_name=name)
    unet.requires_grad_(False)


def use(unet: StyleUNet, weights: Weights) -> None:
    """Make a mix act: `set_adapters` of diffusers, or no adapter at all."""
    active = {name: scale for name, scale in weights.items() if scale}
    if active:
        unet.enable_adapters()
        unet.set_adapters(list(active), list(active.values()))
    elif hasattr(unet, "peft_config"):
        unet.disable_adapters()


@torch.inference_mode()
def sample(
    unet: StyleUNet,
    classes: torch.Tensor,
    *,
    seed: int,
    mix_of_step: Callable[[int], Weights] | Weights,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> torch.Tensor:
    """Draw pictures by DDIM without noise after the first, guided to the letter (arXiv 2207.12598).

    Args:
        unet: base with its adapters.
        classes: (B,) int64.
        seed: of the first noise; the same seed and batch give the same noise under every mix.
        mix_of_step: the mix, or the mix of each step (LoRA Switch, arXiv 2402.16843).
        steps: denoising steps.
        guidance: see `GUIDANCE`; the mix acts on both predictions.

    Returns:
        (B, 1, 32, 32) float32 in [-1, 1].
    """
    scheduler = new_scheduler()
    scheduler.set_timesteps(steps)
    x = torch.randn(len(classes), 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    no_letter = torch.full_like(classes, unet.config["num_class_embeds"] - 1)
    both = torch.cat([classes, no_letter])
    if not callable(mix_of_step):
        use(unet, mix_of_step)
    for i, t in enumerate(scheduler.timesteps):
        if callable(mix_of_step):
            use(unet, mix_of_step(i))
        named, free = unet(x.repeat(2, 1, 1, 1), t.expand(len(both)), class_labels=both).sample.chunk(2)
        v = free + guidance * (named - free)
        x = scheduler.step(v, t, x).prev_sample
    return F.pixel_shuffle(x, 2).clamp(-1, 1)


def switch(names: Sequence[str]) -> Callable[[int], Weights]:
    """LoRA Switch: one adapter a step, in turn, each at scale 1."""
    return lambda step: {names[step % len(names)]: 1.0}
