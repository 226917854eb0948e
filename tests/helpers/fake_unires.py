"""A package that speaks as UniRes does: ``settings()``, and ``preproc(data, settings)``."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_RUN = """
import torch

def preproc(data, sett=None):
    assert sett.vx == 1.0 and not sett.write_out
    (image, matrix), = data
    if image.max() > 900:
        raise ValueError("cannot estimate\\nhyper-parameters")
    sizes = matrix[:3, :3].norm(dim=0)
    shape = [int(n * s) for n, s in zip(image.shape, sizes)]
    made = torch.nn.functional.interpolate(image[None, None], shape)[0, 0]
    out = matrix.clone()
    out[:3, :3] = matrix[:3, :3] / sizes
    out[:3, 3] = matrix[:3, 3] + (out[:3, :3] - matrix[:3, :3]) @ torch.full((3,), 0.5)
    return made[..., None], out, [None]
"""


@contextmanager
def installed(folder: Path) -> Iterator[None]:
    """The package is there, as version 0.3, for a while."""
    package = folder / "unires"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "struct.py").write_text("class settings:\n    vx, write_out, do_print = 0, 1, 1\n")
    (package / "run.py").write_text(_RUN)
    facts = folder / "unires-0.3.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: unires\nVersion: 0.3\n")
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == "unires"]:
            del sys.modules[name]
