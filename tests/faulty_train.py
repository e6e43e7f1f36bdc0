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


def other_records(prepared, held_out, config):
    same = stock_fingerprint(prepared, held_out, config)
    return same | ({"training records": "others"} if os.environ["RANK"] == "1" else {})


loop.row_loss = faulty
stock_fingerprint = loop.fingerprint
if os.environ["FAULT"] == "other records":
    loop.fingerprint = other_records

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
