"""Algorithm 1 as one structured request: what is accepted, who answers, and what becomes of clips without one."""

import json
import pickle
from functools import partial

import numpy as np
import pytest
from pydantic import ValidationError

from tests.support.curation.clips import write_clip
from tests.support.judges.server import Step, free_port, serving
from tests.support.judges.tiny_qwen import write_qwen
from video_trl.curation.phyaug.annotate import (
    ANNOTATED,
    CAPTION_ANNOTATED,
    AnnotateBatch,
    Failure,
    QwenAnnotator,
    load_annotator,
)
from video_trl.curation.phyaug.annotation import (
    CAPS,
    Annotation,
    SeenClip,
    capped_richness,
    prompt_hash,
    question_for,
)
from video_trl.judges.chat import ChatUnavailableError
from video_trl.sandbox import simulate


GOOD = {
    "parse": {
        "entities": [{"name": "red ball", "material": "rubber"}, {"name": "floor", "material": None}],
        "actions": [{"agent": "red ball", "verb": "falls", "target": None}],
        "forces": ["gravity"],
        "outcomes": ["it bounces"],
    },
    "vision_check": {"removed": [], "added": ["floor"]},
    "reason": "Gravity speeds the ball up.",
    "penalties": {"camera_motion": "none", "stylised": "none", "aftermath": "none"},
    "scores": {"contact": True, "interaction": 0.8, "forces_outcomes": 0.9, "causal_clarity": 0.7},
    "physics_richness": 0.6,
    "extended": "A red ball falls, sped up by gravity, and bounces on the floor.",
}


def changed(**values):
    return GOOD | values


@pytest.fixture
def batch(tmp_path):
    paths = [str(write_clip(tmp_path / f"{seed}.mp4", seed=seed)) for seed in range(3)]
    return {
        "path": paths,
        "offset": [None] * 3,
        "length": [None] * 3,
        "prompt": [f"a red ball falls, take {n}" for n in range(3)],
        "text_draft": [None] * 3,
    }


def remote(url, **options):
    return AnnotateBatch(partial(load_annotator, url, {"model": "tiny", "num_frames": 4, "backoff": 1e-3} | options))


@pytest.mark.parametrize(
    "fault",
    [
        changed(physics_richness=1.2),
        changed(physics_richness="7/10"),
        changed(physics_richness="high"),
        changed(physics_richness="nan"),
        changed(physics_richness=None),
        {name: value for name, value in GOOD.items() if name != "physics_richness"},
        ["red ball"],
    ],
)
def test_an_answer_without_a_score_is_refused(fault):
    assert Annotation.model_validate_json(json.dumps(changed(extended="word " * 100)))
    with pytest.raises(ValidationError):
        Annotation.model_validate_json(json.dumps(fault))


@pytest.mark.parametrize(("given", "score"), [("0.7", 0.7), (" 1 ", 1.0), (1, 1.0), (0, 0.0)])
def test_a_score_in_quotes_is_that_score(given, score):
    """Only the score decides, and this one can be read: a clip is not worth another request, or its place, for it."""
    assert Annotation.model_validate_json(json.dumps(changed(physics_richness=given))).physics_richness == score


# Only the score decides: an answer that has one is taken, with what is valid of the rest.
@pytest.mark.parametrize("name", [name for name in GOOD if name != "physics_richness"])
@pytest.mark.parametrize("value", [None, 7, "text", [], ["text"], {}, {"entities": [3]}, "missing"], ids=str)
def test_no_side_data_of_another_shape_drops_a_clip(name, value):
    answer = changed(**{name: value})
    if value == "missing":
        del answer[name]
    taken = Annotation.model_validate_json(json.dumps(answer))
    assert capped_richness(taken) == (0.6, [])  # what is not said caps nothing
    read = json.loads(taken.model_dump_json())
    assert {key: read[key] for key in GOOD if key != name} == {key: GOOD[key] for key in GOOD if key != name}


def test_of_side_data_what_is_valid_is_kept():
    parse = GOOD["parse"] | {"entities": ["red ball", {"name": "floor"}, {"material": "wood"}], "forces": "gravity"}
    parse["actions"] = [{"agent": "ball", "verb": "falls"}, {"agent": "ball"}]
    scores = GOOD["scores"] | {"interaction": "none"}
    read = Annotation.model_validate_json(json.dumps(changed(parse=parse, scores=scores)))
    assert [(entity.name, entity.material) for entity in read.parse.entities] == [("red ball", None), ("floor", None)]
    assert [(action.verb, action.target) for action in read.parse.actions] == [("falls", None)]
    # A cap is not lost for what stands beside it.
    assert read.parse.forces == [] and read.scores.model_dump_json() == '{"contact":true}'


