"""Find images, audio and video in rows: only texts are trained on."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Audio, Dataset, Features, Image, LargeList, List, Video

from axolotl_mopo.data.rows import Row
from axolotl_mopo.errors import RowError

_NAMES = ("image", "images", "audio", "audios", "video", "videos")
"""Columns that hold paths, addresses or bytes of such content, in any spelling of upper and lower case."""


def media_columns(features: Features) -> list[str]:
    """Return the columns that hold images, audio or video by their name or their type."""
    return [name for name, feature in features.items() if name.lower() in _NAMES or _is_media(feature)]


def stored_batches(table: Dataset, size: int) -> Iterator[dict[str, Any]]:
    """Yield the columns of up to `size` rows at a time; images, audio and video as they are stored.

    To decode them is slow and may need further packages.
    """
    encoded = [name for name, feature in table.features.items() if _is_media(feature)]
    if not encoded:
        yield from table.iter(size)
        return
    others = table.select_columns(encoded).with_format("arrow").iter(size)
    for batch, other in zip(table.remove_columns(encoded).iter(size), others, strict=True):
        yield {**batch, **other.to_pydict()}


def check_texts_only(row: Row, columns: Sequence[str]) -> None:
    """Check that a row has no images, audio or video.

    Args:
        row: a raw row.
        columns: the result of `media_columns`.

    Raises:
        RowError: if one of the columns is not empty.
    """
    if filled := [name for name in columns if _is_filled(row[name])]:
        raise RowError(
            f"its `{filled[0]}` is not empty, but images, audio and video cannot be trained on, only texts; remove the "
            "column if the texts can be understood without it",
            "images, audio or video",
        )


def _is_media(feature: Any) -> bool:
    if isinstance(feature, List | LargeList):
        return _is_media(feature.feature)
    return isinstance(feature, Image | Audio | Video)


def _is_filled(value: Any) -> bool:
    """Whether a value holds content: a text or bytes, or a list of numbers such as samples; not a number alone."""
    if isinstance(value, Mapping):
        return any(map(_is_filled, value.values()))
    if isinstance(value, list | tuple):
        return any(isinstance(each, int | float) or _is_filled(each) for each in value)
    return isinstance(value, str | bytes) and bool(value)
