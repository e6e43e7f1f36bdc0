"""How a meta-file is to be read, where what it holds does not say so itself: the config's keys of that."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from qwenvl_ft.config import Config

Numbers = Literal["pixels", "unit", "thousand"]  # what the numbers of boxes are; pixels: of the picture as it is seen


@dataclass(frozen=True)
class Reading:
    """The settings that every reader of records is given; each field is a key of the config."""

    boxes: Numbers | None = None

    @classmethod
    def of(cls, config: "Config") -> "Reading":
        """Those of a config."""
        return cls(**{of.name: getattr(config, of.name) for of in fields(cls)})


AS_FOUND = Reading()  # where nobody says otherwise
