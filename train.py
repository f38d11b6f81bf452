"""Train a DiT on a folder of pictures: one command from there to a pipeline folder that both libraries load.

    python train.py --data DIR --vae VAE --output runs/mine --model DiT-S/2 --steps 50000     # DIR has a folder per class
    python train.py --data DIR --init facebook/DiT-XL-2-256 --output runs/mine --steps 5000   # go on from trained weights
    accelerate launch --multi_gpu --num_processes 8 train.py ...                              # eight GPUs
    python train.py vae --data DIR --output runs/vae --steps 3000                             # a small VAE of one's own

`--data fashion-mnist` is Debian's package dataset-fashion-mnist. OUTPUT/training holds what is not the pipeline: latents,
checkpoints, the log, TensorBoard's events and sheets of samples. `--resume` goes on where a run was stopped.
"""

import argparse
import contextlib
import importlib.util
import shlex
import sys
from pathlib import Path

if __package__:  # installed
    from dit_verbs import command_line
else:
    import command_line

# Width, depth and heads; DiT paper, table 1.
MODELS = {"DiT-S": (384, 12, 6), "DiT-B": (768, 12, 12), "DiT-L": (1024, 24, 16), "DiT-XL": (1152, 28, 16)}
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
# The options that a run must not change when it is gone on with, but for those of nets.run_folder.ADJUSTABLE.
SETTINGS = ("part", "model", "width", "depth", "heads", "patch", "init", "freeze_below", "size", "flip", "label_dropout",
            "betas", "min_snr", "variance", "batch_size", "accumulate", "learning_rate", "warmup_steps", "decay",
            "weight_decay", "beta2", "ema_decay", "clip", "mixed_precision", "seed")
SHAPE = ("model", "width", "depth", "heads", "patch", "variance")  # of a new network: --init has its own
OF_A_DIT = (*SHAPE, "vae", "latents", "flip", "init", "freeze_below", "betas", "min_snr", "label_dropout", "compile",
            "gradient_checkpointing", "sample_every", "save_dtype")


def main(argv=None) -> int:
    """Run the command line; returns the exit status, as `command_line.exit_status` has it."""
    return command_line.exit_status(run, parse_arguments(argv))


