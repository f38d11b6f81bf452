"""nets/picture_sets.py: whatever holds pictures, they come out the same."""

import json
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from nets.picture_sets import FASHION_MNIST, open_pictures, read_fashion_mnist
from nets.sampling import PictureWriter, gather_manifest, open_folder

SIZE = (12, 8)  # width, height


def arrays(count=7):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 12, 3), dtype=np.uint8)


def write_pictures(folder, names):
    for name, array in zip(names, arrays()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / name)
    return folder


def same(pictures, expected):
    pixels = pictures.pixels(range(pictures.count), SIZE)
    return pixels.dtype == torch.uint8 and np.array_equal(pixels.permute(0, 2, 3, 1), expected)


def test_fashion_mnist_is_read_and_padded(fashion_mnist):
    pictures, labels = read_fashion_mnist(fashion_mnist, "train")
    assert pictures.shape == (30, 1, 32, 32) and labels.tolist() == [k % 10 for k in range(30)]
    assert not pictures[:, :, :2].any() and not pictures[..., -2:].any()
    assert pictures[0, 0, 2:10, 7:22].eq(200).all() and pictures[0].sum() == 200 * 8 * 15
    opened = open_pictures(fashion_mnist, "train")
    assert opened.class_names == FASHION_MNIST and torch.equal(opened.labels, labels)
    assert torch.equal(opened.pixels([3], (32, 32)), pictures[3:4].expand(-1, 3, -1, -1))
    assert opened.mark != open_pictures(fashion_mnist, "test").mark


def test_a_folder_per_class_has_classes_and_a_flat_or_deep_one_has_none(tmp_path):
    names = ["bag/1.png", "bag/2.png", "coat/1.bmp"]
    pictures = open_pictures(write_pictures(tmp_path / "classes", names))
    assert same(pictures, arrays(3)) and pictures.labels.tolist() == [0, 0, 1]
    assert pictures.class_names == {0: "bag", 1: "coat"}
    for kind, names in (("flat", ["a.png", "b.PNG"]), ("deep", ["x/y/1.png", "x/z/2.png"]),
                        ("mixed", ["1.png", "x/2.png"])):
        pictures = open_pictures(write_pictures(tmp_path / kind, names))
        assert same(pictures, arrays(2)) and pictures.labels is None and pictures.class_names is None


def write_samples(folder):
    open_folder(folder, {"class_names": {"3": "dress", "8": "bag"}})
    with PictureWriter(folder, 0, ahead=2) as writer:
        for index, array in enumerate(arrays()):
            writer.put(Image.fromarray(array), {"index": index, "class": 3 if index % 2 else 8, "seed": 0})


