"""A training job of Alibaba Cloud's PAI, read from the environment that PAI gives it. Outside of one nothing here does anything.

    PAI_INPUT_<KEY>         a mounted input channel, named like the key that it sets: model, train_meta_file ...
    PAI_CONFIG_DIR          hyperparameters.json: settings, each value a text; else PAI_HPS has that JSON, else PAI_HPS_<KEY> one.
                            `config` names the file of settings, relative to the folder that the job runs in
    $PAI_USER_ARGS          the same as --KEY VALUE; the shell breaks texts at their spaces, so the JSON counts
    PAI_OUTPUT_CHECKPOINTS  gets the checkpoints, and PAI_OUTPUT_MODEL the adapter; where only one is mounted, it gets both
    WORLD_SIZE, RANK        of DLC: how many NODES there are, and which this is; also NPROC_PER_NODE, MASTER_ADDR, MASTER_PORT

What counts: the command line, then hyperparameters, then channels, then the file of settings. But the channel counts where the
hyperparameter of its name is an oss:// URL, which is where the channel was mounted from.

A mounted bucket renames in no one move, and writes a file anew to append to it. So training writes to a disk of the machine, and
from there whole files are copied, a folder's manifest last.
"""

import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwenvl_ft.console import print_line, print_note
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.runs import checkpoints, newest
from qwenvl_ft.folders.whole import MANIFEST, short_hash, writing

CHANNELS = ("model", "train_meta_file", "train_data_dir", "eval_meta_file", "eval_data_dir")
OF_A_JOB = ("PAI_CONFIG_DIR", "PAI_HPS", "PAI_INPUT_", "PAI_OUTPUT_")
# For a job's MetricDefinitions: (name, regular expression), found in the lines that training prints.
METRICS = [
    ("loss", r".*\bloss=([0-9.]+).*"),
    ("eval_loss", r".*\beval_loss=([0-9.]+).*"),
    ("learning_rate", r".*\blr ([0-9.]+e[+-][0-9]+).*"),
]


def job_settings(environ: Mapping[str, str]) -> tuple[Path | None, list[str]]:
    """The file of settings that the job names, and the settings that take the place of the file's, as key=value.

    Raises UserError for a channel that is not mounted or that sets nothing.
    """
    wanted, problems = hyperparameters(environ), []
    named, config = " ".join(wanted.values()), wanted.pop("config", None)
    for name, path in environ.items():
        if not name.startswith("PAI_INPUT_"):
            continue
        channel = name.removeprefix("PAI_INPUT_").lower()
        place = f"input channel {channel}: {path}"
        if not os.path.exists(path):
            problems.append(Problem(place, "is not there", "see that its OSS path exists, with a / at the end of a folder's"))
        elif channel in CHANNELS:
            if wanted.get(channel, "oss://").startswith("oss://"):
                wanted[channel] = json.dumps(path, ensure_ascii=False)  # YAML, whatever is in it
        elif path not in named:
            fix = f"name it like the key that it is for ({', '.join(CHANNELS)}), or give a hyperparameter this path"
            problems.append(Problem(place, "sets nothing", fix))
    if outputs := Outputs.of(environ):
        several_nodes = int(environ.get("GROUP_WORLD_SIZE", "1")) > 1
        if several_nodes and environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and "output_dir" not in wanted:
            what = "under DeepSpeed every node writes a part of a checkpoint, and none sees another's disk"
            problems.append(Problem("output_dir", what, "set it to a folder that all nodes share, such as a mount of CPFS or NAS"))
        wanted = {"output_dir": json.dumps(str(outputs.scratch)), "resume": "true"} | wanted
    if problems:
        raise UserError(*problems)
    return Path(config) if config else None, [f"{key}={value}" for key, value in wanted.items()]


def hyperparameters(environ: Mapping[str, str]) -> dict[str, str]:
    """The job's hyperparameters by name; a value is YAML. Raises UserError for what is no JSON object."""
    where, text = "PAI_HPS", environ.get("PAI_HPS")
    file = Path(environ.get("PAI_CONFIG_DIR", os.devnull)) / "hyperparameters.json"
    if file.is_file():
        where, text = str(file), file.read_text(encoding="utf-8")
    if text is None:
        return {name.removeprefix("PAI_HPS_").lower(): value for name, value in environ.items() if name.startswith("PAI_HPS_")}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(Problem(where, "holds no JSON object", "submit the job again, its hyperparameters as names and values"))
    return {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for name, value in found.items()}


