"""nets/guidance.py against what upstream's pipeline hands its scheduler, and against the theory."""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, EulerDiscreteScheduler

from nets.guidance import guide, guided_steps, noise_level, split_variance


def recorded_step(monkeypatch, out_channels, guidance_scale):
    """One step of upstream's pipeline for two pictures: the network's output, and what the scheduler is given."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, sample_size=4,
                                        out_channels=out_channels, num_layers=1)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    pipeline = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    record, step = {}, pipeline.scheduler.step

    def recording_step(model_output, *args):
        record["stepped"] = model_output
        return step(model_output, *args)

    monkeypatch.setattr(pipeline.scheduler, "step", recording_step)
    transformer.register_forward_hook(lambda module, args, output: record.update(output=output.sample))
    pipeline([1, 2], guidance_scale=guidance_scale, num_inference_steps=1, output_type="pt")
    return record["output"], record["stepped"]


@pytest.mark.parametrize("out_channels", [4, 8])
@pytest.mark.parametrize("guidance_scale", [1.5, 4.0])
def test_guided_noise_equals_what_upstream_gives_its_scheduler(monkeypatch, out_channels, guidance_scale):
    output, stepped = recorded_step(monkeypatch, out_channels, guidance_scale)
    conditional, unconditional = split_variance(output, 4)[0].chunk(2)
    assert torch.equal(guide(conditional, unconditional, guidance_scale), stepped[:2])


@pytest.mark.parametrize("out_channels", [4, 8])
def test_unguided_noise_equals_what_upstream_gives_its_scheduler(monkeypatch, out_channels):
    output, stepped = recorded_step(monkeypatch, out_channels, 1.0)
    assert torch.equal(split_variance(output, 4)[0], stepped)


def test_scale_one_is_the_conditional_and_scale_zero_the_unconditional_prediction():
    conditional, unconditional = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional, rtol=0, atol=1e-14)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)


@pytest.mark.parametrize("guidance_scale", [0.5, 1.0, 4.0])
def test_guided_scores_are_those_of_the_sharpened_density(guidance_scale):
    x = torch.linspace(-2, 2, 32, dtype=torch.float64).reshape(2, 4, 2, 2).requires_grad_()
    marginal = torch.distributions.Normal(0.0, 1.0).log_prob(x)
    given_class = torch.distributions.Normal(0.7, 0.5).log_prob(x)
    sharpened = marginal + guidance_scale * (given_class - marginal)  # p(x) p(c | x)^scale, unnormalised
    target, conditional, unconditional = (
        torch.autograd.grad(density.sum(), x, retain_graph=True)[0] for density in (sharpened, given_class, marginal))
    torch.testing.assert_close(guide(conditional, unconditional, guidance_scale), target, rtol=1e-12, atol=1e-12)


def test_three_guided_channels_are_the_originals_guidance():
    output = torch.randn(4, 8, 2, 2)  # conditional pictures 0 and 1, unconditional ones behind them
    conditional, unconditional = output[:2], output[2:]
    expected = conditional[:, :4].clone()
    for channel in range(3):
        expected[:, channel] = unconditional[:, channel] + 1.5 * (conditional[:, channel] - unconditional[:, channel])
    assert torch.equal(guide(*output[:, :4].chunk(2), 1.5, guidance_channels=3), expected)
    assert torch.equal(guide(*output[:, :4].chunk(2), 1.5, guidance_channels=4), guide(*output[:, :4].chunk(2), 1.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_guidance_keeps_the_dtype(dtype):
    assert guide(torch.ones(1, 4, 2, 2, dtype=dtype), torch.zeros(1, 4, 2, 2, dtype=dtype), 4.0).dtype == dtype


@pytest.mark.parametrize("channels", [1, 3, 5, 7, 9, 12])
def test_another_number_of_channels_is_refused_in_one_line(channels):
    with pytest.raises(ValueError, match=rf"gave {channels} channels for latents of 4; expected 4, or 8 .*$") as error:
        split_variance(torch.zeros(1, channels, 2, 2), 4)
    assert "\n" not in str(error.value)


def test_noise_levels_are_eulers_sigmas_between_whole_timesteps_too():
    scheduler = EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    scheduler.set_timesteps(30)
    assert (scheduler.timesteps % 1 != 0).any()
    torch.testing.assert_close(noise_level(scheduler.timesteps, scheduler.alphas_cumprod), scheduler.sigmas[:-1],
                               rtol=2e-2, atol=1e-4)
    whole = torch.tensor([0, 1, 500, 999])
    expected = ((1 - scheduler.alphas_cumprod[whole]) / scheduler.alphas_cumprod[whole]).sqrt()
    torch.testing.assert_close(noise_level(whole, scheduler.alphas_cumprod), expected)


def test_an_infinite_noise_level_is_one():
    alphas_cumprod = torch.tensor([0.5, 0.2, 0.0])
    assert noise_level(torch.tensor([2.0, 0.0]), alphas_cumprod).tolist() == [float("inf"), 1.0]
    assert guided_steps(torch.tensor([2, 0]), alphas_cumprod, 2.0, (0, float("inf"))) == [True, True]


def test_an_interval_guides_the_noise_levels_over_the_lower_and_up_to_the_higher_end():
    alphas_cumprod = 1 / (1 + torch.tensor([0.5, 1.0, 2.0, 4.0]) ** 2)  # sigma 0.5, 1, 2, 4 at t = 0, 1, 2, 3
    timesteps = torch.tensor([3, 2, 1, 0])
    assert guided_steps(timesteps, alphas_cumprod, 2.0, (0.9, 3.0)) == [False, True, True, False]
    assert guided_steps(timesteps, alphas_cumprod, 2.0, (0.0, float("inf"))) == [True] * 4
    assert guided_steps(timesteps, alphas_cumprod, 2.0) == [True] * 4
    assert guided_steps(timesteps, alphas_cumprod, 1.0, (0.0, 3.0)) == [False] * 4
