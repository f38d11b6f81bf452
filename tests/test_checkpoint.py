"""nets/checkpoint.py against the original network, written out here from the paper, and its key names."""

import argparse
import math

import numpy as np
import pytest
import torch
from conftest import TINY, fill

from nets import Transformer2DModel
from nets.checkpoint import NUMERICS, from_original, key_table, read_config, read_original, to_original

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def position_table(dim, side):
    """The original's fixed positions, (1, side * side, dim): NumPy, column features first."""
    def features(positions):
        angles = np.outer(positions, 1.0 / 10000 ** (np.arange(dim // 4) / (dim / 4)))
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    rows, columns = np.divmod(np.arange(side * side), side)
    return torch.from_numpy(np.concatenate([features(columns), features(rows)], axis=1)).float()[None]


def original_state_dict(dim, depth, patch=2, side=4, classes=10, channels=4, learn_sigma=True):
    """Random weights under the names and in the shapes of facebookresearch/DiT, adaLN not zero."""
    generator = torch.Generator().manual_seed(0)
    state_dict = {"pos_embed": position_table(dim, side)}

    def layer(name, *shape):
        fan_in = math.prod(shape[1:])
        state_dict[f"{name}.weight"] = torch.randn(shape, generator=generator) * 0.5 * fan_in**-0.5
        state_dict[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.05

    layer("x_embedder.proj", dim, channels, patch, patch)
    layer("t_embedder.mlp.0", dim, 256)
    layer("t_embedder.mlp.2", dim, dim)
    state_dict["y_embedder.embedding_table.weight"] = torch.randn(classes + 1, dim, generator=generator) * 0.3
    for block in range(depth):
        layer(f"blocks.{block}.attn.qkv", 3 * dim, dim)
        layer(f"blocks.{block}.attn.proj", dim, dim)
        layer(f"blocks.{block}.mlp.fc1", 4 * dim, dim)
        layer(f"blocks.{block}.mlp.fc2", dim, 4 * dim)
        layer(f"blocks.{block}.adaLN_modulation.1", 6 * dim, dim)
    layer("final_layer.linear", patch * patch * channels * (2 if learn_sigma else 1), dim)
    layer("final_layer.adaLN_modulation.1", 2 * dim, dim)
    return state_dict


def original_forward(weights, latents, timestep, class_labels, heads):
    """DiT from the paper (section 3.2, figure 3) as plain tensor operations in float64, with the original's constants."""
    weights = {key: tensor.double() for key, tensor in weights.items()}
    batch, channels, height, width = latents.shape
    dim, _, patch, _ = weights["x_embedder.proj.weight"].shape
    rows, columns = height // patch, width // patch

    def linear(name, x):
        return x @ weights[f"{name}.weight"].flatten(1).T + weights[f"{name}.bias"]

    def silu(x):
        return x / (1 + torch.exp(-x))

    def norm(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)

    patches = torch.einsum("bcrpsq->brscpq", latents.double().reshape(batch, channels, rows, patch, columns, patch))
    x = linear("x_embedder.proj", patches.reshape(batch, rows * columns, -1)) + weights["pos_embed"]
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    angles = timestep[:, None].double() * frequencies
    t = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1))))
    c = silu(t + weights["y_embedder.embedding_table.weight"][class_labels])

    depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    for block in range(depth):
        beta_1, gamma_1, alpha_1, beta_2, gamma_2, alpha_2 = (
            linear(f"blocks.{block}.adaLN_modulation.1", c)[:, None].split(dim, dim=-1))
        qkv = linear(f"blocks.{block}.attn.qkv", norm(x) * (1 + gamma_1) + beta_1)
        q, k, v = qkv.reshape(batch, rows * columns, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(dim // heads)
        attended = torch.einsum("bhij,bhjd->bihd", scores.exp() / scores.exp().sum(-1, keepdim=True), v)
        x = x + alpha_1 * linear(f"blocks.{block}.attn.proj", attended.reshape(batch, rows * columns, dim))
        hidden = linear(f"blocks.{block}.mlp.fc1", norm(x) * (1 + gamma_2) + beta_2)
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + alpha_2 * linear(f"blocks.{block}.mlp.fc2", hidden)

    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].split(dim, dim=-1)
    x = linear("final_layer.linear", norm(x) * (1 + scale) + shift).reshape(batch, rows, columns, patch, patch, -1)
    return torch.einsum("brspqc->bcrpsq", x).reshape(batch, -1, height, width)


def inputs(side, patch, batch=3):
    latents = torch.randn(batch, 4, side * patch, side * patch, generator=torch.Generator().manual_seed(1))
    return latents, torch.tensor([999, 417, 3])[:batch], torch.tensor([10, 0, 9])[:batch]


@pytest.mark.parametrize("patch, learn_sigma", [(2, True), (4, True), (2, False)])
@torch.no_grad()
def test_original_numerics_are_the_original_and_diffusers_are_not(patch, learn_sigma):
    weights = original_state_dict(64, 3, patch, learn_sigma=learn_sigma)
    expected = original_forward(weights, *inputs(4, patch), heads=4)
    differences = {}
    for numerics in NUMERICS:
        model = from_original(weights, read_config(weights, heads=4, numerics=numerics))
        differences[numerics] = (model(*inputs(4, patch)).sample - expected).abs().max().item()
    assert expected.std() > 0.1
    assert differences["original"] < 1e-5
    assert differences["diffusers"] > 1e-3


@pytest.mark.parametrize("key, value", [("downscale_freq_shift", 1), ("norm_eps", 1e-3)])
@torch.no_grad()
def test_each_of_the_two_constants_matters(key, value):
    weights = original_state_dict(64, 3)
    model = from_original(weights, {**read_config(weights, heads=4, numerics="original"), key: value})
    expected = original_forward(weights, *inputs(4, 2), heads=4)
    assert (model(*inputs(4, 2)).sample - expected).abs().max() > 1e-4


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_weights_come_back_bit_equal_at_every_published_width(size, patch):
    dim, _, heads = SIZES[size]
    weights = original_state_dict(dim, depth=1, patch=patch, side=32 // patch)
    config = read_config(weights, heads)
    assert (config["patch_size"], config["sample_size"], config["num_embeds_ada_norm"]) == (patch, 32, 10)
    again = to_original(from_original(weights, config))
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[key], weights[key]) for key in weights)


