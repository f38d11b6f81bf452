"""Class names in, pictures out.

    python predict.py bag "ankle boot"
    python predict.py --list-classes boot
    python predict.py --like outputs/bag-seed42.png
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from nets.scheduling import PAPER_SAMPLING, SCHEDULERS, make_scheduler

MODEL_DATA = Path(__file__).resolve().parent / "model_data"
SMALL_MODEL, XL_MODEL = "fashion-mnist-32", "DiT-XL-2-256"
PRESETS = {"paper": {"scheduler": "ddpm-learned", "steps": PAPER_SAMPLING["num_inference_steps"],
                     "guidance_scale": PAPER_SAMPLING["guidance_scale"],
                     "guidance_channels": PAPER_SAMPLING["guidance_channels"]}}
DTYPES = ("float32", "float16", "bfloat16")
# The options that shape a picture: what its text chunks carry, and what --like takes from there.
RECIPE = ("model", "steps", "guidance_scale", "seed", "scheduler", "dtype")
RECIPE_IF_GIVEN = ("revision", "variant", "guidance_channels", "guidance_interval")


def main(argv=None) -> int:
    """Run the command line; returns the exit status: 0, or 2 for input that is wrong."""
    try:
        run(parse_arguments(argv))
        sys.stdout.flush()
    except BrokenPipeError:  # as in `--list-classes | head`; Python would complain again when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        print(f"{Path(sys.argv[0]).name}: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def run(arguments):
    """Load the model, make the pictures, write them."""
    arguments.model = arguments.model or model_name()
    class_ids, index = read_recipe(arguments) if arguments.like else (None, None)
    folder, id2label = find_model(arguments.model, arguments.revision)
    if arguments.list_classes is not None:
        return list_classes(id2label, arguments.list_classes)
    if class_ids is None:
        class_ids = [label for label in choose_classes(arguments, id2label) for _ in range(arguments.images_per_class)]
    try:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=arguments.output_dir).close()  # known now, and not after the work
    except OSError as error:
        raise ValueError(f"cannot write into {arguments.output_dir}: {error.strerror}") from error
    pipeline, device = load_pipeline(folder, arguments)

    import torch

    from nets.labels import check_class_ids
    from nets.pictures import contact_sheet, free_path, save_picture, slug

    check_class_ids(class_ids, pipeline.transformer.config.num_embeds_ada_norm)
    channels = f" on {arguments.guidance_channels} channels" if arguments.guidance_channels else ""
    print(f"model {arguments.model} · {device} {arguments.dtype} · {arguments.scheduler}, {arguments.steps} steps, "
          f"guidance {arguments.guidance_scale:g}{channels} · seed {arguments.seed}", flush=True)
    started = time.perf_counter()
    try:
        generator = torch.Generator().manual_seed(arguments.seed)
        pictures = pipeline(class_ids, generator=generator, **picture_arguments(arguments)).images
    except (ValueError, RuntimeError) as error:  # a scheduler that cannot do so few steps, too little memory
        raise ValueError(f"cannot make these pictures with {arguments.scheduler}: {first_line(error)}") from error
    seconds = time.perf_counter() - started

    names = [first_name(id2label, label) for label in class_ids]
    for position in range(len(pictures)) if index is None else [index]:
        path = free_path(arguments.output_dir / f"{slug(names[position])}-seed{arguments.seed}.png")
        save_picture(pictures[position], path, recipe(arguments, class_ids, position, names[position]))
        print(f"{path}  {names[position]}  ({seconds / len(pictures):.2f} s)")
    if arguments.grid:
        path = free_path(arguments.output_dir / f"grid-seed{arguments.seed}.png")
        save_picture(contact_sheet(pictures, names), path, {})
        print(f"{path}  all {len(pictures)} on one sheet")


def parse_arguments(argv):
    """The command line as a namespace; argparse ends the program with status 2 where a value is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="class names; without any, two are picked by the seed")
    add_picture_options(parser)
    parser.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=42, help="0 or more (default 42)")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    parser.add_argument("--images-per-class", type=whole_number(1, 10_000), default=1)
    parser.add_argument("--grid", action="store_true", help="write one sheet with captions as well")
    parser.add_argument("--list-classes", nargs="?", const="", metavar="TEXT",
                        help="print the model's class names (those with TEXT in them) and stop")
    parser.add_argument("--like", type=Path, metavar="FILE.png",
                        help="make this picture again, from what is written in it; its whole call runs again, since "
                             "one generator draws the noise for all its pictures")
    arguments, given = parse_picture_options(parser, argv)
    if arguments.list_classes is not None and arguments.names:
        parser.error(f"--list-classes takes one text; {' '.join(arguments.names)!r} is too much")
    if arguments.like:
        given += [option for option in ("names", "preset") if getattr(arguments, option)]
        given += ["images_per_class"] if arguments.images_per_class > 1 else []
        if given:
            parser.error(f"--like takes {', '.join(given)} from the picture; leave it out")
    return arguments


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
    parser.add_argument("--preset", choices=PRESETS,
                        help="paper: the baseline that papers report, DDPM with the learned variance, 250 steps, guidance "
                             "1.5 on 3 channels; sets --scheduler, --steps, --guidance-scale and --guidance-channels")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")


