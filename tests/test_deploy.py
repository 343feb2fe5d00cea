"""The files of deploy/: manifests under KubeRay's schemas, commands that the CLI takes, an image without root."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import click
import jsonschema_rs
import pytest
import yaml

from loramix import __version__
from loramix.cli import main
from loramix.cluster.serving import NAME, ServeOptions
from loramix.defaults import DEFAULT_PACK
from loramix.models.known_bases import BASES

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
SCHEMAS = json.loads((ROOT / "tests" / "kuberay.json").read_text(encoding="utf-8"))
MANIFESTS = ("rayservice.yaml", "rayjob.yaml")
IMAGE = f"loramix:{__version__}"


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def errors(manifest: dict[str, Any]) -> list[str]:
    schema = {**SCHEMAS[manifest["kind"]], "$defs": SCHEMAS["$defs"]}
    return [error.message for error in jsonschema_rs.validator_for(schema).iter_errors(manifest["spec"])]


def cluster(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["rayClusterConfig" if manifest["kind"] == "RayService" else "rayClusterSpec"]


def containers(manifest: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Pod and container of the head and of each group of workers."""
    for group in (cluster(manifest)["headGroupSpec"], *cluster(manifest)["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        yield from ((pod, container) for container in pod["containers"])


def pinned(package: str) -> str:
    (line,) = re.findall(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return line


def parsed(command: str) -> dict[str, Any]:
    """Parse a command of the CLI without running it; returns its options."""
    words = shlex.split(command)
    assert words[0] == "loramix"
    found = main.get_command(click.Context(main), words[1])
    assert found is not None
    return found.make_context(words[1], words[2:]).params


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_follow_the_operators_schemas(name: str) -> None:
    manifest = read(name)
    assert manifest["apiVersion"] == "ray.io/v1" and errors(manifest) == []


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ("", "entrypoints", "x"),
        ("cluster", "rayVersion", 2.6),
        ("worker", "groupName", None),
        ("worker", "replicas", "two"),
        ("worker rayStartParams", "num-cpus", 0),
        ("worker template spec containers 0", "imagePullPolicies", "Always"),
        ("worker template spec containers 0 resources limits", "memory", "3 GB"),
    ],
)
def test_the_schemas_refuse_what_the_operator_does(name: str, place: str, key: str, value: Any) -> None:
    manifest = read(name)
    found = manifest["spec"]
    for word in place.split():
        if word in ("cluster", "worker"):
            found = cluster(manifest)
        if word == "worker":
            found = found["workerGroupSpecs"][0]
        elif word != "cluster":
            found = found[int(word) if word.isdigit() else word]
    found[key] = value
    assert len(errors(manifest)) == 1


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_have_no_root_the_image_and_memory_that_is_there(name: str) -> None:
    manifest = read(name)
    assert cluster(manifest)["rayVersion"] == pinned("ray")
    assert cluster(manifest)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for pod, container in containers(manifest):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["image"] == IMAGE
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
        assert mounted == {volume["name"] for volume in pod.get("volumes", ())}


def test_the_service_is_the_app_with_options_that_it_has() -> None:
    manifest = read("rayservice.yaml")
    (application,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == "loramix.cluster.serving:app"
    args = application["args"]
    assert args.keys() <= set(ServeOptions.__struct_fields__) and args["pack"] == DEFAULT_PACK
    (worker,) = cluster(manifest)["workerGroupSpecs"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["cpu"] == str(args["cpus_per_worker"])
    assert (args["min_workers"], args["workers"]) == (worker["minReplicas"], worker["maxReplicas"])
    assert f"{manifest['metadata']['name']}-serve-svc" in args["allow_host"]
    for _, container in containers(manifest):
        (key,) = container["env"]
        assert key["name"] == "LORAMIX_API_KEY" and "value" not in key


def test_the_service_is_a_config_of_serve() -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'loramix[ray]'")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic's, about the schema's own fields
        from ray.serve.schema import ServeDeploySchema
    config = yaml.safe_load(read("rayservice.yaml")["spec"]["serveConfigV2"])
    found = ServeDeploySchema.model_validate(config)
    assert found.http_options.port == 8000 and found.proxy_location == "EveryNode"


def test_the_router_for_conversations_is_one_that_serve_has() -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'loramix[ray]'")
    (block,) = re.findall(r"```yaml\n(.*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)
    config = yaml.safe_load(read("rayservice.yaml")["spec"]["serveConfigV2"])
    config["applications"][0].update(yaml.safe_load(block))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic's, about the schema's own fields
        from ray.serve.request_router import RequestRouter
        from ray.serve.schema import ServeDeploySchema

    (deployment,) = ServeDeploySchema.model_validate(config).applications[0].deployments
    assert deployment.name == NAME
    module, _, name = deployment.request_router_config["request_router_class"].partition(":")
    assert issubclass(getattr(importlib.import_module(module), name), RequestRouter)


def test_the_job_is_a_batch_that_its_cluster_can_run() -> None:
    manifest = read("rayjob.yaml")
    options = parsed(manifest["spec"]["entrypoint"])
    assert options["ray"] and options["address"] is None  # the job's own cluster
    (worker,) = cluster(manifest)["workerGroupSpecs"]
    (container,) = worker["template"]["spec"]["containers"]
    assert options["workers"] == worker["replicas"]
    assert str(options["cpus_per_worker"]) == container["resources"]["limits"]["cpu"]
    for _, container in containers(manifest):
        (mount,) = container["volumeMounts"]
        assert all(options[name].startswith(mount["mountPath"] + "/") for name in ("source", "out"))


class Step(NamedTuple):
    instruction: str
    value: str


def stages() -> list[list[Step]]:
    """Instructions of the Dockerfile by stage."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: list[list[Step]] = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            step = Step(*line.split(None, 1))
            if step.instruction == "FROM":
                found.append([])
            found[-1].append(step)
    return found


def test_the_image_runs_without_root_on_the_python_that_is_supported() -> None:
    build, final = stages()
    image = final[0].value.split()[0]
    assert build[0].value == f"{image} AS build" and re.fullmatch(r"python:3\.\d+-slim-\w+", image)
    users = [step.value for step in final if step.instruction == "USER"]
    assert users == ["1000"]
    pull = next(i for i, step in enumerate(final) if "loramix pull" in step.value)
    assert final.index(Step("USER", "1000")) < pull  # the base belongs to the user
    assert Step("ARG", f"BASE={DEFAULT_PACK}") in final[:pull] and DEFAULT_PACK in BASES
    assert "DGGML_NATIVE=OFF" in next(step.value for step in build if step.instruction == "ARG")
    installed = " ".join(step.value for step in final if "apt-get install" in step.value)
    assert {"libgomp1", "wget"} <= set(installed.split())
    assert not [step for step in build + final if step.instruction == "ADD"]


def test_what_the_image_copies_is_there_and_nothing_else_is_sent() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    sent = [line[1:] for line in lines if line.startswith("!")]
    assert lines[0] == "*" and all((ROOT / name).exists() for name in sent)
    copied = [step.value.split()[:-1] for stage in stages() for step in stage if step.instruction == "COPY"]
    files = [name for names in copied for name in names if not names[0].startswith("--from=build")]
    assert sorted(files) == sorted(sent)


def test_the_images_commands_are_shell_and_its_default_serves() -> None:
    final = stages()[-1]
    for stage in stages():
        for step in stage:
            if step.instruction == "RUN":
                subprocess.run(["bash", "-n", "-c", step.value], check=True)
    command = json.loads(next(step.value for step in final if step.instruction == "CMD"))
    options = parsed(shlex.join(command))
    assert options["host"] == "0.0.0.0"
    assert Step("EXPOSE", str(options["port"])) in final


def test_compose_has_a_head_that_serves_and_workers_that_join_it() -> None:
    compose = read("compose.yaml")
    head, worker = compose["services"]["head"], compose["services"]["worker"]
    for service in (head, worker):
        assert service["image"] == IMAGE and "privileged" not in service and "user" not in service
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert re.fullmatch(r"\$\{LORAMIX_API_KEY:\?[^}]+\}", service["environment"]["LORAMIX_API_KEY"])
        assert [volume.split(":")[0] for volume in service["volumes"]] == list(compose["volumes"])
    assert worker["depends_on"] == ["head"]
    *_, script = head["command"]
    start, serve = script.split(" && exec ")
    options = parsed(serve)
    assert options["ray"] and options["address"] == "auto" and options["cpus_per_worker"] == worker["cpus"]
    assert head["ports"] == [f"127.0.0.1:{options['port']}:{options['port']}"]
    assert fnmatch(head["healthcheck"]["test"][-1], f"http://127.0.0.1:{options['port']}/health")
    assert "--num-cpus=0" in start and f"--num-cpus={worker['cpus']}" in worker["command"]
    assert "--address=head:6379" in worker["command"] and "--block" in worker["command"]


def test_rays_command_has_these_options() -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'loramix[ray]'")
    from ray.scripts.scripts import start

    compose = read("compose.yaml")["services"]
    head = compose["head"]["command"][-1].split(" && ")[0]
    for command in (head, compose["worker"]["command"]):
        words = shlex.split(command)
        assert words[:2] == ["ray", "start"]
        start.make_context("start", words[2:])


@pytest.mark.parametrize("name", [*MANIFESTS, "compose.yaml", "Dockerfile"])
def test_commands_in_comments_are_of_the_cli(name: str) -> None:
    for line in (DEPLOY / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and (found := re.search(r"\bloramix batch .*", line)):
            assert parsed(found.group())["ray"]
