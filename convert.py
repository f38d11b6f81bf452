"""Checkpoints of facebookresearch/DiT to diffusers folders, and back.

    python convert.py DiT-XL-2-256x256.pt model_data/DiT-XL-2-256 --vae stabilityai/sd-vae-ft-ema
    python convert.py model_data/DiT-XL-2-256 DiT-XL-2-256x256.pt
"""

import argparse
import json
import os
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

if __package__:  # installed
    from dit_verbs import command_line
else:
    import command_line


def main(argv=None) -> int:
    """Run the command line; returns the exit status, as `command_line.exit_status` has it; nothing is left half-written."""
    return command_line.exit_status(run, parse_arguments(argv))


def run(arguments):
    """Convert, in the direction that the source tells."""
    started = time.perf_counter()
    check_paths(arguments.source, arguments.target)
    (to_file if arguments.source.is_dir() else to_folder)(arguments)
    print(f"wrote {arguments.target} in {time.perf_counter() - started:.0f} s")


def check_paths(source, target):
    """Raise a ValueError unless there is a source, and the target can be written and is not there yet."""
    if not source.exists():
        raise ValueError(f"there is no {source}")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} is there already; name another target, or move it away")
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {target.parent} to write {target.name} into")
    if source.is_dir() and target.is_dir():
        raise ValueError(f"{target} is a folder; name the .pt to write")
    if source.is_file() and target.suffix in (".pt", ".pth"):
        raise ValueError(f"{source} is a file, so the target is a folder; {target} does not look like one")


@contextmanager
def written_whole(target):
    """A path to write to, which becomes `target` once all is written, and is removed if that fails."""
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        yield partial
        os.replace(partial, target)
    except Exception as error:  # PyTorch and safetensors have errors of their own for a full disk
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise OSError(f"cannot write {target}: {reason}") from error
    finally:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


def parse_arguments(argv):
    """The command line as a namespace; argparse ends the program with status 2 where a value is wrong."""
    parser = command_line.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a .pt of facebookresearch/DiT, or a pipeline or transformer folder")
    parser.add_argument("target", type=Path, help="the folder or the .pt to write; it must not be there yet")
    folder = parser.add_argument_group("for a .pt into a folder")
    folder.add_argument("--vae", metavar="DIR_OR_ID", help="the VAE to put beside it: a VAE's or a pipeline's folder, or a "
                                                           "hub id; without it transformer and scheduler alone are written")
    folder.add_argument("--weights", choices=("ema", "model"),
                        help="which of a training checkpoint's two networks (default ema)")
    folder.add_argument("--heads", type=int, help="number of attention heads, where the size is none of the published")
    folder.add_argument("--numerics", choices=("diffusers", "original"),
                        help="compute as diffusers does with these weights (default), or exactly as facebookresearch/DiT")
    folder.add_argument("--id2label", type=Path, metavar="FILE.json",
                        help="class id -> names (default: ImageNet's, where there are 1000 classes)")
    parser.add_argument("--variant", help="for a folder into a .pt: the variant of its weights, such as fp16")
    return parser.parse_args(argv)


