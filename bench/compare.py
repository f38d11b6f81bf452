"""Ours against diffusers' own pipeline at DiT-XL/2-256, same random weights, float32, on the CPU: memory and time.

    python -m bench.compare --work DIR

DIR gets a 3.3 GB pipeline folder with random weights and equal embedders, as the published one has; it is made once.
Time per step is taken in one process, in turn, ours, upstream, ours, ...; peak memory each in a fresh process that loads
the folder and makes one picture. Prints the figures and writes them to bench/results/compare.json.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import torch

ROOT = Path(__file__).resolve().parent.parent


def make_folder(folder):
    """A pipeline of the published geometry with random weights; adaLN not zero, embedders equal in all blocks."""
    from nets import DiTPipeline, Transformer2DModel

    transformer = Transformer2DModel(out_channels=8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(std=0.02, generator=generator)
    vae = diffusers.AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=256,
                                  down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    scheduler = diffusers.DPMSolverMultistepScheduler()
    DiTPipeline(transformer, vae, scheduler).save_pretrained(folder)


def load(kind, folder):
    """One of the two pipelines, from the folder."""
    if kind == "ours":
        from nets import DiTPipeline
    else:
        from diffusers import DiTPipeline
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def one_picture(kind, folder, steps):
    """Load, make one guided picture, and print this process's peak resident memory in bytes and the parameters held."""
    pipeline = load(kind, folder)
    pipeline([207], generator=torch.Generator().manual_seed(0), num_inference_steps=steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    held = sum(parameter.numel() * parameter.element_size() for parameter in pipeline.transformer.parameters())
    print(json.dumps({"peak_bytes": peak, "parameter_bytes": held}))


def step_seconds(pipeline, batch, steps):
    """Seconds of each denoising step after the first, the network's and the scheduler's, one call of the pipeline."""
    stamps = []
    handle = pipeline.transformer.register_forward_pre_hook(lambda *_: stamps.append(time.perf_counter()))
    started = time.perf_counter()
    images = pipeline([207] * batch, generator=torch.Generator().manual_seed(0), num_inference_steps=steps,
                      output_type="pt").images
    total = time.perf_counter() - started
    handle.remove()
    return [b - a for a, b in itertools.pairwise(stamps)], total, images


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one-picture", choices=("ours", "upstream"), help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/compare.json")
    arguments = parser.parse_args()
    folder = arguments.work / "dit-xl-2-256-random"
    if arguments.one_picture:
        return one_picture(arguments.one_picture, folder, steps=2)
    if not (folder / "model_index.json").is_file():
        make_folder(folder)

    results = {"torch": torch.__version__, "diffusers": diffusers.__version__, "threads": torch.get_num_threads(),
               "cores": os.cpu_count(), "machine": platform.machine(), "batch": arguments.batch, "steps": arguments.steps}
    results.update(ours={"peak_bytes": []}, upstream={"peak_bytes": []})
    for _ in range(arguments.rounds):
        for kind in ("ours", "upstream"):
            command = [sys.executable, "-m", "bench.compare", "--work", str(arguments.work), "--one-picture", kind]
            output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
            figures = json.loads(output.splitlines()[-1])
            results[kind]["peak_bytes"].append(figures["peak_bytes"])
            results[kind]["parameter_bytes"] = figures["parameter_bytes"]
            print(kind, figures, flush=True)
    saved = [b - a for a, b in zip(results["ours"]["peak_bytes"], results["upstream"]["peak_bytes"])]
    results["peak_bytes_saved"] = {"median": statistics.median(saved), "min": min(saved), "max": max(saved)}

    pipelines = {kind: load(kind, folder) for kind in ("ours", "upstream")}
    seconds, totals, images = ({kind: [] for kind in pipelines} for _ in range(3))
    for _ in range(arguments.rounds + 1):
        for kind, pipeline in pipelines.items():
            steps, total, images[kind] = step_seconds(pipeline, arguments.batch, arguments.steps)
            seconds[kind].append(statistics.median(steps))
            totals[kind].append(total)
    for kind in pipelines:
        results[kind]["step_seconds"], results[kind]["call_seconds"] = seconds[kind][1:], totals[kind][1:]
    for name in ("step_seconds", "call_seconds"):
        ratios = [a / b for a, b in zip(results["ours"][name], results["upstream"][name])]
        results[f"{name}_ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    results["largest_difference"] = (images["ours"] - images["upstream"]).abs().max().item()
    print(json.dumps({key: results[key] for key in ("peak_bytes_saved", "step_seconds_ratio", "call_seconds_ratio",
                                                    "largest_difference")}, indent=2))
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
