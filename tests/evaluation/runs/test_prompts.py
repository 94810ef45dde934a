import json

import pytest

from video_trl.evaluation.runs.prompts import EvaluationPrompt, check_prompts, load_prompts, prompts_hash


NASTY = 'A ball, "red" as blood,\nfalls; <b>fast</b>'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", 'prompt,category\n"A ball, ""red"" as blood,\nfalls; <b>fast</b>",fall\nplain,roll\n'),
        ("p.csv", '\ufeffcaption,category\r\n"A ball, ""red"" as blood,\nfalls; <b>fast</b>",fall\r\nplain,roll\r\n'),
        ("p.json", json.dumps([{"prompt": NASTY, "category": "fall"}, {"caption": "plain", "category": "roll"}])),
        (
            "p.jsonl",
            json.dumps({"prompt": NASTY, "category": "fall"}) + '\n\n{"prompt": "plain", "category": "roll"}\n',
        ),
    ],
)
def test_commas_quotes_and_newlines_survive_every_format(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert load_prompts(tmp_path / name) == (
        EvaluationPrompt(NASTY, category="fall"),
        EvaluationPrompt("plain", category="roll"),
    )


def test_lines_of_a_text_file_are_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n  two, with a comma \r\n")
    assert [prompt.text for prompt in load_prompts(tmp_path / "p.txt")] == ["one", "two, with a comma"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("p.txt", "one\ntwo"), ("p.json", '[" one ", {"prompt": "two\\n"}]'), ("p.csv", "prompt\n one \ntwo\n")],
)
def test_the_mark_of_windows_and_blanks_around_are_no_part_of_a_prompt(tmp_path, name, text):
    (tmp_path / name).write_text(f"\ufeff{text}", encoding="utf-8")
    assert [prompt.text for prompt in load_prompts(tmp_path / name)] == ["one", "two"]


def test_groups_in_json_are_a_list_or_one_text(tmp_path):
    entries = [{"prompt": "a", "groups": "hard; activity"}, {"prompt": "b", "groups": ["hard", "activity"]}]
    (tmp_path / "p.json").write_text(json.dumps(entries))
    assert {prompt.groups for prompt in load_prompts(tmp_path / "p.json")} == {("hard", "activity")}


def test_a_line_separator_inside_a_sentence_is_no_new_line(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps("a\u2028b", ensure_ascii=False) + "\n")
    assert load_prompts(tmp_path / "p.jsonl")[0].text == "a\u2028b"


def test_all_columns_are_read(tmp_path):
    (tmp_path / "p.csv").write_text(
        "prompt,generation_prompt,groups,image,source\na,a long one,hard; activity,a.png,x\nb,,,,y\n"
    )
    assert load_prompts(tmp_path / "p.csv") == (
        EvaluationPrompt("a", "a long one", "", ("hard", "activity"), str(tmp_path / "a.png")),
        EvaluationPrompt("b"),
    )


@pytest.mark.parametrize("name", ["p.csv", "p.json", "p.jsonl"])
def test_paths_of_images_start_at_the_file(tmp_path, monkeypatch, name):
    entries = [{"prompt": "a", "image": "first/a.png"}, {"prompt": "b", "image": str(tmp_path / "b.png")}]
    texts = {
        "p.csv": "prompt,image\n" + "".join(f"{entry['prompt']},{entry['image']}\n" for entry in entries),
        "p.json": json.dumps(entries),
        "p.jsonl": "".join(f"{json.dumps(entry)}\n" for entry in entries),
    }
    (tmp_path / name).write_text(texts[name])
    monkeypatch.chdir(tmp_path.parent)
    found = load_prompts(f"{tmp_path.name}/{name}")  # a relative path itself
    assert [prompt.image for prompt in found] == [str(tmp_path / "first" / "a.png"), str(tmp_path / "b.png")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "prompt\na, b\n", "row 1 has another number of cells"),
        ("p.csv", "text\na\n", r"got \['groups', 'text'\]"),
        ("p.csv", "prompt\na\na\n", "'a'"),
        ("p.csv", "prompt,groups\na,all\n", "'all' holds every prompt"),
        ("p.txt", "", "at least one prompt"),
        ("p.json", '{"prompt": "a"}', "expected a list"),
        ("p.json", "[1]", "got int"),
        ("p.json", '[{"prompt": "a", "groups": [1]}]', r"groups.*got \[1\]"),
        ("p.json", "[", "cannot be read as JSON"),
        ("p.jsonl", '"a"\n{', "line 2, cannot be read as JSON"),
        ("p.yaml", "- a", "ending in .txt, .csv"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_prompts(tmp_path / name)
    assert name in str(caught.value)


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="gone.csv cannot be read"):
        load_prompts(tmp_path / "gone.csv")
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        load_prompts(tmp_path / "p.txt")


def test_hash_sees_every_part_and_the_order():
    prompts = check_prompts(["a", "b"])
    hashes = {
        prompts_hash(prompts),
        prompts_hash(prompts[::-1]),
        prompts_hash(check_prompts(["a", EvaluationPrompt("b", category="c")])),
        prompts_hash(check_prompts(["a", EvaluationPrompt("b", generation_text="c")])),
        prompts_hash(check_prompts(["a", EvaluationPrompt("b", groups=("c",))])),
    }
    assert len(hashes) == 5
    assert all(EvaluationPrompt.from_dict(json.loads(json.dumps(p.to_dict()))) == p for p in prompts)
