"""UniRes (Brudfors et al. 2019): super-resolution of thick slices, where somebody installed it.

The published scans went through it (Pinaya et al. 2022). It is not on PyPI:
``pip install git+https://github.com/brudfors/UniRes``. Of what it can do only the reconstruction at
1 mm is used; where the head lies stays as the file says, for the registration that follows.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from generation.template import Image, Matrix

PACKAGE = "unires"


class ReconstructionError(RuntimeError):
    """UniRes could not make an image of a scan."""


def version() -> str | None:
    """The version that is installed; None where there is none."""
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def reconstruct(voxels: Image, affine: Matrix) -> tuple[Image, NDArray[np.float64]]:
    """A scan as it would be with voxels of 1 mm.

    Parameters
    ----------
    voxels
        ``(x, y, z)`` intensities.
    affine
        ``(4, 4)`` voxel to world, mm, RAS.

    Returns
    -------
    tuple
        Voxels and affine, in the same world.

    Raises
    ------
    ReconstructionError
        UniRes failed, or gave back no finite image.
    """
    import torch
    from unires.run import preproc  # type: ignore[import-not-found]
    from unires.struct import settings  # type: ignore[import-not-found]

    asked = settings()
    asked.vx, asked.write_out, asked.do_print = 1.0, False, 0
    asked.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scan = torch.as_tensor(voxels, dtype=torch.float32, device=asked.device)
    world = torch.as_tensor(affine, dtype=torch.float32, device=asked.device)
    try:
        with torch.no_grad():
            made, matrix, _ = preproc([[scan, world]], asked)
    except Exception as error:  # of a package that documents none
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ReconstructionError(f"UniRes failed: {reason}") from None
    image = made.detach().float().cpu().numpy()
    image = image[..., 0] if image.ndim == 4 else image
    if image.ndim != 3 or not np.isfinite(image).all():
        raise ReconstructionError(
            f"UniRes gave {image.shape} voxels, expected three dimensions of finite numbers"
        )
    return image, matrix.detach().double().cpu().numpy()
