"""train.py on a hundred drawn pictures: from a folder per class to a pipeline that both libraries load."""

import json
import os
import random
import shutil
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
import training_options
from nets import DiTPipeline, Transformer2DModel
from nets.checkpoint import to_original
from nets.diffusion import GaussianDiffusion, cosine_betas
from nets.latents import load_latents
from nets.objectives import denoise
from nets.sampling import held

LOOP = ["--device", "cpu", "--batch-size", "20", "--learning-rate", "3e-3", "--log-every", "5"]
TINY = ["--width", "32", "--depth", "2", "--heads", "2", "--patch", "2", "--vae", SMALL_MODEL, *LOOP]


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
    assert {path.name for path in trained.iterdir()} == {"README.md", "curve.png", "model_index.json",
                                                         "samples.png", "scheduler", "training", "transformer", "vae"}
    assert sorted(path.name for path in (trained / "training/samples").iterdir()) == ["00000015.png", "00000030.png"]
    assert Image.open(trained / "training/samples/00000030.png").width == 5 * 100
    assert next((trained / "training").rglob("events.out.tfevents*")).stat().st_size > 1000
    card = (trained / "README.md").read_text()
    assert "100 pictures from" in card and "classes: kind 0; kind 1; kind 2; kind 3; kind 4" in card
    assert "for 30 steps" in card and "![loss](curve.png)" in card and "![samples](samples.png)" in card
    assert len(losses(trained)) == 7 and losses(trained)[-1] < losses(trained)[0]
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


def test_two_processes_see_what_one_sees_and_one_can_go_on_with_it(data, trained, tmp_path):
    process = start(data, tmp_path / "two", tmp_path / "latents", "--steps", 20,
                    launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"))
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert losses(tmp_path / "two") == pytest.approx(losses(trained)[:5], rel=1e-5)
    assert run(data, tmp_path / "two", "--steps", 30, "--latents", tmp_path / "latents", "--resume") == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(trained), rel=1e-5)


