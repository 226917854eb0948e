"""MONAI's own command on a bundle."""

import os
import subprocess
import sys

import nibabel
import numpy as np


def run_bundle(bundle, folder, *arguments):
    """The image ``python -m monai.bundle run`` makes, in a process that cannot see synthbrain."""
    command = [
        sys.executable, "-m", "monai.bundle", "run", "--config_file",
        str(bundle / "configs" / "inference.json"), "--bundle_root", str(bundle),
        *map(str, arguments),
    ]  # fmt: skip
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (bundle / "output").iterdir()
    image = nibabel.load(path)
    return image, image.get_fdata(dtype=np.float32)
