"""What this user's runs keep for the next ones. Where it cannot be written, there is none."""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path:
    """~/.cache/qwenvl_ft, or where XDG_CACHE_HOME says. It need not be there."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given if os.path.isabs(given) else os.path.expanduser("~/.cache")) / "qwenvl_ft"


def features_folder() -> Path:
    """Where features of pictures and videos are kept."""
    return cache_folder() / "features"


def remove_old(folder: Path, mark: str, num_kept: int, in_use_s: float = 0) -> None:
    """Leaves of its folders that hold a file `mark` those that were used last, and any that may be in use, having been used since.

    Another process may be doing the same.
    """
    with suppress(OSError):
        held = sorted((path.parent.stat().st_mtime, path.parent) for path in folder.glob(f"*/{mark}"))
        for used_at, old in held[:-num_kept]:
            if time.time() - used_at >= in_use_s:
                shutil.rmtree(old, ignore_errors=True)


def free_bytes(folder: Path) -> int:
    """The room on its disk, or where it would be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
