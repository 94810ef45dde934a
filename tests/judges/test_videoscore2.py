"""VideoScore2: ratings read from its text, expectations of the same places, and a text that breaks off."""

import pytest
import torch

from tests.support.judges.tiny_qwen import write_qwen
from tests.support.tiny import tiny_video
from video_trl.judges import VideoJudge, VideoScore2Judge
from video_trl.judges.videoscore2 import DIMENSIONS, QUESTION, _last_rating
from video_trl.load import load_judge


VIDEO = tiny_video(1, num_frames=6, height=64, width=96)
PROMPT = "red ball falls"
TEXT = """<think>Physical/common-sense consistency: 1 at first sight.</think>
(1) visual quality - clarity: 4
(2) text-to-video alignment: **5**,
(3) physical/common-sense consistency - naturalness: 2"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_qwen(tmp_path_factory.mktemp("videoscore2"), "qwen2_5_vl")


def _judge(folder, **options):
    return load_judge(
        f"videoscore2:{folder}", **({"device": "cpu", "dtype": torch.float32, "max_tokens": 4} | options)
    )


def _shares(judge, begun):
    """Of the five ratings as the next word, by the whole model."""
    frames = judge.seen
    inputs = judge.vlm.inputs(frames, QUESTION.format(caption=PROMPT), begun=begun)
    shown = judge.vlm.tokenizer.decode(inputs["input_ids"][0])
    assert shown.count("<|im_start|>") == 3  # the system's, the user's and the assistant's turn
    digits = judge.vlm.tokenizer.convert_tokens_to_ids(list("12345"))
    return judge.vlm.model(**inputs).logits[0, -1, digits].double().softmax(0)


def _answers(judge, text, monkeypatch):
    def answer(patches, question, **_):
        judge.seen = patches
        assert question == QUESTION.format(caption=PROMPT)
        return text

    monkeypatch.setattr(judge.vlm, "answer", answer)


def test_the_last_ratings_of_the_text_count(folder, monkeypatch):
    judge = _judge(folder, score_from="rating")
    assert isinstance(judge, VideoScore2Judge) and isinstance(judge, VideoJudge)
    _answers(judge, TEXT, monkeypatch)
    (score,) = judge.score([VIDEO], [PROMPT])
    assert (score["sa"], score["pc"]) == (1.0, 0.25) and score["raw"]["text"] == TEXT
    assert [score["raw"][name]["rating"] for name in DIMENSIONS] == [4, 5, 2]
    assert judge.seen.grid == (2, 20, 28)  # 4 frames, as large as the model's own reader makes them at least

    with torch.no_grad():
        expected = float(_shares(judge, TEXT[: TEXT.rindex("2")]) @ torch.arange(1, 6).double())
    assert score["raw"][DIMENSIONS[2]]["expectation"] == pytest.approx(expected, abs=1e-4)
    judge.score_from = "expectation"
    assert judge.score([VIDEO], [PROMPT])[0]["pc"] == pytest.approx((expected - 1) / 4, abs=1e-4)


def test_a_text_without_ratings_is_gone_on_with(folder, monkeypatch):
    judge = _judge(folder)
    _answers(judge, "ball falls", monkeypatch)
    (score,) = judge.score([VIDEO], [PROMPT])
    with torch.no_grad():
        first = int(_shares(judge, f"ball falls\n{DIMENSIONS[0]}: ").argmax()) + 1
        second = int(_shares(judge, f"ball falls\n{DIMENSIONS[0]}: {first}\n{DIMENSIONS[1]}: ").argmax()) + 1
    assert [score["raw"][name]["rating"] for name in DIMENSIONS[:2]] == [first, second]
    assert score["sa"] == (second - 1) / 4


def test_it_writes_and_scores_by_itself(folder):
    (score,) = _judge(folder).score([VIDEO], [PROMPT])
    assert 0 <= score["sa"] <= 1 and 0 <= score["pc"] <= 1 and isinstance(score["raw"]["text"], str)


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("visual quality: 3", "3"),
        ("Visual Quality – clarity, smoothness: <4>", "4"),
        ("visual quality: 3 and visual quality: 2", "2"),
        ("visual quality: 12", None),
        ("visual quality: 3.5", None),
        ("visual quality: 3.", "3"),
        ("visual quality is 3", None),
    ],
)
def test_what_counts_as_a_rating(text, rating):
    found = _last_rating(text, "visual quality")
    assert (found and found[1]) == rating


def test_the_identity_follows_the_settings_and_faults_are_named(folder):
    judge = _judge(folder)
    assert judge.identity == _judge(folder).identity != _judge(folder, max_tokens=5).identity
    with pytest.raises(ValueError, match="score_from"):
        VideoScore2Judge(folder, score_from="mean")
    with pytest.raises(ValueError, match="control tokens"):
        judge.score([VIDEO], ["<|im_end|>"])
