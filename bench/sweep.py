"""Which solver, how many evaluations, where its timesteps lie and where guidance acts: the sweep behind the presets.

    python -m bench.sweep --data DIR                   # every row: hours, and it goes on where it was stopped
    python -m bench.sweep --data DIR --presets         # the presets alone, and fast in int8: two hours, for `paper`

DIR is the Fashion-MNIST folder that train.py reads; needs requirements-dev.txt. On the shipped model, at guidance 1.5, of
5,000 pictures: the Frechet distance to the test set in the features of the shipped classifier, the class accuracy, the
spread within a class over the test set's, how many latents went through the network for a picture; of 50, the PSNR to 250
steps of DPM-Solver++ from the same noise and with the same interval (not of `paper`, which draws noise); and the time of a
call over that of 50 steps, taken in turn, on one core. Finished rows are kept in bench/results/sweep.json; those of other
weights are measured anew. Writes the tables of docs/speed.md, its plot (docs/sweep.png) and its strip of pictures
(docs/presets.png).
"""

import argparse
import functools
import hashlib
import json
import statistics
import time
from pathlib import Path

import diffusers
import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from torchao.utils import should_reduce_range

from bench.small_model import CLASSES, ROOT, accuracy, distance, judge, mean_spread, sample, to_model_range, to_pictures
from nets import DiTPipeline
from nets.acceleration import compile_networks, quantize_int8
from nets.features import FeatureExtractor
from nets.picture_sets import read_fashion_mnist
from nets.pictures import contact_sheet
from nets.scheduling import PRESETS, make_scheduler

GUIDANCE_SCALE = 1.5
CACHES = {**{f"first-block {threshold}": FirstBlockCacheConfig(threshold=threshold) for threshold in (0.1, 0.2)},
          **{f"taylorseer {interval}": TaylorSeerCacheConfig(cache_interval=interval) for interval in (2, 3)}}
SOLVERS = (("dpm", "trailing"), ("dpm", "karras"), ("dpm", "logsnr"), ("unipc", None), ("unipc", "karras"), ("deis", None),
           ("dpm-single", None), ("ddim", None))  # beside DPM-Solver++ as it comes, with their spacings
INTERVALS = ((0.0, 1.5), (0.0, 3.0), (0.0, 5.0), (0.3, 3.0))


def rows():
    """All that is tried: (scheduler, steps, spacing, guidance interval, cache)."""
    for steps in (50, 25, 15, 10, 8, 6):
        yield "dpm", steps, None, None, None
    for scheduler, spacing in SOLVERS:
        yield scheduler, 8, spacing, None, None
    for interval in INTERVALS:
        yield "dpm", 10, None, interval, None
    for scheduler, spacing in (("dpm", None), ("dpm", "logsnr"), ("unipc", None)):
        for steps in (8, 6):
            yield scheduler, steps, spacing, (0.0, 3.0), None
    for spacing in (None, "logsnr"):
        yield "dpm", 25, spacing, (0.0, 3.0), None
    for steps in (15, 12, 11):
        yield "dpm", steps, "logsnr", (0.0, 3.0), None
    yield "unipc", 8, "karras", (0.0, 3.0), None
    for cache in CACHES:
        yield "dpm", 25, None, None, cache
    for cache in ("first-block 0.1", "taylorseer 2"):
        for steps in (25, 15):
            yield "dpm", steps, "logsnr", (0.0, 3.0), cache


def name_of(row):
    """A row in words."""
    scheduler, steps, spacing, interval, cache = row
    more = [spacing, f"guided at {interval[0]:g} to {interval[1]:g}" if interval else None, cache]
    return ", ".join(filter(None, [f"{scheduler} {steps}", *more]))


def prepare(pipeline, own, row):
    """Set the pipeline up for a row; returns the call's arguments."""
    scheduler, steps, spacing, interval, cache = row
    pipeline.scheduler = make_scheduler(scheduler, own, spacing)
    if pipeline.transformer.is_cache_enabled:
        pipeline.transformer.disable_cache()
    if cache:
        pipeline.transformer.enable_cache(CACHES[cache])
    channels = PRESETS["paper"]["guidance_channels"] if scheduler == "ddpm-learned" else None
    return {"guidance_scale": GUIDANCE_SCALE, "steps": steps, "guidance_interval": interval, "guidance_channels": channels}


