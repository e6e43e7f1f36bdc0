"""A run whose output_dir is an address: it works in a folder here, and every whole checkpoint is copied there.

A checkpoint's manifest comes last and goes first: one without it counts for nothing, so no half copy is ever taken for one.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from qwenvl_ft.console import counting, print_note
from qwenvl_ft.errors import Problem, UserError
from qwenvl_ft.folders.objects import Objects, address_of
from qwenvl_ft.folders.runs import NAME, OF_A_RUN, checkpoints
from qwenvl_ft.folders.whole import INCOMING, LOCK, MANIFEST, discard, held, short_hash, writing

ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "OSS_ENDPOINT")  # one name may be two buckets


@dataclass
class RemoteRun:
    """`kept` is what lies at the address, `scratch` the folder that works here, `cache` the one that holds it."""

    kept: Objects
    cache: Path

    @classmethod
    def of(cls, output_dir: Path, cache: Path) -> "RemoteRun | None":
        """None where output_dir is a folder. Raises UserError for an address that nothing can be written to."""
        if (address := address_of(output_dir)) is None:
            return None
        kept = Objects(address)
        if kept.is_web:
            raise UserError(
                Problem(f"output_dir: {address}", "is not written to", "give a folder, s3://BUCKET/RUN or oss://BUCKET/RUN")
            )
        return cls(kept, cache)

    @property
    def scratch(self) -> Path:
        """The same for every process of this machine, and for the run that goes on here."""
        name = short_hash([self.kept.address, *map(os.environ.get, ENDPOINTS)])
        return self.cache / "runs" / f"{self.kept.address.rpartition('/')[2]}-{name}"

    def bring_back(self, resume: bool | str) -> None:
        """Makes `scratch` hold the whole checkpoints that are kept; one that is newer and was never sent stays, if the run goes on.

        Raises UserError if some are kept and `resume` is not true, if what is there is of no run, or if another works in `scratch`.
        """
        where, there = f"output_dir: {self.kept.address}", self._whole()
        if resume == "weights":
            fix = "copy its newest checkpoint here, give that as init_adapter, and choose another output_dir"
            raise UserError(Problem("resume: weights", "takes those of a folder here, not of an address", fix))
        if there and not resume:
            fix = "set resume=true to go on from it, or choose another output_dir"
            raise UserError(Problem(where, f"already holds checkpoint-{max(there)}", fix))
        with writing(self.scratch):
            self.scratch.mkdir(parents=True, exist_ok=True)
            lock = held(self.scratch)
            try:
                for path in self.scratch.iterdir():
                    match = NAME.match(path.name)
                    step = int(match[1]) if match and resume else 0
                    if path.name != LOCK and not step > max(there, default=0) and not (step in there and self._is_copy(path)):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                for step, names in there.items():
                    if not (folder := self.scratch / f"checkpoint-{step}").exists():
                        self._get(folder, names)
            finally:
                lock.release()
        came = f", {len(there)} of which came back" if there else ""
        print_note(f"{where}: the run works in {self.scratch}, and every whole checkpoint goes there{came}")

    def _get(self, folder: Path, names: list[str]) -> None:
        aside = folder.parent / INCOMING / folder.name
        with counting(f"bringing back files of {folder.name}") as tell:
            for number, name in enumerate(names, 1):
                part = aside / name
                part.parent.mkdir(parents=True, exist_ok=True)
                if (state := self.kept.state(f"{folder.name}/{name}")) is not None:
                    self.kept.get(f"{folder.name}/{name}", state, part)
                tell(number, len(names))
        aside.rename(folder)
        discard(aside)

    def keep(self, checkpoint: Path) -> None:
        """Copies a checkpoint of `scratch`, then deletes those that have gone from there."""
        self._put(checkpoint, checkpoint.name)
        here = {folder.name for folder in checkpoints(self.scratch)}
        for name in sorted(self.kept.states(), key=lambda name: not name.endswith(f"/{MANIFEST}")):
            if NAME.match(top := name.partition("/")[0]) and top not in here:
                self.kept.delete(name)

    def deliver(self) -> None:
        """Copies what a run that has ended left in `scratch` beside its checkpoints."""
        self._put(self.scratch, "")
        print_note(f"It lies whole in {self.kept.address}, too.")

    def _put(self, folder: Path, name: str) -> None:
        """All files but hidden ones and other checkpoints, the manifest last."""
        self.kept.delete(at := f"{name}/{MANIFEST}".lstrip("/"))
        found = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
        files = [path for path in found if not any(part.startswith(".") or NAME.match(part) for part in path.parts)]
        with counting(f"sending files to {self.kept.called(name)}") as tell:
            for number, path in enumerate(files, 1):
                self.kept.put(folder / path, f"{name}/{path.as_posix()}".lstrip("/"))
                tell(number, len(files))
        self.kept.put(folder / MANIFEST, at)

    def _whole(self) -> dict[int, list[str]]:
        """Of each step the names of the files of its checkpoint, where the manifest is among them."""
        found: dict[int, list[str]] = {}
        names = self.kept.states()
        if names and not any(OF_A_RUN.match(name.partition("/")[0]) for name in names):
            what = "holds files and none of a run"
            raise UserError(Problem(f"output_dir: {self.kept.address}", what, "give a new address, or an empty one"))
        for name in names:
            folder, _, below = name.partition("/")
            if (match := NAME.match(folder)) and below:
                found.setdefault(int(match[1]), []).append(below)
        return {step: names for step, names in sorted(found.items()) if MANIFEST in names}

    def _is_copy(self, folder: Path) -> bool:
        """Whether a checkpoint here is the one that is kept: its manifest is, and training looks at the files."""
        manifest = folder / MANIFEST
        return manifest.is_file() and manifest.read_bytes() == self.kept.read(f"{folder.name}/{MANIFEST}")
