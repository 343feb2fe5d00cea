"""What is skipped is said in a line, and fails where nothing may be skipped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ASKING = "default_pack or skills_have"
SKIPPING = """
import pytest

def test_passes():
    pass

def test_in_its_body():
    pytest.skip("body")

@pytest.mark.skipif(True, reason="mark")
def test_by_a_mark():
    pass

@pytest.fixture
def absent():
    pytest.importorskip("no_such_module_here", reason="fixture")

def test_in_a_fixture(absent):
    pass

@pytest.mark.xfail(reason="expected", strict=True)
def test_that_is_known_to_fail():
    raise AssertionError
"""


def run(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "LORAMIX_NO_SKIPS"}
    places = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words],
        cwd=cwd,
        env={**kept, "PYTHONPATH": places, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "strict, summary",
    [("", "1 passed, 4 skipped, 1 xfailed"), ("1", "1 failed, 1 passed, 1 xfailed, 3 errors")],
)
def test_what_is_skipped_fails_where_nothing_may_be(strict: str, summary: str, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SKIPPING)
    (tmp_path / "test_whole.py").write_text("import pytest\npytest.importorskip('no_such_module_here')\n")
    words = ["-p", "conftest", "--continue-on-collection-errors", str(tmp_path)]
    done = run(*words, cwd=tmp_path, LORAMIX_NO_SKIPS=strict)
    assert done.returncode == bool(strict), done.stdout
    assert re.sub(r" in .*", "", done.stdout.splitlines()[-1]) == summary
    if strict:
        assert all(f"this was skipped: Skipped: {why}" in done.stdout for why in ("body", "mark", "fixture"))


@pytest.mark.base
@pytest.mark.parametrize("strict", ["", "1"])
def test_a_machine_without_a_browser(strict: str, default_base: Path, tmp_path: Path) -> None:
    done = run("tests/test_page.py", "-k", ASKING, PATH=str(tmp_path), LORAMIX_NO_SKIPS=strict)
    assert done.returncode == bool(strict), done.stdout
    said = [line for line in done.stdout.splitlines() if "no Chromium is installed" in line]
    assert said and "apt-get install chromium" in said[0]
    if not strict:
        assert len(said) == 1 and said[0].startswith("skipped 2: ")
