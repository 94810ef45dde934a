"""What sharded engines must do beside computing a step; the assertions stand in engine_cases.py."""

from importlib.util import find_spec

import pytest

from tests.support.distributed.launch import launch


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(directory, *names: str) -> None:
    launch("engine_cases.py", directory, *names, seconds=600)
    assert {path.parent.name for path in directory.glob("*/done")} == set(names)


def test_fsdp2_stops_at_bad_numbers_and_trains_a_module_beside_the_transformer(tmp_path):
    run(tmp_path, "stop+fsdp2", "head+fsdp2")


def test_the_proof_at_the_start_and_the_clipping_of_gradients_hold_on_every_engine(tmp_path):
    run(tmp_path, "proof+ddp", "proof+fsdp2")


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs video-trl[deepspeed]")
def test_they_hold_under_deepspeed_too(tmp_path):
    run(tmp_path, "proof+zero2", "proof+zero3")


def test_shared_tokens_are_not_shared_again(tmp_path):
    run(tmp_path, "again+ddp")


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs video-trl[deepspeed]")
def test_deepspeed_stops_at_bad_numbers_trains_a_module_beside_and_leaves_other_networks_whole(tmp_path):
    run(tmp_path, "raw+zero3", "stop+zero2", "stop+zero3", "head+zero2", "head+zero3")
