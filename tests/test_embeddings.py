"""nets/embeddings.py against the same classes of diffusers, with the same weights, and against closed forms."""

import math

import pytest
import scipy.stats
import torch
from diffusers.models import embeddings as upstream
from hypothesis import given, settings
from hypothesis import strategies as st

from nets import embeddings as ours

TIMESTEPS = [torch.tensor([0, 1, 499, 999]), torch.tensor([0.5, 249.75, 998.001]),
             torch.tensor([0.1], dtype=torch.float64)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def with_weights_of(theirs, mine):
    mine.load_state_dict(theirs.state_dict())  # strict: keys and shapes are upstream's
    return mine


def patch_embeds(sample_size, patch_size, dim=24):
    theirs = upstream.PatchEmbed(sample_size, sample_size, patch_size, in_channels=4, embed_dim=dim)
    return theirs, with_weights_of(theirs, ours.PatchEmbed(sample_size, patch_size, 4, dim))


@pytest.mark.parametrize("sample_size, patch_size", [(8, 2), (8, 4), (8, 8), (9, 2)])
def test_patches_of_the_trained_size_equal_upstreams(sample_size, patch_size):
    theirs, mine = patch_embeds(sample_size, patch_size)
    latents = torch.randn(3, 4, sample_size, sample_size)
    assert torch.equal(mine(latents), theirs(latents))


@pytest.mark.parametrize("height, width", [(8, 24), (24, 8), (16, 16), (4, 4), (6, 10), (2, 14)])
def test_positions_of_another_grid_follow_upstreams_rule(height, width):
    theirs, mine = patch_embeds(8, 2)
    latents = torch.randn(2, 4, height, width)
    assert torch.equal(mine(latents), theirs(latents))


def test_a_grid_of_another_shape_with_as_many_tokens_has_its_own_positions():
    theirs, mine = patch_embeds(8, 2)
    latents = torch.randn(1, 4, 4, 16)  # 2 x 8 tokens; the trained grid has 4 x 4
    assert torch.equal(mine(latents), theirs(latents))


@settings(max_examples=30, database=None, deadline=None)
@given(dim=st.integers(1, 20).map(lambda n: 4 * n), height=st.integers(1, 12), width=st.integers(1, 12),
       base_size=st.integers(1, 12))
def test_positions_equal_upstreams_for_any_grid_and_base_size(dim, height, width, base_size):
    theirs = upstream.get_2d_sincos_pos_embed(dim, (height, width), base_size=base_size, output_type="pt")
    assert torch.equal(ours.sincos_2d(dim, height, width, base_size), theirs.float()[None])


def test_positions_hold_sine_and_cosine_of_the_column_and_then_of_the_row():
    dim, height, width, base_size = 16, 3, 5, 4
    positions = ours.sincos_2d(dim, height, width, base_size).reshape(height, width, dim)
    for row in range(height):
        for column in range(width):
            angles = [[place * base_size / size * 10000 ** (-i / 4) for i in range(4)]
                      for place, size in [(column, width), (row, height)]]
            expected = [f(a) for half in angles for f in (math.sin, math.cos) for a in half]
            assert positions[row, column].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dim", [2, 6, 9, 1150])
def test_a_width_that_is_no_multiple_of_4_is_refused(dim):
    with pytest.raises(ValueError, match=f"multiple of 4.*{dim}$"):
        ours.PatchEmbed(8, 2, 4, dim)


def test_positions_are_not_saved():
    assert set(patch_embeds(8, 2)[1].state_dict()) == {"proj.weight", "proj.bias"}


def test_half_precision_tokens_stay_in_half_precision():
    theirs, mine = (module.bfloat16() for module in patch_embeds(8, 2))
    latents = torch.randn(2, 4, 12, 8).bfloat16()
    tokens = mine(latents)
    assert tokens.dtype == torch.bfloat16
    assert torch.equal(tokens, theirs(latents))


@pytest.mark.parametrize("timestep", TIMESTEPS, ids=["whole", "fractional", "float64"])
@pytest.mark.parametrize("channels, shift", [(256, 1), (256, 0), (32, 1)])
def test_timestep_features_equal_upstreams(timestep, channels, shift):
    theirs = upstream.Timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=shift)
    assert torch.equal(ours.Timesteps(channels, shift)(timestep), theirs(timestep))


