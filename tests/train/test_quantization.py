"""Runs quantization_cases.py in a process of its own, which finds bitsandbytes: peft imports it wherever it is installed, for seconds
in each of the suite's hundreds of processes."""

import os
import subprocess
import sys

import pytest

from tests.runs import ROOT

APART = ROOT / ".venv" / "quantization"  # where `make` puts it
CASES = ROOT / "tests" / "train" / "quantization_cases.py"


@pytest.mark.skipif(not APART.is_dir(), reason=f"bitsandbytes is not in {APART}")
def test_a_base_in_4_or_8_bits():
    command = [sys.executable, "-m", "pytest", "--no-cov", "-p", "no:cacheprovider", "-n", "0", CASES]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    path = os.pathsep.join(filter(None, [str(APART), str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, cwd=ROOT, env=inherited | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, (
        done.stdout[-8000:] + done.stderr[-2000:]
    )