def test_what_sample_wrote_comes_with_its_classes_but_only_when_it_is_finished(tmp_path):
    write_samples(tmp_path)
    with pytest.raises(ValueError, match=r"is not finished; start the same sample\.py command again"):
        open_pictures(tmp_path)
    gather_manifest(tmp_path)
    pictures = open_pictures(tmp_path)
    assert same(pictures, arrays()) and pictures.labels.tolist() == [8, 3, 8, 3, 8, 3, 8]
    assert pictures.class_names == {3: "dress", 8: "bag"}
    (tmp_path / "settings.json").write_text(json.dumps({"num": 9}))
    with pytest.raises(ValueError, match="has 7 of its 9 pictures; start the same"):
        open_pictures(tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_of_the_adm_evaluator(save, tmp_path):
    save(tmp_path / "a.npz", arrays())
    pictures = open_pictures(tmp_path / "a.npz")
    assert same(pictures, arrays()) and pictures.labels is None
    save(tmp_path / "b.npz", arr_0=arrays(), arr_1=np.arange(7), mu=np.zeros(3))
    pictures = open_pictures(tmp_path / "b.npz")
    assert same(pictures, arrays()) and pictures.labels.tolist() == list(range(7))


def test_an_uncompressed_npz_is_mapped_and_not_loaded(tmp_path):
    from nets.picture_sets import map_stored, zipfile

    np.savez(tmp_path / "a.npz", np.zeros(3), arrays())
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        array = map_stored(tmp_path / "a.npz", archive.getinfo("arr_1.npy"))
    assert isinstance(array, np.memmap) and np.array_equal(array, arrays())


def test_an_npz_in_columns_is_read_in_the_right_order(tmp_path):
    np.savez(tmp_path / "a.npz", np.asfortranarray(arrays()))
    assert same(open_pictures(tmp_path / "a.npz"), arrays())


def test_classes_behind_links_are_found(tmp_path):
    write_pictures(tmp_path / "there", ["bag/1.png", "coat/2.png"])
    (tmp_path / "here").mkdir()
    for name in ("bag", "coat"):
        (tmp_path / "here" / name).symlink_to(tmp_path / "there" / name)
    assert open_pictures(tmp_path / "here").class_names == {0: "bag", 1: "coat"}


def test_grey_of_sixteen_bits_is_scaled_and_not_cut_off(tmp_path):
    grey = np.linspace(0, 65535, 96).astype(np.uint16).reshape(8, 12)
    Image.fromarray(grey).save(tmp_path / "1.png")
    assert np.array_equal(open_pictures(tmp_path).pixels([0], SIZE)[0, 0], grey // 256)


def test_damaged_files_of_fashion_mnist_are_named(fashion_mnist, tmp_path):
    for path in fashion_mnist.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes((fashion_mnist / "t10k-images-idx3-ubyte.gz").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"t10k-\*\.gz are damaged"):
        open_pictures(tmp_path)


def test_the_mark_changes_with_the_pictures(tmp_path):
    folder = write_pictures(tmp_path / "a", ["1.png", "2.png"])
    mark = open_pictures(folder).mark
    assert open_pictures(folder).mark == mark
    os.utime(folder / "1.png", ns=(1, 1))
    assert open_pictures(folder).mark != mark
    mark = open_pictures(folder).mark
    Image.new("RGB", (12, 8)).save(folder / "2.png")
    assert open_pictures(folder).mark != mark
    (folder / "2.png").unlink()
    assert open_pictures(folder).mark != mark


def test_pictures_of_another_size_are_scaled_to_cover_and_cut_in_the_middle(tmp_path):
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 12:36] = 255  # what is left of 48x16 when it becomes 12x8
    Image.fromarray(wide).save(tmp_path / "1.png")
    Image.fromarray(wide[..., 0]).save(tmp_path / "2.png")  # grey
    pixels = open_pictures(tmp_path).pixels([0, 1], SIZE)
    assert pixels.shape == (2, 3, 8, 12) and pixels.ge(200).all()


def broken_npz(path):
    np.savez(path, arr_0=arrays().astype(np.float32))


def no_arr_0(path):
    np.savez(path, pictures=arrays())


def labels_of_other_pictures(path):
    np.savez(path, arr_0=arrays(), arr_1=np.arange(3))


def half_an_npz(path):
    np.savez(path, arr_0=arrays())
    path.write_bytes(path.read_bytes()[:500])


def code(path):
    np.savez(path, arr_0=np.array([print], dtype=object))


@pytest.mark.parametrize("write, named", [(broken_npz, "float32"), (no_arr_0, "arr_0"), (half_an_npz, "no npz"),
                                          (labels_of_other_pictures, r"arr_1 has shape \(3,\)"), (code, "object")])
def test_what_is_no_npz_of_pictures_is_said_in_one_line(write, named, tmp_path):
    write(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=named) as error:
        open_pictures(tmp_path / "a.npz")
    assert "\n" not in str(error.value) and "a.npz" in str(error.value)


def test_missing_empty_and_damaged(tmp_path):
    with pytest.raises(OSError, match="there is no file or folder"):
        open_pictures(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no pictures"):
        open_pictures(tmp_path)
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR")
    with pytest.raises(OSError, match=r"cannot read the picture .*1\.png"):
        open_pictures(tmp_path).picture(0)
    (tmp_path / "settings.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="not finished"):
        open_pictures(tmp_path)
