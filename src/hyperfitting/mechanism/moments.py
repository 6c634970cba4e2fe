"""Streaming sums of two models' hidden states at one layer, in memory independent of the tokens.

From them follow, over all tokens: the participation ratio of each model's covariance, and the
debiased linear CKA of the two. Intervals by resampling texts would need d x d sums of every text: a
random projection of them is kept instead, whose inner products estimate those of the sums
(`_Sketch`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
SKETCH_SIZE = 64
_SEED = 0
_PAIRS = ((0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1), (0, 0, 1), (0, 1, 1))
"""What is sketched: the scatter of model i (0 base, 1 tuned) and model j, and in which dimensions
(0 all, 1 without outliers), as (i, dimensions, j)."""
N_SKETCHES = len(_PAIRS)
"""(d, d) sums of each text whose projections are kept."""


@dataclass(frozen=True)
class LayerMoments:
    """What is kept of a layer: exact values over all tokens, and what resampling texts needs.

    Traces and Gram matrices are about the mean of all tokens. With `w` counting how often each text
    was drawn, the trace of a resampled covariance is proportional to `w @ trace`, and its squared
    Frobenius norm to about `w @ gram @ w`.
    """

    participation_ratio: Floats
    """(2, 2): of base and tuned; of all dimensions, and without the outlier ones."""
    cka: Floats
    """(2,): debiased linear CKA of base and tuned; of all dimensions, and without outliers."""
    trace: Floats
    """(2, 2, N): of each text's scatter matrix; base and tuned, all dimensions and without
    outliers."""
    gram: Floats
    """(2, 2, N, N): estimated inner products of the texts' scatter matrices, likewise."""
    cross_gram: Floats
    """(2, N, N): of the texts' cross-scatter matrices of base and tuned; all dimensions and without
    outliers."""


class PairMoments:
    """Sums over tokens of base states x and tuned states y, updated batch by batch.

    Args:
        n_texts: N.
        centers: (2, d) about the means of base and tuned, subtracted from all states before they
            are summed. Every result is invariant to them, but not its rounding.
        keep: (d,) booleans, False for outlier dimensions.
        device: of the sums.
    """

    def __init__(self, n_texts: int, centers: Tensor, keep: Tensor, device: torch.device) -> None:
        d = len(keep)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._centers = centers.to(device, torch.float32)
        self.keep = keep.to(device)
        self._sketch = _Sketch(n_texts, d, self.keep, device)
        self._count = zeros(n_texts)  # tokens by text
        self._sums = zeros(2, n_texts, d)
        self._scatter = zeros(3, d, d)  # x'x, y'y, x'y
        # norms are of all dimensions, then without outliers
        self._squares = zeros(2, 2, n_texts)  # sum of |a|^2 for a in (x, y)
        # debiasing: sum of |a|^2 b, and of |a|^2 |b|^2, for a, b in (x, y)
        self._weighted = zeros(2, 2, 2, d)
        self._norm_products = zeros(2, 2, 2)

    def update(self, texts: slice, base: Tensor, tuned: Tensor, mask: Tensor) -> None:
        """Add the tokens of some texts; all tensors are on the device of the sums.

        If memory runs out, nothing has been added.

        Args:
            texts: which they are.
            base: (B, T, d) states.
            tuned: (B, T, d) states.
            mask: (B, T) booleans, True for the tokens that count.
        """
        weight = mask.float().unsqueeze(-1)
        states = [
            (states.float() - center).mul_(weight)
            for states, center in zip((base, tuned), self._centers, strict=True)
        ]
        parts = [split_outliers(s, self.keep) for s in states]
        self._sketch.update(texts, parts)
        self._count[texts] = weight.double().sum((1, 2))
        self._sums[:, texts] = torch.stack([s.sum(1) for s in states]).double()
        trimmed = torch.stack([squared_norms(inner) for inner, _ in parts])  # (2, B, T)
        full = trimmed + torch.stack([squared_norms(outer) for _, outer in parts])
        norms = torch.stack([full, trimmed])
        self._squares[:, :, texts] = norms.sum(3)
        norms = norms.flatten(2)  # (2, 2, B * T)
        flat = [s.flatten(0, 1) for s in states]  # (B * T, d)
        scatter = [flat[a].T @ flat[b] for a, b in ((0, 0), (1, 1), (0, 1))]
        weighted = [norms.float() @ flat[b] for b in (0, 1)]  # (2, 2, d)
        norm_products = norms @ norms.mT
        # in place, without more memory; what is above is the same if it is repeated
        for index in range(3):
            self._scatter[index] += scatter[index]
        for b in (0, 1):
            self._weighted[:, :, b] += weighted[b]
        self._norm_products += norm_products

    def finish(self) -> LayerMoments:
        """Return the results over everything that was added."""
        n = self._count.sum()
        means = self._sums.sum(1) / n  # (2, d)
        # sum of |x - m|^2 over a text
        keep = torch.stack([torch.ones_like(self.keep), self.keep]).double()  # (2, d)
        cross = torch.einsum("and,ad,kd->kan", self._sums, means, keep)
        offset = torch.einsum("ad,kd->ka", means.square(), keep)[..., None] * self._count
        trace = self._squares - 2 * cross + offset  # (2, 2, N): dimensions, model
        covariance = self._scatter[:2] / n - means[:, :, None] * means[:, None, :]
        ratios = [
            [participation_ratio(c), participation_ratio(c[self.keep][:, self.keep])]
            for c in covariance
        ]
        grams = self._sketch.grams(self._count, means)
        return LayerMoments(
            participation_ratio=np.array(ratios),
            cka=np.array([self._cka(dims) for dims in (0, 1)]),
            trace=trace.transpose(0, 1).cpu().numpy(),
            gram=grams[:4].reshape(2, 2, *grams.shape[1:]),
            cross_gram=grams[4:],
        )

    def _cka(self, dims: int) -> float:
        xx, yy, xy = (self._hsic(dims, a, b) for a, b in ((0, 0), (1, 1), (0, 1)))
        return float(xy / (xx * yy).sqrt()) if float(xx) > 0 and float(yy) > 0 else float("nan")

    def _hsic(self, dims: int, a: int, b: int) -> Tensor:
        """Return the unbiased HSIC of linear kernels (Song et al., 2012) of two models.

        With K and L the kernel matrices of all tokens without their diagonals, each of its terms
        is a function of the sums: tr(KL), 1'K1 1'L1 and 1'KL1. Without the factor 1 / (n (n - 3)),
        which CKA does not depend on.
        """
        n = self._count.sum()
        keep = self.keep if dims else torch.ones_like(self.keep)
        scatter = (self._scatter[2] if a != b else self._scatter[a])[keep][:, keep]
        sums, products = self._sums.sum(1)[:, keep], self._norm_products[dims, a, b]
        weighted = self._weighted[dims][..., keep]  # (2, 2, d)
        totals = [sums[i] @ sums[i] - self._squares[dims, i].sum() for i in (a, b)]  # 1'K1
        trace = scatter.square().sum() - products
        middle = sums[a] @ scatter @ sums[b] + products
        middle -= sums[a] @ weighted[b, a] + sums[b] @ weighted[a, b]
        return trace + totals[0] * totals[1] / ((n - 1) * (n - 2)) - 2 * middle / (n - 2)


