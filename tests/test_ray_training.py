"""Trainings as trials of Ray Tune: the same adapters as one by one, whoever is killed; and a search of a recipe."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from ray_processes import libraries, titled
from serving import PATIENCE_S, wait_until
from tiny_skill import RECIPE, write_skill

pytest.importorskip("torch")
pytest.importorskip("ray", reason="Ray is not installed: pip install 'loramix[ray]'")

import torch

from loramix.cli import main
from loramix.cluster.trials import _restored
from loramix.train.recipe import load_recipe

pytestmark = pytest.mark.train
NAMES = ("mood", "taste")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Recipes and data of two skills, of 48 steps each."""
    directory = tmp_path / "data"
    directory.mkdir()
    for name in NAMES:
        write_skill(directory, name, RECIPE.replace("batch_size = 4", "batch_size = 4\nepochs = 24"))
    return directory


def words(data_dir: Path, base: Path, out: Path, *more: str, names: tuple[str, ...] = NAMES) -> list[str]:
    recipes = [part for name in names for part in ("--skill", str(data_dir / f"{name}.toml"))]
    command = ["train", "pack", str(out / "pack"), "--data-dir", str(data_dir), *recipes, "--base", str(base)]
    return [*command, "--out", str(out / "runs"), "--no-gate", *more]


def run(*command: str) -> Result:
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    return result


def adapters(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "pack" / "skills").glob("*.gguf")}


def address() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


@pytest.mark.long
def test_adapters_equal_those_trained_one_by_one(
    ray_cluster: None, data_dir: Path, tiny_base: Path, tmp_path: Path
) -> None:
    cluster, alone = tmp_path / "cluster", tmp_path / "alone"
    command = words(data_dir, tiny_base, cluster, "--ray", "--address", address(), "--workers", "2")
    driver = subprocess.Popen([sys.executable, "-m", "loramix", *command], stderr=subprocess.PIPE)
    wait_until(lambda: any(cluster.glob("runs/*/checkpoints/step-*")) or driver.poll() is not None)
    held = [libraries(pid) for pid in titled("ray::ImplicitFunc")]
    assert {"torch"} in held and not any("llama" in found for found in held)
    driver.send_signal(signal.SIGKILL)
    _, errors = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == -signal.SIGKILL, errors
    assert any(cluster.glob("runs/.ray/*/tuner.pkl")) and not adapters(cluster)

    result = run(*command)
    assert "dev_loss" in result.stderr and "mood" in result.stderr  # the table
    assert not any(cluster.glob("runs/.ray/*"))
    torch.set_num_threads(1)
    run(*words(data_dir, tiny_base, alone))
    assert len(adapters(alone)) == 2 and adapters(cluster) == adapters(alone)
    again = run(*words(data_dir, tiny_base, cluster, "--ray", "--address", "10.255.255.1:1"))
    assert again.stderr.count("trained before") == 2  # no cluster is needed


def test_a_skill_that_cannot_be_trained(
    ray_cluster: None, data_dir: Path, tiny_base: Path, tmp_path: Path
) -> None:
    path = data_dir / "taste.jsonl"
    path.write_text(path.read_text().replace('"split": "dev"', '"split": "test"'))
    result = CliRunner().invoke(main, words(data_dir, tiny_base, tmp_path, "--ray", names=("taste",)))
    assert result.exit_code == 1 and "taste" in result.stderr.splitlines()[-1], result.stderr
    assert not any(tmp_path.glob("runs/.ray/*"))  # it is tried once, and again by the next command


def test_a_state_of_tune_that_cannot_be_read(ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "tuner.pkl").write_bytes(b"cut off")
    assert _restored(tmp_path / "state", lambda config: None) is None
    assert not (tmp_path / "state").exists()


@pytest.mark.long
def test_a_search(ray_cluster: None, data_dir: Path, tiny_base: Path, tmp_path: Path) -> None:
    command = ["train", "search", str(data_dir / "mood.toml"), "--data", str(data_dir / "mood.jsonl")]
    command += ["--base", str(tiny_base), "--out", str(tmp_path / "found"), "--trials", "2"]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2 and "add --ray" in refused.stderr
    result = run(
        *command, "--ray", "--rank", "2", "--rank", "4", "--skip-lowest", "0", "--skip-lowest", "0.34"
    )
    path = Path(result.stdout.strip())
    assert path == tmp_path / "found" / "mood.toml"
    table = [
        line.removeprefix("# ").split() for line in path.read_text().splitlines() if line.startswith("#")
    ]
    columns, rows = table[1], [dict(zip(table[1], row, strict=False)) for row in table[2:]]
    assert columns[0] == "learning_rate" and len(rows) == 2
    losses = [float(row["dev_loss"]) for row in rows]
    assert losses == sorted(losses)
    best, own = load_recipe(str(path)), load_recipe(str(data_dir / "mood.toml"))
    assert best.training.learning_rate == float(rows[0]["learning_rate"]) and best.lora.r == int(rows[0]["r"])
    assert best.lora.lora_alpha / best.lora.r == own.lora.lora_alpha / own.lora.r
    assert best.instructions == own.instructions and best.labels == own.labels
    assert sum("as it was" in line for line in path.read_text().splitlines()) >= 1


def test_options_of_a_cluster_need_its_flag(data_dir: Path, tiny_base: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, words(data_dir, tiny_base, tmp_path, "--workers", "2"))
    assert result.exit_code == 2 and "--workers needs --ray" in result.stderr
