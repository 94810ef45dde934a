import pytest
import torch

from tests.support.tiny import MAX_SEQUENCE_LENGTH, TEXT_DIM, tiny_encoded_group, tiny_encoded_video
from video_trl.data import GroupCollator, VideoCollator
from video_trl.models import WanFamily


GROUPS = GroupCollator(WanFamily(), MAX_SEQUENCE_LENGTH)
VIDEOS = VideoCollator(WanFamily(), MAX_SEQUENCE_LENGTH)


def indexed(rows: list[dict], first: int = 10) -> list[dict]:
    return [row | {"index": first + position} for position, row in enumerate(rows)]


def test_group_batch_holds_every_row_in_order():
    rows = indexed(tiny_encoded_group(n=4, m=3))
    batch = GROUPS(rows)
    assert set(batch) == {"chosen_latents", "rejected_latents", "prompt_embeds", "sa", "pc", "index"}
    assert batch["index"].tolist() == [10, 11, 12, 13] and batch["index"].dtype == torch.int64
    assert batch["rejected_latents"].shape == (4, 3, 4, 2, 4, 4) and batch["sa"].shape == (4, 3)
    for position, row in enumerate(rows):
        length = len(row["prompt_embeds"])
        assert torch.equal(batch["chosen_latents"][position], row["chosen_latents"])
        assert torch.equal(batch["rejected_latents"][position], row["rejected_latents"])
        assert torch.equal(batch["prompt_embeds"][position, :length], row["prompt_embeds"])
        assert not batch["prompt_embeds"][position, length:].any()
        assert torch.equal(batch["sa"][position], row["rejected_scores"][:, 0])
        assert torch.equal(batch["pc"][position], row["rejected_scores"][:, 1])
    assert batch["prompt_embeds"].shape == (4, MAX_SEQUENCE_LENGTH, TEXT_DIM)


def test_video_batch():
    rows = indexed(tiny_encoded_video(n=2))
    batch = VIDEOS(rows)
    assert set(batch) == {"latents", "prompt_embeds", "index"}
    assert torch.equal(batch["latents"], torch.stack([row["latents"] for row in rows]))


def test_group_without_scores_has_no_sa_and_pc():
    rows = [row | {"rejected_scores": None} for row in tiny_encoded_group(n=2)]
    assert set(GROUPS(indexed(rows))) == {"chosen_latents", "rejected_latents", "prompt_embeds", "index"}
    # Nor has one with some of them: `check_columns` stops the trainers that need them, and others do not ask.
    rows[0]["rejected_scores"] = torch.rand(3, 2)
    assert "sa" not in GROUPS(indexed(rows))


def test_plain_lists_give_the_same_batch_as_tensors():
    """A `datasets.Dataset` without a torch format returns nested lists."""
    rows = indexed(tiny_encoded_group(n=2))
    as_lists = [{k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in row.items()} for row in rows]
    for name, tensor in GROUPS(rows).items():
        assert torch.equal(GROUPS(as_lists)[name], tensor) and GROUPS(as_lists)[name].dtype == tensor.dtype


def test_dtypes_latents_become_float32_and_embeddings_stay():
    rows = indexed(tiny_encoded_group(n=2))
    for row in rows:
        row["chosen_latents"] = row["chosen_latents"].bfloat16()
        row["prompt_embeds"] = row["prompt_embeds"].bfloat16()
    batch = GROUPS(rows)
    assert batch["chosen_latents"].dtype == batch["sa"].dtype == torch.float32
    assert batch["prompt_embeds"].dtype == torch.bfloat16


@pytest.mark.parametrize(("collator", "column"), [(GROUPS, "chosen_latents"), (VIDEOS, "latents")])
def test_mixed_shapes_are_named_by_row(collator, column):
    make = tiny_encoded_group if column == "chosen_latents" else tiny_encoded_video
    mixed = [*make(n=1), *make(n=1, latents_shape=(4, 3, 4, 6))]
    with pytest.raises(ValueError, match=rf"'{column}'.*10: \(4, 2, 4, 4\), 11: \(4, 3, 4, 6\).*batch size of 1"):
        collator(indexed(mixed))
    for row in indexed(mixed):
        assert len(collator([row])["index"]) == 1


def test_different_numbers_of_rejected_videos_are_named_by_row():
    mixed = indexed([*tiny_encoded_group(n=1, m=3), *tiny_encoded_group(n=1, m=2)])
    with pytest.raises(ValueError, match=r"'rejected_latents'.*10: \(3, 4, 2, 4, 4\), 11: \(2, 4, 2, 4, 4\)"):
        GROUPS(mixed)


def test_chosen_and_rejected_of_different_shapes():
    rows = indexed(tiny_encoded_group(n=2))
    for row in rows:
        row["chosen_latents"] = torch.zeros(4, 1, 4, 4)
    with pytest.raises(ValueError, match=r"Rows \[10, 11\]: chosen latents of shape \(4, 1, 4, 4\), rejected"):
        GROUPS(rows)


def test_prompt_longer_than_the_batch():
    rows = indexed(tiny_encoded_group(n=2))
    rows[1]["prompt_embeds"] = torch.zeros(MAX_SEQUENCE_LENGTH + 1, TEXT_DIM)
    with pytest.raises(ValueError, match=r"Row 11: prompt embeddings of 17 tokens, expected at most 16"):
        GROUPS(rows)
