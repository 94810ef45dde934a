"""Loaders and arithmetic of the benchmarks, on small files of their form."""

import json

import pytest

from tests.support.evaluation.phygdpo_tables import ITEMS_1B
from video_trl.evaluation.benchmarks.phygenbench import (
    CATEGORIES,
    load_phygenbench,
    load_phygenbench_items,
    phygenbench_aggregate,
    phygenbench_points,
)
from video_trl.evaluation.benchmarks.videophy import load_videophy
from video_trl.evaluation.benchmarks.videophy2 import load_videophy2
from video_trl.evaluation.runs.prompts import EvaluationPrompt


VIDEOPHY = """video_url,caption,states_of_matter,majority_sa
x/1.mp4,"Milk, ""cold"", pours into a cup.",solid_fluid,1
x/2.mp4,"Milk, ""cold"", pours into a cup.",solid_fluid,0
x/3.mp4,A hammer hits a nail.,solid_solid,1
"""
VIDEOPHY2 = """caption,category,action,is_hard,upsampled_caption
A man lifts a bar.,Physical Activity,weightlifting,1,"A strong man, sweating, lifts a bar."
A man lifts a bar.,physical activity,weightlifting,1,again
A knife cuts bread.,object interactions,cutting,False,A sharp knife cuts bread.
A kite flies.,,flying,0,A red kite flies.
"""


def _file(tmp_path, text):
    path = tmp_path / "table.csv"
    path.write_text(text)
    return path


def test_videophy_keeps_each_sentence_once_with_its_states(tmp_path):
    milk = 'Milk, "cold", pours into a cup.'
    path = _file(tmp_path, VIDEOPHY)
    assert load_videophy(path) == (
        EvaluationPrompt(milk, None, "solid_fluid", ("solid_fluid",)),
        EvaluationPrompt("A hammer hits a nail.", None, "solid_solid", ("solid_solid",)),
    )
    refined = {milk: "Long milk.", "A hammer hits a nail.": "Long hammer."}
    assert [prompt.generation_text for prompt in load_videophy(path, refined=refined)] == list(refined.values())
    with pytest.raises(ValueError, match="no longer sentence for 'A hammer"):
        load_videophy(path, refined={milk: "Long milk."})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("caption\na\n", "missing: .*states_of_matter"),
        ("caption,states_of_matter\n", "missing: rows"),
        ("caption,states_of_matter\na,gas_gas\n", "got 'gas_gas'"),
    ],
)
def test_videophy_refuses(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_videophy(_file(tmp_path, text))


def test_benchmarks_of_the_hub_say_how_to_get_them_without_connection():
    for load in (load_videophy, load_videophy2):
        with pytest.raises(ValueError, match="cannot be loaded.*pass its path"):
            load()


def test_videophy2_groups_overlap_and_may_be_missing(tmp_path):
    path = _file(tmp_path, VIDEOPHY2)
    assert load_videophy2(path) == (
        EvaluationPrompt("A man lifts a bar.", None, "weightlifting", ("hard", "activity")),
        EvaluationPrompt("A knife cuts bread.", None, "cutting", ("interaction",)),
        EvaluationPrompt("A kite flies.", None, "flying", ()),
    )
    longer = load_videophy2(path, upsampled=True)
    assert longer[0].text == "A man lifts a bar." and longer[0].generation_text.startswith("A strong man, sweating")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("bar.,Physical", "bar.,Mental", "got 'Mental Activity'"), (",1,", ",perhaps,", "'perhaps' for 'A man lifts")],
)
def test_videophy2_refuses_values_it_does_not_know(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=message):
        load_videophy2(_file(tmp_path, VIDEOPHY2.replace(old, new)))


# ---- PhyGenBench ----------------------------------------------------------------------------------------------------


def _item(category="Force", single=0, multi_gpt=0, multi_llava=0, video_gpt=0, video_intern=0):
    stages = {"single": single, "multi_gpt": multi_gpt, "multi_llava": multi_llava}
    return {"main_category": category, **stages, "video_gpt": video_gpt, "video_intern": video_intern}


