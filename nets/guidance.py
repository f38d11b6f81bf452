"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) as pure functions."""

import torch


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, guidance_scale: float,
          guidance_channels: int | None = None) -> torch.Tensor:
    """Step from the unconditional prediction towards the conditional one, and past it for a scale over 1.

    Both (batch, channels, height, width), any float dtype; so is the result. The channels behind the first
    `guidance_channels`, if that is given, stay conditional. Source: the form in DiT, section 3.1, "Classifier-free
    guidance", with scale 1 meaning no guidance; upstream `DiTPipeline.__call__`, which guides all channels, and
    facebookresearch/DiT, which guides three of the four.
    """
    guided = unconditional + guidance_scale * (conditional - unconditional)
    if guidance_channels is None:
        return guided
    return torch.cat([guided[:, :guidance_channels], conditional[:, guidance_channels:]], dim=1)


def predicted_noise(output: torch.Tensor, latent_channels: int) -> torch.Tensor:
    """The noise half of an output that may carry a learned variance behind it.

    (batch, latent_channels or twice as many, height, width) -> (batch, latent_channels, height, width).
    Raises ValueError for another number of channels.
    """
    if output.shape[1] not in (latent_channels, 2 * latent_channels):
        raise ValueError(f"the network gave {output.shape[1]} channels for latents of {latent_channels}; "
                         f"expected {latent_channels}, or {2 * latent_channels} with a learned variance")
    return output[:, :latent_channels]
