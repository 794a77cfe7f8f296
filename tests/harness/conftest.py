# SPDX-License-Identifier: Apache-2.0
import functools
import os
import threading
import warnings

import synapse_tests
from twisted.python.threadpool import ThreadPool

from realparts.process import MissingTool

# Older harnesses do not stop the thread pools of every homeserver, and these would hold up the end.
setattr(ThreadPool, "threadFactory", functools.partial(threading.Thread, daemon=True))  # noqa: B010

try:
    synapse_tests.make_importable()
except MissingTool as e:
    if os.environ.get("REQUIRE_REAL_PARTS") == "1":
        raise
    warnings.warn(f"Tests in Synapse's harness are skipped: {e}", stacklevel=1)
    collect_ignore_glob = ["test_*.py"]
