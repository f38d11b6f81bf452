"""nets/autoencoding.py: the small VAE's objective against the same spelled out, and its scaling factor."""

import pytest
import torch
from PIL import Image

from nets.autoencoding import Autoencode, measure_scaling_factor, reconstruct, reconstruct_some, small_vae
from nets.picture_sets import open_folder_of_pictures
from nets.sampling import picture_generator
from nets.training import indices_of_step


@pytest.fixture
def pictures(tmp_path):
    """Twenty dark pictures in one class, and twenty bright ones in the next."""
    for index in range(40):
        path = tmp_path / ("bright" if index >= 20 else "a dark one") / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (6 * index, 5 * index, 3 * index)).save(path)
    return open_folder_of_pictures(tmp_path)


def test_the_loss_is_the_squared_error_and_a_little_of_the_divergence(pictures):
    torch.manual_seed(0)
    model = Autoencode(small_vae(16).eval())
    make_batch, loss_of_batch = reconstruct(pictures, 16, 6, seed=3)
    batch = make_batch(2)
    indices = indices_of_step(40, 6, 3, 2)
    noise = torch.randn(6, 4, 4, 4, generator=picture_generator(3, 2, 1))
    assert torch.equal(batch["images"], pictures.pixels(indices, (16, 16)) / 127.5 - 1)
    assert torch.equal(batch["noise"], noise)
    with torch.no_grad():
        losses, quarter = loss_of_batch(model, batch)
        posterior = model.vae.encode(batch["images"]).latent_dist
        decoded = model.vae.decode(posterior.mean + (posterior.logvar / 2).exp() * noise).sample
    variance = posterior.logvar.exp()
    divergence = 0.5 * (posterior.mean**2 + variance - 1 - posterior.logvar).sum((1, 2, 3))
    error = (decoded - batch["images"]).pow(2).mean((1, 2, 3))
    torch.testing.assert_close(losses, error + 1e-6 * 32**2 / 16**2 * divergence, atol=1e-6, rtol=1e-5)
    assert quarter.tolist() == [0] * 6


def test_the_scaling_factor_makes_the_latents_of_the_whole_set_of_variance_one(pictures):
    torch.manual_seed(0)
    vae = small_vae(16).eval()
    images = pictures.pixels(range(40), (16, 16)) / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        deviation = torch.stack([posterior.sample() for _ in range(200)]).std().item()
    assert measure_scaling_factor(vae, pictures, 16) == pytest.approx(1 / deviation, rel=0.005)
    assert measure_scaling_factor(vae, pictures, 16, count=10) == pytest.approx(1 / deviation, rel=0.1)


def test_what_the_vae_makes_of_pictures_from_all_over_the_set(pictures, tmp_path):
    vae = small_vae(16).eval()
    (tmp_path / "bright/24.png").write_bytes(b"broken")
    images, decoded = reconstruct_some(vae, pictures, 16, count=10)
    assert torch.equal(images, pictures.pixels([0, 4, 8, 12, 16, 20, 28, 32, 36], (16, 16)) / 127.5 - 1)
    with torch.no_grad():
        torch.testing.assert_close(decoded, vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1))


def test_a_side_that_it_cannot_shrink_is_refused():
    with pytest.raises(ValueError, match="--size 30 is no multiple of 4"):
        small_vae(30)
