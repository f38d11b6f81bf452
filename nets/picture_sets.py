"""A set of pictures, whatever holds it: a folder, an npz, what sample.py wrote, the files of Fashion-MNIST.

Pictures are read when they are asked for, so that a set may be larger than memory.
"""

import contextlib
import gzip
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from nets.sampling import MANIFEST, SETTINGS, picture_path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FASHION_MNIST = dict(enumerate(("T-shirt, top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
                                "ankle boot")))


@dataclass
class PictureSet:
    """`count` pictures, which `picture(index)` gives as RGB; with class ids and names where they are known.

    `mark` is a hash that changes when the pictures do, as far as names, sizes and times of their files tell.
    """

    name: str
    count: int
    picture: Callable[[int], Image.Image]
    mark: str
    labels: torch.Tensor | None = None  # (count,) int64
    class_names: dict[int, str] | None = None
    remarks: tuple[str, ...] = ()  # what is odd about it, a line each

    def pixels(self, indices, size: tuple[int, int]) -> torch.Tensor:
        """The pictures of these numbers, (len(indices), 3, height, width) uint8; `size` is (width, height), see `fit`."""
        arrays = np.stack([np.asarray(fit(self.picture(int(index)), size)) for index in indices])
        return torch.from_numpy(arrays).permute(0, 3, 1, 2)

    def smallest_side(self) -> int:
        """Of the first picture that can be read. Raises ValueError, in one line, if none can."""
        for index in range(self.count):
            with contextlib.suppress(OSError):
                return min(self.picture(index).size)
        raise ValueError(f"none of the {self.count} pictures in {self.name} can be read")

    def readable(self, strict: bool = False, done: Callable[[int], None] = lambda count: None):
        """The set without the pictures that cannot be read, and their errors; with `strict` the first error is raised."""
        kept, errors = [], []
        for index in range(self.count):
            try:
                self.picture(index)
                kept.append(index)
            except OSError as error:
                if strict:
                    raise
                errors.append(str(error))
            done(1)
        labels = None if self.labels is None else self.labels[kept]
        return replace(self, count=len(kept), picture=lambda index: self.picture(kept[index]), labels=labels), errors


def open_pictures(path: Path, split: str = "test") -> PictureSet:
    """The pictures of a folder or an npz; `split` picks "train" or "test" of Fashion-MNIST, the only set that has both.

    A folder is one of: sample.py's; the four files of Fashion-MNIST; a folder per class; pictures at any depth, without
    classes. An npz has the ADM evaluator's `arr_0` (n, height, width, 3) uint8, and class ids as `arr_1` if it likes.
    Raises OSError or ValueError, in one line, for anything else.
    """
    if path.is_file():
        return open_npz(path)
    if not path.is_dir():
        raise OSError(f"there is no file or folder {path}")
    if (path / SETTINGS).is_file():
        return open_samples(path)
    if is_fashion_mnist(path):
        return open_fashion_mnist(path, split)
    return open_folder_of_pictures(path)


def open_samples(folder: Path) -> PictureSet:
    """What sample.py wrote, by its manifest."""
    if not (folder / MANIFEST).is_file() or any(folder.glob("manifest-*.jsonl")):
        raise ValueError(f"{folder} is not finished; start the same sample.py command again, it goes on where it was")
    records = [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]
    settings = json.loads((folder / SETTINGS).read_text())
    if not records or len(records) < settings.get("num", 0):
        raise ValueError(f"{folder} has {len(records)} of its {settings.get('num', 'no')} pictures; start the same "
                         "sample.py command again, it makes the others")
    files = [folder / picture_path(record["index"]) for record in records]
    names = settings.get("class_names") or {}
    return PictureSet(str(folder), len(files), lambda index: load_picture(files[index]), mark_of(files),
                      torch.tensor([record["class"] for record in records]),
                      {int(label): name for label, name in names.items()} or None)


