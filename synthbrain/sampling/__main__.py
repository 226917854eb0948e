"""``python -m synthbrain.sampling NAME --device cpu``: a sampling service in the foreground."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys

from synthbrain.errors import SynthBrainError
from synthbrain.sampling.service import serve


def main() -> int:
    """Serve until stopped, or until idle for long enough."""
    parser = argparse.ArgumentParser(prog="python -m synthbrain.sampling", description=__doc__)
    parser.add_argument("name", help="a generator's name, or package.module:callable")
    parser.add_argument("--device", help="such as cpu or cuda:0; the generator's choice by default")
    parser.add_argument("--batch", type=int, help="rows made at once; the generator's by default")
    parser.add_argument("--idle", type=float, help="stop after so many seconds without clients")
    parser.add_argument("--memory", type=float, help="share of the GPU's memory it may use")
    parser.add_argument("--sampling", type=json.loads, default={}, help="further options, as JSON")
    given = parser.parse_args()
    faulthandler.enable()
    try:
        options = {"device": given.device, "batch": given.batch, "memory": given.memory}
        serve(given.name, idle=given.idle, **options, **given.sampling)
    except SynthBrainError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    # A thread may still be inside the generator, working for nobody: nothing waits for it.
    os._exit(status)
