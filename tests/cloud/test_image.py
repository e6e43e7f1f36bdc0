"""The image and the files that use it, without an engine that builds images: its steps are read from the Dockerfile and carried out
in a folder as far as they need neither root nor a network. apt-get and what uv would download are not: uv says what it would install.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import httpx
import pytest
import typer.main
from ruamel.yaml import YAML

from qwenvl_ft.cli.main import app
from qwenvl_ft.cloud.job import launcher
from qwenvl_ft.config import load_config
from tests.conftest import ROOT, TINY

LINES = re.sub(r"^#.*\n|\\\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).splitlines()
STEPS = [tuple(line.split(" ", 1)) for line in LINES if line.strip()]
IGNORE = (ROOT / ".dockerignore").read_text().split("\n")
LINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
UV = shutil.which("uv", path=f"{ROOT}/.tools/bin{os.pathsep}{os.environ['PATH']}")
KUBERNETES = {of["kind"]: of for of in YAML(typ="safe").load_all((ROOT / "deploy/kubernetes.yaml").read_text())}
SKY = YAML(typ="safe").load((ROOT / "deploy/skypilot.yaml").read_text())


def last(instruction: str) -> str:
    """What the last step of a kind says, which is the one that counts."""
    return next(text for name, text in reversed(STEPS) if name == instruction)


def argv(text: str) -> list[str]:
    """The words of a step's JSON form, Python being this one."""
    names = {"python": [sys.executable], "qwenvl-ft": [sys.executable, "-m", "qwenvl_ft"]}
    first, *others = YAML(typ="safe").load(text)
    return [*names[first], *others]


@pytest.mark.skipif(not LINT, reason="hadolint is not installed")
def test_the_linter_finds_nothing(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM ubuntu\nRUN cd /tmp\n")
    assert subprocess.run([LINT, tmp_path / "Dockerfile"], capture_output=True).returncode == 1  # it can
    done = subprocess.run([LINT, ROOT / "Dockerfile"], text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_its_steps_bring_what_is_locked_and_all_that_the_package_is_built_from(tmp_path):
    environment = {**os.environ, "UV_CACHE_DIR": str(tmp_path / "cache")}
    folder, plans = tmp_path, []
    for instruction, text in STEPS:
        if instruction == "WORKDIR":
            (folder := tmp_path / text.strip("/")).mkdir(parents=True, exist_ok=True)
        if instruction == "ENV":
            named = dict(pair.split("=", 1) for pair in shlex.split(text))
            environment |= {name: value.replace("/opt", f"{tmp_path}/opt") for name, value in named.items() if name != "PATH"}
        if instruction == "COPY" and not text.startswith("--from"):
            *sources, target = text.split()
            for source in sources:
                assert f"!{source}" in IGNORE
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, folder / target)
        if instruction == "RUN" and text.startswith("uv "):
            command = [UV, *shlex.split(text.split("&&")[0])[1:], "--dry-run", "--offline"]
            plans.append(subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True))
            assert plans[-1].returncode == 0, plans[-1].stderr
            built = folder
    assert IGNORE[1] == "*" and len(plans) == 2
    locked = {(of["name"], of["version"]) for of in tomllib.loads((ROOT / "uv.lock").read_text())["package"] if "version" in of}
    first, second = (re.findall(r"^ \+ (\S+?)(?:==(\S+)| @ .*)$", plan.stderr, re.MULTILINE) for plan in plans)
    assert set(first) <= locked and {name for name, _ in second} == {name for name, _ in first} | {"qwenvl-ft"}
    names = {name for name, _ in first}
    assert "torch" in names and not names & {"pytest", "ruff", "hatchling"}
    done = subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel"], cwd=built, text=True, capture_output=True)
    assert done.returncode == 0 and len(list(built.glob("dist/*.whl"))) == 1, done.stderr


