"""nets/metrics.py against torchmetrics on pictures, closed forms and brute force."""

import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from nets.features import make_features
from nets.metrics import (
    compare,
    frechet_distance,
    inception_score,
    inside,
    kernel_distance,
    match_classes,
    nearest,
    neighbour_radii,
    spread,
)


def normal(count, dim=6, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(features):
    return features.mean(0), features.T.cov()


def exactly(count, mean, variances, seed=0):
    """Features whose mean and covariance are these, and not just in expectation."""
    sample = normal(count, len(mean), seed)
    sample = sample - sample.mean(0)
    white = sample @ torch.linalg.inv(torch.linalg.cholesky(sample.T.cov()).T)
    return white * torch.tensor(variances, dtype=torch.float64).sqrt() + torch.tensor(mean, dtype=torch.float64)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    first, second = exactly(200, [0, 1, 2], [1, 4, 9]), exactly(300, [1, 1, 5], [4, 1, 9], seed=1)
    expected = (1 + 0 + 9) + (2 - 1) ** 2 + (1 - 2) ** 2 + 0  # gap of the means, and of the standard deviations
    assert frechet_distance(first, *moments(second)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(first, *moments(first)) == pytest.approx(0, abs=1e-9)


def test_what_is_no_number_is_no_distance():
    features, (mean, covariance) = normal(50), moments(normal(50, seed=1))
    broken = features.clone()
    broken[3, 2] = float("nan")
    for arguments in ((broken, mean, covariance), (features, mean * float("nan"), covariance),
                      (features * 1e200, mean, covariance)):
        with pytest.raises(ValueError, match=r"no finite numbers|too large"):
            frechet_distance(*arguments)
    with pytest.raises(ValueError, match="features of 6 numbers a picture and statistics of 5"):
        frechet_distance(features, mean[:5], covariance[:5, :5])


def test_too_few_pictures_are_said():
    with pytest.raises(ValueError, match="3 pictures are too few for precision and recall"):
        neighbour_radii(normal(3))
    assert nearest(normal(5), normal(2, seed=1), 4)[0].shape == (5, 2)


def test_frechet_distance_of_correlated_features_is_scipys():
    first, second = normal(500) @ normal(6, seed=1), normal(400, seed=2) + 1
    (mean, covariance), (other_mean, other) = moments(first), moments(second)
    root = scipy.linalg.sqrtm(covariance.numpy() @ other.numpy()).real
    expected = (mean - other_mean).square().sum() + covariance.trace() + other.trace() - 2 * np.trace(root)
    assert frechet_distance(first, other_mean, other) == pytest.approx(expected.item(), rel=1e-6)


class Network(torch.nn.Module):
    """A stand-in for Inception: random features of pictures."""

    num_features = 12

    def forward(self, pictures):
        weights = normal(3 * 8 * 8, 12, seed=5).float()
        return (pictures.flatten(1).float() / 255) @ weights


def pictures(count, seed, brightest=256):
    return torch.randint(0, brightest, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.filterwarnings("ignore:Metric")
def test_the_numbers_are_torchmetrics_own_on_the_same_pictures():
    real, fake, network = pictures(1500, 0), pictures(1200, 1, brightest=230), Network()
    theirs = FrechetInceptionDistance(network)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    assert frechet_distance(network(fake), *moments(network(real).double())) == pytest.approx(
        theirs.compute().item(), rel=1e-4)
    theirs = KernelInceptionDistance(network, subset_size=1000)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    torch.manual_seed(0)
    assert kernel_distance(network(fake), network(real)) == pytest.approx(theirs.compute()[0].item(), rel=1e-4)
    theirs = InceptionScore(network)
    theirs.update(fake)
    torch.manual_seed(0)
    assert inception_score(network(fake)) == pytest.approx(theirs.compute()[0].item(), rel=1e-4)


def test_the_kernel_distance_is_the_polynomial_kernels():
    first, second = normal(40, 5), normal(40, 5, seed=1) + 0.5

    def kernel(a, b):
        return (a @ b.T / 5 + 1) ** 3

    off_diagonal = 1 - torch.eye(40, dtype=torch.float64)
    expected = ((kernel(first, first) + kernel(second, second)) * off_diagonal).sum() / (40 * 39) \
        - 2 * kernel(first, second).mean()
    assert kernel_distance(first, second) == pytest.approx(expected.item(), rel=1e-6)  # every subset is the whole set


def test_the_inception_score_of_certain_balanced_answers_is_the_number_of_classes():
    logits = torch.eye(10).mul(1000).repeat(1000, 1)
    assert inception_score(logits) == pytest.approx(10, rel=0.01)
    assert inception_score(torch.zeros(100, 10)) == pytest.approx(1, rel=1e-6)


def test_nothing_disturbs_the_callers_random_numbers_or_warns():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel_distance(normal(50), normal(50))
        inception_score(normal(50))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_are_brute_forces(neighbours):
    real, fake = normal(60, 4) + 100, normal(50, 4, seed=1) * 1.5 + 100

    def distance(a, b):
        return sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist())) ** 0.5

    def brute_force(points, others):
        radii = [sorted(distance(a, b) for position, b in enumerate(others) if position != index)[neighbours - 1]
                 for index, a in enumerate(others)]
        return [any(distance(point, other) <= radius for other, radius in zip(others, radii)) for point in points]

    for points, others in ((fake, real), (real, fake)):
        found = inside(points, others, neighbour_radii(others, neighbours))
        assert found.tolist() == brute_force(points, others)
        assert 0 < found.double().mean() < 1


def test_the_nearest_of_a_picture_that_is_there_is_itself():
    known = normal(700)
    distances, indices = nearest(known[[3, 650]], known, 2)
    assert indices[:, 0].tolist() == [3, 650] and distances[:, 0].max() < 1e-6
    brute = (known - known[3]).square().sum(1).sqrt().sort()
    assert indices[0, 1] == brute.indices[1] and distances[0, 1] == pytest.approx(brute.values[1].item())


def test_spread_is_the_variance_within_classes_alone():
    labels = torch.arange(1000) % 10
    found = spread(normal(1000, 4) * 3 + 100 * labels[:, None], labels)
    assert list(found) == list(range(10)) and np.mean(list(found.values())) == pytest.approx(9, rel=0.1)
    assert list(spread(normal(3), torch.tensor([0, 0, 1]))) == [0]


def test_classes_are_matched_by_name_and_else_as_they_are():
    labels = torch.tensor([0, 1, 2, 3])
    names = {0: "bag", 1: "crane", 2: "T-shirt, top"}
    others = {0: "tshirt", 1: "Bag", 2: "crane", 3: "crane", 4: "T-shirt, top"}
    assert match_classes(labels, names, others).tolist() == [1, -1, 4, -1]
    assert match_classes(labels, {1: "crane"}, {0: "crane", 1: "crane"}).tolist() == [-1, 1, -1, -1]
    assert match_classes(labels, None, others).tolist() == match_classes(labels, names, None).tolist() == [0, 1, 2, 3]
    assert match_classes(torch.tensor([1, 5, 99]), None, others).tolist() == [1, -1, -1]


NAMES = {0: "bag", 1: "coat", 2: "dress"}


def classified(count, seed, mistakes=0, names=NAMES):
    """Features around a place a class, and a classifier's logits, wrong for so many of class 1."""
    labels = torch.arange(count) % 3
    logits = torch.nn.functional.one_hot(labels, 3).double() * 5
    for index in range(1, 3 * mistakes, 3):
        logits[index] = torch.tensor([0., 0., 9.])
    return make_features("", normal(count, 4, seed) + 20 * labels[:, None], logits, labels, names)


def test_the_comparison_has_all_figures_and_five_parts_of_each():
    samples, reference = classified(300, 0, mistakes=20), classified(240, 1)
    figures, classes = compare(samples, reference, NAMES)
    assert list(figures) == ["frechet_distance", "kernel_distance", "inception_score", "precision", "recall",
                             "class_accuracy", "spread"]
    assert figures["class_accuracy"]["value"] == pytest.approx(280 / 300)
    assert all(len(figure["parts"]) == 5 for figure in figures.values())
    assert np.mean(figures["class_accuracy"]["parts"]) == pytest.approx(280 / 300)
    assert figures["spread"]["value"] == pytest.approx(1, abs=0.1)
    assert figures["frechet_distance"]["value"] == pytest.approx(
        frechet_distance(samples.features, reference.mean, reference.covariance))
    assert classes[0]["name"] == "coat" and classes[0]["accuracy"] == pytest.approx(0.8)
    assert classes[0]["taken_for"] == "dress" and classes[1]["taken_for"] is None
    assert sum(row["count"] for row in classes) == 300


def test_each_figure_compares_samples_with_the_reference():
    """Samples that are few of the real ones, moved a little: precise, with little recall, and no two figures alike."""
    generator = torch.Generator().manual_seed(3)
    real = torch.randn(400, 4, generator=generator)
    fake = real[real[:, 0] > 0.5] + 0.02
    samples, reference = make_features("", fake, fake * 3), make_features("", real)
    figures = {name: figure["value"] for name, figure in compare(samples, reference)[0].items()}
    assert figures["precision"] > 0.9 and 0.1 < figures["recall"] < 0.6
    assert figures["precision"] == inside(fake, real, neighbour_radii(real)).double().mean()
    assert figures["recall"] == inside(real, fake, neighbour_radii(fake)).double().mean()
    assert figures["inception_score"] == pytest.approx(inception_score(fake * 3), rel=0.02)
    assert figures["kernel_distance"] == pytest.approx(kernel_distance(fake, real), rel=0.2)
    assert figures["kernel_distance"] > 5 * abs(kernel_distance(real, real))


def test_the_parts_of_balanced_classes_have_all_classes():
    figures, _ = compare(classified(300, 0), classified(300, 1), NAMES)
    assert max(figures["frechet_distance"]["parts"]) < 60  # one class alone is 200 and more away


def test_what_is_not_known_is_left_out():
    samples, reference = classified(300, 0), classified(240, 1)
    bare = make_features("", reference.features)
    assert "spread" not in compare(samples, bare, NAMES)[0] and "class_accuracy" in compare(samples, bare, NAMES)[0]
    reference.features = None
    assert list(compare(samples, reference, NAMES)[0]) == ["frechet_distance", "inception_score", "class_accuracy"]
    strangers = {0: "trouser", 1: "shirt", 2: "sandal"}
    figures, classes = compare(samples, bare, strangers)
    assert "class_accuracy" not in figures and "accuracy" not in classes[0]
    figures, classes = compare(make_features("", samples.features), bare)
    assert list(figures) == ["frechet_distance", "kernel_distance", "precision", "recall"] and classes == []


def test_classes_in_another_order_are_matched_for_accuracy_and_spread():
    samples = classified(300, 0)
    turned = {0: "dress", 1: "bag", 2: "coat"}
    samples.logits = samples.logits[:, [2, 0, 1]]
    reference = classified(300, 1)
    reference.labels, reference.class_names = (reference.labels + 1) % 3, turned
    figures, _ = compare(samples, reference, turned)
    assert figures["class_accuracy"]["value"] == 1 and figures["spread"]["value"] == pytest.approx(1, abs=0.1)
