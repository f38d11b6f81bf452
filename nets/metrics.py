"""How far two sets of pictures are apart, computed from their features. The library's metrics are torchmetrics'.

Improved precision and recall (Kynkaanniemi et al. 2019) are ours.
"""

import math
import warnings

import torch
from torch import Tensor

from nets.features import Features
from nets.labels import classes_called, name_index

NEIGHBOURS = 3  # k of improved precision and recall, as in the paper
PARTS = 5  # disjoint parts of the samples, which show the spread of a figure
MOST = 50_000  # pictures of a set, where every pair is compared


def compare(samples: Features, reference: Features, id2label: dict[int, str] | None = None) -> tuple[dict, list[dict]]:
    """All figures that the two sets allow, and a row for each class of the samples, the worst first.

    Figures: name -> {"value": of all samples, "parts": of five disjoint random parts}. `id2label` is of the classifier
    whose logits the samples have; the class accuracy is that of samples whose class it knows.
    """
    right = predicted = known = None
    if samples.logits is not None and id2label and samples.labels is not None:
        predicted, expected = samples.logits.argmax(1), match_classes(samples.labels, samples.class_names, id2label)
        known, right = expected >= 0, predicted == expected
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    real = covered = None
    if len(reference):
        chosen = torch.randperm(len(reference), generator=torch.Generator().manual_seed(0))[:MOST]
        real = reference.features[chosen]
        covered = inside(samples.features, real, neighbour_radii(real))
    real_spread = {}
    if len(reference) and samples.labels is not None and reference.labels is not None:
        labels = match_classes(reference.labels, reference.class_names, samples.class_names)
        found = spread(reference.features[labels >= 0], labels[labels >= 0])
        real_spread = {label: value for label, value in found.items() if value > 0}

    def figures_of(chosen):
        features = samples.features[chosen]
        figures = {"frechet_distance": frechet_distance(features, reference.mean, reference.covariance)}
        if real is not None:
            figures["kernel_distance"] = kernel_distance(features, real)
        if samples.logits is not None:
            figures["inception_score"] = inception_score(samples.logits[chosen])
        if real is not None:
            figures["precision"] = covered[chosen].double().mean().item()
            figures["recall"] = inside(real, features[:MOST], neighbour_radii(features[:MOST])).double().mean().item()
        if known is not None and known[chosen].any():
            figures["class_accuracy"] = right[chosen][known[chosen]].double().mean().item()
        if real_spread:
            own = spread(features, samples.labels[chosen])
            both = [label for label in own if label in real_spread]
            if both:
                figures["spread"] = sum(own[label] for label in both) / sum(real_spread[label] for label in both)
        return figures

    whole, parts = figures_of(order), [figures_of(order[part::PARTS]) for part in range(PARTS)]
    figures = {name: {"value": value, "parts": [part.get(name) for part in parts]} for name, value in whole.items()}
    if samples.labels is None:
        return figures, []
    own_spread, rows = spread(samples.features, samples.labels), []
    for label in samples.labels.unique().tolist():
        mine = samples.labels == label
        row = {"class": label, "name": (samples.class_names or {}).get(label, f"class {label}"), "count": mine.sum().item()}
        if known is not None and known[mine].all():
            wrong = predicted[mine & ~right]
            row["accuracy"] = right[mine].double().mean().item()
            row["taken_for"] = id2label[wrong.mode().values.item()] if len(wrong) else None
        if covered is not None:
            row["precision"] = covered[mine].double().mean().item()
        if label in real_spread and label in own_spread:
            row["spread"] = own_spread[label] / real_spread[label]
        rows.append(row)
    return figures, sorted(rows, key=lambda row: (row.get("accuracy", 1), row.get("precision", 1)))


def match_classes(labels: Tensor, names: dict[int, str] | None, others: dict[int, str] | None) -> Tensor:
    """Class ids (n,) of one set as another calls them: by name if both have names, else as they are; -1 where unknown."""
    if not names or not others:
        return labels if not others else torch.where(torch.isin(labels, torch.tensor(list(others))), labels, -1)
    index, table = name_index(others), {}
    for label in labels.unique().tolist():
        called = classes_called(names[label], index) if label in names else set()
        same = label in others and others[label] == names.get(label)
        table[label] = label if same else called.pop() if len(called) == 1 else -1
    return torch.tensor([table[label] for label in labels.tolist()])


