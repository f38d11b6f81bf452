"""Class names in, pictures out.

    python predict.py bag "ankle boot"
    python predict.py --list-classes boot
    python predict.py --like outputs/bag-seed42.png
"""

import argparse
import json
import sys
import time
from pathlib import Path

MODEL_DATA = Path(__file__).resolve().parent / "model_data"
SMALL_MODEL, XL_MODEL = "fashion-mnist-32", "DiT-XL-2-256"
SCHEDULERS = {
    "dpm": "DPMSolverMultistepScheduler", "ddim": "DDIMScheduler", "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler", "euler-a": "EulerAncestralDiscreteScheduler", "heun": "HeunDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler", "deis": "DEISMultistepScheduler", "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
}
DTYPES = ("float32", "float16", "bfloat16")
# What a picture's text chunks say of how to make it again: argument -> type.
RECIPE = {"model": str, "steps": int, "guidance_scale": float, "seed": int, "scheduler": str, "dtype": str}


class UserError(Exception):
    """Something that the user can mend; its one line is all that is printed."""


def main(argv=None) -> int:
    """Run the command line; returns the exit status: 0, or 2 for input that is wrong."""
    try:
        run(parse_arguments(argv))
    except UserError as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return 2
    return 0


def run(arguments):
    """Load the model, make the pictures, write them."""
    arguments.model = arguments.model or (XL_MODEL if (MODEL_DATA / XL_MODEL).is_dir() else SMALL_MODEL)
    index = None
    if arguments.like:
        arguments.names, class_ids, index = read_recipe(arguments)
    folder, id2label = find_model(arguments.model)
    if arguments.list_classes is not None:
        return list_classes(id2label, arguments.list_classes)
    if not arguments.like:
        class_ids = choose_classes(arguments, id2label)
        class_ids = [label for label in class_ids for _ in range(arguments.images_per_class)]

    pipeline, device = load_pipeline(folder, arguments)
    print(f"model {arguments.model} · {device} {arguments.dtype} · {arguments.scheduler}, {arguments.steps} steps, "
          f"guidance {arguments.guidance_scale:g} · seed {arguments.seed}", flush=True)

    import torch

    generator = torch.Generator().manual_seed(arguments.seed)
    started = time.perf_counter()
    pictures = pipeline(class_ids, guidance_scale=arguments.guidance_scale, generator=generator,
                        num_inference_steps=arguments.steps).images
    seconds = time.perf_counter() - started

    names = [first_name(id2label, label) for label in class_ids]
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
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
    parser = argparse.ArgumentParser(prog="predict.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="class names; without any, two are picked by the seed")
    parser.add_argument("--model", help=f"pipeline folder or hub id (default: model_data/{XL_MODEL} if it is there, "
                                        f"else {SMALL_MODEL}, which ships)")
    parser.add_argument("--steps", type=whole_number(1, 1000), default=25)
    parser.add_argument("--guidance-scale", type=finite_number, default=4.0, help="over 1 is guided (default 4)")
    parser.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=42, help="0 or more (default 42)")
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="dpm", metavar="NAME",
                        help=f"one of {', '.join(SCHEDULERS)} (default dpm)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    parser.add_argument("--images-per-class", type=whole_number(1, 10_000), default=1)
    parser.add_argument("--grid", action="store_true", help="write one sheet with captions as well")
    parser.add_argument("--list-classes", nargs="?", const="", metavar="TEXT",
                        help="print the model's class names (those with TEXT in them) and stop")
    parser.add_argument("--like", type=Path, metavar="FILE.png",
                        help="make this picture again, from what is written in it; its whole call runs again, since "
                             "one generator draws the noise for all its pictures")
    return parser.parse_args(argv)


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


def find_model(model):
    """The folder (or hub id) of a model, and its id2label with ints as keys; nothing heavy is imported for a folder."""
    candidates = [MODEL_DATA / model, Path(model)]
    folder = next((path for path in candidates if (path / "model_index.json").is_file()), None)
    if folder is None and (Path(model).exists() or model.count("/") != 1 or model.startswith((".", "/"))):
        raise UserError(f"no model in {model}: there is no {model}/model_index.json")
    try:
        if folder:
            config = json.loads((folder / "model_index.json").read_text())
        else:
            from diffusers import DiffusionPipeline

            config = DiffusionPipeline.load_config(model)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read model {model}: {first_line(error)}") from error
    return folder or model, {int(key): names for key, names in (config.get("id2label") or {}).items()}


