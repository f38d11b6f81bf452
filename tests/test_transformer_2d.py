"""Transformer2DModel against diffusers' DiTTransformer2DModel: numbers, keys, config, and the one embedder."""

import copy
import json

import diffusers
import pytest
import torch
from conftest import TINY, XL, arguments, embedder_count, fill, make_embedders_equal, ours_with, upstream_model

from nets import Transformer2DModel

GEOMETRIES = {
    "tiny": TINY,
    "patch 4, no attention bias": {**TINY, "patch_size": 4, "attention_bias": False, "sample_size": 16},
    "affine norm, its eps": {**TINY, "norm_elementwise_affine": True, "norm_eps": 1e-3},
    "no learned variance": {**TINY, "out_channels": None},
    "one layer, three channels": {**TINY, "num_layers": 1, "in_channels": 3, "out_channels": 6},
}


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


def test_a_new_model_is_the_identity_in_its_blocks_and_zero_at_its_head():
    model = Transformer2DModel(**TINY)
    latents, timestep, labels = arguments(TINY)
    blocks, head = model.condition(timestep, labels)
    assert not blocks.any() and not head.any()
    tokens = torch.randn(3, 16, 32)
    assert torch.equal(model.transformer_blocks[0](tokens, blocks[:, 0]), tokens)
    assert not model(latents, timestep, labels).sample.any()


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


def calls_of(model, *names):
    """A dictionary that counts how often modules of these names really compute, and not a cache for them."""
    counts = dict.fromkeys(names, 0)
    for name in names:
        module = model.get_submodule(name)
        module.forward = counted(module.forward, counts, name)
    return counts


def counted(forward, counts, name):
    def count(*args, **kwargs):
        counts[name] += 1
        return forward(*args, **kwargs)
    return count


@pytest.mark.parametrize("config, skipped", [
    (diffusers.FirstBlockCacheConfig(threshold=10), "transformer_blocks.1"),
    (diffusers.TaylorSeerCacheConfig(), "transformer_blocks.1.attn1"),
    (diffusers.TaylorSeerCacheConfig(), "transformer_blocks.1.ff"),
    (diffusers.TaylorSeerCacheConfig(use_lite_mode=True), "transformer_blocks.0"),
    (diffusers.TaylorSeerCacheConfig(cache_identifiers=[r".*\.ff"]), "transformer_blocks.0.ff"),
], ids=["first block", "taylor attention", "taylor mlp", "taylor lite", "taylor named"])
def test_caches_really_skip_work_and_forget_it_between_calls(config, skipped):
    from conftest import tiny_pipeline

    pipeline = tiny_pipeline(num_layers=3)
    counts = calls_of(pipeline.transformer, skipped)

    def picture():
        counts[skipped] = 0
        return pipeline([3], num_inference_steps=10, generator=torch.Generator().manual_seed(0), output_type="pt").images

    expected = picture()
    assert counts[skipped] == 10
    pipeline.transformer.enable_cache(config)
    cached, again = picture(), picture()
    assert 0 < counts[skipped] < 10 and torch.equal(cached, again) and not torch.equal(cached, expected)
    pipeline([3, 4], guidance_interval=(0.3, 3.0), num_inference_steps=10)  # the batch changes its size under way
    pipeline.transformer.disable_cache()
    assert torch.equal(picture(), expected) and counts[skipped] == 10


def test_a_cache_that_would_do_nothing_is_refused():
    model = Transformer2DModel(**TINY)
    model.enable_layerwise_casting(torch.float16, torch.float32)  # hooks of another kind
    with pytest.raises(ValueError, match="matches no module of this network"):
        model.enable_cache(diffusers.TaylorSeerCacheConfig(cache_identifiers=["blocks"]))
    with pytest.raises(ValueError, match="FasterCacheConfig does not work with this network"):
        model.enable_cache(diffusers.FasterCacheConfig())
    assert not model.is_cache_enabled


@pytest.mark.parametrize("config", [diffusers.FirstBlockCacheConfig(threshold=10), diffusers.TaylorSeerCacheConfig()],
                         ids=["first block", "taylor"])
def test_a_call_that_was_cut_short_leaves_nothing_in_the_cache(config):
    from conftest import tiny_pipeline

    def stop(pipe, step, timestep, tensors):
        if step == 6:
            raise KeyboardInterrupt

    def latents(labels, **arguments):
        return pipeline(labels, generator=torch.Generator().manual_seed(0), num_inference_steps=10, output_type="latent",
                        **arguments).images

    pipeline = tiny_pipeline(num_layers=3)
    pipeline.transformer.enable_cache(config)
    expected = latents([3])
    with pytest.raises(KeyboardInterrupt):
        latents([3, 4], callback_on_step_end=stop)
    assert torch.equal(latents([3]), expected)


def test_upstreams_default_taylor_cache_matches_nothing_of_upstreams_network():
    upstream = upstream_model(**TINY)
    diffusers.hooks.apply_taylorseer_cache(upstream, diffusers.TaylorSeerCacheConfig())
    assert not any(hasattr(module, "_diffusers_hook") for module in upstream.modules())


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
