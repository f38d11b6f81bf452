"""Going on from trained weights: the same network with other classes, and with some of its blocks left as they are."""

import torch

from nets.transformer_2d import Transformer2DModel


def with_classes(model: Transformer2DModel, classes: int) -> Transformer2DModel:
    """The same network for `classes` classes: every weight is kept but the rows of the label table, which start anew.

    The row of the null class is kept, since "no class" means what it meant.
    """
    other = Transformer2DModel.from_config(model.config, num_embeds_ada_norm=classes)
    weights, fresh = model.state_dict(), other.state_dict()  # both with a copy of the embedder in every block
    for key, old in weights.items():
        if key.endswith("class_embedder.embedding_table.weight"):
            weights[key] = torch.cat([fresh[key][:-1].to(old), old[-1:]])
    other.load_state_dict(weights)
    return other.train(model.training)


def for_latents(model: Transformer2DModel, shape: tuple[int, int, int], class_names: dict[int, str],
                known: dict[int, str] | None) -> Transformer2DModel:
    """A trained network for latents of `shape`, (channels, height, width), and these classes.

    It is as it was if the classes that it knows, `known`, are the same, else it has a new label table. Where it is not
    known what its classes are called, as in a `.pt`, an equal number of them are the same ones.
    Raises ValueError, in one line, for latents of another size.
    """
    found, wanted = (model.config.in_channels, model.config.sample_size), (shape[0], shape[-1])
    if found != wanted:
        raise ValueError(f"--init was trained on latents of {found[0]} channels and side {found[1]}, and these have "
                         f"{wanted[0]} and {wanted[1]}; choose another --size or --vae")
    same = known == class_names if known else model.config.num_embeds_ada_norm == len(class_names)
    return model if same else with_classes(model, len(class_names))


def freeze_below(model: Transformer2DModel, block: int):
    """Leave the patch embedding and the blocks before number `block` as they are, but for the embedder of labels and time.

    Raises ValueError if there are not so many blocks.
    """
    if block > len(model.transformer_blocks):
        raise ValueError(f"blocks below {block} cannot be frozen: the network has {len(model.transformer_blocks)}")
    if block:
        model.pos_embed.requires_grad_(False)
    for frozen in model.transformer_blocks[:block]:
        frozen.requires_grad_(False)
        frozen.norm1.emb.requires_grad_(True)
