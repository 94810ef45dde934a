"""Check the weights of latents' elements against what the method does with an error, and against the latents."""

from ...data.columns import MapDataset, as_loss_weights, cells, column_names
from .rows import IndexedDataset


def check_signs(dataset: MapDataset, *, pulls_on_errors: bool) -> None:
    """
    Check the column `loss_weights` of raw or encoded rows, where there is one.

    Args:
        dataset (`MapDataset`): The rows.
        pulls_on_errors (`bool`): Whether the loss has a term that lowers an error, or divides by one.

    Raises:
        ValueError: If some are negative where the loss is made of more than differences of errors. Names the row.
    """
    if not pulls_on_errors or "loss_weights" not in column_names(dataset):
        return
    for number, cell in enumerate(cells(dataset, "loss_weights")):
        if cell is not None and (as_loss_weights(cell) < 0).any():
            raise ValueError(
                f"Row {number}: 'loss_weights' has negative numbers, which say that the rejected video is better "
                "there. They go with a loss of differences alone: no weight of the chosen error (`sft_coefficient`, "
                "`sft_weight`), no `win_gap_penalty`, `gap='raw'`."
            )


def check_loss_weights(rows: IndexedDataset, *, given_frames: int) -> None:
    """
    Check the column `loss_weights` of encoded rows, where there is one.

    Args:
        rows ([`IndexedDataset`]): The rows.
        given_frames (`int`): Latent frames, from the first, that are no part of an error.

    Raises:
        ValueError: Names the row. Weights have another shape than the latents, or nothing but given frames has one.
    """
    if "loss_weights" not in column_names(rows.rows):
        return
    for number, (cell, shape) in enumerate(zip(cells(rows.rows, "loss_weights"), rows.shapes, strict=True)):
        if cell is None:
            continue
        weights = as_loss_weights(cell)
        expected = shape[1:] if weights.ndim == 3 else shape[1:2]
        if weights.shape != tuple(expected):
            raise ValueError(
                f"Row {number}: expected 'loss_weights' of shape {tuple(shape[1:2])} or {tuple(shape[1:])}, as its "
                f"latents {tuple(shape)} have frames and places, got {weights.shape}. Make them for videos of this "
                "size."
            )
        if not weights[given_frames:].any():
            raise ValueError(
                f"Row {number}: 'loss_weights' are 0 everywhere but in the first latent frame, which is given and is "
                "no part of the loss. Drop the row."
            )
