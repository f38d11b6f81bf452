"""From class ids to pictures: noise, a guided denoising loop, the VAE's decoder.

Mirrors `DiTPipeline` of diffusers 0.42: its signature, defaults and pictures. The sampling loop of DiT (arXiv 2212.09748)
is section 3.1, "Diffusion formulation" and "Classifier-free guidance".
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    ConsistencyDecoderVAE,
    DiffusionPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    VQModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor

from nets.acceleration import compile_at_first_call
from nets.guidance import guide, guided_steps, split_variance
from nets.labels import check_class_ids, find_label_ids, label_table
from nets.loading import CLASS_ON_DISK, find_folder, leave_out_defaults, load_parts
from nets.scheduling import learns_variance, require_schedule, set_timesteps, step_arguments
from nets.transformer_2d import Transformer2DModel

VAE = AutoencoderKL | AutoencoderTiny | AsymmetricAutoencoderKL | AutoencoderDC | ConsistencyDecoderVAE | VQModel
CONDITIONING_BYTES = 256 * 2**20  # how much of the steps' conditioning is computed at a time
DECODED_PIXELS = 8 * 256**2  # how much is decoded at a time


class DiTPipeline(DiffusionPipeline):
    """Class-conditional pictures from a latent DiT.

    Args: `transformer`, this library's or diffusers' `DiTTransformer2DModel`; `vae`; `scheduler`; `id2label`, class id ->
    comma-separated names. `labels` is upstream's dictionary name -> id.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, transformer: Transformer2DModel | DiTTransformer2DModel, vae: VAE,
                 scheduler: KarrasDiffusionSchedulers, id2label: dict | None = None):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label=id2label)
        self.labels = label_table(id2label)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, compile: bool = False, **kwargs):
        """As diffusers' `from_pretrained`, for a folder or a hub id; the transformer is always this library's.

        With `compile` the first call compiles transformer and decoder, on the device where they are by then: the same
        pictures up to rounding, the first of each batch size later and the others sooner (nets/acceleration.py).
        Raises OSError or ValueError, in one line, where a file is missing, damaged or of another network, or the hub is
        out of reach. Code in a file is never run: `.bin` weights are read with `weights_only=True`.
        """
        folder = find_folder(pretrained_model_name_or_path, **kwargs)
        parts = load_parts(folder, **kwargs)
        pipeline = super().from_pretrained(folder, **{**kwargs, **parts})
        return compile_at_first_call(pipeline) if compile else pipeline

    def save_config(self, save_directory, **kwargs):
        """Write `model_index.json`, in which the transformer has the name under which diffusers knows it."""
        if self.transformer is not None:
            self.register_to_config(transformer=CLASS_ON_DISK["transformer"])
        super().save_config(save_directory, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        """As diffusers' `save_pretrained`; class names are kept, and the scheduler's defaults are not pinned.

        Raises ValueError for a transformer that was quantised.
        """
        if getattr(self.transformer, "quantized", False):
            raise ValueError("int8 weights are not saved; load the pipeline anew and save that")
        super().save_pretrained(save_directory, **kwargs)
        leave_out_defaults(self.scheduler, Path(save_directory) / "scheduler")

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """The class ids of one name or a list of names; `crane#134`, `#134` and `134` are understood too.

        Raises ValueError for a name that the model does not know, or that it knows for several classes.
        """
        return find_label_ids(label, self.config.id2label)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | torch.Tensor,
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        num_images_per_label: int = 1,
        height: int | None = None,
        width: int | None = None,
        latents: torch.Tensor | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        eta: float = 0.0,
        guidance_channels: int | None = None,
        guidance_interval: tuple[float, float] | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Make `num_images_per_label` pictures for each class id.

        Args: `class_labels`, ids in 0..num_embeds_ada_norm, the last one meaning no class. `guidance_scale`, guided if over
        1. `generator`, of all noise: one for the call, or a list of one a picture, which then depends on its own alone.
        `output_type`: "pil", "np" (batch, height, width, 3) float32 in 0..1, "pt" (batch, 3, height, width) in 0..1, or
        "latent" (batch, channels, height, width) as the denoising ends.
        `height` and `width` in pixels, the trained size by default. `latents`, the initial noise of variance 1 in place of
        the generator's. `timesteps` or `sigmas`, in place of `num_inference_steps`, and `eta`, DDIM's share of fresh noise
        in 0..1, where the scheduler takes them. `guidance_channels`, how many of the latent channels are guided: all by
        default, the first 3 in facebookresearch/DiT. `guidance_interval`, the (lowest, highest) noise level sigma that is
        guided; outside it the conditional half alone is computed. `callback_on_step_end(pipeline, step, timestep,
        {"latents": latents})` after each step; latents in the dictionary that it returns are gone on with.
        Returns an output whose `images` are the pictures, or with `return_dict=False` a 1-tuple of them.
        Raises ValueError or TypeError, in one line and before any work, for an argument that is wrong or does not fit.
        """
        class_ids = check_class_ids(class_labels, self.transformer.config.num_embeds_ada_norm)
        class_ids = [class_id for class_id in class_ids for _ in range(num_images_per_label)]
        shape = self.latents_shape(len(class_ids), height, width)
        generator = list(generator) if isinstance(generator, tuple) else generator
        tensor_inputs = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs) or ()
        self.check_call(shape, generator, output_type, latents, guidance_channels, guidance_interval, tensor_inputs)
        timesteps = set_timesteps(self.scheduler, num_inference_steps, timesteps, sigmas)
        guided = guided_steps(timesteps, self.scheduler.alphas_cumprod, guidance_scale, guidance_interval)
        arguments = step_arguments(self.scheduler, len(class_ids), generator, eta)
        with_variance = learns_variance(self.scheduler)

        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.transformer.dtype)
        latents = latents.to(self._execution_device, self.transformer.dtype) * self.scheduler.init_noise_sigma
        self.num_timesteps = len(timesteps)  # for diffusers' callbacks

        # Strict, so that the last turn ends the generator too, and what it has computed ahead is freed before decoding.
        steps = zip(self.progress_bar(timesteps), guided, self.conditionings(class_ids, guided, timesteps), strict=True)
        for step, (timestep, is_guided, conditioning) in enumerate(steps):
            if step == 0 or is_guided != guided[step - 1]:
                self.reset_cache()  # what a cache knows of a guided step says nothing of an unguided one
            latent_input = self.scheduler.scale_model_input(latents, timestep)  # (batch, channels, height, width)
            with self.cache_context("guided" if is_guided else "conditional"):
                prediction = self.predict(latent_input.to(self.transformer.dtype), guidance_scale if is_guided else None,
                                          guidance_channels, with_variance, **conditioning)
            latents = self.scheduler.step(prediction, timestep, latents, **arguments).prev_sample
            if callback_on_step_end is not None:
                changes = callback_on_step_end(self, step, timestep, dict.fromkeys(tensor_inputs, latents))
                latents = (changes or {}).get("latents", latents)

        images = latents if output_type == "latent" else self.decode(latents, generator)  # (batch, 3, height, width)
        if output_type in ("np", "pil"):
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()  # (batch, height, width, 3)
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def predict(self, latents: torch.Tensor, guidance_scale: float | None, guidance_channels: int | None,
                with_variance: bool, **conditioning) -> torch.Tensor:
        """One step's noise, guided unless `guidance_scale` is None: (batch, channels, height, width), and where
        `with_variance` the learned variance behind it, (batch, 2 * channels, height, width).

        `conditioning` is what the network is told, of the latents and, with guidance, of as many of no class behind them.
        """
        latent_input = latents if guidance_scale is None else torch.cat([latents, latents])  # (batch or 2 * batch, ...)
        output = self.transformer(latent_input, **conditioning).sample  # noise, and perhaps variance
        prediction, variance = split_variance(output, latents.shape[1])
        if guidance_scale is not None:
            prediction = guide(*prediction.chunk(2), guidance_scale, guidance_channels)
            variance, _ = variance.chunk(2)
        return torch.cat([prediction, variance], dim=1) if with_variance else prediction

    @property
    def vae_scale_factor(self) -> int:
        """How many pixels a latent is high and wide; 8 in the published models."""
        if hasattr(self.vae, "spatial_compression_ratio"):  # AutoencoderDC
            return self.vae.spatial_compression_ratio
        config = self.vae.config if self.vae is not None else {}
        return 2 ** (len(config.get("block_out_channels") or config.get("decoder_block_out_channels") or [0] * 4) - 1)

    def latents_shape(self, batch_size: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """(batch, channels, height, width) of the latents of pictures of that many pixels, the trained size by default.

        Raises ValueError for sizes that are no multiple of a patch's.
        """
        config, sizes = self.transformer.config, []
        for name, pixels in (("height", height), ("width", width)):
            size = config.sample_size if pixels is None else pixels / self.vae_scale_factor
            if size < 1 or size % config.patch_size:
                patch = self.vae_scale_factor * config.patch_size
                raise ValueError(f"{name}={pixels} is not a multiple of {patch} pixels, the size of one patch")
            sizes.append(int(size))
        if sizes[0] != sizes[1] and not hasattr(self.transformer, "condition"):
            raise ValueError(f"{type(self.transformer).__name__} of diffusers makes square pictures alone")
        return batch_size, config.in_channels, *sizes

    def check_call(self, shape: tuple[int, int, int, int], generator, output_type: str, latents: torch.Tensor | None,
                   guidance_channels: int | None, guidance_interval: tuple[float, float] | None, tensor_inputs: list[str]):
        """Raise a ValueError, in one line, for arguments of a call that do not fit it or this pipeline."""
        if shape[0] < 1:
            raise ValueError("num_images_per_label must be 1 or more")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} is not supported; use 'pil', 'np', 'pt' or 'latent'")
        if output_type != "latent":
            self.check_vae(shape[1])
        require_schedule(self.scheduler, self.transformer.config.out_channels or shape[1], shape[1])
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators were given for {shape[0]} pictures")
        if latents is not None and getattr(latents, "shape", None) != shape:
            found = tuple(latents.shape) if torch.is_tensor(latents) else type(latents).__name__
            raise ValueError(f"latents are {found}; for these pictures they must be a tensor of {shape}")
        if guidance_channels is not None and guidance_channels not in range(1, shape[1] + 1):
            raise ValueError(f"guidance_channels={guidance_channels!r} is not in 1..{shape[1]}")
        if guidance_interval is not None and not (
                len(guidance_interval) == 2 and 0 <= guidance_interval[0] < guidance_interval[1]):
            raise ValueError(f"guidance_interval={guidance_interval!r} is not (lower, higher) sigma, 0 or more")
        if not set(tensor_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(f"the callback wants {list(tensor_inputs)}; this pipeline has {self._callback_tensor_inputs}")

    def check_vae(self, latent_channels: int):
        """Raise a ValueError, in one line, unless there is a VAE that decodes latents of that many channels."""
        if self.vae is None:
            raise ValueError("this pipeline has no VAE to decode with; load it with vae=..., or use output_type='latent'")
        name, decoded = type(self.vae).__name__, self.vae.config.get("latent_channels")
        if decoded != latent_channels or "scaling_factor" not in self.vae.config:
            raise ValueError(f"the VAE, {name}, does not fit: it decodes latents of {decoded} channels, "
                             f"the transformer makes {latent_channels}")
        if self.vae.config.get("latents_mean") or self.vae.config.get("latents_std"):
            raise ValueError(f"the VAE, {name}, does not fit: its latents_mean and latents_std are not undone here")
        _, *more = inspect.signature(self.vae.decode).parameters.values()
        needed = [parameter.name for parameter in more if parameter.default is parameter.empty
                  and parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        if needed:
            raise ValueError(f"the VAE, {name}, does not fit: it does not decode without {', '.join(needed)}")

    def reset_cache(self):
        """Make a cache of the transformer forget the calls before, which an exception may have cut short."""
        if hasattr(self.transformer, "_reset_stateful_cache"):
            self.transformer._reset_stateful_cache()

    def cache_context(self, name: str):
        """The context in which a cache of the transformer keeps what it knows of calls of this kind."""
        return self.transformer.cache_context(name) if hasattr(self.transformer, "cache_context") else nullcontext()

    def conditionings(self, class_ids: list[int], guided: list[bool], timesteps: torch.Tensor) -> Iterator[dict]:
        """What the network is told at each step, as its keyword arguments, computed ahead in chunks of bounded memory.

        Each distinct class, and with guidance the null class behind the batch, passes through the conditioning tower once
        a step. diffusers' own transformer, which has no such tower, gets the timestep and the classes.
        """
        batch = len(class_ids)
        if any(guided):
            class_ids = class_ids + [self.transformer.config.num_embeds_ada_norm] * batch
        device = self._execution_device
        if not hasattr(self.transformer, "condition"):
            class_labels = torch.tensor(class_ids, device=device)
            for timestep, is_guided in zip(timesteps, guided):
                labels = class_labels if is_guided else class_labels[:batch]
                yield {"timestep": timestep.to(device).expand(len(labels)), "class_labels": labels}
            return

        distinct, rows = torch.tensor(class_ids).unique(return_inverse=True)  # (classes,), (batch or 2 * batch,)
        tower = self.transformer.proj_out_1
        floats_a_class = (6 * len(self.transformer.transformer_blocks) + 2) * tower.in_features
        chunk = max(1, CONDITIONING_BYTES // (len(distinct) * floats_a_class * tower.weight.element_size()))
        rows, guided = rows.to(device), iter(guided)
        for part in timesteps.float().split(chunk):
            at = tower.weight.device  # offloaded weights may wait on the CPU, and come to the device with the first step
            at = device if at.type == "meta" else at
            part, distinct = part.to(at, non_blocking=True), distinct.to(at, non_blocking=True)
            conditioning = self.transformer.condition(part.repeat_interleave(len(distinct)), distinct.repeat(len(part)))
            conditioning = type(conditioning)(*(tensor.to(device) for tensor in conditioning))
            for step in range(len(part)):
                wanted = rows if next(guided) else rows[:batch]
                yield {"conditioning": conditioning.rows(wanted + step * len(distinct))}

    def decode(self, latents: torch.Tensor, generator=None) -> torch.Tensor:
        """Latents (batch, channels, height, width) to pictures (batch, 3, 8 * height, 8 * width) in 0..1.

        Some at a time, in bounded memory; what overflows in float16 is decoded again in float32. `generator` is for those
        VAEs whose decoder draws noise.
        """
        latents = 1 / self.vae.config.scaling_factor * latents + (self.vae.config.get("shift_factor") or 0)
        samples = self.decode_parts(latents.to(self.vae.dtype), generator)  # (batch, 3, height, width) in -1..1
        if samples.dtype == torch.float16 and not samples.isfinite().all():
            self.vae.float()
            try:
                samples = self.decode_parts(latents.float(), generator)
            finally:
                self.vae.half()
        return (samples / 2 + 0.5).clamp(0, 1)

    def decode_parts(self, latents: torch.Tensor, generator=None) -> torch.Tensor:
        """What the VAE decodes from latents, `DECODED_PIXELS` at a time."""
        # Channels last through the whole decoder: on a CPU the convolutions then need no copies in another layout.
        latents = latents.contiguous(memory_format=torch.channels_last)
        draws = "generator" in inspect.signature(self.vae.decode).parameters
        several = max(1, DECODED_PIXELS // (latents[0, 0].numel() * self.vae_scale_factor**2))
        samples = []
        for start in range(0, len(latents), several):
            part = slice(start, start + several)
            drawn = {"generator": generator[part] if isinstance(generator, list) else generator} if draws else {}
            samples.append(self.vae.decode(latents[part], **drawn).sample)
        return torch.cat(samples)
