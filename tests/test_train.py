"""train.py on a hundred drawn pictures: from a folder per class to a pipeline that both libraries load."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import diffusers
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, SMALL_MODEL, tiny_pipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import train
from nets import DiTPipeline
from nets.checkpoint import to_original

TINY = ["--width", "32", "--depth", "2", "--heads", "2", "--patch", "2", "--vae", SMALL_MODEL, "--device", "cpu",
        "--batch-size", "20", "--learning-rate", "3e-3", "--log-every", "5"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five classes of twenty PNGs each: bars and discs."""
    folder, chance = tmp_path_factory.mktemp("data"), random.Random(0)
    for label in range(5):
        (folder / f"kind {label}").mkdir()
        for index in range(20):
            picture = Image.new("RGB", (40, 36))
            left, top = chance.randrange(10), chance.randrange(8) + 2 * label
            (ImageDraw.Draw(picture).ellipse if label % 2 else ImageDraw.Draw(picture).rectangle)(
                (left, top, left + 20, top + 12 - label), fill=(40 * label + 60, 200, 250 - 40 * label))
            picture.save(folder / f"kind {label}/{index}.png")
    return folder


@pytest.fixture(autouse=True)
def forget_precision():
    """accelerate keeps a process's mixed precision for good; here each test is as a process of its own."""
    AcceleratorState._reset_state(True)


def run(data, output, *options, tiny=TINY):
    return train.main([str(option) for option in ("--data", data, "--output", output, *tiny, *options)])


@pytest.fixture(scope="module")
def latents(data, tmp_path_factory):
    """The latents that the runs here share."""
    return tmp_path_factory.mktemp("latents") / "kept"


