"""accelerate launch train.py --config configs/lora.yaml [key=value ...]"""

import sys

from qwenvl_ft.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
