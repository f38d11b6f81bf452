"""A reference library for class-conditional Diffusion Transformers (DiT), faithful to diffusers.

Names are imported when they are first used, so that `import nets` costs nothing.
"""

__version__ = "0.1.0"
__all__ = ["Conditioning", "DiTPipeline", "Transformer2DModel"]

_HOME = {"DiTPipeline": "nets.pipeline", "Transformer2DModel": "nets.transformer_2d",
         "Conditioning": "nets.transformer_2d"}


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'nets' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
