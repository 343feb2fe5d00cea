"""Time of a complete request, compared with other ways to run a LoRA skill on this CPU; ratios within one run.

    python benchmarks/peers.py --out peers.json [--rounds 7] [--llama-server "$(sh scripts/llama_server.sh)"]

Each peer runs in its own process and is idle while another answers. In a round, all get the same request with a new
text, so that no cache helps; the ratio is the median over rounds. All answer greedily with the same adapter, at most
24 tokens. Loramix chooses the skill itself; for the others it is given.
"""

from __future__ import annotations

import atexit
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import click

from loramix import DEFAULT
from loramix.hardware import default_threads, machine
from loramix.models import bases
from loramix.pack.pack import Pack
from loramix.paths import write_text

MAX_TOKENS = 24
SKILLS = {
    "sentiment": "Is this review positive or negative?\n{}",
    "summarize": "Summarize in one sentence:\n{}",
    "translate_fr": "Translate into French: {}",
}
PEERS = (
    "loramix",
    "loramix, skill named",
    "llama-server",
    "llama-cpp-python",
    "PEFT float32",
    "PEFT bfloat16",
)
VOCABULARY = (
    "harbour museum opened wing friday ships bottles sailors town children build film starts slowly last half hour "
    "battery screen camera tent rain snow years library sunday closed soup waited cold nobody sorry market clock "
    "village weather fine people tickets hall holds story drags ending actors music light garden winter train late"
)

Answer = Callable[[str, str], str]


def text(seed: int, count: int) -> str:
    """Return words in random order, a text that is in no cache."""
    rng, words = random.Random(seed), VOCABULARY.split()
    return " ".join(rng.choice(words) for _ in range(count)).capitalize() + "."


def with_loramix(named: bool) -> Answer:
    """Answer with Loramix, routed or with a given mix."""
    from loramix import Engine

    engine = Engine.open()

    def answer(skill: str, prompt: str) -> str:
        options: dict[str, Any] = {"mix": skill} if named else {"policy": "top1"}
        return engine.generate(prompt, max_tokens=MAX_TOKENS, **options).text

    return answer


def with_llama_cpp_python() -> Answer:
    """Answer with llama-cpp-python's class, which has one adapter, so one object per skill."""
    from llama_cpp import Llama

    pack = Pack.load(DEFAULT)
    made = {
        name: Llama(
            model_path=str(bases.resolve(DEFAULT)),
            lora_path=str(pack.adapter_path(name)),
            n_ctx=512,
            n_threads=default_threads(),
            n_threads_batch=default_threads(),
            verbose=False,
        )
        for name in SKILLS
    }

    def answer(skill: str, prompt: str) -> str:
        messages: Any = [{"role": "user", "content": prompt}]
        found: Any = made[skill].create_chat_completion(messages, max_tokens=MAX_TOKENS, temperature=0.0)
        return str(found["choices"][0]["message"]["content"])

    return answer


def with_llama_server(program: Path) -> Answer:
    """Answer with llama.cpp's server and all adapters loaded; each request names its adapter."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pack, threads = Pack.load(DEFAULT), str(default_threads())
    options = [
        "-m",
        str(bases.resolve(DEFAULT)),
        "-c",
        "512",
        "-np",
        "1",
        "-t",
        threads,
        "-tb",
        threads,
    ]
    for name in SKILLS:
        options += ["--lora", str(pack.adapter_path(name))]
    server = subprocess.Popen(
        [str(program), *options, "--lora-init-without-apply", "--port", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    atexit.register(server.kill)

    def call(method: str, path: str, body: Any = None) -> Any:
        # a new connection per request, because the server closes one that idles while the others answer
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read())

    while True:
        if server.poll() is not None:
            raise SystemExit(f"{program} did not start; run it to see why.")
        with suppress(OSError):  # the server does not listen yet
            if call("GET", "/health").get("status") == "ok":
                break
        time.sleep(0.1)

    def answer(skill: str, prompt: str) -> str:
        request = {
            "messages": [{"role": "user", "content": prompt}],
            "lora": [{"id": i, "scale": float(name == skill)} for i, name in enumerate(SKILLS)],
            "max_tokens": MAX_TOKENS,
            "temperature": 0.0,
        }
        return str(call("POST", "/v1/chat/completions", request)["choices"][0]["message"]["content"])

    return answer


def with_peft(kind: str) -> Answer:
    """Answer with transformers and PEFT, with all adapters in memory."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    from loramix.convert.base_model import load_base, quiet
    from loramix.convert.peft import export_peft
    from loramix.formats.validate import read_base

    torch.set_num_threads(default_threads())
    pack, base = Pack.load(DEFAULT), bases.resolve(DEFAULT)
    tokenizer = AutoTokenizer.from_pretrained(str(base.parent), gguf_file=base.name)
    model: Any = None
    with tempfile.TemporaryDirectory() as directory, quiet():
        for name in SKILLS:
            peft = Path(directory) / name
            export_peft(pack.adapter_bytes(name), read_base(base)[1], peft, name)
            if model is None:
                model = PeftModel.from_pretrained(load_base(base), str(peft), adapter_name=name)
            else:
                model.load_adapter(str(peft), adapter_name=name)
    model.to(getattr(torch, kind))
    model.eval()

    def answer(skill: str, prompt: str) -> str:
        model.set_adapter(skill)
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            out = model.generate(**ids, max_new_tokens=MAX_TOKENS, do_sample=False)
        return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))

    return answer


