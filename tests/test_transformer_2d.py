"""Transformer2DModel against diffusers' DiTTransformer2DModel: numbers, keys, config, and the one embedder."""

import copy
import json

import diffusers
import pytest
import torch
from conftest import TINY, XL, embedder_count, fill, make_embedders_equal, ours_with, upstream_model

from nets import Transformer2DModel

GEOMETRIES = {
    "tiny": TINY,
    "patch 4, no attention bias": {**TINY, "patch_size": 4, "attention_bias": False, "sample_size": 16},
    "affine norm, its eps": {**TINY, "norm_elementwise_affine": True, "norm_eps": 1e-3},
    "no learned variance": {**TINY, "out_channels": None},
    "one layer, three channels": {**TINY, "num_layers": 1, "in_channels": 3, "out_channels": 6},
}


def arguments(config, batch=3):
    generator = torch.Generator().manual_seed(1)
    size, classes = config["sample_size"], config["num_embeds_ada_norm"]
    latents = torch.randn(batch, config.get("in_channels", 4), size, size, generator=generator)
    return latents, torch.tensor([999, 0, 417])[:batch], torch.tensor([classes, 0, classes - 1])[:batch]


@pytest.mark.parametrize("equal_embedders", [True, False], ids=["equal embedders", "unequal embedders"])
@pytest.mark.parametrize("config", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@torch.no_grad()
def test_forward_is_upstreams_bit_for_bit(config, equal_embedders):
    upstream = upstream_model(equal_embedders, **config)
    ours = ours_with(upstream.state_dict(), **config)
    inputs = arguments(config)
    expected = upstream(*inputs).sample
    assert expected.std() > 0.01
    assert torch.equal(ours(*inputs).sample, expected)
    assert torch.equal(ours(inputs[0], conditioning=ours.condition(*inputs[1:]), return_dict=False)[0], expected)


@torch.no_grad()
def test_other_square_sizes_are_upstreams_bit_for_bit():
    upstream = upstream_model(**TINY)
    ours = ours_with(upstream.state_dict(), **TINY)
    _, timestep, labels = arguments(TINY)
    for size in (4, 12, 16):
        latents = torch.randn(3, 4, size, size)
        assert torch.equal(ours(latents, timestep, labels).sample, upstream(latents, timestep, labels).sample)


@pytest.fixture(scope="module")
def xl():
    """Upstream's DiT-XL/2 of 256x256 pictures with random weights, unequal embedders: 3 GB."""
    with torch.device("meta"):
        model = diffusers.DiTTransformer2DModel(**XL)
    model = model.to_empty(device="cpu")
    model.pos_embed = diffusers.models.embeddings.PatchEmbed(32, 32, 2, 4, 1152)
    return fill(model).eval()


@torch.no_grad()
def test_xl_2_is_upstreams_bit_for_bit_with_unequal_and_with_equal_embedders(xl):
    with torch.device("meta"):
        ours = Transformer2DModel(**XL)
    assert sum(tensor.numel() for tensor in ours.state_dict().values()) == 749_826_464
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in xl.state_dict().items()}
    assert ours.state_dict().keys() == xl.state_dict().keys()

    ours.pos_embed.pos_embed = xl.pos_embed.pos_embed.clone()
    ours.eval().load_state_dict(xl.state_dict(), assign=True)
    inputs = arguments(XL, batch=1)
    assert embedder_count(ours) == 28
    assert torch.equal(ours(*inputs).sample, xl(*inputs).sample)

    ours.load_state_dict(make_embedders_equal(xl).state_dict(), assign=True)
    assert embedder_count(ours) == 1
    assert torch.equal(ours(*inputs).sample, xl(*inputs).sample)
    saved = 4 * (sum(p.numel() for p in xl.parameters()) - sum(p.numel() for p in ours.parameters()))
    assert saved > 290e6


def test_a_new_model_has_one_embedder_and_writes_out_every_copy():
    model = fill(Transformer2DModel(**TINY))
    assert embedder_count(model) == 1
    state = model.state_dict()
    assert state.keys() == diffusers.DiTTransformer2DModel(**TINY).state_dict().keys()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)  # file formats refuse shared memory
    key = "norm1.emb.class_embedder.embedding_table.weight"
    assert torch.equal(state[f"transformer_blocks.1.{key}"], state[f"transformer_blocks.0.{key}"])


