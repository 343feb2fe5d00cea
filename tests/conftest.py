"""Fixtures: directories of our own, a tiny pack that a second makes, and the default base where it is here."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, serve
from hypothesis import HealthCheck, settings
from tiny import write_base, write_pack
from wheel_index import part_base, places, quick, six  # noqa: F401  # fixtures

from loramix import DEFAULT
from loramix.models import wheel
from loramix.models.known_bases import BASES
from loramix.paths import cache_dir

# threads that wait for each other sleep instead of spinning: on a busy machine tests take a quarter of the time
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
REAL_CACHE = cache_dir()  # before any test turns it elsewhere
QWEN = REAL_CACHE / "bases" / "qwen2.5-coder-0.5b-1d9614638d18.gguf"


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes one runs a whole file, and one all files that need the cluster."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "cluster" if Path(file).name.startswith("test_ray") else file

    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes long or needs what is not installed: such tests are extra, not skipped."""
    there = {
        "qwen": QWEN.is_file(),
        "diffusers": find_spec("diffusers") is not None,
        "long": os.environ.get("LORAMIX_LONG_TESTS") == "1",
    }
    missing = [name for name, found in there.items() if not found]
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in missing)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Make a failure of what was skipped, where ``LORAMIX_NO_SKIPS=1`` says that all must run."""
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("LORAMIX_NO_SKIPS") == "1":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome, report.longrepr = "failed", f"LORAMIX_NO_SKIPS=1 and this was skipped: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """See `refuse_skip`."""
    report = yield
    refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """See `refuse_skip`; for a module that is skipped as a whole."""
    report = yield
    refuse_skip(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each reason to skip, however many tests it holds for."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.items():
        terminalreporter.write_line(f"skipped {count}: {reason.removeprefix('Skipped: ')}")


@pytest.fixture(autouse=True)
def own_directories(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test touches the user's cache or packs, but those that need the real base."""
    monkeypatch.setenv("LORAMIX_DATA", str(tmp_path_factory.getbasetemp() / "data"))
    if request.node.get_closest_marker("base") is None:
        monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def forked_torch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What compares with PyTorch forks a process that has it, but for a test that wants the real thing."""
    if request.node.get_closest_marker("train") and not request.node.get_closest_marker("own_process"):
        import forked

        monkeypatch.setattr("loramix.convert.reference._run", forked.run)


@pytest.fixture
def light_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """No trial run per base; one thread, since two wait for each other on a busy machine."""
    monkeypatch.setenv("LORAMIX_EXTRA_BUFTS", "0")
    monkeypatch.setattr("loramix.hardware.default_threads", lambda: 1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base's GGUF, float32."""
    return write_base(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_pack(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of two random skills and a random gate on the tiny base."""
    return write_pack(tmp_path_factory.mktemp("packs") / "tiny", tiny_base)


@pytest.fixture(scope="session")
def plan_pack(tiny_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pack with a gate that splits requests; see `planning`."""
    from planning import write_plan_pack

    return write_plan_pack(tiny_pack, tmp_path_factory.mktemp("planned") / "tiny")


@pytest.fixture
def pack(tiny_pack: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pack that a test may change."""
    return Path(shutil.copytree(tiny_pack, tmp_path / "tiny"))


@pytest.fixture
def tiny_engine(tiny_pack: Path) -> Iterator[Any]:
    """A fresh engine on the tiny pack."""
    from loramix import Engine

    with Engine.open(tiny_pack, n_ctx=256, n_threads=1) as engine:
        yield engine


@pytest.fixture
def batch_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers each decoding in a batch context was for."""
    from loramix.runtime.llama.batch_context import BatchContext

    sizes: list[int] = []
    decode = BatchContext.decode

    def counted(self: BatchContext, tokens: Any) -> Any:
        sizes.append(len(tokens))
        return decode(self, tokens)

    monkeypatch.setattr(BatchContext, "decode", counted)
    return sizes


@pytest.fixture(scope="session")
def tiny_server(tiny_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The tiny pack served, in a process of its own."""
    from serving import served

    own = {"LORAMIX_CACHE": str(tmp_path_factory.getbasetemp() / "cache")}
    with served(tiny_pack, "--ctx", "512", "--threads", "1", **own) as server:
        yield server


@pytest.fixture(scope="session")
def page_server(tiny_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The tiny pack with an example and a card, served to who has the key."""
    import msgspec
    from browsing import HTML, KEY
    from serving import served

    from loramix.pack.manifest import read_manifest, write_manifest

    pack = Path(shutil.copytree(tiny_pack, tmp_path_factory.mktemp("shown") / "tiny"))
    manifest = read_manifest(pack)
    (pack / "card.md").write_text(f"# Skill\n\n{HTML}\n\n- **Data**: `none`\n", encoding="utf-8")
    first = msgspec.structs.replace(manifest.skills[0], example="Is it good? <i>a dog</i>", card="card.md")
    write_manifest(pack, msgspec.structs.replace(manifest, skills=(first, *manifest.skills[1:])))
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    options = ["--ctx", "512", "--threads", "1"]
    with served(pack, *options, LORAMIX_CACHE=cache, LORAMIX_API_KEY=KEY) as server:
        server.http.headers["Authorization"] = f"Bearer {KEY}"
        yield server


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One local Ray cluster of two CPUs for all tests that need one; its workers have the tests' cache."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'loramix[ray]'")
    from loramix.cluster import session

    with ExitStack() as cluster:
        with (
            pytest.MonkeyPatch.context() as patch
        ):  # for the cluster's processes, not for the tests that follow
            patch.setenv("LORAMIX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
            patch.setenv("LORAMIX_DATA", str(tmp_path_factory.getbasetemp() / "data"))
            patch.setenv("LORAMIX_EXTRA_BUFTS", "0")  # no trial run per base
            patch.setattr(session, "OBJECT_STORE_BYTES", 150 * 2**20)
            patch.delenv("RAY_ADDRESS", raising=False)
            cluster.enter_context(session.session(num_cpus=2))
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; of a module, since an event loop runs in this thread while it is open."""
    from browsing import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser: Any, page_server: Any) -> Iterator[Any]:
    """Opens the page with the key; at the end nobody may have complained, nor asked another host."""
    from browsing import KEY, Visitor

    visitors: list[Visitor] = []

    def open_page(**options: Any) -> Visitor:
        visitors.append(Visitor(browser, page_server.url, key=KEY, **options))
        visitors[-1].page.wait_for_selector(".opener")
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.context.close()
        assert visitor.complaints == [] and visitor.foreign == []


@pytest.fixture(scope="session")
def default_base() -> Path:
    """The default base, or a skip that says how to get it."""
    found = REAL_CACHE / "bases" / wheel.cached_path(BASES[DEFAULT]).name
    if not found.is_file():
        pytest.skip("the default base is not here: loramix pull smollm2-135m")
    return found


@pytest.fixture(scope="session")
def qwen_base() -> Path:
    """The real Qwen2.5-Coder-0.5B; only for tests marked ``qwen``."""
    return QWEN


@pytest.fixture(scope="module")
def default_engine(default_base: Path) -> Iterator[Any]:
    """The default pack on its base; one thread, since two wait for each other on a busy machine."""
    from loramix import Engine

    with Engine.open(n_threads=1) as engine:
        yield engine


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with nothing on it; the client's cache and token are our own."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with serve() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # what a cut costs at most
        monkeypatch.setenv("LORAMIX_DATA", str(tmp_path / "data"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield found
