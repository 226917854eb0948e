from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

from generation.volumetry import Measurement, measure


class Heads(NamedTuple):
    """Phantoms ``(x, y, z)``: what was asked, normalised, and what is measured, in mm³."""

    asked: pd.DataFrame
    volumes: list[np.ndarray]
    measured: list[Measurement]


@pytest.fixture(scope="session")
def heads(phantom):
    """Three phantoms whose ventricular and brain volumes do not go together."""
    asked = pd.DataFrame(
        {"sex": [0.0, 1.0, 0.0], "age": [0.5, 0.1, 0.9], "ventricular_volume": [0.2, 0.9, 0.55],
         "brain_volume": [0.5, 0.8, 0.1], "seed": [1, 2, 3]},
        index=["p0", "p1", "p2"],
    )  # fmt: skip
    volumes = [phantom.sample(asked.loc[[id]])[0].numpy() for id in asked.index]
    return Heads(asked, volumes, [measure(volume) for volume in volumes])
