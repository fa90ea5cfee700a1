"""`python -m recsys`."""

import os
import sys

# glibc reads this where a process begins, so it has to begin again. What glibc caches of small pieces of memory lies
# between those of tensors, which then do not come together again: a tenth of a GB more at a batch of 4096. Pages of
# 2 MB: a step reads and writes more memory than the processor keeps addresses of pages of 4 KB.
if sys.orig_argv[-len(sys.argv) :][:2] == ["recsys", "train"] and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.tcache_count=0:glibc.malloc.hugetlb=1"
    os.execv(sys.executable, sys.orig_argv)

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
