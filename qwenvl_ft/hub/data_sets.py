"""A data set of a hub as files here: brought on first use into datasets/HUB/ORG/NAME, as a model is into models/.

hf:ORG/NAME            all of its files
hf:ORG/NAME@REVISION   those of a branch, a tag or a commit
hf:ORG/NAME#train      those with train in their names; #data/*.parquet: those of a pattern
"""

import json
from fnmatch import fnmatchcase
from pathlib import Path

from qwenvl_ft.config import Config
from qwenvl_ft.data.files.containers import ENDINGS
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.whole import write_json
from qwenvl_ft.hub.clients import DATA_SET, read_source
from qwenvl_ft.hub.download import ASIDE, Say, alone, download
from qwenvl_ft.values import Meta, MixedFile

FOLDER = Path("datasets")
BROUGHT = f"{ASIDE}/brought.json"  # which patterns of which revision were brought whole, and the sizes of their files


def local(meta: Path, say: Say) -> Path:
    """A path as it is; of a place on a hub the files here, brought if they are not. Raises UserError where they cannot be."""
    text, _, wanted = str(meta).partition("#")
    source = read_source(text)
    if source is None:
        return meta
    folder = FOLDER / source.hub / source.repo
    pattern = wanted if any(mark in wanted for mark in "*?[./") else f"*{wanted}*" if wanted else "*"
    key = f"{source.revision or ''}#{pattern}"
    if not _is_here(folder, key):
        with alone(folder, say):
            if not _is_here(folder, key):
                manifest = download(source, folder, [pattern], say, DATA_SET)
                sizes = {name: of["bytes"] for name, of in manifest["files"].items() if fnmatchcase(name, pattern)}
                write_json(folder / BROUGHT, _brought(folder) | {key: sizes})
    return _records_of(folder, wanted, pattern, sorted(_brought(folder)[key]))


def with_local_data(config: Config, say: Say) -> Config:
    """The config with paths for its data sets."""

    def here(meta: Meta) -> Meta:
        if isinstance(meta, list):
            return [MixedFile(file=local(of.file, say), data_dir=of.data_dir, weight=of.weight) for of in meta]
        return local(meta, say)

    held_out = here(config.eval_meta_file) if config.eval_meta_file else None
    return config.model_copy(update={"train_meta_file": here(config.train_meta_file), "eval_meta_file": held_out})


def _records_of(folder: Path, wanted: str, pattern: str, names: list[str]) -> Path:
    """The path or the pattern of the files of records among those that were brought."""
    records = [name for name in names if name.lower().endswith(ENDINGS)]
    if not records:
        what = f"holds no files of records: {', '.join(names[:5])}"
        raise UserError(Problem(str(folder), what, f"name one that ends with {', '.join(ENDINGS)}, behind a #"))
    parents = {str(Path(name).parent) for name in records if wanted in name or pattern == wanted}
    if len(parents) > 1:
        what = f"has files of records in {len(parents)} folders: {', '.join(sorted(parents)[:5])}"
        raise UserError(Problem(str(folder), what, f"name one, as #{sorted(parents)[0]}/*"))
    top = folder / parents.pop()
    if not wanted:
        return top
    return folder / pattern if pattern == wanted else top / f"*{wanted}*" if wanted not in top.name else top


def _brought(folder: Path) -> dict[str, dict[str, int]]:
    try:
        found = json.loads((folder / BROUGHT).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _is_here(folder: Path, key: str) -> bool:
    files = _brought(folder).get(key, {})
    return bool(files) and all((path := folder / name).is_file() and path.stat().st_size == size for name, size in files.items())
