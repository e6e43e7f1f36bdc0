"""python scripts/merge_and_export.py --adapter DIR --out DIR: the same as `qwenvl-ft export`."""

import sys

from qwenvl_ft.cli.main import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