@pytest.mark.parametrize(
    ("stages", "closed", "opened", "published", "exact"),
    [  # single, multi_gpt, multi_llava, video_gpt, video_intern; the first four are rows of the published results
        ((3, 0, 3, 1, 0), 1, 2, 1, (4 / 3 + 2) / 2),
        ((2, 3, 3, 3, 2), 3, 2, 2, (8 / 3 + 7 / 3) / 2),
        ((2, 1, 3, 1, 3), 1, 3, 2, (4 / 3 + 8 / 3) / 2),
        ((1, 0, 0, 1, 0), 1, 0, 0, (2 / 3 + 1 / 3) / 2),
        ((3, 3, 3, 3, 3), 3, 3, 3, 3.0),
        ((0, 0, 0, 0, 0), 0, 0, 0, 0.0),
    ],
)
def test_points_by_the_published_rule_and_without_its_rounding(stages, closed, opened, published, exact):
    item = _item("Force", *stages)
    assert phygenbench_points(item, "closed") == closed and phygenbench_points(item, "open") == opened
    assert phygenbench_points(item) == published and phygenbench_points(item, "exact") == pytest.approx(exact)


def test_the_published_floor_never_gives_more_and_takes_up_to_half_a_point():
    losses = []
    for closed in range(4):
        for opened in range(4):
            item = _item(single=0, multi_gpt=closed, video_gpt=closed, multi_llava=opened, video_intern=opened)
            both = (phygenbench_points(item, "closed") + phygenbench_points(item, "open")) / 2
            losses.append(both - phygenbench_points(item))
    assert min(losses) == 0 and max(losses) == 0.5


def test_categories_weigh_by_their_items():
    names = (
        ["Force"] * 40 + ["Light"] * 50 + ["Heat"] * 30 + ["Physical Properties"] * 25 + ["Chemical Properties"] * 15
    )
    full = {"Force": 1, "Light": 2, "Heat": 3, "Physical Properties": 0, "Chemical Properties": 0}
    score = phygenbench_aggregate([_item(name, *[full[name]] * 5) for name in names])
    assert score.by_category == pytest.approx({"Mechanics": 1 / 3, "Optics": 2 / 3, "Thermal": 1.0, "Material": 0.0})
    assert tuple(score.counts.values()) == ITEMS_1B
    assert score.average == pytest.approx((40 + 100 + 90) / 480)
    assert set(CATEGORIES.values()) == set(score.counts)


def test_files_of_the_benchmark_are_read_from_a_folder(tmp_path):
    prompts = [
        {"caption": "Oil on water", "main_category": "Physical Properties", "explicit_caption": "Oil stays above."},
        {"caption": "A prism", "main_category": "Light", "explicit_caption": "Colours appear."},
    ]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "explicit_prompts.json").write_text(json.dumps(prompts))
    assert [p.groups for p in load_phygenbench(tmp_path)] == [("Material",), ("Optics",)]
    assert load_phygenbench(tmp_path, explicit=True)[0].generation_text == "Oil stays above."
    (tmp_path / "model.json").write_text(json.dumps([_item(), {"main_category": "Heat"}]))
    with pytest.raises(ValueError, match="item 1 .* lacks single, multi_gpt"):
        load_phygenbench_items(tmp_path / "model.json")
    (tmp_path / "model.json").write_text(json.dumps([_item(single=3)]))
    assert phygenbench_aggregate(load_phygenbench_items(tmp_path / "model.json"), "exact").average == pytest.approx(
        1 / 3
    )


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "at least one item"),
        ([_item(single=4)], "0 to 3 points for 'single', got 4"),
        ([_item(single=2.5)], "got 2.5"),
        ([{**_item(), "multi_gpt": None}], "got None"),
        ([_item("Magic")], "got 'Magic'"),
    ],
)
def test_phygenbench_refuses(items, message):
    with pytest.raises(ValueError, match=message):
        phygenbench_aggregate(items)
    with pytest.raises(ValueError, match="`mode` must be"):
        phygenbench_points(_item(), "best")