def test_its_command_answers_who_has_the_key_and_its_health_check_says_whether(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "LISTENING_PORT": port,
        "API_KEY": "a key",
        "OMP_NUM_THREADS": "1",
        "http_proxy": "http://127.0.0.1:9",
    }
    check = argv(last("HEALTHCHECK").split(" CMD ")[1])
    command = [str(TINY) if word == "/model" else word for word in argv(last("CMD"))]
    assert str(TINY) in command
    with subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            assert f":{port}/v1" in server.stdout.readline()
            deadline = time.monotonic() + 60
            while (said := subprocess.run(check, env=environment, capture_output=True)).returncode and time.monotonic() < deadline:
                time.sleep(0.1)
            assert said.returncode == 0, said.stderr
            answers = [
                httpx.get(f"http://127.0.0.1:{port}/v1/models", headers={"Authorization": f"Bearer {key}"}, trust_env=False)
                for key in ("a key", "another")
            ]
            assert [answer.status_code for answer in answers] == [200, 401]
        finally:
            server.kill()
    assert subprocess.run(check, env=environment, capture_output=True).returncode == 1


def pod(kind: str) -> tuple[dict, dict]:
    """The pod that something starts, and its only container."""
    spec = KUBERNETES[kind]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return spec, container


def test_kubernetes_runs_the_image_as_the_user_and_on_the_port_that_it_has():
    user, port = last("USER").split(":")[0], int(last("EXPOSE"))
    assert int(user) > 0
    for kind in ("Job", "Deployment"):
        spec, container = pod(kind)
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == int(user)
        assert container["image"] == SKY["envs"]["IMAGE"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    _, server = pod("Deployment")
    assert (
        [of["containerPort"] for of in server["ports"]] == [port] == [of["port"] for of in KUBERNETES["Service"]["spec"]["ports"]]
    )
    assert {
        (server[probe]["httpGet"]["path"], server[probe]["httpGet"]["port"]) for probe in ("startupProbe", "livenessProbe")
    } == {("/health", port)}
    (key,) = server["env"]
    assert key["name"] in last("CMD") and set(key) == {"name", "valueFrom"}  # no key stands in the file
    assert KUBERNETES["Service"]["spec"]["selector"] == KUBERNETES["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert server["volumeMounts"][0]["mountPath"] in last("CMD")


def test_kubernetes_takes_its_file():
    validator = pytest.importorskip("kubernetes_validate")
    for of in KUBERNETES.values():
        validator.validate(of, validator.latest_version(), strict=True)
    with pytest.raises(validator.ValidationError):
        validator.validate({**KUBERNETES["Job"], "spec": {"templete": {}}}, validator.latest_version(), strict=True)


def test_the_commands_of_the_image_and_of_kubernetes_are_ours(tmp_path):
    commands = typer.main.get_command(app).commands
    for words in (YAML(typ="safe").load(last("CMD")), pod("Job")[1]["command"]):
        given = commands[words[1]].make_context(words[1], list(words[2:])).params
        if words[1] == "train":
            assert load_config(ROOT / "configs" / given["config"], given["overrides"]).resume


def test_skypilot_starts_the_image_on_every_node_as_dlc_would(tmp_path):
    """The task's script with what SkyPilot tells each node, and a `docker` that says what it was asked for."""
    (tmp_path / "docker").write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    (tmp_path / "docker").chmod(0o755)
    told = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "4",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    script = SKY["run"].replace("/outputs/checkpoints /outputs/model", f"{tmp_path}/outputs")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", script],
        env={**os.environ, **SKY["envs"], **told, "PATH": path},
        text=True,
        capture_output=True,
        check=True,
    )
    words = YAML(typ="safe").load(done.stdout)
    at = words.index(SKY["envs"]["IMAGE"])
    environment = dict(words[i + 1].split("=", 1) for i in range(at) if words[i] == "--env")
    volumes = [words[i + 1].split(":")[1] for i in range(at) if words[i] == "--volume"]
    assert words[0] == "run" and words[at + 1 :] == ["qwenvl-ft", "train", "--config", "lora.yaml"]
    started = launcher(environment, words[at + 2 :])
    assert {"--nnodes=2", "--node_rank=1", "--nproc_per_node=4", "--master_addr=10.0.0.1", "train"} <= set(started)
    assert volumes == [last("WORKDIR"), *SKY["file_mounts"]]
    assert all(Path(environment[name]).parent == Path(volumes[1]) for name in environment if name.startswith("PAI_OUTPUT_"))
