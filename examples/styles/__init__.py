"""Styles of letters as LoRA adapters of a small diffusion model: trained apart, mixed, and measured."""
