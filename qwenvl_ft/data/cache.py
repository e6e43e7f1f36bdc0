"""What this user's runs keep for the next ones. Where it cannot be written, there is none."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """~/.cache/qwenvl_ft, or where XDG_CACHE_HOME says. It need not be there."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given if os.path.isabs(given) else os.path.expanduser("~/.cache")) / "qwenvl_ft"
