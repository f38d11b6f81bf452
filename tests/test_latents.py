"""nets/latents.py: each picture's posterior, once, whoever encodes it and however often that is interrupted."""

import json

import diffusers
import numpy as np
import pytest
import torch
from conftest import tiny_vae
from PIL import Image

import nets.latents
from nets.latents import encode_shard, load_latents, missing_shards, open_latents_folder
from nets.picture_sets import open_pictures

SIZE = (16, 16)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(nets.latents, "SHARD", 4)


@pytest.fixture
def folder(tmp_path):
    """Ten pictures in two classes, the fourth of them broken."""
    generator = np.random.default_rng(0)
    for index in range(10):
        path = tmp_path / "pictures" / ("bag" if index < 6 else "coat") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    (tmp_path / "pictures/bag/3.png").write_bytes(b"broken")
    return tmp_path / "pictures"


def encode(folder, output, vae, flip=True, shards=None, **options):
    pictures = open_pictures(folder)
    open_latents_folder(output, pictures, vae, SIZE, flip)
    for number in missing_shards(output, pictures.count) if shards is None else shards:
        encode_shard(output, number, pictures, vae, SIZE, flip, batch_size=3, **options)


def test_the_moments_are_the_vaes_of_the_picture_and_of_its_mirror_image(folder, tmp_path):
    vae, counts = tiny_vae(), []
    encode(folder, tmp_path / "latents", vae, done=counts.append)
    latents = load_latents(tmp_path / "latents")
    assert counts == [3, 1, 3, 1, 2] and latents.shape == (4, 8, 8) and latents.views == 2
    assert latents.labels.tolist() == [0] * 5 + [1] * 4 and latents.class_names == {0: "bag", 1: "coat"}
    assert len(latents.skipped) == 1 and "3.png" in latents.skipped[0]
    readable = [index for index in range(10) if index != 3]
    images = open_pictures(folder).pixels(readable, SIZE).float() / 127.5 - 1
    noise = torch.randn(9, 4, 8, 8)
    for view, shown in enumerate((images, images.flip(3))):
        with torch.no_grad():
            posterior = vae.encode(shown).latent_dist
        drawn = latents.draw(torch.arange(9), torch.full((9,), view), noise)
        torch.testing.assert_close(drawn, posterior.mean + posterior.std * noise, atol=1e-5, rtol=1e-5)


def test_any_order_and_any_mixture_of_views_can_be_drawn(folder, tmp_path):
    encode(folder, tmp_path / "latents", tiny_vae())
    latents = load_latents(tmp_path / "latents")
    indices, view, noise = torch.tensor([8, 0, 3, 4, 0]), torch.tensor([1, 0, 1, 0, 1]), torch.randn(5, 4, 8, 8)
    alone = [latents.draw(indices[i:i + 1], view[i:i + 1], noise[i:i + 1]) for i in range(5)]
    assert torch.equal(latents.draw(indices, view, noise), torch.cat(alone))
    assert not torch.equal(alone[1], alone[4])


def test_an_interrupted_run_is_gone_on_with_and_shares_are_any_processes(folder, tmp_path):
    encode(folder, tmp_path / "whole", tiny_vae())
    encode(folder, tmp_path / "parts", tiny_vae(), shards=[1])
    with pytest.raises(ValueError, match="not finished: 2 shards are missing"):
        load_latents(tmp_path / "parts")
    before = (tmp_path / "parts/00001.safetensors").stat().st_mtime_ns
    assert missing_shards(tmp_path / "parts", 10) == [0, 2]
    encode(folder, tmp_path / "parts", tiny_vae())
    assert (tmp_path / "parts/00001.safetensors").stat().st_mtime_ns == before
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()


def test_a_shard_appears_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    def stops(*_):
        raise OSError("stopped")
    monkeypatch.setattr("nets.loading.os.replace", stops)
    with pytest.raises(OSError, match="stopped"):
        encode_shard(tmp_path, 0, open_pictures(folder), tiny_vae(), SIZE, flip=False)
    assert not list(tmp_path.glob("*.safetensors*"))


@pytest.mark.parametrize("change", ["pictures", "vae", "size", "flip"])
def test_latents_of_something_else_are_refused(change, folder, tmp_path):
    vae, size, flip = tiny_vae(), SIZE, True
    encode(folder, tmp_path / "latents", vae)
    if change == "pictures":
        Image.new("RGB", SIZE).save(folder / "coat/7.png")
    if change == "vae":
        torch.nn.init.normal_(vae.encoder.conv_in.weight)
    size, flip = ((8, 8) if change == "size" else SIZE), change != "flip"
    before = (tmp_path / "latents/latents.json").read_bytes()
    with pytest.raises(ValueError, match=f"latents of other {change}; remove it, or choose another folder"):
        open_latents_folder(tmp_path / "latents", open_pictures(folder), vae, size, flip)
    assert (tmp_path / "latents/latents.json").read_bytes() == before


def test_shards_that_nobody_describes_or_that_are_damaged_are_refused(folder, tmp_path):
    encode(folder, tmp_path / "latents", tiny_vae())
    shard = tmp_path / "latents/00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"00001\.safetensors is damaged \(.*\); remove it, and it is made again"):
        load_latents(tmp_path / "latents")
    (tmp_path / "latents/latents.json").unlink()
    with pytest.raises(ValueError, match=r"has latents, but no latents\.json that says of what; remove it"):
        encode(folder, tmp_path / "latents", tiny_vae())


def test_a_batch_is_as_many_pictures_as_there_is_room_for(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(nets.latents, "ENCODED_PIXELS", 2 * 16**2)
    counts, pictures = [], open_pictures(folder)
    open_latents_folder(tmp_path / "latents", pictures, tiny_vae(), SIZE, False)
    encode_shard(tmp_path / "latents", 0, pictures, tiny_vae(), SIZE, False, done=counts.append)
    assert counts == [2, 2]


def test_with_strict_a_broken_picture_is_an_error_that_names_it(folder, tmp_path):
    with pytest.raises(OSError, match=r"cannot read the picture .*3\.png"):
        encode(folder, tmp_path / "latents", tiny_vae(), strict=True)
    assert not list((tmp_path / "latents").glob("*.safetensors*"))


def test_where_no_picture_can_be_read_it_is_said(folder, tmp_path):
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"broken")
    encode(folder, tmp_path / "latents", tiny_vae())
    with pytest.raises(ValueError, match=r"none of the pictures could be read; the first: .*0\.png"):
        load_latents(tmp_path / "latents")


def test_without_flips_there_is_one_view(folder, tmp_path):
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",),
                                  up_block_types=("UpDecoderBlock2D",))
    encode(folder, tmp_path / "latents", vae, flip=False)
    latents = load_latents(tmp_path / "latents")
    assert latents.views == 1 and json.loads((tmp_path / "latents/latents.json").read_text())["flip"] is False
    drawn = latents.draw(torch.tensor([0]), torch.tensor([0]), torch.zeros(1, 4, 16, 16))
    assert torch.equal(drawn[0], latents.shards[0]["mean"][0, 0])