def parse_arguments(argv=None):
    """The command line as a namespace; argparse ends the program with status 2 where a value is wrong."""
    whole, positive, fraction = command_line.whole_number, command_line.positive_number, command_line.fraction
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("dit", "vae"), default="dit", help="what to train (default dit)")
    parser.add_argument("--data", required=True, metavar="DIR", help="a folder per class, or fashion-mnist")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output, if there is one")
    data = parser.add_argument_group("pictures")
    data.add_argument("--size", type=whole(8, 4096), help="side in pixels (default: of --init, or of the first picture)")
    data.add_argument("--flip", action="store_true", help="show half of the pictures mirrored")
    data.add_argument("--strict", action="store_true", help="stop at a picture that cannot be read (default: leave it out)")
    data.add_argument("--vae", help="folder or hub id of a VAE or of a pipeline (default: that of --init)")
    data.add_argument("--latents", type=Path, metavar="DIR", help="where they are kept (default: OUTPUT/training/latents)")
    net = parser.add_argument_group("network")
    net.add_argument("--model", choices=[f"{name}/{patch}" for name in MODELS for patch in (2, 4, 8)], default="DiT-S/2")
    net.add_argument("--width", type=whole(8, 8192), help="in place of --model's")
    net.add_argument("--depth", type=whole(1, 256))
    net.add_argument("--heads", type=whole(1, 256))
    net.add_argument("--patch", type=whole(1, 64))
    net.add_argument("--init", metavar="FOLDER|ID|.pt",
                     help="trained weights to go on from; for other classes all but the label table is kept")
    net.add_argument("--freeze-below", type=whole(0, 256), default=0, metavar="N",
                     help="leave the patch embedding and the blocks before N as they are")
    goal = parser.add_argument_group("objective")
    goal.add_argument("--betas", choices=("linear", "cosine"), help="default: those of --init, or linear")
    goal.add_argument("--variance", choices=("learned", "fixed"), default="learned")
    goal.add_argument("--min-snr", type=positive, metavar="GAMMA",
                      help="weigh the error by min(SNR, GAMMA) / SNR; 5 is usual")
    goal.add_argument("--label-dropout", type=fraction, default=0.1,
                      help="share of pictures shown without their class (default 0.1)")
    loop = parser.add_argument_group("optimisation")
    loop.add_argument("--steps", type=whole(1, 10**9), default=400_000)
    loop.add_argument("--batch-size", type=whole(1, 2**20), default=256, help="of all processes together (default 256)")
    loop.add_argument("--accumulate", type=whole(1, 4096), default=1, help="parts in which a batch is computed")
    loop.add_argument("--learning-rate", type=positive, default=1e-4)
    loop.add_argument("--warmup-steps", type=whole(0, 10**9), default=0)
    loop.add_argument("--decay", choices=("constant", "cosine"), default="constant", help="cosine ends at 0")
    loop.add_argument("--weight-decay", type=fraction, default=0.0)
    loop.add_argument("--beta2", type=fraction, default=0.999)
    loop.add_argument("--clip", type=positive, default=1.0, help="largest norm of the gradient")
    loop.add_argument("--ema-decay", type=fraction, default=0.9999)
    loop.add_argument("--seed", type=whole(0, 2**63 - 1), default=0)
    speed = parser.add_argument_group("speed and memory")
    speed.add_argument("--device", choices=("auto", "cpu"), default="auto")
    speed.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    speed.add_argument("--compile", action="store_true")
    speed.add_argument("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")
    watch = parser.add_argument_group("what is written")
    watch.add_argument("--save-every", type=whole(1, 10**9), default=5000, help="steps between checkpoints")
    watch.add_argument("--keep", type=whole(1, 10**6), default=1, help="how many checkpoints stay")
    watch.add_argument("--log-every", type=whole(1, 10**9), default=50)
    watch.add_argument("--sample-every", type=whole(0, 10**9), default=0, help="steps between sheets (default: none)")
    watch.add_argument("--save-dtype", choices=("float32", "float16"), default="float32", help="of the pipeline at the end")
    arguments = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(OF_A_DIT)))  # None where it was not given
    given = [option for option in OF_A_DIT if getattr(arguments, option) is not None]
    for option in OF_A_DIT:
        if option not in given:
            setattr(arguments, option, parser.get_default(option))
    if arguments.part == "vae" and given:
        parser.error(f"--{given[0].replace('_', '-')} is of no use to a VAE; leave it out")
    if arguments.init and set(given) & set(SHAPE):
        parser.error(f"--init has its own {', '.join(sorted(set(given) & set(SHAPE)))}; leave it out")
    if arguments.part == "dit" and not (arguments.vae or arguments.init):
        parser.error("a DiT is trained on a VAE's latents: give --vae FOLDER_OR_ID, or --init with one in it")
    name, _, patch = arguments.model.partition("/")
    width, depth, heads = MODELS[name]
    arguments.width, arguments.depth = arguments.width or width, arguments.depth or depth
    arguments.heads = arguments.heads or (heads if arguments.width == width else max(1, arguments.width // 64))
    arguments.patch = arguments.patch or int(patch)
    if arguments.width % arguments.heads or arguments.width % 4:
        parser.error(f"--width {arguments.width} cannot be split into --heads {arguments.heads}, or is no multiple of 4")
    return arguments


def run(arguments):
    """Load pictures and processes, train what was asked for."""
    absent = [name for name in ("tensorboard", "matplotlib") if importlib.util.find_spec(name) is None]
    if absent:
        raise ImportError(f"training needs {' and '.join(absent)}: pip install {' '.join(absent)}")

    import diffusers
    import torch
    from accelerate import Accelerator

    from nets.picture_sets import open_pictures
    from nets.run_folder import require_resumable
    from nets.sampling import held
    from nets.training import require_parts

    diffusers.utils.logging.set_verbosity_error()
    training = arguments.output / "training"
    if arguments.output.is_dir() and any(arguments.output.iterdir()) and not training.is_dir():
        raise ValueError(f"{arguments.output} has files of something else; choose another --output")
    require_resumable(training, arguments.resume)
    data = FASHION_MNIST if arguments.data == "fashion-mnist" else Path(arguments.data)
    if not data.exists():
        hint = " (Debian: apt install dataset-fashion-mnist)" if data == FASHION_MNIST else ""
        raise OSError(f"there is no folder {data}{hint}")
    pictures = open_pictures(data, "train")
    if pictures.labels is None:
        raise ValueError(f"{data} has no classes; put its pictures into a folder per class")
    accelerator = Accelerator(cpu=arguments.device == "cpu", mixed_precision=arguments.mixed_precision,
                              log_with="tensorboard", project_dir=training)
    command_line.require_processes(accelerator.num_processes)
    require_parts(arguments.batch_size, accelerator.num_processes, arguments.accumulate)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(arguments.seed)
    try:
        with held(training) if accelerator.is_main_process else contextlib.nullcontext():
            accelerator.init_trackers("tensorboard")
            {"dit": train_dit, "vae": train_vae}[arguments.part](arguments, accelerator, pictures, training)
            accelerator.end_training()
    except torch.OutOfMemoryError as error:
        raise ValueError(f"too little memory on {accelerator.device}: try --accumulate {2 * arguments.accumulate}, "
                         "--gradient-checkpointing or --mixed-precision bf16") from error


def train_dit(arguments, accelerator, pictures, training):
    """The DiT on cached latents; at the end --output is a pipeline folder with its card."""
    import torch

    from nets import DiTPipeline
    from nets.diffusion import GaussianDiffusion, cosine_betas, linear_betas
    from nets.loading import fingerprint
    from nets.model_card import put_in_place, write_card, write_sheet
    from nets.objectives import attention_kernel, denoise
    from nets.scheduling import published_scheduler
    from nets.training import fit

    initial, vae, names, schedule = load_networks(arguments)
    latents = make_latents(arguments, accelerator, pictures, initial, vae, training)
    transformer = make_transformer(arguments, initial, names, latents, accelerator)
    betas = {"linear": linear_betas, "squaredcos_cap_v2": cosine_betas}[schedule]()
    objective = denoise(latents, GaussianDiffusion(betas, accelerator.device), vae.config.scaling_factor,
                        arguments.batch_size, arguments.seed, arguments.label_dropout, arguments.min_snr)

    def make_pipeline(network):
        return DiTPipeline(network, vae, published_scheduler(schedule), id2label=latents.class_names)

    def sample(step, network):
        sheet = write_sheet(make_pipeline(network).to(accelerator.device), training / "samples" / f"{step:08d}.png")
        accelerator.get_tracker("tensorboard", unwrap=True).add_image("samples", sheet, step, dataformats="HWC")

    kernel = attention_kernel(latents, accelerator.device)
    with progress(arguments, accelerator, training) as report, kernel:
        average = fit(transformer, *objective, accelerator, training, report=report, sample=sample,
                      **loop_options(arguments, pictures=pictures.mark[:12], vae=fingerprint(vae)[:12]))
    if accelerator.is_main_process:
        for part in (average, vae) if arguments.save_dtype == "float16" else ():
            torch.nn.Module.half(part)  # diffusers' own `half` warns of modules to keep in float32, of which there are none
        put_in_place(make_pipeline(average), arguments.output, training, last="model_index.json")
        millions = sum(parameter.numel() for parameter in average.parameters()) / 1e6
        write_card(arguments.output, {
            "data": f"{len(latents.labels)} pictures of {len(latents.class_names)} classes from {arguments.data}",
            "network": f"{millions:.1f} million parameters, latents of {latents.shape}",
            "command": f"`python train.py {shlex.join(sys.argv[1:])}`"})
        print(f"{arguments.output}: pipeline folder; python predict.py --model {arguments.output}")


def load_networks(arguments):
    """The transformer of --init or None, the VAE, the class names of --init, and the betas as schedulers call them."""
    import torch
    from diffusers import AutoencoderKL

    from nets import DiTPipeline
    from nets.checkpoint import from_original, read_config, read_original
    from nets.loading import find_folder, load_exactly

    transformer = vae = names = None
    schedule = "linear"
    if arguments.init and arguments.init.endswith(".pt"):
        state_dict = read_original(arguments.init)
        transformer = from_original(state_dict, read_config(state_dict)).float()
    elif arguments.init:
        folder, names = command_line.find_model(arguments.init)
        pipeline = DiTPipeline.from_pretrained(folder, dtype=torch.float32)
        transformer, vae = pipeline.transformer, pipeline.vae
        schedule = pipeline.scheduler.config.beta_schedule
    if arguments.betas:
        schedule = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[arguments.betas]
    if arguments.vae:
        folder = command_line.MODEL_DATA / arguments.vae
        folder = folder if folder.is_dir() else find_folder(arguments.vae, ["*.json", "*.safetensors"])
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
        vae = load_exactly(AutoencoderKL, folder, dtype=torch.float32)
        vae.register_to_config(_name_or_path=folder.name)  # else the config tells the path on this machine
    if vae is None:
        raise ValueError(f"--init {arguments.init} has no VAE in it; give --vae FOLDER_OR_ID")
    return transformer, vae.eval().requires_grad_(False), names, schedule


def make_latents(arguments, accelerator, pictures, initial, vae, training):
    """The latents of all pictures, from their folder or encoded now, each process its share."""
    from tqdm import tqdm

    from nets.latents import encode_shard, load_latents, missing_shards, open_latents_folder

    folder, factor = arguments.latents or training / "latents", 2 ** (len(vae.config.block_out_channels) - 1)
    step = factor * (initial.config.patch_size if initial else arguments.patch)
    side = arguments.size or (initial.config.sample_size * factor if initial else
                              min(256, pictures.smallest_side()) // step * step)
    if side % step or not side:
        raise ValueError(f"--size {side} is no multiple of {step}: this VAE shrinks pictures by {factor}, and the network "
                         f"cuts that into patches of {step // factor}")
    if accelerator.is_main_process:
        open_latents_folder(folder, pictures, vae, (side, side), arguments.flip)
    accelerator.wait_for_everyone()
    missing = missing_shards(folder, pictures.count, accelerator.process_index, accelerator.num_processes)
    if missing:
        vae.to(accelerator.device)
        with tqdm(desc="latents", unit="picture", disable=not accelerator.is_main_process) as bar:
            for number in missing:
                encode_shard(folder, number, pictures, vae, (side, side), arguments.flip, arguments.strict, done=bar.update)
    accelerator.wait_for_everyone()
    latents = load_latents(folder, arguments.strict)
    report_skipped(latents.skipped, accelerator)
    return latents


def report_skipped(errors, accelerator):
    """Name the pictures that could not be read."""
    if accelerator.is_main_process:
        for error in errors:
            print(f"left out: {error}", file=sys.stderr)


def make_transformer(arguments, initial, names, latents, accelerator):
    """A new transformer for these latents, or the `initial` one with a label table for these classes."""
    from nets import Transformer2DModel
    from nets.finetuning import for_latents, freeze_below

    channels, side = latents.shape[0], latents.shape[-1]
    if initial is None:
        transformer = Transformer2DModel(
            num_attention_heads=arguments.heads, attention_head_dim=arguments.width // arguments.heads,
            num_layers=arguments.depth, patch_size=arguments.patch, sample_size=side, in_channels=channels,
            out_channels=channels * (2 if arguments.variance == "learned" else 1),
            num_embeds_ada_norm=len(latents.class_names))
    else:
        transformer = for_latents(initial, latents, names)
        accelerator.print(f"going on from {arguments.init}: "
                          + ("all of it" if transformer is initial else "all but the label table, which starts anew"))
    freeze_below(transformer, arguments.freeze_below)
    for block in transformer.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # the objective drops labels itself
    if arguments.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if arguments.compile:
        transformer.compile_repeated_blocks()
    return transformer


def train_vae(arguments, accelerator, pictures, training):
    """A small VAE: 4 latent channels at a quarter of the side."""
    from tqdm import tqdm

    from nets.autoencoding import FACTOR, Autoencode, measure_scaling_factor, reconstruct, small_vae
    from nets.model_card import put_in_place
    from nets.training import fit

    side = arguments.size or min(256, pictures.smallest_side()) // FACTOR * FACTOR
    vae = small_vae(side)
    with tqdm(desc="reading", total=pictures.count, unit="picture", disable=not accelerator.is_main_process) as bar:
        readable, errors = pictures.readable(arguments.strict, done=bar.update)
    report_skipped(errors, accelerator)
    objective = reconstruct(readable, side, arguments.batch_size, arguments.seed)
    with progress(arguments, accelerator, training) as report:
        vae = fit(Autoencode(vae), *objective, accelerator, training, report=report,
                  **loop_options(arguments, pictures=pictures.mark[:12])).vae
    if accelerator.is_main_process:
        vae.register_to_config(scaling_factor=measure_scaling_factor(vae, readable, side))
        put_in_place(vae, arguments.output, training, last="config.json")
        print(f"{arguments.output}: VAE, scaling factor {vae.config.scaling_factor}")


def loop_options(arguments, **more_settings):
    """The options of the command line that are `fit`'s."""
    from nets.training import learning_rate_at

    cosine = arguments.steps if arguments.decay == "cosine" else None
    names = ("steps", "weight_decay", "beta2", "clip", "accumulate", "ema_decay", "save_every", "keep", "log_every",
             "sample_every", "resume")
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    return {**{name: getattr(arguments, name) for name in names},
            "settings": {**settings, "cosine_steps": cosine, **more_settings},
            "learning_rate": lambda step: learning_rate_at(step, arguments.learning_rate, arguments.warmup_steps, cosine)}


@contextlib.contextmanager
def progress(arguments, accelerator, training):
    """A bar with loss and pictures a second, and TensorBoard; gives what `fit` is to report to."""
    from tqdm import tqdm

    from nets.run_folder import last_checkpoint

    found = last_checkpoint(training)
    first = int(found.name.rpartition("-")[2]) if found else 0
    def report(record):
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
