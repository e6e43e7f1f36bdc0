"""How much memory is free, and what is said where a GPU's was not enough: for which records, and which key changes that."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from qwenvl_ft.config import Config
from qwenvl_ft.data.families import Family
from qwenvl_ft.data.prepare import Prepared
from qwenvl_ft.data.quantization import bytes_per_weight, is_quantized
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.runs import checkpoints
from qwenvl_ft.train.state import Run
from qwenvl_ft.values import Quantization

MEMINFO, CGROUPS, OWN_CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
Stored = Callable[[str, torch.nn.Parameter], int]  # the bytes that a weight takes on a card, by its name
CONTEXT = int(0.6 * 2**30)  # of a card: CUDA's own, and the workspaces of its libraries; an assumption
# By the folder of a version's groups: the files of the limit and of what is used, and the cache in memory.stat that would go.
CGROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@contextmanager
def memory_for(run: Run, prepared: Prepared, row: int | None) -> Iterator[None]:
    """Around the work on one row. Raises UserError, in place of torch's error, that names its records."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        at = row or 0
        what = f"a row of {prepared.tokens(at):,} tokens, {prepared.media_tokens[at]:,} of them of pictures and videos"
        problem = out_of_memory(error, run.config, prepared.places(at), what, run.keeps_activations, prepared.shares)
        raise UserError(problem) from error


def what_lacks(error: torch.OutOfMemoryError) -> str:
    """What torch says of it, without the advice for who writes programs that follows."""
    return str(error).split(" Of the allocated memory")[0]


def out_of_memory(
    error: torch.OutOfMemoryError, config: Config, where: str, what: str, keeps: bool, shares: bool = False
) -> Problem:
    """`what` did not fit. Nothing that is saved is lost, and resuming takes other memory settings, but no other rows. `keeps`
    activations that could be recomputed; `shares` prefixes, whose keys are gathered for each record."""
    seen = what_lacks(error)
    peak = torch.cuda.max_memory_allocated() / 2**30
    saved = checkpoints(config.output_dir)
    go_on = f"resume=true goes on from {saved[-1].name}" if saved else "start again: nothing is saved yet"
    pieces = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment, for memory that is in pieces"
    if keeps:
        fix = f"set gradient_checkpointing: true, or {pieces}: {go_on}"
    else:
        lower = f"lower row_tokens (now {config.row_tokens}) or max_pixels (now {config.max_pixels})"
        lower += ", or set share_prefix: off" * shares
        fix = f"{lower}, and choose another output_dir, since they make it another run (`qwenvl-ft plan` forecasts what fits); "
        fix += f"or set {pieces}: {go_on}"
    return Problem(where, f"{what}, does not fit, with {peak:.1f} GiB of tensors at the peak: {seen}", fix)


def free_bytes(device: torch.device, processes: int) -> int | None:
    """What a process may still take on its device; of the machine's memory, and of what the limits of its container leave, each of
    the run's `processes` on it gets its part. None where that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu" or not MEMINFO.exists():
        return None
    (available,) = (int(line.split()[1]) * 1024 for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
    return min([available, *left_by_limits(CGROUPS, OWN_CGROUP)]) // processes


def as_loaded(name: str, weight: torch.nn.Parameter) -> int:
    """A weight in its own dtype."""
    return weight.untyped_storage().nbytes()


def held_in(quantization: Quantization, family: Family) -> Stored:
    """For a model that is not quantized as yet."""

    def stored(name: str, weight: torch.nn.Parameter) -> int:
        module = name.removeprefix("base_model.model.").replace(".base_layer.", ".").removesuffix(".weight")
        if not name.endswith(".weight") or not is_quantized(family, module):
            return as_loaded(name, weight)
        return int(weight.numel() * bytes_per_weight(quantization, weight.element_size()))

    return stored


def left_of(gib: float, model: Any, stored: Stored = as_loaded) -> int:
    """What a model's weights leave of so many GiB of a card."""
    return int(gib * 2**30) - CONTEXT - sum(stored(name, weight) for name, weight in model.named_parameters())


def left_by_limits(root: Path, own: Path) -> Iterator[int]:
    """What each limit of the control groups of this process, and of those above them, leaves in bytes; file cache that would go
    counts as free. `root` is where they are mounted, `own` says which they are: in a container this may be a path outside of it.
    """
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        version = "" if not controllers else "memory" if "memory" in controllers.split(",") else None
        if version is None:
            continue
        limit, usage, cache = CGROUP_FILES[version]
        group = root / version / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root / version):
                break
            with suppress(OSError, ValueError):  # it is not there, or its limit is "max"
                most = int((folder / limit).read_text())
                facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield most - int((folder / usage).read_text()) + int(facts.get(cache, 0))


def peak_bytes(device: torch.device) -> int | None:
    """The most that this process has held so far: of the GPU's memory by tensors, elsewhere of the machine's since it began, its
    preparations included; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
