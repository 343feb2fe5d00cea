"""The example of styles: rendering, mixes, resuming and judge; nothing here needs diffusers."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_readme import ROOT

sys.path.append(str(ROOT))  # `python -m pytest` does it as well

from examples.styles import fonts, glyphs, grids, mixes

STYLES = ROOT / "examples" / "styles"


@pytest.fixture(scope="module")
def dejavu() -> Path:
    """The base's font, from matplotlib."""
    matplotlib = pytest.importorskip("matplotlib")
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / fonts.BASE_FONT


@pytest.mark.train
def test_glyphs_are_drawn_within_their_place_and_size(dejavu: Path) -> None:
    drawn = glyphs.render(dejavu, 4)
    assert drawn.shape == (36, 4, 32, 32) and drawn.dtype == np.float32
    assert drawn.min() == -1 and drawn.max() > 0.9
    ink = (drawn + 1) / 2
    assert (ink.sum((2, 3)) > 20).all()
    rows = np.flatnonzero(ink[glyphs.CHARACTERS.index("H"), 0].max(1) > 0.5)
    # an H stands in the middle, as high as a capital
    assert abs((rows[0] + rows[-1]) / 2 - 15.5) <= 2 and 0.94 * 19 - 1 <= len(rows) <= 1.04 * 19 + 1
    assert np.array_equal(drawn, glyphs.render(dejavu, 4))
    assert not np.array_equal(drawn, glyphs.render(dejavu, 4, seed=1))


@pytest.mark.train
def test_an_outline_is_hollow(dejavu: Path) -> None:
    bold = dejavu.with_name("DejaVuSans-Bold.ttf")
    full, hollow = (glyphs.render(bold, 1, outline=o, scales=(1, 1), shift=0)[:, 0] for o in (False, True))
    inside = full > 0.99
    assert inside.sum() > 36 * 20
    assert hollow[inside].mean() < -0.9 and (hollow > 0).sum() > 36 * 20


@pytest.mark.train
def test_a_moved_glyph_is_the_same_elsewhere(dejavu: Path) -> None:
    from PIL import ImageFont

    whole = glyphs.canvas(ImageFont.truetype(dejavu, 100), "R", outline=False)
    there, moved = glyphs.cropped(whole, 0, 0), glyphs.cropped(whole, 3, -2)
    assert np.array_equal(np.roll(there, (-2, 3), (0, 1)), moved)


