"""Longer sentences for the model: read, written by a chat model on a real server, and kept from the judge."""

import csv
import json

import pytest

from tests.support.judges.server import Step, serving
from video_trl.cli import main
from video_trl.evaluation.evaluate import evaluation_prompts
from video_trl.evaluation.runs.longer_prompts import MAX_WORDS, read_longer_prompts, write_longer_prompts
from video_trl.evaluation.runs.run import load_run
from video_trl.judges import ChatClient


def client(server, **options):
    return ChatClient(server.url, "writer", **({"backoff": 1e-3, "concurrency": 1} | options))


def echo(request):
    """A writer that says what it was asked about."""
    (line,) = [
        line for line in request["messages"][1]["content"][-1]["text"].splitlines() if line.startswith("This is")
    ]
    return Step({"prompt": f"On a table,  {json.loads(line.partition(': ')[2])}\nin the light."})


def test_sentences_are_written_once_and_kept_as_they_come(tmp_path):
    path = tmp_path / "longer.csv"
    texts = ['a "red" ball, falling', "a glass breaks", "a glass breaks"]
    with serving(echo) as server:
        written = write_longer_prompts(texts, client(server), path)
        assert len(server.requests) == 2 and f"fewer than\n{MAX_WORDS} words" in str(
            server.requests[0]["messages"][1]["content"][-1]["text"]
        )
        assert written == {text: f"On a table, {text} in the light." for text in texts} == read_longer_prompts(path)
        write_longer_prompts([*texts, "water boils"], client(server), path)
        assert len(server.requests) == 3
        write_longer_prompts([" water boils\n"], client(server), path)  # blanks make no other sentence
        assert len(server.requests) == 3
    (prompt,) = evaluation_prompts([" water boils\n"], longer=path)
    assert prompt.generation_text == "On a table, water boils in the light."


def test_what_the_writer_cannot_do_is_named_and_the_rest_stays(tmp_path):
    path = tmp_path / "longer.csv"
    endless = Step({"prompt": "word " * 300})
    with serving(echo, endless, endless, echo) as server:
        with pytest.raises(ValueError, match=r"no valid answer for 1 of 3 prompts, the first being 'b'.*got 300"):
            write_longer_prompts(["a", "b", "c"], client(server), path)
    assert list(read_longer_prompts(path)) == ["a", "c"]
    with pytest.raises(ValueError, match="1 of 2 prompts have no longer sentence, the first being 'b'"):
        evaluation_prompts(["a", "b"], longer=path)


@pytest.mark.parametrize("header", [("prompt", "generation_prompt"), ("caption", "upsampled_caption")])
def test_tables_of_others_are_read(tmp_path, header):
    path = tmp_path / "table.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, ("a", "long a"), ("b", "long b"), ("a", "other")])
    assert read_longer_prompts(path) == {"a": "long a", "b": "long b"}
    prompts = evaluation_prompts(["b", "a"], longer=path)
    assert [(prompt.text, prompt.generation_text) for prompt in prompts] == [("b", "long b"), ("a", "long a")]
    path.write_text("prompt,text\na,b\n")
    with pytest.raises(ValueError, match="expected a column prompt or caption and a column generation_prompt"):
        read_longer_prompts(path)


def test_videophy2_has_its_own(tmp_path):
    path = tmp_path / "videophy2.csv"
    path.write_text("caption,category,action,is_hard,upsampled_caption\na ball,,roll,0,a long ball\n")
    (prompt,) = evaluation_prompts(path, benchmark="videophy2", longer="upsampled")
    assert (prompt.text, prompt.generation_text) == ("a ball", "a long ball")
    with pytest.raises(ValueError, match="a column of VideoPhy-2's table"):
        evaluation_prompts(["a ball"], longer="upsampled")


def test_the_command_gives_the_model_the_long_ones_and_the_judge_the_short_ones(tmp_path, capsys):
    """The sandbox's exact judge knows the short sentences alone, so that it could not judge the others."""
    path, run = tmp_path / "longer.csv", tmp_path / "run"
    argv = [
        "--num_prompts",
        "2",
        "--num_inference_steps",
        "1",
        "--output_dir",
        str(run),
        "--longer_prompts",
        str(path),
    ]
    with serving(echo) as server:
        options = ["--prompt_writer", server.url, "--prompt_writer_options", '{"model": "writer"}']
        assert main(["eval", *argv, *options]) == 0
    assert "sandbox-exact" in capsys.readouterr().out
    made = load_run(run)
    assert [case.prompt.generation_text for case in made.cases] == [
        f"On a table, {case.prompt.text} in the light." for case in made.cases
    ]
    assert main(["eval", "--prompt_writer", "http://localhost:1/v1"]) == 2
    assert "--longer_prompts is needed" in capsys.readouterr().err
