"""`python predict.py` against the script that an owner of diffusers would write, whole processes, in turn.

    python -m bench.process --results bench/results/process.json

Both load the small model that ships, make the same two pictures at 25 steps of DPM-Solver++, and write them as PNG;
without guidance, because upstream's null class is 1000, which this model does not have. Told are the seconds of both, their
ratio, and the shares of predict.py's as `--timings` has them. What is installed counts: diffusers imports transformers and
torchao wherever they are, so measure in an environment of requirements.txt alone.
"""

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UPSTREAM = """
import sys
import torch
from diffusers import DiTPipeline, DPMSolverMultistepScheduler

pipeline = DiTPipeline.from_pretrained("model_data/fashion-mnist-32", torch_dtype=torch.float32)
pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
ids = pipeline.get_label_ids(["bag", "ankle boot"])
images = pipeline(ids, guidance_scale=1.0, num_inference_steps=25, generator=torch.manual_seed(42)).images
for name, image in zip(("bag", "ankle boot"), images):
    image.save(f"{sys.argv[1]}/{name}.png")
"""


def take(command):
    """Seconds of a process, and what it printed."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return time.perf_counter() - started, done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    ours, upstream, shares = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds + 1):
            seconds, printed = take([sys.executable, "predict.py", "bag", "ankle boot", "--device", "cpu", "--timings",
                                     "--guidance-scale", "1", "--output-dir", folder])
            of_upstream, _ = take([sys.executable, "-c", UPSTREAM, folder])
            if number == 0:  # which filled the caches of files
                continue
            ours.append(seconds)
            upstream.append(of_upstream)
            for name, part in re.findall(r"(\w+) ([\d.]+) s \(", printed.splitlines()[-1]):
                shares.setdefault(name, []).append(float(part))
            print(f"predict.py {seconds:.2f} s, upstream's script {of_upstream:.2f} s, ratio {seconds / of_upstream:.3f}",
                  flush=True)
    ratios = sorted(one / other for one, other in zip(ours, upstream))
    results = {"cores": os.cpu_count(), "rounds": arguments.rounds, "seconds": statistics.median(ours),
               "upstream_seconds": statistics.median(upstream), "ratio": statistics.median(ratios),
               "ratio_least": ratios[0], "ratio_most": ratios[-1],
               "shares": {name: statistics.median(parts) for name, parts in shares.items()},
               "installed": {name: importlib.util.find_spec(name) is not None for name in ("transformers", "torchao")}}
    print(json.dumps(results, indent=2))
    if arguments.results:
        arguments.results.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
