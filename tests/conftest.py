"""What several test files share: random models in pairs, ours and upstream's, with the same weights."""

import gzip
import os
import struct
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from nets import DiTPipeline, Transformer2DModel

if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each, and for the processes that it starts
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
SMALL_MODEL = ROOT / "model_data/fashion-mnist-32"
TINY = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, out_channels=8, sample_size=8,
            num_embeds_ada_norm=10)
XL = dict(num_attention_heads=16, attention_head_dim=72, num_layers=28, in_channels=4, out_channels=8, sample_size=32,
          patch_size=2, num_embeds_ada_norm=1000)


def fill(model, seed=0):
    """Random weights everywhere, adaLN and gates included, small enough that nothing explodes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.05,
                              generator=generator)
    return model


def make_embedders_equal(upstream):
    """Give all blocks of an upstream model the numbers of the first one's embedder, as the published weights have."""
    first, *others = (block.norm1.emb for block in upstream.transformer_blocks)
    for emb in others:
        emb.load_state_dict(first.state_dict())
    return upstream


def upstream_model(equal_embedders=True, **config):
    """A random upstream transformer, in eval mode."""
    model = fill(diffusers.DiTTransformer2DModel(**config)).eval()
    return make_embedders_equal(model) if equal_embedders else model


def ours_with(state_dict, **config):
    """Our transformer with these weights, in eval mode."""
    model = Transformer2DModel(**config).eval()
    model.load_state_dict(state_dict)
    return model


def arguments(config, batch=3):
    """What a transformer of this config is called with: latents, timestep, class labels."""
    generator = torch.Generator().manual_seed(1)
    size, classes = config["sample_size"], config["num_embeds_ada_norm"]
    latents = torch.randn(batch, config.get("in_channels", 4), size, size, generator=generator)
    return latents, torch.tensor([999, 0, 417])[:batch], torch.tensor([classes, 0, classes - 1])[:batch]


def embedder_count(model):
    """How many different embedders the blocks of a model use."""
    return len({id(block.norm1.emb) for block in model.transformer_blocks})


def tiny_vae():
    """A random VAE that turns 8x8x4 latents into 16x16 pictures."""
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4,
                                   down_block_types=("DownEncoderBlock2D",) * 2,
                                   up_block_types=("UpDecoderBlock2D",) * 2).eval()


def tiny_unet():
    """A random network that is no DiT."""
    return diffusers.UNet2DModel(4, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
                                 down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))


def tiny_pipeline(**config):
    """A random pipeline of ours, with ten named classes."""
    transformer = fill(Transformer2DModel(**{**TINY, **config})).eval()
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)
    pipeline = DiTPipeline(transformer, tiny_vae(), scheduler, id2label={k: f"class {k}, name {k}" for k in range(10)})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def fashion_mnist(tmp_path_factory):
    """Thirty pictures in Fashion-MNIST's own file format, as both of its splits: class k is a bright square at place k."""
    folder, labels = tmp_path_factory.mktemp("data") / "fashion-mnist", np.arange(30, dtype=np.uint8) % 10
    folder.mkdir()
    pictures = np.zeros((30, 28, 28), np.uint8)
    for picture, label in zip(pictures, labels):
        picture[2 * label:2 * label + 8, 5:20] = 200
    for split in ("train", "t10k"):
        with gzip.open(folder / f"{split}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">IIII", 2051, 30, 28, 28) + pictures.tobytes())
        with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">II", 2049, 30) + labels.tobytes())
    return folder


@pytest.fixture
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="session")
def small_model_loaded_once():
    pipeline = DiTPipeline.from_pretrained(SMALL_MODEL)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def small_model(small_model_loaded_once):
    """The model that ships, with its own scheduler; other things that a test changes, it puts back."""
    scheduler = small_model_loaded_once.scheduler
    yield small_model_loaded_once
    small_model_loaded_once.scheduler = scheduler


@pytest.fixture(scope="session")
def cuda():
    """The GPU; tests that ask for it carry the mark `cuda` and skip where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    return torch.device("cuda")
