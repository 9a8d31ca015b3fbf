"""What a record holds beside an image and a conversation: refused, told, or metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from vlm_fast.training.data.record_errors import BadRecord, RecordIssue, describe

OTHER_CONTENT = "other content"
UNKNOWN_KEY = "unknown key"
USED = {"record": ("id", "image", "conversations"), "turn": ("from", "value")}
EMPTY: tuple[Any, ...] = (None, "", [], {})

# Names of media, in small letters without what stands between them, and what may follow them.
MEDIA = (
    "video|image|img|picture|pic|photo|frame|clip|audio|sound|speech|voice|music|wav|pointcloud|"
    "depth|depthmap|mask|pdf|document|screenshot|media|pixelvalue"
)
MEDIA_SUFFIX = "path|file|filename|name|url|uri|link|list|data|byte|base|array|feature|folder|dir"
MEDIA_KEY = re.compile(
    rf"({MEDIA})e?s?((in|input)?({MEDIA_SUFFIX})s?){{0,3}}\d*|multimodal(data|input)s?"
)
# They change what a model is told, or what of it is learned.
INSTRUCTIONS = re.compile(
    r"system(prompt|message|instruction|text)?s?|(available)?(tool|function)s?(call)?s?"
)
LOSS_WEIGHTS = re.compile(r"(loss)?(weight|mask)|loss|train(able)?")
# They say something about a record and are no part of it, as do names such as question_id.
ID_KEY = re.compile(r"(^|[_.\- ])(u|uu|gu|q)?ids?$|I[dD]s?$")
METADATA = """
model modelname generator source sources origin datasource datasources imagesource url urls uri
link imageurl imagelink task tasks taskname tasktype type types datatype kind questiontype
answertype format answerformat dataset datasets datasetname dataname subset split partition
version category categories subcategory class domain field subject topic topics difficulty level
tag tags label labels lang language languages license licence copyright author authors creator
width height size imagesize imagewidth imageheight imageshape shape resolution widthlist
heightlist length duration fps index idx key timestamp time date created createdat updated
updatedat hash imagehash md5 sha1 sha256 checksum quality score scores rating status metadata meta
info
"""
METADATA_NAMES = frozenset(METADATA.split())
MEDIA_FILE = re.compile(
    r"(?i)(data:(image|audio|video)/|.+\.(mp4|m4v|mkv|avi|mov|webm|mpe?g|wav|mp3|flac|ogg|opus|m4a|"
    r"jpe?g|jfif|png|gif|webp|bmp|tiff?|heic|heif|avif|svg|pdf|npy|npz|pt|pth|ply|pcd|dcm)$)"
)
# What stands for media in a text, as <video>, <audio_1>, <|video_pad|>: all but the one <image>.
# Not <img>, which people write about.
MEDIA_PLACEHOLDER = re.compile(
    r"(?i)<\|?(?!(?-i:image)>)(image|img_context|video|vid|audio|sound|speech|music|voice|depth|"
    r"point_?cloud|3d|pdf|media)"
    r"(?:[ _-]?(?:pad|token|placeholder|here|soft[ _]token|context|patch|\d+))*\|?>"
)


def check_unsupported_content(content: dict[str, Any], index: int, name: str | None) -> None:
    """Refuse a record that holds, beside what is used, what its conversation is about.

    Raises:
        BadRecord: naming the key, or the turn with a placeholder of other media.
    """

    def refuse(field: str, expected: str, actual: str) -> None:
        raise BadRecord(RecordIssue(OTHER_CONTENT, index, name, field, expected, actual))

    image = content.get("image")
    for at, key, value in _unused_items(content):
        if _is_unsupported(key, value, image):
            wanted = "nothing: of media one image is used, under 'image', and no system prompt"
            refuse(at, wanted, describe(value))
    for number, turn in enumerate(content["conversations"]):
        if found := MEDIA_PLACEHOLDER.search(turn["value"]):
            wanted = "no placeholder of media but <image>"
            refuse(f"conversations[{number}].value", wanted, describe(found.group()))


def unknown_keys(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys that hold text or more, without being used or known as metadata; and what they hold."""
    image = content.get("image")
    for at, key, value in _unused_items(content):
        known = (
            isinstance(value, int | float) or _is_metadata(key) or _names_the_image(value, image)
        )
        if not known:
            yield re.sub(r"\[\d+\]", "[]", at), value


def _unused_items(content: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Where each key is that is not used and not empty, the key itself, and what it holds."""
    for key, value in content.items():
        if key not in USED["record"] and value not in EMPTY:
            yield key, key, value
    for number, turn in enumerate(content["conversations"]):
        for key, value in turn.items():
            if key not in USED["turn"] and value not in EMPTY:
                yield f"conversations[{number}].{key}", key, value


def _is_unsupported(key: str, value: Any, image: str | None) -> bool:
    name = _normalised(key)
    if LOSS_WEIGHTS.fullmatch(name) and isinstance(value, int | float):
        return value not in (1, True)
    if isinstance(value, int | float):  # a number or a truth: it tells of something
        return False
    if INSTRUCTIONS.fullmatch(name):
        return True
    if _names_the_image(value, image):
        return False
    if _is_metadata(key) and image is not None:
        return False
    return MEDIA_KEY.fullmatch(name) is not None or _names_media(value)


def _is_metadata(key: str) -> bool:
    return _normalised(key) in METADATA_NAMES or ID_KEY.search(key) is not None


def _normalised(key: str) -> str:
    return re.sub(r"[^a-z0-9]", "", key.lower())


def _names_media(value: Any) -> bool:
    """Whether it is the name of a file of media, or holds one."""
    if isinstance(value, str):
        return MEDIA_FILE.match(value.strip()) is not None
    if isinstance(value, list):
        return any(map(_names_media, value))
    return isinstance(value, dict) and any(map(_names_media, value.values()))


def _names_the_image(value: Any, image: str | None) -> bool:
    """Whether it is another name of the image that is used: its address, or its file's name."""
    if image is None or not isinstance(value, str):
        return False
    return re.split(r"[/\\]", value)[-1] == re.split(r"[/\\]", image)[-1]
