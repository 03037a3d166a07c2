"""Processes of their own, for what has to be tested from outside."""

from __future__ import annotations

import os

from places import REPOSITORY, SUPPORT

# A child imports the package of this checkout and the modules beside this one, and leaves the other cores alone.
PATHS = (str(REPOSITORY), str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")]))
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join(PATHS),
}
