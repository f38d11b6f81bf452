"""What the two networks are trained to do: a batch of each step, and the loss of each picture in it.

Both are pairs of functions for `nets.training.fit`. The batch of a step is a function of (seed, step) alone.
"""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL

from nets.diffusion import GaussianDiffusion
from nets.latents import Latents
from nets.picture_sets import PictureSet
from nets.sampling import picture_generator
from nets.training import indices_of_step

Batch = dict[str, torch.Tensor]


def denoise(latents: Latents, diffusion: GaussianDiffusion, scaling_factor: float, batch_size: int, seed: int = 0,
            label_dropout: float = 0.1, min_snr: float | None = None) -> tuple[Callable[[int], Batch], Callable]:
    """The DiT's objective: noise a posterior sample, ask for the noise back. Source: DiT sections 3.1 and 4.

    Labels are dropped here, so that every process draws the same ones; the network's own dropout must be off.
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


class Autoencode(torch.nn.Module):
    """A VAE's way there and back as one module, so that processes can share its gradients."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (batch, 3, height, width), noise like their latents -> reconstructions, and each one's KL (batch,)."""
        posterior = self.vae.encode(images).latent_dist
        return self.vae.decode(posterior.mean + posterior.std * noise).sample, posterior.kl()


def reconstruct(pictures: PictureSet, side: int, latent_shape: tuple[int, ...], batch_size: int, seed: int = 0,
                kl_weight: float = 1e-6) -> tuple[Callable[[int], Batch], Callable]:
    """The VAE's objective, for `Autoencode`: squared error and a light KL term. Source: Rombach et al. 2022, 3.1."""

    def make_batch(step):
        indices = indices_of_step(pictures.count, batch_size, seed, step)
        noise = torch.randn(batch_size, *latent_shape, generator=picture_generator(seed, step, 1))
        return {"images": pictures.pixels(indices, (side, side)).float().div(127.5).sub(1), "noise": noise}

    def loss_of_batch(model, batch):
        images, divergence = model(batch["images"], batch["noise"])
        losses = (images - batch["images"]).square().flatten(1).mean(1) + kl_weight * divergence
        return losses, torch.zeros(len(losses), dtype=torch.int64, device=losses.device)  # it has no timesteps

    return make_batch, loss_of_batch
