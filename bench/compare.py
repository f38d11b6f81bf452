"""Ours against diffusers' own pipeline, side by side, with the same weights: time, memory, and the pictures' difference.

    python -m bench.compare --work DIR                            # the default mode at DiT-XL/2-256, float32, on the CPU
    python -m bench.compare --work DIR --mode default compile int8
    python -m bench.compare --quick                               # a small geometry, to see that all of this works

bench/README.md says how to read what it prints.
"""

import argparse
import functools
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# What runs: which library, and what is done to its pipeline once it is loaded.
MODES = {"upstream": (), "upstream-compile": ("compile",), "default": (), "compile": ("compile",),
         "int8": ("quantize", "compile"), "fast-int8": ("preset", "quantize", "compile")}
XL = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28}
SMALL = {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 3}


def make_folder(folder, side, quick):
    """A pipeline of the published geometry, or of a small one, with random weights; adaLN not zero, embedders equal."""
    import diffusers

    from nets import DiTPipeline, Transformer2DModel

    transformer = Transformer2DModel(out_channels=8, sample_size=side // 8, **(SMALL if quick else XL))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(std=0.02, generator=generator)
    torch.manual_seed(0)
    channels = (32, 32, 32, 32) if quick else (128, 256, 512, 512)
    vae = diffusers.AutoencoderKL(block_out_channels=channels, layers_per_block=1 if quick else 2, sample_size=side,
                                  down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    DiTPipeline(transformer, vae, diffusers.DPMSolverMultistepScheduler()).save_pretrained(folder)


def load(mode, folder, device, dtype):
    """A mode's pipeline on its device."""
    if mode.startswith("upstream"):
        from diffusers import DiTPipeline
    else:
        from nets import DiTPipeline
    pipeline = DiTPipeline.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    for change in MODES[mode]:
        if mode == "upstream-compile":
            for block in pipeline.transformer.transformer_blocks:
                block.compile(fullgraph=True, dynamic=False)
            pipeline.vae.decoder.compile(fullgraph=True, dynamic=False)
        else:
            from nets import acceleration

            {"compile": acceleration.compile_networks, "quantize": acceleration.quantize_int8,
             "preset": use_fast_preset}[change](pipeline)
    return pipeline


def use_fast_preset(pipeline):
    """The solver of the fast preset; its number of steps and its interval of guidance are the call's."""
    from nets.scheduling import use_preset

    pipeline.scheduler, _ = use_preset("fast", pipeline.scheduler)


def preset_of(mode):
    """What a mode's call is told beside the classes; such a call is measured whole."""
    from nets.scheduling import PRESETS

    named = ("num_inference_steps", "guidance_interval")
    return {name: PRESETS["fast"][name] for name in named if name in PRESETS["fast"]} if "preset" in MODES[mode] else {}


def now(device):
    """The clock, when all that a GPU was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def call(pipeline, batch, steps, preset):
    """One guided call, as a user has it: seconds, and the pictures (batch, 3, height, width)."""
    started = now(pipeline.device)
    images = pipeline([(207 + 153 * k) % 1000 for k in range(batch)], generator=torch.Generator().manual_seed(0),
                      guidance_scale=4.0, output_type="np", **{"num_inference_steps": steps, **preset}).images
    return now(pipeline.device) - started, torch.from_numpy(images).permute(0, 3, 1, 2)


def call_in_parts(pipeline, batch, steps, preset):
    """The same with a clock at its parts, for which a GPU is waited for: seconds of the whole, of each step but the first,
    of the conditioning of all steps, of decoding, and of the rest; and the pictures."""
    ends, inside = [], {"condition": 0.0, "decode": 0.0}

    def timed(part, function):
        @functools.wraps(function)
        def run(*arguments, **options):
            started = now(pipeline.device)
            result = function(*arguments, **options)
            if part == "step":
                ends.append(now(pipeline.device))
            else:
                inside[part] += now(pipeline.device) - started
            return result
        return run

    parts = [(pipeline.scheduler, "step"), (pipeline.vae, "decode"), (pipeline.transformer, "condition")]
    parts = [(owner, part) for owner, part in parts if hasattr(owner, part)]  # upstream conditions within each step
    for owner, part in parts:
        setattr(owner, part, timed(part, getattr(owner, part)))
    try:
        total, images = call(pipeline, batch, steps, preset)
    finally:
        for owner, part in parts:
            delattr(owner, part)
    between = [after - before for before, after in itertools.pairwise(ends)]
    rest = total - sum(inside.values()) - statistics.median(between) * len(ends)
    return {"total": total, "steps": between, "rest": rest, **inside}, images


def fresh(mode, folder, arguments):
    """What a process of its own needs to import, to load, to make its first picture, and its peak memory."""
    started = time.perf_counter()
    if mode.startswith("upstream"):
        from diffusers import DiTPipeline
    else:
        from nets import DiTPipeline
    imported = time.perf_counter()
    assert DiTPipeline
    pipeline = load(mode, folder, arguments.device, arguments.dtype)
    loaded = time.perf_counter()
    call(pipeline, 1, 2, preset_of(mode))
    ended = time.perf_counter()
    status = Path("/proc/self/status").read_text()  # where getrusage would tell the peak of the parent, if that is higher
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    device_peak = torch.cuda.max_memory_allocated() if arguments.device == "cuda" else None
    print(json.dumps({"import": imported - started, "load": loaded - imported, "first_picture": ended - loaded,
                      "peak_bytes": peak, "device_peak_bytes": device_peak}))


def ceiling(device, dtype, rounds=20):
    """torch's own matmul, in FLOP/s, the best of some rounds: of a DiT-XL/2's MLP on a CPU, of 8192 squared on a GPU."""
    shape, several = ((8192, 8192, 8192), 10) if device == "cuda" else ((1024, 1152, 4608), 1)
    rows, inner, columns = shape
    left = torch.randn((rows, inner), device=device, dtype=getattr(torch, dtype))
    right = torch.randn((inner, columns), device=device, dtype=getattr(torch, dtype))
    best = 0.0
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(several):
            left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, several * 2 * rows * inner * columns / (time.perf_counter() - started))
    return best


def flops_of_step(config, rows):
    """Floating-point operations of one forward of `rows` latents: the matrices of the blocks and their attention."""
    tokens, dim = (config.sample_size // config.patch_size) ** 2, config.num_attention_heads * config.attention_head_dim
    return rows * config.num_layers * (tokens * 24 * dim**2 + 4 * tokens**2 * dim)


def spread(numbers):
    """Median and range."""
    return {"median": statistics.median(numbers), "least": min(numbers), "most": max(numbers)}


def seconds_of_call(part, steps, preset):
    """What a call of so many steps takes, reckoned from the parts of a shorter one; with a preset it was a whole one."""
    conditioning = part["condition"] / (len(part["steps"]) + 1)  # of a step
    return part["total"] if preset else (
        steps * (statistics.median(part["steps"]) + conditioning) + part["decode"] + part["rest"])


def summary(parts, whole, arguments, config, peak_flops):
    """A mode's figures from the parts of its calls and the seconds of whole ones; the share is that of guided steps."""
    steps = [seconds for part in parts for seconds in part["steps"]]
    share = flops_of_step(config, 2 * arguments.batch) / statistics.median(steps) / peak_flops
    return {"seconds_a_step": spread(steps), "seconds_a_decode": spread([part["decode"] for part in parts]),
            "seconds_a_picture": spread([seconds / arguments.batch for seconds in whole]),
            "pictures_a_second": arguments.batch / statistics.median(whole), "share_of_matmul_ceiling": share}


def compare(arguments, folder):
    """All figures: fresh processes first, then all modes in one, in turn."""
    modes = ["upstream", *(mode for mode in arguments.mode if mode != "upstream")]
    device = f"CPU, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    results = {"device": torch.cuda.get_device_name() if arguments.device == "cuda" else device,
               "torch": torch.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
               **{name: getattr(arguments, name) for name in ("dtype", "size", "batch", "steps", "measured_steps", "rounds",
                                                              "quick")}, "modes": {}}
    runs = {mode: [] for mode in modes}
    for _, mode in itertools.product(range(arguments.fresh_rounds), modes):
        command = [sys.executable, "-m", "bench.compare", "--fresh", mode, "--folder", folder, "--device", arguments.device,
                   "--dtype", arguments.dtype]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            reason = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
            raise RuntimeError(f"{mode}: {reason[-1]}")
        runs[mode].append(json.loads(done.stdout.splitlines()[-1]))
    for mode in modes:
        results["modes"][mode] = {name: spread([run[name] for run in runs[mode]]) for name, value in runs[mode][0].items()
                                  if value is not None}
        print(mode, json.dumps(results["modes"][mode]), flush=True)

    import diffusers

    results["diffusers"] = diffusers.__version__
    pipelines = {mode: load(mode, folder, arguments.device, arguments.dtype) for mode in modes}
    parts, whole, images = {mode: [] for mode in modes}, {mode: [] for mode in modes}, {}
    for mode, pipeline in pipelines.items():
        call(pipeline, arguments.batch, 2, preset_of(mode))
    for _ in range(arguments.rounds):
        for mode, pipeline in pipelines.items():
            part, images[mode] = call_in_parts(pipeline, arguments.batch, arguments.measured_steps, preset_of(mode))
            parts[mode].append(part)
            if arguments.device == "cuda":  # whose steps are not to be waited for, and are short enough for whole calls
                whole[mode].append(call(pipeline, arguments.batch, arguments.steps, preset_of(mode))[0])
            else:
                whole[mode].append(seconds_of_call(part, arguments.steps, preset_of(mode)))
    peak_flops = ceiling(arguments.device, arguments.dtype)
    results["matmul_ceiling_flops"] = peak_flops
    for mode in modes:
        figures = summary(parts[mode], whole[mode], arguments, pipelines[mode].transformer.config, peak_flops)
        ratios = [one / other for one, other in zip(whole[mode], whole["upstream"])]
        results["modes"][mode].update(figures, ratio_to_upstream=spread(ratios))
        difference = images[mode] - images["upstream"]
        error = difference.square().mean().item()
        if "quantize" in MODES[mode]:
            results["modes"][mode]["share_of_matmul_ceiling"] = None  # which is that of other products
        if not preset_of(mode):
            results["modes"][mode].update(largest_difference=difference.abs().max().item(),
                                          psnr=None if error == 0 else -10 * torch.tensor(error).log10().item())
        print(f"{mode}: {figures['seconds_a_picture']['median']:.2f} s a picture, ratio to upstream "
              f"{statistics.median(ratios):.3f}, largest difference "
              f"{results['modes'][mode].get('largest_difference')}", flush=True)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where the folder of random weights is made, once (3.3 GB)")
    parser.add_argument("--folder", type=Path, help="a pipeline folder in its place")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["default"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=25, help="of the picture whose seconds are told")
    parser.add_argument("--measured-steps", type=int, default=3, help="of each call that is measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fresh-rounds", type=int, default=1, help="processes for memory, import, load and first picture")
    parser.add_argument("--size", type=int, choices=(256, 512), default=256)
    parser.add_argument("--quick", action="store_true", help="a small geometry, in a minute")
    parser.add_argument("--results", type=Path, help="the JSON file to write")
    parser.add_argument("--fresh", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measured_steps < 2:
        parser.error("--measured-steps 1 has no step beside the first; give 2 or more")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here")
    if arguments.folder and not (arguments.folder / "model_index.json").is_file():
        parser.error(f"--folder {arguments.folder} has no model_index.json")
    if not Path("/proc/self/status").is_file():
        parser.error("the peak memory of a process is read from /proc, which only Linux has")
    if arguments.fresh:
        return fresh(arguments.fresh, arguments.folder, arguments)
    with tempfile.TemporaryDirectory() as place:
        folder = arguments.folder or (Path(place) if arguments.quick or not arguments.work else arguments.work) / (
            f"dit-{'small' if arguments.quick else 'xl'}-2-{arguments.size}-random")
        if not (folder / "model_index.json").is_file():
            make_folder(folder, arguments.size, arguments.quick)
        results = compare(arguments, folder)
    if arguments.results:
        arguments.results.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