class Given(torch.nn.Module):
    """The "network" for torchmetrics where features are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(features: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """Frechet distance of Gaussians: fitted to features (n, dim), and of this mean (dim,) and covariance (dim, dim).

    Raises ValueError for what is not finite, or of two dimensions.
    Source: Heusel et al. 2017, eq. 6 (arXiv 1706.08500); torchmetrics' `FrechetInceptionDistance`.
    """
    if features.shape[1] != len(mean):
        raise ValueError(f"features of {features.shape[1]} numbers a picture and statistics of {len(mean)} are not of one "
                         "network")
    if not all(tensor.isfinite().all() for tensor in (features, mean, covariance)):
        raise ValueError("some features or statistics are no finite numbers")
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(Given(features.shape[1]))
    metric.update(features.double(), real=False)
    metric.real_features_num_samples += 2  # as if two pictures had that mean and covariance
    metric.real_features_sum += 2 * mean
    metric.real_features_cov_sum += covariance + 2 * mean.outer(mean)
    distance = metric.compute().item()
    if not math.isfinite(distance):
        raise ValueError(f"the Frechet distance is {distance}: the features are too large for it")
    return max(0.0, distance)  # of equal sets rounding may leave -1e-12


def kernel_distance(features: Tensor, reference: Tensor, seed: int = 0) -> float:
    """Kernel distance (KID) of features (n, dim) and (m, dim): the mean over 100 subsets of at most 1,000.

    Source: Binkowski et al. 2018 (arXiv 1801.01401); torchmetrics' `KernelInceptionDistance`.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(1000, len(features), len(reference))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # that it keeps all features in memory
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(Given(features.shape[1]), subset_size=size)
        metric.update(features.double(), real=False)
        metric.update(reference.double(), real=True)
        return metric.compute()[0].item()


def inception_score(logits: Tensor, seed: int = 0) -> float:
    """Inception Score from a classifier's logits (n, classes): the mean over ten parts.

    Source: Salimans et al. 2016 (arXiv 1606.03498); torchmetrics' `InceptionScore`.
    """
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        metric = InceptionScore(Given(logits.shape[1]))
        metric.update(logits.double())
        return metric.compute()[0].item()


def distances(first: Tensor, second: Tensor, rows: int = 512):
    """Euclidean distances of features (n, dim) to (m, dim), as float64 (rows, m), so many rows of the first at a time.

    Both are moved so that the second's mean is the origin, where the fast way to compute them loses the least.
    """
    centre = second.double().mean(0)
    second = second.double() - centre
    for part in first.split(rows):
        yield torch.cdist(part.double() - centre, second)


def neighbour_radii(features: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """The distance of each of the features (n, dim) to its k-th nearest other one: (n,) float64.

    Raises ValueError if there are not so many.
    """
    if len(features) <= neighbours:
        raise ValueError(f"{len(features)} pictures are too few for precision and recall, which look at {neighbours} "
                         "neighbours of each")
    return torch.cat([part.kthvalue(neighbours + 1).values for part in distances(features, features)])


def inside(features: Tensor, others: Tensor, radii: Tensor) -> Tensor:
    """Whether each of the features (n, dim) lies in a ball around one of the others (m, dim) of its radius: (n,) bool.

    The mean over samples in the balls of real pictures is the improved precision, the other way round the recall.
    Source: Kynkaanniemi et al. 2019, eq. 1 and 2 (arXiv 1904.06991).
    """
    return torch.cat([(part <= radii).any(1) for part in distances(features, others)])


def nearest(features: Tensor, others: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Distances and numbers of the `count` nearest others of each of the features: (n, count) each, nearest first."""
    parts = [part.topk(min(count, len(others)), largest=False) for part in distances(features, others)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def spread(features: Tensor, labels: Tensor) -> dict[int, float]:
    """The mean variance of a feature within each class that has at least two pictures."""
    features = features.double()
    return {label: features[labels == label].var(0).mean().item() for label in labels.unique().tolist()
            if (labels == label).sum() > 1}