@pytest.fixture(scope="module")
def trained(data, latents, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "mine"
    started = time.perf_counter()
    assert run(data, output, "--steps", 30, "--sample-every", 15, "--latents", latents) == 0
    assert time.perf_counter() - started < 90
    return output


def weights(output):
    return load_file(output / "transformer/diffusion_pytorch_model.safetensors")


def losses(output):
    return [json.loads(line)["loss"] for line in (output / "training/log.jsonl").read_text().splitlines()]


def test_it_ends_in_a_folder_that_both_libraries_load_with_the_same_pictures(trained):
    ours, upstream = DiTPipeline.from_pretrained(trained), diffusers.DiTPipeline.from_pretrained(trained)
    pictures = []
    for pipeline in (ours, upstream):
        pipeline.set_progress_bar_config(disable=True)
        pictures.append(pipeline(ours.get_label_ids(["kind 1", "kind 4"]), guidance_scale=1.0, output_type="np",
                                 generator=torch.manual_seed(0), num_inference_steps=4).images)
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-4 and pictures[0].shape == (2, 32, 32, 3)
    assert ours.transformer.config.num_embeds_ada_norm == 5
    assert ours.vae.config.scaling_factor == json.loads((SMALL_MODEL / "vae/config.json").read_text())["scaling_factor"]


def test_what_it_leaves_beside_the_pipeline(trained):
    assert {path.name for path in trained.iterdir()} == {"README.md", "curve.png", "model_index.json", "scheduler",
                                                         "training", "transformer", "vae"}
    assert sorted(path.name for path in (trained / "training/samples").iterdir()) == ["00000015.png", "00000030.png"]
    assert Image.open(trained / "training/samples/00000030.png").width == 5 * 100
    assert next((trained / "training").rglob("events.out.tfevents*")).stat().st_size > 1000
    card = (trained / "README.md").read_text()
    assert "100 pictures of 5 classes" in card and "for 30 steps" in card and "![loss](curve.png)" in card
    assert len(losses(trained)) == 6 and losses(trained)[-1] < losses(trained)[0]
    assert str(ROOT) not in (trained / "vae/config.json").read_text()


SHORT = ["--steps", 60, "--save-every", 4]


def start(data, output, latents, *options, launcher=()):
    command = [sys.executable, *launcher, ROOT / "train.py", "--data", data, "--output", output, "--latents", latents,
               *TINY, *options]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill_again_and_again(data, output, latents, rounds, chance):
    """A run of sixty steps, killed at random moments and gone on with; yields how far its checkpoints had come."""
    step = 0
    for _ in range(rounds):
        process, wanted = start(data, output, latents, *SHORT, "--resume"), step + chance.randrange(1, 18)
        while process.poll() is None and newest(output) < wanted:
            time.sleep(chance.random() / 50)
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        step = newest(output)
        yield step
    process = start(data, output, latents, *SHORT, "--resume")
    output_text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output_text


def newest(output):
    return max((int(path.name[-8:]) for path in output.glob("training/checkpoint-????????")), default=0)


def test_a_run_that_was_killed_again_and_again_ends_in_the_same_weights(data, latents, tmp_path, trained):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have it
    assert run(data, tmp_path / "whole", *SHORT, "--latents", latents) == 0
    torch.set_num_threads(threads)
    steps = list(kill_again_and_again(data, tmp_path / "cut", latents, 3, random.Random(1)))
    assert 0 < steps[0] < steps[-1] <= 60
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(tensor, cut[key]) for key, tensor in whole.items())
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_two_processes_see_what_one_sees(data, latents, trained, tmp_path):
    process = start(data, tmp_path / "two", latents, "--steps", 30,
                    launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"))
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert losses(tmp_path / "two") == pytest.approx(losses(trained), rel=1e-5)


@pytest.mark.parametrize("init", ["folder", ".pt"])
def test_fine_tuning_keeps_all_but_the_label_table(init, data, latents, trained, tmp_path):
    small = DiTPipeline.from_pretrained(SMALL_MODEL, dtype=torch.float32)
    name = SMALL_MODEL
    if init == ".pt":
        name = tmp_path / "small.pt"
        state_dict = to_original(small.transformer)
        torch.save(state_dict, name)
    options = ["--init", name, "--steps", 1, "--learning-rate", "1e-9", "--freeze-below", 3, "--latents", latents]
    if init == ".pt":  # its width and depth are no published size
        assert run(data, tmp_path / "tuned", *options) == 2
        return
    assert run(data, tmp_path / "tuned", *options) == 0
    before, after = small.transformer.state_dict(), weights(tmp_path / "tuned")
    for key, tensor in before.items():
        if "embedding_table" not in key:
            torch.testing.assert_close(after[key], tensor, atol=1e-6, rtol=0)
    assert after["transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"].shape == (6, 256)


@pytest.mark.parametrize("options", [
    ["--betas", "cosine", "--variance", "fixed", "--min-snr", 5], ["--accumulate", 2, "--gradient-checkpointing"],
    ["--mixed-precision", "bf16", "--save-dtype", "float16", "--decay", "cosine", "--warmup-steps", 2]])
def test_options(options, data, latents, trained, tmp_path):
    assert run(data, tmp_path / "out", "--steps", 4, "--latents", latents, *options) == 0
    pipeline = DiTPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config.beta_schedule == ("squaredcos_cap_v2" if options[1] == "cosine" else "linear")
    assert pipeline.transformer.config.out_channels == (4 if "fixed" in options else 8)
    dtype = torch.float16 if "float16" in options else torch.float32
    assert next(iter(weights(tmp_path / "out").values())).dtype == dtype


def test_flips_and_a_broken_picture(data, tmp_path, capsys):
    (tmp_path / "data/one").mkdir(parents=True)
    for index in range(6):
        Image.new("RGB", (32, 32), (40 * index, 0, 0)).save(tmp_path / f"data/one/{index}.png")
    (tmp_path / "data/one/4.png").write_bytes(b"broken")
    assert run(tmp_path / "data", tmp_path / "out", "--steps", 2, "--flip") == 0
    assert "left out: cannot read the picture" in capsys.readouterr().err
    assert "5 pictures of 1 classes" in (tmp_path / "out/README.md").read_text()
    assert load_file(tmp_path / "out/training/latents/00000.safetensors")["mean"].shape == (5, 2, 4, 8, 8)
    assert run(tmp_path / "data", tmp_path / "strict", "--steps", 2, "--strict") == 2
    assert "4.png" in capsys.readouterr().err.splitlines()[-1]


def test_a_vae_of_ones_own(fashion_mnist, tmp_path):
    assert train.main(["vae", "--data", str(fashion_mnist), "--output", str(tmp_path / "vae"), "--steps", "20", "--device",
                       "cpu", "--batch-size", "10", "--learning-rate", "2e-3", "--log-every", "5"]) == 0
    assert losses(tmp_path / "vae")[-1] < losses(tmp_path / "vae")[0]
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert vae.config.scaling_factor != diffusers.AutoencoderKL().config.scaling_factor
    tiny = ["--width", 32, "--depth", 1, "--heads", 2, "--device", "cpu", "--batch-size", 10, "--vae", tmp_path / "vae"]
    assert run(fashion_mnist, tmp_path / "dit", "--steps", 2, tiny=tiny) == 0
    assert DiTPipeline.from_pretrained(tmp_path / "dit").get_label_ids("bag") == [8]


@pytest.mark.parametrize("options, named", [
    (["--data", "nowhere"], "there is no folder nowhere"), (["--data", "fashion-mnist"], "dataset-fashion-mnist"),
    (["--data", "flat"], "put its pictures into a folder per class"), (["--vae", "nowhere/at-all"], "nowhere/at-all"),
    (["--size", "30"], "--size 30 is no multiple of 8"),
    (["--patch", "3", "--size", "32"], "patches of 3"),
    (["--freeze-below", "7"], "blocks below 7"), (["--batch-size", "21", "--accumulate", "2"], "21 pictures"),
])
def test_wrong_values_get_one_line_and_no_pipeline(options, named, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(train, "FASHION_MNIST", tmp_path / "fashion-mnist")
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "flat/1.png")
    assert run(data, tmp_path / "out", "--steps", 2, *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert named in error and not (tmp_path / "out/model_index.json").exists()


def test_a_finished_folder_is_not_trained_over_and_other_settings_are_refused(data, latents, trained, capsys):
    assert run(data, trained, "--steps", 30, "--latents", latents) == 2
    assert "go on from it with --resume, or choose another --output" in capsys.readouterr().err
    assert run(data, trained, "--steps", 30, "--latents", latents, "--resume", "--learning-rate", "1e-5") == 2
    assert "learning_rate 0.003 there and 1e-05 now" in capsys.readouterr().err


def test_what_cannot_be_meant_is_said_by_the_parser(capsys):
    for options, named in (([], "--vae"), (["--vae", "x", "--width", "30", "--heads", "4"], "--width 30")):
        with pytest.raises(SystemExit) as stop:
            train.parse_arguments(["--data", "x", "--output", "y", *options])
        assert stop.value.code == 2 and named in capsys.readouterr().err


def test_init_with_a_network_of_another_latent_size_is_refused(data, latents, trained, tmp_path, capsys):
    tiny_pipeline(sample_size=16).save_pretrained(tmp_path / "other")
    assert run(data, tmp_path / "out", "--steps", 1, "--init", tmp_path / "other", "--size", 32, "--latents",
               latents) == 2
    assert "--init was trained on latents of 4 channels and side 16, and these have 4 and 8" in capsys.readouterr().err
