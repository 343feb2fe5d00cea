"""The memory plan: its sums against llama.cpp's own figures and a measured process, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import refused, run
from tiny import N_CTX, random_gate, write_base

from loramix import DEFAULT, hardware
from loramix.diagnose import memory_plan
from loramix.diagnose.memory_plan import check_fits, make_plan
from loramix.errors import NoSpace
from loramix.pack.edit import set_gate
from loramix.pack.pack import Pack

MIB = 2**20


def parts(made: memory_plan.Plan) -> dict[str, int]:
    return {part.name: part.size_bytes for part in made.memory}


FORGET = """
import sys
from pathlib import Path
from loramix.runtime.llama.context import Context
from loramix.runtime.llama.model import Model
def mapped():
    lines = Path("/proc/self/smaps").read_text().split("\\n")
    at = [i for i, line in enumerate(lines) if line.endswith(sys.argv[1])]
    return sum(int(row.split()[1]) for i in at for row in lines[i + 1 : i + 6] if row.startswith("Rss:"))
model = Model(Path(sys.argv[1]))
context = Context(model, n_ctx=256, n_threads=1)
before, held = context.decode([5, 6, 7, 8]), mapped()
model.forget_file()
assert held > 0 and mapped() == 0, (held, mapped())
context.truncate(0)
assert (context.decode([5, 6, 7, 8]) == before).all()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which pages are here")
def test_pages_of_the_file_are_given_back_and_come_again(tiny_base: Path) -> None:
    subprocess.run([sys.executable, "-c", FORGET, str(tiny_base.resolve())], check=True)


CHILD = """
import sys
from pathlib import Path
from loramix.formats.validate import read_base
from loramix.runtime.llama import model as llama
from loramix.runtime.llama.context import Context
lines = []
@llama.C.llama_log_callback
def note(level, text, _):
    lines.append(text.decode())
llama._log = note
model = llama.Model(Path(sys.argv[1]))
context = Context(model, n_ctx=int(sys.argv[2]), n_threads=1, taps=[int(x) for x in sys.argv[3].split(",") if x])
context.decode([4 + i % 200 for i in range(min(512, int(sys.argv[2]) - 1))])
print("".join(lines))
"""


@pytest.mark.parametrize(
    "n_ctx, taps",
    [(512, ""), (512, "1,2"), (300, "")],
    ids=["plain", "tapped", "a context that is rounded up"],
)
def test_kv_and_compute_are_what_llama_cpp_says(tiny_base: Path, n_ctx: int, taps: str) -> None:
    command = [sys.executable, "-c", CHILD, str(tiny_base), str(n_ctx), taps]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kv = re.findall(r"KV buffer size =\s+([\d.]+) MiB", said)[-1]
    compute = re.findall(r"CPU compute buffer size =\s+([\d.]+) MiB", said)[-1]
    file, shape = memory_plan.read_base(tiny_base)
    assert memory_plan.kv_bytes(file, shape, n_ctx) / MIB == pytest.approx(float(kv), abs=0.006)
    layers = [int(layer) for layer in taps.split(",") if layer]
    # ours has the matmul's scratch and the logits on top, which llama.cpp counts elsewhere
    work = memory_plan._compute_bytes(file, shape, n_ctx, layers) / MIB
    assert float(compute) <= work <= float(compute) * 1.25


def test_a_pack_is_counted_by_its_files(tiny_base: Path, tiny_pack: Path) -> None:
    pack = Pack.load(tiny_pack)
    made = make_plan(tiny_base, n_ctx=4096, pack=pack)
    assert (made.n_ctx, made.n_skills, made.missing_bytes) == (N_CTX, 2, 0)
    disk = {part.name: part.size_bytes for part in made.disk}
    files = [path.stat().st_size for path in (tiny_pack / "skills").glob("*.gguf")]
    assert disk == {
        "base": tiny_base.stat().st_size,
        "adapters": sum(files),
        "gate": (tiny_pack / "gate.npz").stat().st_size,
    }
    assert parts(made)["adapters"] == sum(files)
    more = make_plan(tiny_base, pack=pack, n_skills=20)
    assert parts(more)["adapters"] == 8 * max(files) and more.missing_bytes == 18 * max(files)
    assert parts(more)["KV"] == parts(made)["KV"] == 3 * parts(make_plan(tiny_base, n_skills=0))["KV"]
    assert parts(more)["compute"] > 3 * parts(make_plan(tiny_base, n_skills=0))["compute"]
    assert made.memory_bytes == sum(parts(made).values())


def test_a_gate_is_counted_with_what_it_reads(tiny_base: Path, pack: Path) -> None:
    file, shape = memory_plan.read_base(tiny_base)
    new = make_plan(tiny_base, pack=Pack.load(pack))
    stored = (pack / "gate.npz").stat().st_size
    assert parts(new)["gate"] > stored + memory_plan.kv_bytes(file, shape, 192)
    set_gate(pack, random_gate(["sentiment", "summarize"], Pack.load(pack).manifest.base.sha256))
    old = make_plan(tiny_base, pack=Pack.load(pack))
    path = Pack.load(pack).gate_path
    assert path is not None and parts(old)["gate"] == path.stat().st_size + 2 * 64 * 4 * memory_plan.N_BATCH
    assert parts(old)["compute"] > parts(new)["compute"], "only an old gate's layers are kept in each context"


