"""python -m qwenvl_ft"""

from qwenvl_ft.cli.main import main

if __name__ == "__main__":
    main()
