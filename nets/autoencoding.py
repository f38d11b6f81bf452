"""A small VAE of one's own, and what it is trained to do.

Source: Rombach et al. 2022 (arXiv 2112.10752), section 3.1 and appendix G, without the adversarial and perceptual losses.
"""

import contextlib
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL

from nets.picture_sets import PictureSet
from nets.sampling import picture_generator
from nets.training import indices_of_step

KL_WEIGHT = 3 * 32**2 * 1e-6  # of the KL in nats a pixel and channel; 1e-6 of all its nats at 32x32
FACTOR = 4  # pixels a latent is wide


def small_vae(side: int) -> AutoencoderKL:
    """4 latent channels at a quarter of the side, 250,000 parameters. Raises ValueError for a side that is no multiple."""
    if side % FACTOR or not side:
        raise ValueError(f"--size {side} is no multiple of {FACTOR}, by which this VAE shrinks pictures")
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
                         block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8, latent_channels=4,
                         sample_size=side)


class Autoencode(torch.nn.Module):
    """A VAE's way there and back as one module, so that processes can share its gradients."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (batch, 3, height, width), noise like their latents -> reconstructions, and each one's KL (batch,)."""
        posterior = self.vae.encode(images).latent_dist
        return self.vae.decode(posterior.mean + posterior.std * noise).sample, posterior.kl()


def reconstruct(pictures: PictureSet, side: int, batch_size: int, seed: int = 0) -> tuple[Callable, Callable]:
    """`make_batch` and `loss_of_batch` for `nets.training.fit` of an `Autoencode`: squared error and a light KL term."""

    def make_batch(step):
        indices = indices_of_step(pictures.count, batch_size, seed, step)
        noise = torch.randn(batch_size, 4, side // FACTOR, side // FACTOR, generator=picture_generator(seed, step, 1))
        return {"images": in_model_range(pictures, indices, side), "noise": noise}

    def loss_of_batch(model, batch):
        images, divergence = model(batch["images"], batch["noise"])
        losses = (images - batch["images"]).square().flatten(1).mean(1) + KL_WEIGHT * divergence / images[0].numel()
        return losses, torch.zeros(len(losses), dtype=torch.int64, device=losses.device)  # it has no timesteps

    return make_batch, loss_of_batch


@torch.inference_mode()
def measure_scaling_factor(vae: AutoencoderKL, pictures: PictureSet, side: int, count: int = 1000) -> float:
    """1 over the standard deviation of the latents of `count` pictures from all over the set. Source: section 4.3.2.

    Of all samples that their posteriors could give, so that nothing is drawn.
    """
    indices = range(0, pictures.count, -(-pictures.count // count))
    posteriors = [vae.encode(in_model_range(pictures, indices[start:start + 50], side).to(vae.device)).latent_dist
                  for start in range(0, len(indices), 50)]
    means, variances = (torch.cat([getattr(posterior, name) for posterior in posteriors]) for name in ("mean", "var"))
    return round((means.var() + variances.mean()).rsqrt().item(), 5)


@torch.inference_mode()
def reconstruct_some(vae: AutoencoderKL, pictures: PictureSet, side: int,
                     count: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures from all over the set, and what the VAE makes of them; (n, 3, side, side) in [-1, 1] each."""
    shown = []
    for index in range(0, pictures.count, -(-pictures.count // count)):
        with contextlib.suppress(OSError):
            shown.append(in_model_range(pictures, [index], side))
    images = torch.cat(shown).to(vae.device)
    decoded = [vae.decode(vae.encode(image).latent_dist.mean).sample for image in images.split(1)]
    return images, torch.cat(decoded).clamp(-1, 1)


def in_model_range(pictures: PictureSet, indices, side: int) -> torch.Tensor:
    """Pictures of these numbers as (n, 3, side, side) float32 in [-1, 1]."""
    return pictures.pixels(indices, (side, side)).float() / 127.5 - 1
