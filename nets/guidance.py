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


def split_variance(output: torch.Tensor, latent_channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An output of the network in its noise and its learned variance, which has no channels where none was learned.

    (batch, latent_channels or twice as many, height, width) -> twice (batch, latent_channels or 0, height, width).
    Raises ValueError for another number of channels.
    """
    if output.shape[1] not in (latent_channels, 2 * latent_channels):
        raise ValueError(f"the network gave {output.shape[1]} channels for latents of {latent_channels}; "
                         f"expected {latent_channels}, or {2 * latent_channels} with a learned variance")
    return output[:, :latent_channels], output[:, latent_channels:]


def noise_level(timesteps: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t), the noise in units of the signal, at (n,) timesteps in 0..T-1.

    Between whole timesteps its logarithm is interpolated. Source: Karras et al. 2022 (arXiv 2206.00364), table 1.
    """
    log_sigmas = ((1 - alphas_cumprod) / alphas_cumprod).log() / 2  # (T,)
    timesteps = timesteps.to(log_sigmas)
    below, above = timesteps.floor().long(), timesteps.ceil().long()  # (n,) each
    between = torch.lerp(log_sigmas[below], log_sigmas[above], timesteps - below)
    return torch.where(below == above, log_sigmas[below], between).exp()  # a whole timestep's may be infinite


def guided_steps(timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, guidance_scale: float,
                 guidance_interval: tuple[float, float] | None = None) -> list[bool]:
    """Whether each of (n,) timesteps is guided: the scale is over 1, and the noise level in the interval, if one is given.

    Source: Kynkäänniemi et al. 2024 (arXiv 2404.07724), equation 5: guidance for sigma in (sigma_lo, sigma_hi] alone.
    """
    if guidance_scale <= 1 or guidance_interval is None:
        return [guidance_scale > 1] * len(timesteps)
    low, high = guidance_interval
    return [low < sigma <= high for sigma in noise_level(timesteps, alphas_cumprod).tolist()]
