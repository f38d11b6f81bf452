"""What a DiT is trained to do: a batch of each step, and the loss of each picture in it, for `nets.training.fit`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nets.diffusion import GaussianDiffusion
from nets.latents import Latents
from nets.sampling import picture_generator
from nets.training import indices_of_step

Batch = dict[str, torch.Tensor]


def denoise(latents: Latents, diffusion: GaussianDiffusion, scaling_factor: float, batch_size: int, seed: int = 0,
            label_dropout: float = 0.1, min_snr: float | None = None) -> tuple[Callable[[int], Batch], Callable]:
    """The DiT's objective: noise a posterior sample, ask for the noise back. Source: DiT sections 3.1 and 4.

    The batch of a step is a function of (seed, step) alone. Labels are dropped here, so that every process draws the same
    ones; the network's own dropout must be off. `diffusion` is on the network's device.
    """
    null_class = len(latents.class_names)

    def make_batch(step):
        generator = picture_generator(seed, step, 1)
        indices = indices_of_step(len(latents.labels), batch_size, seed, step)  # (batch,)
        view = torch.randint(latents.views, (batch_size,), generator=generator)
        of_posterior, noise = torch.randn(2, batch_size, *latents.shape, generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < label_dropout
        return {"latents": latents.draw(indices, view, of_posterior) * scaling_factor,  # (batch, channels, height, width)
                "noise": noise,
                "timestep": torch.randint(diffusion.num_timesteps, (batch_size,), generator=generator),
                "class_labels": torch.where(dropped, null_class, latents.labels[indices])}

    def loss_of_batch(model, batch):
        noisy = diffusion.add_noise(batch["latents"], batch["noise"], batch["timestep"])
        output = model(noisy, batch["timestep"], batch["class_labels"]).sample
        losses = diffusion.loss(output, batch["latents"], batch["noise"], batch["timestep"], min_snr)  # (batch,)
        return losses, batch["timestep"] * 4 // diffusion.num_timesteps

    return make_batch, loss_of_batch


def attention_kernel(latents: Latents, device: torch.device) -> AbstractContextManager:
    """The context to train in: on a CPU, where tokens are few, attention by the plain formula.

    PyTorch's fused kernel takes two to three times as long there, there and back (`bench/train_compare.py`). Around the
    whole loop, since gradient checkpointing computes a block again on the way back.
    """
    few_tokens = latents.shape[1] * latents.shape[2] <= 64
    return sdpa_kernel(SDPBackend.MATH) if few_tokens and device.type == "cpu" else nullcontext()
