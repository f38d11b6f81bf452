"""nets/diffusion.py against the forward chain, products of Gaussians and a loss written apart, all in float64."""

import math

import pytest
import scipy.stats
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from nets.diffusion import GaussianDiffusion, cosine_betas, discretized_log_likelihood, linear_betas

BETAS = linear_betas()
ALPHAS = 1 - BETAS
SIGNAL_POWER = torch.log1p(-BETAS).cumsum(0).exp()  # alpha-bar
DIFFUSION = GaussianDiffusion(BETAS)
EVERY = torch.arange(1000)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def posterior(start, noisy, t):
    """Mean and variance of q(x_{t-1} | x_t, x_0), t >= 1: the product of what x_0 and what x_t say of x_{t-1}."""
    prior_mean, prior_precision = SIGNAL_POWER[t - 1].sqrt() * start, 1 / (1 - SIGNAL_POWER[t - 1])
    evidence_mean, evidence_precision = noisy / ALPHAS[t].sqrt(), ALPHAS[t] / BETAS[t]
    precision = prior_precision + evidence_precision
    return (prior_mean * prior_precision + evidence_mean * evidence_precision) / precision, 1 / precision


def bound(predicted, v, start, noise, t):
    """One term of the bound of one picture in bits a dimension; means by DDPM equation 11."""
    noisy = SIGNAL_POWER[t].sqrt() * start + (1 - SIGNAL_POWER[t]).sqrt() * noise

    def mean_given(eps):
        return (noisy - BETAS[t] / (1 - SIGNAL_POWER[t]).sqrt() * eps) / ALPHAS[t].sqrt()

    smallest = posterior(start, noisy, max(t, 1))[1]
    deviation = (BETAS[t] ** ((1 + v) / 2) * smallest ** ((1 - v) / 2)).sqrt()
    model = Normal(mean_given(predicted), deviation)
    if t:
        return kl_divergence(Normal(mean_given(noise), smallest.sqrt()), model).mean() / math.log(2)
    at_most, less = (torch.from_numpy(scipy.stats.norm.cdf(edge, model.loc, model.scale))
                     for edge in (start + 1 / 255, start - 1 / 255))
    bins = torch.where(start > 0.999, 1 - less, torch.where(start < -0.999, at_most, at_most - less))
    return -bins.clamp(min=1e-12).log2().mean()


def batch(timestep, scale=0.6):
    """Network output, latents and noise for each timestep, float32."""
    shape = (len(timestep), 3, 6, 6)
    latents, noise, miss = scale * torch.randn(shape), torch.randn(shape), 0.5 * torch.randn(shape)
    return torch.cat([noise + miss, 2 * torch.rand(shape) - 1], dim=1), latents, noise


def test_betas_are_those_of_upstreams_scheduler():
    torch.testing.assert_close(linear_betas().float(), DDPMScheduler(beta_schedule="linear").betas, rtol=1e-6, atol=0)


def test_cosine_betas_are_those_of_upstreams_scheduler_and_leave_a_squared_cosine():
    betas = cosine_betas()
    torch.testing.assert_close(betas.float(), DDPMScheduler(beta_schedule="squaredcos_cap_v2").betas, rtol=1e-5, atol=1e-9)
    shifted = (torch.arange(1, 1000, dtype=torch.float64) / 1000 + 0.008) / 1.008 * math.pi / 2  # the last beta is capped
    expected = shifted.cos() ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close((1 - betas).cumprod(0)[:-1], expected)


def test_noised_latents_have_the_moments_of_the_chain_of_single_steps():
    mean, variance, means, variances = 1.0, 0.0, [], []
    for beta in BETAS.tolist():  # x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) noise
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        means.append(mean)
        variances.append(variance)
    one, zero = torch.ones(1000, 1, 1, 1), torch.zeros(1000, 1, 1, 1)
    assert DIFFUSION.add_noise(one, zero, EVERY).flatten().tolist() == pytest.approx(means, rel=1e-6)
    assert DIFFUSION.add_noise(zero, one, EVERY).square().flatten().tolist() == pytest.approx(variances, rel=1e-6)


def test_noised_latents_are_those_of_upstreams_scheduler():
    timestep = torch.tensor([0, 1, 400, 999])
    _, latents, noise = batch(timestep)
    expected = DDPMScheduler(beta_schedule="linear").add_noise(latents, noise, timestep)
    torch.testing.assert_close(DIFFUSION.add_noise(latents, noise, timestep), expected, rtol=1e-4, atol=1e-5)


def test_the_posterior_mean_is_that_of_the_product_of_two_gaussians():
    timestep = EVERY[1:]
    start, noisy = torch.randn(2, 999, 1, 4, 4, dtype=torch.float64)
    expected = torch.stack([posterior(*pair, t)[0] for *pair, t in zip(start, noisy, timestep.tolist())])
    torch.testing.assert_close(DIFFUSION.posterior_mean(start, noisy, timestep), expected, rtol=1e-6, atol=1e-6)


def test_the_posterior_mean_at_the_first_step_is_the_picture():
    start, noisy = torch.randn(2, 1, 3, 4, 4)
    torch.testing.assert_close(DIFFUSION.posterior_mean(start, noisy, torch.tensor([0])), start)


