"""nets/features.py: features are the network's own, and what is kept of them is used only while it holds."""

import importlib.util
import resource

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from PIL import Image

from nets.features import (
    FeatureExtractor,
    InceptionFeatures,
    extract,
    load_features,
    load_statistics,
    make_features,
    reference_features,
    save_features,
)
from nets.picture_sets import FASHION_MNIST, open_pictures

CLASSIFIER = ROOT / "model_data/fashion-mnist-classifier"
SIZE = (40, 40)


def noise(count=6, size=40):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def tensor(arrays):
    return torch.from_numpy(arrays).permute(0, 3, 1, 2)


def prepared(arrays, size, mean, std):
    """What a network should get: Pillow's bicubic scaling, then (x / 255 - mean) / std."""
    scaled = [np.asarray(Image.fromarray(array).resize((size, size), Image.Resampling.BICUBIC)) for array in arrays]
    return ((tensor(np.stack(scaled)).float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A tiny DINOv2 folder whose processor would cut the border off."""
    folder = tmp_path_factory.mktemp("networks") / "tiny-dinov2"
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    transformers.Dinov2Model(config).save_pretrained(folder)
    transformers.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, resample=3,
                                      image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return folder


def test_dinov2s_features_are_the_class_token_of_the_whole_picture(dinov2):
    extractor, network = FeatureExtractor(dinov2), transformers.Dinov2Model.from_pretrained(dinov2).eval()
    features, logits = extractor(tensor(noise()))
    with torch.inference_mode():
        expected = network(prepared(noise(), 28, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])).last_hidden_state[:, 0]
    assert features.shape == (6, 16) and logits is None and extractor.id2label is None
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["ResNet", "ViT", "ConvNext"])
def test_a_classifiers_features_are_what_enters_its_last_layer(kind, tmp_path):
    torch.manual_seed(0)
    options = {"ResNet": dict(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"),
               "ViT": dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32),
               "ConvNext": dict(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2)}[kind]
    config = getattr(transformers, f"{kind}Config")(num_labels=7, **options)
    network = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    network.save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}, resample=3, image_mean=[0.5] * 3,
                                      image_std=[0.25] * 3).save_pretrained(tmp_path)
    extractor = FeatureExtractor(tmp_path)
    features, logits = extractor(tensor(noise()))
    head = network.classifier[-1] if kind == "ResNet" else network.classifier
    with torch.inference_mode():
        expected = network(prepared(noise(), 32, [0.5] * 3, [0.25] * 3)).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(head(features), logits, atol=1e-5, rtol=1e-5)
    assert features.shape == (6, 12) and len(extractor.id2label) == 7


def test_the_shipped_classifier_sees_pictures_from_minus_one_to_one():
    extractor = FeatureExtractor(CLASSIFIER)
    network = transformers.AutoModelForImageClassification.from_pretrained(CLASSIFIER).eval()
    arrays = noise(size=32)
    features, logits = extractor(tensor(arrays))
    with torch.inference_mode():
        torch.testing.assert_close(logits, network(tensor(arrays).float() / 127.5 - 1).logits, atol=1e-4, rtol=1e-4)
    assert extractor.id2label == FASHION_MNIST and features.shape == (6, 96)


def test_the_mark_tells_networks_and_preprocessing_apart(dinov2, tmp_path):
    mark = FeatureExtractor(dinov2).mark
    assert FeatureExtractor(dinov2).mark == mark
    for change in ("weights", "preprocessing"):
        network = transformers.Dinov2Model.from_pretrained(dinov2)
        processor = transformers.AutoImageProcessor.from_pretrained(dinov2, backend="pil")
        if change == "weights":
            network.layernorm.bias.data[0] = 1
        else:
            processor.image_mean = [0.5, 0.5, 0.6]
        network.save_pretrained(tmp_path / change)
        processor.save_pretrained(tmp_path / change)
        assert FeatureExtractor(tmp_path / change).mark != mark


def test_a_network_that_cannot_be_had_or_is_not_whole_is_said_in_one_line(dinov2, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = transformers.AutoConfig.from_pretrained(dinov2)
    config.architectures = ["Dinov2ForImageClassification"]
    transformers.Dinov2Model.from_pretrained(dinov2).save_pretrained(tmp_path / "headless")
    config.save_pretrained(tmp_path / "headless")
    (tmp_path / "headless/preprocessor_config.json").write_text((dinov2 / "preprocessor_config.json").read_text())
    (tmp_path / "bare").mkdir()
    clip = transformers.CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    transformers.CLIPVisionModel(clip).save_pretrained(tmp_path / "clip")
    (tmp_path / "clip/preprocessor_config.json").write_text((dinov2 / "preprocessor_config.json").read_text())
    for name, error, named in ((tmp_path / "clip", ValueError, "features are those of image classifiers and of DINOv2"),
                               ("facebook/dinov2-none", OSError, "facebook/dinov2-none"),
                               (tmp_path / "bare", OSError, "bare"),
                               (tmp_path / "headless", ValueError, "missing: .*classifier")):
        with pytest.raises(error, match=named) as caught:
            FeatureExtractor(name)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_without_torch_fidelity_inception_says_what_it_needs():
    with pytest.raises(ImportError, match="need torch-fidelity, which needs torchvision: pip install torch-fidelity"):
        InceptionFeatures()


class Counting(torch.nn.Module):
    """A network that counts the pictures it is shown; its features are the means of the colours."""

    name, id2label, mark = "counting", None, "1"

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, pictures):
        self.seen += len(pictures)
        return pictures.float().mean((2, 3)), pictures.float().mean((2, 3))[:, :2]


@pytest.fixture
def folder(tmp_path):
    for index, array in enumerate(noise(6)):
        path = tmp_path / "pictures" / ("bag", "coat")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return tmp_path / "pictures"


def test_features_of_all_pictures_in_batches(folder):
    def progress(starts):
        shown.append(len(starts))
        return starts

    pictures, shown = open_pictures(folder), []
    features = extract(Counting(), pictures, SIZE, progress, batch_size=4)
    exact = tensor(noise(6))[[0, 2, 4, 1, 3, 5]].float().mean((2, 3))
    torch.testing.assert_close(features.features, exact)
    torch.testing.assert_close(features.mean, exact.double().mean(0))
    torch.testing.assert_close(features.covariance, exact.double().T.cov())
    assert shown == [2] and len(features) == 6 and features.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert features.class_names == {0: "bag", 1: "coat"} and features.logits.shape == (6, 2)


def test_too_little_memory_on_a_gpu_is_said_in_one_line(folder):
    class Full:
        name, device = "network", "cuda:0"

        def __call__(self, pictures):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    with pytest.raises(ValueError, match=r"^cuda:0 has too little free memory for 100 pictures at a time in network; take"):
        extract(Full(), open_pictures(folder), (8, 8))


def test_reference_features_are_kept_beside_the_data_and_read_from_there(folder):
    network = Counting()
    first, pictures, how = reference_features(folder, network, SIZE)
    kept = folder.with_name("pictures.test.counting-40x40.safetensors")
    assert network.seen == 6 and kept.is_file() and str(kept) in how and how.startswith("computed")
    second, again, how = reference_features(folder, network, SIZE)
    assert network.seen == 6 and how == f"kept in {kept}" and again.count == pictures.count == 6
    for name, value in vars(first).items():
        found = vars(second)[name]
        assert torch.equal(value, found) if isinstance(value, torch.Tensor) else value == found, name
    third, none, how = reference_features(kept, network, SIZE)  # the file itself, without the pictures
    assert torch.equal(third.features, first.features) and none is None and network.seen == 6


@pytest.mark.parametrize("change", ["picture", "network", "size", "damage"])
def test_what_was_kept_of_other_pictures_or_another_network_is_not_used(change, folder):
    network, size = Counting(), SIZE
    first, _, _ = reference_features(folder, network, size)
    kept = folder.with_name("pictures.test.counting-40x40.safetensors")
    if change == "picture":
        Image.new("RGB", SIZE).save(folder / "bag/0.png")
    if change == "network":
        network.mark = "2"
    if change == "size":
        size = (20, 20)
    if change == "damage":
        kept.write_bytes(kept.read_bytes()[:60])
    if change in ("network", "size"):
        with pytest.raises(ValueError, match=f"features of another {change}; name the pictures instead"):
            reference_features(kept, network, size)
    second, _, how = reference_features(folder, network, size)
    assert network.seen == 12 and how.startswith("computed" if change == "size" else "computed again")
    assert torch.equal(second.features, first.features) == (change in ("network", "damage"))
    assert reference_features(folder, network, size)[2].startswith("kept in") and network.seen == 12


def test_where_nothing_can_be_kept_it_is_said(folder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as on a disk that is full
        features, _, how = reference_features(folder, Counting(), SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert how.startswith("computed, and not kept: cannot write") and "File too large" in how and len(features) == 6
    assert [path.name for path in folder.parent.iterdir()] == ["pictures"]


def test_a_file_of_kept_features_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def stops(*_):
        raise OSError("stopped")
    features = make_features("x", torch.rand(4, 3))
    monkeypatch.setattr("nets.loading.os.replace", stops)
    with pytest.raises(OSError, match="stopped"):
        save_features(tmp_path / "a.safetensors", features, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut off"])
def test_a_damaged_npz_as_reference_is_said_in_one_line(content, tmp_path):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz is no npz"):
        reference_features(tmp_path / "a.npz", Counting(), SIZE)


def test_what_is_no_file_of_features_is_said_in_one_line(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"a\.safetensors holds no features"):
        load_features(tmp_path / "a.safetensors")
    with pytest.raises(OSError, match=r"b\.safetensors"):
        load_features(tmp_path / "b.safetensors")


def test_published_statistics_are_taken_as_they_are_for_inceptions_features_alone(tmp_path):
    mean, covariance = np.arange(3.0), np.eye(3) * 2
    np.savez(tmp_path / "statistics.npz", mu=mean, sigma=covariance)
    np.savez(tmp_path / "adm.npz", arr_0=noise(), mu=mean, sigma=covariance, mu_s=mean, sigma_s=covariance)
    inception = Counting()
    inception.name = "inception"
    for network in (Counting(), inception):
        features, pictures, how = reference_features(tmp_path / "adm.npz", network, SIZE)
        assert len(features) == 6 and pictures.count == 6
        assert (features.covariance.tolist() == covariance.tolist()) == (network is inception)
        assert (features.mean.tolist() == [0, 1, 2]) == ("as published" in how) == (network is inception)
    features, pictures, how = reference_features(tmp_path / "statistics.npz", inception, SIZE)
    assert features.covariance.tolist() == covariance.tolist() and len(features) == 0 and pictures is None
    with pytest.raises(ValueError, match="statistics only"):
        reference_features(tmp_path / "statistics.npz", Counting(), SIZE)
    np.savez(tmp_path / "wrong.npz", mu=mean, sigma=np.eye(2))
    with pytest.raises(ValueError, match="do not belong together"):
        load_statistics(tmp_path / "wrong.npz")
