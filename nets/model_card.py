"""What a training leaves behind: the pipeline's folder, a card with the curve of the loss, sheets of samples on the way."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from nets.pictures import contact_sheet, save_picture
from nets.pipeline import DiTPipeline
from nets.run_folder import STATE, last_checkpoint, read_log
from nets.sampling import write_whole


def put_in_place(model, output: Path, scratch: Path, last: str):
    """Save a network or a pipeline into `scratch` and move its files into `output`; with `last`, it is all there."""
    fresh = scratch / "saved.part"
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    (output / last).unlink(missing_ok=True)
    for path in sorted(fresh.iterdir(), key=lambda path: path.name == last):
        shutil.rmtree(output / path.name, ignore_errors=True)
        os.replace(path, output / path.name)
    fresh.rmdir()


def write_sheet(pipeline: DiTPipeline, path: Path) -> np.ndarray:
    """Four pictures of each of up to eight classes as a PNG, from the same noise every time; returns (height, width, 3)."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    id2label = {int(label): name for label, name in pipeline.config.id2label.items()}
    names = {label: id2label[label].split(",")[0] for label in sorted(id2label)[:8]}
    generators = [torch.Generator().manual_seed(index) for index in range(4 * len(names))]
    pictures = pipeline(list(names) * 4, generator=generators, guidance_scale=4.0, num_inference_steps=25).images
    sheet = contact_sheet(pictures, list(names.values()) * 4, columns=len(names))
    save_picture(sheet, path, {})
    return np.asarray(sheet)


def write_reconstructions(images: torch.Tensor, decoded: torch.Tensor, path: Path):
    """A PNG with pictures above and what a VAE makes of them below; (n, 3, height, width) in [-1, 1] each."""
    pixels = torch.cat([images, decoded]).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    save_picture(contact_sheet([Image.fromarray(array) for array in pixels], [""] * len(pixels), len(images)), path, {})


def write_card(folder: Path, facts: dict[str, str]):
    """Write `README.md` and `curve.png` into a model's folder, from the log in its `training/` and a line of facts each.

    Raises ValueError, in one line, where there is no log any more.
    """
    records = read_log(folder / "training")
    if not records:
        raise ValueError(f"{folder} is trained and written, but has no log any more that its card could show")
    steps = [0, *(record["step"] for record in records)]
    seconds = sum((now - before) * record["seconds_per_step"] for before, now, record in zip(steps, steps[1:], records))
    changes = json.loads((last_checkpoint(folder / "training") / STATE).read_text())["changes"]
    draw_curve(records, folder / "curve.png")
    lines = ["---", "library_name: diffusers", "pipeline_tag: unconditional-image-generation", "---", "",
             f"# {folder.resolve().name}", "",
             "A class-conditional Diffusion Transformer (DiT) in diffusers' folder format, for",
             "`DiTPipeline.from_pretrained` or `predict.py --model`. Samples at guidance 4, 25 steps of DPM-Solver++:", "",
             "![samples](samples.png)", "",
             *(f"- {name}: {fact}" for name, fact in facts.items()), *(f"- {change}" for change in changes),
             f"- time: {seconds / 60:.0f} minutes for {steps[-1]} steps, loss at the end {records[-1]['loss']:.4f}",
             "", "![loss](curve.png)"]
    write_whole(folder / "README.md", "\n".join(lines).encode() + b"\n")


def draw_curve(records: list[dict], path: Path):
    """The loss over the steps, of all timesteps and of each quarter of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps, marker = [record["step"] for record in records], "." if len(records) < 3 else "-"
    for number, name in enumerate(("0 to 249", "250 to 499", "500 to 749", "750 to 999")):
        quarter = [record["loss_by_quarter"][number] for record in records]
        quarter = [float("nan") if loss is None else loss for loss in quarter]
        axes.plot(steps, quarter, marker, linewidth=0.8, label=f"timesteps {name}")
    axes.plot(steps, [record["loss"] for record in records], f"k{marker}", linewidth=1.5, label="all")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