def own_words(words: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The words of a job's command line, --KEY VALUE as key=value. Of $PAI_USER_ARGS none: hyperparameters have them whole.

    Outside of a job all the words, as they are.
    """
    if not any(name.startswith(OF_A_JOB) for name in environ):
        return list(words)
    known, own, left = hyperparameters(environ), [], list(words)
    while left:
        word = left.pop(0)
        key = word.removeprefix("--")
        if key == word or "=" in word or not left:
            own.append(word)
            continue
        value = known.get(key, "")
        # As PAI quoted it and the shell then broke it, or as one word.
        same = next((of for of in (shlex.quote(value).split(), [value]) if key in known and left[: len(of)] == of), None)
        if same is None:
            own.append(f"{key}={left[0]}")
        del left[: len(same or [word])]
    return own


def launcher(environ: Mapping[str, str], arguments: Sequence[str]) -> list[str] | None:
    """The arguments for Python that start `qwenvl-ft ARGUMENTS` once for each GPU of this node, under torch's launcher.

    None where that was done, and where one process is all there is to be. DLC starts one process a node. Raises UserError for
    numbers that are none.
    """
    nodes, each = (environ.get(name) or "1" for name in ("WORLD_SIZE", "NPROC_PER_NODE"))
    if "LOCAL_RANK" in environ or (nodes, each) == ("1", "1") or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        return None
    numbers = {"WORLD_SIZE": nodes, "NPROC_PER_NODE": each, "RANK": environ["RANK"], "MASTER_PORT": environ["MASTER_PORT"]}
    if wrong := [f"{name}={value}" for name, value in numbers.items() if not re.fullmatch(r"\d+|gpu|auto", value)]:
        raise UserError(*(Problem(place, "is no number", "leave it to PAI, which sets it, or mend it") for place in wrong))
    options = torchrun(nodes, each, environ["RANK"], environ["MASTER_ADDR"], environ["MASTER_PORT"])
    return ["-m", "torch.distributed.run", *options, "--module", "qwenvl_ft", *arguments]


def torchrun(nodes: str, each: str, rank: str, address: str, port: str) -> list[str]:
    """torchrun's options on the node `rank`, the first of which has that address and port; `each` counts its processes.

    Its rendezvous by a fixed address asks for no more: no name of a node that the others can resolve, no clocks that agree.
    """
    return [
        f"--nnodes={nodes}", f"--node_rank={rank}", f"--nproc_per_node={each}", f"--master_addr={address}", f"--master_port={port}",
    ]  # fmt: skip


@dataclass(frozen=True)
class Outputs:
    """The mounted folders that outlive a job's machine: `kept` for checkpoints, `model` for the adapter."""

    kept: Path
    model: Path

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Outputs | None":
        """Those of the job; None where there are none."""
        mounted = [environ[name] for name in ("PAI_OUTPUT_CHECKPOINTS", "PAI_OUTPUT_MODEL") if name in environ]
        return cls(Path(mounted[0]), Path(mounted[-1])) if mounted else None

    @property
    def scratch(self) -> Path:
        """The output_dir of a job that names none: on a disk of this machine."""
        return Path(tempfile.gettempdir()) / f"qwenvl_ft-{short_hash(str(self.kept))}"

    def bring_back(self) -> None:
        """Begins `scratch` anew, with the newest whole checkpoint that was kept; raises UserError where all of them are damaged."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        for folder in checkpoints(self.kept):
            if not (folder / MANIFEST).is_file():  # the machine was gone before it was copied whole
                shutil.rmtree(folder, ignore_errors=True)
        found, skipped = newest(self.kept)
        for reason in skipped:
            print_note(f"passed over {reason}")
        if found:
            copy_whole(found, self.scratch / found.name)

    def keep(self, checkpoint: Path) -> None:
        """Copies a checkpoint of `scratch`, then deletes those that have gone from there."""
        copy_whole(checkpoint, self.kept / checkpoint.name)
        for old in checkpoints(self.kept):
            if not (self.scratch / old.name).is_dir():
                (old / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(old)

    def deliver(self, output_dir: Path) -> None:
        """Copies the adapter of a run that has ended."""
        if output_dir.resolve() != self.model.resolve():
            copy_whole(output_dir, self.model)
            print_line(f"It lies whole in {self.model}, too, where PAI takes it from.")


def copy_whole(source: Path, target: Path) -> None:
    """Copies the files of a folder, but for hidden ones, each in one go and the manifest last: without it a checkpoint counts for
    nothing. Raises UserError for what the disk refuses.
    """
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        (target / MANIFEST).unlink(missing_ok=True)
        files = [path for path in source.iterdir() if path.is_file() and not path.name.startswith(".")]
        for path in sorted(files, key=lambda path: path.name == MANIFEST):
            shutil.copyfile(path, target / path.name)
