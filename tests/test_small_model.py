"""bench/small_model.py's measures against closed forms."""

import numpy as np
import pytest
import scipy.linalg
import torch

from bench.small_model import frechet_distance, nearest_sheet, spread, to_pictures


def test_frechet_distance_is_that_of_the_fitted_gaussians():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    first = torch.randn(500, 6, generator=generator, dtype=torch.float64) @ mix
    second = torch.randn(400, 6, generator=generator, dtype=torch.float64) + 1
    root = scipy.linalg.sqrtm(np.cov(first.T.numpy()) @ np.cov(second.T.numpy())).real
    gap = ((first.mean(0) - second.mean(0)) ** 2).sum().item()
    expected = gap + np.trace(np.cov(first.T.numpy())) + np.trace(np.cov(second.T.numpy())) - 2 * np.trace(root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(first, first + 2) == pytest.approx(6 * 4, rel=1e-6)


def test_spread_is_the_variance_within_classes_alone():
    labels = torch.arange(1000) % 10
    features = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    far_apart = features + 100 * labels[:, None]
    assert spread(far_apart, labels) == pytest.approx(9, rel=0.1)


def test_the_nearest_training_picture_of_a_training_picture_is_itself():
    training = torch.rand(50, 1, 32, 32, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).expand(-1, 3, -1, -1)
    sheet = np.asarray(nearest_sheet(training[7:15], training))
    assert np.array_equal(sheet[2:66, 2:66], sheet[2:66, 70:134])
    assert np.array_equal(sheet[2:66:2, 2:66:2], np.asarray(to_pictures(training[7:8])[0]))
