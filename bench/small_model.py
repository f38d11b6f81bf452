"""How good the shipped small model is: the figures of its model card, and the two sheets in docs/.

    python -m bench.small_model --data DIR

DIR is the Fashion-MNIST folder that train.py reads; needs requirements-dev.txt. Everything is measured with the
shipped classifier: class accuracy at guidance 4; at guidances 1, 1.25, 1.5 and 2 the Frechet distance of the pooled
features to those of the test set, and the spread within a class (mean feature variance) relative to the test set's.
A screening picks the best guidance over 1; at 1 and there, the figures are taken with --num pictures.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from transformers import AutoModelForImageClassification

from nets import DiTPipeline
from nets.pictures import contact_sheet
from train import CLASS_NAMES, read_fashion_mnist, to_model_range

ROOT = Path(__file__).resolve().parent.parent
CLASSES = len(CLASS_NAMES)


@torch.inference_mode()
def judge(classifier, images, batch_size=500):
    """Images (n, 3, 32, 32) in [-1, 1] -> pooled features (n, dim) float64 and predicted class ids (n,)."""
    features, predicted = [], []
    for part in images.split(batch_size):
        pooled = classifier.resnet(part).pooler_output.flatten(1)
        features.append(pooled.double())
        predicted.append(classifier.classifier(pooled).argmax(1))
    return torch.cat(features), torch.cat(predicted)


def frechet_distance(first, second):
    """Between Gaussians fitted to two sets of features, (n, dim) and (m, dim). Source: Heusel et al. 2017, eq. 6."""
    trace = torch.linalg.eigvals(first.T.cov() @ second.T.cov()).real.clamp(min=0).sqrt().sum()
    gap = (first.mean(0) - second.mean(0)).square().sum()
    return (gap + first.T.cov().trace() + second.T.cov().trace() - 2 * trace).item()


def spread(features, labels):
    """Mean over classes of the mean variance of a feature."""
    return torch.stack([features[labels == label].var(0).mean() for label in range(CLASSES)]).mean().item()


def sample(pipeline, count, guidance_scale, steps, seed, batch_size=200):
    """`count` pictures, classes in turn: images (count, 3, 32, 32) in [-1, 1] and their class ids."""
    labels = torch.arange(count) % CLASSES
    images = [pipeline(part, guidance_scale=guidance_scale, num_inference_steps=steps, output_type="pt",
                       generator=torch.Generator().manual_seed(seed + index)).images
              for index, part in enumerate(labels.split(batch_size))]
    return torch.cat(images).mul(255).round().div(127.5).sub(1), labels


def to_pictures(images):
    """(n, 3, h, w) in [-1, 1] -> PIL pictures."""
    arrays = images.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


def nearest_sheet(images, training, count=4):
    """A row for each of eight samples: the sample, then its `count` nearest training pictures by pixel distance."""
    flat = training[:, :1].flatten(1)
    pictures, captions = [], []
    for image in images[:8]:
        gray = image.mean(0).flatten()
        distances = (flat - gray).square().mean(1)
        nearest = distances.topk(count, largest=False)
        pictures += to_pictures(torch.cat([image[None], training[nearest.indices]]))
        captions += ["sample"] + [f"{distance:.4f}" for distance in nearest.values]
    return contact_sheet(pictures, captions, columns=count + 1, smallest=64)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=ROOT / "model_data/fashion-mnist-32")
    parser.add_argument("--classifier", type=Path, default=ROOT / "model_data/fashion-mnist-classifier")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the two sheets go")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/small_model.json")
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--screening", type=int, default=2_000)
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()

    classifier = AutoModelForImageClassification.from_pretrained(arguments.classifier).eval()
    pipeline = DiTPipeline.from_pretrained(arguments.model)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    training, _ = read_fashion_mnist(arguments.data, "train")
    test, test_labels = read_fashion_mnist(arguments.data, "t10k")
    training, test = to_model_range(training), to_model_range(test)
    real, recognised = judge(classifier, test)
    real_spread = spread(real, test_labels)
    results = {"steps": arguments.steps, "scheduler": "dpm", "classifier_test_accuracy":
               (recognised == test_labels).double().mean().item(),
               "frechet_training_set": frechet_distance(judge(classifier, training)[0], real)}
    with torch.inference_mode():
        decoded = torch.cat([pipeline.vae(part).sample for part in test.split(500)])
    results["frechet_vae_reconstructions"] = frechet_distance(judge(classifier, decoded.clamp(-1, 1))[0], real)
    results["vae_reconstruction_mse"] = (decoded - test).square().mean().item()

    def measure(count, guidance_scale):
        started = time.perf_counter()
        images, labels = sample(pipeline, count, guidance_scale, arguments.steps, seed=1000)
        seconds = time.perf_counter() - started
        features, predicted = judge(classifier, images)
        figures = {"pictures": count, "guidance_scale": guidance_scale, "frechet": frechet_distance(features, real),
                   "spread": spread(features, labels) / real_spread,
                   "accuracy": (predicted == labels).double().mean().item(), "pictures_per_second": count / seconds}
        print(json.dumps(figures), flush=True)
        return figures, images

    print(json.dumps(results), flush=True)
    results["guidance_4"], at_four = measure(1_000, 4.0)
    results["screening"] = [measure(arguments.screening, scale)[0] for scale in (1.25, 1.5, 2.0)]
    best = min(results["screening"], key=lambda figures: figures["frechet"])["guidance_scale"]
    results["guidance_1"], _ = measure(arguments.num, 1.0)
    results["best_guidance"], at_best = measure(arguments.num, best)

    columns = [at_four[label::CLASSES][:8] for label in range(CLASSES)]  # eight of each class
    order = [picture for row in zip(*(to_pictures(column) for column in columns)) for picture in row]
    captions = [names.split(",")[0] for names in CLASS_NAMES]
    contact_sheet(order, captions * 8, columns=CLASSES, smallest=64).save(arguments.docs / "samples.png")
    nearest_sheet(at_best, training).save(arguments.docs / "nearest.png")
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
