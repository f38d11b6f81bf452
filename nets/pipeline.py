"""From class ids to pictures: noise, a guided denoising loop, the VAE's decoder.

Mirrors `DiTPipeline` of diffusers 0.42: its signature, defaults and pictures. The sampling loop of DiT (arXiv 2212.09748)
is section 3.1, "Diffusion formulation" and "Classifier-free guidance".
"""

import inspect
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor

from nets.guidance import guide, predicted_noise
from nets.labels import check_class_id, check_class_ids, find_label_ids, label_table
from nets.loading import CLASS_ON_DISK, find_folder, leave_out_defaults, load_parts
from nets.transformer_2d import Transformer2DModel

CONDITIONING_BYTES = 256 * 2**20  # how much of the steps' conditioning is computed at a time


class DiTPipeline(DiffusionPipeline):
    """Class-conditional pictures from a latent DiT.

    Args: `transformer`, this library's or diffusers' `DiTTransformer2DModel`; `vae`; `scheduler`; `id2label`, class id ->
    comma-separated names. `labels` is upstream's dictionary name -> id.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(self, transformer: Transformer2DModel | DiTTransformer2DModel, vae: AutoencoderKL,
                 scheduler: KarrasDiffusionSchedulers, id2label: dict | None = None):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label=id2label)
        self.labels = label_table(id2label)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As diffusers' `from_pretrained`, for a folder or a hub id; the transformer is always this library's.

        Raises OSError or ValueError, in one line, where a file is missing, damaged or of another network, or the hub is
        out of reach. Code in a file is never run: `.bin` weights are read with `weights_only=True`.
        """
        folder = find_folder(pretrained_model_name_or_path, **kwargs)
        parts = load_parts(folder, **kwargs)
        return super().from_pretrained(folder, **{**kwargs, **parts})

    def save_config(self, save_directory, **kwargs):
        """Write `model_index.json`, in which the transformer has the name under which diffusers knows it.

        A VAE that is not there is named as well: put into the folder later, it is found.
        """
        missing = {name: on_disk for name, on_disk in CLASS_ON_DISK.items() if getattr(self, name) is None}
        self.register_to_config(**{**missing, "transformer": CLASS_ON_DISK["transformer"]})
        super().save_config(save_directory, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        """As diffusers' `save_pretrained`; class names are kept, and the scheduler's defaults are not pinned."""
        super().save_pretrained(save_directory, **kwargs)
        leave_out_defaults(self.scheduler, Path(save_directory) / "scheduler")

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """The class ids of one name or a list of names; `crane#134`, `#134` and `134` are understood too.

        Raises ValueError for a name that the model does not know, or that it knows for several classes.
        """
        label_ids = find_label_ids(label, self.config.id2label)
        return [check_class_id(label_id, self.transformer.config.num_embeds_ada_norm) for label_id in label_ids]

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
        guidance_channels: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Make one picture for each class id.

        Args: `class_labels`, ids in 0..num_embeds_ada_norm, the last one meaning no class; `guidance_scale`, guided if
        over 1; `generator`, for the noise; `output_type`: "pil", "np" (batch, height, width, 3) float32 in 0..1, or "pt"
        (batch, 3, height, width) in 0..1; `guidance_channels`, how many of the latent channels are guided: all by default,
        the first 3 in facebookresearch/DiT.
        Returns an output whose `images` are the pictures, or with `return_dict=False` a 1-tuple of them.
        Raises ValueError or TypeError for wrong ids, an unknown output type, a wrong number of channels, or a missing VAE,
        before any work.
        """
        class_ids = check_class_ids(class_labels, self.transformer.config.num_embeds_ada_norm)
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type={output_type!r} is not supported; use 'pil', 'np' or 'pt'")
        if self.vae is None:
            raise ValueError("this pipeline has no VAE to decode with; load it with vae=...")
        latent_channels = self.transformer.config.in_channels
        if guidance_channels is not None and not 1 <= guidance_channels <= latent_channels:
            raise ValueError(f"guidance_channels={guidance_channels!r} is not in 1..{latent_channels}")
        guided = guidance_scale > 1

        latents = self.initial_noise(len(class_ids), generator, num_inference_steps)  # (batch, channels, height, width)
        step_arguments = self.step_arguments(generator)
        timesteps = self.scheduler.timesteps
        for timestep, conditioning in zip(self.progress_bar(timesteps), self.conditionings(class_ids, guided, timesteps)):
            latent_input = self.scheduler.scale_model_input(latents, timestep)  # (batch, channels, height, width)
            if guided:
                latent_input = torch.cat([latent_input, latent_input])  # (2 * batch, channels, height, width)
            output = self.transformer(latent_input, **conditioning).sample  # noise, and perhaps variance
            noise = predicted_noise(output, latents.shape[1])
            if guided:
                noise = guide(*noise.chunk(2), guidance_scale, guidance_channels)  # (batch, channels, height, width)
            latents = self.scheduler.step(noise, timestep, latents, **step_arguments).prev_sample

        images = self.decode(latents)  # (batch, 3, height, width) in 0..1
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()  # (batch, height, width, 3)
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def initial_noise(self, batch_size: int, generator, num_inference_steps: int) -> torch.Tensor:
        """Set the scheduler's timesteps and draw x_T, (batch, channels, height, width), at its standard deviation."""
        config = self.transformer.config
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        noise = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.transformer.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        return noise * self.scheduler.init_noise_sigma

    def step_arguments(self, generator) -> dict:
        """The generator, for those schedulers whose `step` draws noise."""
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if takes_generator else {}

    def conditionings(self, class_ids: list[int], guided: bool, timesteps: torch.Tensor) -> Iterator[dict]:
        """What the network is told at each step, as its keyword arguments, computed ahead in chunks of bounded memory.

        Each distinct class, and with guidance the null class behind the batch, passes through the conditioning tower once
        a step. diffusers' own transformer, which has no such tower, gets the timestep and the classes.
        """
        if guided:
            class_ids = class_ids + [self.transformer.config.num_embeds_ada_norm] * len(class_ids)
        device = self._execution_device
        if not hasattr(self.transformer, "condition"):
            class_labels = torch.tensor(class_ids, device=device)
            for timestep in timesteps:
                yield {"timestep": timestep.to(device).expand(len(class_ids)), "class_labels": class_labels}
            return

        distinct, rows = torch.tensor(class_ids).unique(return_inverse=True)  # (classes,), (batch or 2 * batch,)
        tower = self.transformer.proj_out_1.weight
        tower_device = device if tower.device.type == "meta" else tower.device  # offloaded weights may wait on the CPU
        floats_a_class = (6 * len(self.transformer.transformer_blocks) + 2) * tower.shape[1]
        chunk = max(1, CONDITIONING_BYTES // (len(distinct) * floats_a_class * tower.element_size()))
        rows, distinct = rows.to(device), distinct.to(tower_device)
        for part in timesteps.to(tower_device).split(chunk):
            conditioning = self.transformer.condition(part.repeat_interleave(len(distinct)), distinct.repeat(len(part)))
            conditioning = type(conditioning)(*(tensor.to(device) for tensor in conditioning))
            for step in range(len(part)):
                yield {"conditioning": conditioning.rows(rows + step * len(distinct))}

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (batch, channels, height, width) to pictures (batch, 3, 8 * height, 8 * width) in 0..1."""
        latents = 1 / self.vae.config.scaling_factor * latents
        # Channels last through the whole decoder: on a CPU the convolutions then need no copies in another layout.
        latents = latents.to(self.vae.dtype, memory_format=torch.channels_last)
        samples = self.vae.decode(latents).sample
        return (samples / 2 + 0.5).clamp(0, 1)
