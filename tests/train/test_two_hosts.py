"""Two hosts on one machine, by scripts/two_hosts.py's namespaces and wire, where they can be made; that script does much more, with torchrun."""

import re
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.runs import adapter
from tests.train.conftest import SETTINGS

sys.path.insert(0, str(ROOT / "scripts"))
from two_hosts import Hosts, NoNamespaces, difference


@pytest.fixture
def hosts(tmp_path):
    try:
        with Hosts(tmp_path) as hosts:
            yield hosts
    except NoNamespaces as why:
        pytest.skip(f"no two hosts can be made here: {why}")


# DeepSpeed sums the norm that clips in another order, and Adam enlarges its last bit.
@pytest.mark.parametrize(("zero_stage", "shard", "bound"), [(0, False, 1e-5), (2, False, 1e-4), (0, True, 1e-5)])
def test_two_hosts_end_where_one_process_does(zero_stage, shard, bound, hosts, plain, tmp_path, forks):
    fault = ("tests.forked", "on_hosts", hosts.names, False)
    codes, said = forks.train(tmp_path, zero_stage, fault=fault, **SETTINGS, shard_base=shard)
    assert codes == [0, 0] and "2 x cpu" in said, said[-3000:]
    assert adapter(plain).keys() and difference(plain, tmp_path / "run") < bound


def test_a_wire_that_is_cut_in_a_step_ends_both_in_words(hosts, tmp_path, forks):
    """gloo waits half an hour for what cannot come; nothing says that the other host is gone."""
    codes, said = forks.train(tmp_path, fault=("tests.forked", "on_hosts", hosts.names, True), ddp_timeout=6)
    assert 0 not in codes and re.search("another process of this run (is gone|has not answered)", said), said[-3000:]
    assert "Traceback" not in said and not list(Path(tmp_path / "run").glob("checkpoint-*"))
