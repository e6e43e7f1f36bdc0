"""How a meta-file is to be read, where what it holds does not say so itself: the config's keys of that."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """The settings that every reader of records is given; each field is a key of the config."""


AS_FOUND = Reading()  # where nobody says otherwise
