"""LoRA fine-tuning for Qwen-VL models: from a meta-file of conversations to a merged model.

    from qwenvl_ft import Engine, load_config, read_records

Nothing is imported before it is used, and torch not before a model is opened.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenvl_ft.config import load_config as load_config
    from qwenvl_ft.data.meta_file import read_records as read_records
    from qwenvl_ft.infer.engine import Engine as Engine

__version__ = "0.1.0"
__all__ = ["Engine", "__version__", "load_config", "read_records"]
HOMES = {"Engine": "qwenvl_ft.infer.engine", "load_config": "qwenvl_ft.config", "read_records": "qwenvl_ft.data.meta_file"}


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