def psnr(images, exact):
    """Of all pictures together, in dB; pictures in [-1, 1]."""
    return -10 * (images - exact).div(2).square().mean().log10().item()


def measure(pipeline, own, row, extractor, real, exact, count):
    """The figures of a row, without its time."""
    latents = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda _, inputs: latents.append(len(inputs[0])))
    images, labels = sample(pipeline, count, seed=3000, **prepare(pipeline, own, row))
    hook.remove()
    judged = judge(extractor, images, labels)
    figures = {"pictures": count, "frechet": distance(judged, real), "accuracy": accuracy(judged), "psnr": None,
               "spread": mean_spread(judged) / mean_spread(real), "latents_a_picture": sum(latents) / count}
    if row[0] != "ddpm-learned":  # which draws noise at each step, so that no picture is its limit
        near, _ = sample(pipeline, len(exact(row[3])), seed=4000, **prepare(pipeline, own, row))
        figures["psnr"] = psnr(near, exact(row[3]))
    return figures


def take_time(pipeline, own, row, rounds=3, count=10):
    """Seconds a picture, and over those of DPM-Solver++ at 50 steps, the two in turn; medians."""
    of_row, of_reference = [], []
    for _ in range(rounds):
        for one, taken in ((row, of_row), (("dpm", 50, None, None, None), of_reference)):
            settings = prepare(pipeline, own, one)
            started = time.perf_counter()
            sample(pipeline, count, seed=0, **settings)
            taken.append((time.perf_counter() - started) / count)
    return {"seconds": statistics.median(of_row),
            "time_ratio": statistics.median(a / b for a, b in zip(of_row, of_reference))}


def of_preset(name):
    """A preset as a row."""
    scheduler, steps, spacing = (PRESETS[name][key] for key in ("scheduler", "num_inference_steps", "spacing"))
    return scheduler, steps, None if spacing == "linspace" else spacing, PRESETS[name].get("guidance_interval"), None


