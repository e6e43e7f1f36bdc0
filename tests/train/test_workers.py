"""The processes that decode pictures, and how their rows come over."""

import sys

import pytest
import torch
from torch.utils.data import DataLoader

from qwenvl_ft.train.launch import Workers, begin_worker

ROWS = [{"patches": torch.arange(9 * 10**5, dtype=torch.uint8).view(-1, 9), "features": torch.randn(3 * 10**5, 2).bfloat16(),
         "scale": torch.tensor(0.5), "few": torch.arange(3)}] * 4  # fmt: skip


def begin_with_little(worker):
    import resource

    begin_worker(worker)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18))  # as /dev/shm of a container, which is full after a row or two


@pytest.mark.skipif(sys.platform == "win32", reason="has no /dev/shm")
@pytest.mark.parametrize("begin", [begin_worker, begin_with_little])
def test_a_row_comes_over_where_shared_memory_is_full(begin):
    loader = DataLoader(range(len(ROWS)), batch_size=None, num_workers=1, collate_fn=lambda at: {name: of.clone() for name, of in ROWS[at].items()}, worker_init_fn=begin,
                        multiprocessing_context=Workers(), timeout=60)  # fmt: skip
    found = list(loader)
    assert len(found) == len(ROWS)
    for row, wanted in zip(found, ROWS, strict=True):
        assert all(row[name].equal(wanted[name]) and row[name].dtype == wanted[name].dtype for name in wanted)
        assert row["patches"].is_shared() == (begin is begin_worker)
        row["patches"] += 1  # is nobody else's
