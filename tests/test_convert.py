"""convert.py: .pt to folder to .pt, what it says, and that a failure writes nothing."""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, fill, tiny_pipeline, tiny_unet, tiny_vae
from test_checkpoint import original_state_dict

import convert
from nets import DiTPipeline, Transformer2DModel


@pytest.fixture
def checkpoint(tmp_path):
    """A small .pt, and its path."""
    weights = original_state_dict(64, 2)
    torch.save(weights, tmp_path / "dit.pt")
    return weights, tmp_path / "dit.pt"


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


def one_line(capsys):
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("numerics", ["diffusers", "original"])
def test_a_checkpoint_goes_to_a_folder_and_back_bit_equal(numerics, checkpoint, tmp_path, capsys):
    weights, path = checkpoint
    assert run(path, tmp_path / "folder", "--heads", 4, "--numerics", numerics) == 0
    assert "transformer and scheduler alone" in capsys.readouterr().out
    assert files(tmp_path / "folder") == ["model_index.json", "scheduler", "scheduler/scheduler_config.json", "transformer",
                                          "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]
    assert run(tmp_path / "folder", tmp_path / "again.pt") == 0
    assert ("note: this folder has diffusers' numerics" in capsys.readouterr().out) == (numerics == "diffusers")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert again.keys() == weights.keys() and all(torch.equal(again[key], weights[key]) for key in weights)
    assert (tmp_path / "again.pt").stat().st_size < 1.1 * path.stat().st_size


@pytest.mark.parametrize("numerics", ["diffusers", "original"])
def test_upstream_loads_the_folder_of_either_numerics(numerics, checkpoint, tmp_path):
    run(checkpoint[1], tmp_path / "folder", "--heads", 4, "--numerics", numerics)
    config = json.loads((tmp_path / "folder/transformer/config.json").read_text())
    assert ("downscale_freq_shift" in config) == (numerics == "original")
    upstream = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "folder/transformer")
    ours = Transformer2DModel.from_pretrained(tmp_path / "folder/transformer")
    weights = upstream.state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in ours.state_dict().items())


def test_numerics_survive_saving_by_either_library(checkpoint, tmp_path):
    run(checkpoint[1], tmp_path / "folder", "--heads", 4, "--numerics", "original")
    for library in (Transformer2DModel, diffusers.DiTTransformer2DModel):
        library.from_pretrained(tmp_path / "folder/transformer").save_pretrained(tmp_path / library.__name__)
        config = Transformer2DModel.from_pretrained(tmp_path / library.__name__).config
        assert (config.downscale_freq_shift, config.norm_eps) == (0, 1e-6)


def test_a_vae_and_labels_make_a_whole_pipeline(checkpoint, tmp_path):
    tiny_vae().save_pretrained(tmp_path / "some-vae")
    (tmp_path / "names.json").write_text(json.dumps({k: f"class {k}" for k in range(10)}))
    assert run(checkpoint[1], tmp_path / "folder", "--heads", 4, "--vae", tmp_path / "some-vae",
               "--id2label", tmp_path / "names.json") == 0
    pipeline = DiTPipeline.from_pretrained(tmp_path / "folder")
    pipeline.set_progress_bar_config(disable=True)
    picture, = pipeline(pipeline.get_label_ids("class 3"), num_inference_steps=2, output_type="np").images
    assert picture.shape == (16, 16, 3) and np.isfinite(picture).all()
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "some-vae").state_dict()
    assert all(torch.equal(tensor, vae[key]) for key, tensor in pipeline.vae.state_dict().items())


