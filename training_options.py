"""The options of train.py."""

import argparse
import sys
from pathlib import Path

if __package__:  # installed
    from dit_verbs import command_line
else:
    import command_line

# Width, depth and heads; DiT paper, table 1.
MODELS = {"DiT-S": (384, 12, 6), "DiT-B": (768, 12, 12), "DiT-L": (1024, 24, 16), "DiT-XL": (1152, 28, 16)}
# The options that a run must not change when it is gone on with, but for those of nets.run_folder.ADJUSTABLE.
SETTINGS = ("part", "model", "width", "depth", "heads", "patch", "init", "freeze_below", "size", "flip", "label_dropout",
            "betas", "min_snr", "variance", "batch_size", "accumulate", "learning_rate", "warmup_steps", "decay",
            "weight_decay", "beta2", "ema_decay", "clip", "mixed_precision", "seed")
SHAPE = ("model", "width", "depth", "heads", "patch", "variance")  # of a new network: --init has its own
OF_A_DIT = (*SHAPE, "vae", "latents", "flip", "init", "freeze_below", "betas", "min_snr", "label_dropout", "compile",
            "gradient_checkpointing", "sample_every", "save_dtype")


def parse_arguments(argv=None, description=None):
    """The command line as a namespace, with `part` "dit" or "vae"; argparse ends the program where a value is wrong."""
    whole, positive, fraction = command_line.whole_number, command_line.positive_number, command_line.fraction
    argv = list(sys.argv[1:] if argv is None else argv)
    part = argv.pop(0) if argv and argv[0] in ("dit", "vae") else "dit"
    parser = command_line.ArgumentParser(description=description, formatter_class=command_line.HelpFormatter,
                                     usage="python train.py [dit|vae] --data DIR --output DIR [options]; --help lists them")
    parser.add_argument("--data", type=named, required=True, metavar="DIR",
                        help="a folder per class, or fashion-mnist")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR",
                        help="what becomes the pipeline's or VAE's folder")
    parser.add_argument("--resume", action="store_true",
                        help="go on from the last checkpoint in --output, if there is one")
    data = parser.add_argument_group("pictures")
    data.add_argument("--size", type=whole(8, 4096),
                      help="side in pixels (default: that of --init, or the shorter one of the first picture, at most 256)")
    data.add_argument("--flip", action="store_true", help="show half of the pictures mirrored")
    data.add_argument("--strict", action="store_true",
                      help="stop at a picture that cannot be read (default: leave it out)")
    data.add_argument("--vae", help="folder or hub id of a VAE or of a pipeline (default: that of --init)")
    data.add_argument("--latents", type=Path, metavar="DIR",
                      help="where they are kept (default: OUTPUT/training/latents)")
    net = parser.add_argument_group("network")
    net.add_argument("--model", choices=[f"{name}/{patch}" for name in MODELS for patch in (2, 4, 8)], default="DiT-S/2",
                     help="the published sizes, and the patch")
    net.add_argument("--width", type=whole(8, 8192), help="in place of --model's")
    net.add_argument("--depth", type=whole(1, 256), help="blocks")
    net.add_argument("--heads", type=whole(1, 256), help="of the attention (default: 64 channels each)")
    net.add_argument("--patch", type=whole(1, 64), help="latents a token is wide")
    net.add_argument("--init", metavar="FOLDER|ID|.pt",
                     help="trained weights to go on from; for other classes all but the label table is kept")
    net.add_argument("--freeze-below", type=whole(0, 256), default=0, metavar="N",
                     help="leave the patch embedding and the blocks before N as they are")
    goal = parser.add_argument_group("objective")
    goal.add_argument("--betas", choices=("linear", "cosine"), help="default: those of --init, or linear")
    goal.add_argument("--variance", choices=("learned", "fixed"), default="learned", help="of the reverse process")
    goal.add_argument("--min-snr", type=positive, metavar="GAMMA",
                      help="weigh the error by min(SNR, GAMMA) / SNR; 5 is usual")
    goal.add_argument("--label-dropout", type=fraction, default=0.1,
                      help="share of pictures shown without their class")
    loop = parser.add_argument_group("optimisation")
    loop.add_argument("--steps", type=whole(1, 10**9), default=400_000, help="of the whole run")
    loop.add_argument("--batch-size", type=whole(1, 2**20), default=256, help="of all processes together")
    loop.add_argument("--accumulate", type=whole(1, 4096), default=1, help="parts in which a batch is computed")
    loop.add_argument("--learning-rate", type=positive, default=1e-4, help="its peak")
    loop.add_argument("--warmup-steps", type=whole(0, 10**9), default=0, help="until the peak")
    loop.add_argument("--decay", choices=("constant", "cosine"), default="constant",
                      help="after the peak; cosine ends at 0")
    loop.add_argument("--weight-decay", type=fraction, default=0.0, help="of AdamW")
    loop.add_argument("--beta2", type=fraction, default=0.999, help="of AdamW")
    loop.add_argument("--clip", type=positive, default=1.0, help="largest norm of the gradient")
    loop.add_argument("--ema-decay", type=fraction, default=0.9999,
                      help="of the average of the weights, which is what is kept")
    loop.add_argument("--seed", type=whole(0, 2**63 - 1), default=0, help="of all that is random")
    speed = parser.add_argument_group("speed and memory")
    speed.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU if there is one")
    speed.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no",
                       help="of the network's computations; bf16 is for GPUs")
    speed.add_argument("--compile", action="store_true", help="takes a minute first")
    speed.add_argument("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")
    watch = parser.add_argument_group("what is written")
    watch.add_argument("--save-every", type=whole(1, 10**9), default=5000, help="steps between checkpoints")
    watch.add_argument("--keep", type=whole(1, 10**6), default=2, help="how many checkpoints stay")
    watch.add_argument("--log-every", type=whole(1, 10**9), default=50, help="steps between lines of the log")
    watch.add_argument("--sample-every", type=whole(0, 10**9), default=0,
                       help="steps between sheets of samples; 0 for none")
    watch.add_argument("--save-dtype", choices=("float32", "float16"), default="float32",
                       help="of the pipeline at the end")
    for action in parser._actions if part == "vae" else ():
        action.help = argparse.SUPPRESS if action.dest in OF_A_DIT else action.help
    absent = argparse.Namespace(part=part, **dict.fromkeys(OF_A_DIT))  # None stays where an option was not given
    arguments = parser.parse_args(argv, absent)
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


def named(text):
    """An argparse type: a text that names something."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text
