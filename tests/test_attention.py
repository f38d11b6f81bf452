"""nets/attention.py against the same classes of diffusers, with the same weights, and against the formulas."""

import math

import pytest
import torch
from diffusers.models import attention as upstream
from diffusers.models.attention_processor import Attention as UpstreamAttention
from diffusers.models.normalization import AdaLayerNormZero as UpstreamAdaLayerNormZero

from nets import attention as ours

DIM, HEADS, HEAD_DIM, CLASSES, TOKENS = 24, 3, 8, 10, 12
OPTIONS = [{}, {"attention_bias": False}, {"norm_elementwise_affine": True},
           {"attention_bias": False, "norm_elementwise_affine": True, "norm_eps": 0.1}]
TIMESTEP, LABELS = torch.tensor([0, 17.5, 999]), torch.tensor([4, 10, 0])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def same_weights(theirs, mine):
    """Both modules with the same weights, none of them at a value that hides its use, in eval mode."""
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    mine.load_state_dict(theirs.state_dict())
    return theirs.eval(), mine.eval()


def blocks(dropout=0.0, **options):
    settings = {"attention_bias": True, "norm_elementwise_affine": False, "norm_eps": 1e-5} | options
    theirs = upstream.BasicTransformerBlock(DIM, HEADS, HEAD_DIM, dropout=dropout, num_embeds_ada_norm=CLASSES,
                                            activation_fn="gelu-approximate", norm_type="ada_norm_zero", **settings)
    return same_weights(theirs, ours.BasicTransformerBlock(DIM, HEADS, HEAD_DIM, CLASSES, dropout, **options))


def run(block, hidden_states):
    """One of our blocks, told what upstream's blocks are told."""
    return block(hidden_states, block.norm1.modulation(block.norm1.emb(TIMESTEP, LABELS)))


def tokens(dtype=torch.float32):
    return torch.randn(3, TOKENS, DIM, dtype=dtype)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_block_equals_upstreams(options):
    theirs, mine = blocks(**options)
    hidden_states = tokens()
    assert torch.equal(run(mine, hidden_states), theirs(hidden_states, timestep=TIMESTEP, class_labels=LABELS))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_block_has_upstreams_keys_and_shapes_in_upstreams_order(options):
    theirs, mine = (
        [(key, value.shape) for key, value in block.state_dict().items()] for block in blocks(**options))
    assert mine == theirs


def test_a_block_in_training_drops_what_upstream_drops():
    theirs, mine = (block.train() for block in blocks(dropout=0.3))
    hidden_states = tokens()
    torch.manual_seed(1)
    expected = theirs(hidden_states, timestep=TIMESTEP, class_labels=LABELS)
    torch.manual_seed(1)
    assert torch.equal(run(mine, hidden_states), expected)


def test_gradients_of_a_block_equal_upstreams():
    theirs, mine = (block.double() for block in blocks(norm_elementwise_affine=True))
    hidden_states = tokens(torch.float64)
    theirs(hidden_states, timestep=TIMESTEP, class_labels=LABELS).square().sum().backward()
    run(mine, hidden_states).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in mine.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-9)


def test_a_block_whose_gates_are_zero_is_the_identity():
    _, mine = blocks()
    modulation = torch.randn(3, 6, DIM)
    modulation[:, [2, 5]] = 0  # adaLN-Zero at the start of training
    hidden_states = tokens()
    assert torch.equal(mine(hidden_states, modulation), hidden_states)


def test_a_block_treats_its_tokens_as_a_set():
    _, mine = blocks()
    mine, hidden_states, order = mine.double(), tokens(torch.float64), torch.randperm(TOKENS)
    torch.testing.assert_close(run(mine, hidden_states[:, order]), run(mine, hidden_states)[:, order])


