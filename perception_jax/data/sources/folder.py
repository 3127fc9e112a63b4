"""A folder of image files as a source."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

from perception_jax.data import image_paths, records, text_lines
from perception_jax.data.sources import fields, names
from perception_jax.errors import DataError


class ImageFolder:
    """Images below a folder, in the order of their paths.

    Links to folders and files are followed, except back into a folder that contains them. The
    captions of `a/b.jpg` are the lines of `a/b.txt` if that exists; otherwise, for images in a
    sub-folder, the class makes the caption. The class is the folder's name (`Record.class_name`,
    `Record.raw_class_name`). Files and links that are left out are counted in the log; hidden ones
    are ignored.

    Args:
      path: the folder; hidden files and folders in it are left out.
      template: makes a caption of a class's display name.

    Attributes:
      left_out: names below the folder, relative to it, of files that are neither images nor
        captions of images, and of links that lead back.

    Raises:
      DataError: no such folder, one in it that cannot be read, no images in it, or a template
        without "{}".
    """

    def __init__(self, path: str | os.PathLike, *, template: str = "a photo of a {}.") -> None:
        self._root = pathlib.Path(path)
        self._template = template
        if not self._root.is_dir():
            raise DataError(f"{path}: expected a folder of images, found no such folder.")
        if "{}" not in template:
            raise DataError(f'template: expected "{{}}" for the class name, found {template!r}.')
        self._files, others = [], []
        for name, is_file in _walk(self._root):
            wanted = is_file and image_paths.is_image(name)
            (self._files if wanted else others).append(name)
        self._files.sort()
        captions = {_beside(name) for name in self._files}
        self.left_out = tuple(sorted(name for name in others if name not in captions))
        if not self._files:
            raise DataError(
                f"{path}: expected images ({', '.join(image_paths.SUFFIXES)}) in the folder or "
                f"below it, found none{image_paths.describe(self.left_out, ': only ')}."
            )
        image_paths.log_left_out(self._root, len(self._files), self.left_out)
        self._names = names.display_names_of(
            {_class_of(name) for name in self._files if "/" in name}
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> records.Record:
        fields.check_index(index, len(self))
        name = self._files[index]
        raw = _class_of(name) if "/" in name else ""
        class_name = self._names[raw] if raw else ""
        captions = _caption_lines(self._root / _beside(name))
        if captions is None:
            captions = (self._template.replace("{}", class_name),) if class_name else ()
        return records.Record(
            id=name,
            images=(self._root / name,),
            class_name=class_name,
            raw_class_name=raw,
            captions=captions,
        )


def contains_images(path: str | os.PathLike) -> bool:
    """Whether there is an image in the folder or below it."""
    return any(is_file and image_paths.is_image(name) for name, is_file in _walk(path))


def _walk(root: str | os.PathLike) -> Iterator[tuple[str, bool]]:
    """What is below a folder and not hidden: names relative to it, and whether each is a file.

    Links are followed; one that leads back to a folder on its own way is no file.

    Raises:
      DataError: a folder cannot be read.
    """
    stack = [(pathlib.Path(root), "", frozenset[tuple[int, int]]())]
    while stack:
        folder, prefix, above = stack.pop()
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"{folder}: expected a folder that can be read, found: {error.strerror}."
            ) from None
        here = status.st_dev, status.st_ino
        if here in above:
            yield prefix.rstrip("/"), False
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                stack.append((folder / entry.name, f"{prefix}{entry.name}/", above | {here}))
            else:
                yield prefix + entry.name, True


def _class_of(name: str) -> str:
    return name.split("/")[-2]


def _beside(name: str) -> str:
    """The name of an image's captions."""
    return pathlib.PurePosixPath(name).with_suffix(".txt").as_posix()


def _caption_lines(path: pathlib.Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    return tuple(line.text.strip() for line in text_lines.lines(path))