def test_the_log_variance_runs_from_the_posteriors_at_minus_one_to_betas_at_one():
    ends = torch.stack([posterior(0.0, 0.0, max(t, 1))[1].log() for t in range(1000)]), BETAS.log()
    for v, expected in [(-1, ends[0]), (1, ends[1]), (0, (ends[0] + ends[1]) / 2)]:
        log_variance = DIFFUSION.log_variance(torch.full((1000, 1, 1, 1), float(v)), EVERY)
        torch.testing.assert_close(log_variance.flatten().double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("t", [0, 1, 2, 250, 999])
def test_the_hybrid_loss_is_the_error_of_the_noise_plus_the_bound_in_bits(t):
    timestep = torch.full((4,), t)
    output, latents, noise = batch(timestep)
    predicted, v = output.double().chunk(2, dim=1)
    expected = [(e - n).square().mean() + bound(e, w, x, n, t)
                for e, w, x, n in zip(predicted, v, latents.double(), noise.double())]
    loss = DIFFUSION.loss(output, latents, noise, timestep)
    torch.testing.assert_close(loss.double(), torch.stack(expected), rtol=2e-4, atol=1e-5)


def test_without_a_learned_variance_the_loss_is_the_error_of_the_noise_alone():
    timestep = torch.tensor([0, 30, 999])
    output, latents, noise = batch(timestep)
    expected = torch.stack([(e - n).square().mean() for e, n in zip(output[:, :3], noise)])
    torch.testing.assert_close(DIFFUSION.loss(output[:, :3], latents, noise, timestep), expected)


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_weighs_the_error_of_the_start_by_at_most_gamma(gamma):
    """A weight min(SNR, gamma) on the squared error of x_0, written with x_0 and not with the noise."""
    timestep = torch.tensor([0, 10, 200, 500, 999])
    output, latents, noise = batch(timestep)
    expected = []
    for predicted, start, eps, t in zip(output[:, :3].double(), latents.double(), noise.double(), timestep.tolist()):
        power = SIGNAL_POWER[t]
        noisy = power.sqrt() * start + (1 - power).sqrt() * eps
        guess = (noisy - (1 - power).sqrt() * predicted) / power.sqrt()
        expected.append(min(power / (1 - power), gamma) * (guess - start).square().mean())
    loss = DIFFUSION.loss(output[:, :3], latents, noise, timestep, min_snr=gamma)
    torch.testing.assert_close(loss.double(), torch.stack(expected), rtol=2e-4, atol=1e-8)
    bounds = DIFFUSION.variational_bound(*output.chunk(2, 1), latents, noise, timestep)
    torch.testing.assert_close(DIFFUSION.loss(output, latents, noise, timestep, min_snr=gamma), loss + bounds)


def test_each_picture_is_scored_at_its_own_timestep():
    timestep = torch.tensor([999, 0, 30, 0])
    output, latents, noise = batch(timestep)
    alone = [DIFFUSION.loss(*(part[i : i + 1] for part in (output, latents, noise, timestep))) for i in range(4)]
    torch.testing.assert_close(DIFFUSION.loss(output, latents, noise, timestep), torch.cat(alone))


def test_the_bound_sends_no_gradient_to_the_predicted_noise():
    timestep = torch.tensor([0, 1, 500, 999])
    output, latents, noise = batch(timestep)
    output.requires_grad_()
    DIFFUSION.loss(output, latents, noise, timestep).sum().backward()
    of_noise = output.grad[:, :3]
    torch.testing.assert_close(of_noise, 2 * (output[:, :3] - noise).detach() / noise[0].numel())


def test_the_gradient_of_the_variance_is_the_bounds():
    timestep = torch.tensor([1, 500, 999])
    output, latents, noise = batch(timestep)
    output.requires_grad_()
    DIFFUSION.loss(output, latents, noise, timestep).sum().backward()
    apart = output.detach().double().requires_grad_()
    terms = zip(*apart.chunk(2, dim=1), latents.double(), noise.double(), timestep.tolist())
    sum(bound(*term) for term in terms).backward()
    torch.testing.assert_close(output.grad[:, 3:].double(), apart.grad[:, 3:], rtol=1e-3, atol=1e-7)


def test_a_perfect_prediction_with_the_posteriors_variance_has_no_divergence():
    noise, latents = torch.randn(2, 999, 1, 4, 4)
    term = DIFFUSION.variational_bound(noise, -torch.ones_like(noise), latents, noise, EVERY[1:])
    torch.testing.assert_close(term, torch.zeros(999), rtol=0, atol=1e-6)


def test_a_perfect_mean_with_betas_variance_costs_the_divergence_of_the_two_variances():
    noise, latents = torch.randn(2, 999, 1, 4, 4)
    term = DIFFUSION.variational_bound(noise, torch.ones_like(noise), latents, noise, EVERY[1:])
    ratio = torch.stack([posterior(0.0, 0.0, t)[1] / BETAS[t] for t in range(1, 1000)])
    torch.testing.assert_close(term.double(), (ratio - 1 - ratio.log()) / (2 * math.log(2)), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mean, deviation", [(0.0, 0.3), (0.95, 0.01), (-1.5, 1.0), (0.2, 0.002)])
def test_the_likelihoods_of_all_bins_sum_to_one(mean, deviation):
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    logs = discretized_log_likelihood(levels, torch.tensor(mean, dtype=torch.float64),
                                      torch.tensor(deviation, dtype=torch.float64).log())
    assert logs.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_the_likelihood_of_a_bin_is_the_gaussians_mass_in_it():
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    edges = [-math.inf, *((levels[1:] + levels[:-1]) / 2).tolist(), math.inf]
    mass = torch.tensor(scipy.stats.norm.cdf(edges, 0.1, 0.4)).diff()
    logs = discretized_log_likelihood(levels, torch.tensor(0.1), torch.tensor(math.log(0.4), dtype=torch.float64))
    torch.testing.assert_close(logs.exp(), mass, rtol=1e-5, atol=1e-9)


def test_a_picture_far_outside_its_gaussian_has_a_finite_likelihood():
    far = discretized_log_likelihood(torch.tensor([0.9]), torch.tensor([-0.9]), torch.tensor([-6.0]))
    assert far.item() == pytest.approx(math.log(1e-12))