def choose_classes(arguments, id2label):
    """The class ids of the names given, or of two classes picked by the seed."""
    from nets.labels import find_label_ids, label_table

    labels = label_table(id2label)
    if not arguments.names and not labels:
        raise UserError("this model has no class names (no id2label in its model_index.json)")
    if not arguments.names:
        import random

        return random.Random(arguments.seed).sample(sorted(id2label), min(2, len(id2label)))
    try:
        return find_label_ids(arguments.names, labels)
    except ValueError as error:
        raise UserError(f"{error}{imagenet_hint(arguments, labels)}") from error


def imagenet_hint(arguments, labels):
    """How to get the model that knows a name of ImageNet, where such a name was given to a model that does not."""
    from nets.labels import find_label_ids, label_table

    imagenet = label_table(json.loads((MODEL_DATA / "imagenet_id2label.json").read_text()))
    for name in arguments.names:
        try:
            find_label_ids(name, labels)
        except ValueError:
            try:
                find_label_ids(name, imagenet)
            except ValueError:
                return ""
            return (f". {name!r} is a class of ImageNet: put facebook/{XL_MODEL} into model_data/{XL_MODEL} "
                    f"(see model_data/README.md), or use --model facebook/{XL_MODEL}")
    return ""


def list_classes(id2label, text):
    """Print id and names of the classes whose names contain the text."""
    for label, names in sorted(id2label.items()):
        if text.casefold() in names.casefold():
            print(f"{label:>4}  {names}")


def load_pipeline(folder, arguments):
    """The pipeline on its device, with the scheduler that was asked for."""
    import diffusers
    import torch

    from nets import DiTPipeline

    device = arguments.device
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipeline = DiTPipeline.from_pretrained(folder, dtype=getattr(torch, arguments.dtype))
        pipeline.to(device)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"cannot load model {arguments.model} on {device}: {first_line(error)}") from error
    scheduler_class = getattr(diffusers, SCHEDULERS[arguments.scheduler])
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
    return pipeline, device


def recipe(arguments, class_ids, index, name):
    """The text chunks of a picture: all that makes it again, and what made it."""
    import diffusers
    import torch

    import nets

    model = arguments.model
    if not (MODEL_DATA / model).is_dir() and Path(model).is_dir():
        model = str(Path(model).resolve())
    return {**{key: str(getattr(arguments, key)) for key in RECIPE}, "model": model, "class_ids": json.dumps(class_ids),
            "index": str(index), "class_name": name,
            "versions": f"nets {nets.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}"}


def read_recipe(arguments):
    """Set the arguments from the text chunks of arguments.like; returns names (none), class ids and the index."""
    from PIL import Image

    try:
        with Image.open(arguments.like) as picture:
            text = picture.text
        for key, convert in RECIPE.items():
            setattr(arguments, key, convert(text[key]))
        return [], json.loads(text["class_ids"]), int(text["index"])
    except (OSError, AttributeError, KeyError, ValueError) as error:
        raise UserError(f"{arguments.like} does not say how it was made: not a readable PNG of predict.py "
                        f"({first_line(error)})") from error


def save_picture(picture, path, text):
    """Write a PNG with text chunks; the file appears whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, value in text.items():
        chunks.add_itxt(key, value)
    unfinished = path.with_suffix(".part")
    picture.save(unfinished, format="PNG", pnginfo=chunks)
    unfinished.rename(path)


def contact_sheet(pictures, names, columns=8, smallest=96):
    """All pictures on one sheet, each over its name; small ones are enlarged to `smallest` pixels."""
    from PIL import Image, ImageDraw

    factor = -(-smallest // pictures[0].width)
    width, height, caption = pictures[0].width * factor, pictures[0].height * factor, 16
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 4), rows * (height + caption + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, name) in enumerate(zip(pictures, names)):
        left, top = index % columns * (width + 4) + 2, index // columns * (height + caption + 4) + 2
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.text((left, top + height + 2), name[:width // 6], fill="black")
    return sheet


def first_name(id2label, label):
    """The first of a class's names, or "none" for the null class."""
    return id2label.get(label, "none" if id2label else str(label)).split(",")[0].strip()


def slug(name):
    """A name as part of a file name."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")


def free_path(path):
    """The path itself, or with -2, -3, ... where a file of that name is there: nothing is overwritten."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate


def first_line(error):
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
