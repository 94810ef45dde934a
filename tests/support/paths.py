"""Where the repository lies, for tests that read its pages, scripts and configuration."""

import os
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
#: Folder of the guard against network access, for `PYTHONPATH`.
NETWORK_GUARD = ROOT / "tests" / "support" / "network"
#: `PYTHONPATH` of a process that a test starts: the repository, and no network.
PYTHONPATH = os.pathsep.join(map(str, (ROOT, NETWORK_GUARD)))
