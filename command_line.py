"""What the verbs share: options, models by name, devices, and errors in one line."""

import argparse
import gc
import json
import logging
import os
import sys
import warnings
from pathlib import Path

from nets.scheduling import PRESETS, SCHEDULERS, SPACINGS, make_scheduler

MODEL_DATA = Path(__file__).resolve().parent / "model_data"
SMALL_MODEL, XL_MODEL = "fashion-mnist-32", "DiT-XL-2-256"
DTYPES = ("float32", "float16", "bfloat16")
# The options that shape a picture: what its text chunks carry, and what --like takes from there.
RECIPE = ("model", "steps", "guidance_scale", "seed", "scheduler", "dtype")
RECIPE_IF_GIVEN = ("revision", "variant", "guidance_channels", "guidance_interval", "spacing", "quantize")


class ArgumentParser(argparse.ArgumentParser):
    """One whose errors are a line, as all errors of the verbs."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help has all options)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the defaults of options that have one."""

    def _get_help_string(self, action):
        told = action.default in (None, False) or "default" in action.help
        return action.help if told else super()._get_help_string(action)


def exit_status(run, arguments, stopped="stopped") -> int:
    """Run a verb; returns 0, 2 for what can be mended, said in one line, or 130 if it was stopped."""
    warnings.formatwarning = lambda message, *_: f"{message}\n"
    try:
        run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # as in `--list-classes | head`; Python would complain again when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, ImportError) as error:
        print(f"{Path(sys.argv[0]).name}: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(error if error.args else stopped, file=sys.stderr)
        return 130
    return 0


def add_picture_options(parser):
    """The options of the verbs that make pictures: the model, and all that shapes a picture but class and seed."""
    parser.add_argument("--model", help=f"pipeline folder or hub id (default: model_data/{XL_MODEL} if it is there, "
                                        f"else {SMALL_MODEL}, which ships)")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id, such as refs/pr/1")
    parser.add_argument("--variant", help="variant of the weights, such as fp16")
    parser.add_argument("--steps", type=whole_number(1, 1000), default=25)
    parser.add_argument("--guidance-scale", type=finite_number, default=4.0, help="over 1 is guided (default 4)")
    parser.add_argument("--guidance-channels", type=whole_number(1, 64), metavar="N",
                        help="guide the first N latent channels only; 3 is facebookresearch/DiT's way (default: all)")
    parser.add_argument("--guidance-interval", type=interval, metavar="LOW,HIGH",
                        help="guide at noise levels sigma between these only (default: all)")
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="dpm", metavar="NAME",
                        help=f"one of {', '.join(SCHEDULERS)} (default dpm)")
    parser.add_argument("--spacing", choices=SPACINGS, help="where the scheduler's timesteps lie (default: its own way)")
    parser.add_argument("--preset", choices=PRESETS,
                        help="scheduler, steps, spacing and guidance interval at once. paper: the baseline that papers "
                             "report, DDPM with the learned variance, 250 steps, guidance 1.5 on 3 channels; reference, "
                             "balanced, fast and draft: less and less time, at the price that docs/speed.md tells")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--compile", action="store_true",
                        help="compile the networks: the same pictures up to rounding, the first of a batch size a minute "
                             "or more later, the others sooner")
    parser.add_argument("--quantize", choices=("int8",),
                        help="compute attention and MLP in int8, on a CPU and with --compile faster; the pictures change "
                             "(docs/speed.md); needs torchao")


def parse_picture_options(parser, argv):
    """The arguments, a preset's included, and which of those that shape a picture were given on the command line."""
    options = (*RECIPE, *RECIPE_IF_GIVEN)
    arguments = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(options)))  # None where it was not given
    given = [option for option in options if getattr(arguments, option) is not None]
    settings = {"steps" if name == "num_inference_steps" else name: value
                for name, value in PRESETS.get(arguments.preset, {}).items()}
    if set(given) & set(settings):
        parser.error(f"--preset {arguments.preset} sets {', '.join(set(given) & set(settings))}; give the one or the other")
    for option in options:
        if option not in given:
            setattr(arguments, option, settings.get(option, parser.get_default(option)))
    return arguments, given


def picture_arguments(arguments):
    """Those of the pipeline's arguments that are options of the command line."""
    return {"guidance_scale": arguments.guidance_scale, "num_inference_steps": arguments.steps,
            "guidance_channels": arguments.guidance_channels, "guidance_interval": arguments.guidance_interval}


def in_words(arguments):
    """What shapes the pictures beside model, classes and seed, for the line with which a verb begins."""
    guidance = f"guidance {arguments.guidance_scale:g}"
    if arguments.guidance_channels:
        guidance += f" on {arguments.guidance_channels} channels"
    if arguments.guidance_interval:
        guidance += " at sigma {:g} to {:g}".format(*arguments.guidance_interval)
    scheduler = f"{arguments.scheduler} ({arguments.spacing})" if arguments.spacing else arguments.scheduler
    words = [scheduler, f"{arguments.steps} steps", guidance, arguments.quantize, "compiled" if arguments.compile else None]
    return ", ".join(filter(None, words))


