"""The networks that train.py begins with."""

import sys

if __package__:  # installed
    from dit_verbs import command_line
else:
    import command_line

# Of a VAE's repository, or of a pipeline's with a VAE in it.
VAE_FILES = [f"{folder}{name}" for folder in ("", "vae/") for name in ("config.json", "diffusion_pytorch_model.*")]


def load_networks(arguments):
    """The transformer of --init or None, the VAE, the class names of --init, and the betas as schedulers call them."""
    import torch
    from diffusers import AutoencoderKL

    from nets import DiTPipeline
    from nets.checkpoint import from_original, read_config, read_original
    from nets.loading import find_folder, load_exactly
    from nets.scheduling import find_schedule

    transformer = vae = names = None
    schedule = {"linear": "linear", "cosine": "squaredcos_cap_v2", None: None}[arguments.betas]
    if arguments.init and arguments.init.endswith(".pt"):
        state_dict = read_original(arguments.init)
        transformer = from_original(state_dict, read_config(state_dict)).float()
    elif arguments.init:
        folder, names = command_line.find_model(arguments.init)
        pipeline = DiTPipeline.from_pretrained(folder, dtype=torch.float32)
        transformer, vae = pipeline.transformer, pipeline.vae
        try:
            schedule = schedule or find_schedule(pipeline.scheduler)
        except ValueError as error:
            raise ValueError(f"--init {arguments.init}: its {error}; choose with --betas, and it learns others") from error
    if arguments.vae:
        folder = command_line.MODEL_DATA / arguments.vae
        folder = folder if folder.is_dir() else find_folder(arguments.vae, VAE_FILES)
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
        vae = load_exactly(AutoencoderKL, folder, dtype=torch.float32)
        vae.register_to_config(_name_or_path=folder.name)  # else the config tells the path on this machine
    if vae is None:
        raise ValueError(f"--init {arguments.init} has no VAE in it; give --vae FOLDER_OR_ID")
    DiTPipeline(None, vae, None).check_vae(vae.config.latent_channels)
    vae.register_to_config(shift_factor=None)  # the DiT learns latents as they are, and diffusers' pipeline decodes such
    return transformer, vae.eval().requires_grad_(False), names, schedule or "linear"


def side_of_pictures(arguments, pictures, initial, factor):
    """The side in pixels that pictures get. Raises ValueError, in one line, for one that cannot be cut into patches."""
    step = factor * (initial.config.patch_size if initial else arguments.patch)
    side = arguments.size or (initial.config.sample_size * factor if initial else
                              min(256, pictures.smallest_side()) // step * step)
    if side % step or not side:
        raise ValueError(f"--size {side} is no multiple of {step}: this VAE shrinks pictures by {factor}, and the network "
                         f"cuts that into patches of {step // factor}")
    return side


def make_transformer(arguments, initial, names, shape, class_names, accelerator):
    """A new transformer for latents of that shape, or the `initial` one, with a label table for these classes."""
    from nets import Transformer2DModel
    from nets.acceleration import require_compiler
    from nets.finetuning import for_latents, freeze_below

    channels, side, _ = shape
    if initial is None:
        transformer = Transformer2DModel(
            num_attention_heads=arguments.heads, attention_head_dim=arguments.width // arguments.heads,
            num_layers=arguments.depth, patch_size=arguments.patch, sample_size=side, in_channels=channels,
            out_channels=channels * (2 if arguments.variance == "learned" else 1),
            num_embeds_ada_norm=len(class_names))
    else:
        transformer = for_latents(initial, shape, class_names, names)
        accelerator.print(f"going on from {arguments.init}: "
                          + ("all of it" if transformer is initial else "all but the label table, which starts anew"))
    freeze_below(transformer, arguments.freeze_below)
    for block in transformer.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # the objective drops labels itself
    if arguments.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if arguments.compile:
        try:
            require_compiler(accelerator.device)
            transformer.compile_repeated_blocks()
        except (ImportError, OSError) as error:
            accelerator.print(f"{error}; going on without --compile", file=sys.stderr)
    return transformer