def to_folder(arguments):
    """A `.pt` into a pipeline folder."""
    print(f"reading {arguments.source} ({arguments.source.stat().st_size / 1e9:.2f} GB)", flush=True)

    command_line.quiet_diffusers()
    from nets import DiTPipeline
    from nets.checkpoint import from_original, read_config, read_original
    from nets.scheduling import published_scheduler

    numerics = arguments.numerics or "diffusers"
    state_dict = read_original(arguments.source, arguments.weights or "ema")
    config = read_config(state_dict, arguments.heads, numerics)
    transformer = from_original(state_dict, config)
    print(f"DiT of width {config['num_attention_heads'] * config['attention_head_dim']}, depth {config['num_layers']}, "
          f"{config['num_attention_heads']} heads, patch {config['patch_size']}, {config['num_embeds_ada_norm']} classes, "
          f"latents {config['in_channels']}x{config['sample_size']}x{config['sample_size']}, "
          f"{config['out_channels']} output channels; {numerics} numerics", flush=True)
    id2label = read_labels(arguments.id2label, config["num_embeds_ada_norm"])
    if id2label is None:
        print("no --id2label was given: the classes of this model have numbers and no names")
    vae = load_vae(arguments.vae, config["in_channels"]) if arguments.vae else None

    pipeline = DiTPipeline(transformer, vae, published_scheduler(), id2label)
    print("writing", flush=True)
    with written_whole(arguments.target) as partial:
        pipeline.save_pretrained(partial)
    if vae is None:
        print(f"no --vae was given: transformer and scheduler alone are written; put the folder of a VAE into "
              f"{arguments.target / 'vae'} before you make pictures (the published models use stabilityai/sd-vae-ft-ema)")


def to_file(arguments):
    """The transformer of a folder into a `.pt`."""
    for_folders = ("vae", "weights", "heads", "numerics", "id2label")
    given = [f"--{name}" for name in for_folders if getattr(arguments, name) is not None]
    if given:
        raise ValueError(f"{', '.join(given)} is for a .pt into a folder; here a folder becomes a .pt")
    folder = arguments.source / "transformer" if (arguments.source / "transformer").is_dir() else arguments.source
    print(f"reading {folder}", flush=True)

    command_line.quiet_diffusers()
    import torch

    from nets import Transformer2DModel
    from nets.checkpoint import NUMERICS, to_original
    from nets.loading import load_exactly, stored_dtype

    transformer = load_exactly(Transformer2DModel, folder, dtype=stored_dtype(folder, arguments.variant),
                               variant=arguments.variant)
    state_dict = to_original(transformer)
    if any(transformer.config[key] != value for key, value in NUMERICS["original"].items()):
        print("note: this folder has diffusers' numerics, which a .pt does not keep: facebookresearch/DiT will compute "
              "slightly different numbers from the same weights")
    if (arguments.source / "model_index.json").is_file():
        print("note: a .pt keeps neither the VAE nor the class names; the way back needs --vae, and --id2label if they are "
              "not ImageNet's")
    print(f"writing {sum(tensor.nbytes for tensor in state_dict.values()) / 1e9:.2f} GB", flush=True)
    with written_whole(arguments.target) as partial:
        torch.save(state_dict, partial)


def read_labels(path, classes):
    """id2label from a JSON file; without a file ImageNet's for 1000 classes, else none."""
    if path is None and classes != 1000:
        return None
    path = path or command_line.MODEL_DATA / "imagenet_id2label.json"
    try:
        id2label = {int(key): names for key, names in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no JSON object of class id -> names: {error}") from error
    if not all(isinstance(names, str) for names in id2label.values()):
        raise ValueError(f"{path} has names that are no text; a class's names stand in one text, with commas between them")
    if sorted(id2label) != list(range(classes)):
        raise ValueError(f"{path} names {len(id2label)} classes, and the checkpoint has 0 to {classes - 1}")
    return id2label


def load_vae(vae, channels):
    """The VAE of a folder or a hub id, checked to have latents of that many channels."""
    from diffusers import AutoencoderKL

    from nets.loading import find_folder, load_exactly, stored_dtype

    names = ("config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    folder = find_folder(vae, [*names, *(f"vae/{name}" for name in names)])
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    model = load_exactly(AutoencoderKL, folder, dtype=stored_dtype(folder))
    model.register_to_config(_name_or_path=Path(vae).name if Path(vae).is_dir() else vae)  # no path of this machine
    if model.config.latent_channels != channels:
        raise ValueError(f"{vae} has latents of {model.config.latent_channels} channels, the checkpoint of {channels}")
    return model


if __name__ == "__main__":
    sys.exit(main())
