"""A folder of image files as a source."""

from __future__ import annotations

import os
import pathlib

from perception_jax.data import images, records, text_lines
from perception_jax.data.sources import fields
from perception_jax.errors import DataError


class ImageFolder:
    """Images below a folder, in the order of their paths.

    The captions of `a/b.jpg` are the lines of `a/b.txt` if that exists; otherwise, for images in a
    sub-folder, the folder's name is the class and makes the caption. `extras["class"]` has the
    class name, lower case with spaces.

    Args:
      path: the folder; hidden files and folders in it are left out.
      template: makes a caption of a class name.

    Raises:
      DataError: no such folder, no images in it, or a template without "{}".
    """

    def __init__(self, path: str | os.PathLike, *, template: str = "a photo of a {}.") -> None:
        self._root = pathlib.Path(path)
        self._template = template
        if not self._root.is_dir():
            raise DataError(f"{path}: expected a folder of images, found no such folder.")
        if "{}" not in template:
            raise DataError(f'template: expected "{{}}" for the class name, found {template!r}.')
        self._files = _image_files(self._root)
        if not self._files:
            raise DataError(
                f"{path}: expected images ({', '.join(images.SUFFIXES)}) in the folder or below "
                "it, found none."
            )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> records.Record:
        fields.check_index(index, len(self))
        name = self._files[index]
        path = self._root / name
        class_name = path.parent.name.replace("_", " ").lower() if "/" in name else ""
        captions = _caption_lines(path.with_suffix(".txt"))
        if captions is None:
            captions = (self._template.replace("{}", class_name),) if class_name else ()
        extras = {"class": class_name} if class_name else {}
        return records.Record(id=name, image=path, captions=captions, extras=extras)


def contains_images(path: str | os.PathLike) -> bool:
    """Whether there is an image in the folder or below it."""
    return bool(_image_files(pathlib.Path(path), only_one=True))


def _image_files(root: pathlib.Path, *, only_one: bool = False) -> list[str]:
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            if name.lower().endswith(images.SUFFIXES) and not name.startswith("."):
                found.append((pathlib.Path(folder) / name).relative_to(root).as_posix())
                if only_one:
                    return found
    return sorted(found)


def _caption_lines(path: pathlib.Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    return tuple(line.text.strip() for line in text_lines.lines(path))
