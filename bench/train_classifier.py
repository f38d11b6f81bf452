"""Train the small Fashion-MNIST classifier that judges the samples, a ResNet of the transformers library.

    python -m bench.train_classifier --data DIR --output model_data/fashion-mnist-classifier

Needs requirements-dev.txt. The folder it writes loads with `transformers.AutoModelForImageClassification`.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

from bench.small_model import to_model_range
from nets.picture_sets import FASHION_MNIST, read_fashion_mnist
from nets.training import indices_of_step


def accuracy(model, pictures, labels):
    """Share of the pictures whose class is recognised."""
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(to_model_range(part)).logits for part in pictures.split(500)])
    return (logits.argmax(1) == labels).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    pictures, labels = read_fashion_mnist(arguments.data, "train")
    torch.manual_seed(arguments.seed)
    model = ResNetForImageClassification(ResNetConfig(
        embedding_size=24, hidden_sizes=[24, 48, 96], depths=[1, 1, 1], layer_type="basic",
        downsample_in_first_stage=False, id2label=FASHION_MNIST,
        label2id={name: label for label, name in FASHION_MNIST.items()}))
    steps = arguments.epochs * (len(pictures) // arguments.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 200, 0.5 + 0.5 * math.cos(
        math.pi * step / steps)))
    started = time.time()
    for step in range(steps):
        indices = indices_of_step(len(pictures), arguments.batch_size, arguments.seed, step)
        model.train()
        left, top = torch.randint(0, 3, (2,)).tolist()  # shift by up to one pixel
        images = F.pad(to_model_range(pictures[indices]), (1, 1, 1, 1), value=-1)[..., top:top + 32, left:left + 32]
        loss = F.cross_entropy(model(images).logits, labels[indices], label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {step / (time.time() - started):.1f} steps/s", flush=True)
    model.save_pretrained(arguments.output)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(arguments.output)  # 0..255 to [-1, 1]
    test_accuracy = accuracy(model, *read_fashion_mnist(arguments.data, "test"))
    print(f"test accuracy {test_accuracy:.4f}; {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
