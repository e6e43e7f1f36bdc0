"""train.py for two CPU processes under DeepSpeed: accelerate finds no backend there by itself and would run one process twice."""

import os
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

stock = PartialState._prepare_backend


def prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
    found = stock(self, cpu, sagemaker_dp, backend)
    return ("gloo", DistributedType.NO) if found[0] is None and "LOCAL_RANK" in os.environ else found


PartialState._prepare_backend = prepare_backend

if __name__ == "__main__":
    from qwenvl_ft.cli.main import main

    main(["train", *sys.argv[1:]])
