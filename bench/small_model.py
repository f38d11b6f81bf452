"""How good the shipped small model is: the figures of its model card, and docs/samples.png.

    python -m bench.small_model --data DIR

DIR is the Fashion-MNIST folder that train.py reads; needs requirements-dev.txt. Everything is measured with the
shipped classifier: class accuracy at guidance 4; without guidance and with several scales and intervals (of noise levels
sigma, arXiv 2404.07724) the Frechet distance of the pooled features to those of the test set, and the spread within a
class (mean feature variance) relative to the test set's. A screening picks the best guidance; without any and there, the
figures are taken with --num pictures.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from nets import DiTPipeline
from nets.features import FeatureExtractor, Features, make_features
from nets.metrics import frechet_distance, spread
from nets.picture_sets import FASHION_MNIST, read_fashion_mnist
from nets.pictures import contact_sheet

ROOT = Path(__file__).resolve().parent.parent
CLASSES = len(FASHION_MNIST)
AT_ONCE = 50  # pictures
GUIDANCES = ((1.25, None), (1.5, None), (2.0, None), (1.5, (0.0, 1.5)), (1.5, (0.0, 3.0)), (1.5, (0.3, 3.0)),
             (2.0, (0.3, 3.0)))  # scale and interval


def to_model_range(pictures):
    """uint8 (n, 1, h, w) in 0..255 -> float32 (n, 3, h, w) in [-1, 1]."""
    return pictures.float().div(127.5).sub(1).expand(-1, 3, -1, -1)


def judge(extractor, images, labels=None, batch_size=500) -> Features:
    """What the classifier says of images (n, 3, 32, 32) in [-1, 1], rounded to pictures as files have them."""
    parts = [extractor(to_pixels(part)) for part in images.split(batch_size)]
    features, logits = (torch.cat(tensors) for tensors in zip(*parts))
    return make_features("", features, logits, labels)


def distance(features, real):
    """The Frechet distance of judged pictures to real ones."""
    return frechet_distance(features.features, real.mean, real.covariance)


def mean_spread(features):
    """Mean over classes of the mean variance of a feature."""
    return statistics.mean(spread(features.features, features.labels).values())


def accuracy(features):
    """Share of the pictures whose class is recognised."""
    return (features.logits.argmax(1) == features.labels).double().mean().item()


def sample(pipeline, count, guidance_scale, steps, seed, batch_size=200, **options):
    """`count` pictures, classes in turn: images (count, 3, 32, 32) in [-1, 1] and their class ids.

    Every `batch_size` have their noise from a seed of their own; fewer go through the network at once, which is faster.
    """
    labels, images = torch.arange(count) % CLASSES, []
    for index, part in enumerate(labels.split(batch_size)):
        generator = torch.Generator().manual_seed(seed + index)
        noise = torch.randn(pipeline.latents_shape(len(part), None, None), generator=generator)
        images += [pipeline(some, guidance_scale=guidance_scale, num_inference_steps=steps, output_type="pt",
                            latents=latents, generator=generator, **options).images
                   for some, latents in zip(part.split(AT_ONCE), noise.split(AT_ONCE))]
    return torch.cat(images).mul(255).round().div(127.5).sub(1), labels


def to_pixels(images):
    """(n, 3, h, w) in [-1, 1] -> uint8 of the same shape."""
    return images.add(1).mul(127.5).round().clamp(0, 255).byte()


def to_pictures(images):
    """(n, 3, h, w) in [-1, 1] -> PIL pictures."""
    return [Image.fromarray(array) for array in to_pixels(images).permute(0, 2, 3, 1).numpy()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=ROOT / "model_data/fashion-mnist-32")
    parser.add_argument("--classifier", type=Path, default=ROOT / "model_data/fashion-mnist-classifier")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where samples.png goes")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/small_model.json")
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--screening", type=int, default=2_000)
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()

    extractor = FeatureExtractor(arguments.classifier)
    pipeline = DiTPipeline.from_pretrained(arguments.model)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    training, _ = read_fashion_mnist(arguments.data, "train")
    test, test_labels = read_fashion_mnist(arguments.data, "test")
    training, test = to_model_range(training), to_model_range(test)
    real = judge(extractor, test, test_labels)
    results = {"steps": arguments.steps, "scheduler": "dpm", "classifier_test_accuracy": accuracy(real),
               "frechet_training_set": distance(judge(extractor, training), real)}
    with torch.inference_mode():
        decoded = torch.cat([pipeline.vae(part).sample for part in test.split(500)])
    results["frechet_vae_reconstructions"] = distance(judge(extractor, decoded), real)
    results["vae_reconstruction_mse"] = (decoded - test).square().mean().item()

    def measure(count, guidance_scale, interval=None):
        started = time.perf_counter()
        images, labels = sample(pipeline, count, guidance_scale, arguments.steps, seed=1000, guidance_interval=interval)
        seconds = time.perf_counter() - started
        judged = judge(extractor, images, labels)
        figures = {"pictures": count, "guidance_scale": guidance_scale, "guidance_interval": interval,
                   "frechet": distance(judged, real), "spread": mean_spread(judged) / mean_spread(real),
                   "accuracy": accuracy(judged), "pictures_per_second": count / seconds}
        print(json.dumps(figures), flush=True)
        return figures, images

    print(json.dumps(results), flush=True)
    results["guidance_4"], at_four = measure(1_000, 4.0)
    results["screening"] = [measure(arguments.screening, *guidance)[0] for guidance in GUIDANCES]
    best = min(zip(GUIDANCES, results["screening"]), key=lambda tried: tried[1]["frechet"])[0]
    results["guidance_1"], _ = measure(arguments.num, 1.0)
    results["best_guidance"], _ = measure(arguments.num, *best)

    columns = [at_four[label::CLASSES][:8] for label in range(CLASSES)]  # eight of each class
    order = [picture for row in zip(*(to_pictures(column) for column in columns)) for picture in row]
    captions = [names.split(",")[0] for names in FASHION_MNIST.values()]
    contact_sheet(order, captions * 8, columns=CLASSES, smallest=64).save(arguments.docs / "samples.png")
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
