import json
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict

from video_trl.judges.answers import AnswerError, read_answer


class Colour(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    colour: Literal["red", "blue"]
    share: int
    words: str = ""


RED = '{"colour": "red", "share": 3}'
BLUE = '{"colour": "blue", "share": 4}'


@pytest.mark.parametrize(
    "text",
    [
        RED,
        f"\n {RED} \n",
        f"```json\n{RED}\n```",
        f"```JSON\n{RED}\n```",
        f"```\n{RED}\n```",
        f"Here is the answer:\n```Json\n{RED}\n```\nI hope that it helps {{:-)",
        f"The ball is red. {RED}",
        f"<think>{BLUE}? No: {{}}.</think>{RED}",
        f"<thinking>hm</thinking>\n\n{RED}",
        f"no opening mark, as some servers cut it </think> {RED}",
        f"[THINK]{BLUE}[/THINK]{RED}",
        f"First I thought {BLUE}, but it is {RED}",
        f'{RED} The schema was {{"type": "object"}}.',
        f"the set {{1, 2}} and then {RED}",
        f"{{:-) It is {RED}",
        f"◁think▷{BLUE}◁/think▷{RED}",
        f"<seed:think>{BLUE}</seed:think>{RED}",
        f"{RED}\n<think>Or {BLUE}? I am not",
        f"[{RED}]",
        f'{{"answer": {RED}}}',
        f"```json\n{RED[:-1]},\n}}\n```",
        "{'colour': 'red', 'share': 3}",
        "{'colour': 'red', 'share': 3, 'words': ''}",
    ],
)
def test_the_answer_is_found_in_what_models_put_around_it(text):
    assert read_answer(text, Colour) == Colour(colour="red", share=3)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "Invalid JSON"),
        ("the ball is red", "Invalid JSON"),
        ('{"colour": "red", "sha', "Invalid JSON"),
        (f"<think>{RED}</think> I do not know.", "Invalid JSON"),
        ('{"colour": "red"}', "share: Field required"),
        ('{"colour": "red", "share": 3, "more": 1}', "more: Extra inputs"),
        ('{"colour": "red", "share": NaN}', "share: Input should be"),
        (f"<think>{RED}? Or", "Invalid JSON"),  # no thought is an answer
        (f'{{"draft": {RED}, "colour": "blue", "sha', "Invalid JSON"),  # nor what lies in an answer that is cut off
        (f'{{"draft": {RED}, "colour": "blue", share: 4}}', "Invalid JSON"),
        (f'{{"draft": {RED}, "share": 4}}', "colour: Field required"),
        (f'{{"a": {{"b": {RED}}}}}', "colour: Field required"),
        ("[" * 200_000, "Invalid JSON"),
        ("{" * 200_000, "Invalid JSON"),
        ('{"a":' * 100_000, "Invalid JSON"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "Invalid JSON"),
        ('{"colour": "red", "share": ' + "[" * 500 + "]" * 500 + "}", "Invalid JSON"),
    ],
)
def test_whatever_stands_in_a_reply_costs_that_reply_alone(text, fault):
    with pytest.raises(AnswerError, match=fault):
        read_answer(text, Colour)


def test_halves_of_characters_are_replaced():
    """No file, table or server takes a lone surrogate, written out or escaped."""
    for half in ("\ud83d", "\\ud83d", "\\udc00"):
        answer = read_answer(f'{{"colour": "red", "share": 3, "words": "a {half} b"}}', Colour)
        assert answer.words == "a \ufffd b"
        json.dumps(answer.model_dump()).encode()
        answer.words.encode("utf-8")
    assert read_answer('{"colour": "red", "share": 3, "words": "\\ud83c\\udf88"}', Colour).words == "🎈"
