"""train.py on thirty drawn pictures: it ends in a folder that both libraries load, learns, and goes on where it stopped."""


import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from nets import DiTPipeline
from nets.picture_sets import read_fashion_mnist


@pytest.fixture(scope="module")
def vae(fashion_mnist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    run("vae", fashion_mnist, folder, steps=6)
    return folder


def run(part, fashion_mnist, output, steps, *more):
    arguments = train.parse_arguments([part, "--data", str(fashion_mnist), "--output", str(output), "--batch-size", "10",
                                       "--pictures", str(10 * steps), "--log-every", "2", "--warmup-steps", "2", *more])
    {"vae": train.train_vae, "dit": train.train_dit}[part](arguments)


def run_dit(fashion_mnist, vae, output, steps=6):
    run("dit", fashion_mnist, output, steps, "--vae", str(vae), "--width", "32", "--depth", "2", "--heads", "2",
        "--save-every", "2")


def test_each_picture_comes_once_an_epoch_in_an_order_that_a_resumed_run_keeps():
    steps = dict(train.batches(30, 10, seed=1, first_step=0, last_step=6))
    for epoch in (range(3), range(3, 6)):
        assert sorted(torch.cat([steps[step] for step in epoch]).tolist()) == list(range(30))
    assert steps[0].tolist() != steps[3].tolist()
    resumed = dict(train.batches(30, 10, seed=1, first_step=4, last_step=6))
    assert all(torch.equal(resumed[step], steps[step]) for step in (4, 5))


def test_it_ends_in_a_folder_that_both_libraries_load(fashion_mnist, vae, tmp_path):
    run_dit(fashion_mnist, vae, tmp_path)
    ours, upstream = DiTPipeline.from_pretrained(tmp_path), diffusers.DiTPipeline.from_pretrained(tmp_path)
    pictures = []
    for pipeline in (ours, upstream):
        pipeline.set_progress_bar_config(disable=True)
        pictures.append(pipeline(ours.get_label_ids(["bag", "T-shirt"]), guidance_scale=1.0, output_type="np",
                                 generator=torch.manual_seed(0), num_inference_steps=2).images)
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-4 and pictures[0].shape == (2, 32, 32, 3)
    assert ours.vae.config.scaling_factor != diffusers.AutoencoderKL().config.scaling_factor


def test_latents_have_unit_variance_after_the_scaling_factor(fashion_mnist, vae):
    pictures, _ = read_fashion_mnist(fashion_mnist, "train")
    model = diffusers.AutoencoderKL.from_pretrained(vae)
    mean, logvar = train.latent_moments(model, pictures)
    total = (mean.var() + logvar.exp().mean()).sqrt() * model.config.scaling_factor
    assert total == pytest.approx(1, abs=0.05)


def test_the_loss_falls(fashion_mnist, vae, tmp_path, capsys):
    run_dit(fashion_mnist, vae, tmp_path, steps=60)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert np.mean(losses[-5:]) < 0.9 * losses[0]


def test_a_run_that_was_interrupted_ends_in_the_same_weights(fashion_mnist, vae, tmp_path, monkeypatch):
    run_dit(fashion_mnist, vae, tmp_path / "whole")
    save, saved = train.save_checkpoint, []

    def save_and_die(accelerator, folder, step):
        save(accelerator, folder, step)
        saved.append(step)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_checkpoint", save_and_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_dit(fashion_mnist, vae, tmp_path / "broken")
    monkeypatch.undo()
    run_dit(fashion_mnist, vae, tmp_path / "broken")
    assert saved == [2, 4]
    whole, broken = (load_file(tmp_path / name / "transformer/diffusion_pytorch_model.safetensors")
                     for name in ("whole", "broken"))
    assert all(torch.equal(tensor, broken[key]) for key, tensor in whole.items())


def test_missing_data_or_vae_is_named(fashion_mnist, tmp_path, capsys):
    for arguments, named in ((["vae", "--data", str(tmp_path), "--output", "x"], str(tmp_path)),
                             (["dit", "--data", str(fashion_mnist), "--output", "x"], "--vae")):
        with pytest.raises(SystemExit) as stop:
            train.parse_arguments(arguments)
        assert stop.value.code == 2 and named in capsys.readouterr().err
