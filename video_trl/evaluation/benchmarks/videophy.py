"""
VideoPhy (https://huggingface.co/papers/2406.03520): 344 test sentences about the interaction of two states of matter.

The table of sentences is the user's or the Hub's; nothing of it is shipped. Scores are counted by the rule
`"videophy"`: a video passes with at least 0.5, as VideoREPA (https://huggingface.co/papers/2505.23656) counts them.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ...files import read_csv
from ..runs.prompts import EvaluationPrompt, check_prompts


REPOSITORY = "videophysics/videophy_test_public"
FILE_NAME = "videophy_test_public.csv"
STATES = ("solid_solid", "solid_fluid", "fluid_fluid")


def load_videophy(
    source: str | os.PathLike[str] = REPOSITORY, *, refined: Mapping[str, str] | None = None
) -> tuple[EvaluationPrompt, ...]:
    """
    The sentences of VideoPhy, grouped by states of matter.

    Args:
        source (path or `str`, *optional*): CSV file with the columns `caption` and `states_of_matter`, or the id of
            the dataset repository. A sentence stands there once for each rated model; the first row counts.
        refined (`dict[str, str]`, *optional*): Longer sentence for each sentence, given to the model in its place
            (the rows marked * in VideoREPA's Table 1). The judge reads the short one.

    Returns:
        `tuple[EvaluationPrompt, ...]`: Group and category are the states of matter.

    Raises:
        ValueError: If the file is not there, lacks a column or holds another state, or `refined` lacks a sentence.
    """
    prompts: dict[str, EvaluationPrompt] = {}
    for row in table_rows(source, FILE_NAME, ("caption", "states_of_matter")):
        state = row["states_of_matter"].strip()
        if state not in STATES:
            raise ValueError(f"{source}: expected states_of_matter among {', '.join(STATES)}, got {state!r}.")
        text = row["caption"].strip()
        prompts.setdefault(text, EvaluationPrompt(text, _refined(text, refined), state, (state,)))
    return check_prompts(list(prompts.values()))


def table_rows(source: str | os.PathLike[str], file_name: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """
    Rows of a benchmark's CSV file on this machine or in a dataset repository.

    Raises:
        ValueError: If there is no such file or repository, or a column is missing.
    """
    path = Path(source)
    if not path.is_file():
        try:
            path = Path(hf_hub_download(os.fspath(source), file_name, repo_type="dataset"))
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            raise ValueError(
                f"No file {os.fspath(source)!r}, and {file_name} of the dataset of that id cannot be loaded "
                f"({error}). Download it where there is a connection and pass its path."
            ) from error
    rows = read_csv(path)
    missing = [name for name in columns if rows and name not in rows[0]]
    if missing or not rows:
        raise ValueError(f"{path}: expected rows with the columns {', '.join(columns)}; missing: {missing or 'rows'}.")
    return rows


def _refined(text: str, refined: Mapping[str, str] | None) -> str | None:
    if refined is None:
        return None
    if text not in refined:
        raise ValueError(f"`refined` has no longer sentence for {text!r}; every sentence needs one.")
    return refined[text]
