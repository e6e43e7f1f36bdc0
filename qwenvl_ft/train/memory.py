"""What is said where the memory of a GPU was not enough: for which records, how much it was, and which key changes that."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qwenvl_ft.config import Config
from qwenvl_ft.data.prepare import Prepared
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.runs import checkpoints


@contextmanager
def memory_for(config: Config, prepared: Prepared, row: int | None) -> Iterator[None]:
    """Around the work on one row. Raises UserError, in place of torch's error, that names its records."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        at = row or 0
        what = f"a row of {prepared.tokens(at):,} tokens, {prepared.media_tokens[at]:,} of them of pictures and videos"
        raise UserError(out_of_memory(error, config, prepared.places(at), what)) from error


def out_of_memory(error: torch.OutOfMemoryError, config: Config, where: str, what: str) -> Problem:
    """`what` did not fit. Nothing that is saved is lost, and resuming takes other memory settings, but no other rows."""
    seen = str(error).split(" Of the allocated memory")[0]  # advice for who writes programs follows
    peak = torch.cuda.max_memory_allocated() / 2**30
    saved = checkpoints(config.output_dir)
    go_on = f"resume=true goes on from {saved[-1].name}" if saved else "start again: nothing is saved yet"
    pieces = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment, for memory that is in pieces"
    if config.gradient_checkpointing:
        lower = f"lower row_tokens (now {config.row_tokens}) or max_pixels (now {config.max_pixels})"
        fix = f"{lower}, and choose another output_dir, since they make it another run; or set {pieces}: {go_on}"
    else:
        fix = f"set gradient_checkpointing: true, or {pieces}: {go_on}"
    return Problem(where, f"{what}, does not fit, with {peak:.1f} GiB of tensors at the peak: {seen}", fix)
