"""How a meta-file is to be read, where what it holds does not say so itself: the config's keys of that."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from qwenvl_ft.values import VIDEO_FPS, VIDEO_MAX_FRAMES, BoxUnit, MediaPosition

if TYPE_CHECKING:
    from qwenvl_ft.config import Config


@dataclass(frozen=True)
class Reading:
    """The settings that every reader of records is given; each field is a key of the config.

    `format` is the name of a form; None: told from each entry. `columns` gives, by our word for them, the keys of an entry and its
    turns; one without a key of its own is left out.
    """

    fetch_media: bool = False
    format: str | None = None
    columns: Mapping[str, str | None] = field(default_factory=dict, hash=False)

    video_fps: float = VIDEO_FPS
    video_max_frames: int = VIDEO_MAX_FRAMES
    boxes: BoxUnit | None = None
    media_position: MediaPosition = "as_written"

    @classmethod
    def of(cls, config: "Config") -> "Reading":
        """Those of a config."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


AS_FOUND = Reading()  # where nobody says otherwise