def test_a_new_model_is_the_identity_in_its_blocks_and_zero_at_its_head():
    model = Transformer2DModel(**TINY)
    latents, timestep, labels = arguments(TINY)
    blocks, head = model.condition(timestep, labels)
    assert not blocks.any() and not head.any()
    tokens = torch.randn(3, 16, 32)
    assert torch.equal(model.transformer_blocks[0](tokens, blocks[:, 0]), tokens)
    assert not model(latents, timestep, labels).sample.any()


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


def test_labels_are_dropped_once_a_picture_in_training():
    model = fill(Transformer2DModel(**{**TINY, "num_layers": 6})).train()
    timestep, labels = torch.full((64,), 5), torch.zeros(64, dtype=torch.long)
    torch.manual_seed(0)
    blocks = model.condition(timestep, labels).blocks  # (64, layers, 6, dim)
    model.eval()
    null = model.condition(timestep[:1], torch.tensor([10])).blocks
    dropped = torch.isclose(blocks, null, atol=1e-5).all(dim=(2, 3))  # (64, layers)
    assert 0 < dropped[:, 0].sum() < 20
    assert torch.equal(dropped, dropped[:, :1].expand(-1, 6))


def test_gradient_checkpointing_gives_the_same_gradients():
    model = fill(Transformer2DModel(**TINY)).eval()
    gradients = []
    for enable in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        enable()
        model.zero_grad()
        model(*arguments(TINY)).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_config_is_read_and_written_as_upstreams():
    upstream = diffusers.DiTTransformer2DModel(**TINY)
    ours = Transformer2DModel.from_config(upstream.config)
    assert json.loads(ours.to_json_string()) == json.loads(upstream.to_json_string())


LEGACY = {
    "_class_name": "Transformer2DModel", "_diffusers_version": "0.12.0.dev0", "activation_fn": "gelu-approximate",
    "attention_bias": True, "attention_head_dim": 16, "cross_attention_dim": None, "dropout": 0.0, "in_channels": 4,
    "norm_elementwise_affine": False, "norm_num_groups": 32, "norm_type": "ada_norm_zero", "num_attention_heads": 2,
    "num_embeds_ada_norm": 10, "num_layers": 2, "num_vector_embeds": None, "only_cross_attention": False,
    "out_channels": 8, "patch_size": 2, "sample_size": 8, "upcast_attention": False, "use_linear_projection": False,
}


def test_the_published_legacy_config_is_understood(caplog):
    model = Transformer2DModel.from_config(LEGACY)
    assert model.config.norm_eps == 1e-5 and model.config.sample_size == 8 and len(model.transformer_blocks) == 2
    assert caplog.text == ""


@pytest.mark.parametrize("key, value", [
    ("norm_type", "layer_norm"), ("activation_fn", "geglu"), ("cross_attention_dim", 768), ("num_vector_embeds", 100),
    ("use_linear_projection", True), ("only_cross_attention", True), ("num_embeds_ada_norm", None),
    ("_class_name", "UNet2DConditionModel"),
])
def test_a_config_of_another_network_is_refused_by_the_name_of_its_key(key, value):
    with pytest.raises(ValueError, match=key) as error:
        Transformer2DModel.from_config({**LEGACY, key: value})
    assert repr(value) in str(error.value) and "\n" not in str(error.value)


def test_forward_says_what_is_missing_or_does_not_fit():
    model = Transformer2DModel(**TINY)
    latents, timestep, labels = arguments(TINY)
    for wrong in ({}, {"timestep": timestep}, {"class_labels": labels},
                  {"timestep": timestep, "class_labels": labels, "conditioning": model.condition(timestep, labels)}):
        with pytest.raises(ValueError, match="conditioning"):
            model(latents, **wrong)
    with pytest.raises(ValueError, match="7x8"):
        model(torch.randn(1, 4, 7, 8), timestep[:1], labels[:1])


def test_upstream_loads_what_we_save(tmp_path):
    ours = fill(Transformer2DModel(**TINY)).eval()
    ours.save_pretrained(tmp_path)
    upstream = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(upstream(*arguments(TINY)).sample, ours(*arguments(TINY)).sample)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_xl_2_on_a_gpu_is_upstreams(xl, cuda, dtype):
    upstream = copy.deepcopy(make_embedders_equal(xl)).to(cuda, dtype)
    ours = ours_with(upstream.state_dict(), **XL).to(cuda, dtype)
    inputs = [tensor.to(cuda) for tensor in arguments(XL)]
    inputs[0] = inputs[0].to(dtype)
    expected = upstream(*inputs).sample
    assert torch.equal(ours(*inputs).sample, expected)
