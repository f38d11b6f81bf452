"""nets/sampling.py: what settles a picture, and a folder that outlives interruptions and damage."""

import json
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from nets.sampling import (
    PictureWriter,
    gather_manifest,
    held,
    open_folder,
    picture_generator,
    picture_label,
    picture_path,
    write_npz,
    write_whole,
)


def noise(seed, index):
    return torch.randn(1000, generator=picture_generator(seed, index))


def test_a_generator_belongs_to_its_seed_and_index_alone():
    assert torch.equal(noise(3, 7), noise(3, 7))
    streams = [noise(seed, index) for seed in range(4) for index in range(25)]
    correlations = torch.corrcoef(torch.stack(streams)).fill_diagonal_(0)
    assert correlations.abs().max() < 0.2  # over 5,000 pairs; 0.032 is one standard deviation


def test_no_two_pictures_of_a_run_share_their_noise():
    seeds = [picture_generator(5, index).initial_seed() for index in range(50_000)]
    assert len(set(seeds)) == 50_000 and max(seeds) < 2**32  # of more bits PyTorch would use 32


def test_drawn_labels_are_uniform_and_belong_to_their_index_alone():
    labels = np.array([picture_label("uniform", 10, 0, index) for index in range(5000)])
    assert (np.bincount(labels, minlength=10) > 400).all() and labels.max() == 9
    assert picture_label("uniform", 10, 0, 4321) == labels[4321]
    assert [picture_label("uniform", 10, 1, index) for index in range(50)] != labels[:50].tolist()


def test_labels_in_turn():
    assert [picture_label("balanced", 3, 0, index) for index in range(5)] == [0, 1, 2, 0, 1]
    assert [picture_label([8, 1], 10, 0, index) for index in range(3)] == [8, 1, 8]


def picture(index):
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def write(folder, indices, rank=0):
    with PictureWriter(folder, rank, ahead=2) as writer:
        for index in indices:
            writer.put(picture(index), {"index": index, "class": 1})
    return writer.written


SETTINGS = {"steps": 3, "guidance_interval": [0.3, 5.0]}


def test_what_was_written_is_found_again_whoever_wrote_it(tmp_path):
    assert open_folder(tmp_path / "out", SETTINGS) == {}
    assert write(tmp_path / "out", range(0, 10, 2), rank=0) == 5
    write(tmp_path / "out", [1003, 1], rank=1)
    records = open_folder(tmp_path / "out", SETTINGS)
    assert list(records) == [0, 1, 2, 4, 6, 8, 1003] and records[1]["class"] == 1
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["00000", "00001", "manifest.jsonl", "settings.json"]
    lines = (tmp_path / "out/manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(records)
    for index in records:
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / picture_path(index))), np.asarray(picture(index)))


def test_removed_damaged_and_half_told_pictures_do_not_count(tmp_path):
    open_folder(tmp_path, SETTINGS)
    write(tmp_path, range(5))
    (tmp_path / picture_path(1)).unlink()
    (tmp_path / picture_path(2)).write_bytes((tmp_path / picture_path(2)).read_bytes()[:50])
    with (tmp_path / "manifest-00000.jsonl").open("a") as manifest:
        manifest.write('{"index": 7, "sha2')
    (tmp_path / "00000/00000009.png.part").write_bytes(b"half")
    assert list(gather_manifest(tmp_path)) == [0, 3, 4]
    assert not list(tmp_path.glob("*/*.part"))


def test_a_folder_of_other_settings_or_of_something_else_is_refused_and_left_alone(tmp_path):
    open_folder(tmp_path / "out", SETTINGS)
    write(tmp_path / "out", [0])
    with pytest.raises(ValueError, match=r"pictures of other settings: steps 3 there and 4 now; choose another folder$"):
        open_folder(tmp_path / "out", {**SETTINGS, "steps": 4})
    assert json.loads((tmp_path / "out/settings.json").read_text()) == SETTINGS
    with pytest.raises(ValueError, match="choose an empty folder"):
        open_folder(tmp_path, SETTINGS)