@pytest.mark.train
def test_grids_have_a_picture_for_each_pair_of_scales(tmp_path: Path) -> None:
    from PIL import Image

    asked = []

    def draw(mix: Any, text: str) -> np.ndarray:
        asked.append(dict(mix))
        return np.full((len(text), 32, 32), 1.0 if sum(mix.values()) > 1 else -1.0, np.float32)

    grid = grids.alpha_grid(draw, ("bold", "italic"), "R")
    assert len(asked) == 25 and asked[0] == {"bold": 0.0, "italic": 0.0} and asked[4]["bold"] == 1.0
    pixels = np.asarray(grid)
    assert pixels[-10, -10] == 0 and pixels[40, 40] == 255
    sheet = grids.style_sheet(draw, {"base": {}, "bold": {"bold": 2.0}}, "AB")
    grids.save(grids.beside([grid, sheet]), tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (grid.width + sheet.width + 8, max(grid.height, sheet.height))


def test_fonts_of_judge_base_and_styles_are_apart() -> None:
    judges = {cut.file for cut in fonts.JUDGE_FONTS}
    checks = {cut.file for cut in fonts.CHECK_FONTS}
    own = {cut.file for cut in (*fonts.STYLE_FONTS.values(), *fonts.UPPER_BOUNDS.values())}
    assert len(judges) == len(fonts.JUDGE_FONTS) and len(checks) == len(fonts.CHECK_FONTS)
    assert not judges & checks and not (judges | checks) & own
    assert fonts.BASE_FONT not in judges | checks | own
    for cut in (*fonts.JUDGE_FONTS, *fonts.CHECK_FONTS, *fonts.STYLE_FONTS.values()):
        assert cut.has | cut.unknown <= set(fonts.STYLES)
    assert fonts.four("A*.ttf", "1 - 2 ~b", "serif")[2] == fonts.cut("A b.ttf", "serif bold italic")


def test_the_readme_lists_each_package_with_its_licence() -> None:
    text = (STYLES / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| (fonts-[\w-]+) \| (.+) \|$", text, re.MULTILINE))
    assert listed == fonts.LICENCES
    assert f"trained on {len(fonts.JUDGE_FONTS)} cuts" in text
    named = set(re.findall(r"\]\((\w+\.py)\)", text))
    assert named == {path.name for path in STYLES.glob("*.py")} - {"__init__.py", "__main__.py"}


def test_rank_correlation() -> None:
    scales = mixes.STEPS_OF_ALPHA
    assert mixes.rank_correlation(scales, [0, 0.1, 0.5, 0.6, 0.9]) == pytest.approx(1)
    assert mixes.rank_correlation(scales, [0.9, 0.6, 0.5, 0.1, 0]) == pytest.approx(-1)
    assert mixes.rank_correlation(scales, [0, 0.5, 0.1, 0.6, 0.9]) == pytest.approx(0.9)
    assert mixes.rank_correlation(scales, [0, 0, 0.5, 0.6, 0.9]) == pytest.approx(0.9747, abs=1e-4)
    assert mixes.rank_correlation(scales, [1, 1, 1, 1, 1]) == 0


def test_a_verdict_counts_pictures_with_all_asked_styles() -> None:
    styles = np.zeros((4, len(fonts.STYLES)), np.float32)
    styles[:, 0] = [0.9, 0.8, 0.2, 0.9]
    styles[:, 1] = [0.7, 0.1, 0.9, 0.6]
    half = dict.fromkeys(fonts.STYLES, 0.5)
    found = mixes.verdict_of(np.array([True, True, True, False]), styles, ("bold", "italic"), half)
    assert found.letter == 0.75 and found.seen["bold"] == 0.75 and found.seen["serif"] == 0
    assert found.all_seen == 0.5  # the first and the last
    assert found.score == 0.25  # the letter of the last is wrong
    low = mixes.verdict_of(np.array([True] * 4), styles, ("bold", "italic"), half | {"italic": 0.05})
    assert low.all_seen == 0.75 and low.seen["italic"] == 1
    assert mixes.verdict_of(np.array([True]), styles[:1], (), half).all_seen == 1


def test_the_search_takes_the_best_scales_and_those_near_1_on_ties() -> None:
    jobs = mixes.search_jobs(("bold", "italic"))
    assert len(jobs) == len(set(jobs)) == len(mixes.SEARCHED) ** 2 and {job.seeds for job in jobs} == {
        mixes.SEARCH_SEEDS
    }
    assert not set(mixes.SEARCH_SEEDS) & set(mixes.TEST_SEEDS)
    half = dict.fromkeys(fonts.STYLES, 0.5)
    verdict = mixes.verdict_of(np.array([True]), np.zeros((1, len(fonts.STYLES))), (), half)
    found = dict.fromkeys(jobs, verdict)
    assert dict(mixes.best(found).weights) == {"bold": 1.0, "italic": 1.0}
    found[jobs[2]] = mixes.Verdict(1.0, {}, {}, 1.0, score=2.0)
    assert mixes.best(found) == jobs[2]
    found[jobs[3]] = mixes.Verdict(mixes.LEGIBLE - 0.01, {}, {}, 1.0, score=3.0)
    assert mixes.best(found) == jobs[2]
    blurred = {job: mixes.Verdict(0.5, {}, {}, 1.0, score=0.5) for job in jobs}
    blurred[jobs[5]] = mixes.Verdict(0.6, {}, {}, 0.1, score=0.1)
    assert mixes.best(blurred) == jobs[5]
    assert {job.weights for job in mixes.search_jobs(mixes.TRIPLE)} == {
        tuple((style, scale) for style in mixes.TRIPLE) for scale in mixes.SEARCHED
    }


def test_the_search_goes_on_in_finer_steps_around_the_best() -> None:
    chosen = mixes.Job("search", ("bold", "hand"), (("bold", 0.8), ("hand", 1.0)), mixes.SEARCH_SEEDS)
    found = {tuple(scale for _, scale in job.weights) for job in mixes.finer_jobs(chosen)}
    assert found == set(itertools.product((0.75, 0.8, 0.85), (0.95, 1.0, 1.05))) - {(0.8, 1.0)}
    assert not {job.weights for job in mixes.finer_jobs(chosen)} & {
        job.weights for job in mixes.search_jobs(chosen.styles)
    }
    triple = mixes.finer_jobs(mixes.Job("search", mixes.TRIPLE, mixes.weighted(mixes.TRIPLE, [0.9] * 3)))
    assert [{scale for _, scale in job.weights} for job in triple] == [{0.85}, {0.95}]


def test_names_of_jobs_are_distinct() -> None:
    names = [job.name for job in mixes.fixed_jobs()]
    assert len(names) == len(set(names)) and "one bold=1 of bold+italic" in names and "base" in names


@pytest.mark.train
def test_training_that_was_stopped_gives_the_same_weights(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from examples.styles import training

    def trained(checkpoint: Path, stop: int | None) -> list[float]:
        weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))

        def loss(step: int) -> Any:
            if step == stop:
                raise KeyboardInterrupt
            target = torch.randn(2, generator=torch.Generator().manual_seed(step))
            return ((weight - target) ** 2).sum()

        training.run(
            [weight], loss, steps=8, peak=0.1, checkpoint=checkpoint, note=lambda _: None, save_every_s=-1
        )
        found: list[float] = weight.tolist()
        return found

    whole = trained(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", 5)
    # step 5 is not run again from the start: the checkpoint says where to resume
    assert trained(tmp_path / "stopped", 4) == whole


@pytest.mark.train
def test_the_judge_is_not_asked_what_is_unknown(dejavu: Path) -> None:
    torch = pytest.importorskip("torch")
    from examples.styles import judge

    cuts = [fonts.cut(dejavu.name), fonts.cut("DejaVuSans-Bold.ttf", "bold", "typewriter")]
    files = {path.name: path for path in dejavu.parent.glob("*.ttf")}
    data = judge.Glyphs(cuts, files, variants=1, seed=0)
    assert len(data) == 3 * 36  # the bold cut as a contour as well
    labels = dict(zip(fonts.STYLES, data.styles[-1].tolist(), strict=True))
    assert labels == {"bold": -1, "italic": 0, "serif": 0, "outline": 1, "hand": 0, "typewriter": -1}
    right, styles = judge.verdicts(judge.Judge(), data.pictures[:5], data.letters[:5])
    assert right.shape == (5,) and styles.shape == (5, len(fonts.STYLES))
    having, lacking = np.array([0.9, 0.6, 0.3, 0.22]), np.array([0.2, 0.1, 0.0])
    assert judge.threshold_of(having, lacking) == {"threshold": 0.2, "recall": 1, "specificity": 1}
    assert judge.threshold_of(having + 1, lacking)["threshold"] == 0.5
    generator = torch.Generator().manual_seed(0)
    for changed in (judge.bent(data.pictures[:5], generator), judge.worn(data.pictures[:5], generator)):
        assert changed.shape == data.pictures[:5].shape and not torch.equal(changed, data.pictures[:5])
        assert changed.min() >= -1 and changed.max() <= 1
