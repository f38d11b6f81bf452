"""sample.py: the same pictures whatever the batch size, the number of processes and the interruptions."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, tiny_pipeline
from PIL import Image

import sample
from nets import DiTPipeline
from nets.sampling import picture_path

OPTIONS = ["--num", "40", "--steps", "2", "--guidance-scale", "2", "--device", "cpu"]


def run(*arguments):
    return sample.main([str(argument) for argument in arguments])


def pictures(folder, count=40):
    with np.load(folder / "samples.npz") as archive:
        assert archive["arr_0"].shape == (count, 32, 32, 3)
        return archive["arr_0"].astype(int)


def labels(folder):
    return [json.loads(line)["class"] for line in (folder / "manifest.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of 40 pictures in batches of 16."""
    folder = tmp_path_factory.mktemp("sample") / "out"
    assert run(*OPTIONS, "--batch-size", 16, "--npz", "--output", folder) == 0
    return folder


def same(folder, other):
    return labels(folder) == labels(other) and np.abs(pictures(folder) - pictures(other)).max() <= 1


@pytest.mark.parametrize("batch_size", [7, 64])
def test_the_batch_size_changes_nothing(batch_size, uninterrupted, tmp_path):
    assert run(*OPTIONS, "--batch-size", batch_size, "--npz", "--output", tmp_path / "out") == 0
    assert same(tmp_path / "out", uninterrupted)
    assert len(set(labels(uninterrupted))) > 5 and np.ptp(pictures(uninterrupted)[0]) > 50


def test_nor_that_compiled_the_last_batch_is_filled_up_and_not_compiled_anew(uninterrupted, tmp_path, monkeypatch):
    sizes, call = [], DiTPipeline.__call__
    monkeypatch.setattr("nets.acceleration.compile_networks", lambda pipeline: pipeline)
    monkeypatch.setattr(DiTPipeline, "__call__", lambda self, classes, **more: sizes.append(len(classes)) or call(
        self, classes, **more))
    assert run(*OPTIONS, "--batch-size", 16, "--compile", "--npz", "--output", tmp_path / "out") == 0
    assert sizes == [16, 16, 16] and same(tmp_path / "out", uninterrupted)
    assert run(*OPTIONS, "--num", 43, "--batch-size", 16, "--compile", "--output", tmp_path / "out") == 0
    assert sizes == [16, 16, 16, 3]


@pytest.mark.parametrize("scheduler", ["ddpm-learned", "dpm-sde"])
def test_nor_under_a_scheduler_that_draws_noise(scheduler, tmp_path):
    for batch_size in (3, 8):
        options = ["--num", 8, "--steps", 3, "--scheduler", scheduler, "--device", "cpu", "--npz"]
        assert run(*options, "--batch-size", batch_size, "--output", tmp_path / str(batch_size)) == 0
    assert np.abs(pictures(tmp_path / "3", 8) - pictures(tmp_path / "8", 8)).max() <= 1


TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--")


def start(folder, *options, launcher=TWO_PROCESSES):
    """sample.py as a program of its own."""
    command = [sys.executable, *launcher, ROOT / "sample.py", *map(str, options), "--npz", "--output", folder]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def test_nor_the_number_of_processes(uninterrupted, tmp_path):
    process = start(tmp_path / "out", *OPTIONS, "--batch-size", 4)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "2 x cpu" in output and same(tmp_path / "out", uninterrupted)
    assert "40/40" in output and "20/20" not in output  # one bar, over both


MANY = ["--num", 600, "--steps", 1, "--guidance-scale", 1, "--batch-size", 16, "--device", "cpu"]


def kill_again_and_again(folder, expected, rounds, chance):
    """Start a run of 600 pictures in two processes, kill one or both at a random moment, look, start it again...

    Yields the number of pictures that were there after each kill; the last start is left alone and goes on to the end.
    """
    there = 0
    for number in range(rounds):
        process, wanted = start(folder, *MANY), there + chance.randrange(1, 150)
        while process.poll() is None and len(list(folder.glob("*/*.png"))) < wanted:
            time.sleep(chance.random() / 100)
        assert process.poll() is None, process.communicate()[0]
        workers = list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
        for pid in [chance.choice(workers)] if number % 2 else [process.pid, *workers]:
            os.kill(pid, signal.SIGKILL)  # of one worker alone torchrun hears, and ends the other
        process.communicate(timeout=60)
        for path in folder.glob("*/*.png"):  # what has its final name is whole
            assert same_picture(path, expected / path.relative_to(folder))
        there = len(list(folder.glob("*/*.png")))
        yield there
    process = start(folder, *MANY)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert labels(folder) == labels(expected) and not list(folder.rglob("*.part"))
    assert np.abs(pictures(folder, 600) - pictures(expected, 600)).max() <= 1
    assert all(same_picture(folder / picture_path(index), expected / picture_path(index)) for index in range(600))


def same_picture(path, other):
    return np.abs(np.asarray(Image.open(path)).astype(int) - np.asarray(Image.open(other))).max() <= 1


