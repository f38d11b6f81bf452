"""Thousands of pictures into a folder, by one process or many, to be interrupted and taken up again at will.

    python sample.py --num 50000 --output runs/samples --npz
    accelerate launch --multi_gpu --num_processes 8 sample.py --num 50000 --output runs/samples    # eight GPUs
    torchrun --nproc_per_node 2 -- sample.py --device cpu --num 2000 --output runs/samples         # two processes on CPUs
"""

import argparse
import contextlib
import datetime
import os
import sys
import threading
import time
from pathlib import Path

if __package__:  # installed
    from dit_verbs import command_line
else:
    import command_line

# What settles every picture, beside the weights: two runs that differ in one of these make different pictures.
SETTINGS = ("steps", "guidance_scale", "guidance_channels", "guidance_interval", "scheduler", "spacing", "dtype",
            "quantize", "seed")
NPZ = "samples.npz"


def main(argv=None) -> int:
    """Run the command line; returns the exit status, as `command_line.exit_status` has it."""
    return command_line.exit_status(run, parse_arguments(argv), "stopped; the same command goes on where it was")


def parse_arguments(argv):
    """The command line as a namespace; argparse ends the program with status 2 where a value is wrong."""
    parser = command_line.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=command_line.whole_number(1, 10**8), required=True, help="how many pictures")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR",
                        help="a new or empty folder, or one to go on with")
    parser.add_argument("--batch-size", type=command_line.whole_number(1, 10_000), default=32,
                        help="of one process (default 32)")
    parser.add_argument("--labels", default="uniform", metavar="HOW",
                        help="uniform: a class drawn for each picture (default); balanced: all classes in turn; "
                             "NAME,NAME,...: these in turn; or a text file with a name or an id a line")
    parser.add_argument("--npz", action="store_true", help="write samples.npz for the ADM evaluator too")
    command_line.add_picture_options(parser)
    parser.add_argument("--seed", type=command_line.whole_number(0, 2**63 - 1), default=0, help="0 or more (default 0)")
    return command_line.parse_picture_options(parser, argv)[0]


