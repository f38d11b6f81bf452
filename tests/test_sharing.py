"""nets/sharing.py: one embedder in memory, a copy in every block on disk, and equality decides which."""

import diffusers
import pytest
import torch
from conftest import TINY, arguments, embedder_count, fill, ours_with, upstream_model

from nets import Transformer2DModel


def test_a_new_model_has_one_embedder_and_writes_out_every_copy():
    model = fill(Transformer2DModel(**TINY))
    assert embedder_count(model) == 1
    state = model.state_dict()
    assert state.keys() == diffusers.DiTTransformer2DModel(**TINY).state_dict().keys()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)  # file formats refuse shared memory
    key = "norm1.emb.class_embedder.embedding_table.weight"
    assert torch.equal(state[f"transformer_blocks.1.{key}"], state[f"transformer_blocks.0.{key}"])


@pytest.mark.parametrize("equal_embedders", [True, False])
def test_sharing_follows_from_equality_when_loaded_from_a_folder(equal_embedders, tmp_path):
    upstream = upstream_model(equal_embedders, **TINY)
    upstream.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (True, False):
        ours = Transformer2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert embedder_count(ours) == (1 if equal_embedders else 2)
        with torch.no_grad():
            assert torch.equal(ours(*arguments(TINY)).sample, upstream(*arguments(TINY)).sample)


def test_sharing_can_go_and_come_back_in_one_model():
    unequal, equal = upstream_model(False, **TINY).state_dict(), upstream_model(True, **TINY).state_dict()
    ours = Transformer2DModel(**TINY)
    for state, expected in ((unequal, 2), (equal, 1), (unequal, 2)):
        ours.load_state_dict(state)
        assert embedder_count(ours) == expected
        assert all(torch.equal(tensor, state[key]) for key, tensor in ours.state_dict().items())


@pytest.mark.parametrize("equal_embedders", [True, False])
def test_accelerates_checkpoints_bring_back_every_embedder(equal_embedders, tmp_path):
    from accelerate import Accelerator

    model = ours_with(upstream_model(equal_embedders, **TINY).state_dict(), **TINY)
    wanted = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(model)
    accelerator.save_state(str(tmp_path))
    fill(model, seed=5)
    accelerator.load_state(str(tmp_path))
    assert embedder_count(model) == (1 if equal_embedders else 2)
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in model.state_dict().items())


def train_one_step(model, optimizer):
    model.train()
    model(*arguments(TINY)).sample.square().mean().backward()
    optimizer.step()


def test_an_optimizer_built_before_equal_weights_came_still_trains_everything():
    model = Transformer2DModel(**TINY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.load_state_dict(upstream_model(True, **TINY).state_dict())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train_one_step(model, optimizer)
    untouched = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert all(name.endswith("to_k.bias") for name in untouched)  # attention does not depend on that bias


def test_an_optimizer_built_before_unequal_weights_came_is_refused():
    model = Transformer2DModel(**TINY)
    stale, other = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(torch.nn.Linear(1, 1).parameters())
    model.load_state_dict(upstream_model(False, **TINY).state_dict())
    with pytest.raises(RuntimeError, match="build it again after loading"):
        train_one_step(model, stale)
    other.step()
    train_one_step(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_an_optimizer_of_some_parameters_built_after_unequal_weights_came_is_not_refused():
    model = ours_with(upstream_model(False, **TINY).state_dict(), **TINY)
    train_one_step(model, torch.optim.SGD(model.transformer_blocks[0].parameters(), lr=0.1))


def test_part_of_a_state_dict_reaches_its_own_block_alone():
    state = upstream_model(False, **TINY).state_dict()
    key = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    alone, model = {key: state[key]}, fill(Transformer2DModel(**TINY))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(alone, strict=False)
    after = model.state_dict()
    assert torch.equal(after[key], state[key])
    assert all(torch.equal(after[name], before[name]) for name in before if name != key)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("equal_embedders", [True, False])
def test_sharded_and_variant_folders_load_as_whole_ones(equal_embedders, low_cpu_mem_usage, tmp_path):
    upstream = upstream_model(equal_embedders, **TINY)
    upstream.save_pretrained(tmp_path, max_shard_size="50KB", variant="odd")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours, info = Transformer2DModel.from_pretrained(tmp_path, variant="odd", low_cpu_mem_usage=low_cpu_mem_usage,
                                                    output_loading_info=True)
    assert embedder_count(ours) == (1 if equal_embedders else 2)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(ours(*arguments(TINY)).sample, upstream(*arguments(TINY)).sample)
