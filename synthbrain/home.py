"""Where things are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The package's folder: ``$SYNTHBRAIN_HOME``, else the platform's user data folder.

    Holds ``store/`` (volumes), ``cohorts/`` (manifests saved by name) and ``cache/`` (anything
    that can be made again). Nothing is created by asking.
    """
    chosen = os.environ.get("SYNTHBRAIN_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_data_dir("synthbrain", appauthor=False))
