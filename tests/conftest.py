"""
Environment of every test: no network, CPU, one thread, caches of its own. Set here because torch and the Hugging Face
libraries read it when they are imported, and because processes that a test starts inherit it.
"""

import atexit
import gc
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator

import pytest
from tqdm import tqdm

from tests.support.network.sitecustomize import LOG_VARIABLE, attempts
from tests.support.paths import NETWORK_GUARD


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A cache outside the user's home: a test can neither read a stale entry nor leave one behind.
_cache = tempfile.mkdtemp(prefix="video-trl-tests-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ["HF_HOME"] = _cache
os.environ["TRACKIO_DIR"] = os.path.join(_cache, "trackio")
os.environ[LOG_VARIABLE] = os.path.join(_cache, "network.log")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(NETWORK_GUARD), os.environ.get("PYTHONPATH"))))

# Progress bars share a lock between processes by default. A test that kills a forked process in the middle of a bar
# would leave it locked, and every later bar of the run would wait for ever.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """
    What is there between two files is there for good: modules of libraries and caches, millions of objects. No
    collection is to look through them again. Each `train` asks for one, and that took half of the suite's time.
    """
    yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def no_network() -> Iterator[None]:
    """A test fails that asks for another machine, itself or by a process of its own, whoever swallows the error."""
    yield
    tried = attempts()
    assert not tried, f"a test reaches this machine only; tried since the last test:\n{tried}"