def test_a_vae_put_beside_it_later_is_found_and_until_then_the_error_says_what_to_do(checkpoint, tmp_path):
    run(checkpoint[1], tmp_path / "folder", "--heads", 4)
    assert DiTPipeline.from_pretrained(tmp_path / "folder").vae is None
    with pytest.raises(ValueError, match="has no VAE to decode with; load it with vae="):
        DiTPipeline.from_pretrained(tmp_path / "folder")([1])
    vae = tiny_vae()
    for library in (DiTPipeline, diffusers.DiTPipeline):
        assert library.from_pretrained(tmp_path / "folder", vae=vae).vae is vae
    tiny_vae().save_pretrained(tmp_path / "folder/vae")
    assert DiTPipeline.from_pretrained(tmp_path / "folder").vae.config.latent_channels == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype_comes_back_bit_equal(dtype, tmp_path):
    weights = {key: tensor.to(dtype) for key, tensor in original_state_dict(64, 2).items()}
    torch.save(weights, tmp_path / "dit.pt")
    assert run(tmp_path / "dit.pt", tmp_path / "folder", "--heads", 4) == 0
    assert run(tmp_path / "folder", tmp_path / "again.pt") == 0
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    wanted = {**weights, "pos_embed": original_state_dict(64, 2)["pos_embed"].to(dtype)}
    assert all(again[key].dtype == dtype and torch.equal(again[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize("which", ["ema", "model", None])
def test_a_training_checkpoint_gives_the_weights_that_were_asked_for(which, tmp_path):
    weights = original_state_dict(64, 1)
    both = {"model": weights, "ema": {**weights, "final_layer.linear.bias": weights["final_layer.linear.bias"] + 1}}
    torch.save({**both, "opt": {}, "args": argparse.Namespace(model="DiT-XL/2")}, tmp_path / "dit.pt")
    assert run(tmp_path / "dit.pt", tmp_path / "folder", "--heads", 4, *(["--weights", which] if which else [])) == 0
    transformer = Transformer2DModel.from_pretrained(tmp_path / "folder/transformer")
    assert torch.equal(transformer.proj_out_2.bias, both[which or "ema"]["final_layer.linear.bias"])


def test_a_pipeline_folder_lends_its_vae_and_its_variant_its_transformer(checkpoint, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline", variant="odd")
    for file in (tmp_path / "pipeline/vae").glob("*.odd.*"):
        file.rename(str(file).replace(".odd.", "."))
    assert run(checkpoint[1], tmp_path / "folder", "--heads", 4, "--vae", tmp_path / "pipeline") == 0
    config = json.loads((tmp_path / "folder/vae/config.json").read_text())
    assert config["_name_or_path"] == "pipeline" and str(tmp_path) not in str(config)
    assert run(tmp_path / "pipeline", tmp_path / "again.pt", "--variant", "odd") == 0


@pytest.mark.parametrize("sharded", [False, True])
def test_the_dtype_that_is_written_is_that_of_the_weights_that_were_read(sharded, tmp_path):
    transformer = fill(Transformer2DModel(**TINY))
    size = {"max_shard_size": "50KB"} if sharded else {}
    transformer.save_pretrained(tmp_path / "transformer", **size)
    transformer.half().save_pretrained(tmp_path / "transformer", variant="fp16", **size)
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > (4 if sharded else 1)
    for options, dtype in (((), torch.float32), (("--variant", "fp16"), torch.float16)):
        assert run(tmp_path / "transformer", tmp_path / "dit.pt", *options) == 0
        assert {tensor.dtype for tensor in torch.load(tmp_path / "dit.pt", weights_only=True).values()} == {dtype}
        (tmp_path / "dit.pt").unlink()


def test_a_vae_of_the_hub_without_a_network_gets_one_line(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert run(checkpoint[1], tmp_path / "out", "--heads", 4, "--vae", "stabilityai/sd-vae-ft-ema") == 2
    assert "stabilityai/sd-vae-ft-ema (revision main) is no folder here" in one_line(capsys)


def test_a_thousand_classes_get_the_names_of_imagenet(tmp_path):
    torch.save(original_state_dict(64, 1, classes=1000), tmp_path / "dit.pt")
    run(tmp_path / "dit.pt", tmp_path / "folder", "--heads", 4)
    index = json.loads((tmp_path / "folder/model_index.json").read_text())
    assert index["id2label"]["207"] == "golden retriever" and len(index["id2label"]) == 1000


def test_the_scheduler_is_the_published_one(checkpoint, tmp_path):
    run(checkpoint[1], tmp_path / "folder", "--heads", 4)
    config = json.loads((tmp_path / "folder/scheduler/scheduler_config.json").read_text())
    assert (config["_class_name"], config["beta_start"], config["beta_end"]) == ("DDIMScheduler", 1e-4, 0.02)
    assert config["clip_sample"] is False and "timestep_spacing" not in config


def spoil_nothing(folder):
    pass


def other_vae(folder):
    torch.manual_seed(0)
    diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=8).save_pretrained(folder / "vae8")


def truncate(folder):
    (folder / "dit.pt").write_bytes((folder / "dit.pt").read_bytes()[:9000])


@pytest.mark.parametrize("prepare, arguments, message", [
    (spoil_nothing, [], "no published size; say how many"),
    (spoil_nothing, ["--heads", 5], "cannot be split into 5 heads"),
    (spoil_nothing, ["--heads", 4, "--vae", "{}/nowhere"], "nowhere"),
    (other_vae, ["--heads", 4, "--vae", "{}/vae8"], "latents of 8 channels, the checkpoint of 4"),
    (lambda folder: (folder / "n.json").write_text('{"0": "a"}'), ["--heads", 4, "--id2label", "{}/n.json"], "names 1 cl"),
    (lambda folder: (folder / "n.json").write_text('{"0": ["a"]}'), ["--heads", 4, "--id2label", "{}/n.json"], "no text"),
    (lambda folder: (folder / "n.json").write_text("a"), ["--heads", 4, "--id2label", "{}/n.json"], "no JSON object"),
    (lambda folder: (folder / "out").write_text("mine"), ["--heads", 4], "is there already"),
    (lambda folder: (folder / "dit.pt").unlink(), ["--heads", 4], "there is no "),
    (truncate, ["--heads", 4], "cannot be read"),
    (lambda folder: (folder / "dit.pt").write_text("<html>"), ["--heads", 4], "no zip file"),
    (lambda folder: torch.save(tiny_unet().state_dict(), folder / "dit.pt"), ["--heads", 4], "not a DiT"),
], ids=["no heads", "wrong heads", "no vae", "wrong vae", "few labels", "lists", "labels no json", "target there",
        "no source", "truncated", "a web page", "a unet"])
def test_what_is_wrong_gets_one_line_and_nothing_is_written(prepare, arguments, message, checkpoint, tmp_path, capsys):
    prepare(tmp_path)
    before = files(tmp_path)
    assert run(tmp_path / "dit.pt", tmp_path / "out", *(str(word).format(tmp_path) for word in arguments)) == 2
    assert message in one_line(capsys)
    assert files(tmp_path) == before


def test_the_way_back_refuses_what_the_original_cannot_hold_and_writes_nothing(tmp_path, capsys):
    fill(Transformer2DModel(**TINY, attention_bias=False)).save_pretrained(tmp_path / "dit")
    assert run(tmp_path / "dit", tmp_path / "out.pt") == 2
    assert "attention_bias=False" in one_line(capsys)
    assert run(tmp_path / "dit", tmp_path / "out.pt", "--heads", 4) == 2
    assert "--heads is for a .pt into a folder" in one_line(capsys)
    assert run(tmp_path / "dit", tmp_path / "nowhere/out.pt") == 2
    assert "there is no folder" in one_line(capsys)
    assert run(tmp_path / "dit/config.json", tmp_path / "out.pt") == 2
    assert "does not look like one" in one_line(capsys)
    (tmp_path / "dit/config.json").unlink()
    assert run(tmp_path / "dit", tmp_path / "out.pt") == 2
    assert "config.json" in one_line(capsys)
    assert files(tmp_path) == ["dit", "dit/diffusion_pytorch_model.safetensors"]


def test_a_failure_while_writing_leaves_nothing(checkpoint, tmp_path, capsys):
    fill(Transformer2DModel(**TINY)).save_pretrained(tmp_path / "dit")
    before, limits = files(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # the system refuses to write more into a file
        for source, target, more in ((checkpoint[1], "out", ["--heads", 4]), (tmp_path / "dit", "out.pt", [])):
            assert run(source, tmp_path / target, *more) == 2
            assert f"cannot write {tmp_path / target}: " in one_line(capsys) and files(tmp_path) == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_dit_xl_2_whole_goes_to_a_folder_and_back_bit_equal_in_bounded_memory():
    with tempfile.TemporaryDirectory() as folder:  # 8.4 GB, not to be kept as tmp_path would
        folder = Path(folder)
        weights = original_state_dict(1152, 28, side=16, classes=1000)
        assert sum(tensor.numel() for tensor in weights.values()) == 675_129_632
        torch.save(weights, folder / "dit.pt")
        del weights
        program = ("import resource, sys, convert; status = convert.main(sys.argv[1:]); "
                   "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024); sys.exit(status)")
        done = subprocess.run([sys.executable, "-c", program, folder / "dit.pt", folder / "out"], cwd=ROOT, text=True,
                              capture_output=True, check=True)
        assert int(done.stdout.splitlines()[-1]) < 2 * (folder / "dit.pt").stat().st_size  # the peak, file pages included
        saved = diffusers.models.model_loading_utils.load_state_dict(
            str(folder / "out/transformer/diffusion_pytorch_model.safetensors"))
        assert sum(tensor.numel() for tensor in saved.values()) == 749_826_464
        del saved
        assert run(folder / "out", folder / "again.pt") == 0
        shutil.rmtree(folder / "out")
        first, again = (torch.load(folder / name, weights_only=True, mmap=True) for name in ("dit.pt", "again.pt"))
        assert first.keys() == again.keys() and all(torch.equal(again[key], first[key]) for key in first)