def test_the_norm_and_its_six_vectors_equal_upstreams():
    theirs, mine = same_weights(UpstreamAdaLayerNormZero(DIM, CLASSES), ours.AdaLayerNormZero(DIM, CLASSES))
    hidden_states = tokens()
    normed, *vectors = theirs(hidden_states, TIMESTEP, LABELS, hidden_dtype=torch.float32)
    shift_msa, scale_msa, *others = mine.modulation(mine.emb(TIMESTEP, LABELS)).unbind(1)
    assert torch.equal(mine(hidden_states, shift_msa[:, None], scale_msa[:, None]), normed)
    assert all(torch.equal(a, b) for a, b in zip(others, vectors, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("heads, head_dim", [(3, 8), (1, 24), (2, 5)])
def test_attention_equals_upstreams(bias, heads, head_dim):
    theirs, mine = same_weights(UpstreamAttention(DIM, heads=heads, dim_head=head_dim, bias=bias),
                                ours.Attention(DIM, heads, head_dim, bias=bias))
    hidden_states = tokens()
    assert torch.equal(mine(hidden_states), theirs(hidden_states))


def test_attention_is_the_softmax_of_scaled_products_in_each_head():
    attention, hidden_states = ours.Attention(DIM, HEADS, HEAD_DIM).double(), tokens(torch.float64)
    heads = []
    for head in range(HEADS):
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        query, key, value = (hidden_states @ p.weight[rows].T + p.bias[rows]
                             for p in (attention.to_q, attention.to_k, attention.to_v))
        weights = torch.einsum("bqd,bkd->bqk", query, key).div(math.sqrt(HEAD_DIM)).exp()
        heads.append(weights / weights.sum(-1, keepdim=True) @ value)
    expected = attention.to_out[0](torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(hidden_states), expected, rtol=1e-10, atol=1e-10)


def test_feed_forward_equals_upstreams():
    theirs, mine = same_weights(upstream.FeedForward(DIM, activation_fn="gelu-approximate"), ours.FeedForward(DIM))
    hidden_states = tokens()
    assert torch.equal(mine(hidden_states), theirs(hidden_states))


def test_gelu_is_the_tanh_form():
    gelu, x = ours.GELU(DIM, DIM).double(), tokens(torch.float64)
    y = x @ gelu.proj.weight.T + gelu.proj.bias
    expected = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    torch.testing.assert_close(gelu(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size, dim, sizes", [
    (1, 1, [1] * 12), (4, 1, [4, 4, 4]), (5, 1, [5, 5, 2]), (12, 1, [12]), (100, 1, [12]),
    (1, 0, [1, 1, 1]), (2, 0, [2, 1]),
])
def test_a_chunked_feed_forward_sees_the_chunks_and_gives_the_unchunked_result(chunk_size, dim, sizes):
    _, mine = blocks()
    mine, hidden_states, seen = mine.double(), tokens(torch.float64), []
    expected = run(mine, hidden_states)
    mine.ff.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[dim]))
    mine.set_chunk_feed_forward(chunk_size, dim)
    torch.testing.assert_close(run(mine, hidden_states), expected, rtol=1e-10, atol=1e-10)
    assert seen == sizes


@pytest.mark.parametrize("chunk_size, dim", [(4, 1), (1, 0)])
def test_a_block_chunked_as_upstreams_equals_it(chunk_size, dim):
    theirs, mine = blocks()
    for block in (theirs, mine):
        block.set_chunk_feed_forward(chunk_size, dim=dim)
    hidden_states = tokens()
    assert torch.equal(run(mine, hidden_states), theirs(hidden_states, timestep=TIMESTEP, class_labels=LABELS))


def test_chunking_can_be_switched_off():
    _, mine = blocks()
    seen, hidden_states = [], tokens()
    mine.ff.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    mine.set_chunk_feed_forward(6, dim=1)
    run(mine, hidden_states)
    mine.set_chunk_feed_forward(None)
    run(mine, hidden_states)
    assert seen == [(3, 6, DIM), (3, 6, DIM), (3, TOKENS, DIM)]