def memory_mb() -> float:
    """Peak resident memory of this process or its child, in MB."""
    own = os.getpid()
    children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    status = Path(f"/proc/{children[0] if children else own}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def serve(peer: str, program: Path | None) -> None:
    """Answer requests from stdin, one JSON object per line, until it ends."""
    makers: dict[str, Callable[[], Answer]] = {
        "loramix": lambda: with_loramix(False),
        "loramix, skill named": lambda: with_loramix(True),
        "llama-cpp-python": with_llama_cpp_python,
        "llama-server": lambda: with_llama_server(program or Path("llama-server")),
        "PEFT float32": lambda: with_peft("float32"),
        "PEFT bfloat16": lambda: with_peft("bfloat16"),
    }
    answer = makers[peer]()
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        found = answer(request["skill"], request["prompt"])
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "text": found, "memory_mb": memory_mb()}), flush=True)


def compare(rounds: int, program: Path | None) -> dict[str, Any]:
    """Send requests to all peers in turn.

    Args:
        rounds: number of measured requests per skill, after one to warm up.
        program: path of llama-server; None omits this peer.

    Returns:
        By peer the median ``ms``, the median ``ratio`` to Loramix routed, peak ``memory_mb``, and the share of texts
        equal to Loramix's.
    """
    peers = [peer for peer in PEERS if program or peer != "llama-server"]
    command = [sys.executable, __file__, *(["--llama-server", str(program)] if program else []), "--serve"]
    running = {
        peer: subprocess.Popen([*command, peer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for peer in peers
    }

    def ask(peer: str, request: Mapping[str, str]) -> dict[str, Any]:
        child = running[peer]
        assert child.stdin and child.stdout
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
        line = child.stdout.readline()
        if not line.startswith("{"):
            raise SystemExit(f"{peer} gave no answer: {line!r:.200}, exit code {child.poll()}.")
        found: dict[str, Any] = json.loads(line)
        return found

    table: list[dict[str, dict[str, Any]]] = []
    for number in range(rounds + 1):
        for skill, template in SKILLS.items():
            request = {"skill": skill, "prompt": template.format(text(number, 60))}
            row = {peer: ask(peer, request) for peer in peers}
            if number:
                table.append(row)
        click.echo(f"round {number} of {rounds}", err=True)
    for child in running.values():
        child.communicate()
    first = peers[0]
    return {
        peer: {
            "ms": 1000 * statistics.median(row[peer]["seconds"] for row in table),
            "ratio": statistics.median(row[peer]["seconds"] / row[first]["seconds"] for row in table),
            "memory_mb": max(row[peer]["memory_mb"] for row in table),
            "same_text": statistics.mean(
                row[peer]["text"].strip() == row[first]["text"].strip() for row in table
            ),
        }
        for peer in peers
    }


@click.command()
@click.option("--rounds", default=7, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
@click.option("--llama-server", "program", type=click.Path(exists=True, path_type=Path))
@click.option("--serve", "peer", type=click.Choice(PEERS), hidden=True)
def main(rounds: int, out: Path | None, program: Path | None, peer: str | None) -> None:
    """Run the benchmark and write JSON."""
    if peer:
        serve(peer, program)
        return
    found = {"machine": machine(), "peers": compare(rounds, program)}
    if out:
        write_text(out, json.dumps(found, indent=1) + "\n")
    click.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
