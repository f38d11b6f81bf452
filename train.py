"""Train a DiT on a folder of pictures: one command from there to a pipeline folder that both libraries load.

    python train.py --data DIR --vae VAE --output runs/mine --model DiT-S/2 --steps 50000     # DIR has a folder per class
    python train.py --data DIR --init facebook/DiT-XL-2-256 --output runs/mine --steps 5000   # go on from trained weights
    accelerate launch --multi_gpu --num_processes 8 train.py ...                              # eight GPUs
    python train.py vae --data DIR --output runs/vae --steps 3000                             # a small VAE of one's own

`--data fashion-mnist` is Debian's package dataset-fashion-mnist. OUTPUT/training holds what is not the pipeline: latents,
checkpoints, the log, TensorBoard's events and sheets of samples. `--resume` goes on where a run was stopped.
"""

import contextlib
import datetime
import importlib.util
import shlex
import sys
from pathlib import Path

if __package__:  # installed
    from dit_verbs import command_line, training_networks, training_options
else:
    import command_line
    import training_networks
    import training_options

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
POOR = 0.05  # a VAE's mean squared error; good ones have 0.01 or so


def main(argv=None) -> int:
    """Run the command line; returns the exit status, as `command_line.exit_status` has it."""
    return command_line.exit_status(run, training_options.parse_arguments(argv, __doc__))


def run(arguments):
    """Load pictures and processes, train what was asked for."""
    absent = [name for name in ("tensorboard", "matplotlib") if importlib.util.find_spec(name) is None]
    if absent:
        raise ImportError(f"training needs {' and '.join(absent)}: pip install {' '.join(absent)}")

    command_line.quiet_diffusers()
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    from nets.picture_sets import open_pictures
    from nets.run_folder import last_checkpoint, require_resumable
    from nets.sampling import held
    from nets.training import require_parts

    training = arguments.output / "training"
    if arguments.output.is_dir() and any(arguments.output.iterdir()) and not training.is_dir():
        raise ValueError(f"{arguments.output} has files of something else; choose another --output")
    require_resumable(training, arguments.resume)
    data = FASHION_MNIST if arguments.data == "fashion-mnist" else Path(arguments.data)
    if not data.exists():
        hint = " (Debian: apt install dataset-fashion-mnist)" if data == FASHION_MNIST else ""
        raise OSError(f"there is no folder {data}{hint}")
    pictures = open_pictures(data, "train")
    if pictures.labels is None or not pictures.class_names:
        raise ValueError(f"{data} has no classes with names; put its pictures into a folder per class"
                         f"{''.join(f' ({remark})' for remark in pictures.remarks)}")
    # Processes wait for each other while one encodes more pictures, or samples a sheet.
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=1))
    accelerator = Accelerator(cpu=arguments.device == "cpu", mixed_precision=arguments.mixed_precision,
                              log_with="tensorboard", project_dir=training, kwargs_handlers=[patience])
    command_line.require_processes(accelerator.num_processes)
    require_parts(arguments.batch_size, accelerator.num_processes, arguments.accumulate)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(arguments.seed)
    try:
        with contextlib.ExitStack() as holding:
            in_first_process(accelerator, lambda: holding.enter_context(held(training)))
            for remark in pictures.remarks:
                accelerator.print(f"left out: {remark}")
            if arguments.resume and last_checkpoint(training) is None:
                accelerator.print(f"there is no checkpoint in {training}: starting at the first step")
            {"dit": train_dit, "vae": train_vae}[arguments.part](arguments, accelerator, pictures, training)
            accelerator.end_training()
    except torch.OutOfMemoryError as error:
        raise ValueError(f"too little memory on {accelerator.device}: try --accumulate {2 * arguments.accumulate}, "
                         "--gradient-checkpointing or --mixed-precision bf16") from error


def in_first_process(accelerator, action):
    """Do something in the first process alone; what it refuses is raised in all of them."""
    from accelerate.utils import broadcast_object_list

    refusal = [None]
    if accelerator.is_main_process:
        try:
            action()
        except (OSError, ValueError) as error:
            refusal = [error]
    (error,) = broadcast_object_list(refusal)
    if error:
        raise error


