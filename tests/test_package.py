"""What `pip install .` gives: a wheel with everything in it, that works away from the checkout and imports where POSIX is not."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Of the standard library, but not on Windows.
POSIX = ["fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "readline", "syslog"]


def run(*arguments: str, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    """This Python, where `path` is the only place that holds the package."""
    environment = {**os.environ, "PYTHONPATH": str(path), "COLUMNS": "300"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, text=True, capture_output=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder like site-packages after `pip install .`: an unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


def files_below(folder: Path) -> dict[str, bytes]:
    """The content of every file by its path from there; caches of Python are none of ours."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_every_room_the_configs_and_the_sample_and_nothing_else(installed):
    expected = {f"qwenvl_ft/{name}": content for name, content in files_below(ROOT / "qwenvl_ft").items()}
    for folder in ("configs", "data/tiny", "data/sample"):
        expected |= {f"qwenvl_ft/shipped/{folder}/{name}": content for name, content in files_below(ROOT / folder).items()}
    expected["qwenvl_ft/shipped/train.py"] = (ROOT / "train.py").read_bytes()
    found = files_below(installed)
    about = [name for name in found if name.split("/")[0].endswith(".dist-info")]
    assert {name: content for name, content in found.items() if name not in about} == expected
    assert "qwenvl_ft/py.typed" in found
    (commands,) = [found[name].decode() for name in about if name.endswith("entry_points.txt")]
    assert "qwenvl-ft = qwenvl_ft.cli.main:main" in commands and "validate-meta = " in commands


def test_what_is_installed_plans_from_an_empty_folder(installed, tmp_path):
    code = "import qwenvl_ft; print(qwenvl_ft.__file__, qwenvl_ft.__version__)"
    file, version = run("-c", code, cwd=tmp_path, path=installed).stdout.split()
    assert Path(file).is_relative_to(installed)
    assert run("-m", "qwenvl_ft", "--version", cwd=tmp_path, path=installed).stdout == f"qwenvl-ft {version}\n"
    wrote = run("-m", "qwenvl_ft", "init", cwd=tmp_path, path=installed)
    assert (wrote.returncode, wrote.stderr) == (0, "")
    planned = run("-m", "qwenvl_ft", "plan", "--json", cwd=tmp_path, path=installed)
    assert (planned.returncode, planned.stderr) == (0, "")
    sample = ("model=data/tiny", "train_meta_file=data/sample/train.json", "train_data_dir=data/sample/images")
    of_the_checkout = run("-m", "qwenvl_ft", "plan", "--config", "configs/lora.yaml", *sample, "--json", cwd=ROOT, path=ROOT)
    plans = [json.loads(text) for text in (planned.stdout, of_the_checkout.stdout)]
    metas = [Path(plan["files"][0].pop("meta")) for plan in plans]
    assert plans[0] == plans[1] and metas[0].read_bytes() == (ROOT / metas[1]).read_bytes()


def test_what_needs_no_torch_imports_without_posix():
    """fcntl in folders/whole.py kept `plan` and `doctor` from starting on Windows."""
    code = """
import importlib, json, pkgutil, sys
import mmap
for name in [name for name in vars(mmap) if name.startswith("MADV_")]:
    delattr(mmap, name)
sys.modules.update(dict.fromkeys([*json.loads(sys.argv[1]), "torch"]))
import qwenvl_ft
lacking = {}
for module in pkgutil.walk_packages(qwenvl_ft.__path__, "qwenvl_ft."):
    if module.name != "qwenvl_ft.__main__":
        try:
            importlib.import_module(module.name)
            lacking[module.name] = None
        except ModuleNotFoundError as error:
            lacking[module.name] = error.name
print(json.dumps(lacking))
"""
    done = run("-c", code, json.dumps([name for name in POSIX if name not in sys.builtin_module_names]), cwd=ROOT, path=ROOT)
    lacking = json.loads(done.stdout)
    assert {name: why for name, why in lacking.items() if why not in (None, "torch")} == {}
    light = {name.split(".")[1] for name, why in lacking.items() if why is None}
    assert light >= {"errors", "config", "console", "folders", "data", "hub", "cli"}
    assert lacking["qwenvl_ft.cli.main"] is lacking["qwenvl_ft.data.prepare"] is lacking["qwenvl_ft.hub.doctor"] is None