def test_nor_being_killed_again_and_again(tmp_path):
    assert run(*MANY, "--npz", "--output", tmp_path / "uninterrupted") == 0
    done = list(kill_again_and_again(tmp_path / "out", tmp_path / "uninterrupted", rounds=3, chance=random.Random(3)))
    assert done == sorted(done) and 0 < done[0] < done[-1] < 600


def test_what_was_removed_or_damaged_is_made_again_and_nothing_else(uninterrupted, tmp_path, capsys):
    folder = tmp_path / "out"
    run(*OPTIONS, "--output", folder)
    (folder / picture_path(5)).unlink()
    (folder / picture_path(9)).write_bytes(b"damaged")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.png")}
    capsys.readouterr()
    assert run(*OPTIONS, "--npz", "--output", folder) == 0
    assert "2 of 40 pictures to make" in capsys.readouterr().out and same(folder, uninterrupted)
    changed = {path.name for path in folder.glob("*/*.png") if before.get(path) != path.stat().st_mtime_ns}
    assert changed == {"00000005.png", "00000009.png"}


def test_more_pictures_go_on_from_those_that_are_there(uninterrupted, tmp_path, capsys):
    run(*OPTIONS, "--num", 20, "--output", tmp_path / "out")
    capsys.readouterr()
    run(*OPTIONS, "--npz", "--output", tmp_path / "out")
    assert "20 of 40 pictures to make" in capsys.readouterr().out and same(tmp_path / "out", uninterrupted)


def test_a_folder_of_other_pictures_is_refused_in_one_line(tmp_path, capsys):
    assert run(*OPTIONS, "--num", 2, "--output", tmp_path / "out") == 0
    for more, named in ((["--steps", 3], "steps 2 there and 3 now"), (["--seed", 1], "seed 0 there and 1 now"),
                        (["--labels", "balanced"], "labels 'uniform' there and 'balanced' now")):
        capsys.readouterr()
        assert run(*OPTIONS, "--num", 2, "--output", tmp_path / "out", *more) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert named in error and "choose another folder" in error
    tiny_pipeline().save_pretrained(tmp_path / "model")
    assert run(*OPTIONS, "--num", 2, "--output", tmp_path / "out", "--model", tmp_path / "model") == 2
    assert "weights" in capsys.readouterr().err


def test_another_config_with_the_same_weights_is_another_model(tmp_path, capsys):
    shutil.copytree(ROOT / "model_data/fashion-mnist-32", tmp_path / "model")
    options = [*OPTIONS, "--model", tmp_path / "model", "--output", tmp_path / "out"]
    assert run(*options, "--num", 1) == 0
    config = json.loads((tmp_path / "model/vae/config.json").read_text())
    (tmp_path / "model/vae/config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    assert run(*options, "--num", 2) == 2 and "config" in capsys.readouterr().err


def test_an_option_that_the_model_refuses_does_not_spoil_the_folder(tmp_path, capsys):
    assert run(*OPTIONS, "--num", 2, "--guidance-channels", 9, "--output", tmp_path / "out") == 2
    assert "guidance_channels" in capsys.readouterr().err.splitlines()[-1]
    assert run(*OPTIONS, "--num", 2, "--guidance-channels", 3, "--output", tmp_path / "out") == 0


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as launched for GPUs that are not there; accelerate then sees one process
    with pytest.raises(ValueError, match=r"started as 2 processes, and each finds itself alone: .* add --device cpu"):
        sample.command_line.require_processes(1)


def test_names_with_commas_in_them_and_long_lists():
    id2label = {0: "T-shirt, top", 1: "trouser", 8: "bag"}
    assert sample.read_labels("T-shirt, top,bag", id2label, 10) == [0, 8]
    assert sample.read_labels("bag,T-shirt, top, trouser", id2label, 10) == [8, 0, 1]
    assert sample.read_labels(",".join(["trouser"] * 100), id2label, 10) == [1] * 100


def test_labels_by_name_by_file_and_in_turn(tmp_path):
    (tmp_path / "labels.txt").write_text("bag\n#3\n7\n")
    for how, expected in (("bag,ankle boot", [8, 9, 8, 9]), (tmp_path / "labels.txt", [8, 3, 7, 8]),
                          ("balanced", [0, 1, 2, 3])):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        assert run(*OPTIONS, "--num", 4, "--labels", how, "--output", folder) == 0
        assert labels(folder) == expected


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_folder_without_one_of_the_networks_gets_one_line_and_nothing_is_written(part, tmp_path, capsys):
    DiTPipeline(**tiny_pipeline().components | {part: None}).save_pretrained(tmp_path / "model")
    assert run(*OPTIONS, "--model", tmp_path / "model", "--output", tmp_path / "out") == 2
    assert f"its folder has no {part}/; put one into it" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, named", [
    (["--labels", "bagg"], "unknown class 'bagg'"), (["--labels", "11"], "class id 11"),
    (["--model", "nowhere/at/all"], "nowhere/at/all"),
])
def test_wrong_values_get_one_line_and_nothing_is_written(arguments, named, tmp_path, capsys):
    assert run(*OPTIONS, "--output", tmp_path / "out", *arguments) == 2
    assert named in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()
