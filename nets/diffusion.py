"""The training objective: noise a picture, ask for the noise back, and score the answer.

Gaussian diffusion as in DDPM (Ho et al. 2020, arXiv 2006.11239) with the learned variance and the hybrid loss of Improved
DDPM (Nichol & Dhariwal 2021, arXiv 2102.09672), which is what DiT trains with (arXiv 2212.09748, section 4).
"""

import math

import torch


def linear_betas(num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> torch.Tensor:
    """The noise added at each step, (num_timesteps,) float64. Source: DDPM section 4."""
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


def cosine_betas(num_timesteps: int = 1000, offset: float = 0.008, largest: float = 0.999) -> torch.Tensor:
    """Betas whose alpha-bar falls as a squared cosine, (num_timesteps,) float64. Source: Improved DDPM equation 17."""
    time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    alphas_cumprod = ((time + offset) / (1 + offset) * math.pi / 2).cos().square()
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=largest)


class GaussianDiffusion:
    """The forward process q and the losses, for a table of betas.

    All tables are (num_timesteps,), computed in float64 and kept in float32 on `device`, where pictures and `timestep`,
    (batch,) int64, are to be.
    """

    def __init__(self, betas: torch.Tensor, device: torch.device | str = "cpu"):
        alphas_cumprod = (1 - betas).cumprod(0)  # alpha-bar
        previous = torch.cat([torch.ones(1, dtype=betas.dtype), alphas_cumprod[:-1]])
        posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)  # beta-tilde, DDPM equation 7
        posterior_variance[0] = posterior_variance[1]  # it is zero at t = 0, and its logarithm is wanted
        self.num_timesteps = len(betas)
        self.signal = alphas_cumprod.sqrt().to(device, torch.float32)
        self.noise = (1 - alphas_cumprod).sqrt().to(device, torch.float32)
        self.signal_to_noise = (alphas_cumprod / (1 - alphas_cumprod)).to(device, torch.float32)
        self.log_betas = betas.log().to(device, torch.float32)
        self.log_posterior_variance = posterior_variance.log().to(device, torch.float32)
        self.mean_of_start = (betas * previous.sqrt() / (1 - alphas_cumprod)).to(device, torch.float32)  # DDPM equation 7
        self.mean_of_noisy = ((1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod)).to(device, torch.float32)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """x_t from x_0, all (batch, channels, height, width). Source: DDPM equation 4."""
        return pick(self.signal, timestep) * latents + pick(self.noise, timestep) * noise

    def loss(self, output: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor,
             min_snr: float | None = None) -> torch.Tensor:
        """What a network's output costs for each picture, (batch,).

        Of `output` with as many channels as the latents, L_simple. With twice as many, predicted noise and then v of
        Improved DDPM's equation 15, L_simple + L_vlb: its equation 16 with DiT's weight 1. The bound trains the variance
        alone: the mean in it carries no gradient. With `min_snr` (gamma, 5 in its paper) L_simple has the weight
        min(SNR, gamma) / SNR. Source: Hang et al. 2023, "Efficient diffusion training via min-SNR weighting" (arXiv
        2303.09556), equation 8 with the weight of noise prediction.
        """
        predicted_noise, *learned = output.split(latents.shape[1], dim=1)
        simple = (predicted_noise - noise).square().flatten(1).mean(1)
        if min_snr is not None:
            snr = self.signal_to_noise[timestep]
            simple = simple * snr.clamp(max=min_snr) / snr
        if not learned:
            return simple
        return simple + self.variational_bound(predicted_noise.detach(), learned[0], latents, noise, timestep)

    def variational_bound(self, predicted_noise: torch.Tensor, v: torch.Tensor, latents: torch.Tensor,
                          noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """One term of the variational bound, in bits a dimension, (batch,). Source: Improved DDPM equations 4 to 7.

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at t = 0 the likelihood of x_0 in bins of 2/255.
        """
        noisy = self.add_noise(latents, noise, timestep)
        true_mean = self.posterior_mean(latents, noisy, timestep)
        true_log_variance = pick(self.log_posterior_variance, timestep)
        start = (noisy - pick(self.noise, timestep) * predicted_noise) / pick(self.signal, timestep)  # predicted x_0
        mean, log_variance = self.posterior_mean(start, noisy, timestep), self.log_variance(v, timestep)

        divergence = 0.5 * (log_variance - true_log_variance - 1 + (true_log_variance - log_variance).exp()
                            + (true_mean - mean).square() * (-log_variance).exp())
        surprise = -discretized_log_likelihood(latents, mean, 0.5 * log_variance)
        bits = torch.where(timestep.reshape(-1, 1, 1, 1) == 0, surprise, divergence) / math.log(2)
        return bits.flatten(1).mean(1)

    def posterior_mean(self, start: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Mean of q(x_{t-1} | x_t, x_0). Source: DDPM equation 7."""
        return pick(self.mean_of_start, timestep) * start + pick(self.mean_of_noisy, timestep) * noisy

    def log_variance(self, v: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Between the posterior variance (v = -1) and beta (v = 1). Source: Improved DDPM equation 15."""
        fraction = (v + 1) / 2
        return fraction * pick(self.log_betas, timestep) + (1 - fraction) * pick(self.log_posterior_variance, timestep)


def pick(table: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The entries of a table for each picture: (num_timesteps,), (batch,) -> (batch, 1, 1, 1)."""
    return table[timestep].reshape(-1, 1, 1, 1)


def discretized_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Log-probability, in nats, that a Gaussian gives each bin of width 2/255 around x; the outer bins are open.

    All three broadcast together. Source: DDPM equation 13.
    """
    def cdf(z):
        return 0.5 * (1 + torch.erf(z / math.sqrt(2)))

    upper = cdf((x + 1 / 255 - mean) * (-log_scale).exp())
    lower = cdf((x - 1 / 255 - mean) * (-log_scale).exp())
    upper = upper.masked_fill(x > 0.999, 1.0)
    lower = lower.masked_fill(x < -0.999, 0.0)
    return (upper - lower).clamp(min=1e-12).log()
