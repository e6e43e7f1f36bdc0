"""What this machine has, and what of it will not do. torch is imported only where the driver shows a GPU: to see if torch does."""

import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

from qwenvl_ft.errors import Problem

PACKAGES = ["torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "flash-attn", "vllm",
            "modelscope", "huggingface-hub"]  # fmt: skip
SHM = Path("/dev/shm")
BF16_CAPABILITY = 8.0  # Ampere
MIN_SHM, MIN_DISK = 1 << 30, 5 << 30  # a worker holds a few rows of pictures; a merge writes as much as the base has


class Report(NamedTuple):
    """Facts to show, and what is wrong with them."""

    facts: dict[str, Any]
    problems: list[Problem]


def environment(folder: Path) -> Report:
    """Python, packages, GPUs, shared memory, and the free space of the disk that the folder is on."""
    versions = {name: version(name) for name in PACKAGES}
    facts: dict[str, Any] = {"python": platform.python_version(), **versions}
    problems = wrong_versions()
    cards = gpus()
    facts["GPUs"] = cards or "none"
    if cards and versions["torch"]:
        import torch

        if torch.cuda.device_count() < len(cards):
            problems.append(Problem("torch", f"sees {torch.cuda.device_count()} of {len(cards)} GPUs ({torch.__version__})",
                                    "install the torch that fits the driver; look at CUDA_VISIBLE_DEVICES"))  # fmt: skip
    disk = folder if folder.is_dir() else Path()
    for name, place, least, fix in (
        ("free disk", disk, MIN_DISK, "free some space, or write elsewhere"),
        ("/dev/shm", SHM, MIN_SHM, "start the container with --shm-size=8g, or set dataloader_num_workers: 0"),
    ):
        if not place.is_dir() and platform.system() != "Linux":  # macOS shares memory without such a folder
            facts[name] = "not needed"
            continue
        free = shutil.disk_usage(place).free if place.is_dir() else 0
        facts[name] = f"{free / 2**30:.1f} GiB"
        if free < least:
            problems.append(Problem(name, f"only {free / 2**30:.1f} GiB are free", fix))
    return Report(facts, problems)


def version(package: str) -> str | None:
    """The installed version; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def wrong_versions() -> list[Problem]:
    """What this package requires and the machine has not, or too old."""
    try:
        wanted = [Requirement(line) for line in metadata.requires("qwenvl-ft") or []]
    except metadata.PackageNotFoundError:  # run from its source, not installed
        return []
    problems = []
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        have = version(requirement.name)
        if have is None or not requirement.specifier.contains(have, prereleases=True):
            what = f"is {have or 'not installed'}, {requirement.specifier or 'any version'} is needed"
            problems.append(Problem(requirement.name, what, f"pip install '{requirement}'"))
    return problems


def gpus() -> list[str]:
    """name, memory and bf16, in words, of every NVIDIA card that the driver shows."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    cards = []
    for line in lines:
        name, *values = (part.strip() for part in line.rsplit(",", 3))
        if len(values) < 3:  # "No devices were found"
            continue
        total, free, capability = (value if value[:1].isdecimal() else None for value in values)  # else [N/A] and the like
        memory = f"{total}, {free} free" if total and free else "memory not told"  # where the GPU shares the machine's
        bf16 = "bf16 not told" if capability is None else "bf16" if float(capability) >= BF16_CAPABILITY else "no bf16"
        cards.append(f"{name}, {memory}, {bf16}")
    return cards
