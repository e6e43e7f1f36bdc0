"""python scripts/validate_meta.py META --data-dir DIR: the same as `validate-meta`."""

from qwenvl_ft.cli.main import validate_meta_main

if __name__ == "__main__":
    validate_meta_main()
