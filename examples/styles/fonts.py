"""Which fonts are drawn, from which Debian packages, under which licences; and how they are fetched.

Knows nothing about pictures or training.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

LICENCES = {
    "fonts-dejavu-core": "Bitstream Vera and public domain",
    "fonts-dejavu-extra": "Bitstream Vera and public domain",
    "fonts-dustin": "GPL-2",
    "fonts-breip": "OFL-1.0",
    "fonts-bwht": "OFL-1.1",
    "fonts-cantarell": "OFL-1.1",
    "fonts-clear-sans": "Apache-2.0",
    "fonts-cmu": "OFL-1.1",
    "fonts-comic-neue": "OFL-1.1",
    "fonts-courier-prime": "OFL-1.1",
    "fonts-dancingscript": "OFL-1.1",
    "fonts-dkg-handwriting": "OFL-1.1",
    "fonts-ebgaramond": "OFL-1.1",
    "fonts-femkeklaver": "CC-BY-SA-3.0",
    "fonts-freefont-ttf": "GPL-3+ with font exception",
    "fonts-georgewilliams": "OFL-1.1 or BSD-3-Clause",
    "fonts-gnutypewriter": "OFL-1.1",
    "fonts-go": "BSD-3-Clause",
    "fonts-humor-sans": "OFL-1.1",
    "fonts-inconsolata": "OFL-1.0",
    "fonts-jetbrains-mono": "Apache-2.0",
    "fonts-karla": "OFL-1.1",
    "fonts-kaushanscript": "OFL-1.1",
    "fonts-kiloji": "BSD-3-Clause",
    "fonts-lato": "OFL-1.1",
    "fonts-liberation2": "OFL-1.1",
    "fonts-lobstertwo": "OFL-1.1",
    "fonts-linuxlibertine": "OFL-1.1 or GPL-2+ with font exception",
    "fonts-open-sans": "Apache-2.0",
    "fonts-paratype": "ParaType Free Font Licence",
    "fonts-roboto-slab": "Apache-2.0",
    "fonts-roboto-unhinted": "Apache-2.0",
    "fonts-rufscript": "GPL-3+ with font exception",
    "fonts-seto": "OFL-1.1",
    "fonts-sjfonts": "GPL-2+ with font exception",
    "fonts-smc-chilanka": "OFL-1.1",
    "fonts-texgyre": "GUST Font Licence (LPPL)",
    "fonts-tlwg-purisa-ttf": "GPL-2+ with font exception",
    "fonts-tomsontalks": "OFL-1.1",
    "fonts-tuffy": "public domain",
    "fonts-vollkorn": "OFL-1.1",
    "fonts-yusei-magic": "OFL-1.1",
}

STYLES = ("bold", "italic", "serif", "outline", "hand", "typewriter")
BASE_FONT = "DejaVuSans.ttf"


@dataclass(frozen=True, slots=True)
class Cut:
    """One font file, and which styles it has.

    Args:
        file: name of the font file.
        has: styles that it certainly has.
        unknown: styles for which it says neither yes nor no, such as serifs of a handwriting.
    """

    file: str
    has: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()


def cut(file: str, has: str = "", unknown: str = "") -> Cut:
    """A cut from words: ``cut("Sans-Bold.ttf", "bold")``."""
    return Cut(file, frozenset(has.split()), frozenset(unknown.split()))


# The styles' own fonts; the base sees none of them. Bold, italic, serif and outline are cuts and relatives of the
# base's family; an outline is the contour of a bold cut. A single letter of a sans-serif monospaced font cannot be
# told from another sans-serif letter, so the monospaced style is a typewriter's, with slabs.
STYLE_FONTS = {
    "bold": cut("DejaVuSans-Bold.ttf", "bold"),
    "italic": cut("DejaVuSans-Oblique.ttf", "italic"),
    "serif": cut("DejaVuSerif.ttf", "serif"),
    "outline": cut("DejaVuSans-Bold.ttf", "outline"),
    "hand": cut("kiloji.ttf", "hand"),
    "typewriter": cut("texgyrecursor-regular.otf", "typewriter"),
}
# What a blend should look like, as type designers drew it: read by no training.
UPPER_BOUNDS = {
    ("bold", "italic"): cut("DejaVuSans-BoldOblique.ttf", "bold italic"),
    ("bold", "serif"): cut("DejaVuSerif-Bold.ttf", "bold serif"),
    ("italic", "serif"): cut("DejaVuSerif-Italic.ttf", "italic serif"),
    ("italic", "outline"): cut("DejaVuSans-BoldOblique.ttf", "italic outline"),
    ("serif", "outline"): cut("DejaVuSerif-Bold.ttf", "serif outline"),
    ("bold", "typewriter"): cut("texgyrecursor-bold.otf", "bold typewriter"),
    ("bold", "italic", "serif"): cut("DejaVuSerif-BoldItalic.ttf", "bold italic serif"),
}

REAL = {(style,): one for style, one in STYLE_FONTS.items()} | UPPER_BOUNDS
"""The real font of each style, and of each mix that has one."""


def four(pattern: str, names: str, has: str = "", unknown: str = "") -> list[Cut]:
    """Regular, bold, italic and bold italic of a family.

    Args:
        pattern: file name with ``*`` for the cut's name.
        names: the four cuts' names, in this order; ``-`` for one that is missing, ``~`` for a blank.
        has: styles of the whole family.
        unknown: styles that are not told of the whole family.
    """
    cuts = zip(names.split(), ("", " bold", " italic", " bold italic"), strict=True)
    files = ((pattern.replace("*", name.replace("~", " ")), style) for name, style in cuts if name != "-")
    return [cut(file, has + style, unknown) for file, style in files]


PLAIN = "Regular Bold Italic BoldItalic"
LOWER = "regular bold italic bolditalic"

SANS, SCRIPT = "typewriter", "serif typewriter"
"""What is not told of sans-serif monospaced fonts, and of handwriting."""

# The judge's fonts, kept out of base and adapters.
JUDGE_FONTS = [
    *four("LiberationSans-*.ttf", PLAIN),
    *four("*.ttf", "FreeSans FreeSansBold FreeSansOblique FreeSansBoldOblique"),
    *four("texgyreheros-*.otf", LOWER),
    *four("texgyreadventor-*.otf", LOWER),
    *four("Lato-*.ttf", "Regular Black Italic BlackItalic"),
    *four("Lato-*.ttf", "Light Bold LightItalic BoldItalic"),
    *four("OpenSans-*.ttf", PLAIN),
    *four("OpenSans-*.ttf", "Light ExtraBold LightItalic ExtraBoldItalic"),
    *four("PTS*F.ttf", "55 75 56 76"),
    *four("Go-*.ttf", "Regular Bold Italic Bold-Italic"),
    *four("Tuffy*.ttf", "- _Bold _Italic _Bold_Italic"),
    *four("ClearSans-*.ttf", PLAIN),
    *four("Karla-*.otf", PLAIN),
    *four("Cantarell-*.otf", "Regular Bold - -"),
    *four("LiberationSerif-*.ttf", PLAIN, "serif"),
    *four("*.ttf", "FreeSerif FreeSerifBold FreeSerifItalic FreeSerifBoldItalic", "serif"),
    *four("texgyretermes-*.otf", LOWER, "serif"),
    *four("texgyrebonum-*.otf", LOWER, "serif"),
    *four("texgyreschola-*.otf", LOWER, "serif"),
    *four("PTF*F.ttf", "55 75 56 76", "serif"),
    *four("Vollkorn-*.ttf", PLAIN, "serif"),
    *four("LinLibertine_*.otf", "R RB RI RBI", "serif"),
    *four("EBGaramond12-*.otf", "Regular Bold Italic -", "serif"),
    *four("RobotoSlab-*.otf", "Regular Bold - -", "serif"),
    *four("LiberationMono-*.ttf", PLAIN, "", f"serif {SANS}"),
    *four("PTM*F.ttf", "55 75 - -", "", f"serif {SANS}"),
    cut("Inconsolata.otf", "", f"serif {SANS}"),
    *four("*.ttf", "FreeMono FreeMonoBold FreeMonoOblique FreeMonoBoldOblique", "typewriter serif"),
    *four("Courier Prime*.otf", "- ~Bold ~Italic ~Bold~Italic", "typewriter serif"),
    cut("Courier Prime.otf", "typewriter serif"),
    *four("GWMonospace*.ttf", "- Bold Oblique -", "typewriter serif"),
    *four("cmun*.ttf", "tt - it -", "typewriter serif"),
    cut("cmuntb.ttf", "typewriter serif", "bold"),
    cut("GNUTypewriter.ttf", "typewriter serif", "bold"),
    *four("LobsterTwo-*.otf", "Regular Bold Italic -", "", f"hand italic {SCRIPT}"),
    *four("ComicNeue-*.otf", PLAIN, "", f"hand {SCRIPT}"),
    cut("Chilanka-Regular.otf", "", f"hand {SCRIPT}"),
    *four("dkg*.ttf", "- Bd It BI", "hand", SCRIPT),
    *four("Purisa*.ttf", "- -Bold -Oblique -BoldOblique", "hand", SCRIPT),
    cut("KaushanScript-Regular.otf", "hand italic", f"bold {SCRIPT}"),
    cut("DancingScript-Regular.otf", "hand italic", SCRIPT),
    cut("DancingScript-Bold.otf", "hand italic bold", SCRIPT),
    *[
        cut(name, "hand", f"bold italic {SCRIPT}")
        for name in (
            "BecauseWeBuild-Regular.otf",
            "BecauseWeConnect-Regular.otf",
            "BecauseWeCreate-Regular.otf",
            "BecauseWeMentor-Regular.otf",
            "BecauseWeOrganize-Regular.otf",
            "Domestic_Manners.ttf",
            "El_Abogado_Loco.ttf",
            "Purisa.ttf",
            "Rufscript010.ttf",
            "SteveHand.ttf",
            "TomsonTalks.ttf",
            "YuseiMagic-Regular.ttf",
            "breipfont.ttf",
            "dkg.ttf",
            "femkeklaver.ttf",
            "setofont.ttf",
        )
    ],
]
# Kept out of the judge as well: these say how far it can be believed.
CHECK_FONTS = [
    *four("Roboto-*.ttf", PLAIN),
    *four("texgyrepagella-*.otf", LOWER, "serif"),
    *four("JetBrainsMono-*.ttf", PLAIN, "", f"serif {SANS}"),
    *four("Go-Mono*.ttf", "- -Bold -Italic -Bold-Italic", "typewriter serif"),
    cut("Go-Mono.ttf", "typewriter serif"),
    *[
        cut(name, "hand", f"bold italic {SCRIPT}")
        for name in ("BecauseWeLearn-Regular.otf", "Delphine.ttf", "Humor-Sans.ttf")
    ],
]


def fetch(directory: Path) -> dict[str, str]:
    """Fetch and unpack the packages; those that are there already are not fetched again.

    Args:
        directory: where they go.

    Returns:
        Package to version.

    Raises:
        SystemExit: apt-get or dpkg-deb is missing or fails.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise SystemExit("error: the fonts come from Debian packages; apt-get and dpkg-deb are needed.")
    debs, files = directory / "debs", directory / "files"
    debs.mkdir(parents=True, exist_ok=True)
    versions = {}
    for package in LICENCES:
        if not list(debs.glob(f"{package}_*.deb")):
            done = subprocess.run(
                ["apt-get", "download", package], cwd=debs, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(
                    f"error: {package} was not fetched ({done.stderr.strip()[-200:]}); run apt-get update."
                )
        deb = next(debs.glob(f"{package}_*.deb"))
        versions[package] = deb.name.split("_")[1].replace("%3a", ":")
        stamp = files / f".{hashlib.sha256(deb.name.encode()).hexdigest()[:16]}"
        if not stamp.exists():
            subprocess.run(["dpkg-deb", "-x", str(deb), str(files)], check=True)
            stamp.touch()
    return versions


def find(directory: Path) -> dict[str, Path]:
    """File name of a font to its path, in what `fetch` unpacked."""
    fonts = (path for path in sorted(directory.rglob("*")) if path.suffix in (".ttf", ".otf"))
    return {path.name: path for path in fonts}