def plot(results, count, path):
    """Quality over time: every row a point, the presets named."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    kinds = {"guided throughout": ("o", "tab:grey"), "guided in an interval": ("s", "tab:green"),
             "cached": ("x", "tab:red")}
    for kind, (marker, colour) in kinds.items():
        points = [row for name, row in results.items() if kind == kind_of(name)]
        axes.scatter([row["time_ratio"] for row in points], [row["frechet"] for row in points], marker=marker,
                     color=colour, label=kind)
    for preset in PRESETS:
        row = results.get(name_of(of_preset(preset)))
        if row:
            axes.annotate(preset, (row["time_ratio"], row["frechet"]), xytext=(0, -16), textcoords="offset points",
                          ha="center")
    axes.set(xscale="log", yscale="log", xlabel="time of a call over that of 50 steps of DPM-Solver++, guided throughout",
             ylabel=f"Frechet distance of {count:,} pictures")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(x_ticks := (0.1, 0.15, 0.2, 0.3, 0.5, 1), x_ticks)
    axes.set_yticks(y_ticks := (0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9), y_ticks)
    axes.margins(0.1)
    axes.legend()
    figure.savefig(path, dpi=110)


def kind_of(name):
    """What a row is in the plot."""
    if any(cache in name for cache in CACHES):
        return "cached"
    return "guided in an interval" if "guided at" in name else "guided throughout"


def strip(pipeline, own, path):
    """A row of pictures for each preset, of the ten classes at guidance 4, from the same noise."""
    pictures, captions = [], []
    for preset in PRESETS:
        guidance_scale = PRESETS[preset].get("guidance_scale", 4.0)
        settings = prepare(pipeline, own, of_preset(preset)) | {"guidance_scale": guidance_scale}
        pictures += to_pictures(sample(pipeline, CLASSES, seed=0, **settings)[0])
        captions += [preset, f"{settings['steps']} steps"] + [""] * (CLASSES - 2)
    contact_sheet(pictures, captions, columns=CLASSES).save(path)


def table(results, names=None):
    """The rows as Markdown, the slowest first; `names` are what they are called."""
    lines = ["| row | latents through the network | time over 50 steps' | Frechet distance | class accuracy | spread | "
             "PSNR to 250 steps |", "|---|---|---|---|---|---|---|"]
    for key, row in sorted(results.items(), key=lambda item: -item[1]["time_ratio"]):
        near = "none: random" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
        lines.append(f"| {(names or {}).get(key, key)} | {row['latents_a_picture']:.0f} | {row['time_ratio']:.2f} | "
                     f"{row['frechet']:.3f} | {row['accuracy']:.1%} | {row['spread']:.2f} | {near} |")
    return "\n".join(lines)


def write_table(page, mark, lines):
    """Put lines between a page's two comments of that mark."""
    head, _, tail = page.read_text().partition(f"<!-- {mark} -->\n")
    _, end, tail = tail.partition(f"<!-- end of {mark} -->\n")
    page.write_text(f"{head}<!-- {mark} -->\n{lines}\n{end}{tail}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=ROOT / "model_data/fashion-mnist-32")
    parser.add_argument("--classifier", type=Path, default=ROOT / "model_data/fashion-mnist-classifier")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where speed.md is")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/sweep.json")
    parser.add_argument("--presets", action="store_true", help="the presets alone")
    parser.add_argument("--num", type=int, default=5000, help="pictures a row (default 5000)")
    arguments = parser.parse_args()
    count = arguments.num
    torch.set_num_threads(1)

    extractor = FeatureExtractor(arguments.classifier)
    pipeline = DiTPipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    own = pipeline.scheduler
    real = judge(extractor, *read_test_set(arguments.data))
    weights = hashlib.sha256((arguments.model / "transformer/diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    known = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {}
    known = known if known.get("transformer_sha256") == weights else {"transformer_sha256": weights, "rows": {}}

    @functools.cache
    def exact(interval):
        return sample(pipeline, 5 * CLASSES, seed=4000, **prepare(pipeline, own, ("dpm", 250, None, interval, None)))[0]

    machine = {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
               "torch": torch.__version__, "diffusers": diffusers.__version__}
    presets = {name_of(of_preset(name)): f"`{name}`: {name_of(of_preset(name))}" for name in PRESETS}
    tried = [of_preset(name) for name in PRESETS] if arguments.presets else list(rows())
    results = known["rows"].setdefault(str(count), {})

    def keep(row, figures):
        results[name_of(row)] = results.get(name_of(row), {}) | figures
        arguments.results.write_text(json.dumps(known, indent=2) + "\n")
        print(name_of(row), json.dumps(figures), flush=True)

    for row in tried:
        if name_of(row) not in results:
            keep(row, measure(pipeline, own, row, extractor, real, exact, count))
    for row in tried:
        if "time_ratio" not in results[name_of(row)]:
            keep(row, take_time(pipeline, own, row) | {"machine": machine})

    rows_tried = {key: row for key, row in results.items() if key in map(name_of, tried)}
    if arguments.presets:
        write_table(arguments.docs / "speed.md", "presets", table(rows_tried, presets))
        strip(pipeline, own, arguments.docs / "presets.png")
        int8 = f"{name_of(of_preset('fast'))}, int8 of {7 if should_reduce_range(pipeline.device) else 8} bits"
        if int8 not in results:
            quantized = DiTPipeline.from_pretrained(arguments.model)
            quantized.set_progress_bar_config(disable=True)
            compile_networks(quantize_int8(quantized))
            results[int8] = measure(quantized, own, of_preset("fast"), extractor, real, exact, count) | {"machine": machine}
            arguments.results.write_text(json.dumps(known, indent=2) + "\n")
    else:
        write_table(arguments.docs / "speed.md", "sweep", table(rows_tried))
        plot(rows_tried, count, arguments.docs / "sweep.png")


def read_test_set(folder):
    """The test set's pictures in [-1, 1] and their class ids."""
    pictures, labels = read_fashion_mnist(folder, "test")
    return to_model_range(pictures), labels


if __name__ == "__main__":
    main()
