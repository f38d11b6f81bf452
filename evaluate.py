"""How good pictures are: Frechet distance and its kin between two sets, with sheets to look at.

    python evaluate.py --samples runs/samples --reference DIR
    python evaluate.py --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz --features inception
    python evaluate.py --samples DIR --halves              # what pictures of one source are apart

A set is a folder of sample.py, a folder per class, any folder of pictures, an npz with `arr_0`, or the four files of
Fashion-MNIST, of which the test set is meant.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

if __package__:  # installed
    from dit_verbs import command_line
else:
    import command_line

CLASSIFIER, DINOV2 = command_line.MODEL_DATA / "fashion-mnist-classifier", "facebook/dinov2-large"
FIGURES = {"frechet_distance": ("Frechet distance", "{:.3f}"), "kernel_distance": ("kernel distance (KID)", "{:.5f}"),
           "inception_score": ("Inception Score", "{:.3f}"), "precision": ("precision", "{:.3f}"),
           "recall": ("recall", "{:.3f}"), "class_accuracy": ("class accuracy", "{:.1%}"),
           "spread": ("spread within a class, real = 1", "{:.3f}")}


def main(argv=None) -> int:
    """Run the command line; returns the exit status, as `command_line.exit_status` has it."""
    return command_line.exit_status(run, parse_arguments(argv))


def parse_arguments(argv):
    """The command line as a namespace; argparse ends the program with status 2 where a value is wrong."""
    parser = command_line.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, required=True, metavar="DIR|NPZ")
    against = parser.add_mutually_exclusive_group(required=True)
    against.add_argument("--reference", type=Path, metavar="DIR|NPZ|STATS",
                         help="pictures; or their features as this command kept them, .safetensors; or an .npz with mu and "
                              "sigma")
    against.add_argument("--halves", action="store_true", help="one half of the samples against the other")
    parser.add_argument("--features", default="auto", metavar="NETWORK",
                        help="folder or hub id of an image classifier or DINOv2 for transformers, or inception; auto is "
                             f"the shipped classifier for Fashion-MNIST and {DINOV2} for all else")
    parser.add_argument("--training", type=Path, metavar="DIR|NPZ",
                        help="what the nearest neighbours are looked for in (default: Fashion-MNIST's training set, or the "
                             "reference, if that has pictures)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for report.md, metrics.json and the sheets (default: "
                                                                   "beside the samples, with -evaluation in its name)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    return parser.parse_args(argv)


def run(arguments):
    """Features of both sets, the figures, the sheets, the report."""
    missing = [name for name in ("transformers", "torchmetrics") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"evaluation needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    import torch
    from tqdm import tqdm

    command_line.quiet_diffusers()
    from nets.features import extract, reference_features, take
    from nets.metrics import compare
    from nets.picture_sets import FASHION_MNIST, is_fashion_mnist
    from nets.sampling import write_whole

    def progress(what):
        return lambda batches: tqdm(batches, desc=what, unit="batch", leave=False)

    started = time.perf_counter()
    pictures, output = open_samples(arguments), find_output(arguments)
    size = pictures.picture(0).size
    fashion_mnist = is_fashion_mnist(arguments.reference or arguments.samples)
    extractor = load_extractor(arguments, fashion_mnist or pictures.class_names == FASHION_MNIST)
    reference_pictures = None
    if not arguments.halves:  # first, so that a wrong one is refused before the samples are judged
        reference, reference_pictures, how = reference_features(arguments.reference, extractor, size,
                                                                progress=progress("reference"))
    output.mkdir(parents=True, exist_ok=True)
    samples = extract(extractor, pictures, size, progress=progress("samples"))
    if arguments.halves:
        order = torch.randperm(pictures.count, generator=torch.Generator().manual_seed(0))
        reference, samples, how = take(samples, order[::2]), take(samples, order[1::2]), "the other half"
    figures, classes = compare(samples, reference, extractor.id2label)
    heads = [f"samples: {len(samples)}, {samples.name}",
             f"reference: {len(reference) or 'an unknown number'}, {reference.name}, {how}",
             f"features: {extractor.name}, {len(reference.mean)} numbers a picture, of pictures of {size[0]}x{size[1]}"]
    if min(len(samples), len(reference) or len(samples)) <= len(reference.mean):
        heads.append("few pictures: Frechet distances come out large of fewer pictures than numbers a picture, and papers "
                     "take 50,000 of them")
    print("\n".join([*heads, "", *table(figures, len(samples))]), flush=True)

    results = {"samples": {"name": samples.name, "count": len(samples), "size": size},
               "reference": {"name": reference.name, "count": len(reference) or None, "how": how},
               "features": {"name": extractor.name, "mark": extractor.mark}, "figures": figures, "classes": classes}
    write_whole(output / "metrics.json", json.dumps(results, indent=2).encode() + b"\n")
    for sheet in ("samples.png", "nearest.png"):  # of an earlier evaluation
        (output / sheet).unlink(missing_ok=True)
    report = ["# Evaluation", "", *(f"- {head}" for head in heads), "", *table(figures, len(samples), "| ")]
    distances = None
    if not arguments.halves:
        report += ["", "## Samples", "", write_sample_sheet(output / "samples.png", pictures, size, classes)]
        training = arguments.training or (arguments.reference if reference_pictures else None)
        if training is not None:
            split = "train" if (training / "train-images-idx3-ubyte.gz").is_file() else "test"
            known, known_pictures, _ = reference_features(training, extractor, size, split, progress("training set"))
            distances, text = write_nearest_sheet(output / "nearest.png", samples, pictures, known, known_pictures, size,
                                                  reference if len(reference) and known.name != reference.name else None)
            report += ["", f"## Nearest pictures of {known.name}", "", text]
        report += class_table(classes)
    write_whole(output / "report.md", "\n".join(report).encode() + b"\n")
    results |= {"nearest": distances, "seconds": round(time.perf_counter() - started, 1)}
    write_whole(output / "metrics.json", json.dumps(results, indent=2).encode() + b"\n")
    print(f"\n{output}: report.md, metrics.json{'' if arguments.halves else ' and sheets'}; {results['seconds']:.0f} s")


def open_samples(arguments):
    """The samples; the other sets are opened too, so that a wrong one is refused before the work."""
    from nets.metrics import PARTS
    from nets.picture_sets import open_pictures

    for path in (arguments.reference, arguments.training):
        if path and not path.exists():
            raise OSError(f"there is no file or folder {path}")
        if path and (path == arguments.training or path.suffix not in (".safetensors", ".npz")):
            open_pictures(path)  # else only its features are needed
    pictures = open_pictures(arguments.samples)
    least = 10 * PARTS * (2 if arguments.halves else 1)
    if pictures.count < least:
        raise ValueError(f"{arguments.samples} has {pictures.count} pictures; it takes {least} at least")
    return pictures


def find_output(arguments):
    """The folder of the report, which is not made yet."""
    place = arguments.samples.resolve()
    output = arguments.output or place.with_name(f"{place.name if place.is_dir() else place.stem}-evaluation")
    for pictures in filter(None, (arguments.samples, arguments.reference, arguments.training)):
        if pictures.resolve() in (output.resolve(), *output.resolve().parents):
            raise ValueError(f"{output} is inside {pictures}, whose pictures its sheets would join; give another --output")
    there = next(path for path in (output.resolve(), *output.resolve().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise OSError(f"cannot write into {output}: {there} is no folder that can be written to")
    return output


def load_extractor(arguments, fashion_mnist):
    """The network that --features names, on its device."""
    from nets.features import INCEPTION, FeatureExtractor, InceptionFeatures

    device, name = command_line.find_device(arguments.device), arguments.features
    if name == "auto":
        name = CLASSIFIER if fashion_mnist else DINOV2
    elif (command_line.MODEL_DATA / name).is_dir():
        name = command_line.MODEL_DATA / name
    try:
        return InceptionFeatures(device) if name == INCEPTION else FeatureExtractor(name, device)
    except OSError as error:
        raise OSError(f"{command_line.first_line(error)}; --features names another network, such as {CLASSIFIER.name} for "
                      "Fashion-MNIST") from error
    except (RuntimeError, AssertionError) as error:  # torch's, of a device that is not there
        raise ValueError(f"cannot load {name} on {device}: {command_line.first_line(error)}") from error


def table(figures, count, edge=""):
    """The figures as lines of text, or of Markdown where `edge` is "| "."""
    columns = ["", f"all {count}", f"five parts of {count // 5}: mean", "least", "most"]
    lines = [columns, ["---"] * 5] if edge else [columns]
    for name, (title, form) in FIGURES.items():
        if name in figures:
            parts = [part for part in figures[name]["parts"] if part is not None]
            numbers = [sum(parts) / len(parts), min(parts), max(parts)] if parts else []
            cells = [form.format(value) for value in (figures[name]["value"], *numbers)]
            lines.append([title, *cells, *[""] * (4 - len(cells))])
    if edge:
        return [f"| {' | '.join(cells)} |" for cells in lines]
    widths = [max(len(cells[column]) for cells in lines) for column in range(5)]
    return ["  ".join([cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))])
            for cells in lines]


def class_table(classes):
    """A Markdown table with a line a class, the worst first; nothing without classes."""
    if not classes:
        return []
    lines = ["", "## Classes, the worst first", "",
             "| class | samples | accuracy | most often taken for | precision | spread, real = 1 |",
             "|---|---|---|---|---|---|"]
    for row in classes:
        shares = {key: f"{row[key]:.1%}" if key in row else "" for key in ("accuracy", "precision")}
        lines.append(f"| {row['name']} | {row['count']} | {shares['accuracy']} | {row.get('taken_for') or ''} | "
                     f"{shares['precision']} | {format(row['spread'], '.2f') if 'spread' in row else ''} |")
    return lines


def write_sample_sheet(path, pictures, size, classes):
    """Eight samples of each of up to sixteen classes, the worst first, or 64 without classes; returns the Markdown."""
    from PIL import Image

    from nets.pictures import contact_sheet, save_picture

    columns = [(row["name"].split(",")[0], (pictures.labels == row["class"]).nonzero().flatten()[:8].tolist())
               for row in classes[:16]]
    columns = columns or [("", list(range(column, min(64, pictures.count), 8))) for column in range(8)]
    depth = max(len(indices) for _, indices in columns)
    cells = [(name, indices[row]) if row < len(indices) else ("", None)
             for row in range(depth) for name, indices in columns]
    blank = Image.new("RGB", size, "white")
    shown = [blank if index is None else to_pictures(pictures, [index], size)[0] for _, index in cells]
    save_picture(contact_sheet(shown, [name for name, _ in cells], columns=len(columns), smallest=64), path, {})
    order = "A column a class, the worst recognised first. " if classes else ""
    return f"{order}\n\n![samples]({path.name})"


def write_nearest_sheet(path, samples, pictures, known, known_pictures, size, reference, most=1000):
    """Those of up to 1,000 samples that are nearest to training pictures, with four of these each, up to eight and of
    different classes; returns the medians of the distances and the Markdown."""
    import torch

    from nets.metrics import nearest
    from nets.pictures import contact_sheet, save_picture

    def some(features):
        return torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:most]

    looked_at = some(samples)
    values, indices = nearest(samples.features[looked_at], known.features, 4)
    closest = values[:, 0].argsort().tolist()
    if samples.labels is not None:
        first_of = {samples.labels[looked_at[row]].item(): row for row in reversed(closest)}
        closest = sorted(first_of.values(), key=closest.index)
    shown, captions = [], []
    for row in closest[:8]:
        shown += to_pictures(pictures, [looked_at[row]], size) + to_pictures(known_pictures, indices[row], size)
        captions += ["sample", *(f"{value:.3f}" for value in values[row])]
    save_picture(contact_sheet(shown, captions, columns=5, smallest=64), path, {})
    medians = {"samples": values[:, 0].median().item()}
    text = (f"Of {len(looked_at)} samples those nearest to one of the {len(known)} pictures of {known.name}"
            f"{'' if samples.labels is None else ', one a class'}; each with its four nearest and their distances in the "
            f"features. Half of the samples are nearer than {medians['samples']:.3f}")
    if reference is not None:
        medians["reference"] = nearest(reference.features[some(reference)], known.features)[0].median().item()
        text += f"; half of the reference pictures are nearer than {medians['reference']:.3f}"
    return medians, f"{text}.\n\n![nearest]({path.name})"


def to_pictures(pictures, indices, size):
    """Pictures of these numbers, at `size`."""
    from nets.picture_sets import fit

    return [fit(pictures.picture(int(index)), size) for index in indices]


if __name__ == "__main__":
    sys.exit(main())
