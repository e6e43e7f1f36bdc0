"""Breaks small training runs in the ways that machines and people do, and looks how they go on.

    python scripts/torture.py --minutes 10                            # as many points as that, with a seed of its own
    python scripts/torture.py --points 25 --seed 1                    # the same ones each time
    python scripts/torture.py --only "killed in a save" --seed 117    # one of them again

A point is a kind of fault, a way to launch and a moment, all of which follow from the kind and a seed. After the fault the run is
resumed, and must end with the bits and the losses of an uninterrupted one; or it must be refused: exit code 1, no traceback, and
what is wrong is named. All else is a failure, so is a run that hangs or leaves processes, and a file half written under its name.
Where the clock has a part in it (kills and signals at random, two runs at once), another machine meets another moment.

Needs Linux and the extra deepspeed. The faults are in tests/torture.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.torture.forks import adopt_orphans, import_everything, orphans
from tests.torture.kinds import KINDS
from tests.torture.points import REFUSED, RESUMED, WAYS, Failed, Point, write_inputs, write_reference

FAILED = "FAILED"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="begin no point after these")
    parser.add_argument("--points", type=int, help="how many; without --minutes 25, or one with --only")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2), "big"), help="of the first point of each kind")
    parser.add_argument("--only", choices=KINDS, help="points of this kind alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="points at a time")
    parser.add_argument("--keep", type=Path, help="a new folder for the runs, which then stay there")
    asked = parser.parse_args()
    print(f"seed {asked.seed}", flush=True)
    wanted: Iterator[tuple[str, int]] = ((kind, seed) for seed in count(asked.seed) for kind in KINDS if asked.only in (None, kind))
    if number := asked.points or (not asked.minutes and (1 if asked.only else 25)):
        wanted = islice(wanted, number)
    work = asked.keep or Path(tempfile.mkdtemp(prefix="torture-"))
    work.mkdir(exist_ok=not asked.keep)
    try:
        return torture(work.resolve(), wanted, 60 * (asked.minutes or 1e9), asked.jobs, bool(asked.keep))
    finally:
        if not asked.keep:
            shutil.rmtree(work, ignore_errors=True)


def torture(work: Path, wanted: Iterator[tuple[str, int]], seconds: float, jobs: int, keep: bool) -> int:
    """Prints the outcome of each point as it comes, then the tables; 1 if any failed."""
    import_everything()
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")  # what is kept of these runs is nobody else's
    for job in [partial(write_inputs, work), *(partial(write_reference, way, work) for way in WAYS)]:
        if os.waitpid(in_fork(job, work / "answer"), 0)[1]:
            return 1
    began, under_way, table, failed = time.monotonic(), dict[int, Point](), Counter[tuple[str, str]](), list[str]()
    while True:
        while len(under_way) < jobs and time.monotonic() < began + seconds and (next_one := next(wanted, None)):
            point = Point(next_one[0], KINDS[next_one[0]][1], next_one[1], work)
            under_way[in_fork(partial(outcome, point), point.folder.with_suffix(".json"))] = point
        if not under_way:
            break
        point = under_way.pop(os.wait()[0])
        answer = point.folder.with_suffix(".json")
        said, note, took = json.loads(answer.read_text()) if answer.exists() else (f"{FAILED}: the battery itself", "", 0)
        print(f"{point.kind} {point.seed} ({point.way}; {note}): {said} [{took:.1f} s]", flush=True)
        for name in (point.kind, point.way, "all"):
            table[name, said.split(":")[0]] += 1
        if said.startswith(FAILED):
            failed.append(f'again: python scripts/torture.py --only "{point.kind}" --seed {point.seed}')
        if not keep:
            shutil.rmtree(point.folder, ignore_errors=True)
    print(f"\n{'':26}" + "".join(f"{said:>20}" for said in (RESUMED, REFUSED, FAILED)))
    for name in [*KINDS, *WAYS, "all"]:
        if any(table[name, said] for said in (RESUMED, REFUSED, FAILED)):
            print(f"{name:26}" + "".join(f"{table[name, said]:20}" for said in (RESUMED, REFUSED, FAILED)))
    print("\n".join([f"{time.monotonic() - began:.0f} s", *failed]))
    return int(bool(failed))


def outcome(point: Point) -> tuple[str, str, float]:
    """How the point went, what was done, and in how many seconds."""
    began = time.monotonic()
    adopt_orphans()
    point.folder.mkdir()
    try:
        said = KINDS[point.kind][0](point)
        if left := orphans(10):
            raise Failed(f"left processes running: {left}")
    except Failed as error:
        said = f"{FAILED}: {error}"
    return said, point.note, time.monotonic() - began


def in_fork(work: Callable[[], object], answer: Path) -> int:
    """The process that does it, and writes what it returned to `answer` as JSON."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    try:
        answer.write_text(json.dumps(work()))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
