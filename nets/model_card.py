"""What a trained model's folder says of itself: README.md, with the curve of its loss as a picture."""

import json
from pathlib import Path

from nets.sampling import write_whole


def write_card(folder: Path, log: Path, facts: dict[str, str]):
    """Write `README.md` and `curve.png` into a model's folder, from the log of its training and a line of facts each."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [0, *(record["step"] for record in records)]
    seconds = sum((now - before) * record["seconds_per_step"] for before, now, record in zip(steps, steps[1:], records))
    draw_curve(records, folder / "curve.png")
    lines = ["---", "library_name: diffusers", "pipeline_tag: unconditional-image-generation", "---", "",
             f"# {folder.resolve().name}", "",
             "A class-conditional Diffusion Transformer (DiT) in diffusers' folder format.", "",
             *(f"- {name}: {fact}" for name, fact in facts.items()),
             f"- time: {seconds / 3600:.2f} h for {steps[-1]} steps, loss at the end {records[-1]['loss']:.4f}",
             "", "![loss](curve.png)"]
    write_whole(folder / "README.md", "\n".join(lines).encode() + b"\n")


def draw_curve(records: list[dict], path: Path):
    """The loss over the steps, of all timesteps and of each quarter of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [record["step"] for record in records]
    for number, name in enumerate(("0 to 249", "250 to 499", "500 to 749", "750 to 999")):
        quarter = [record["loss_by_quarter"][number] for record in records]
        quarter = [float("nan") if loss is None else loss for loss in quarter]
        axes.plot(steps, quarter, linewidth=0.8, label=f"timesteps {name}")
    axes.plot(steps, [record["loss"] for record in records], "k", linewidth=1.5, label="all")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