def test_facts_may_change_and_are_kept(tmp_path):
    open_folder(tmp_path, SETTINGS, {"num": 3})
    write(tmp_path, [0])
    assert list(open_folder(tmp_path, SETTINGS, {"num": 9})) == [0]
    assert json.loads((tmp_path / "settings.json").read_text()) == {**SETTINGS, "num": 9}


def test_a_folder_without_pictures_takes_other_settings(tmp_path):
    open_folder(tmp_path, {**SETTINGS, "steps": 9})
    assert open_folder(tmp_path, SETTINGS) == {} and json.loads((tmp_path / "settings.json").read_text()) == SETTINGS


def test_damage_to_the_folders_own_files_is_survived_or_named(tmp_path):
    (tmp_path / "settings.json.part").write_text("{")  # killed before it got its name
    open_folder(tmp_path, SETTINGS)
    write(tmp_path, range(3))
    gather_manifest(tmp_path)
    with (tmp_path / "manifest.jsonl").open("ab") as manifest:
        manifest.write(b'\xff\xfe\n7\n[1]\n{"index": "x"}\n{"index": 9}\n')
    assert list(open_folder(tmp_path, SETTINGS)) == [0, 1, 2]
    (tmp_path / "settings.json").write_text("no JSON")
    with pytest.raises(ValueError, match=r"settings\.json is damaged .*; restore it, or choose another folder"):
        open_folder(tmp_path, SETTINGS)


def test_whatever_stops_the_writer_is_raised_and_nothing_waits_for_ever(tmp_path, monkeypatch):
    def stops(*_):
        raise MemoryError("no room")
    monkeypatch.setattr("nets.sampling.write_whole", stops)
    with pytest.raises(MemoryError), PictureWriter(tmp_path, 0, ahead=2) as writer:
        for index in range(50):
            writer.put(picture(index), {"index": index})


def test_a_disk_that_is_full_is_said_by_the_writer_and_costs_no_picture_before_it(tmp_path):
    open_folder(tmp_path, SETTINGS)
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match="File too large"), PictureWriter(tmp_path, 0, ahead=2) as writer:
            for index in range(100):
                writer.put(large if index == 3 else picture(index), {"index": index})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(gather_manifest(tmp_path)) == [0, 1, 2]
    assert not list(tmp_path.glob("*/*.part")) and not (tmp_path / picture_path(3)).exists()


def test_at_most_so_many_pictures_wait(tmp_path, monkeypatch):
    import threading

    import nets.sampling

    gate, handed = threading.Event(), []
    monkeypatch.setattr(nets.sampling, "write_whole", lambda path, content: (gate.wait(), write_whole(path, content)))
    with PictureWriter(tmp_path, 0, ahead=2) as writer:
        def hand_over():
            for index in range(10):
                writer.put(picture(index), {"index": index})
                handed.append(index)
        producer = threading.Thread(target=hand_over)
        producer.start()
        producer.join(0.5)
        assert len(handed) <= 3  # two wait, one is being written
        gate.set()
        producer.join()
    assert writer.written == 10


def test_the_npz_is_the_adm_evaluators(tmp_path):
    open_folder(tmp_path, SETTINGS)
    write(tmp_path, range(7))
    write_npz(tmp_path, [3, 1, 4, 1, 5, 9], tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive.files == ["arr_0", "arr_1"] and archive["arr_1"].tolist() == [3, 1, 4, 1, 5, 9]
        array = archive["arr_0"]
    assert array.dtype == np.uint8 and np.array_equal(array, np.stack([np.asarray(picture(index)) for index in range(6)]))
    assert not list(tmp_path.glob("*.part"))


def test_a_folder_is_one_runs_at_a_time_and_free_when_it_died(tmp_path):
    program = ("import pathlib, sys, time\nfrom nets.sampling import held\n"
               "with held(pathlib.Path(sys.argv[1])):\n    print(1, flush=True)\n    time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    other.stdout.readline()
    with pytest.raises(ValueError, match="another run is at work in"), held(tmp_path):
        pass
    other.kill()
    other.communicate()
    with held(tmp_path):
        open_folder(tmp_path, SETTINGS)


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def stops(*_):
        raise OSError("stopped")
    write_whole(tmp_path / "a", b"old")
    monkeypatch.setattr("os.replace", stops)
    with pytest.raises(OSError, match="stopped"):
        write_whole(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"
