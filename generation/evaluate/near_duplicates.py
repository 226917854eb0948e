"""Near-duplicates among synthetic volumes: mode collapse, without any training data.

Works on vectors ``(n, d)`` and Pearson's correlation, as the audit of memorisation does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from generation.errors import EvaluationError
from generation.evaluate.vectors import Match, Share, correlations, unit, upper_quantile

if TYPE_CHECKING:
    from numpy.typing import NDArray


def near_duplicates(samples: Tensor, threshold: float, *, centre: Tensor | None = None,
                    worst: int = 16) -> tuple[Share, tuple[Match, ...]]:  # fmt: skip
    """Synthetic samples with a near-duplicate among the others: mode collapse.

    Needs no training data.

    Parameters
    ----------
    samples
        Vectors ``(n, d)`` of synthetic samples, at least 2.
    threshold
        Correlation above which two are near-duplicates: from :func:`altered_threshold`, or from
        real samples by :func:`fresh_threshold`.
    centre
        What to take away, ``(d,)``: the mean of real samples. The mean of the samples themselves
        would hide a collapse.
    worst
        How many pairs to return.

    Returns
    -------
    tuple
        Samples with a near-duplicate, and the most similar pairs, each once.

    Raises
    ------
    EvaluationError
        Fewer than 2 samples, or vectors that are not finite or are constant.
    """
    alike = _among(samples, centre)
    pairs = np.where(np.tri(len(alike), dtype=np.bool_), -np.inf, alike)
    most = np.argsort(-pairs, axis=None, kind="stable")[
        : min(worst, len(alike) * (len(alike) - 1) // 2)
    ]
    rows, columns = np.unravel_index(most, pairs.shape)
    found = (Match(int(i), int(j), float(pairs[i, j])) for i, j in zip(rows, columns, strict=True))
    return Share.counted(alike.max(1) > threshold), tuple(found)


def fresh_threshold(real: Tensor, *, level: float = 0.95, centre: Tensor | None = None) -> float:
    """Correlation with its closest other that a share ``level`` of real samples stay within.

    Take as many as there are synthetic samples: the closest of more is closer.
    """
    return upper_quantile(_among(real, centre).max(1), level)


def altered_threshold(
    samples: Tensor, altered: Tensor, *, level: float = 0.95, centre: Tensor | None = None
) -> float:
    """Correlation with its own slightly altered copy that a share ``level`` of samples exceed.

    Parameters
    ----------
    samples, altered
        Vectors ``(n, d)`` of volumes, and of the same volumes after a small change.
    level
        The share.
    centre
        What to take away, ``(d,)``.
    """
    if samples.shape != altered.shape:
        raise EvaluationError(
            f"found {tuple(altered.shape)} altered vectors of {tuple(samples.shape)}; "
            "expected one of each sample"
        )
    alike = (unit(samples, centre) * unit(altered, centre)).sum(1).numpy()
    return float(np.quantile(alike, 1 - level, method="lower"))


def _among(samples: Tensor, centre: Tensor | None) -> NDArray[np.float32]:
    if samples.ndim != 2 or len(samples) < 2:
        raise EvaluationError(
            f"found vectors of shape {tuple(samples.shape)}, expected (n, d) with n of 2 or more"
        )
    standard = unit(samples, centre)
    alike = correlations(standard, standard)
    np.fill_diagonal(alike, -np.inf)
    return alike
