"""A file that trains from a config on several nodes, for whatever starts programs there. Its body is one line of torchrun:

    torchrun --nnodes=2 --node_rank=RANK ... --max_restarts=3 --module qwenvl_ft train --config lora.yaml resume=true

A place differs in how it is asked for nodes and in which variables it says who is who; nothing of its own is imported here.
When a process fails torchrun starts all of them anew, and `resume=true` goes on at the newest whole checkpoint.
"""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from qwenvl_ft.cloud.job import torchrun
from qwenvl_ft.config import load_config
from qwenvl_ft.errors import Problem, UserError

Place = Literal["torchrun", "slurm", "dlc", "sky", "kubeflow", "ray"]
PORT = 29500  # torch's own, where a node is ours alone
RESTARTS = 3
SHARED = "/work"  # in a container: the folder that the config's paths are relative to, on a volume that all nodes see
CLAIM = "qwenvl-ft"  # that volume's claim, as in deploy/kubernetes.yaml
GPUS = re.compile(r"(?:(?P<kind>[\w.-]+):)?(?P<count>[1-9]\d*)")
IN_A_CONTAINER = ("dlc", "sky", "kubeflow")
TAKES_A_KIND = ("slurm", "sky")


@dataclass(frozen=True)
class Launch:
    """What is to be started: `gpus` a node, each with a process and the CPUs that decode its pictures."""

    config: Path
    name: str
    nodes: int
    gpus: int
    kind: str | None
    cpus: int
    image: str | None
    zero: int | None

    def line(self, rank: str, address: str, port: str | int = PORT) -> str:
        """The line of a shell that every node runs; rank, address and port as that shell finds them."""
        deepspeed = ["env", "ACCELERATE_USE_DEEPSPEED=true", f"ACCELERATE_DEEPSPEED_ZERO_STAGE={self.zero}"] if self.zero else []
        words = [*deepspeed, "torchrun", *torchrun(str(self.nodes), str(self.gpus), rank, address, str(port))]
        return " ".join([*words, f"--max_restarts={RESTARTS}", *self.train])

    @property
    def train(self) -> list[str]:
        """What torchrun starts."""
        return ["--module", "qwenvl_ft", "train", "--config", shlex.quote(self.config.as_posix()), "resume=true"]


class Written(NamedTuple):
    """A file's text, and the command that submits it, in which {} is the file."""

    text: str
    submit: str


def plan_launch(config: Path, to: Place, nodes: int, gpus: str, image: str | None = None, zero: int | None = None) -> Launch:
    """Raises UserError with all that keeps the config from running there."""
    problems = []
    if not (found := GPUS.fullmatch(gpus)):
        raise UserError(Problem(f"--gpus {gpus}", "is no number of GPUs", "write how many each node has, such as 8, or A100:8"))
    if (kind := found["kind"]) and to not in TAKES_A_KIND:
        problems.append(
            Problem(f"--gpus {gpus}", f"{to} is asked for a number of GPUs, not for their kind", f"write {found['count']}")
        )
    if to == "sky" and not kind:
        problems.append(Problem(f"--gpus {gpus}", "SkyPilot looks for a kind of GPU", "write it before, such as A100:8"))
    if to in IN_A_CONTAINER and not image:
        fix = "build the Dockerfile, push it to a registry of yours, and name it, or export QWENVL_IMAGE"
        problems.append(Problem("--image", "is not given: in which container should it run?", fix))
    if to == "sky" and zero and nodes > 1:
        what = "under DeepSpeed every node writes a part of a checkpoint, and SkyPilot's nodes share no disk"
        problems.append(Problem(f"--zero {zero}", what, "leave it out, or take --nodes 1"))
    if config.is_absolute() and to in IN_A_CONTAINER:
        problems.append(Problem(str(config), "is the path of this machine", f"give it as it is called from {SHARED} there"))
    try:
        settings = load_config(config)
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    if problems:
        raise UserError(*problems)
    name = re.sub("[^a-z0-9]+", "-", f"qwenvl-ft-{settings.run_name or config.stem}".lower())[:40].strip("-")
    count = int(found["count"])
    return Launch(config, name, nodes, count, kind, count * (1 + settings.dataloader_num_workers), image, zero)