def train_dit(arguments, accelerator, pictures, training):
    """The DiT on cached latents; at the end --output is a pipeline folder with its card."""
    import torch

    from nets import DiTPipeline
    from nets.diffusion import GaussianDiffusion, cosine_betas, linear_betas
    from nets.loading import fingerprint
    from nets.model_card import put_in_place, write_card, write_sheet
    from nets.objectives import attention_kernel, denoise
    from nets.run_folder import require_same_run
    from nets.scheduling import published_scheduler
    from nets.training import fit

    initial, vae, names, schedule = training_networks.load_networks(arguments)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels a latent is wide
    side = training_networks.side_of_pictures(arguments, pictures, initial, factor)
    options = loop_options(arguments, pictures=pictures.mark[:12], vae=fingerprint(vae)[:12], side=side,
                           scaling_factor=vae.config.scaling_factor)
    require_same_run(training, options["settings"], arguments.steps)
    shape = (vae.config.latent_channels, side // factor, side // factor)
    transformer = training_networks.make_transformer(arguments, initial, names, shape, pictures.class_names, accelerator)
    latents = make_latents(arguments, accelerator, pictures, side, vae, training)
    count = sum(parameter.numel() for parameter in transformer.parameters())
    introduce(arguments, accelerator, len(latents.labels), len(latents.class_names), side, count)
    say_what_the_vae_does(vae.to(accelerator.device), pictures, side, accelerator)
    betas = {"linear": linear_betas, "squaredcos_cap_v2": cosine_betas}[schedule]()
    objective = denoise(latents, GaussianDiffusion(betas, accelerator.device), vae.config.scaling_factor,
                        arguments.batch_size, arguments.seed, arguments.label_dropout, arguments.min_snr)

    def make_pipeline(network):
        return DiTPipeline(network, vae, published_scheduler(schedule), id2label=latents.class_names)

    def sample(step, network):
        path = training / "samples" / f"{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        sheet = write_sheet(make_pipeline(network).to(accelerator.device), path)
        open_tensorboard(accelerator)
        accelerator.get_tracker("tensorboard", unwrap=True).add_image("samples", sheet, step, dataformats="HWC")

    kernel = attention_kernel(latents, accelerator.device)
    with progress(arguments, accelerator, training) as report, kernel:
        average = fit(transformer, *objective, accelerator, training, report=report, sample=sample, **options)
    if accelerator.is_main_process:
        write_sheet(make_pipeline(average).to(accelerator.device), arguments.output / "samples.png")
        for part in (average, vae) if arguments.save_dtype == "float16" else ():
            torch.nn.Module.half(part)  # diffusers' own `half` warns of modules to keep in float32, of which there are none
        put_in_place(make_pipeline(average), arguments.output, training, last="model_index.json")
        print(f"{arguments.output}: pipeline folder; python predict.py --model {arguments.output}")
        write_card(arguments.output, {
            "data": f"{len(latents.labels)} pictures from {arguments.data}, cut and scaled to {side}x{side}",
            "classes": "; ".join(latents.class_names.values()),
            "network": f"{count:,} parameters, latents of {latents.shape}"
                       f"{f', gone on from {arguments.init}' if arguments.init else ''}",
            "VAE": arguments.vae or f"that of {arguments.init}",
            "batch, seed": f"{arguments.batch_size}, {arguments.seed}",
            "command": f"`python train.py {shlex.join(sys.argv[1:])}`"})


def introduce(arguments, accelerator, pictures, classes, side, parameters):
    """Say in a line what is trained on what."""
    accelerator.print(f"{pictures} pictures of {classes} classes, {side}x{side} · {parameters:,} parameters · "
                      f"{accelerator.num_processes} x {accelerator.device.type} · batch {arguments.batch_size} · "
                      f"{arguments.steps} steps", flush=True)


def say_what_the_vae_does(vae, pictures, side, accelerator):
    """Say what of the pictures the VAE loses, which no training of the DiT brings back."""
    from nets.autoencoding import reconstruct_some

    images, decoded = reconstruct_some(vae, pictures, side)
    error = (decoded - images).square().mean().item()
    accelerator.print(f"the VAE gives these pictures back with a mean squared error of {error:.4f} on [-1, 1]")
    if error > POOR:
        accelerator.print("that is much, and samples will look no better; choose another --vae, or train one on these "
                          "pictures with train.py vae", file=sys.stderr)


def make_latents(arguments, accelerator, pictures, side, vae, training):
    """The latents of all pictures, from their folder or encoded now, each process its share."""
    from tqdm import tqdm

    from nets.latents import encode_shard, load_latents, missing_shards, open_latents_folder
    from nets.sampling import held

    folder = arguments.latents or training / "latents"
    with contextlib.ExitStack() as holding:
        def open_folder():
            open_latents_folder(folder, pictures, vae, (side, side), arguments.flip)
            if missing_shards(folder, pictures.count):
                holding.enter_context(held(folder))

        in_first_process(accelerator, open_folder)
        missing = missing_shards(folder, pictures.count, accelerator.process_index, accelerator.num_processes)
        if missing:
            vae.to(accelerator.device)
            with tqdm(desc="latents", unit="picture", disable=not accelerator.is_main_process) as bar:
                for number in missing:
                    encode_shard(folder, number, pictures, vae, (side, side), arguments.flip, arguments.strict,
                                 done=bar.update)
        accelerator.wait_for_everyone()
    latents = load_latents(folder, arguments.strict)
    report_skipped(latents.skipped, accelerator)
    return latents


def report_skipped(errors, accelerator):
    """Name the pictures that could not be read."""
    if accelerator.is_main_process:
        for error in errors:
            print(f"left out: {error}", file=sys.stderr)


def train_vae(arguments, accelerator, pictures, training):
    """A small VAE: 4 latent channels at a quarter of the side."""
    from tqdm import tqdm

    from nets.autoencoding import (
        FACTOR,
        Autoencode,
        measure_scaling_factor,
        reconstruct,
        reconstruct_some,
        small_vae,
    )
    from nets.model_card import put_in_place, write_reconstructions
    from nets.training import fit

    side = arguments.size or min(256, pictures.smallest_side()) // FACTOR * FACTOR
    vae = small_vae(side)
    with tqdm(desc="reading", total=pictures.count, unit="picture", disable=not accelerator.is_main_process) as bar:
        readable, errors = pictures.readable(arguments.strict, done=bar.update)
    report_skipped(errors, accelerator)
    parameters = sum(parameter.numel() for parameter in vae.parameters())
    introduce(arguments, accelerator, readable.count, len(pictures.class_names), side, parameters)
    objective = reconstruct(readable, side, arguments.batch_size, arguments.seed)
    with progress(arguments, accelerator, training) as report:
        vae = fit(Autoencode(vae), *objective, accelerator, training, report=report,
                  **loop_options(arguments, pictures=pictures.mark[:12], side=side)).vae
    if accelerator.is_main_process:
        vae.register_to_config(scaling_factor=measure_scaling_factor(vae, readable, side))
        put_in_place(vae, arguments.output, training, last="config.json")
        write_reconstructions(*reconstruct_some(vae, readable, side, 8), arguments.output / "reconstructions.png")
        print(f"{arguments.output}: VAE, scaling factor {vae.config.scaling_factor}; reconstructions.png shows pictures "
              "and below them what it makes of them")


def loop_options(arguments, **more_settings):
    """The options of the command line that are `fit`'s."""
    from nets.training import learning_rate_at

    cosine = arguments.steps if arguments.decay == "cosine" else None
    names = ("steps", "weight_decay", "beta2", "clip", "accumulate", "ema_decay", "save_every", "keep", "log_every",
             "sample_every", "resume")
    settings = {name: getattr(arguments, name) for name in training_options.SETTINGS}
    return {**{name: getattr(arguments, name) for name in names},
            "settings": {**settings, "cosine_steps": cosine, **more_settings},
            "learning_rate": lambda step: learning_rate_at(step, arguments.learning_rate, arguments.warmup_steps, cosine)}


def open_tensorboard(accelerator):
    """Begin TensorBoard's file, if it has not been; with the first number, so that a run that is refused leaves none."""
    if not accelerator.trackers:
        accelerator.init_trackers("tensorboard")


@contextlib.contextmanager
def progress(arguments, accelerator, training):
    """A bar with loss and pictures a second, and TensorBoard; gives what `fit` is to report to."""
    from tqdm import tqdm

    from nets.run_folder import last_checkpoint

    found = last_checkpoint(training)
    first = int(found.name.rpartition("-")[2]) if found else 0

    def report(record):
        open_tensorboard(accelerator)
        rate = arguments.batch_size / record["seconds_per_step"]
        bar.update(record["step"] - bar.n)
        bar.set_postfix_str(f"loss {record['loss']:.4f}, {rate:.0f} pictures/s")
        quarters = {f"loss/quarter {number + 1}": loss for number, loss in enumerate(record["loss_by_quarter"])
                    if loss is not None}
        accelerator.log({"loss/all": record["loss"], **quarters, "gradient norm": record["gradient_norm"],
                         "learning rate": record["learning_rate"], "pictures per second": rate}, step=record["step"])

    with tqdm(initial=first, total=arguments.steps, unit="step", disable=not accelerator.is_main_process) as bar:
        yield report


if __name__ == "__main__":
    sys.exit(main())
