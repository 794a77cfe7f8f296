# SPDX-License-Identifier: Apache-2.0
import os
import sys
from pathlib import Path

import synapse_lk_jwt

ROOT = Path(__file__).resolve().parent.parent

# At the end: `testbed` and `demo` are found here, but the module is the one that is installed.
sys.path.append(str(ROOT))

if "TOX_ENV_NAME" in os.environ:
    assert not Path(synapse_lk_jwt.__file__).is_relative_to(ROOT / "synapse_lk_jwt"), (
        "the tests must see the built wheel and not the checkout"
    )
