"""Decide about keys of a record that are not used: unsupported content, metadata, or unknown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from vlm_fast.training.data.record_errors import BadRecord, RecordIssue, describe

OTHER_CONTENT = "other content"
UNKNOWN_KEY = "unknown key"
USED = {"record": ("id", "image", "conversations"), "turn": ("from", "value")}
EMPTY: tuple[Any, ...] = (None, "", [], {})

# Names of media in lower case without separators, and suffixes that may follow them.
MEDIA = (
    "video|image|img|picture|pic|photo|frame|clip|audio|sound|speech|voice|music|wav|pointcloud|"
    "depth|depthmap|mask|pdf|document|screenshot|media|pixelvalue"
)
MEDIA_SUFFIX = "path|file|filename|name|url|uri|link|list|data|byte|base|array|feature|folder|dir"
MEDIA_KEY = re.compile(
    rf"({MEDIA})e?s?((in|input)?({MEDIA_SUFFIX})s?){{0,3}}\d*|multimodal(data|input)s?"
)
# Keys that change the prompt, and keys that change the loss.
INSTRUCTIONS = re.compile(
    r"system(prompt|message|instruction|text)?s?|(available)?(tool|function)s?(call)?s?"
)
LOSS_WEIGHTS = re.compile(r"(loss)?(weight|mask)|loss|train(able)?")
# Metadata: names like question_id, and the names below. They describe a record and are ignored.
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
# Placeholders of media in a text, such as <video>, <audio_1> or <|video_pad|>, except <image>. Not
# <img>, which people write about.
MEDIA_PLACEHOLDER = re.compile(
    r"(?i)<\|?(?!(?-i:image)>)(image|img_context|video|vid|audio|sound|speech|music|voice|depth|"
    r"point_?cloud|3d|pdf|media)"
    r"(?:[ _-]?(?:pad|token|placeholder|here|soft[ _]token|context|patch|\d+))*\|?>"
)


def check_unsupported_content(content: dict[str, Any], index: int, name: str | None) -> None:
    """Refuse a record with content that its conversation needs but that is not used.

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
    """Yield the keys that are neither used nor known as metadata, with their values."""
    image = content.get("image")
    for at, key, value in _unused_items(content):
        known = (
            isinstance(value, int | float) or _is_metadata(key) or _names_the_image(value, image)
        )
        if not known:
            yield re.sub(r"\[\d+\]", "[]", at), value


def _unused_items(content: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield position, key and value of every key that is neither used nor empty."""
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
    if isinstance(value, int | float):  # numbers and booleans are metadata
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
    """Whether a value is, or contains, the name of a media file."""
    if isinstance(value, str):
        return MEDIA_FILE.match(value.strip()) is not None
    if isinstance(value, list):
        return any(map(_names_media, value))
    return isinstance(value, dict) and any(map(_names_media, value.values()))


def _names_the_image(value: Any, image: str | None) -> bool:
    """Whether a value is another address of the used image: it ends in the same file name."""
    if image is None or not isinstance(value, str):
        return False
    return re.split(r"[/\\]", value)[-1] == re.split(r"[/\\]", image)[-1]