def whole_number(low, high):
    """An argparse type: an int in low..high."""
    def convert(text):
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not in {low}..{high}")
        return value
    convert.__name__ = "whole number"
    return convert


def finite_number(text):
    """An argparse type: a float that is a number."""
    value = float(text)
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def positive_number(text):
    """An argparse type: a float over 0."""
    value = finite_number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not over 0")
    return value


positive_number.__name__ = "number over 0"


def fraction(text):
    """An argparse type: a float in 0..1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..1")
    return value


def interval(text):
    """An argparse type: two floats, the lower first, as `0.3,5`."""
    try:
        low, high = (finite_number(number) for number in text.strip("()").split(","))
    except ValueError:
        low = high = -1.0
    if not 0 <= low < high:
        raise argparse.ArgumentTypeError(f"{text} is not LOW,HIGH with 0 <= LOW < HIGH")
    return low, high


def model_name():
    """The model when none is named: the published one if it is there, else the small one that ships."""
    return XL_MODEL if (MODEL_DATA / XL_MODEL).is_dir() else SMALL_MODEL


def find_model(model, revision=None):
    """The folder (or hub id) of a model, and its id2label with ints as keys; nothing heavy is imported for a folder."""
    candidates = [MODEL_DATA / model, Path(model)]
    folder = next((path for path in candidates if (path / "model_index.json").is_file()), None)
    if folder is None and (Path(model).exists() or model.count("/") != 1 or model.startswith((".", "/"))):
        raise ValueError(f"no model in {model}: there is no {model}/model_index.json")
    try:
        index = folder
        if folder is None:
            quiet_diffusers()
            from nets.loading import find_folder

            index = find_folder(model, ["model_index.json"], revision=revision)
        config = json.loads((index / "model_index.json").read_text())
        id2label = {int(key): names for key, names in (config.get("id2label") or {}).items()}
        if not all(isinstance(names, str) for names in id2label.values()):
            raise ValueError("id2label in its model_index.json has names that are no text")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"cannot read model {model}: {first_line(error)}") from error
    return folder or model, id2label


def load_pipeline(folder, arguments, lap=lambda name: None):
    """The pipeline on its device, with the scheduler that was asked for; `lap` is told when all is imported."""
    quiet_diffusers()
    import torch

    from nets import DiTPipeline

    lap("import")
    device = find_device(arguments.device)
    try:
        pipeline = DiTPipeline.from_pretrained(folder, dtype=getattr(torch, arguments.dtype), revision=arguments.revision,
                                               variant=arguments.variant)
        for part in ("transformer", "vae"):
            if getattr(pipeline, part) is None:
                raise ValueError(f"its folder has no {part}/; put one into it")
        pipeline.check_vae(pipeline.transformer.config.in_channels)
        pipeline.to(device)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot load model {arguments.model} on {device}: {first_line(error)}") from error
    try:
        pipeline.scheduler = make_scheduler(arguments.scheduler, pipeline.scheduler, arguments.spacing)
    except ImportError as error:  # a package that this scheduler alone needs
        raise ValueError(f"--scheduler {arguments.scheduler} cannot run here: {' '.join(str(error).split())}") from error
    return pipeline, device


def quiet_diffusers():
    """Import diffusers without its warnings and bars; what matters of them is an error here.

    And, the first time, with the garbage collector off and what came frozen: it all stays, and to go through it again and
    again, and once more at the exit, is a fifth of a short process's time.
    """
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in ("torchao", "torch.utils._pytree"):  # diffusers imports torchao where it is, which complains of its own
        logging.getLogger(name).setLevel(logging.ERROR)
    first_time = "diffusers" not in sys.modules
    if first_time:
        gc.disable()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    if first_time:
        gc.freeze()
        gc.enable()


def speed_up(pipeline, arguments):
    """Do what --quantize and --compile ask for, and say what it costs; without a compiler, say so and go on."""
    if not (arguments.quantize or arguments.compile):
        return
    from nets.acceleration import compile_networks, quantize_int8

    if arguments.quantize:
        quantize_int8(pipeline)
    if arguments.compile:
        try:
            compile_networks(pipeline)
            print("compiling with the first pictures takes a while; it pays where they are many", file=sys.stderr)
        except (OSError, ImportError) as error:
            if arguments.quantize:  # whose pictures would be others
                raise ValueError(f"{error}; or leave out --quantize int8, which is slower than float32 without --compile"
                                 ) from error
            arguments.compile = False
            print(f"{error}; going on without --compile", file=sys.stderr)
    elif arguments.quantize:
        print("int8 is slower than float32 without --compile", file=sys.stderr)


def require_processes(started):
    """Raise a ValueError where a launcher started more processes than know of each other, as without GPUs for them."""
    wanted = int(os.environ.get("WORLD_SIZE", 1))
    if wanted != started:
        raise ValueError(f"started as {wanted} processes, and each finds itself alone: there are no GPUs for them; add "
                         "--device cpu")


def find_device(name):
    """The device that --device names; "auto" is the fastest there is."""
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def first_line(error):
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