def run(arguments):
    """Find out what is missing, make this process's share of it, and let the first process put the whole together."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    command_line.quiet_diffusers()
    from nets.loading import fingerprint
    from nets.sampling import held, write_npz

    arguments.model = arguments.model or command_line.model_name()
    # Processes wait for each other at the start, while one looks through the folder, and at the end, for the slowest.
    state = PartialState(cpu=arguments.device == "cpu", timeout=datetime.timedelta(days=1))
    command_line.require_processes(state.num_processes)
    arguments.device = str(state.device) if arguments.device == "auto" else arguments.device
    folder, id2label = command_line.find_model(arguments.model, arguments.revision)
    pipeline, _ = command_line.load_pipeline(folder, arguments)
    pipeline.set_progress_bar_config(disable=True)
    weights = fingerprint(pipeline.transformer, pipeline.vae)  # before int8 changes them
    command_line.speed_up(pipeline, arguments)
    labels = read_labels(arguments.labels, id2label, pipeline.transformer.config.num_embeds_ada_norm)

    with contextlib.ExitStack() as holding:
        message = [None, None]
        if state.is_main_process:
            try:
                holding.enter_context(held(arguments.output))
                message = [find_missing(arguments, picture_settings(arguments, pipeline, weights, labels, id2label)), None]
            except (OSError, ValueError) as error:
                message = [None, str(error)]
        missing, refusal = broadcast_object_list(message)
        if refusal:
            raise ValueError(refusal)
        if state.is_main_process:
            print(f"model {arguments.model} · {state.num_processes} x {arguments.device} {arguments.dtype} · "
                  f"{command_line.in_words(arguments)} · seed {arguments.seed} · "
                  f"{len(missing)} of {arguments.num} pictures to make", flush=True)
        started = time.perf_counter()
        with progress_bar(arguments.output, len(missing), disable=not state.is_main_process):
            make_pictures(pipeline, arguments, missing[state.process_index::state.num_processes], labels, state)
        if state.is_main_process:
            done = gather_all(arguments)
            if missing:
                print(f"{len(missing)} pictures, {len(missing) / (time.perf_counter() - started):.2f} a second")
            if arguments.npz:
                class_ids = [done[index]["class"] for index in range(arguments.num)]
                write_npz(arguments.output, class_ids, arguments.output / NPZ)
                print(arguments.output / NPZ)
            print(f"{arguments.output}: {arguments.num} pictures, {len(done)} in the manifest")


def picture_settings(arguments, pipeline, weights, labels, id2label):
    """What settles every picture, as settings.json has it."""
    from nets.loading import config_fingerprint

    given = {name: getattr(arguments, name) for name in SETTINGS}
    return {**{name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}, "labels": labels,
            "compile": (arguments.quantize and arguments.compile) or None,  # int8's kernels are others then
            "weights": weights, "config": config_fingerprint(pipeline.transformer, pipeline.vae, pipeline.scheduler),
            "class_names": {str(label): names for label, names in id2label.items()}}


def find_missing(arguments, settings):
    """Make or take up the folder; returns the indices of the pictures still to make. A .npz of fewer is removed."""
    from nets.sampling import open_folder

    done = open_folder(arguments.output, settings, {"num": arguments.num, "model": arguments.model})
    missing = [index for index in range(arguments.num) if index not in done]
    if missing:
        (arguments.output / NPZ).unlink(missing_ok=True)
    return missing


def make_pictures(pipeline, arguments, mine, labels, state):
    """Make this process's pictures, and wait until the others have theirs."""
    from nets.sampling import PictureWriter, picture_generator, picture_label

    classes = pipeline.transformer.config.num_embeds_ada_norm
    try:
        with PictureWriter(arguments.output, state.process_index, ahead=2 * arguments.batch_size) as writer:
            for start in range(0, len(mine), arguments.batch_size):
                batch = indices = mine[start:start + arguments.batch_size]
                if arguments.compile and start:  # as many again: another batch size would be compiled anew
                    batch = indices + indices[-1:] * (arguments.batch_size - len(indices))
                class_ids = [picture_label(labels, classes, arguments.seed, index) for index in batch]
                generators = [picture_generator(arguments.seed, index) for index in batch]
                pictures = pipeline(class_ids, generator=generators, **command_line.picture_arguments(arguments)).images
                for index, class_id, picture in zip(indices, class_ids, pictures):
                    writer.put(picture, {"index": index, "class": class_id, "seed": arguments.seed})
        state.wait_for_everyone()
    except (ValueError, RuntimeError) as error:  # a scheduler that cannot do so few steps, too little memory
        raise ValueError(f"cannot make these pictures ({command_line.in_words(arguments)}): "
                         f"{command_line.first_line(error)}") from error
    except OSError as error:
        raise OSError(f"cannot write into {arguments.output}: {command_line.first_line(error)}; what is there is whole, "
                      "and the same command goes on from it") from error


def gather_all(arguments):
    """Make one manifest of all processes' pictures; returns its records by index."""
    from nets.sampling import gather_manifest

    done = gather_manifest(arguments.output)
    lost = [index for index in range(arguments.num) if index not in done]
    if lost:
        raise OSError(f"{len(lost)} pictures of {arguments.output} were removed or damaged meanwhile; start again to make "
                      "them")
    return done


def read_labels(how, id2label, classes):
    """"uniform", "balanced", or the list of class ids that --labels names."""
    from nets.labels import check_class_ids, find_label_ids

    if how in ("uniform", "balanced"):
        return how
    names = Path(how).read_text().splitlines() if os.path.isfile(how) else split_names(how, id2label)
    return check_class_ids(find_label_ids([name.strip() for name in names if name.strip()], id2label), classes)


def split_names(text, id2label):
    """The names between the commas of a text; a class's names that have commas in them stay together."""
    pieces, names = text.split(","), []
    while pieces:
        length = next((length for length in range(len(pieces), 1, -1)
                       if ",".join(pieces[:length]).strip() in id2label.values()), 1)
        names.append(",".join(pieces[:length]))
        pieces = pieces[length:]
    return names


@contextlib.contextmanager
def progress_bar(folder, total, disable):
    """One bar over all processes: twice a second it counts what their manifests say."""
    from tqdm import tqdm

    from nets.sampling import count_written

    def watch():
        while not finished.wait(0.5):
            bar.update(count_written(folder) - bar.n)
        bar.update(count_written(folder) - bar.n)

    finished = threading.Event()
    with tqdm(total=total, unit="picture", disable=disable) as bar:
        watcher = threading.Thread(target=watch, daemon=True)
        if not disable:
            watcher.start()
        try:
            yield
        finally:
            finished.set()
            if not disable:
                watcher.join()


if __name__ == "__main__":
    sys.exit(main())
