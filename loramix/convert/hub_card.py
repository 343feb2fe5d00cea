"""Model cards of packs and skills for the hub: front matter for its search, and usage instructions."""

from __future__ import annotations

import re

from loramix.pack.manifest import Manifest

_LICENSES = {
    *(
        "apache-2.0",
        "mit",
        "bsd-2-clause",
        "bsd-3-clause",
        "cc0-1.0",
        "cc-by-4.0",
        "cc-by-sa-4.0",
        "cc-by-nc-4.0",
    ),
    *("gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0", "unlicense", "openrail", "llama2", "llama3", "llama3.1"),
    *("llama3.2", "llama3.3"),
}
"""The hub's licence identifiers that packs use; the hub accepts any other licence only as ``other`` with a name."""
TAGS = ["lora", "gguf", "llama.cpp", "loramix"]


def write_card(manifest: Manifest, repository: str, base_model: str, skill_card: str = "") -> str:
    """Write README.md for a repository that holds a pack.

    Args:
        manifest: manifest of the pushed pack.
        repository: ``OWNER/REPO``.
        base_model: repository of the base.
        skill_card: Markdown card of the only skill, if the repository also has its PEFT adapter.

    Returns:
        Markdown with YAML front matter.
    """
    from huggingface_hub import ModelCardData

    license_ = manifest.license.lower()
    known = license_ in _LICENSES
    front = ModelCardData(
        library_name="peft",
        base_model=base_model,
        base_model_relation="adapter",
        license=license_ if known else "other",
        license_name=None if known else re.sub("[^a-z0-9.]+", "-", license_).strip("-") or "unknown",
        pipeline_tag="text-generation",
        tags=TAGS,
    ).to_yaml()
    lines = ["---", front, "---", "", f"# {manifest.name}", "", manifest.description, ""]
    lines += ["| skill | what it does |", "|---|---|"]
    lines += [f"| {skill.name} | {_cell(skill.description)} |" for skill in manifest.skills]
    gate = "with a gate that finds the skill for each prompt" if manifest.gate else "without a gate"
    lines += [
        "",
        f"LoRA adapters for llama.cpp on `{manifest.base.name}` (sha256 `{manifest.base.sha256}`), {gate}.",
    ]
    lines += ["", "```", "pip install 'loramix[hub]'", f"loramix pull {manifest.base.name}"]
    lines += [f"loramix pack pull {repository}", f'loramix run --pack {manifest.name} "…"', "```", ""]
    if skill_card:
        lines += ["`adapter_config.json` and `adapter_model.safetensors` hold the same adapter for PEFT.", ""]
        lines += [skill_card.strip(), ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
