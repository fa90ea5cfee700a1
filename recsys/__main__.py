"""`python -m recsys`."""

import os
import sys

# Before torch loads OpenMP: threads without work wait less busily, and leave a core to the one that reads batches.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from recsys.cli import app

try:
    app(prog_name="python -m recsys")
except SystemExit as end:
    if "RANK" not in os.environ:
        raise
    # gloo's threads now and then abort a rank in its destructors, after all work is done: leave without them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
