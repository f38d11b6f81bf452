"""Pipeline folders in and out: whatever a folder calls its transformer, here it becomes `nets.Transformer2DModel`.

A folder is `model_index.json`, `transformer/`, `vae/` and `scheduler/`, as diffusers writes it today or wrote it in 2022
(the published DiT-XL-2-256 and -512), with `.safetensors` or `.bin` weights, whole or in shards.
"""

import hashlib
import json
import os
import re
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.model_loading_utils import load_state_dict
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import save_file

from nets.transformer_2d import Transformer2DModel

# The arguments of a pipeline's `from_pretrained` that concern how the weights of its parts are read.
READING_ARGUMENTS = ("use_safetensors", "low_cpu_mem_usage", "disable_mmap")
# What a saved folder names as the classes of its parts, so that an unmodified diffusers loads it.
CLASS_ON_DISK = {"transformer": ("diffusers", "DiTTransformer2DModel"), "vae": ("diffusers", "AutoencoderKL")}


def find_folder(model: str | Path, files: list[str] | None = None, **hub_arguments) -> Path:
    """The folder `model`, or the local copy of a hub id, downloaded if need be: of a pipeline, or of those `files` alone.

    Raises OSError, in one line, if there is no such folder and the hub does not give one.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        if files is None:
            return Path(DiffusionPipeline.download(str(model), **hub_arguments))
        return Path(snapshot_download(str(model), allow_patterns=files, **hub_arguments))
    except Exception as error:  # whatever the hub's libraries raise without a network, a repository or the rights to it
        cause = str(error.__cause__ or error).strip() or type(error).__name__
        raise OSError(f"{model} (revision {hub_arguments.get('revision') or 'main'}) is no folder here, and could not be "
                      f"had from the hub: {cause.splitlines()[0].rstrip('.')}; its files may also be put into a folder "
                      "by hand (model_data/README.md lists those of DiT-XL/2), and that be named instead") from error


def load_parts(folder: Path, **kwargs) -> dict:
    """Load those of a pipeline's networks that `kwargs`, the arguments of its `from_pretrained`, do not bring along.

    A part that the folder neither names nor has is None. Raises OSError or ValueError, in one line, where files are missing
    or damaged or belong to another network.
    """
    index = DiffusionPipeline.load_config(folder)
    if not isinstance(index, dict):
        raise ValueError(f"{folder / 'model_index.json'} is no JSON object")
    if index.get("scheduler") and "scheduler" not in kwargs and not (folder / "scheduler").is_dir():
        raise OSError(f"{folder} has no folder scheduler/; put it there, or pass scheduler=... to from_pretrained")
    return {name: load_part(folder, name, index.get(name), **kwargs) for name in CLASS_ON_DISK if name not in kwargs}


def load_part(folder: Path, name: str, named: list | None, variant: str | None = None, **kwargs) -> ModelMixin | None:
    """One of a folder's networks, `named` [library, class]; `variant` if this part has it, else the part as it is there."""
    library, class_name = named or (None, None)
    if class_name is None and not (folder / name).is_dir():
        return None
    library, class_name = (library, class_name) if class_name else CLASS_ON_DISK[name]
    part_class = Transformer2DModel if name == "transformer" else getattr(diffusers, class_name, None)
    if library != "diffusers" or not isinstance(part_class, type) or not issubclass(part_class, ModelMixin):
        raise ValueError(f"{folder / 'model_index.json'} wants {class_name} of {library} for {name}; that is no network of "
                         "diffusers")
    if not (folder / name).is_dir():
        raise OSError(f"{folder} has no folder {name}/; put it there, or pass {name}=... to from_pretrained")
    has_variant = variant and weight_files(folder / name, variant)
    dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
    if isinstance(dtype, dict):
        dtype = dtype.get(name, dtype.get("default"))
    chosen = {key: kwargs[key] for key in READING_ARGUMENTS if key in kwargs}
    return load_exactly(part_class, folder / name, dtype=dtype, variant=variant if has_variant else None, **chosen)


def load_exactly(model_class: type[ModelMixin], folder: Path, **kwargs) -> ModelMixin:
    """`model_class.from_pretrained(folder, **kwargs)`, where diffusers would warn and go on with random weights an error.

    Raises OSError or ValueError, in one line.
    """
    files = weight_files(folder, kwargs.get("variant"))
    if not files:
        name = ".".join(filter(None, ["diffusion_pytorch_model", kwargs.get("variant")]))
        raise OSError(f"{folder} has no weights: neither {name}.safetensors nor {name}.bin, whole or in shards")
    if not any(file.suffix == ".safetensors" for file in files):
        kwargs["use_safetensors"] = False  # else diffusers complains of the files it did not find before it takes these
    try:
        model, info = model_class.from_pretrained(str(folder), output_loading_info=True, **kwargs)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise (OSError if isinstance(error, OSError) else ValueError)(f"{folder}: {' '.join(lines[:2])}") from error
    wrong = [key for kind in ("missing_keys", "unexpected_keys") for key in info[kind]]
    if wrong:
        raise ValueError(f"{folder}: these are not the weights of this network: {len(wrong)} missing or unknown: "
                         f"{', '.join(wrong[:3])}{', ...' if wrong[3:] else ''}")
    return model


def stored_dtype(folder: Path, variant: str | None = None) -> torch.dtype | None:
    """The dtype in which a network's folder keeps the weights of that variant; None if it has none of it."""
    tensors = (tensor for file in weight_files(folder, variant) for tensor in load_state_dict(str(file)).values())
    return next((tensor.dtype for tensor in tensors), None)


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files of a network's weights: those of the variant alone, or those that are of no variant."""
    of_variant = re.compile(r"diffusion_pytorch_model[^.]*" + (rf"\.{re.escape(variant)}(-\d+-of-\d+)?" if variant else ""))
    return [file for kind in (".safetensors", ".bin") for file in sorted(folder.glob(f"*{kind}"))
            if of_variant.fullmatch(file.name.removesuffix(kind))]


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None):
    """Write a safetensors file that appears whole or not at all. Raises OSError, in one line, where that cannot be."""
    unfinished = path.with_name(f"{path.name}.part")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # what anybody may do with a new file here; safetensors lets its owner alone
        save_file(tensors, unfinished, metadata)
        unfinished.chmod(mode)
        os.replace(unfinished, path)
    except SafetensorError as error:  # which is no OSError, for a disk that is full or not to be written on
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def config_fingerprint(*parts) -> str:
    """SHA-256 over the configs of networks and schedulers, but for what tells where they came from."""
    configs = [{key: value for key, value in part.config.items() if not key.startswith("_")} for part in parts]
    return hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(*networks: torch.nn.Module) -> str:
    """SHA-256 over the weights of networks, the dtypes included: equal for equal models, whatever their folders."""
    digest = hashlib.sha256()
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def leave_out_defaults(scheduler: ConfigMixin | None, folder: Path):
    """Rewrite a saved scheduler config with only those keys that were chosen, as the published configs have it.

    diffusers writes every default out; read by another scheduler class, DDIM's `timestep_spacing` would then bind it.
    """
    if scheduler is None:
        return
    path = folder / "scheduler_config.json"
    config = json.loads(path.read_text())
    chosen = {key: value for key, value in config.items() if key not in scheduler.config.get("_use_default_values", ())}
    path.write_text(json.dumps(chosen, indent=2, sort_keys=True) + "\n")
