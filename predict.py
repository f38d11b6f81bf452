"""Class names in, pictures out.

    python predict.py bag "ankle boot"
    python predict.py --list-classes boot
    python predict.py --like outputs/bag-seed42.png
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

if __package__:  # installed
    from dit_verbs import command_line
else:
    import command_line


def main(argv=None) -> int:
    """Run the command line; returns the exit status, as `command_line.exit_status` has it."""
    return command_line.exit_status(run, parse_arguments(argv))


def run(arguments):
    """Load the model, make the pictures, write them."""
    seconds, started = {}, time.perf_counter()

    def lap(name):
        seconds[name] = time.perf_counter() - started - sum(seconds.values())

    arguments.model = arguments.model or command_line.model_name()
    class_ids, index = read_recipe(arguments) if arguments.like else (None, None)
    folder, id2label = command_line.find_model(arguments.model, arguments.revision)
    if arguments.list_classes is not None:
        return list_classes(id2label, arguments.list_classes)
    if class_ids is None:
        class_ids = [label for label in choose_classes(arguments, id2label) for _ in range(arguments.images_per_class)]
    try:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=arguments.output_dir).close()  # known now, and not after the work
    except OSError as error:
        raise ValueError(f"cannot write into {arguments.output_dir}: {error.strerror}") from error
    pipeline, device = command_line.load_pipeline(folder, arguments, lap)
    command_line.speed_up(pipeline, arguments)

    import torch

    from nets.labels import check_class_ids
    from nets.pictures import contact_sheet, free_path, save_picture, slug

    check_class_ids(class_ids, pipeline.transformer.config.num_embeds_ada_norm)
    print(f"model {arguments.model} · {device} {arguments.dtype} · {command_line.in_words(arguments)} · "
          f"seed {arguments.seed}", flush=True)
    lap("load")
    try:
        generator = torch.Generator().manual_seed(arguments.seed)
        pictures = pipeline(class_ids, generator=generator, **command_line.picture_arguments(arguments)).images
    except (ValueError, RuntimeError) as error:  # a scheduler that cannot do so few steps, too little memory
        raise ValueError(f"cannot make these pictures ({command_line.in_words(arguments)}): "
                         f"{command_line.first_line(error)}") from error
    lap("sampling")

    names = [first_name(id2label, label) for label in class_ids]
    for position in range(len(pictures)) if index is None else [index]:
        path = free_path(arguments.output_dir / f"{slug(names[position])}-seed{arguments.seed}.png")
        save_picture(pictures[position], path, recipe(arguments, class_ids, position, names[position]))
        print(f"{path}  {names[position]}  ({seconds['sampling'] / len(pictures):.2f} s)")
    if arguments.grid:
        path = free_path(arguments.output_dir / f"grid-seed{arguments.seed}.png")
        save_picture(contact_sheet(pictures, names), path, {})
        print(f"{path}  all {len(pictures)} on one sheet")
    lap("saving")
    if arguments.timings:
        shares = (f"{name} {part:.2f} s ({part / sum(seconds.values()):.0%})" for name, part in seconds.items())
        print(f"{' · '.join(shares)} · together {sum(seconds.values()):.2f} s")


def parse_arguments(argv):
    """The command line as a namespace; argparse ends the program with status 2 where a value is wrong."""
    parser = command_line.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="class names; without any, two are picked by the seed")
    command_line.add_picture_options(parser)
    parser.add_argument("--seed", type=command_line.whole_number(0, 2**63 - 1), default=42, help="0 or more (default 42)")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    parser.add_argument("--images-per-class", type=command_line.whole_number(1, 10_000), default=1)
    parser.add_argument("--grid", action="store_true", help="write one sheet with captions as well")
    parser.add_argument("--timings", action="store_true",
                        help="tell what importing, loading, sampling (compiling with it) and saving took")
    parser.add_argument("--list-classes", nargs="?", const="", metavar="TEXT",
                        help="print the model's class names (those with TEXT in them) and stop")
    parser.add_argument("--like", type=Path, metavar="FILE.png",
                        help="make this picture again, from what is written in it; its whole call runs again, since "
                             "one generator draws the noise for all its pictures")
    arguments, given = command_line.parse_picture_options(parser, argv)
    if arguments.list_classes is not None and arguments.names:
        parser.error(f"--list-classes takes one text; {' '.join(arguments.names)!r} is too much")
    if arguments.like:
        given += [option for option in ("names", "preset") if getattr(arguments, option)]
        given += ["images_per_class"] if arguments.images_per_class > 1 else []
        if given:
            parser.error(f"--like takes {', '.join(given)} from the picture; leave it out")
    return arguments


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

    imagenet = name_index(json.loads((command_line.MODEL_DATA / "imagenet_id2label.json").read_text()))
    missing = {plain_form(name) for name in names} - set(name_index(id2label))
    if not missing & set(imagenet):
        return ""
    return (f"; this is a class of ImageNet: put facebook/{command_line.XL_MODEL} into model_data/{command_line.XL_MODEL} "
            f"(see model_data/README.md), or use --model facebook/{command_line.XL_MODEL}")


def list_classes(id2label, text):
    """Print the classes whose names contain the text: id, and for each name the spelling that means this class alone."""
    from nets.labels import spellings

    found = [(label, names) for label, names in sorted(spellings(id2label).items())
             if text.casefold() in id2label[label].casefold()]
    for label, names in found:
        print(f"{label:>4}  {', '.join(names)}")
    if not found:
        print(f"no class name of this model has {text!r} in it" if text else "this model has no class names",
              file=sys.stderr)


def recipe(arguments, class_ids, index, name):
    """The text chunks of a picture: all that makes it again, and what made it."""
    import diffusers
    import torch

    import nets

    model = arguments.model
    if not (command_line.MODEL_DATA / model).is_dir() and Path(model).is_dir():
        model = str(Path(model).resolve())
    given = [option for option in command_line.RECIPE_IF_GIVEN if getattr(arguments, option) is not None]
    compiled = {"compile": "yes"} if arguments.quantize and arguments.compile else {}  # int8's kernels are others then
    return {**{option: str(getattr(arguments, option)) for option in (*command_line.RECIPE, *given)}, "model": model,
            **compiled, "class_ids": json.dumps(class_ids), "index": str(index), "class_name": name,
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
        written = (*command_line.RECIPE, *(option for option in command_line.RECIPE_IF_GIVEN if option in text))
        options = [word for option in written for word in (f"--{option.replace('_', '-')}", text[option])]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{arguments.like} does not say how it was made: not a readable PNG of predict.py "
                        f"({'no ' if isinstance(error, KeyError) else ''}{command_line.first_line(error)})") from error
    settled = parse_arguments(options)  # with the command line's own checks
    for option in (*command_line.RECIPE, *command_line.RECIPE_IF_GIVEN):
        setattr(arguments, option, getattr(settled, option))
    if arguments.quantize:
        if arguments.compile and "compile" not in text:
            raise ValueError(f"{arguments.like} was made in int8 without --compile, with which it is another picture; "
                             "leave --compile out")
        arguments.compile = "compile" in text
    return class_ids, index


def first_name(id2label, label):
    """The first of a class's names, or "none" for the null class."""
    return id2label.get(label, "none" if id2label else str(label)).split(",")[0].strip()


if __name__ == "__main__":
    sys.exit(main())
