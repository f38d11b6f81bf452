"""Bulk sampling: thousands of pictures into a folder that any number of processes fill, and that outlives interruptions.

Picture k depends on (seed, k) alone. The folder holds `settings.json`, `manifest.jsonl` with a line a picture, and the PNGs
in folders of 1,000. A file appears whole or not at all; what the manifest does not vouch for is made again.
"""

import contextlib
import hashlib
import io
import json
import os
import queue
import threading
import zipfile
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
from PIL import Image

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MANIFEST, SETTINGS, LOCK = "manifest.jsonl", "settings.json", ".lock"


def picture_generator(seed: int, *index: int) -> torch.Generator:
    """The generator of all noise of picture `index`, on the CPU; more numbers name other streams of the same seed.

    PyTorch's takes 32 bits of a seed, so it is a hash of `seed` plus the index: no two of four thousand million pictures
    share one.
    """
    first, *stream = index
    start = np.random.SeedSequence([seed, *stream]).generate_state(1)[0]
    return torch.Generator().manual_seed((int(start) + first) % 2**32)


def picture_label(labels: str | list[int], classes: int, seed: int, index: int) -> int:
    """The class id of picture `index`: drawn ("uniform"), each class in turn ("balanced"), or those of a list in turn."""
    if labels == "uniform":
        return int(np.random.default_rng([seed, index, 1]).integers(classes))
    if labels == "balanced":
        return index % classes
    return labels[index % len(labels)]


def picture_path(index: int) -> str:
    """Where picture `index` is, relative to its folder: 1,000 in each subfolder."""
    return f"{index // 1000:05d}/{index:08d}.png"


def open_folder(folder: Path, settings: dict, facts: dict | None = None) -> dict[int, dict]:
    """Make or take up a folder of pictures; returns the manifest's records of those that are there and whole, by index.

    `settings` are what must not change, `facts`, kept beside them, what may: the number of pictures, the model's name.
    For one process, which has it `held`, before others write. Raises ValueError, naming the settings, for a folder of other
    pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    if path.is_file():
        try:
            found = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); restore it, or choose another folder") from error
        other = sorted(key for key in {*found, *settings} - {*(facts or {})} if found.get(key) != settings.get(key))
        if other and gather_manifest(folder):
            there, now = ({key: shorten(repr(given.get(key)), 40) for key in other} for given in (found, settings))
            changes = ", ".join(key if there[key] == now[key] else f"{key} {there[key]} there and {now[key]} now"
                                for key in other)  # of fingerprints, which say nothing, the name alone
            raise ValueError(f"{folder} has pictures of other settings: {changes}; choose another folder")
    elif any(found.suffix != ".part" and found.name != LOCK for found in folder.iterdir()):
        raise ValueError(f"{folder} has files in it, and none of them is {SETTINGS}; choose an empty folder")
    write_whole(path, json.dumps({**settings, **(facts or {})}, indent=2).encode() + b"\n")
    return gather_manifest(folder)


@contextlib.contextmanager
def held(folder: Path):
    """Hold a folder as one run's own; the operating system lets go of it when the process ends, however it ends.

    Raises ValueError, in one line, where another run holds it. Where files cannot be locked, as on some network disks or on
    Windows, nothing is held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run is at work in {folder}; wait for it, or choose another folder") from error
        except OSError:
            pass
        yield


def gather_manifest(folder: Path) -> dict[int, dict]:
    """Make one manifest of those that processes left, of pictures whose files are whole; returns its records by index."""
    records = {}
    parts = sorted(folder.glob("manifest*.jsonl"))
    for part in parts:
        for line in part.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
                records[int(record["index"])] = record
            except (ValueError, TypeError, KeyError):  # the last line of a process that was killed, or a damaged one
                continue
    records = {index: records[index] for index in sorted(records) if is_whole(folder, records[index])}
    write_whole(folder / MANIFEST, "".join(json.dumps(record) + "\n" for record in records.values()).encode())
    for part in parts:
        if part.name != MANIFEST:
            part.unlink()
    for unfinished in folder.glob("*/*.part"):
        unfinished.unlink()
    return records


def count_written(folder: Path) -> int:
    """How many pictures all processes have written into a folder since `open_folder`."""
    return sum(part.read_bytes().count(b"\n") for part in folder.glob("manifest-*.jsonl"))


def is_whole(folder: Path, record: dict) -> bool:
    """Whether the picture of a manifest's record is there, byte for byte."""
    try:
        return hashlib.sha256((folder / picture_path(record["index"])).read_bytes()).hexdigest() == record.get("sha256")
    except OSError:
        return False


def write_whole(path: Path, content: bytes):
    """Write a file that appears whole or not at all."""
    unfinished = path.with_name(f"{path.name}.part")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


class PictureWriter:
    """Encodes and writes pictures in a thread of its own, while the network makes the next ones; at most `ahead` wait.

    A context manager: leaving it waits for what is on its way, and raises what went wrong. `written` counts.
    """

    def __init__(self, folder: Path, rank: int, ahead: int):
        self.folder, self.written, self.error = folder, 0, None
        self.manifest = (folder / f"manifest-{rank:05d}.jsonl").open("a")
        self.waiting = queue.Queue(ahead)
        self.thread = threading.Thread(target=self.work, daemon=True)

    def __enter__(self) -> "PictureWriter":
        self.thread.start()
        return self

    def put(self, picture: Image.Image, record: dict):
        """Hand over a picture and its record; waits while too many are on their way. Raises what writing raised."""
        while self.error is None:
            try:
                return self.waiting.put((picture, record), timeout=0.1)
            except queue.Full:
                continue
        raise self.error

    def work(self):
        """The thread: the file first, then its line in the manifest."""
        while (item := self.waiting.get()) is not None:
            try:
                picture, record = item
                encoded = io.BytesIO()
                picture.save(encoded, format="PNG", compress_level=1)  # a third of the time for 5 % more bytes
                path = self.folder / picture_path(record["index"])
                path.parent.mkdir(exist_ok=True)
                write_whole(path, encoded.getvalue())
                record = {**record, "sha256": hashlib.sha256(encoded.getvalue()).hexdigest()}
                self.manifest.write(json.dumps(record) + "\n")
                self.manifest.flush()
                self.written += 1
            except Exception as error:  # whatever it is, it is raised in the thread that hands over pictures
                self.error = error
                return

    def __exit__(self, kind, *_):
        while self.thread.is_alive() and self.error is None:
            try:
                self.waiting.put(None, timeout=0.1)
                break
            except queue.Full:
                continue
        self.thread.join()
        self.manifest.close()
        if self.error is not None and kind is None:
            raise self.error


def write_npz(folder: Path, class_ids: list[int], path: Path):
    """The first pictures as the ADM evaluator reads them: `arr_0` (count, height, width, 3) uint8, `arr_1` their classes.

    One picture at a time is in memory.
    """
    count = len(class_ids)
    first = np.asarray(Image.open(folder / picture_path(0)))
    unfinished = path.with_name(f"{path.name}.part")
    try:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive, \
                archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(
                array, {"descr": "|u1", "fortran_order": False, "shape": (count, *first.shape)})
            for index in range(count):
                array.write(np.asarray(Image.open(folder / picture_path(index))).tobytes())
            array.close()
            with archive.open("arr_1.npy", "w") as labels:
                np.lib.format.write_array(labels, np.array(class_ids))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