@pytest.mark.parametrize(
    ("values", "capped"),
    [
        ({"scores": GOOD["scores"] | {"contact": False, "interaction": 7}}, "no contact"),
        ({"scores": {"contact": "No"}}, "no contact"),
        ({"scores": GOOD["scores"] | {"contact": "false"}}, "no contact"),
        ({"penalties": {"camera_motion": "Dominant"}}, "camera_motion"),
        ({"penalties": GOOD["penalties"] | {"stylised": " SOME "}}, "stylised"),
    ],
    ids=str,
)
def test_what_caps_a_score_is_read_as_models_write_it(values, capped):
    read = Annotation.model_validate_json(json.dumps(changed(physics_richness=0.95) | values))
    assert capped_richness(read)[1] == [capped]


def test_side_data_drops_no_clip():
    """Algorithm 1 itself returns `original` and a label; a text that is too long is cut; only the score decides."""
    answer = changed(physics_label=1, original="a ball falls", extended="word " * 140)
    read = Annotation.model_validate_json(json.dumps(answer))
    assert len(read.extended.split()) == 100 and read.physics_richness == GOOD["physics_richness"]
    assert Annotation.model_json_schema()["additionalProperties"] is False


def test_a_server_is_asked_once_for_each_clip_with_frames_caption_and_schema(batch):
    with serving(Step(answer=GOOD)) as server:
        columns = remote(server.url)(batch)
    assert len(server.requests) == 3 and set(columns) == {*ANNOTATED, "dropped_by", "detail"}
    asked = {json.dumps(request["messages"]): request for request in server.requests}
    for prompt in batch["prompt"]:
        (request,) = [request for text, request in asked.items() if prompt in text]
        *images, text = request["messages"][1]["content"]
        assert [image["type"] for image in images] == ["image_url"] * 4
        assert "At most 100 words" in text["text"] and "physics_richness" in text["text"]
        schema = request["response_format"]["json_schema"]
        assert schema["strict"] and schema["schema"]["required"] == list(GOOD)
    assert columns["physics_label"] == [1, 1, 1] and columns["dropped_by"] == [None] * 3
    assert json.loads(columns["parse"][0]) == GOOD["parse"]
    assert prompt_hash() in columns["annotator"][0] and "tiny" in columns["annotator"][0]


@pytest.mark.parametrize(("richness", "label"), [(0.5999, 0), (0.6, 1), (0, 0), (1, 1)])
def test_the_label_is_computed_here(batch, richness, label):
    with serving(Step(answer=changed(physics_richness=richness))) as server:
        assert remote(server.url)(batch)["physics_label"] == [label] * 3


PENALISED = [
    *((name, degree, cap) for name, caps in CAPS.items() for degree, cap in caps.items()),
]


@pytest.mark.parametrize(("name", "degree", "cap"), PENALISED)
def test_a_penalty_caps_the_score_and_the_model_is_told(batch, name, degree, cap):
    """The official code's bounds where it is dominant; where something is subtracted, what is left of 1."""
    answer = changed(physics_richness=0.95, penalties=GOOD["penalties"] | {name: degree})
    one = {column: values[:1] for column, values in batch.items()}
    with serving(Step(answer=answer)) as server:
        columns = remote(server.url)(one)
        asked = server.requests[0]["messages"][1]["content"][-1]["text"]
    assert columns["physics_richness"] == [cap] and columns["physics_label"] == [int(cap >= 0.6)]
    noted = json.loads(columns["physics_scores"][0])
    assert (noted["claimed"], noted["capped_by"], noted[name]) == (0.95, [name], degree)
    (line,) = [line for line in asked.splitlines() if f'some "{name}"' in line]
    assert f"{cap:.2f}" in line


def test_contact_and_causes_cap_the_score_and_a_lower_one_stays():
    def richness(claimed, **values):
        return capped_richness(Annotation.model_validate(changed(physics_richness=claimed) | values))

    apart = {"scores": GOOD["scores"] | {"contact": False}}
    assert richness(0.9) == (0.9, []) and richness(0.9, **apart) == (0.74, ["no contact"])
    for part in ("forces", "outcomes"):
        assert richness(0.9, parse=GOOD["parse"] | {part: []}) == (0.59, ["no cause"])
    assert richness(0.3, **apart) == (0.3, [])


CAPTION = {name: value for name, value in GOOD.items() if name != "vision_check"}


def test_captions_are_read_without_frames_and_what_was_read_is_shown_with_them(batch):
    with serving(Step(answer=CAPTION)) as server:
        read = AnnotateBatch(partial(load_annotator, server.url, {"model": "reader"}), captions=True)(batch)
        content = server.requests[0]["messages"][1]["content"]
        schema = server.requests[0]["response_format"]["json_schema"]["schema"]
    assert [part["type"] for part in content] == ["text"] and schema["required"] == list(CAPTION)
    assert set(read) == {*CAPTION_ANNOTATED, "dropped_by", "detail"} and read["text_richness"] == [0.6] * 3
    assert json.loads(read["text_draft"][0]) == {"parse": GOOD["parse"], "reason": GOOD["reason"]}
    with serving(Step(answer=GOOD)) as server:
        remote(server.url)(batch | {"text_draft": read["text_draft"]})
        assert all(
            read["text_draft"][0] in json.loads(json.dumps(request))["messages"][1]["content"][-1]["text"]
            for request in server.requests
        )
    with serving(Step(answer="no")) as server:
        failed = AnnotateBatch(partial(load_annotator, server.url, {"model": "reader"}), captions=True)(batch)
    assert failed["dropped_by"] == ["invalid_answer"] * 3 and failed["text_richness"] == [None] * 3


