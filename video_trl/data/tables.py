"""Load a dataset that is named on the command line: a file, a folder or a Hub repository."""

from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import datasets


def load_rows(name: str, split: str) -> "datasets.Dataset":
    """
    The dataset that `--dataset_name` and `--dataset_split` name.

    Args:
        name (`str`): Folder written by `Dataset.save_to_disk`, or anything that `datasets.load_dataset` knows.
        split (`str`): Its split; a saved folder is one.

    Raises:
        ValueError: If it cannot be loaded.
    """
    import datasets

    if (Path(name) / "state.json").is_file():
        return datasets.load_from_disk(name)
    try:
        return datasets.load_dataset(name, split=split)
    except (ConnectionError, FileNotFoundError) as error:  # DatasetNotFoundError is a FileNotFoundError
        raise ValueError(
            f"--dataset_name: expected a dataset on the Hub or a folder on this machine, got {name!r}, which cannot "
            f"be loaded ({error}). Check the spelling, that a folder exists (relative paths start at {Path.cwd()}), "
            "and for the Hub the connection, HF_HUB_OFFLINE, and `hf auth login` where the repository is private."
        ) from error
