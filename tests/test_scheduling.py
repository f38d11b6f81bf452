"""nets/scheduling.py: every scheduler of diffusers under the pipeline, and DDPM's learned variance against its formulas."""

import diffusers
import pytest
import torch
from conftest import ROOT, tiny_pipeline
from diffusers.schedulers import KarrasDiffusionSchedulers

from nets.scheduling import (
    PRESETS,
    SCHEDULERS,
    find_schedule,
    learns_variance,
    make_scheduler,
    paper_scheduler,
    published_scheduler,
    set_timesteps,
    use_preset,
)

WORKING = [scheduler.name for scheduler in KarrasDiffusionSchedulers if scheduler.name != "EDMEulerScheduler"]
STOCHASTIC = ["DDPMScheduler", "DPMSolverSDEScheduler", "EulerAncestralDiscreteScheduler",
              "KDPM2AncestralDiscreteScheduler"]


def with_scheduler(pipeline, name, **config):
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **config)
    return pipeline


def latents(pipeline, class_labels, generator, steps=4, **arguments):
    return pipeline(class_labels, generator=generator, num_inference_steps=steps, output_type="latent", **arguments).images


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def classifier():
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(ROOT / "model_data/fashion-mnist-classifier").eval()


@pytest.mark.parametrize("name", [*WORKING, "learned range"])
def test_every_scheduler_makes_recognisable_pictures(name, small_model, classifier):
    """20 pictures; noise would be recognised two times. bench/schedulers.py measures 500."""
    if name == "learned range":
        small_model.scheduler = paper_scheduler(small_model.scheduler)
    else:
        with_scheduler(small_model, name)
    labels = torch.arange(20) % 10
    images = small_model(labels, 2.0, torch.Generator().manual_seed(3), 50 if "DDPM" in name or "learned" in name else 15,
                         output_type="pt").images
    with torch.no_grad():
        found = classifier(images * 2 - 1).logits.argmax(1)
    assert (found == labels).sum() >= 16


