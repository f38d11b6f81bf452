"""What `pip install .` brings: the library, the command, the small model, and no other name."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

import nets


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources so that nothing is left among them."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("nets", "model_data"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "DiT-XL-*"))
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"]:
        shutil.copy(path, source)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder),
                    str(source)], check=True)
    (file,) = folder.glob("*.whl")
    return file


def test_only_our_own_names_are_installed(wheel):
    files = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in files} == {"nets", "dit_verbs", f"dit_reference-{nets.__version__}.dist-info"}
    assert "dit_verbs/model_data/fashion-mnist-32/transformer/diffusion_pytorch_model.safetensors" in files


def test_the_installed_command_makes_a_picture_from_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    (entry_points,) = site.glob("*.dist-info/entry_points.txt")
    for verb in ("predict", "convert", "sample", "evaluate", "train"):
        assert f"dit-{verb} = dit_verbs.{verb}:main" in entry_points.read_text()
    done = subprocess.run([sys.executable, "-c", "import sys; from dit_verbs.predict import main; sys.exit(main())", "bag",
                           "--steps", "2"], cwd=empty, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert (empty / "outputs/bag-seed42.png").is_file() and "fashion-mnist-32" in done.stdout


def test_importing_the_library_imports_nothing_heavy():
    program = "import sys, nets; assert nets.__version__ and not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
