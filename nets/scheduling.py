"""What a pipeline asks of a scheduler, so that every scheduler of diffusers for epsilon-predicting models works.

Each scheduler class takes its own arguments; here the pipeline's are handed to those that understand them, and refused, by
the scheduler's name, where they would be lost.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a command line reads the table before anything heavy is imported
    import torch
    from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin

# Short names of diffusers' schedulers for models that predict noise. All of `KarrasDiffusionSchedulers`, but for
# EDMEulerScheduler, which is for another parameterisation; and DDPM with the learned variance as the paper has it.
SCHEDULERS = {
    "dpm": "DPMSolverMultistepScheduler", "ddim": "DDIMScheduler", "ddpm": "DDPMScheduler",
    "ddpm-learned": "DDPMScheduler", "euler": "EulerDiscreteScheduler", "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler", "unipc": "UniPCMultistepScheduler", "deis": "DEISMultistepScheduler",
    "dpm-single": "DPMSolverSinglestepScheduler", "dpm-sde": "DPMSolverSDEScheduler", "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2-a": "KDPM2AncestralDiscreteScheduler", "lms": "LMSDiscreteScheduler", "pndm": "PNDMScheduler",
}
# Where a scheduler puts its timesteps: evenly, from the first, over both ends or to the last; at Karras et al.'s sigmas
# (arXiv 2206.00364, eq. 5), or evenly in log-SNR (DPM-Solver, arXiv 2206.00927, section 3.4).
SPACINGS = {"leading": {"timestep_spacing": "leading"}, "linspace": {"timestep_spacing": "linspace"},
            "trailing": {"timestep_spacing": "trailing"}, "karras": {"use_karras_sigmas": True},
            "logsnr": {"use_lu_lambdas": True}}
# All of a config that says so.
PLACING = ("timestep_spacing", "use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas")
# Time against quality, measured in docs/speed.md: a scheduler, its spacing, keyword arguments of the pipeline's call.
# "paper" is the sampling that the DiT paper reports (section 4; improved diffusion's ancestral sampler).
PRESETS = {
    "paper": {"scheduler": "ddpm-learned", "spacing": "linspace", "num_inference_steps": 250, "guidance_scale": 1.5,
              "guidance_channels": 3},
    "reference": {"scheduler": "dpm", "spacing": "linspace", "num_inference_steps": 50},
    "balanced": {"scheduler": "dpm", "spacing": "logsnr", "num_inference_steps": 15, "guidance_interval": (0.0, 3.0)},
    "fast": {"scheduler": "dpm", "spacing": "logsnr", "num_inference_steps": 8, "guidance_interval": (0.0, 3.0)},
    "draft": {"scheduler": "unipc", "spacing": "linspace", "num_inference_steps": 6, "guidance_interval": (0.0, 3.0)},
}


def make_scheduler(name: str, scheduler: SchedulerMixin, spacing: str | None = None) -> SchedulerMixin:
    """The scheduler of that name in `SCHEDULERS`, with the betas of a model's own; "ddpm-learned" is the paper's.

    `spacing`, one of `SPACINGS`, is where its timesteps lie; None, where the class puts them.
    Raises KeyError for another name, ImportError if it needs a package that is not there, ValueError for a spacing that it
    does not know.
    """
    import diffusers

    if name == "ddpm-learned":
        made = paper_scheduler(scheduler)
    else:  # a variance_type is another class's
        config = {key: value for key, value in scheduler.config.items() if key != "variance_type"}
        made = getattr(diffusers, SCHEDULERS[name]).from_config(config)
    if spacing is None:
        return made
    (option, value), = SPACINGS[spacing].items()
    if option not in inspect.signature(type(made).__init__).parameters:
        raise ValueError(f"{type(made).__name__} has no spacing {spacing!r}; leave it out")
    return type(made).from_config({key: kept for key, kept in made.config.items() if key not in PLACING}, **{option: value})


def use_preset(name: str, scheduler: SchedulerMixin) -> tuple[SchedulerMixin, dict]:
    """The scheduler of a preset, with the betas of a model's own, and the keyword arguments of the pipeline's call.

    `pipe.scheduler, sampling = use_preset("fast", pipe.scheduler)`, then `pipe(ids, **sampling)`.
    Raises ValueError for a name that is not in `PRESETS`.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    sampling = dict(PRESETS[name])
    return make_scheduler(sampling.pop("scheduler"), scheduler, sampling.pop("spacing")), sampling


