"""What comes with the package: configs/, data/ and train.py."""

from pathlib import Path

import qwenvl_ft

PACKAGE = Path(qwenvl_ft.__file__).parent
IN_A_WHEEL = PACKAGE / "shipped"  # where pyproject.toml puts them; in a checkout they lie beside the package
SHIPPED = IN_A_WHEEL if IN_A_WHEEL.is_dir() else PACKAGE.parent
