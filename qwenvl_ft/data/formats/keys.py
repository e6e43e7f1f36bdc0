"""The keys that nothing reads, each a problem with a fix of its own: nothing of a record is dropped without a word."""

from collections.abc import Collection, Mapping
from typing import Any

from qwenvl_ft.data.formats.json_entries import kind_of
from qwenvl_ft.data.records import InTable, InTar
from qwenvl_ft.errors import Problem

IDS = ("id", "_id", "idx", "uid", "uuid", "sample_id", "question_id")  # what names a record and is no part of it
PICTURES, VIDEOS = ("image", "images"), ("video", "videos")  # what lists media beside the turns
# What is meant by keys that peers read, and that would be dropped here without a word; the fix of each.
AS_IMAGES = 'write it as "images": ["file.png"], with <image> where each is seen'
AS_VIDEOS = 'write it as "videos": ["clip.mp4"], with <video> where each is seen'
NO_SOUND = "sound is not trained on: leave the record out, or delete the key if the talk needs none"
OLD_CALLS = 'write it as OpenAI\'s "tools" and "tool_calls" have it'
NO_CHOICE = "the model chooses by itself: delete the key"
BOXES = 'write them as "objects": {"ref": [...], "bbox": [...]}, or into the texts'
NO_PAIRS = "preferences are not trained on: keep the wanted answer as the assistant's turn, and delete the key"
NO_WEIGHTS = (
    'nothing is weighed: repeat the record, or write "loss": false on an answer that is not to be taught, and delete the key'
)
ANSWER = "only the assistant's turns are taught: write what is to be learnt as their text, and delete the key"
MASK = 'write "loss": false on an answer that is not to be taught, and delete the key'
TURNS = 'write its turns as "conversations", each with from and value, or say what has them: columns: {conversations: KEY}'
SHARED = {
    **dict.fromkeys(("image_path", "image_file", "image_url", "image_name", "image_paths", "image_urls", "img", "img_path", "imgs",
                     "picture", "pictures"), AS_IMAGES),
    **dict.fromkeys(("video_path", "video_url", "frames"), AS_VIDEOS),
    **dict.fromkeys(("audio", "audios", "audio_path", "audio_url", "sound", "speech"), NO_SOUND),
    **dict.fromkeys(("functions", "function_call"), OLD_CALLS),
    **dict.fromkeys(("tool_choice", "parallel_tool_calls"), NO_CHOICE),
    **dict.fromkeys(("object", "bbox", "bboxes", "box", "boxes", "ref"), BOXES),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages", "kto_tag", "preferred_output",
                     "non_preferred_output"), NO_PAIRS),
    **dict.fromkeys(("weights", "sample_weight", "loss_scale", "loss_weight"), NO_WEIGHTS),
    **dict.fromkeys(("label", "labels", "target", "solution", "ground_truth"), ANSWER),
}  # fmt: skip
FIXES = SHARED | {
    **dict.fromkeys(("conversation", "conversations", "messages", "dialog", "dialogue", "history", "query", "response", "prompt",
                     "completion", "instruction", "input", "output", "question", "answer", "text"), TURNS),
    **dict.fromkeys(("loss", "train", "mask"), MASK), "reasoning": "move it into the assistant's turn",
    "weight": NO_WEIGHTS, **dict.fromkeys(("tool_calls", "tool_call_id"), "move it into its turn"),
}  # fmt: skip
TURN_FIXES = SHARED | {
    **dict.fromkeys(("train", "trainable", "mask", "masked", "train_on_turn", "learn"), MASK),
    **dict.fromkeys(("content", "text", "message"), 'write it as "value"'),
    **dict.fromkeys(("role", "speaker"), 'write it as "from"'),
    **dict.fromkeys(("thinking", "thought", "thoughts", "think"), 'write it as "reasoning"'),
    **dict.fromkeys((*PICTURES, *VIDEOS), "name them beside the turns, with <image> or <video> in the text"),
    **dict.fromkeys(("tools", "objects", "system"), "move it out of the turn, beside the list of turns"),
}  # fmt: skip
MESSAGE_FIXES = TURN_FIXES | {
    **dict.fromkeys(("value", "text", "message"), 'write it as "content"'),
    **dict.fromkeys(("from", "speaker"), 'write it as "role"'),
}  # fmt: skip
OF_QWEN = {  # what qwen_vl_utils follows in a part, and nobody here does
    **dict.fromkeys(("resized_height", "resized_width"), "delete it: pictures keep their shape, and max_pixels bounds their area"),
    **dict.fromkeys(("video_start", "video_end"), "delete it, and name the piece alone: ffmpeg -ss START -to END -i FILE NEW.mp4"),
    "total_pixels": "delete it: max_pixels and max_frames bound a video",
    "min_frames": 'delete it, or say how many frames are drawn with "nframes"',
    "sample_fps": 'write it as "fps"', "raw_fps": 'delete it: "fps" says how many frames of a list pass in a second',
}  # fmt: skip
PART_FIXES = SHARED | OF_QWEN | {
    "detail": 'delete it: a "max_pixels" beside the picture says how large it is shown, else the setting of that name',
}  # fmt: skip


def is_empty(value: Any) -> bool:
    """Whether nothing is lost where a key is not read: an Arrow file writes null where there is none, LLaMA-Factory's "" and []."""
    return value is None or value == "" or value == [] or value == {}


class Complaints:
    """What is found wrong while one record is read, and the keys that the user wants left out (columns: {key: null})."""

    def __init__(self, problems: list[Problem], left_out: Collection[str] = ()):
        self.problems, self.left_out = problems, left_out

    def say(self, where: str, what: str, fix: str, kind: str = "") -> None:
        """One problem more."""
        self.problems.append(Problem(where, what, fix, kind))

    def unknown_keys(self, entry: Mapping[str, Any], where: str, known: Collection[str], fixes: Mapping[str, str]) -> None:
        """A problem for each key that is not read, in an order that is the same in every process."""
        unread = entry.keys() - known
        if not unread:
            return
        understood = [key for key in fixes if key in unread]
        for key in [*understood, *sorted(unread.difference(understood), key=str)]:
            if key in self.left_out:
                continue
            key = str(key)
            plain = key.strip().lower().replace("-", "_")
            fix = fixes.get(plain) or f"delete it, or leave it out with columns: {{{key[:60]}: null}}"
            fix = f'write it as "{plain}"' if plain in known else fix
            self.say(where, f'has a key "{key[:60]}", which is not read', fix)

    def not_a(self, wanted: str, value: Any, where: str, fix: str, key: str = "") -> None:
        """That a value is of another kind than it should be."""
        its = f'its "{key}" ' if key else ""
        self.say(where, f"{its}is {said_of(value)}, not {wanted}", fix)


def said_of(value: Any) -> str:
    """What a value is, in words."""
    return "the bytes of a file" if isinstance(value, InTar | InTable) else kind_of(value)