def test_several_processes_that_are_told_to_stop_leave_a_checkpoint(data, latents, trained, tmp_path):
    process = start(data, tmp_path / "two", latents, "--steps", 100_000, "--log-every", 50_000, "--save-every", 100_000,
                    launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"))
    while not any((tmp_path / "two/training").glob("**/events*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    time.sleep(5)  # until the steps have begun
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert newest(tmp_path / "two") % 10 == 0 and newest(tmp_path / "two") > 0


def test_fine_tuning_keeps_all_but_the_label_table(data, latents, trained, tmp_path, capsys):
    small = DiTPipeline.from_pretrained(SMALL_MODEL, dtype=torch.float32)
    options = ["--init", SMALL_MODEL, "--steps", 1, "--learning-rate", "1e-9", "--latents", latents]
    assert run(data, tmp_path / "tuned", *options, tiny=LOOP) == 0
    assert "all but the label table, which starts anew" in capsys.readouterr().out
    before, after = small.transformer.state_dict(), weights(tmp_path / "tuned")
    for key, tensor in before.items():
        if "embedding_table" not in key:
            torch.testing.assert_close(after[key], tensor, atol=1e-6, rtol=0)
    assert after["transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"].shape == (6, 256)


def test_an_original_checkpoint_is_gone_on_with_but_for_what_is_frozen(data, latents, trained, tmp_path, capsys):
    published = Transformer2DModel(num_attention_heads=6, attention_head_dim=64, num_layers=12, patch_size=4, sample_size=8,
                                   out_channels=8, num_embeds_ada_norm=5)
    torch.save(to_original(published), tmp_path / "S.pt")
    assert run(data, tmp_path / "tuned", "--init", tmp_path / "S.pt", "--vae", SMALL_MODEL, "--steps", 1, "--freeze-below",
               11, "--latents", latents, tiny=LOOP) == 0
    assert "all of it" in capsys.readouterr().out
    before = published.state_dict()
    changed = {key for key, tensor in weights(tmp_path / "tuned").items() if not torch.equal(tensor, before[key])}
    frozen = tuple(f"transformer_blocks.{number}." for number in range(11))
    assert not {key for key in changed if key.startswith(("pos_embed", *frozen)) and ".emb." not in key}
    assert {key for key in changed if key.startswith("proj_out_2")}


def test_what_is_asked_for_reaches_the_loop(data, latents, trained, tmp_path, monkeypatch):
    heard = {}

    def listen(model, make_batch, loss_of_batch, accelerator, folder, settings, **options):
        heard.update(options, model=model, make_batch=make_batch, loss_of_batch=loss_of_batch, accelerator=accelerator,
                     settings=settings)
        raise OSError("heard enough")
    monkeypatch.setattr("nets.training.fit", listen)
    asked = {"steps": 7, "weight_decay": 0.1, "beta2": 0.95, "clip": 0.3, "accumulate": 2, "ema_decay": 0.5,
             "save_every": 3, "keep": 4, "log_every": 6, "sample_every": 8}
    options = [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert run(data, tmp_path / "out", *options, "--latents", latents, "--warmup-steps", 2, "--decay", "cosine",
               "--label-dropout", 1, "--gradient-checkpointing", "--mixed-precision", "bf16", "--freeze-below", 1,
               "--seed", 3, "--betas", "cosine", "--min-snr", 5) == 2
    assert {name: heard[name] for name in asked} == asked
    assert [heard["learning_rate"](step) for step in (0, 7)] == [1.5e-3, 0]
    assert heard["accelerator"].mixed_precision == "bf16" and heard["model"].gradient_checkpointing
    assert not heard["model"].transformer_blocks[0].attn1.to_q.weight.requires_grad
    batch = heard["make_batch"](0)
    assert set(batch["class_labels"].tolist()) == {5}
    scale = json.loads((SMALL_MODEL / "vae/config.json").read_text())["scaling_factor"]
    moments = load_file(latents / "00000.safetensors")
    second = moments["mean"].square().mean() + moments["logvar"].exp().mean()  # of a posterior sample
    assert batch["latents"].square().mean() == pytest.approx((second * scale**2).item(), rel=0.2)
    wanted_batch, wanted_loss = denoise(load_latents(latents), GaussianDiffusion(cosine_betas()), scale, 20, 3, 1.0, 5.0)
    assert all(torch.equal(batch[name], tensor) for name, tensor in wanted_batch(0).items())
    network = heard["model"].eval()
    assert torch.equal(heard["loss_of_batch"](network, batch)[0], wanted_loss(network, batch)[0])
    assert heard["settings"]["pictures"] and heard["settings"]["vae"]


def test_compiled_it_learns_the_same(data, latents, trained, tmp_path):
    assert run(data, tmp_path / "compiled", "--steps", 30, "--latents", latents, "--compile") == 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(trained), rel=1e-3)
    assert set(weights(tmp_path / "compiled")) == set(weights(trained))


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
    (tmp_path / "data/one/0.png").write_bytes(b"broken")
    assert run(tmp_path / "data", tmp_path / "out", "--steps", 2, "--flip") == 0
    assert "left out: cannot read the picture" in capsys.readouterr().err
    assert "5 pictures from" in (tmp_path / "out/README.md").read_text()
    assert load_file(tmp_path / "out/training/latents/00000.safetensors")["mean"].shape == (5, 2, 4, 8, 8)
    assert run(tmp_path / "data", tmp_path / "strict", "--steps", 2, "--strict") == 2
    assert "0.png" in capsys.readouterr().err.splitlines()[-1]
    assert run(tmp_path / "data", tmp_path / "strict", "--steps", 2, "--strict", "--flip", "--latents",
               tmp_path / "out/training/latents") == 2
    assert "0.png" in capsys.readouterr().err.splitlines()[-1]
    vae = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "vae"), "--steps", "2", "--device", "cpu",
           "--batch-size", "6"]
    assert train.main(["vae", "--strict", *vae]) == 2 and "0.png" in capsys.readouterr().err.splitlines()[-1]
    shutil.rmtree(tmp_path / "vae")
    assert train.main(["vae", *vae]) == 0 and "left out: cannot read the picture" in capsys.readouterr().err


def test_a_vae_of_ones_own(fashion_mnist, tmp_path):
    assert train.main(["vae", "--data", str(fashion_mnist), "--output", str(tmp_path / "vae"), "--steps", "20", "--device",
                       "cpu", "--batch-size", "10", "--learning-rate", "2e-3", "--log-every", "5"]) == 0
    assert losses(tmp_path / "vae")[-1] < losses(tmp_path / "vae")[0]
    assert Image.open(tmp_path / "vae/reconstructions.png").width == 8 * 100
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert vae.config.scaling_factor != diffusers.AutoencoderKL().config.scaling_factor
    tiny = ["--width", 32, "--depth", 1, "--heads", 2, "--device", "cpu", "--batch-size", 10, "--vae", tmp_path / "vae"]
    assert run(fashion_mnist, tmp_path / "dit", "--steps", 2, tiny=tiny) == 0
    assert DiTPipeline.from_pretrained(tmp_path / "dit").get_label_ids("bag") == [8]


@pytest.mark.parametrize("options, named", [
    (["--data", "nowhere"], "there is no folder nowhere"), (["--data", "fashion-mnist"], "dataset-fashion-mnist"),
    (["--data", "flat"], "put its pictures into a folder per class (flat/1.png is not in a folder of a class"),
    (["--vae", "nowhere/at-all"], "nowhere/at-all"),
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
    assert run(data, trained, "--steps", 30, "--latents", latents, "--resume", "--beta2", "0.9") == 2
    assert "beta2 0.999 there and 0.9 now" in capsys.readouterr().err
    assert run(data, trained, "--steps", 20, "--latents", latents, "--resume") == 2
    assert "checkpoint-00000030 is past --steps 20" in capsys.readouterr().err


def test_gone_on_with_it_writes_a_sheet_before_the_first_line_of_the_log(data, latents, tmp_path):
    options = ["--latents", latents, "--log-every", 50, "--sample-every", 3]
    assert run(data, tmp_path, "--steps", 2, *options) == 0
    assert run(data, tmp_path, "--steps", 4, *options, "--resume") == 0
    assert (tmp_path / "training/samples/00000003.png").is_file()


def test_what_does_not_fit_is_refused_before_any_picture_is_encoded(data, tmp_path, capsys):
    odd = tiny_pipeline()
    odd.scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear")
    odd.save_pretrained(tmp_path / "odd")
    shutil.copytree(SMALL_MODEL / "vae", tmp_path / "means")
    config = json.loads((tmp_path / "means/config.json").read_text())
    (tmp_path / "means/config.json").write_text(json.dumps({**config, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}))
    np.savez(tmp_path / "numbers.npz", np.zeros((9, 32, 32, 3), np.uint8), np.arange(9))
    for options, named in (
            (["--init", tmp_path / "odd", *LOOP], "has not DiT's linear betas or the cosine ones, or is for another"),
            (["--vae", tmp_path / "means", *LOOP], "its latents_mean and latents_std are not undone here"),
            (["--freeze-below", 9, *TINY], "blocks below 9"),
            (["--init", SMALL_MODEL, "--size", 40, *LOOP], "--init was trained on latents of 4 channels and side 8"),
            (["--data", tmp_path / "numbers.npz", *TINY], "has no classes with names")):
        assert run(data, tmp_path / "out", *options, tiny=[]) == 2
        assert named in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.rglob("out/**/*.safetensors"))


def test_a_vaes_shift_is_left_out_on_both_sides(data, tmp_path):
    shutil.copytree(SMALL_MODEL / "vae", tmp_path / "shifted")
    config = json.loads((tmp_path / "shifted/config.json").read_text())
    (tmp_path / "shifted/config.json").write_text(json.dumps({**config, "shift_factor": 0.5}))
    assert run(data, tmp_path / "out", *TINY, "--vae", tmp_path / "shifted", "--steps", 1, tiny=[]) == 0
    assert json.loads((tmp_path / "out/vae/config.json").read_text())["shift_factor"] is None


def test_latents_that_another_run_writes_are_waited_for(data, tmp_path, capsys):
    with held(tmp_path / "latents"):
        assert run(data, tmp_path / "out", "--steps", 1, "--latents", tmp_path / "latents") == 2
    assert "another run is at work in" in capsys.readouterr().err


def test_without_a_compiler_it_says_so_and_trains(data, latents, tmp_path, capsys):
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert run(data, tmp_path / "out", "--steps", 1, "--latents", latents, "--compile") == 0
    assert "needs a compiler and Python's headers: install g++" in (said := capsys.readouterr().err)
    assert "; going on without --compile\n" in said


def test_a_run_is_not_gone_on_with_on_other_pictures(data, trained, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/kind 3/7.png").unlink()
    assert run(tmp_path / "data", trained, "--steps", 30, "--latents", tmp_path / "latents", "--resume") == 2
    assert "is of another run: pictures" in capsys.readouterr().err


def test_it_says_what_it_trains_on_what_it_leaves_out_and_what_the_vae_loses(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "POOR", 1e-3)
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/empty").mkdir()
    assert run(tmp_path / "data", tmp_path / "out", "--steps", 1, "--resume") == 0
    out, error = capsys.readouterr()
    assert f"there is no checkpoint in {tmp_path / 'out/training'}: starting at the first step" in out
    assert f"left out: {tmp_path / 'data/empty'} has no pictures (.png" in out
    assert "100 pictures of 5 classes, 32x32 · " in out and "parameters · 1 x cpu · batch 20 · 1 steps" in out
    assert "the VAE gives these pictures back with a mean squared error of 0." in out
    assert "that is much, and samples will look no better" in error


def test_a_run_that_is_refused_leaves_no_file(data, latents, trained, tmp_path):
    assert run(data, tmp_path / "out", "--vae", "nowhere") == 2
    assert run(data, trained, "--steps", 30, "--latents", latents, "--resume", "--seed", 7) == 2
    assert not list((tmp_path / "out").rglob("*event*")) and len(list(trained.rglob("*event*"))) == 1


def test_a_folder_of_something_else_is_left_alone(data, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    assert run(data, tmp_path, "--steps", 1) == 2
    assert "has files of something else; choose another --output" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_what_cannot_be_meant_is_said_by_the_parser(capsys):
    for options, named in (
            ([], "--vae"), (["--vae", "x", "--width", "30", "--heads", "4"], "--width 30"),
            (["--init", "x", "--depth", "3", "--variance", "fixed"], "--init has its own depth, variance; leave it out"),
            (["vae", "--flip"], "--flip is of no use to a VAE"), (["vae", "--init", "x"], "--init is of no use to a VAE"),
            (["--clip", "0"], "0 is not over 0"), (["--label-dropout", "7"], "7 is not in 0..1"),
            (["--min-snr", "-5"], "-5 is not over 0"), (["--ema-decay", "2"], "2 is not in 0..1")):
        with pytest.raises(SystemExit) as stop:
            training_options.parse_arguments([*options, "--data", "x", "--output", "y"])
        assert stop.value.code == 2 and named in capsys.readouterr().err


def test_the_help_of_vae_leaves_out_the_options_of_a_dit(capsys):
    for part, there in (([], True), (["vae"], False)):
        with pytest.raises(SystemExit):
            training_options.parse_arguments([*part, "--help"], "DESCRIPTION")
        text = capsys.readouterr().out
        assert "--learning-rate" in text and ("--min-snr" in text) == ("network:" in text) == there


def test_init_with_a_network_of_another_latent_size_is_refused(data, latents, trained, tmp_path, capsys):
    tiny_pipeline(sample_size=16).save_pretrained(tmp_path / "other")
    assert run(data, tmp_path / "out", "--steps", 1, "--init", tmp_path / "other", "--size", 32, "--latents",
               latents, tiny=[*LOOP, "--vae", SMALL_MODEL]) == 2
    assert "--init was trained on latents of 4 channels and side 16, and these have 4 and 8" in capsys.readouterr().err
