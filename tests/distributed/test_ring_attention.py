"""
Ring attention as the trainers use it is attention, values and gradients; and as it is in diffusers it is not.

The second is what `video_trl/models/attention/ring.py` is there for. A new version of diffusers is used as it is, so
the first test tells whether it may be; where the second fails, diffusers has mended a fault, and the remedy can go.
"""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from tests.support import rounding
from tests.support.distributed.launch import launch_forked
from tests.support.tiny import tiny_cogvideox_pipeline, tiny_encoded_group, tiny_group_dataset, tiny_transformer
from tests.support.trainer.runs import config, trainer
from video_trl import VideoGroupDPOConfig
from video_trl.models import family_for
from video_trl.models.attention.ring import RING_BACKENDS
from video_trl.models.wan import WanFamily
from video_trl.trainer.parallel.mesh import check_context_parallel_method, check_context_parallelism
from video_trl.trainer.setup.attention_and_compile import attention_backends


PROCESSES = [4, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
VERSION = tuple(map(int, diffusers.__version__.split(".")[:2]))
stock = pytest.mark.skipif(VERSION not in ((0, 41), (0, 42)), reason="other diffusers: not mended")
right = pytest.mark.skipif(VERSION < (0, 41), reason="refused with this diffusers")


@functools.cache
def results(processes: int) -> dict[str, Any]:
    file = Path(tempfile.mkdtemp()) / "ring.json"
    launch_forked("ring_worker.py", file, processes, processes=1)
    return json.loads(file.read_text())


@right
@pytest.mark.parametrize("processes", PROCESSES)
def test_output_and_gradients_are_those_of_one_process(processes):
    mended = results(processes)["mended"]
    for errors in (mended["plain"], mended["checkpointed"]):
        assert errors.keys() == {"out", "query", "key", "value"}
        assert all(error < rounding.SINGLE for error in errors.values()), errors


@right
@pytest.mark.parametrize("processes", PROCESSES)
def test_activation_checkpointing_holds_nothing_of_the_attention(processes):
    assert results(processes)["mended"]["kept"] == 0


@stock
@pytest.mark.parametrize("processes", PROCESSES)
def test_diffusers_has_the_faults_that_are_remedied(processes):
    found = results(processes)["diffusers"]
    bound = rounding.SINGLE
    assert found["plain"]["out"] < bound and found["plain"]["query"] < bound
    if processes == 2:  # where the next process is the previous one
        assert found["plain"]["key"] < bound and found["plain"]["value"] < bound
    else:
        assert found["plain"]["key"] > 0.1 and found["plain"]["value"] > 0.1
    assert found["checkpointed"] == "CheckpointError"
    assert found["kept"] > 1


@right
def test_back_ends_that_can_are_all_that_diffusers_lets_share_tokens_and_that_give_a_log_sum_exp():
    sharing = _AttentionBackendRegistry._supports_context_parallel & set(attention_backends())
    assert set(RING_BACKENDS) == sharing - {"native", "_native_npu"}  # both refuse `return_lse`


@pytest.mark.parametrize("version", ["0.38.0", "0.40.2"])
def test_versions_with_wrong_gradients_are_refused(tmp_path, monkeypatch, version):
    monkeypatch.setattr(diffusers, "__version__", version)
    with pytest.raises(ValueError, match=f"'ring'` needs diffusers 0.41 or newer, this is {version}"):
        ring(tmp_path, 2)
    ring(tmp_path, 1)  # nothing is shared


@right
@pytest.mark.parametrize("backend", [None, "native", "flex"])
def test_other_back_ends_are_refused_with_those_that_can(tmp_path, backend):
    asked = {"context_parallel_method": "ring", "attention_backend": backend}
    config(tmp_path, **asked)  # no tokens are shared
    with pytest.raises(ValueError, match=f"attention_backend={backend!r}.*'_native_cudnn', '_native_flash'.*ulysses"):
        config(tmp_path, context_parallel_size=2, **asked)
    with pytest.raises(ValueError, match="context_parallel_method"):
        config(tmp_path, context_parallel_method="star")


def ring(directory: Path, size: int) -> VideoGroupDPOConfig:
    asked = {"context_parallel_method": "ring", "attention_backend": "_native_flash"}
    return config(directory, context_parallel_size=size, **asked)


@right
def test_families_that_cannot_are_refused_before_anything_is_encoded(tmp_path, monkeypatch):
    args, transformer = ring(tmp_path, 2), tiny_transformer()
    check_context_parallel_method(transformer, family_for(transformer), args)
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(ValueError, match="'ring'` is not supported for 'cogvideox'. Use 'ulysses'"):
        trainer(args, model=tiny_cogvideox_pipeline(), train_dataset=tiny_encoded_group(2, family="cogvideox-t2v"))


@right
def test_heads_need_not_divide(tmp_path):
    transformer = tiny_transformer()  # 2 heads
    adapter, shapes = family_for(transformer), [(4, 3, 8, 8)]  # 3 x 4 x 4 = 48 tokens
    for size in (1, 2, 3, 4, 6, 8):
        check_context_parallelism(transformer, adapter, shapes, ring(tmp_path, size))
    with pytest.raises(ValueError, match=r"must divide the 48 tokens \(3 x 4 x 4\).*12, 16, 24, 48\] do"):
        check_context_parallelism(transformer, adapter, shapes, ring(tmp_path, 5))


@right
def test_tokens_that_cannot_be_divided_are_refused_before_a_video_is_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr(WanFamily, "encode_video", lambda *args, **options: pytest.fail("encoded a video"))
    args = ring(tmp_path, 5)
    monkeypatch.setattr(type(args), "world_size", 5)
    with pytest.raises(ValueError, match="`context_parallel_size=5` must divide the"):
        trainer(args, train_dataset=tiny_group_dataset(1, 1))
