"""Pipeline folders in and out: whatever a folder calls its transformer, here it becomes `nets.Transformer2DModel`."""

from nets.transformer_2d import Transformer2DModel

# The arguments of `from_pretrained` that concern where and how weights are read.
TRANSFORMER_ARGUMENTS = ("torch_dtype", "variant", "revision", "cache_dir", "local_files_only", "token", "force_download",
                         "proxies", "use_safetensors", "low_cpu_mem_usage", "disable_mmap")
# What a saved folder names as the transformer's class, so that an unmodified diffusers loads it.
CLASS_ON_DISK = ("diffusers", "DiTTransformer2DModel")


def load_transformer(folder, **kwargs) -> Transformer2DModel:
    """Load the `transformer` of a pipeline folder or hub id; `kwargs` are those of the pipeline's `from_pretrained`."""
    chosen = {name: kwargs[name] for name in TRANSFORMER_ARGUMENTS if name in kwargs}
    if isinstance(chosen.get("torch_dtype"), dict):
        chosen["torch_dtype"] = chosen["torch_dtype"].get("transformer", chosen["torch_dtype"].get("default"))
    return Transformer2DModel.from_pretrained(folder, subfolder="transformer", **chosen)
