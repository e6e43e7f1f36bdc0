"""`qwenvl-ft launch`: what it writes is read by parsers, and its line is run as the place's shell would, for both of two nodes."""

import ast
import contextlib
import json
import os
import re
import runpy
import select
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from ruamel.yaml import YAML
from torch.distributed.run import parse_args

from qwenvl_ft.cli.main import main
from qwenvl_ft.cloud.launch import CLAIM, RESTARTS, SHARED, WRITERS, Place
from qwenvl_ft.config import load_config
from tests.conftest import ROOT
from tests.test_readme import blocks, commands, text_of

IMAGE = "registry.example/qwenvl-ft:1"
CONFIG = "my run's lora.yaml"  # which every shell breaks that is not told otherwise
ADDRESS = "10.0.0.1"
# What a place tells the shell of its second node.
TOLD = {
    "torchrun": {},
    "slurm": {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "9500", "SLURM_NODEID": "1", "SLURM_CPUS_PER_TASK": "12"},
    "dlc": {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": ADDRESS, "MASTER_PORT": "29500"},
    "sky": {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": f"{ADDRESS}\n10.0.0.2"},
    "kubeflow": {"PET_NODE_RANK": "1", "PET_MASTER_ADDR": ADDRESS, "PET_MASTER_PORT": "29500"},
    "ray": {"NODE_RANK": "1", "MASTER_ADDR": ADDRESS},
}
SRUN = """#!/usr/bin/env bash
# Two nodes at once, a task on each.
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first && wait $second
"""
PROGRAM = """import json, os, sys
said = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
open("said-" + said["RANK"], "w").write(json.dumps([sys.argv[1:], said]))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the files go: a folder with a config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENVL_IMAGE", IMAGE)
    Path(CONFIG).write_text("model: m\ntrain_meta_file: t.json\noutput_dir: runs/a\ndataloader_num_workers: 2\n")
    return tmp_path


@pytest.fixture
def write(folder, capsys):
    """Runs the command; returns the file's text and the line that submits it."""

    def write(to: str, *options: str, gpus: str = "") -> tuple[str, str]:
        words = ["--nodes", "2", "--gpus", gpus or ("A100:4" if to == "sky" else "4"), CONFIG, *options]
        with pytest.raises(SystemExit) as ended:
            main(["launch", "--to", to, *words])
        if ended.value.code:
            raise ended.value
        return Path(WRITERS[to][0]).read_text(), capsys.readouterr().out.strip()

    return write


def tool(folder: Path, name: str, text: str) -> None:
    """A program of this name that is found before others."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(text)
    (folder / "bin" / name).chmod(0o755)


def body(to: str, text: str) -> str:
    """What the place gives a shell."""
    found = {
        "torchrun": lambda: text,
        "slurm": lambda: text,
        "dlc": lambda: json.loads(text)["UserCommand"],
        "sky": lambda: YAML(typ="safe").load(text)["run"],
        "kubeflow": lambda: YAML(typ="safe").load(text)["spec"]["trainer"]["args"][0],
        "ray": lambda: next(ast.literal_eval(of.value) for of in ast.parse(text).body
                            if isinstance(of, ast.Assign) and ast.unparse(of.targets[0]) == "LINE"),
    }  # fmt: skip
    return found[to]()


def run_body(folder: Path, to: str, text: str) -> tuple[list[str], dict[str, str]]:
    """The arguments and the environment that torchrun gets on the second node."""
    tool(folder, "torchrun", f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n")
    tool(folder, "scontrol", f"#!/bin/sh\n[ \"$1 $2 $3\" = 'show hostnames n[1-2]' ] && printf '{ADDRESS}\\n10.0.0.2\\n'\n")
    tool(folder, "srun", '#!/bin/sh\n[ "$1 $2" = "--kill-on-bad-exit=1 --cpus-per-task=12" ] && shift 2 && exec "$@"\n')
    tool(folder, "docker", f'#!/bin/sh\nwhile [ "$1" != {IMAGE} ]; do shift; done\nshift\nexec "$@"\n')
    script = folder / "body.sh"
    script.write_text(body(to, text).replace(SHARED, str(folder)).replace("/outputs/", "outputs/"))
    subprocess.run(["bash", "-n", script], check=True)
    path = f"{folder}/bin{os.pathsep}{os.environ['PATH']}"
    arguments = ["1", ADDRESS] if to == "torchrun" else []
    done = subprocess.run(["bash", script, *arguments], text=True, capture_output=True, check=True,
                          env=os.environ | TOLD[to] | {"PATH": path})  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.parametrize("to", get_args(Place))
def test_a_node_runs_torchrun_with_what_the_place_tells_it(to, folder, write):
    """Read by torchrun's own parser; `training_script_args` by the command that they are for."""
    words, _ = run_body(folder, to, write(to)[0])
    given = parse_args(words)
    assert (given.nnodes, given.nproc_per_node, given.node_rank, given.master_addr) == ("2", "4", 1, ADDRESS)
    assert given.master_port == 29500 and given.max_restarts == RESTARTS > 0
    assert (given.module, given.training_script) == (True, "qwenvl_ft")
    assert given.training_script_args[:3] == ["train", "--config", CONFIG]
    assert load_config(CONFIG, given.training_script_args[3:]).resume


@pytest.mark.parametrize(("to", "submits"), {
    "torchrun": "bash launch.sh RANK HOST", "slurm": "sbatch launch.sbatch", "sky": "sky jobs launch launch.yaml",
    "dlc": 'aliyun pai-dlc POST /api/v1/jobs --header "Content-Type=application/json" --body "$(cat launch.json)"',
    "kubeflow": "kubectl create -f launch.yaml", "ray": "ray job submit --working-dir . -- python launch.py",
}.items())  # fmt: skip
def test_it_says_how_to_submit_the_file_and_overwrites_none(to, submits, folder, write, capsys):
    _, said = write(to)
    assert said == submits
    with pytest.raises(SystemExit):
        write(to)
    assert "exists already" in capsys.readouterr().err
    write(to, "-o", "other file")
    assert Path("other file").read_text() == Path(WRITERS[to][0]).read_text()


def test_nothing_of_a_place_is_imported(folder):
    code = "import sys\nfrom qwenvl_ft.cli.main import app\n" + "".join(
        f"app({['launch', '--to', to, '--gpus', 'A:1' if to == 'sky' else '1', CONFIG, '-o', to]}, standalone_mode=False)\n"
        for to in get_args(Place)
    )
    code += "print(sorted({'torch', 'sky', 'ray', 'kubernetes', 'kubeflow', 'pai'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]" and all(Path(to).is_file() for to in get_args(Place))


def test_every_place_is_asked_for_the_nodes_and_what_they_need(folder, write):
    """Four GPUs a node, with a process and two workers each."""
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", write("slurm", gpus="a100:4")[0], re.MULTILINE))
    wanted = {
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "a100:4",
        "cpus-per-task": "12",
        "requeue": "",
        "signal": "TERM@120",
    }
    assert wanted.items() <= directives.items()
    (worker,) = json.loads(write("dlc")[0])["JobSpecs"]
    assert (worker["PodCount"], worker["Image"], worker["ResourceConfig"]["GPU"], worker["ResourceConfig"]["CPU"]) == (
        2,
        IMAGE,
        "4",
        "12",
    )
    sky = YAML(typ="safe").load(write("sky")[0])
    Path("launch.yaml").unlink()
    assert (sky["num_nodes"], sky["resources"], list(sky["file_mounts"])) == (2, {"accelerators": "A100:4"}, ["/outputs"])
    assert "PAI_OUTPUT_CHECKPOINTS=/outputs/" in sky["run"] and "PAI_OUTPUT_MODEL=/outputs/" in sky["run"]
    spec = YAML(typ="safe").load(write("kubeflow")[0])["spec"]
    trainer = spec["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (2, 4, IMAGE)
    assert trainer["resourcesPerNode"] == {"requests": {"cpu": 12}, "limits": {"nvidia.com/gpu": 4}}
    ((job,),) = [patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"] for patch in spec["runtimePatches"]]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == CLAIM
    assert [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]] == [SHARED, "/dev/shm"]
    claims = [of for of in YAML(typ="safe").load_all((ROOT / "deploy/kubernetes.yaml").read_text()) if of["kind"] == "Job"]
    assert claims[0]["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == CLAIM


def test_ray_starts_a_node_each_and_ends_as_they_do(folder, write, monkeypatch):
    """With a `ray` that runs what it is asked for at once, and a torchrun that fails on the second node."""
    text, _ = write("ray")
    tool(folder, "torchrun", '#!/bin/sh\necho "$@" >> said\ncase "$*" in *node_rank=1*) exit 3;; esac\n')
    monkeypatch.setenv("PATH", f"{folder}/bin{os.pathsep}{os.environ['PATH']}")
    (folder / "ray/util").mkdir(parents=True)
    (folder / "ray/__init__.py").write_text("""
class Remote:
    def __init__(self, call): self.call = call
    def options(self, scheduling_strategy): placed.append(scheduling_strategy); return self
    def remote(self, *of): return self.call(*of)
placed, init, get, asked = [], lambda: None, lambda of: of, []
def remote(**needs): asked.append(needs); return Remote
""")
    (folder / "ray/util/__init__.py").write_text(f"get_node_ip_address = lambda: {ADDRESS!r}\n")
    (folder / "ray/util/placement_group.py").write_text("""
import ray
class placement_group:
    def __init__(self, bundles, strategy): ray.asked.append((bundles, strategy))
    def ready(self): return True
""")
    (folder / "ray/util/scheduling_strategies.py").write_text(
        "def PlacementGroupSchedulingStrategy(group, placement_group_bundle_index): return placement_group_bundle_index"
    )
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(folder / "launch.py"), run_name="__main__")
    import ray

    assert ended.value.code and "SPREAD" in text
    assert ray.asked[-1] == ([{"CPU": 12, "GPU": 4}] * 2, "STRICT_SPREAD") and set(ray.placed) == {0, 1}
    lines = Path("said").read_text().splitlines()
    assert [re.search(r"--node_rank=(\d)", line)[1] for line in lines] == ["0", "1"] and all(ADDRESS in line for line in lines)
    for name in [name for name in sys.modules if name.split(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)


def test_torchrun_is_asked_to_end_when_ray_kills_what_started_it(folder, write):
    """As `ray job stop` does: SIGKILL for the shell alone. Whoever torchrun started is ended by it, so it must hear of that."""
    text, _ = write("ray")
    tool(folder, "torchrun", "#!/bin/sh\ntrap 'echo asked; exit' TERM\necho started\nwhile :; do sleep 0.05; done\n")
    with subprocess.Popen(["bash", "-c", body("ray", text)], text=True, stdout=subprocess.PIPE, start_new_session=True,
                          env=os.environ | TOLD["ray"] | {"PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}"}) as shell:  # fmt: skip
        try:
            assert shell.stdout.readline() == "started\n"
            shell.kill()
            assert select.select([shell.stdout], [], [], 10)[0] and shell.stdout.readline() == "asked\n"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)


def test_slurm_s_file_starts_every_process_of_two_nodes(folder, write):
    """By the real torchrun, twice on loopback; in place of training stands what writes down how it was started."""
    write("slurm", gpus="2")
    tool(folder, "srun", SRUN)
    tool(folder, "scontrol", "#!/bin/sh\nprintf '127.0.0.1\\nn2\\n'\n")
    (folder / "qwenvl_ft").mkdir()
    (folder / "qwenvl_ft/__init__.py").write_text("")
    (folder / "qwenvl_ft/__main__.py").write_text(PROGRAM)
    job = str(os.getpid() % 9000)
    path = os.pathsep.join([f"{folder}/bin", str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(["bash", "launch.sbatch"], text=True, capture_output=True,
                          env=os.environ | TOLD["slurm"] | {"SLURM_JOB_ID": job, "PATH": path, "PYTHONPATH": str(folder), "GLOO_SOCKET_IFNAME": "lo"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [json.loads((folder / f"said-{rank}").read_text()) for rank in range(4)]
    assert all(words == ["train", "--config", CONFIG, "resume=true"] for words, _ in said)
    places = [(of["LOCAL_RANK"], of["WORLD_SIZE"], of["LOCAL_WORLD_SIZE"], of["MASTER_ADDR"], of["MASTER_PORT"]) for _, of in said]
    assert places == [(local, "4", "2", "127.0.0.1", str(20000 + int(job))) for local in "0101"]


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_is_deepspeed_of_that_stage_for_accelerate(stage, folder, write, monkeypatch):
    from accelerate.utils import DeepSpeedPlugin

    words, environment = run_body(folder, "torchrun", write("torchrun", "--zero", str(stage))[0])
    assert parse_args(words).training_script == "qwenvl_ft" and environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    for name in [name for name in environment if name.startswith("ACCELERATE_")]:
        monkeypatch.setenv(name, environment[name])
    assert DeepSpeedPlugin().deepspeed_config["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize(("to", "options", "said"), [
    ("slurm", ["--gpus", "many"], "is no number of GPUs"), ("kubeflow", ["--gpus", "A100:8"], "not for their kind"),
    ("sky", ["--gpus", "8"], "looks for a kind of GPU"), ("sky", ["--gpus", "A100:8", "--nodes", "2", "--zero", "2"], "share no disk"),
    ("dlc", ["--image", ""], "in which container should it run?"), ("slurm", ["-o", "nowhere/a"], "cannot be written"),
])  # fmt: skip
def test_what_cannot_run_there_is_said_and_nothing_is_written(to, options, said, folder, capsys):
    with pytest.raises(SystemExit):
        main(["launch", "--to", to, CONFIG, *options])
    assert said in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in folder.iterdir()] == [CONFIG]


def test_a_mistake_in_the_config_is_said_before_anybody_waits_in_a_queue(folder, capsys):
    Path("bad.yaml").write_text("model: m\ntrain_meta_file: t.json\noutput_dir: o\nlearning_rat: 1\n")
    with pytest.raises(SystemExit):
        main(["launch", "--to", "kubeflow", "--image", "", str(folder / "bad.yaml")])
    said = " ".join(capsys.readouterr().err.split())
    assert "learning_rate" in said and "--image" in said and "is the path of this machine" in said


def test_the_commands_of_the_pages_write_what_they_say(folder):
    """docs/clusters.md, a page a place, and their Chinese twins: the same commands, and all is read at one sitting."""
    Path(CONFIG).rename("lora.yaml")
    launched = []
    for topic in ("clusters", "slurm", "kubernetes", "skypilot", "ray"):
        page, chinese = f"docs/{topic}.md", f"docs/zh/{topic}.md"
        assert commands(page) == commands(chinese) and blocks(page, "sh") == blocks(chinese, "sh")
        for words in map(shlex.split, commands(page)):
            if words[:2] == ["qwenvl-ft", "launch"]:
                with pytest.raises(SystemExit) as ended:
                    main(words[1:])
                assert ended.value.code == 0 and Path(words[-1]).is_file(), words
                launched.append(words[3])
        sections = [re.split(r"^## ", text_of(of), flags=re.MULTILINE)[1:] for of in (page, chinese)]
        assert len(sections[0]) == len(sections[1]) and all(text.count("\n") <= 60 for of in sections for text in of)
        for of in (page, chinese):
            for link in re.findall(r"\]\(([^):#]+)", text_of(of)):
                assert ((ROOT / of).parent / link).exists(), (of, link)
    assert sorted(launched) == sorted(get_args(Place))
    name = YAML(typ="safe").load(Path("trainjob.yaml").read_text())["metadata"]["name"]
    assert f"kubectl get trainjob {name}\n" in text_of("docs/kubernetes.md") and f"{name}-*.out" in text_of("docs/slurm.md")