def participation_ratio(covariance: Tensor) -> float:
    """Return (sum of eigenvalues)^2 / (sum of their squares) of a covariance matrix (d, d).

    The "effective dimension" of Li et al. (ICML 2026): d for equal eigenvalues, 1 for a single one.
    """
    return float(covariance.trace().square() / covariance.square().sum())


def split_outliers(states: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return states with 0 in the outlier dimensions, and these dimensions alone.

    What is measured of both is added up where all dimensions count. The other way round, without
    outliers as all less theirs, would cancel: outliers can carry nearly all of a norm.

    Args:
        states: (B, T, d).
        keep: (d,) booleans, False for outlier dimensions.
    """
    return states * keep, states[..., ~keep]


def squared_norms(states: Tensor) -> Tensor:
    """Return the squared L2 norms (B, T) of states (B, T, d) in float64."""
    norms: Tensor = torch.linalg.vector_norm(states, dim=-1)
    return norms.double().square()


class _Sketch:
    """Random projections of each text's scatter matrices.

    Of a scatter matrix S of a text it keeps U'SV (k, k), with U and V independent (d, k) matrices
    of signs over sqrt(k). The inner product of two such projections has the inner product of the
    matrices themselves as its expectation. Only ratios of their sums are used, for intervals: there
    the error of the projection largely cancels.
    """

    def __init__(self, n_texts: int, d: int, keep: Tensor, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(_SEED)
        k = SKETCH_SIZE
        signs = torch.randint(0, 2, (2, d, k), generator=generator).float() * 2 - 1
        self._projections = (signs / k**0.5).movedim(0, 1).flatten(1).to(device)  # (d, 2 * k)
        self._keep = keep
        self._scatter = torch.zeros(len(_PAIRS), n_texts, k, k, device=device)
        self._sums = torch.zeros(2, 2, n_texts, 2, k, device=device)  # model, dims, U or V

    def update(self, texts: slice, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add the centered states of some texts: of each model as `split_outliers` gives them."""
        projected = []
        for model, (inner, outer) in enumerate(parts):
            trimmed = inner @ self._projections  # (B, T, 2 * k)
            full = trimmed + outer @ self._projections[~self._keep]
            projected.append([p.unflatten(-1, (2, -1)) for p in (full, trimmed)])
            for dims in (0, 1):
                self._sums[model, dims, texts] = projected[model][dims].sum(1)  # (B, 2, k)
        for scatter, (left, dims, right) in zip(self._scatter, _PAIRS, strict=True):
            u, v = projected[left][dims][..., 0, :], projected[right][dims][..., 1, :]
            scatter[texts] = u.mT @ v  # (B, k, k)

    def grams(self, count: Tensor, means: Tensor) -> Floats:
        """Return the inner products (6, N, N) of the texts' scatter matrices about the mean, each
        of `_PAIRS`.

        Args:
            count: (N,) tokens of each text.
            means: (2, d) of base and tuned states, over all tokens.
        """
        grams = []
        for scatter, (left, dims, right) in zip(self._scatter, _PAIRS, strict=True):
            counted = self._keep if dims else torch.ones_like(self._keep)
            projected = (means * counted).float() @ self._projections  # (2, 2 * k)
            mean_u, mean_v = projected[left, :SKETCH_SIZE], projected[right, SKETCH_SIZE:]
            sum_u, sum_v = self._sums[left, dims, :, 0], self._sums[right, dims, :, 1]  # (N, k)
            about_mean = (
                scatter
                - sum_u[:, :, None] * mean_v
                - mean_u[:, None] * sum_v[:, None, :]
                + count.float()[:, None, None] * (mean_u[:, None] * mean_v)
            ).flatten(1)  # (N, k * k)
            grams.append((about_mean @ about_mean.T).double().cpu().numpy())
        return np.stack(grams)
