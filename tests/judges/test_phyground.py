"""PhyGround: its prompts with first frames, the judge of single laws, and the published questions as a file."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.support.judges.server import Step, serving
from tests.support.tiny import tiny_video
from video_trl.evaluation.benchmarks.phyground import law_table, load_phyground
from video_trl.evaluation.evaluate import evaluation_prompts
from video_trl.judges import PhyGroundJudge, VideoJudge
from video_trl.judges.phyground import GENERAL, LAWS
from video_trl.load import check_judge, load_judge


VIDEO = tiny_video(1, num_frames=6, height=64, width=96)
BALL = "A ball falls into water."


@pytest.fixture
def folder(tmp_path):
    """As the data set lies on the Hub."""
    entries = [
        {
            "prompt": BALL,
            "physical_laws": ["gravity", "buoyancy"],
            "_domain": "fluid",
            "id_stem": "ball_0",
            "first_frame_image": "first_images/ball_0.jpg",
        },
        {"prompt": '"A mirror."', "physical_laws": ["reflection"], "_domain": "optics", "id_stem": "mirror_1"},
    ]
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "phyground.json").write_text(json.dumps({"prompts": entries}))
    (tmp_path / "first_images").mkdir()
    for name in ("ball_0", "mirror_1"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "first_images" / f"{name}.jpg")
    return tmp_path


def _rated(ratings):
    """Answers each question with the rating of the name that it asks for."""

    def answer(request):
        text = request["messages"][1]["content"][-1]["text"]
        name = next(name for name in (*GENERAL, *LAWS) if f'"{name}": 3' in text)
        return Step({name: ratings.get(name, 3)})

    return answer


def _judge(server, **options):
    defaults = {"backoff": 0.01, "max_retries": 0, "num_frames": 4, "concurrency": 1}
    return load_judge(f"phyground:{server.url}", model="org/m", **(defaults | options))


def test_prompts_with_their_frames(folder):
    first, second = load_phyground(folder)
    assert (first.text, first.category, first.groups) == (BALL, "fluid", ("fluid",))
    assert first.image.endswith("first_images/ball_0.jpg") and second.image.endswith("mirror_1.jpg")
    assert second.text == "A mirror."
    assert load_phyground(folder / "prompts" / "phyground.json") == (first, second)
    assert evaluation_prompts(str(folder), 1, "phyground") == (first,)


def test_the_laws_of_a_prompt_are_asked_about_one_by_one(folder):
    ratings = {"SA": 5, "PTV": 2, "persistence": 4, "gravity": 5, "buoyancy": 2}
    with serving(_rated(ratings)) as server:
        judge = _judge(server, prompts=folder)
        assert isinstance(judge, PhyGroundJudge) and isinstance(judge, VideoJudge) and judge.name == "phyground-m"
        (score,) = judge.score([VIDEO], [BALL])
        texts = [request["messages"][1]["content"][-1]["text"] for request in server.requests]
    assert score == {"sa": 1.0, "pc": 0.625, "raw": ratings}
    assert len(texts) == 5 and all(json.dumps(BALL) in text for text in texts)
    assert "Leave aside whether the video fits the caption." not in texts[0] and "Leave aside" in texts[3]
    assert judge.laws_of("Something else.") == tuple(LAWS)


def test_without_laws_order_and_persistence_count():
    with serving(_rated({"SA": 1, "PTV": 5, "persistence": 2})) as server:
        (score,) = _judge(server, laws=[]).score([VIDEO], ["x"])
    assert (score["sa"], score["pc"]) == (0.0, 0.625)


def test_a_rating_may_be_written_as_a_text_or_a_fraction():
    with serving(Step({"SA": "5"}), Step({"PTV": 2.0}), Step({"persistence": "4/5"})) as server:
        (score,) = _judge(server, laws=[], max_repairs=0).score([VIDEO], ["x"])
    assert score["raw"] == {"SA": 5, "PTV": 2, "persistence": 4}


def test_an_answer_that_is_missing_is_an_error_of_the_video():
    with serving(Step({"SA": 6}), Step({"SA": 6}), _rated({})) as server:
        (score,) = _judge(server, laws=[]).score([VIDEO], ["x"])
    assert score["sa"] is None and score["pc"] is None and score["error"].startswith("SA: ")


def test_the_published_questions_come_from_files(tmp_path):
    general = {name: f'{name}? {{prompt}}\n{{questions_block}}\nJSON {{{{"{name}": 3}}}}' for name in GENERAL}
    template = {
        "system_prompt": "Judge.",
        "eval_prompts": general,
        "physical_template": '{law} ({criteria}) {prompt}\n{questions_block}\nJSON {{"{law}": 3}}',
    }
    rubric = {
        "sub_questions": {name: [f"Is {name} right?"] for name in (*GENERAL, *LAWS)},
        "criteria": dict.fromkeys(LAWS, "as in nature"),
    }
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(template))
    (tmp_path / "r.json").write_text(json.dumps(rubric))
    files = {"template": tmp_path / "t.yaml", "rubric": tmp_path / "r.json"}
    with serving(_rated({"SA": 5, "shadow": 1})) as server:
        judge = _judge(server, laws=["shadow"], **files)
        (score,) = judge.score([VIDEO], ["A {cat}."])
        asked = server.requests[3]["messages"]
        assert judge.identity != _judge(server, laws=["shadow"]).identity
    assert (score["sa"], score["pc"]) == (1.0, 0.0)
    assert asked[0]["content"] == "Judge."
    assert asked[1]["content"][-1]["text"] == 'shadow (as in nature) A {cat}.\n- Is shadow right?\nJSON {"shadow": 3}'
    del rubric["criteria"]["shadow"]
    (tmp_path / "r.json").write_text(json.dumps(rubric))
    with pytest.raises(ValueError, match="'shadow' is missing"):
        PhyGroundJudge("http://localhost:1/v1", "m", **files)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"laws": ["magic"]}, "magic"),
        ({"num_frames": 1}, "num_frames"),
        ({"template": "t.yaml"}, "go together"),
        ({"prompts": "nowhere.json"}, "phyground.json"),
    ],
)
def test_settings_that_do_not_fit(options, match):
    with pytest.raises(ValueError, match=match):
        check_judge("phyground:http://localhost:1/v1", model="m", **options)


def test_a_first_frame_that_is_missing_is_named(folder):
    (folder / "first_images" / "mirror_1.jpg").unlink()
    with pytest.raises(ValueError, match="1 of 2 first frames are missing, the first being that of 'mirror_1'"):
        load_phyground(folder)


def test_the_table_has_a_row_for_each_law():
    class Run:
        name = "base"

    class Table:
        run, judge = Run(), "phyground-m"
        scores = (
            {"raw": {"SA": 5, "PTV": 4, "persistence": 3, "gravity": 2}},
            {"raw": {"SA": 4, "PTV": 4, "persistence": 3}},
        )

    table = law_table(Table())
    assert table.rows == [
        ["SA", "2", "4.50"], ["PTV", "2", "4.00"], ["persistence", "2", "3.00"], ["gravity", "1", "2.00"],
        ["all laws", "1", "2.00"],
    ]  # fmt: skip
    Table.scores = ({"sa": 1.0, "pc": 1.0},)
    with pytest.raises(ValueError, match="no ratings"):
        law_table(Table())