def test_timestep_features_are_cosines_and_then_sines_of_falling_frequencies():
    timestep = torch.tensor([0, 3.25, 999])
    angles = torch.outer(timestep.double(), 10000 ** -(torch.arange(128, dtype=torch.float64) / 127))
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(ours.Timesteps()(timestep).double(), expected, rtol=0, atol=2e-4)  # float32 angles


def test_timestep_embedding_equals_upstreams():
    theirs = upstream.TimestepEmbedding(256, 24)
    features = torch.randn(5, 256)
    assert torch.equal(with_weights_of(theirs, ours.TimestepEmbedding(256, 24))(features), theirs(features))


def test_labels_and_the_null_class_pick_upstreams_rows():
    theirs = upstream.LabelEmbedding(10, 24, 0.1).eval()
    mine = with_weights_of(theirs, ours.LabelEmbedding(10, 24)).eval()
    labels = torch.tensor([0, 9, 10, 3])
    assert torch.equal(mine(labels), theirs(labels))
    assert torch.equal(mine(labels)[2], theirs.embedding_table.weight[-1])


def test_training_drops_the_labels_that_upstream_drops():
    theirs = upstream.LabelEmbedding(10, 24, 0.4)
    mine = with_weights_of(theirs, ours.LabelEmbedding(10, 24, 0.4))
    labels = torch.randint(10, (64,))
    torch.manual_seed(1)
    expected = theirs(labels)
    torch.manual_seed(1)
    assert torch.equal(mine(labels), expected)


def ids_seen(embedder, labels):
    """The ids whose rows come out of an embedder."""
    with torch.no_grad():
        embedder.embedding_table.weight.copy_(torch.arange(embedder.num_classes + 1.0)[:, None])
        return embedder(labels)[:, 0].long()


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_training_makes_the_right_share_of_labels_the_null_class(probability):
    labels = torch.randint(10, (20_000,))
    seen = ids_seen(ours.LabelEmbedding(10, 1, probability), labels)
    changed = seen != labels
    assert seen[changed].unique().tolist() == [10]
    assert scipy.stats.binomtest(int(changed.sum()), len(labels), probability).pvalue > 1e-3


def test_every_label_is_dropped_at_probability_one():
    assert ids_seen(ours.LabelEmbedding(10, 1, 1.0), torch.arange(10)).tolist() == [10] * 10


def test_no_label_is_dropped_in_eval_mode():
    labels = torch.randint(10, (1000,))
    assert torch.equal(ids_seen(ours.LabelEmbedding(10, 1, 0.9).eval(), labels), labels)


def test_no_label_is_dropped_in_training_at_probability_zero_and_the_null_class_stays():
    labels = torch.randint(11, (1000,))
    assert torch.equal(ids_seen(ours.LabelEmbedding(10, 1, 0.0), labels), labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("timestep", TIMESTEPS[:2], ids=["whole", "fractional"])
def test_the_sum_of_both_embeddings_equals_upstreams_in_the_dtype_of_the_weights(timestep, dtype):
    theirs = upstream.CombinedTimestepLabelEmbeddings(10, 24).to(dtype).eval()
    mine = with_weights_of(theirs, ours.CombinedTimestepLabelEmbeddings(10, 24).to(dtype)).eval()
    labels = torch.tensor([0, 10, 4, 7])[: len(timestep)]
    embedding = mine(timestep, labels)
    assert embedding.dtype == dtype
    assert torch.equal(embedding, theirs(timestep, labels, hidden_dtype=dtype))