@pytest.mark.parametrize("size", SIZES)
def test_the_published_sizes_need_no_number_of_heads(size):
    dim, depth, heads = SIZES[size]
    with torch.device("meta"):
        shapes = Transformer2DModel(heads, dim // heads, num_layers=depth, out_channels=8)
    table = key_table(depth)
    weights = {key: torch.empty(sum(len(shapes.get_parameter(ours)) for ours in parts),
                                *shapes.get_parameter(parts[0]).shape[1:], device="meta") for key, parts in table.items()}
    config = read_config({**weights, "pos_embed": torch.empty(1, 256, dim)})
    assert config["num_attention_heads"] == heads
    assert (config["num_layers"], config["out_channels"], config["sample_size"]) == (depth, 8, 32)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_learned_variance_is_read_off_the_head(learn_sigma):
    weights = original_state_dict(64, 1, learn_sigma=learn_sigma)
    assert read_config(weights, heads=4)["out_channels"] == (8 if learn_sigma else 4)


def test_another_size_needs_a_number_of_heads_that_fits():
    weights = original_state_dict(64, 1)
    with pytest.raises(ValueError, match="width 64 and depth 1 are no published size"):
        read_config(weights)
    for heads in (5, 0, -4):
        with pytest.raises(ValueError, match=f"64 cannot be split into {heads} heads"):
            read_config(weights, heads=heads)


@pytest.mark.parametrize("spoil, message", [
    (lambda weights: weights.pop("blocks.1.mlp.fc1.bias"), r"network: 1 missing: blocks\.1\.mlp\.fc1\.bias$"),
    (lambda weights: weights.update(extra=torch.zeros(1)), r"network: 1 unknown: extra$"),
    (lambda weights: weights.update({"blocks.0.attn.qkv.bias": torch.zeros(9)}), r"qkv\.bias \(9,\) instead of \(192,\)$"),
    (lambda weights: weights["pos_embed"].add_(0.01), "pos_embed is not the fixed table"),
    (lambda weights: weights.update({"blocks.x.attn": torch.zeros(1)}), r"; 1 unknown: blocks\.x\.attn$"),
    (lambda weights: weights.update({"blocks.300000.attn": torch.zeros(1)}), r"1 unknown: blocks\.300000\.attn$"),
])
def test_every_key_is_used_and_every_parameter_filled_or_the_difference_named(spoil, message):
    weights = original_state_dict(64, 2)
    spoil(weights)
    with pytest.raises(ValueError, match=message) as error:
        from_original(weights, read_config(weights, heads=4))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight"])
def test_what_is_no_dit_is_refused_in_one_line(key):
    weights = original_state_dict(64, 1)
    del weights[key]
    with pytest.raises(ValueError, match=f"not a DiT.*{key}") as error:
        read_config(weights, heads=4)
    assert "\n" not in str(error.value)


def test_half_precision_comes_back_bit_equal():
    weights = {key: tensor.bfloat16() for key, tensor in original_state_dict(64, 1).items()}
    again = to_original(from_original(weights, read_config(weights, heads=4)))
    assert all(tensor.dtype == torch.bfloat16 and torch.equal(again[key], tensor) for key, tensor in weights.items())


@pytest.mark.parametrize("weights, which", [("ema", 2.0), ("model", 1.0)])
def test_a_training_checkpoint_gives_the_network_that_was_asked_for(weights, which, tmp_path):
    settings = argparse.Namespace(model="DiT-XL/2", image_size=256, results_dir=tmp_path)
    torch.save({"model": {"module.a": torch.ones(2)}, "ema": {"a": torch.full((2,), 2.0)}, "opt": {"state": {}},
                "args": settings}, tmp_path / "0000100.pt")
    assert read_original(tmp_path / "0000100.pt", weights)["a"].tolist() == [which, which]


class RunsCode:
    def __repr__(self):
        return "RunsCode()"

    def __reduce__(self):
        return (print, ("code of the file ran",))


@pytest.mark.parametrize("content", [{"a": RunsCode()}, {"ema": {"a": RunsCode()}}, [torch.zeros(1)], {}, {"a": 1},
                                     torch.nn.Linear(1, 1), {0: torch.zeros(1)}, {"a": torch.zeros(1, dtype=torch.int64)},
                                     {"a": torch.zeros(1), "module.a": torch.zeros(1)}], ids=str)
def test_a_file_of_something_else_is_refused_in_one_line_and_its_code_not_run(content, tmp_path, capsys):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt") as error:
        read_original(tmp_path / "x.pt")
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
    assert "code of the file ran" not in capsys.readouterr().out


def test_a_file_that_would_run_code_is_refused_by_the_name_of_what_it_asks_for(tmp_path):
    torch.save({"a": RunsCode()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"it asks for print, and code in a file is not run$"):
        read_original(tmp_path / "x.pt")


def test_a_network_that_the_original_cannot_hold_is_refused():
    for config, message in (({"attention_bias": False}, "attention_bias=False"),
                            ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True")):
        with pytest.raises(ValueError, match=message):
            to_original(Transformer2DModel(**TINY, **config))
    unequal = fill(Transformer2DModel(**TINY))
    weights = unequal.state_dict()
    weights["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    unequal.load_state_dict(weights)
    with pytest.raises(ValueError, match="embedders differ"):
        to_original(unequal)
