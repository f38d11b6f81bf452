"""nets/objectives.py: what the network is shown and what its answer costs, against the same spelled out."""

import pytest
import torch
from conftest import TINY, fill

from nets import Transformer2DModel
from nets.diffusion import GaussianDiffusion, linear_betas
from nets.latents import Latents
from nets.objectives import attention_kernel, denoise
from nets.sampling import picture_generator
from nets.training import indices_of_step

COUNT, BATCH, SCALE, SEED = 12, 8, 0.7, 5


@pytest.fixture
def latents():
    generator = torch.Generator().manual_seed(0)
    shards = [{"mean": torch.randn(count, 2, 4, 8, 8, generator=generator),
               "logvar": torch.randn(count, 2, 4, 8, 8, generator=generator)} for count in (7, 5)]
    return Latents(shards, torch.arange(COUNT) % 10, {label: str(label) for label in range(10)}, [])


def expected_batch(latents, step, dropout):
    """The batch of a step, drawn in the same order."""
    generator = picture_generator(SEED, step, 1)
    indices = indices_of_step(COUNT, BATCH, SEED, step)
    view = torch.randint(2, (BATCH,), generator=generator)
    of_posterior, noise = torch.randn(2, BATCH, 4, 8, 8, generator=generator)
    dropped = torch.rand(BATCH, generator=generator) < dropout
    mean, logvar = (torch.cat([shard[name] for shard in latents.shards])[indices, view] for name in ("mean", "logvar"))
    labels = latents.labels[indices].clone()
    labels[dropped] = 10
    return {"latents": SCALE * (mean + (logvar / 2).exp() * of_posterior), "noise": noise, "class_labels": labels,
            "timestep": torch.randint(1000, (BATCH,), generator=generator)}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_batch_is_posterior_samples_in_either_view_with_labels_dropped(latents, dropout):
    make_batch, _ = denoise(latents, GaussianDiffusion(linear_betas()), SCALE, BATCH, SEED, dropout)
    for step in (0, 3):
        found, wanted = make_batch(step), expected_batch(latents, step, dropout)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)
    dropped = sum((make_batch(step)["class_labels"] == 10).sum().item() for step in range(50)) / (50 * BATCH)
    assert dropped == pytest.approx(dropout, abs=0.1)


@pytest.mark.parametrize("min_snr", [None, 5.0])
def test_the_loss_is_that_of_the_networks_answer_to_the_noised_latents(latents, min_snr):
    diffusion, model = GaussianDiffusion(linear_betas()), fill(Transformer2DModel(**TINY)).eval()
    make_batch, loss_of_batch = denoise(latents, diffusion, SCALE, BATCH, SEED, 0.1, min_snr)
    batch = make_batch(0)
    losses, quarter = loss_of_batch(model, batch)
    alpha_bar = (1 - linear_betas()).cumprod(0)[batch["timestep"]].reshape(-1, 1, 1, 1).float()
    noisy = alpha_bar.sqrt() * batch["latents"] + (1 - alpha_bar).sqrt() * batch["noise"]
    output = model(noisy, batch["timestep"], batch["class_labels"]).sample
    wanted = diffusion.loss(output, batch["latents"], batch["noise"], batch["timestep"], min_snr)
    torch.testing.assert_close(losses, wanted, atol=1e-5, rtol=1e-4)
    assert quarter.tolist() == [timestep // 250 for timestep in batch["timestep"].tolist()]


@pytest.mark.parametrize("side, device, plain", [(8, "cpu", True), (16, "cpu", False), (8, "cuda", False)])
def test_few_tokens_are_attended_to_by_the_plain_formula_on_a_cpu(side, device, plain):
    shard = {name: torch.zeros(1, 1, 4, side, side) for name in ("mean", "logvar")}
    with attention_kernel(Latents([shard], torch.zeros(1), {0: "0"}, []), torch.device(device)):
        assert torch.backends.cuda.flash_sdp_enabled() is not plain
    assert torch.backends.cuda.flash_sdp_enabled()
