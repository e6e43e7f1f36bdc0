"""The frozen base shared out over the processes of a run by torch's FSDP2, for one that does not fit on each card.

Shared out are the frozen weights of the language model's layers, most of any base; each layer's are gathered where it runs, forward
and backward, and let go of after it. What trains is whole in every process and exchanged as ever, so a checkpoint is like any
other run's, and goes on with any number of processes, shared out or not. The tower is whole, too: a process whose row has no
picture does not run it, and the others would wait for its share.
"""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from qwenvl_ft.config import Config
from qwenvl_ft.errors import Problem


def shard_problem(config: Config, accelerator: Accelerator) -> Problem | None:
    """Why this launch cannot share the base out, which `shard_base` asks for."""
    what, fix = None, "set shard_base: false"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        what, fix = "DeepSpeed has ways of its own", f"start with configs/ddp.yaml, or {fix}"
    elif accelerator.num_processes == 1:
        what, fix = "one process has nobody to share with", f"start several, or {fix}"
    elif config.eval_metric != "loss":
        what, fix = "processes that answer other questions would wait for each other's share", f"set eval_metric: loss, or {fix}"
    elif config.quantization != "none":
        what, fix = "quantized weights are not shared out", f"{fix}: in so few bits the base may fit on each GPU"
    return Problem("shard_base: true", what, fix) if what else None


def share_out(model: Any, accelerator: Accelerator) -> None:
    """Shares the base of a model with its adapter out, in place, before DDP wraps it. Its layers reach the device one by one, so
    that it need not hold them all.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    decoder = model.get_decoder()
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, ignored_params={of for of in layer.parameters() if of.requires_grad})
    fully_shard(decoder, mesh=mesh, ignored_params={of for of in decoder.parameters() if not isinstance(of, DTensor)})
    shared = [name for name, of in model.named_parameters() if isinstance(of, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, shared)  # type: ignore[no-untyped-call]
