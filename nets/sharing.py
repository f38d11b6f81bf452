"""One embedder for all blocks, in memory; a copy in every block, on disk.

The paper has one embedder of (timestep, class); the published file format has one a block. Sharing follows from equality:
a model's blocks share theirs if the weights that it was given are equal in all blocks.
"""

import copy
import gc

import torch
from torch import nn


def share_embedders(model: nn.Module):
    """Make all blocks use the first block's embedder, as in the paper."""
    for block in model.transformer_blocks:
        block.norm1.emb = model.transformer_blocks[0].norm1.emb


def unshare_embedders(model: nn.Module):
    """Give each block an embedder of its own. An optimiser built before does not know them: its next step is refused."""
    first, *others = (block.norm1 for block in model.transformer_blocks)
    sharing = [norm for norm in others if norm.emb is first.emb]
    for norm in sharing:
        norm.emb = copy.deepcopy(first.emb)
    if sharing and first.linear.weight.device.type != "meta":
        refuse_optimizers_of(first.emb)


def refuse_optimizers_of(embedder: nn.Module):
    """Make the next step of every optimiser that trains the embedder now a RuntimeError."""

    def refuse(*_):
        raise RuntimeError("this optimizer was built before weights with unequal embedders were loaded, and would not "
                           "train them; build it again after loading")

    parameters = {id(parameter) for parameter in embedder.parameters()}
    for candidate in gc.get_objects():
        if issubclass(type(candidate), torch.optim.Optimizer):
            held = {id(parameter) for group in candidate.param_groups for parameter in group["params"]}
            if held & parameters:
                candidate.register_step_pre_hook(refuse)


def embedders_equal(*embedders: dict[str, torch.Tensor]) -> bool:
    """Whether the state dicts of all blocks' embedders hold the same numbers; compared in place, without a copy."""
    first, *others = embedders
    return all(tensor is first[name] or torch.equal(tensor, first[name])
               for other in others for name, tensor in other.items())


def write_out_every_copy(model: nn.Module, state_dict: dict, prefix: str, local_metadata: dict):
    """State-dict hook: the copies of a shared embedder get memory of their own, as file formats demand."""
    first, *others = (block.norm1 for block in model.transformer_blocks)
    for index, norm in enumerate(others, start=1):
        if norm.emb is first.emb:
            for name, _ in norm.emb.named_parameters():
                key = f"{prefix}transformer_blocks.{index}.norm1.emb.{name}"
                if key in state_dict:
                    state_dict[key] = state_dict[key].clone()


def share_if_equal(model: nn.Module, state_dict: dict, prefix: str = "", *_) -> bool:
    """One embedder if all the copies in a state dict are equal, one a block if they differ; returns whether it is shared.

    A load-state-dict hook too. A memory-mapped state dict is compared in place; its pages leave memory with it.
    """
    embedders = [embedder_of_block(state_dict, index, prefix) for index in range(len(model.transformer_blocks))]
    wanted = {name for name, _ in model.transformer_blocks[0].norm1.emb.named_parameters()}
    if any(set(embedder) != wanted for embedder in embedders):  # incomplete: the loading itself names what is missing
        if any(embedders[1:]):
            unshare_embedders(model)  # so that a copy that is there reaches its own block alone
        return False
    equal = embedders_equal(*embedders)
    (share_embedders if equal else unshare_embedders)(model)
    return equal


def embedder_of_block(state_dict: dict, index: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """The part of a state dict that belongs to one block's embedder, by the names inside it."""
    start = f"{prefix}transformer_blocks.{index}.norm1.emb."
    return {key.removeprefix(start): tensor for key, tensor in state_dict.items() if key.startswith(start)}


def is_copy(key: str) -> bool:
    """Whether a key of a state dict belongs to the embedder of another block than the first."""
    return ".norm1.emb." in key and not key.startswith("transformer_blocks.0.")
