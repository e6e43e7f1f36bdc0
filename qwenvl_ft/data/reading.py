"""How a meta-file is to be read, where what it holds does not say so itself: the config's keys of that."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """The settings that every reader of records is given; each field is a key of the config."""

    # Qwen's own: what the bases were trained with, and what others draw who serve the merged model. Source: qwen_vl_utils.
    video_fps: float = 2.0
    video_max_frames: int = 768


AS_FOUND = Reading()  # where nobody says otherwise