def test_skills_yet_to_be_made_have_all_linear_layers(tiny_base: Path, tmp_path: Path) -> None:
    made = make_plan(tiny_base, n_skills=1, rank=32)
    # q, k, v, o and three of the feed-forward part, of three layers, float16
    rows = 3 * (2 * (64 + 64) + 2 * (32 + 64) + 3 * (96 + 64))
    assert parts(made)["adapters"] == made.missing_bytes == rows * 32 * 2
    assert [part.note for part in made.disk if part.name == "adapters"] == ["1 skill"]
    low = make_plan(write_base(tmp_path / "q8.gguf", kind="Q8_0"), n_skills=1, rank=4)
    # on a quantized base an adapter runs in Q8_0, padded to rank 32
    assert (parts(low)["adapters"], low.missing_bytes) == (rows * 34, rows * 4 * 2)


def test_weights_that_are_repacked_are_counted_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "q4.gguf", kind="Q4_0")
    monkeypatch.setattr(hardware.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset({"avx2"}))
    matrices = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64) * 18 // 32
    plain = parts(make_plan(base, repack=False))["base"]
    for system, mapped in (("linux", plain - matrices), ("darwin", plain)):  # where its pages are given back
        monkeypatch.setattr(sys, "platform", system)
        assert parts(make_plan(base))["base, repacked"] == matrices
        assert parts(make_plan(base))["base"] == mapped
    assert parts(make_plan(base, repack=False))["base, repacked"] == 0
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset({"sse3"}))
    assert parts(make_plan(base))["base, repacked"] == 0


def test_a_third_of_an_embedding_that_is_no_head_is_counted(tmp_path: Path) -> None:
    """A tied one is read whole for each token; an untied one row by row."""
    tied, untied = (write_base(tmp_path / f"{tied}.gguf", tied=tied) for tied in (True, False))
    file, _ = memory_plan.read_base(untied)
    embedding = file.tensors["token_embd.weight"].nbytes
    more = parts(make_plan(untied))["base"] - parts(make_plan(tied))["base"]
    assert more == embedding - embedding * 2 // 3  # the head, less what is not read


def test_what_does_not_fit_is_refused(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_plan(tiny_base, n_skills=2)
    need = made.memory_bytes
    monkeypatch.setattr(hardware, "memory_bytes", lambda: (2 * need, 2 * need))
    assert check_fits(made) == ""
    monkeypatch.setattr(hardware, "memory_bytes", lambda: (2 * need, need // 2))
    assert "close other programs" in check_fits(made)
    monkeypatch.setattr(hardware, "memory_bytes", lambda: (need - 1, need - 1))
    with pytest.raises(NoSpace, match=r"tiny.gguf with 2 skills and 512 tokens needs .* use a smaller --ctx"):
        check_fits(made)
    refused_run = run("plan", "--base", tiny_base, "--skills", 2, "--json")
    assert refused_run.exit_code == 1 and "of memory, this machine" in refused_run.stderr
    monkeypatch.setattr(hardware, "memory_bytes", lambda: (0, 0))  # a system that does not tell
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(NoSpace, match="more on disk"):
        check_fits(made)


def test_the_command_prints_a_table_and_json(tiny_pack: Path) -> None:
    shown = run("plan", "--pack", tiny_pack, "--ctx", 256)
    assert shown.exit_code == 0, shown.output
    assert "3 contexts of up to 256 tokens" in shown.stdout and "in all" in shown.stdout
    found = json.loads(run("plan", "--pack", tiny_pack, "--ctx", 256, "--json").stdout)
    assert found["memory_bytes"] == sum(found["memory"].values())
    assert (found["skills"], found["ctx"]) == (2, 256)
    refused(run("plan", "--base", "nosuch"), says="no base 'nosuch'")


@pytest.mark.base
def test_without_options_it_is_the_plan_of_the_default_pack() -> None:
    words = ["--ctx", 256, "--json"]
    found, named = run("plan", *words), run("plan", "--pack", DEFAULT, *words)
    assert found.exit_code == 0 and found.stdout == named.stdout
    assert json.loads(found.stdout)["skills"] == len(Pack.load(DEFAULT).skills)
    assert "in all" in run("plan").stdout


def test_a_base_without_a_pack_has_adapters_yet_to_be_made(tiny_base: Path) -> None:
    found = json.loads(run("plan", "--base", tiny_base, "--json").stdout)
    assert found["skills"] == 0 and found["missing_bytes"] == 0


def test_no_llama_cpp_is_loaded_for_it(tiny_base: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from loramix.diagnose.memory_plan import check_fits, make_plan
check_fits(make_plan(Path({str(tiny_base)!r}), n_skills=3))
assert "llama_cpp" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