def open_folder_of_pictures(folder: Path) -> PictureSet:
    """A folder per class, named as it is, or pictures at any depth."""
    files = sorted(Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names
                   if name.lower().endswith(SUFFIXES) and not is_hidden(Path(place, name).relative_to(folder)))
    if not files:
        raise ValueError(f"{folder} has no pictures ({', '.join(SUFFIXES)})")
    classes = sorted({path.parent for path in files})
    strays = [path for path in files if path.parent.parent != folder]
    per_class = not strays
    number_of = {path: number for number, path in enumerate(classes)}
    labels = torch.tensor([number_of[path.parent] for path in files]) if per_class else None
    names = {label: path.name for label, path in enumerate(classes)} if per_class else None
    empty = sorted({path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")} - {*classes})
    remarks = [f"{path} has no pictures ({', '.join(SUFFIXES)})" for path in empty] if per_class else [
        f"{strays[0]} is not in a folder of a class, right below {folder}"]
    return PictureSet(str(folder), len(files), lambda index: load_picture(files[index]), mark_of(files), labels, names,
                      tuple(remarks))


def is_hidden(path: Path) -> bool:
    """Whether a file or a folder above it begins with a dot, as .ipynb_checkpoints."""
    return any(part.startswith(".") for part in path.parts)


def open_npz(path: Path) -> PictureSet:
    """The ADM evaluator's `arr_0`; where the archive is not compressed, as its own are not, mapped and not loaded."""
    names = npz_names(path)
    try:
        with zipfile.ZipFile(path) as archive:
            stored = archive.getinfo("arr_0.npy")
        array = map_stored(path, stored) if stored.compress_type == zipfile.ZIP_STORED else np.load(path)["arr_0"]
        labels = torch.from_numpy(np.load(path)["arr_1"].astype(np.int64)) if "arr_1" in names else None
    except (KeyError, ValueError, zipfile.BadZipFile, EOFError) as error:
        cause = str(error).strip() or type(error).__name__
        raise ValueError(f"{path} is no npz with pictures in arr_0 ({cause})") from error
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or not len(array):
        raise ValueError(f"{path}: arr_0 is {array.dtype} {array.shape}; pictures are uint8 (n, height, width, 3)")
    if labels is not None and labels.shape != (len(array),):
        raise ValueError(f"{path}: arr_1 has shape {tuple(labels.shape)}, and there are {len(array)} pictures")
    return PictureSet(str(path), len(array), lambda index: Image.fromarray(array[index]), mark_of([path]), labels)


def npz_names(path: Path) -> list[str]:
    """The names of the arrays in an npz. Raises ValueError, in one line, for what is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is no npz: {error}") from error


def map_stored(path: Path, member: zipfile.ZipInfo) -> np.ndarray:
    """An array of an uncompressed npz, mapped from the file."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)  # the lengths of the name and of what follows it, before the content
        lengths = np.frombuffer(file.read(4), "<u2")
        file.seek(int(lengths.sum()), 1)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(file)
        return np.memmap(path, dtype, "r", file.tell(), shape, order="F" if fortran_order else "C")


def is_fashion_mnist(path: Path) -> bool:
    """Whether a folder holds Fashion-MNIST's files."""
    return (path / "t10k-images-idx3-ubyte.gz").is_file()


def open_fashion_mnist(folder: Path, split: str) -> PictureSet:
    """One split of Fashion-MNIST as RGB pictures of 32x32."""
    pictures, labels = read_fashion_mnist(folder, split)
    return PictureSet(f"{folder} ({split} set)", len(pictures),
                      lambda index: Image.fromarray(pictures[index, 0].numpy()).convert("RGB"),
                      mark_of(sorted(folder.glob("*.gz")), split), labels, FASHION_MNIST)


def read_fashion_mnist(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One split, "train" or "test", of Fashion-MNIST from its idx files.

    Returns pictures (n, 1, 32, 32) uint8, padded from 28 to 32 with black, and class ids (n,) int64.
    """
    prefix = folder / {"train": "train", "test": "t10k"}[split]
    try:
        with gzip.open(f"{prefix}-images-idx3-ubyte.gz") as file:
            pictures = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
        with gzip.open(f"{prefix}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
    except (EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{prefix}-*.gz are damaged: {error}") from error
    return (torch.from_numpy(np.pad(pictures, ((0, 0), (0, 0), (2, 2), (2, 2)))),
            torch.from_numpy(labels.astype(np.int64)))


def load_picture(path: Path) -> Image.Image:
    """A picture file as RGB. Raises OSError, in one line, if it is missing or damaged."""
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith("I"):  # grey of 16 bits, which Pillow would cut off at 255
                picture = Image.fromarray((np.asarray(picture) // 256).astype(np.uint8))
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's ways to say it
        raise OSError(f"cannot read the picture {path}: {str(error).splitlines()[0]}") from error


def fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of a picture at `size` (width, height): as it is, if it has that size, else scaled to cover it and cut."""
    return picture if picture.size == size else ImageOps.fit(picture, size)


def mark_of(files: list[Path], *more: str) -> str:
    """SHA-256 over the names, sizes and times of files."""
    digest = hashlib.sha256(repr(more).encode())
    for path in files:
        state = path.stat()
        digest.update(f"{path.parent.name}/{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()
