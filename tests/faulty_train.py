"""train.py with a fault, which FAULT in the environment names: what users' machines do, done on purpose."""

import os
import sys
import time

import tests.deepspeed_train  # noqa: F401  accelerate told of two processes on a CPU under DeepSpeed
from qwenvl_ft.cli.main import main
from qwenvl_ft.train import loop

stock, rows = loop.row_loss, 0


def faulty(run, row):
    global rows
    rows += 1
    loss = stock(run, row)
    if os.environ["FAULT"] == "long steps" and rows > 4:  # of 40 s in the second step and all after it
        print("a long row begins", flush=True)
        time.sleep(10)
    if os.environ["FAULT"] == "nan gradient" and os.environ["RANK"] == "1":
        loss.register_hook(lambda gradient: gradient * float("nan"))
    return loss


loop.row_loss = faulty

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
