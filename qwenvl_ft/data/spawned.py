"""What a process of a pool does first: it sees to it that it ends with the process that started it."""

import os
from multiprocessing import parent_process
from threading import Thread


def end_with_parent() -> None:
    """Begins to wait for the parent's end. Without it, a process whose parent was killed waits for its next job for ever."""
    Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)