@pytest.mark.parametrize("name, config", [*((name, {}) for name in WORKING),
                                          ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"})])
def test_one_seed_is_one_picture_and_another_seed_another(name, config, pipeline):
    with_scheduler(pipeline, name, **config)
    first, again, other = (latents(pipeline, [3, 4], *seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("name", WORKING)
def test_with_a_list_of_generators_a_picture_depends_on_its_own_alone(name, pipeline):
    with_scheduler(pipeline, name)
    together = latents(pipeline, [3, 4, 5], seeded(0, 1, 2))
    alone = latents(pipeline, [4], seeded(1))
    in_other_company = latents(pipeline, [9, 4], seeded(7, 1))
    torch.testing.assert_close(together[1], alone[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_other_company[1], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_in_the_steps_comes_from_the_generator_too(name, pipeline):
    with_scheduler(pipeline, name)
    noise = torch.randn(1, 4, 8, 8)
    first, other = (latents(pipeline, [3], *seeded(seed), latents=noise) for seed in (0, 1))
    assert not torch.allclose(first, other, atol=1e-2)


@pytest.mark.parametrize("name", WORKING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_scheduler_works_in_half_precision(name, dtype, pipeline):
    with_scheduler(pipeline, name).to(dtype)
    images = pipeline([3], generator=seeded(0), num_inference_steps=4, output_type="np").images
    assert images.shape == (1, 16, 16, 3) and 0.01 < images.std() < 1


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_scheduler_of_another_parameterisation_is_refused_by_name_with_the_reason(name, pipeline):
    pipeline.scheduler = getattr(diffusers, name)()
    with pytest.raises(ValueError, match=f"^{name} has no schedule of betas") as error:
        pipeline([3])
    assert "\n" not in str(error.value)


def test_a_learned_variance_that_the_model_lacks_is_refused():
    pipeline = with_scheduler(tiny_pipeline(out_channels=None), "DDPMScheduler", variance_type="learned_range")
    with pytest.raises(ValueError, match=r"learned_range.* needs a model with a learned variance, 8 .* has 4$"):
        pipeline([3])


@pytest.mark.parametrize("name", WORKING)
def test_a_scheduler_made_after_the_papers_does_not_inherit_its_variance(name, pipeline):
    short = next(short for short, class_name in SCHEDULERS.items() if class_name == name)
    expected = latents(with_scheduler(pipeline, name), [3], *seeded(0))
    pipeline.scheduler = make_scheduler(short, paper_scheduler(pipeline.scheduler))
    assert not learns_variance(pipeline.scheduler) and latents(pipeline, [3], *seeded(0)).shape == expected.shape
    if name in ("EulerDiscreteScheduler", "DDIMScheduler", "UniPCMultistepScheduler"):
        pipeline.scheduler = getattr(diffusers, name).from_config(paper_scheduler(pipeline.scheduler).config)
        assert latents(pipeline, [3], *seeded(0)).shape == expected.shape


def test_a_solver_that_cuts_a_learned_variance_for_three_channels_is_refused(pipeline):
    with_scheduler(pipeline, "DPMSolverMultistepScheduler", variance_type="learned_range")
    with pytest.raises(ValueError, match=r"^DPMSolverMultistepScheduler takes .* make it with variance_type=None$"):
        pipeline([3])


def test_without_a_generator_a_scheduler_keeps_its_own_seed(pipeline):
    with_scheduler(pipeline, "DPMSolverSDEScheduler", noise_sampler_seed=5)
    noise = torch.randn(1, 4, 8, 8)
    first, again = (latents(pipeline, [3], None, latents=noise) for _ in range(2))
    assert torch.equal(first, again)
    latents(pipeline, [3], *seeded(0), latents=noise)
    assert torch.equal(latents(pipeline, [3], None, latents=noise), first)


def test_the_papers_sampler_has_the_models_betas(small_model):
    scheduler = paper_scheduler(small_model.scheduler)
    assert learns_variance(scheduler) and not learns_variance(small_model.scheduler)
    assert scheduler.config.timestep_spacing == "linspace" and scheduler.config.clip_sample is False
    assert torch.equal(scheduler.betas, small_model.scheduler.betas)
    timesteps = set_timesteps(scheduler, PRESETS["paper"]["num_inference_steps"])
    assert len(timesteps) == 250 and (timesteps[0], timesteps[-1]) == (999, 0)


def test_learned_range_is_the_ancestral_step_of_improved_diffusion(pipeline):
    """Nichol & Dhariwal 2021: equations 10 (mean), 15 (variance) for the spaced steps of its section 4, in float64."""
    pipeline.transformer.double()
    pipeline.scheduler = paper_scheduler(pipeline.scheduler)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    cumulative = torch.cumprod(1 - betas, 0)  # the scheduler has these in float32; its formulas are what is tested
    vars(pipeline.scheduler).update(betas=betas, alphas=1 - betas, alphas_cumprod=cumulative, one=torch.ones(()).double())
    outputs, states = [], []
    pipeline.transformer.register_forward_hook(lambda module, args, output: outputs.append(output.sample))
    final = latents(pipeline, [3, 4], torch.Generator().manual_seed(0), 10, guidance_scale=1.5, guidance_channels=3,
                    callback_on_step_end=lambda pipe, step, timestep, tensors: states.append(tensors["latents"]))
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    timesteps = torch.linspace(999, 0, 10, dtype=torch.float64).round().long()
    assert torch.equal(pipeline.scheduler.timesteps, timesteps) and torch.equal(states[-1], final)
    for step, timestep in enumerate(timesteps):
        now = cumulative[timestep]
        previous = cumulative[timesteps[step + 1]] if step < 9 else torch.tensor(1.0, dtype=torch.float64)
        beta = 1 - now / previous
        conditional, unconditional = outputs[step].chunk(2)
        noise = conditional[:, :4].clone()
        noise[:, :3] = unconditional[:, :3] + 1.5 * (conditional[:, :3] - unconditional[:, :3])
        start = (before - (1 - now).sqrt() * noise) / now.sqrt()
        mean = (previous.sqrt() * beta * start + (now / previous).sqrt() * (1 - previous) * before) / (1 - now)
        if step < 9:
            share = (conditional[:, 4:] + 1) / 2
            log_variance = share * beta.log() + (1 - share) * (beta * (1 - previous) / (1 - now)).log()
            mean = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=generator, dtype=torch.float64)
        assert (states[step] - mean).abs().max() < 1e-6
        before = states[step]


def test_timesteps_and_sigmas_go_to_schedulers_that_take_them(pipeline):
    seen = []
    hook = dict(callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(float(timestep)))
    latents(with_scheduler(pipeline, "DDPMScheduler"), [3], *seeded(0), timesteps=[900, 500, 100], **hook)
    assert seen == [900, 500, 100]
    seen.clear()
    latents(with_scheduler(pipeline, "EulerDiscreteScheduler"), [3], *seeded(0), sigmas=[10.0, 1.0, 0.1, 0.0], **hook)
    assert len(seen) == 3 and pipeline.scheduler.sigmas[0] == 10


@pytest.mark.parametrize("arguments, message", [
    ({"timesteps": [900, 1]}, "DDIMScheduler does not take timesteps="),
    ({"sigmas": [1.0]}, "DDIMScheduler does not take sigmas="),
    ({"timesteps": [1], "sigmas": [1.0]}, "cannot both be given"),
])
def test_a_list_of_steps_that_would_be_lost_is_refused(arguments, message, pipeline):
    with pytest.raises(ValueError, match=message):
        pipeline([3], **arguments)


def test_eta_makes_ddim_stochastic_and_is_refused_elsewhere(pipeline):
    noise = torch.randn(1, 4, 8, 8)
    still, again = (latents(pipeline, [3], *seeded(seed), latents=noise) for seed in (0, 1))
    moved, other = (latents(pipeline, [3], *seeded(seed), latents=noise, eta=1.0) for seed in (0, 1))
    assert torch.equal(still, again) and not torch.allclose(moved, other, atol=1e-2)
    with pytest.raises(ValueError, match=r"PNDMScheduler does not take eta=0\.5"):
        with_scheduler(pipeline, "PNDMScheduler")([3], eta=0.5)


@pytest.mark.parametrize("spacing, of_upstream", [
    ("leading", {"timestep_spacing": "leading"}), ("trailing", {"timestep_spacing": "trailing"}),
    ("karras", {"use_karras_sigmas": True}), ("logsnr", {"use_lu_lambdas": True})])
def test_spacings_put_the_timesteps_where_diffusers_does(spacing, of_upstream, pipeline):
    own = pipeline.scheduler
    expected = diffusers.DPMSolverMultistepScheduler.from_config(own.config, **of_upstream)
    found = make_scheduler("dpm", own, spacing)
    assert torch.equal(set_timesteps(found, 10), set_timesteps(expected, 10))
    assert not torch.equal(found.timesteps, set_timesteps(make_scheduler("dpm", own), 10))
    assert torch.equal(found.betas, own.betas)


def test_a_spacing_that_a_scheduler_does_not_have_is_refused_in_one_line(pipeline):
    with pytest.raises(ValueError, match=r"^DDIMScheduler has no spacing 'karras'; leave it out$"):
        make_scheduler("ddim", pipeline.scheduler, "karras")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_scheduler_and_arguments_of_the_call(name, pipeline):
    own = pipeline.scheduler
    pipeline.scheduler, sampling = use_preset(name, own)
    assert type(pipeline.scheduler).__name__ == SCHEDULERS[PRESETS[name]["scheduler"]]
    assert torch.equal(pipeline.scheduler.betas, own.betas)
    pipeline([1], **sampling, output_type="latent")
    assert pipeline.num_timesteps == sampling["num_inference_steps"]


def test_a_preset_after_another_is_what_it_is_alone(pipeline):
    for first in PRESETS:
        for then in PRESETS:
            after, alone = (use_preset(then, before)[0] for before in (use_preset(first, pipeline.scheduler)[0],
                                                                       pipeline.scheduler))
            after.set_timesteps(7), alone.set_timesteps(7)
            assert torch.equal(after.timesteps, alone.timesteps), (first, then)
    odd = make_scheduler("dpm", pipeline.scheduler)
    odd = type(odd).from_config(odd.config, use_beta_sigmas=True, timestep_spacing="trailing")
    for after, alone in zip((use_preset("reference", odd)[0], make_scheduler("dpm", odd, "logsnr")),
                            (use_preset("reference", pipeline.scheduler)[0],
                             make_scheduler("dpm", pipeline.scheduler, "logsnr"))):
        after.set_timesteps(7), alone.set_timesteps(7)
        assert torch.equal(after.timesteps, alone.timesteps)


def test_the_betas_of_a_scheduler_are_known_by_their_values():
    assert find_schedule(diffusers.DDPMScheduler.from_config(published_scheduler().config)) == "linear"
    trained = diffusers.DDIMScheduler(trained_betas=published_scheduler("squaredcos_cap_v2").betas.tolist())
    assert find_schedule(trained) == "squaredcos_cap_v2"
    for other in (diffusers.DDIMScheduler(beta_schedule="scaled_linear"), diffusers.DDIMScheduler(beta_end=0.012),
                  diffusers.DDIMScheduler(num_train_timesteps=100), diffusers.FlowMatchEulerDiscreteScheduler(),
                  diffusers.DDIMScheduler(prediction_type="v_prediction")):
        with pytest.raises(ValueError, match=type(other).__name__):
            find_schedule(other)


def test_an_unknown_preset_is_refused_with_the_names_of_those_that_are(pipeline):
    with pytest.raises(ValueError, match=r"^there is no preset 'quick'; there are paper, reference, balanced"):
        use_preset("quick", pipeline.scheduler)


def test_presets_stay_as_near_to_250_steps_on_the_shipped_model_as_they_were_measured(small_model):
    own, interval = small_model.scheduler, (0.0, 3.0)

    def made(num_inference_steps, interval):
        return small_model(list(range(5)), guidance_scale=1.5, guidance_interval=interval, output_type="pt",
                           num_inference_steps=num_inference_steps, generator=torch.Generator().manual_seed(4000)).images

    small_model.scheduler = make_scheduler("dpm", own)
    throughout, within = made(250, None), made(250, interval)
    for name, exact, measured in (("reference", throughout, 50.6), ("balanced", within, 42.4), ("fast", within, 33.6),
                                  ("draft", within, 31.5)):
        small_model.scheduler, sampling = use_preset(name, own)
        error = (made(sampling["num_inference_steps"], sampling.get("guidance_interval")) - exact).square().mean()
        assert abs(-10 * error.log10() - measured) < 2, name
