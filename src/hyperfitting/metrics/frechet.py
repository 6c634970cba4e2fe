"""Distances between the distributions of two sets of features: Fréchet and kernel.

FID (Heusel et al., 2017) and KID (Bińkowski et al., 2018) if the features are those of Inception.
They compare sets, so they have no value per image and no interval.
"""

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.floating]


def frechet_distance(a: Features, b: Features) -> float:
    """Return |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances.

    It is biased upward, the more the fewer the images: compare only equal numbers of them.

    Args:
        a: (N, D) features.
        b: (M, D) features.

    Returns:
        0 or more, up to rounding; NaN with fewer than two images on a side.
    """
    if min(len(a), len(b)) < 2:
        return float("nan")
    x, y = (
        (values - values.mean(0, dtype=np.float64)) / np.sqrt(len(values) - 1) for values in (a, b)
    )
    # A = x^T x and B = y^T y: the roots of A B's eigenvalues are the singular values of x y^T
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    mean_difference = a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)
    return float(mean_difference @ mean_difference + (x**2).sum() + (y**2).sum() - 2 * cross)


def kernel_distance(a: Features, b: Features) -> float:
    """Return the unbiased squared MMD with the kernel (u·v / D + 1)^3, of all images at once.

    Args:
        a: (N, D) features.
        b: (M, D) features.

    Returns:
        0 on average for two sets of one distribution, so negative at times; NaN with fewer than
        two images on a side.
    """
    if min(len(a), len(b)) < 2:
        return float("nan")
    x, y = a.astype(np.float64), b.astype(np.float64)

    def kernel(u: Features, v: Features) -> Features:
        values: Features = (u @ v.T / u.shape[1] + 1) ** 3
        return values

    def among(u: Features) -> float:
        values = kernel(u, u)
        return float((values.sum() - np.trace(values)) / (len(u) * (len(u) - 1)))

    return among(x) + among(y) - 2 * float(kernel(x, y).mean())