def write_torchrun(launch: Launch) -> Written:
    """For machines that one can log into: it is started by hand, once on each."""
    alone = launch.nodes == 1
    arguments = "" if alone else " RANK HOST"
    told = ["rank=0 host=127.0.0.1"] if alone else [
        f'rank=${{1:?RANK: 0 on the first node, up to {launch.nodes - 1}}} host=${{2:?HOST: the address of the first node}}'
    ]  # fmt: skip
    text = [
        "#!/usr/bin/env bash",
        f"# On each of {launch.nodes} nodes, in a folder that all share: bash FILE{arguments}",
        "set -euo pipefail",
        *told,
        "exec " + launch.line('"$rank"', '"$host"'),
    ]
    return Written("\n".join(text) + "\n", f"bash {{}}{arguments}")


def write_slurm(launch: Launch) -> Written:
    """srun starts torchrun once on each node; a job that is preempted or loses a node comes again and goes on."""
    gpus = f"{launch.kind}:{launch.gpus}" if launch.kind else launch.gpus
    line = launch.line('"$SLURM_NODEID"', '"$MASTER_ADDR"', '"$MASTER_PORT"')
    text = f"""\
#!/bin/bash
#SBATCH --job-name={launch.name}
#SBATCH --nodes={launch.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task={launch.cpus}
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
# The last one: two minutes before its time is up the run saves and ends; submit it again, and it goes on.
set -euo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))  # nodes may be shared with other jobs
export MASTER_ADDR MASTER_PORT
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c {shlex.quote("exec " + line)}
"""
    return Written(text, "sbatch {}")


def write_dlc(launch: Launch) -> Written:
    """The body of PAI DLC's CreateJob, for data on NAS or CPFS; `qwenvl-ft pai submit` is for data in OSS or on this machine."""
    line = launch.line('"$RANK"', '"$MASTER_ADDR"', '"$MASTER_PORT"')
    worker = {
        "Type": "Worker",
        "Image": launch.image,
        "PodCount": launch.nodes,
        "ResourceConfig": {"GPU": str(launch.gpus), "CPU": str(launch.cpus), "Memory": f"{64 * launch.gpus}Gi"},
    }
    body = {
        "DisplayName": launch.name,
        "JobType": "PyTorchJob",
        "JobSpecs": [worker],
        "DataSources": [{"DataSourceId": "YOUR-DATASET", "MountPath": SHARED}],
        "ResourceId": "YOUR-QUOTA",
        "WorkspaceId": "YOUR-WORKSPACE",
        "UserCommand": f"cd {SHARED} && {line}",
    }
    submit = 'aliyun pai-dlc POST /api/v1/jobs --header "Content-Type=application/json" --body "$(cat {})"'
    return Written(json.dumps(body, indent=2, ensure_ascii=False) + "\n", submit)


def write_sky(launch: Launch) -> Written:
    """Its nodes share nothing, so checkpoints go into a bucket as they come, as those of a job of PAI do. The image runs as itself:
    SkyPilot would want to log into it as root.
    """
    line = launch.line('"$SKYPILOT_NODE_RANK"', '"$(head -n 1 <<< "$SKYPILOT_NODE_IPS")"')
    text = f"""\
name: {launch.name}
num_nodes: {launch.nodes}
resources:
  accelerators: {launch.kind}:{launch.gpus}
workdir: .   # the config, and the data that it names; its model may be hf:ORG/NAME
file_mounts:
  /outputs:
    name: {launch.name}-outputs   # a bucket, made where there is none: its name is yours alone among all of that cloud
    mode: MOUNT
run: |
  mkdir -p /outputs/checkpoints /outputs/model
  docker run --rm --gpus all --network host --shm-size 8g --no-healthcheck --user "$(id -u):$(id -g)" --env HOME=/tmp \\
    --volume "$PWD:{SHARED}" --workdir {SHARED} --volume /outputs:/outputs \\
    --env PAI_OUTPUT_CHECKPOINTS=/outputs/checkpoints --env PAI_OUTPUT_MODEL=/outputs/model {shlex.quote(launch.image or "")} \\
    {line}
"""
    return Written(text, "sky jobs launch {}")