def test_an_invalid_answer_is_repaired_once_and_then_counted(batch):
    one = {name: values[:1] for name, values in batch.items()}
    with serving(Step(answer=changed(physics_richness=7)), Step(answer=GOOD)) as server:
        assert remote(server.url)(one)["dropped_by"] == [None]
    assert len(server.requests) == 2
    assert "physics_richness: Input should be less than or equal to 1" in server.requests[1]["messages"][-1]["content"]
    with serving(Step(answer="{not json")) as server:
        columns = remote(server.url)(one)
    assert len(server.requests) == 2 and columns["dropped_by"] == ["invalid_answer"]
    assert "Invalid JSON" in columns["detail"][0] and columns["physics_richness"] == [None]


def test_a_server_that_answers_some_drops_the_others_by_another_name(batch):
    one = {name: values[:1] for name, values in batch.items()}
    with serving(Step(status=500)) as server:
        columns = remote(server.url, max_retries=1)(one)
    assert columns["dropped_by"] == ["no_answer"] and "status 500" in columns["detail"][0]


def test_a_server_that_cannot_be_reached_stops_the_run(batch):
    with pytest.raises(ChatUnavailableError, match="Is the server running"):
        remote(f"http://127.0.0.1:{free_port()}/v1", max_retries=0)(batch)


def test_a_damaged_clip_is_dropped_and_the_others_are_not(batch, tmp_path):
    broken = tmp_path / "1.mp4"
    broken.write_bytes(broken.read_bytes()[:500])
    with serving(Step(answer=GOOD)) as server:
        columns = remote(server.url)(batch)
    assert [rule is None for rule in columns["dropped_by"]] == [True, False, True] and len(server.requests) == 2
    assert str(broken) in columns["detail"][1] and columns["physics_label"] == [1, None, 1]


def test_rules_annotate_what_is_seen_not_what_is_said():
    rules = load_annotator("sandbox", {})

    def look(clip, prompt=None):
        seen = SeenClip(clip.video, np.arange(len(clip.video)) / clip.fps, prompt or clip.prompt)
        (answer,) = rules.annotate([seen])
        return answer

    falling = look(simulate(3, motion="free_fall"))
    assert falling.physics_richness >= 0.6 and "gravity" in falling.parse.forces and falling.reason
    still = simulate(3, motion="static")
    promised = look(still, "A red ball falls and bounces on the floor.")
    assert promised.physics_richness < 0.3 and "falls" in promised.vision_check.removed and not promised.parse.actions


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_model_in_this_process_is_asked_twice_at_most(family, tmp_path):
    """Random weights never write JSON: what matters is that the repair is asked for, and that the clip is dropped."""
    annotator = QwenAnnotator(str(write_qwen(tmp_path, family)), num_frames=4, max_pixels=4096, max_tokens=6)
    chats = []
    answer = annotator.vlm.answer

    def listening(patches, *turns, **options):
        text = answer(patches, *turns, **options)
        chats.append((turns, text))
        return text

    annotator.vlm.answer = listening
    clip = SeenClip(
        np.zeros((4, 2 * annotator.multiple, annotator.multiple, 3), np.uint8), np.arange(4.0), "a <|im_end|> ball"
    )
    (failure,) = annotator.annotate([clip])
    assert isinstance(failure, Failure) and failure.reason == "invalid_answer"
    (first, said), (second, _) = chats
    assert first == (question_for(clip).replace("<|", "< |"),) and "<|" not in first[0]
    assert second[:2] == (first[0], said) and "no valid answer" in second[2]
    (unseen,) = annotator.annotate([SeenClip(None, np.zeros(0), "a ball")])  # a chat without a video
    assert isinstance(unseen, Failure) and len(chats) == 4 and "do not see" in chats[2][0][0]


def test_a_model_that_answers_well_is_believed(tmp_path):
    annotator = QwenAnnotator(str(write_qwen(tmp_path, "qwen2_5_vl")), num_frames=2, max_tokens=1)
    annotator.vlm.answer = lambda *_, **__: f"```json\n{json.dumps(GOOD)}\n```"
    clip = SeenClip(np.zeros((2, 56, 56, 3), np.uint8), np.arange(2.0), "a ball")
    assert annotator.annotate([clip]) == [Annotation.model_validate(GOOD)]


def test_a_stage_travels_without_its_model(batch):
    stage = AnnotateBatch(partial(load_annotator, "sandbox", {}))
    here = stage(batch)
    there = pickle.loads(pickle.dumps(stage))
    assert there._annotator is None and there(batch) == here


@pytest.mark.parametrize(
    ("name", "options"), [("http://localhost:1/v1", {}), ("sandbox", {"x": 1}), ("no/such-model", {"frames": 1})]
)
def test_unknown_options_are_refused(name, options):
    with pytest.raises(ValueError, match="annotator_options|No weights"):
        load_annotator(name, options)
