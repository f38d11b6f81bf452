"""train.py on thirty drawn pictures: it ends in a folder that both libraries load, learns, and goes on where it stopped."""

import gzip
import struct

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from nets import DiTPipeline


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Thirty pictures in Fashion-MNIST's own file format: class k is a bright square at place k."""
    folder, labels = tmp_path_factory.mktemp("data"), np.arange(30, dtype=np.uint8) % 10
    pictures = np.zeros((30, 28, 28), np.uint8)
    for picture, label in zip(pictures, labels):
        picture[2 * label:2 * label + 8, 5:20] = 200
    for split in ("train", "t10k"):
        with gzip.open(folder / f"{split}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">IIII", 2051, 30, 28, 28) + pictures.tobytes())
        with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">II", 2049, 30) + labels.tobytes())
    return folder


@pytest.fixture(scope="module")
def vae(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    run("vae", data, folder, steps=6)
    return folder


def run(part, data, output, steps, *more):
    arguments = train.parse_arguments([part, "--data", str(data), "--output", str(output), "--batch-size", "10",
                                       "--pictures", str(10 * steps), "--log-every", "2", "--warmup-steps", "2", *more])
    {"vae": train.train_vae, "dit": train.train_dit}[part](arguments)


def run_dit(data, vae, output, steps=6):
    run("dit", data, output, steps, "--vae", str(vae), "--width", "32", "--depth", "2", "--heads", "2",
        "--save-every", "2")


def test_pictures_are_read_and_padded(data):
    pictures, labels = train.read_fashion_mnist(data, "train")
    assert pictures.shape == (30, 1, 32, 32) and labels.tolist() == [k % 10 for k in range(30)]
    assert not pictures[:, :, :2].any() and not pictures[..., -2:].any()
    assert pictures[0, 0, 2:10, 7:22].eq(200).all() and pictures[0].sum() == 200 * 8 * 15
    images = train.to_model_range(pictures)
    assert images.shape == (30, 3, 32, 32) and images.min() == -1 and images.max() == pytest.approx(200 / 127.5 - 1)


def test_each_picture_comes_once_an_epoch_in_an_order_that_a_resumed_run_keeps():
    steps = dict(train.batches(30, 10, seed=1, first_step=0, last_step=6))
    for epoch in (range(3), range(3, 6)):
        assert sorted(torch.cat([steps[step] for step in epoch]).tolist()) == list(range(30))
    assert steps[0].tolist() != steps[3].tolist()
    resumed = dict(train.batches(30, 10, seed=1, first_step=4, last_step=6))
    assert all(torch.equal(resumed[step], steps[step]) for step in (4, 5))


def test_it_ends_in_a_folder_that_both_libraries_load(data, vae, tmp_path):
    run_dit(data, vae, tmp_path)
    ours, upstream = DiTPipeline.from_pretrained(tmp_path), diffusers.DiTPipeline.from_pretrained(tmp_path)
    pictures = []
    for pipeline in (ours, upstream):
        pipeline.set_progress_bar_config(disable=True)
        pictures.append(pipeline(ours.get_label_ids(["bag", "T-shirt"]), guidance_scale=1.0, output_type="np",
                                 generator=torch.manual_seed(0), num_inference_steps=2).images)
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-4 and pictures[0].shape == (2, 32, 32, 3)
    assert ours.vae.config.scaling_factor != diffusers.AutoencoderKL().config.scaling_factor


def test_latents_have_unit_variance_after_the_scaling_factor(data, vae):
    pictures, _ = train.read_fashion_mnist(data, "train")
    model = diffusers.AutoencoderKL.from_pretrained(vae)
    mean, logvar = train.latent_moments(model, pictures)
    total = (mean.var() + logvar.exp().mean()).sqrt() * model.config.scaling_factor
    assert total == pytest.approx(1, abs=0.05)


def test_the_loss_falls(data, vae, tmp_path, capsys):
    run_dit(data, vae, tmp_path, steps=60)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert np.mean(losses[-5:]) < 0.9 * losses[0]


def test_a_run_that_was_interrupted_ends_in_the_same_weights(data, vae, tmp_path, monkeypatch):
    run_dit(data, vae, tmp_path / "whole")
    save, saved = train.save_checkpoint, []

    def save_and_die(accelerator, folder, step):
        save(accelerator, folder, step)
        saved.append(step)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_checkpoint", save_and_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_dit(data, vae, tmp_path / "broken")
    monkeypatch.undo()
    run_dit(data, vae, tmp_path / "broken")
    assert saved == [2, 4]
    whole, broken = (load_file(tmp_path / name / "transformer/diffusion_pytorch_model.safetensors")
                     for name in ("whole", "broken"))
    assert all(torch.equal(tensor, broken[key]) for key, tensor in whole.items())


def test_missing_data_or_vae_is_named(data, tmp_path, capsys):
    for arguments, named in ((["vae", "--data", str(tmp_path), "--output", "x"], str(tmp_path)),
                             (["dit", "--data", str(data), "--output", "x"], "--vae")):
        with pytest.raises(SystemExit) as stop:
            train.parse_arguments(arguments)
        assert stop.value.code == 2 and named in capsys.readouterr().err
