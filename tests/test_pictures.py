"""nets/pictures.py: PNGs that say how they were made, free names, and the contact sheet."""

import numpy as np
import pytest
from PIL import Image

from nets.pictures import contact_sheet, free_path, read_text, save_picture, slug


def solid(colour, size=(32, 32)):
    return Image.new("RGB", size, colour)


def test_text_and_pixels_come_back_as_they_were_written(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    text = {"class_name": "café, \u96e8", "class_ids": "[1, 2]"}
    save_picture(Image.fromarray(pixels), tmp_path / "a.png", text)
    assert read_text(tmp_path / "a.png") == text
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), pixels)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_failure_while_writing_leaves_no_png(tmp_path, monkeypatch):
    def stops_half_way(picture, path, **_):
        path.write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(Image.Image, "save", stops_half_way)
    with pytest.raises(OSError, match="No space"):
        save_picture(solid("red"), tmp_path / "a.png", {})
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_picture_is_an_oserror(tmp_path):
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(OSError, match=r"a\.png"):
        read_text(tmp_path / "a.png")


def test_a_free_path_is_never_one_that_is_there(tmp_path):
    assert free_path(tmp_path / "a.png") == tmp_path / "a.png"
    for name in ("a.png", "a-2.png"):
        (tmp_path / name).touch()
    assert free_path(tmp_path / "a.png") == tmp_path / "a-3.png"


@pytest.mark.parametrize("name, expected", [("T-shirt", "t-shirt"), ("ankle boot", "ankle-boot"), ("a/b\\c..", "a-b-c")])
def test_a_name_becomes_part_of_a_file_name(name, expected):
    assert slug(name) == expected


def test_a_sheet_holds_every_picture_in_reading_order_over_its_name():
    colours = ["red", "lime", "blue"]
    sheet = np.asarray(contact_sheet([solid(colour) for colour in colours], colours, columns=2))
    assert sheet.shape == (2 * (96 + 20), 2 * 100, 3)  # 32 pixels three times as large, and a caption
    for colour, (row, column) in zip(colours, [(0, 0), (0, 1), (1, 0)]):
        cell = sheet[row * 116 + 2:row * 116 + 98, column * 100 + 2:column * 100 + 98]
        assert (cell == np.asarray(solid(colour, (1, 1)))).all()
        caption = sheet[row * 116 + 100:row * 116 + 116, column * 100 + 2:column * 100 + 98]
        assert (caption < 128).any() and (caption == 255).any()


def test_large_pictures_keep_their_size():
    assert contact_sheet([solid("red", (256, 256))], ["a"]).size == (260, 276)
