"""What sample.py costs beside the network: the figures of docs/scaling.md.

    python -m bench.sampling --picture PHOTO

Prints a picture's bytes and milliseconds as PNG at 256x256 (crops of PHOTO), those of its digest and of its place in the
npz, and, with the shipped model, the pictures a second of two processes with one core each over those of one with two, in
turn.
Needs an otherwise idle machine of two cores.
"""

import argparse
import io
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from bench.small_model import ROOT
from nets.sampling import PictureWriter, gather_manifest, open_folder, write_npz

LAUNCHERS = {"one process": [],
             "two processes": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]}


def pictures_per_second(launcher, folder, num):
    """What sample.py says of a run of the shipped model at 10 steps."""
    command = [sys.executable, *launcher, ROOT / "sample.py", "--device", "cpu", "--num", num, "--steps", 10,
               "--guidance-scale", 1.5, "--batch-size", 50, "--output", folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return float(re.search(r"([\d.]+) a second", done.stdout)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, required=True, help="a photograph of at least 512x556")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--num", type=int, default=1200, help="pictures of each run")
    arguments = parser.parse_args()

    photo = Image.open(arguments.picture).convert("RGB")
    crops = [photo.crop((x, y, x + 256, y + 256)) for x in (0, 128, 256) for y in (0, 100, 200, 300)]
    for level in (1, 6):
        times = []
        for crop in crops * 5:
            started, encoded = time.perf_counter(), io.BytesIO()
            crop.save(encoded, format="PNG", compress_level=level)
            times.append(time.perf_counter() - started)
        print(f"PNG, compression {level}: {1000 * statistics.median(times):.1f} ms")
    with tempfile.TemporaryDirectory() as place:
        folder, count = Path(place) / "pictures", 600
        open_folder(folder, {})
        with PictureWriter(folder, 0, 64) as writer:
            for index in range(count):
                writer.put(crops[index % len(crops)], {"index": index, "class": 1, "seed": 0})
        gather_manifest(folder)
        print(f"PNG: {sum(path.stat().st_size for path in folder.glob('*/*.png')) / count:.0f} bytes a picture")
        started = time.perf_counter()
        gather_manifest(folder)
        middle = time.perf_counter()
        write_npz(folder, [1] * count, Path(place) / "samples.npz")
        ended = time.perf_counter()
        print(f"digest: {1000 * (middle - started) / count:.2f} ms; npz: {1000 * (ended - middle) / count:.1f} ms")
        ratios = []
        for pair in range(arguments.pairs):
            one, two = (pictures_per_second(launcher, Path(place) / f"{name} {pair}", arguments.num)
                        for name, launcher in LAUNCHERS.items())
            ratios.append(two / one)
            print(f"one process {one:.1f} pictures/s, two {two:.1f}: {ratios[-1]:.2f}", flush=True)
        print(f"median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
