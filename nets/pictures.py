"""Pictures as files: PNGs that say how they were made, names that overwrite nothing, contact sheets."""

from pathlib import Path

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo


def save_picture(picture: Image.Image, path: Path, text: dict[str, str]):
    """Write a PNG with text chunks; the file appears whole or not at all."""
    chunks = PngInfo()
    for key, value in text.items():
        chunks.add_itxt(key, value)
    unfinished = path.with_suffix(".part")
    try:
        picture.save(unfinished, format="PNG", pnginfo=chunks)
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def contact_sheet(pictures: list[Image.Image], names: list[str], columns: int = 8, smallest: int = 96) -> Image.Image:
    """All pictures on one sheet, each over its name; small ones are enlarged to `smallest` pixels."""
    factor = -(-smallest // pictures[0].width)
    width, height, caption = pictures[0].width * factor, pictures[0].height * factor, 16
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 4), rows * (height + caption + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, name) in enumerate(zip(pictures, names)):
        left, top = index % columns * (width + 4) + 2, index // columns * (height + caption + 4) + 2
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.text((left, top + height + 2), name[:width // 6], fill="black")
    return sheet


def read_text(path: Path) -> dict[str, str]:
    """The text chunks of a PNG. Raises OSError for a file that is no readable picture."""
    with Image.open(path) as picture:
        return dict(getattr(picture, "text", {}))


def slug(name: str) -> str:
    """A name as part of a file name."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")


def free_path(path: Path) -> Path:
    """The path itself, or with -2, -3, ... where a file of that name is there: nothing is overwritten."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate
