"""evaluate.py: two sets of pictures in, a table, JSON, a report and sheets out."""

import gzip
import json
import struct

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import evaluate
from nets.features import FeatureExtractor, make_features, save_features
from nets.metrics import compare, frechet_distance, nearest
from nets.picture_sets import FASHION_MNIST, read_fashion_mnist
from nets.sampling import PictureWriter, gather_manifest, open_folder


def run(*arguments):
    return evaluate.main([str(argument) for argument in arguments])


def blurred(count, seed):
    """Pictures like clothes in size alone, and a class for each."""
    generator = np.random.default_rng(seed)
    for index in range(count):
        small = generator.integers(0, 256, (4, 4), dtype=np.uint8)
        yield index % 10, Image.fromarray(small).resize((32, 32)).convert("RGB")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """60 samples as sample.py leaves them, 80 reference pictures in a folder per class."""
    folder = tmp_path_factory.mktemp("sets")
    open_folder(folder / "samples", {"class_names": {str(label): name for label, name in FASHION_MNIST.items()}})
    with PictureWriter(folder / "samples", 0, ahead=4) as writer:
        for index, (label, picture) in enumerate(blurred(60, 0)):
            writer.put(picture, {"index": index, "class": label, "seed": 0})
    gather_manifest(folder / "samples")
    for index, (label, picture) in enumerate(blurred(80, 1)):
        path = folder / "real" / FASHION_MNIST[label] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return folder


@pytest.fixture(scope="module")
def evaluated(sets):
    assert run("--samples", sets / "samples", "--reference", sets / "real") == 0
    return sets / "samples-evaluation"


def test_the_figures_are_those_of_the_metrics(sets, evaluated):
    results = json.loads((evaluated / "metrics.json").read_text())
    extractor = FeatureExtractor(ROOT / "model_data/fashion-mnist-classifier")
    (samples, logits), (real, _) = (extractor(torch.stack([
        torch.from_numpy(np.array(picture)).permute(2, 0, 1) for _, picture in blurred(count, seed)]))
        for count, seed in ((60, 0), (80, 1)))
    expected = frechet_distance(samples, real.double().mean(0), real.double().T.cov())
    assert results["figures"]["frechet_distance"]["value"] == pytest.approx(expected, rel=1e-4)
    recognised = (logits.argmax(1) == torch.arange(60) % 10).double().mean().item()
    assert results["figures"]["class_accuracy"]["value"] == pytest.approx(recognised)
    assert results["samples"] == {"name": str(sets / "samples"), "count": 60, "size": [32, 32]}
    assert results["reference"]["count"] == 80 and results["features"]["name"] == "fashion-mnist-classifier"
    assert set(results["figures"]) == set(evaluate.FIGURES)
    sets_of = [make_features("", features, answers, torch.arange(len(features)) % 10, FASHION_MNIST)
               for features, answers in ((samples, logits), (real, None))]
    for name, figure in compare(*sets_of, FASHION_MNIST)[0].items():
        tolerance = 0.5 if name == "kernel_distance" else 0.05  # its random subsets meet the files in another order
        assert results["figures"][name]["value"] == pytest.approx(figure["value"], rel=tolerance), name
    assert len(results["figures"]["spread"]["parts"]) == 5 and len(results["classes"]) == 10
    accuracies = [row["accuracy"] for row in results["classes"]]
    assert accuracies == sorted(accuracies)


def test_the_report_shows_table_sheets_and_classes(evaluated):
    report = (evaluated / "report.md").read_text()
    for part in ("samples: 60", "reference: 80", "few pictures: ", "| Frechet distance |", "![samples](samples.png)",
                 "![nearest](nearest.png)", "five parts of 12", "| T-shirt, top | 6 |"):
        assert part in report
    sheet = np.asarray(Image.open(evaluated / "samples.png"))
    assert sheet.shape == (6 * 84, 10 * 68, 3)  # six of each of ten classes, enlarged to 64 pixels
    assert np.asarray(Image.open(evaluated / "nearest.png")).shape == (8 * 84, 5 * 68, 3)


def test_the_sheets_show_the_pictures_that_they_name(sets, tmp_path):
    """Where the samples themselves are the training data, each is its own nearest picture."""
    assert run("--samples", sets / "samples", "--reference", sets / "real", "--training", sets / "samples",
               "--output", tmp_path) == 0
    sheet = np.asarray(Image.open(tmp_path / "nearest.png"))
    for row in range(8):
        top = row * 84 + 2
        assert np.array_equal(sheet[top:top + 64, 2:66], sheet[top:top + 64, 70:134])
    assert json.loads((tmp_path / "metrics.json").read_text())["nearest"]["samples"] == pytest.approx(0, abs=1e-3)
    worst = json.loads((tmp_path / "metrics.json").read_text())["classes"][0]["class"]
    pictures = [picture for label, picture in blurred(60, 0) if label == worst]
    shown = np.asarray(Image.open(tmp_path / "samples.png"))[2:66:2, 2:66:2]
    assert np.array_equal(shown, np.asarray(pictures[0]))


def test_a_folder_against_itself_is_at_distance_zero(sets, tmp_path, capsys):
    assert run("--samples", sets / "real", "--reference", sets / "real", "--output", tmp_path, "--features",
               ROOT / "model_data/fashion-mnist-classifier") == 0
    figures = json.loads((tmp_path / "metrics.json").read_text())["figures"]
    assert figures["frechet_distance"]["value"] == pytest.approx(0, abs=1e-3)
    assert figures["precision"]["value"] == figures["recall"]["value"] == 1
    assert figures["spread"]["value"] == pytest.approx(1)
    assert "Frechet distance" in capsys.readouterr().out


def test_two_halves_of_one_set(fashion_mnist, sets, tmp_path, capsys):
    np.savez(tmp_path / "samples.npz", np.stack([np.asarray(picture) for _, picture in blurred(100, 3)]))
    assert run("--samples", tmp_path / "samples.npz", "--halves", "--features",
               ROOT / "model_data/fashion-mnist-classifier") == 0
    results = json.loads((tmp_path / "samples-evaluation/metrics.json").read_text())
    assert results["samples"]["count"] == results["reference"]["count"] == 50
    assert results["figures"]["frechet_distance"]["value"] > 0 and "the other half" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "samples-evaluation").iterdir()} == {"metrics.json", "report.md"}


def test_fashion_mnist_is_seen_by_the_shipped_classifier_and_all_else_by_dinov2(fashion_mnist, sets, monkeypatch):
    taken = []
    monkeypatch.setattr("nets.features.FeatureExtractor", lambda name, device: taken.append(str(name)) or 1 / 0)
    np.savez(sets / "samples.npz", np.stack([np.asarray(picture) for _, picture in blurred(60, 0)]))
    for samples, reference in (("samples", "real"), ("samples.npz", fashion_mnist), ("samples.npz", "real")):
        with pytest.raises(ZeroDivisionError):
            run("--samples", sets / samples, "--reference", sets / reference)
    assert [name.rpartition("/")[2] for name in taken] == ["fashion-mnist-classifier"] * 2 + ["dinov2-large"]


@pytest.mark.parametrize("arguments, named", [
    (["--samples", "nowhere", "--reference", "real"], "there is no file or folder"),
    (["--samples", "samples", "--reference", "nowhere"], "there is no file or folder"),
    (["--samples", "few", "--reference", "real"], "few has 2 pictures; it takes 50 at least"),
    (["--samples", "samples", "--reference", "real", "--features", "inception"], "pip install torch-fidelity"),
    (["--samples", "samples", "--reference", "real", "--features", "samples"], "cannot load the feature network"),
    (["--samples", "samples", "--reference", "real", "--device", "nonsense"], "nonsense"),
    (["--samples", "samples", "--reference", "other.safetensors"], "features of another network and size"),
    (["--samples", "samples", "--reference", "damaged.safetensors"], "holds no features that evaluate.py saved"),
    (["--samples", "samples", "--reference", "statistics.npz"], "statistics only"),
    (["--samples", "samples", "--reference", "real", "--training", "statistics.npz"], "no npz with pictures in arr_0"),
])
def test_wrong_values_get_one_line_and_nothing_is_written(arguments, named, sets, tmp_path, monkeypatch, capsys):
    if "inception" in arguments:
        monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    monkeypatch.chdir(sets)
    monkeypatch.setattr("nets.features.extract", lambda *_, **__: pytest.fail("pictures were judged"))
    save_features(sets / "other.safetensors", make_features("", torch.rand(60, 4)), {"network": "another", "size": "8x8"})
    (sets / "damaged.safetensors").write_bytes(b"damaged")
    np.savez(sets / "statistics.npz", mu=np.zeros(4), sigma=np.eye(4))
    (sets / "few").mkdir(exist_ok=True)
    for index, (_, picture) in enumerate(blurred(2, 0)):
        picture.save(sets / f"few/{index}.png")
    assert run(*arguments, "--output", tmp_path / "out") == 2
    assert named in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()


def test_fashion_mnist_as_reference_has_its_training_set_for_neighbours(fashion_mnist, sets, tmp_path):
    """The command of the README, on drawn pictures; the training set's are other ones than the test set's here."""
    (data := tmp_path / "data").mkdir()
    for path in fashion_mnist.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    turned = read_fashion_mnist(fashion_mnist, "train")[0][:, 0, 2:30, 2:30].flip(2).numpy()
    with gzip.open(data / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">IIII", 2051, 30, 28, 28) + np.ascontiguousarray(turned).tobytes())
    assert run("--samples", sets / "samples", "--reference", data, "--output", tmp_path / "out") == 0
    medians = json.loads((tmp_path / "out/metrics.json").read_text())["nearest"]
    extractor = FeatureExtractor(ROOT / "model_data/fashion-mnist-classifier")
    test, known = (extractor(read_fashion_mnist(data, split)[0].expand(-1, 3, -1, -1))[0]
                   for split in ("test", "train"))
    assert medians["reference"] == pytest.approx(nearest(test, known)[0].median().item(), rel=1e-4)
    assert medians["reference"] > 0


def test_sixty_pictures_without_classes_and_classes_that_the_parts_lack(sets, tmp_path):
    flat, few = tmp_path / "flat-1.5", tmp_path / "few"
    for index, (_, picture) in enumerate(blurred(60, 5)):
        for path in (flat / f"{index}.png", few / f"{'bag' if index else 'coat'}" / f"{index}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    classifier = ROOT / "model_data/fashion-mnist-classifier"
    assert run("--samples", flat, "--reference", sets / "real", "--features", classifier) == 0
    assert (tmp_path / "flat-1.5-evaluation/report.md").is_file()
    assert run("--samples", few, "--reference", sets / "real", "--features", classifier) == 0
    assert np.asarray(Image.open(tmp_path / "few-evaluation/samples.png")).shape == (8 * 84, 2 * 68, 3)


@pytest.mark.parametrize("of", ["--samples", "--reference", "--training"])
@pytest.mark.parametrize("output", ["real", "real/report"])
def test_a_report_inside_a_set_of_pictures_is_refused(sets, capsys, of, output):
    before = sorted((sets / "real").iterdir())
    others = {"--samples": sets / "samples", "--reference": sets / "samples", of: sets / "real"}
    assert run(*(part for option in others.items() for part in option), "--output", sets / output, "--features",
               ROOT / "model_data/fashion-mnist-classifier") == 2
    assert f"{sets / output} is inside {sets / 'real'}, whose" in capsys.readouterr().err
    assert sorted((sets / "real").iterdir()) == before


def test_a_report_that_cannot_be_written_is_refused_before_the_work(sets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nets.features.extract", lambda *_, **__: pytest.fail("pictures were judged"))
    (tmp_path / "file").touch()
    assert run("--samples", sets / "samples", "--reference", sets / "real", "--output", tmp_path / "file/report") == 2
    assert f"{tmp_path / 'file'} is no folder that can be written to" in capsys.readouterr().err


def test_samples_and_a_reference_are_asked_for(capsys):
    for arguments in (["--samples", "x"], ["--reference", "x"], ["--samples", "x", "--reference", "y", "--halves"]):
        with pytest.raises(SystemExit) as caught:
            run(*arguments)
        assert caught.value.code == 2
