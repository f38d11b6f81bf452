"""The latents of a set of pictures, encoded once: the moments of their posteriors, from which every epoch draws anew.

A folder of them is `latents.json`, which says of what, and shards of 2,048 pictures. Any number of processes write it, a
shard each in turn; an interrupted one is gone on with, shard by shard.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from nets.loading import fingerprint, write_tensors
from nets.picture_sets import PictureSet
from nets.sampling import write_whole

DESCRIPTION, SHARD = "latents.json", 2048
ENCODED_PIXELS = 32 * 256**2  # how much is encoded at a time


@dataclass
class Latents:
    """Moments and classes of pictures; the tensors stay in their files until they are asked for.

    `shards` hold mean and logvar (pictures, views, channels, height, width) float32, `labels` (count,) the class ids.
    The second of two views is the mirrored picture. `skipped` are the files that could not be read.
    """

    shards: list[dict[str, torch.Tensor]]
    labels: torch.Tensor
    class_names: dict[int, str]
    skipped: list[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of one picture's latents."""
        return tuple(self.shards[0]["mean"].shape[2:])

    @property
    def views(self) -> int:
        """2 if pictures are there mirrored too, else 1."""
        return self.shards[0]["mean"].shape[1]

    def draw(self, indices: torch.Tensor, view: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """mean + deviation * noise, (batch, channels, height, width), of these pictures (batch,) in these views (batch,).

        Not multiplied with the VAE's scaling factor. Source: the posterior of Kingma & Welling 2014, equation 9.
        """
        ends = torch.tensor([len(shard["mean"]) for shard in self.shards]).cumsum(0)
        where = torch.searchsorted(ends, indices, right=True)
        moments = {name: torch.empty_like(noise) for name in ("mean", "logvar")}
        for number in where.unique().tolist():
            here = where == number
            rows = indices[here] - (ends[number - 1] if number else 0)
            for name, tensor in moments.items():
                tensor[here] = self.shards[number][name][rows, view[here]]
        return moments["mean"] + (0.5 * moments["logvar"]).exp() * noise


def open_latents_folder(folder: Path, pictures: PictureSet, vae: AutoencoderKL, size: tuple[int, int], flip: bool):
    """Make a folder for the latents of these pictures, or take up one, for one process before others write into it.

    Raises ValueError, in one line, for a folder with latents of something else.
    """
    wanted = {"pictures": pictures.mark, "vae": fingerprint(vae), "size": list(size), "flip": flip, "count": pictures.count,
              "class_names": {str(label): name for label, name in (pictures.class_names or {}).items()}}
    path = folder / DESCRIPTION
    if path.is_file():
        found = json.loads(path.read_text())
        other = [key for key in wanted if wanted[key] != found.get(key)]
        if other:
            raise ValueError(f"{folder} has latents of other {', '.join(other)}; remove it, or choose another folder")
        return
    if any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has latents, but no {DESCRIPTION} that says of what; remove it, or choose another one")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(wanted, indent=2).encode() + b"\n")


def missing_shards(folder: Path, count: int, rank: int = 0, processes: int = 1) -> list[int]:
    """The numbers of the shards that are not written yet, of `count` pictures; one process's share of them.

    A shard belongs to a process by its number, since others write while this one looks.
    """
    return [number for number in range(rank, -(-count // SHARD), processes) if not shard_path(folder, number).is_file()]


@torch.inference_mode()
def encode_shard(folder: Path, number: int, pictures: PictureSet, vae: AutoencoderKL, size: tuple[int, int], flip: bool,
                 strict: bool = False, batch_size: int | None = None, done: Callable[[int], None] = lambda count: None):
    """Encode the pictures of one shard and write it; the file appears whole or not at all.

    Pictures that cannot be read are left out and their errors kept, or with `strict` raised as OSError. A batch is 32
    pictures, or fewer where they are large; `done` hears of each one's size.
    """
    batch_size = batch_size or min(32, max(1, ENCODED_PIXELS // (size[0] * size[1])))
    moments, numbers, skipped = [], [], []
    shard = range(number * SHARD, min((number + 1) * SHARD, pictures.count))
    for start in range(0, len(shard), batch_size):
        batch, kept = [], shard[start:start + batch_size]
        for index in kept:
            try:
                batch.append(pictures.pixels([index], size))
                numbers.append(index)
            except OSError as error:
                if strict:
                    raise
                skipped.append(str(error))
        if batch:
            images = torch.cat(batch).to(vae.device, vae.dtype).div(127.5).sub(1)  # (batch, 3, height, width) in [-1, 1]
            views = [images, images.flip(3)] if flip else [images]
            posteriors = [vae.encode(view).latent_dist for view in views]
            moments.append([torch.stack([getattr(posterior, name) for posterior in posteriors], 1).float().cpu()
                            for name in ("mean", "logvar")])  # (batch, views, channels, height, width)
        done(len(kept))
    tensors = dict(zip(("mean", "logvar"), (torch.cat(parts) for parts in zip(*moments)))) if moments else {}
    tensors["labels"] = pictures.labels[numbers] if numbers else torch.empty(0, dtype=torch.int64)
    write_tensors(shard_path(folder, number), tensors, {"skipped": json.dumps(skipped)})


def load_latents(folder: Path, strict: bool = False) -> Latents:
    """All latents of a finished folder.

    Raises ValueError, in one line, where shards are missing or no picture was read, or with `strict` where one was not.
    """
    description = json.loads((folder / DESCRIPTION).read_text())
    missing = missing_shards(folder, description["count"])
    if missing:
        raise ValueError(f"{folder} is not finished: {len(missing)} shards are missing")
    paths = [shard_path(folder, number) for number in range(-(-description["count"] // SHARD))]
    skipped, shards = [], []
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                skipped += json.loads(file.metadata()["skipped"])
            shards.append(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); remove it, and it is made again") from error
    if strict and skipped:
        raise ValueError(skipped[0])
    shards = [shard for shard in shards if "mean" in shard]
    if not shards:
        raise ValueError(f"none of the pictures could be read; the first: {skipped[0]}")
    return Latents(shards, torch.cat([shard["labels"] for shard in shards]),
                   {int(label): name for label, name in description["class_names"].items()}, skipped)


def shard_path(folder: Path, number: int) -> Path:
    """Where shard `number` is."""
    return folder / f"{number:05d}.safetensors"