def write_kubeflow(launch: Launch) -> Written:
    """A TrainJob of Kubeflow Trainer. Its runtime sets torchrun's options as PET_*: said again they are seen here."""
    line = launch.line('"$PET_NODE_RANK"', '"$PET_MASTER_ADDR"', '"$PET_MASTER_PORT"')
    text = f"""\
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata:
  name: {launch.name}
spec:
  runtimeRef:
    name: torch-distributed
  trainer:
    image: {json.dumps(launch.image)}
    numNodes: {launch.nodes}
    numProcPerNode: {launch.gpus}
    resourcesPerNode:
      requests:
        cpu: {launch.cpus}
      limits:
        nvidia.com/gpu: {launch.gpus}
    command: [bash, -c]
    args:
      - |
        cd {SHARED}
        exec {line}
  runtimePatches:
    - manager: qwenvl-ft.io/launch
      trainingRuntimeSpec:
        template:
          spec:
            replicatedJobs:
              - name: node
                template:
                  spec:
                    template:
                      spec:
                        terminationGracePeriodSeconds: 120   # for the end of a step and a checkpoint
                        securityContext:   # the image's user, whom the volume belongs to
                          runAsUser: 1000
                          fsGroup: 1000
                        containers:
                          - name: node
                            volumeMounts:
                              - name: work
                                mountPath: {SHARED}
                              - name: shm
                                mountPath: /dev/shm
                        volumes:
                          - name: work   # holds the config, the model and the data that it names, and gets output_dir
                            persistentVolumeClaim:
                              claimName: {CLAIM}
                          - name: shm   # pictures pass through it from the processes that decode them
                            emptyDir:
                              medium: Memory
                              sizeLimit: 8Gi
"""
    return Written(text, "kubectl create -f {}")


def write_ray(launch: Launch) -> Written:
    """A program that Ray's head runs: it takes the nodes, and starts torchrun once on each.

    Ray stops a job by SIGKILL for what its workers started, here the shell; torchrun, which the kernel then sends SIGTERM, ends its
    processes. Killed itself it would leave them at work on GPUs that Ray gives to others.
    """
    line = "setpriv --pdeathsig TERM " + launch.line('"$NODE_RANK"', '"$MASTER_ADDR"') + " & wait $!"
    text = f'''\
"""Submit with: ray job submit --working-dir . -- python FILE"""
import os
import subprocess
import sys

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

NODES, GPUS, CPUS = {launch.nodes}, {launch.gpus}, {launch.cpus}
LINE = {line!r}


@ray.remote(num_cpus=CPUS, num_gpus=GPUS)
def start(rank, address):
    return subprocess.run(["bash", "-c", LINE], env=os.environ | {{"NODE_RANK": str(rank), "MASTER_ADDR": address}}).returncode


@ray.remote(num_cpus=CPUS, num_gpus=GPUS)
def address():
    return ray.util.get_node_ip_address()


ray.init()
nodes = placement_group([{{"CPU": CPUS, "GPU": GPUS}}] * NODES, strategy="STRICT_SPREAD")
ray.get(nodes.ready())
on = [{{"scheduling_strategy": PlacementGroupSchedulingStrategy(nodes, placement_group_bundle_index=at)}} for at in range(NODES)]
head = ray.get(address.options(**on[0]).remote())
codes = ray.get([start.options(**on[rank]).remote(rank, head) for rank in range(NODES)])
sys.exit(any(codes))
'''
    return Written(text, "ray job submit --working-dir . -- python {}")


WRITERS: dict[Place, tuple[str, Callable[[Launch], Written]]] = {
    "torchrun": ("launch.sh", write_torchrun),
    "slurm": ("launch.sbatch", write_slurm),
    "dlc": ("launch.json", write_dlc),
    "sky": ("launch.yaml", write_sky),
    "kubeflow": ("launch.yaml", write_kubeflow),
    "ray": ("launch.py", write_ray),
}
assert WRITERS.keys() == set(get_args(Place))
