"""The key table between the two published formats: facebookresearch/DiT's `.pt` and the diffusers folder.

Both hold the same network. The original stacks query, key and value into one matrix, has one embedder where a folder has a
copy in every block, and saves its fixed table of positions.
"""

import argparse
import pathlib
import re
import zipfile
from pathlib import Path

import torch
from accelerate import init_empty_weights

from nets.sharing import is_copy, share_embedders
from nets.transformer_2d import Transformer2DModel, require_same_weights

EMBEDDER = "transformer_blocks.0.norm1.emb"
# The layers of the original, and what they are here; `*` is the number of a block. Three layers are one, stacked.
LAYERS = {
    "x_embedder.proj": ["pos_embed.proj"],
    "t_embedder.mlp.0": [f"{EMBEDDER}.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": [f"{EMBEDDER}.timestep_embedder.linear_2"],
    "y_embedder.embedding_table": [f"{EMBEDDER}.class_embedder.embedding_table"],
    "blocks.*.adaLN_modulation.1": ["transformer_blocks.*.norm1.linear"],
    "blocks.*.attn.qkv": [f"transformer_blocks.*.attn1.to_{part}" for part in "qkv"],
    "blocks.*.attn.proj": ["transformer_blocks.*.attn1.to_out.0"],
    "blocks.*.mlp.fc1": ["transformer_blocks.*.ff.net.0.proj"],
    "blocks.*.mlp.fc2": ["transformer_blocks.*.ff.net.2"],
    "final_layer.adaLN_modulation.1": ["proj_out_1"],
    "final_layer.linear": ["proj_out_2"],
}
# (width, depth) -> heads of the published DiT-S, -B, -L and -XL; DiT paper, table 1.
HEADS = {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1152, 28): 16}
# Where the two networks compute differently from equal weights, as config keys of `Transformer2DModel`.
NUMERICS = {"diffusers": {"downscale_freq_shift": 1, "norm_eps": 1e-5},
            "original": {"downscale_freq_shift": 0, "norm_eps": 1e-6}}


def key_table(num_layers: int) -> dict[str, list[str]]:
    """Each key of the original's state dict, but for `pos_embed` -> the keys here whose tensors it stacks, in order."""
    table = {}
    for original, ours in LAYERS.items():
        for block in range(num_layers) if "*" in original else [0]:
            for kind in ["weight"] if "embedding_table" in original else ["weight", "bias"]:
                table[f"{original}.{kind}".replace("*", str(block))] = [f"{key}.{kind}".replace("*", str(block))
                                                                       for key in ours]
    return table


