r"""Subspace methods for complex exponentials: how many, and which frequencies.

From T samples, n = T - L + 1 windows of length L give the covariance

.. math:: R = \frac{1}{2n} (Y Y^H + J \overline{Y Y^H} J),

averaged forwards and backwards (J reverses). With its eigenvalues in descending order,
g and a the geometric and arithmetic mean of the L - k last ones,

.. math::
    \mathrm{MDL}(k) = -n (L - k) \log\frac{g}{a} + \tfrac12 k (2L - k) \log n, \qquad
    \mathrm{AIC}(k) = -2 n (L - k) \log\frac{g}{a} + 2 k (2L - k)

(Wax and Kailath 1985); SORTE takes the k with the least ratio of the variances of the
eigenvalues' gaps from k + 1 and from k on (He et al. 2010). ESPRIT reads frequencies
from the rotation between the first and last L - 1 rows of the signal subspace.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["Subspace"]

_LEAST = 1e-12


class Subspace:
    """Eigenvectors of one record's covariance.

    Args:
        record: Complex or real samples, shape ``(T,)``.
        window: Length L of the windows; half the record if None.
    """

    def __init__(self, record: NDArray, window: int | None = None) -> None:
        self.window = window or len(record) // 2
        windows = np.lib.stride_tricks.sliding_window_view(record, self.window).T
        self.num = windows.shape[1]
        forward = windows @ windows.conj().T
        both = (forward + forward[::-1, ::-1].conj()) / (2 * self.num)
        values, vectors = np.linalg.eigh(both)
        self.values = np.maximum(values[::-1], _LEAST * values[-1])
        self.vectors = vectors[:, ::-1]

    def mdl(self, most: int) -> int:
        """Number of exponentials by minimum description length, up to ``most``."""
        k = np.arange(most + 1)
        penalty = 0.5 * k * (2 * self.window - k) * np.log(self.num)
        return int(np.argmin(self._misfit(most) + penalty))

    def aic(self, most: int) -> int:
        """Number of exponentials by Akaike's criterion, up to ``most``."""
        k = np.arange(most + 1)
        return int(np.argmin(self._misfit(most) + k * (2 * self.window - k)))

    def sorte(self, most: int) -> int:
        """Number of exponentials by SORTE, from 1 to ``most``."""
        gaps = -np.diff(self.values)
        spread = np.array([gaps[k:].var() for k in range(len(gaps) - 1)])
        ratio = spread[1:] / np.maximum(spread[:-1], 1e-300)
        return int(np.argmin(ratio[:most])) + 1

    def esprit(self, k: int) -> NDArray[np.float64]:
        """Frequencies of k exponentials in [-1/2, 1/2), ascending."""
        signal = self.vectors[:, :k]
        rotation = np.linalg.lstsq(signal[:-1], signal[1:], rcond=None)[0]
        turns = np.angle(np.linalg.eigvals(rotation)) / (2 * np.pi)
        return np.sort(turns).astype(np.float64)

    def _misfit(self, most: int) -> NDArray[np.float64]:
        """N (L - k) log(a / g) for k = 0..most."""
        logs = np.log(self.values)
        rest = [self.values[k:] for k in range(most + 1)]
        return np.array(
            [
                self.num * (len(r) * np.log(r.mean()) - logs[k:].sum())
                for k, r in enumerate(rest)
            ]
        )
