"""Every scheduler on the shipped small model: the table and the strip of docs/schedulers.md.

    python -m bench.schedulers --data DIR

DIR is the Fashion-MNIST folder that train.py reads; needs requirements-dev.txt. For each scheduler at 10, 25 and 50 steps
(DDPM at 100 too), guidance 2: the share of --pictures whose class the shipped
classifier sees, their Frechet distance to the test set in its features, how often the network ran, and the time of a call
next to DPM-Solver++'s at 25 steps, taken in turn. Finished rows are kept in bench/results/schedulers.json and not measured
again, unless the model's weights or --pictures are others. Ends with status 1 if a row of 25 steps or more (DDPM: 100) has
less than 85 % of its classes right.
"""

import argparse
import hashlib
import json
import statistics
import sys
import time
from pathlib import Path

from bench.small_model import CLASSES, ROOT, accuracy, distance, judge, sample, to_model_range, to_pictures
from nets import DiTPipeline
from nets.features import FeatureExtractor
from nets.picture_sets import read_fashion_mnist
from nets.pictures import contact_sheet
from nets.scheduling import SCHEDULERS, make_scheduler

STEPS, MORE_STEPS = (10, 25, 50), {"ddpm": (100,), "ddpm-learned": (100,)}
GUIDANCE_SCALE = 2.0


def measure(pipeline, extractor, real, steps, count):
    """The row of one scheduler at so many steps, without its time."""
    calls = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    images, labels = sample(pipeline, count, GUIDANCE_SCALE, steps, seed=2000, batch_size=count)
    hook.remove()
    judged = judge(extractor, images, labels)
    return {"pictures": count, "accuracy": accuracy(judged), "frechet": distance(judged, real),
            "network_calls": len(calls)}


def take_times(pipeline, own, steps, rounds=3, count=10):
    """Seconds a picture, and over those of DPM-Solver++ at 25 steps, the two in turn; medians."""
    times, ratios, dpm = [], [], make_scheduler("dpm", own)
    for _ in range(rounds):
        seconds = []
        for scheduler, number in ((pipeline.scheduler, steps), (dpm, 25)):
            pipeline.scheduler, kept = scheduler, pipeline.scheduler
            started = time.perf_counter()
            pipeline(list(range(CLASSES)) * (count // CLASSES), guidance_scale=GUIDANCE_SCALE, num_inference_steps=number,
                     output_type="pt")
            seconds.append(time.perf_counter() - started)
            pipeline.scheduler = kept
        times.append(seconds[0] / count)
        ratios.append(seconds[0] / seconds[1])
    return {"seconds": statistics.median(times), "time_ratio": statistics.median(ratios)}


def table(results):
    """The rows as Markdown."""
    lines = ["| `--scheduler` | class | steps | calls | class accuracy | Frechet distance | s / picture | / `dpm` at 25 |",
             "|---|---|---|---|---|---|---|---|"]
    for key, row in results.items():
        name, steps = key.split(" ")
        lines.append(f"| `{name}` | {SCHEDULERS[name]} | {steps} | {row['network_calls']} | {row['accuracy']:.1%} | "
                     f"{row['frechet']:.2f} | {row['seconds']:.3f} | {row['time_ratio']:.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=ROOT / "model_data/fashion-mnist-32")
    parser.add_argument("--classifier", type=Path, default=ROOT / "model_data/fashion-mnist-classifier")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where schedulers.md and schedulers.png go")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/schedulers.json")
    parser.add_argument("--pictures", type=int, default=500)
    arguments = parser.parse_args()

    extractor = FeatureExtractor(arguments.classifier)
    pipeline = DiTPipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    own = pipeline.scheduler
    real = judge(extractor, to_model_range(read_fashion_mnist(arguments.data, "test")[0]))
    weights = (arguments.model / "transformer/diffusion_pytorch_model.safetensors").read_bytes()
    of_what = {"transformer_sha256": hashlib.sha256(weights).hexdigest(), "pictures": arguments.pictures}
    known = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {}
    results = known["rows"] if known.items() >= of_what.items() else {}

    def keep(key, row):
        results[key] = row
        arguments.results.write_text(json.dumps({**of_what, "rows": results}, indent=2) + "\n")

    runs = [(name, steps) for name in SCHEDULERS for steps in STEPS]
    runs += [(name, steps) for name, more in MORE_STEPS.items() for steps in more]
    for name, steps in runs:
        if f"{name} {steps}" not in results:
            pipeline.scheduler = make_scheduler(name, own)
            keep(f"{name} {steps}", measure(pipeline, extractor, real, steps, arguments.pictures))
            print(name, steps, results[f"{name} {steps}"], flush=True)
    for name, steps in runs:
        if "time_ratio" not in results[f"{name} {steps}"]:
            pipeline.scheduler = make_scheduler(name, own)
            keep(f"{name} {steps}", {**results[f"{name} {steps}"], **take_times(pipeline, own, steps)})
            print(name, steps, results[f"{name} {steps}"]["time_ratio"], flush=True)

    pictures, captions = [], []
    for name in SCHEDULERS:  # one row a scheduler: the ten classes, from the same seed, at 25 steps (DDPM at 100)
        pipeline.scheduler = make_scheduler(name, own)
        steps = 100 if name.startswith("ddpm") else 25
        pictures += to_pictures(sample(pipeline, CLASSES, GUIDANCE_SCALE, steps, seed=0)[0])
        captions += [name, f"{steps} steps"] + [""] * (CLASSES - 2)
    contact_sheet(pictures, captions, columns=CLASSES).save(arguments.docs / "schedulers.png")
    in_order = sorted(runs, key=lambda run: list(SCHEDULERS).index(run[0]))
    rows = table({f"{name} {steps}": results[f"{name} {steps}"] for name, steps in in_order})
    page = (arguments.docs / "schedulers.md").read_text()
    head, _, tail = page.partition("<!-- table -->\n")
    _, _, tail = tail.partition("<!-- end of table -->\n")
    (arguments.docs / "schedulers.md").write_text(f"{head}<!-- table -->\n{rows}\n<!-- end of table -->\n{tail}")
    poor = [f"{name} at {steps}" for name, steps in runs if steps >= (100 if name.startswith("ddpm") else 25)
            and results[f"{name} {steps}"]["accuracy"] < 0.85]
    if poor:
        sys.exit(f"less than 85 % of the classes right: {', '.join(poor)}")


if __name__ == "__main__":
    main()
