"""Twenty-six points of scripts/torture.py, two and more of every kind of fault, in every way to launch."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.torture.kinds import KINDS
from tests.torture.points import WAYS

pytestmark = pytest.mark.timeout(900)  # the first of them waits for all 26


@pytest.fixture(scope="module")
def battery():
    """What the script prints of them."""
    command = [sys.executable, "scripts/torture.py", "--points", "26", "--seed", "56", "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=840)
    assert "seed 56" in done.stdout, done.stderr[-2000:]
    return done


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_broken_goes_on_to_the_same_bits_or_is_refused_in_words(kind, battery):
    points = [line for line in battery.stdout.splitlines() if line.startswith(f"{kind} ") and line.endswith(" s]")]
    assert len(points) >= 2, battery.stderr[-2000:]
    assert [line for line in points if "FAILED" in line] == []


def test_26_points_in_every_way_to_launch_went_well(battery):
    table = battery.stdout[battery.stdout.index("resumed bit-equal  ") :]
    assert all(f"\n{way} " in table for way in WAYS)
    resumed, refused, failed = map(int, table[table.index("\nall ") :].split()[1:4])
    assert resumed + refused == 26 and failed == 0 and battery.returncode == 0
