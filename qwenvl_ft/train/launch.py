"""Before the first step and around it: what was launched, whom it reports to, which signals it got."""

import os
import signal
from typing import Any

from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType

from qwenvl_ft.config import Config
from qwenvl_ft.errors import Problem, UserError


class Signals:
    """Holds SIGTERM and SIGINT back until the end of a step; a second one ends the process as usual."""

    def __enter__(self) -> "Signals":
        self.received = 0
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.received = number
        signal.signal(number, self.before[signal.Signals(number)])

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def start(config: Config) -> Accelerator:
    """The accelerator; raises UserError where the launch does not do what was asked."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    find = bool({"vision", "merger"} & set(config.lora_on))  # a row without pictures leaves the tower unused
    accelerator = Accelerator(
        log_with=list(config.report_to) or None,
        project_dir=config.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find)],
    )
    wrong = None
    if asked != accelerator.num_processes:
        wrong = f"{asked} processes were asked for (WORLD_SIZE) and {accelerator.num_processes} came up"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and accelerator.distributed_type != DistributedType.DEEPSPEED:
        wrong = "DeepSpeed was asked for and did not come up"
    if wrong:
        fix = "start with `accelerate launch --num_processes N train.py --config FILE` (configs/ddp.yaml for several GPUs)"
        raise UserError(Problem("launch", wrong, fix))
    if plugin := accelerator.state.deepspeed_plugin:
        rows = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": config.max_grad_norm}
        plugin.deepspeed_config.update(rows)
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(Problem(f"output_dir: {config.output_dir}", f"{error.strerror}", "choose another folder")) from error
    return accelerator


def open_trackers(accelerator: Accelerator, config: Config) -> None:
    """Opens what `report_to` names, before the model is loaded: wandb wants a key and its server."""
    settings = {
        key: value if isinstance(value, (int, float, str)) else str(value) for key, value in config.model_dump(mode="json").items()
    }
    try:
        accelerator.init_trackers("qwenvl_ft", settings, {"wandb": {"name": config.run_name}})
    except Exception as error:
        if type(error).__module__.split(".")[0] != "wandb":  # which is installed where it is wanted only
            raise
        fix = "run `wandb login`, or set WANDB_MODE=offline in the environment, or report_to=none"
        raise UserError(Problem("report_to: wandb", str(error).splitlines()[0], fix)) from error