def read_original(path: str | Path, weights: str = "ema") -> dict[str, torch.Tensor]:
    """The state dict in a `.pt` of facebookresearch/DiT, memory-mapped: a bare one, or `weights` of a training checkpoint.

    No code in the file is run. Raises ValueError, in one line, for anything else.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace, pathlib.PosixPath]):  # of a training checkpoint's `args`
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # torch.load raises many kinds for damaged files
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} cannot be read as weights: it is no zip file, as torch.save writes one since 1.6; "
                             "if it is an older checkpoint, load it and save it anew") from error
        refused = re.search(r"Unsupported (?:global: GLOBAL|operand|class) (\S+)", str(error))
        reason = (f"it asks for {refused[1]}, and code in a file is not run" if refused else
                  str(error).strip().partition("\n")[0] or type(error).__name__)
        raise ValueError(f"{path} cannot be read as weights: {reason}") from error
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get(weights), dict):
        checkpoint = checkpoint[weights]
    if not isinstance(checkpoint, dict) or not checkpoint or not all(
            isinstance(key, str) and torch.is_tensor(tensor) and tensor.is_floating_point()
            for key, tensor in checkpoint.items()):
        found = ", ".join(map(str, list(checkpoint)[:5])) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"{path} holds neither a state dict nor one under {weights!r}; it holds: {found or 'nothing'}")
    state_dict = {key.removeprefix("module."): tensor for key, tensor in checkpoint.items()}
    if len(state_dict) < len(checkpoint):
        raise ValueError(f"{path} has keys with and without the prefix 'module.', so that some are there twice")
    return state_dict


def read_config(state_dict: dict[str, torch.Tensor], heads: int | None = None, numerics: str = "diffusers") -> dict:
    """The config of `Transformer2DModel` for an original state dict, read off its tensors.

    The number of heads is in no tensor: it comes from the published sizes, or else from `heads`.
    Raises ValueError, in one line, for what is no DiT or has another size without `heads`.
    """
    try:
        dim, in_channels, patch, _ = state_dict["x_embedder.proj.weight"].shape
        classes = len(state_dict["y_embedder.embedding_table.weight"]) - 1
        out_channels = len(state_dict["final_layer.linear.bias"]) // patch**2
        side = round(state_dict["pos_embed"].shape[1] ** 0.5)
    except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"not a DiT as facebookresearch/DiT saves it: {error} is missing or has another shape; the keys "
                         f"begin {', '.join(list(state_dict)[:3])}") from error
    depth = len({key.split(".")[1] for key in state_dict if key.startswith("blocks.")})
    heads = HEADS.get((dim, depth)) if heads is None else heads
    if heads is None:
        raise ValueError(f"width {dim} and depth {depth} are no published size; say how many attention heads it has: "
                         "convert.py --heads N makes a folder of it")
    if heads < 1 or dim % heads:
        raise ValueError(f"a width of {dim} cannot be split into {heads} heads")
    return {"num_attention_heads": heads, "attention_head_dim": dim // heads, "num_layers": depth,
            "in_channels": in_channels, "out_channels": out_channels, "patch_size": patch, "sample_size": side * patch,
            "num_embeds_ada_norm": classes, **NUMERICS[numerics]}


def from_original(state_dict: dict[str, torch.Tensor], config: dict) -> Transformer2DModel:
    """Our network with an original state dict's weights; they are used as they stand, without a copy.

    Raises ValueError, in one line, unless every key is used and every parameter filled exactly once, and the positions are
    the fixed table.
    """
    with init_empty_weights():
        model = Transformer2DModel(**config)
    share_embedders(model)
    require_same_weights(to_original(model), state_dict)
    positions, fixed = state_dict["pos_embed"], model.pos_embed.pos_embed.to(state_dict["pos_embed"].dtype)
    if not torch.allclose(positions, fixed, rtol=0, atol=4 * torch.finfo(positions.dtype).eps):
        raise ValueError("pos_embed is not the fixed table of sines and cosines, and no folder can hold another one")

    weights = {}
    for key, parts in key_table(config["num_layers"]).items():
        weights.update(zip(parts, state_dict[key].chunk(len(parts))))
    for key in model.state_dict():  # the copies of the embedder in the other blocks
        if is_copy(key):
            weights[key] = weights[f"{EMBEDDER}.{key.partition('.norm1.emb.')[2]}"]
    model.load_state_dict(weights, assign=True)
    return model.eval()


def to_original(model: Transformer2DModel) -> dict[str, torch.Tensor]:
    """The state dict that facebookresearch/DiT has for our network's weights; copies only where it stacks.

    Raises ValueError, in one line, for a network that the original cannot hold: unequal embedders, no bias in
    the attention, weights in a norm.
    """
    if any(block.norm1.emb is not model.transformer_blocks[0].norm1.emb for block in model.transformer_blocks):
        raise ValueError("the blocks' embedders differ, and the original has one for all of them")
    for key, wanted in (("attention_bias", True), ("norm_elementwise_affine", False)):
        if model.config[key] is not wanted:
            raise ValueError(f"the original cannot hold a network with {key}={model.config[key]}")
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state_dict = {"pos_embed": model.pos_embed.pos_embed.to(model.dtype)}
    for key, parts in key_table(len(model.transformer_blocks)).items():
        state_dict[key] = torch.cat([parameters.pop(ours) for ours in parts]) if parts[1:] else parameters.pop(parts[0])
    assert not parameters, f"not in the key table: {', '.join(parameters)}"
    return state_dict
