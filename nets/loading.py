"""Pipeline folders in and out: whatever a folder calls its transformer, here it becomes `nets.Transformer2DModel`."""

import json
from pathlib import Path

from nets.transformer_2d import Transformer2DModel

# The arguments of `from_pretrained` that concern where and how weights are read.
TRANSFORMER_ARGUMENTS = ("variant", "revision", "cache_dir", "local_files_only", "token", "force_download", "proxies",
                         "use_safetensors", "low_cpu_mem_usage", "disable_mmap")
# What a saved folder names as the transformer's class, so that an unmodified diffusers loads it.
CLASS_ON_DISK = ("diffusers", "DiTTransformer2DModel")


def load_transformer(folder, **kwargs) -> Transformer2DModel:
    """Load the `transformer` of a pipeline folder or hub id; `kwargs` are those of the pipeline's `from_pretrained`."""
    chosen = {name: kwargs[name] for name in TRANSFORMER_ARGUMENTS if name in kwargs}
    dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
    if isinstance(dtype, dict):
        dtype = dtype.get("transformer", dtype.get("default"))
    return Transformer2DModel.from_pretrained(folder, subfolder="transformer", dtype=dtype, **chosen)


def leave_out_defaults(scheduler, folder):
    """Rewrite a saved scheduler config with only those keys that were chosen, as the published configs have it.

    diffusers writes every default out; read by another scheduler class, DDIM's `timestep_spacing` would then bind it.
    """
    if scheduler is None:
        return
    path = Path(folder) / "scheduler_config.json"
    config = json.loads(path.read_text())
    chosen = {key: value for key, value in config.items() if key not in scheduler.config.get("_use_default_values", ())}
    path.write_text(json.dumps(chosen, indent=2, sort_keys=True) + "\n")
