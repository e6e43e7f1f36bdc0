"""What this user's runs keep for the next ones. Where it cannot be written, there is none."""

import os
import shutil
from pathlib import Path


def cache_folder() -> Path:
    """~/.cache/qwenvl_ft, or where XDG_CACHE_HOME says. It need not be there."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given if os.path.isabs(given) else os.path.expanduser("~/.cache")) / "qwenvl_ft"


def features_folder() -> Path:
    """Where features of pictures and videos are kept."""
    return cache_folder() / "features"


def free_bytes(folder: Path) -> int:
    """The room on its disk, or where it would be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