def published_scheduler(beta_schedule: str = "linear") -> DDIMScheduler:
    """The scheduler of the published folders: the betas that DiT is trained with, and no `timestep_spacing`.

    So each scheduler class that is made from its config keeps its own spacing. Improved DDPM's cosine betas are
    "squaredcos_cap_v2".
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule=beta_schedule,
                         trained_betas=None, clip_sample=False, set_alpha_to_one=True, steps_offset=0,
                         prediction_type="epsilon")


def find_schedule(scheduler: SchedulerMixin) -> str:
    """The `beta_schedule` of `published_scheduler` that has the betas of this one.

    Raises ValueError, in one line, for other betas, and for models that do not predict noise.
    """
    found = getattr(scheduler, "alphas_cumprod", None)
    for schedule in ("linear", "squaredcos_cap_v2"):
        wanted = published_scheduler(schedule).alphas_cumprod
        same = found is not None and found.shape == wanted.shape and (found - wanted).abs().max() < 1e-4
        if same and scheduler.config.prediction_type == "epsilon":
            return schedule
    raise ValueError(f"{type(scheduler).__name__} has not DiT's linear betas or the cosine ones, or is for another "
                     "prediction than noise")


def paper_scheduler(scheduler: SchedulerMixin) -> DDPMScheduler:
    """The paper's sampler with the betas of a model's scheduler: DDPM, evenly spaced, with the learned variance."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(scheduler.config, variance_type="learned_range", timestep_spacing="linspace",
                                     clip_sample=False)


def require_schedule(scheduler: SchedulerMixin, out_channels: int, latent_channels: int):
    """Raise a ValueError, in one line, for a scheduler that cannot work with this network's output."""
    name = type(scheduler).__name__
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{name} has no schedule of betas; a DiT predicts the noise of one, and this scheduler is for "
                         "models of another parameterisation (EDM's preconditioning, flow matching)")
    if learns_variance(scheduler) and name != "DDPMScheduler":
        raise ValueError(f"{name} takes a learned variance beside three channels alone; make it with variance_type=None")
    if learns_variance(scheduler) and out_channels != 2 * latent_channels:
        raise ValueError(f"{name} with variance_type={scheduler.config.variance_type!r} needs a model with a learned "
                         f"variance, {2 * latent_channels} output channels; this one has {out_channels}")


def learns_variance(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler's step takes the network's variance beside its noise.

    A config keeps the `variance_type` of the class that it was made for; it counts if this class knows it.
    """
    known = "variance_type" in inspect.signature(type(scheduler).__init__).parameters
    return known and scheduler.config.get("variance_type") in ("learned", "learned_range")


def set_timesteps(scheduler: SchedulerMixin, num_inference_steps: int, timesteps: list[int] | None = None,
                  sigmas: list[float] | None = None) -> torch.Tensor:
    """Set a scheduler's steps, by their number or by a list of its timesteps or sigmas; returns its timesteps.

    Raises ValueError for both lists, or one that this scheduler does not take.
    """
    if timesteps is None and sigmas is None and num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps} must be 1 or more")
    given = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
    if len(given) > 1:
        raise ValueError("timesteps and sigmas cannot both be given")
    for name in given:
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{type(scheduler).__name__} does not take {name}=; give num_inference_steps")
    scheduler.set_timesteps(**(given or {"num_inference_steps": num_inference_steps}))
    return scheduler.timesteps


def step_arguments(scheduler: SchedulerMixin, batch_size: int, generator=None, eta: float = 0.0) -> dict:
    """What the scheduler's `step` takes beside the prediction: the generator of its noise, and DDIM's eta.

    `generator` is one for all pictures or a list of one for each. A scheduler with a noise source of its own gets its seeds
    from there; without a generator it keeps its own. Raises ValueError for an `eta` that is not in 0..1 or that the
    scheduler does not take.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} is not in 0..1")
    parameters = inspect.signature(scheduler.step).parameters
    if eta and "eta" not in parameters:
        raise ValueError(f"{type(scheduler).__name__} does not take eta={eta}; DDIMScheduler does")
    if hasattr(scheduler, "noise_sampler_seed"):  # DPMSolverSDEScheduler: a Brownian tree for each picture
        import torch

        generators = generator if isinstance(generator, list) else [generator] * batch_size
        scheduler.noise_sampler_seed = scheduler.config.noise_sampler_seed if generator is None else [
            int(torch.randint(2**62, (), generator=one, device=one.device)) for one in generators]
    arguments = {"generator": generator, "eta": eta}
    return {name: value for name, value in arguments.items() if name in parameters}