def parse_picture_options(parser, argv):
    """The arguments, a preset's included, and which of those that shape a picture were given on the command line."""
    options = (*RECIPE, *RECIPE_IF_GIVEN)
    arguments = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(options)))  # None where it was not given
    given = [option for option in options if getattr(arguments, option) is not None]
    settings = PRESETS.get(arguments.preset, {})
    if set(given) & set(settings):
        parser.error(f"--preset {arguments.preset} sets {', '.join(set(given) & set(settings))}; leave it out")
    for option in options:
        if option not in given:
            setattr(arguments, option, settings.get(option, parser.get_default(option)))
    return arguments, given


def picture_arguments(arguments):
    """Those of the pipeline's arguments that are options of the command line."""
    return {"guidance_scale": arguments.guidance_scale, "num_inference_steps": arguments.steps,
            "guidance_channels": arguments.guidance_channels, "guidance_interval": arguments.guidance_interval}


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


def interval(text):
    """An argparse type: two floats, the lower first, as `0.3,5`."""
    low, high = (finite_number(number) for number in text.strip("()").split(","))
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
            from nets.loading import find_folder

            index = find_folder(model, ["model_index.json"], revision=revision)
        config = json.loads((index / "model_index.json").read_text())
        id2label = {int(key): names for key, names in (config.get("id2label") or {}).items()}
        if not all(isinstance(names, str) for names in id2label.values()):
            raise ValueError("id2label in its model_index.json has names that are no text")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"cannot read model {model}: {first_line(error)}") from error
    return folder or model, id2label


def choose_classes(arguments, id2label):
    """The class ids of the names given, or of two classes picked by the seed."""
    from nets.labels import find_label_ids

    if not arguments.names and not id2label:
        raise ValueError("this model has no class names (no id2label in its model_index.json); give class ids as numbers")
    if not arguments.names:
        import random

        return random.Random(arguments.seed).sample(sorted(id2label), min(2, len(id2label)))
    try:
        return find_label_ids(arguments.names, id2label)
    except ValueError as error:
        raise ValueError(f"{error}{imagenet_hint(arguments.names, id2label)}") from error


def imagenet_hint(names, id2label):
    """How to get the model that knows a name of ImageNet, where such a name was given to a model that does not."""
    from nets.labels import name_index, plain_form

    imagenet = name_index(json.loads((MODEL_DATA / "imagenet_id2label.json").read_text()))
    missing = {plain_form(name) for name in names} - set(name_index(id2label))
    if not missing & set(imagenet):
        return ""
    return (f"; this is a class of ImageNet: put facebook/{XL_MODEL} into model_data/{XL_MODEL} "
            f"(see model_data/README.md), or use --model facebook/{XL_MODEL}")


def list_classes(id2label, text):
    """Print the classes whose names contain the text: id, and for each name the spelling that means this class alone."""
    from nets.labels import spellings

    for label, names in sorted(spellings(id2label).items()):
        if text.casefold() in id2label[label].casefold():
            print(f"{label:>4}  {', '.join(names)}")


def load_pipeline(folder, arguments):
    """The pipeline on its device, with the scheduler that was asked for."""
    import diffusers
    import torch

    from nets import DiTPipeline

    device = find_device(arguments.device)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipeline = DiTPipeline.from_pretrained(folder, dtype=getattr(torch, arguments.dtype), revision=arguments.revision,
                                               variant=arguments.variant)
        pipeline.to(device)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot load model {arguments.model} on {device}: {first_line(error)}") from error
    try:
        pipeline.scheduler = make_scheduler(arguments.scheduler, pipeline.scheduler)
    except ImportError as error:  # a package that this scheduler alone needs
        raise ValueError(f"--scheduler {arguments.scheduler} cannot run here: {' '.join(str(error).split())}") from error
    return pipeline, device


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


def recipe(arguments, class_ids, index, name):
    """The text chunks of a picture: all that makes it again, and what made it."""
    import diffusers
    import torch

    import nets

    model = arguments.model
    if not (MODEL_DATA / model).is_dir() and Path(model).is_dir():
        model = str(Path(model).resolve())
    given = [option for option in RECIPE_IF_GIVEN if getattr(arguments, option) is not None]
    return {**{option: str(getattr(arguments, option)) for option in (*RECIPE, *given)}, "model": model,
            "class_ids": json.dumps(class_ids), "index": str(index), "class_name": name,
            "versions": f"nets {nets.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}"}


def read_recipe(arguments):
    """Set the arguments from the text chunks of arguments.like; returns the call's class ids and the picture's index."""
    from nets.pictures import read_text

    if not arguments.like.is_file():
        raise ValueError(f"there is no picture {arguments.like}")
    try:
        text = read_text(arguments.like)
        class_ids, index = json.loads(text["class_ids"]), int(text["index"])
        if not (isinstance(class_ids, list) and all(type(label) is int for label in class_ids)
                and 0 <= index < len(class_ids)):
            raise ValueError(f"index {index} in class_ids {class_ids}")
        written = (*RECIPE, *(option for option in RECIPE_IF_GIVEN if option in text))
        options = [word for option in written for word in (f"--{option.replace('_', '-')}", text[option])]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{arguments.like} does not say how it was made: not a readable PNG of predict.py "
                        f"({'no ' if isinstance(error, KeyError) else ''}{first_line(error)})") from error
    settled = parse_arguments(options)  # with the command line's own checks
    for option in (*RECIPE, *RECIPE_IF_GIVEN):
        setattr(arguments, option, getattr(settled, option))
    return class_ids, index


def first_name(id2label, label):
    """The first of a class's names, or "none" for the null class."""
    return id2label.get(label, "none" if id2label else str(label)).split(",")[0].strip()


def first_line(error):
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
