"""Tells accelerate of two CPU processes under DeepSpeed: it finds no backend there by itself and would run one process twice."""

import os
from importlib import import_module

from accelerate import PartialState
from accelerate.utils import DistributedType

stock = PartialState._prepare_backend


def prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
    found = stock(self, cpu, sagemaker_dp, backend)
    return ("gloo", DistributedType.NO) if found[0] is None and "LOCAL_RANK" in os.environ else found


PartialState._prepare_backend = prepare_backend
# A minute of compiling, for a reduction that only inference calls. By its name in a text, since deepspeed.comm.torch is torch.
setattr(import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)  # noqa: B010
