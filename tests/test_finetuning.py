"""nets/finetuning.py: other classes and frozen blocks, and all else as it was."""

import pytest
import torch
from conftest import TINY, embedder_count, fill, ours_with, upstream_model

from nets import Transformer2DModel
from nets.finetuning import freeze_below, with_classes

TABLE = "class_embedder.embedding_table.weight"


@pytest.mark.parametrize("equal", [True, False])
def test_all_but_the_label_table_is_kept_and_the_null_class_too(equal):
    model = ours_with(upstream_model(equal, **TINY).state_dict(), **TINY)
    other = with_classes(model, 3)
    assert other.config.num_embeds_ada_norm == 3 and embedder_count(other) == embedder_count(model) == (1 if equal else 2)
    before, after = model.state_dict(), other.state_dict()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor) if TABLE not in key else torch.equal(after[key][3], tensor[10])
    tables = [tensor for key, tensor in after.items() if TABLE in key]
    assert all(table.shape == (4, 32) and table[:3].std() == pytest.approx(0.02, rel=0.5) for table in tables)
    latents, timestep = torch.randn(2, 4, 8, 8), torch.tensor([5, 900])
    null = [network.eval()(latents, timestep, torch.full((2,), network.config.num_embeds_ada_norm)).sample
            for network in (model, other)]
    assert torch.equal(*null)


def test_frozen_blocks_get_no_gradient_and_the_embedder_does():
    model = fill(Transformer2DModel(**{**TINY, "num_layers": 3}))
    freeze_below(model, 2)
    model(torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.tensor([1, 2])).sample.square().sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters()
                             if not name.startswith(("pos_embed", "transformer_blocks.0", "transformer_blocks.1"))
                             or ".emb." in name}
    assert any(".emb.class_embedder" in name for name in with_gradient)


def test_nothing_is_frozen_below_the_first_block_and_more_than_all_is_refused():
    model = Transformer2DModel(**TINY)
    freeze_below(model, 0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="blocks below 3 cannot be frozen: the network has 2"):
        freeze_below(model, 3)
