"""Check the weights of latents' elements against the latents, and against what the method does with an error."""

from ...data.columns import as_loss_weights, cells, column_names
from .rows import IndexedDataset


def check_loss_weights(rows: IndexedDataset, *, given_frames: int, pulls_on_errors: bool) -> None:
    """
    Check the column `loss_weights`, where there is one.

    Args:
        rows ([`IndexedDataset`]): Encoded rows.
        given_frames (`int`): Latent frames, from the first, that are no part of an error.
        pulls_on_errors (`bool`): Whether the loss has a term that lowers an error, or divides by one.

    Raises:
        ValueError: Names the row. Weights have another shape than the latents, nothing but given frames has one, or
            some are negative where the loss is made of more than differences of errors.
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
        if pulls_on_errors and (weights < 0).any():
            raise ValueError(
                f"Row {number}: 'loss_weights' has negative numbers, which say that the rejected video is better "
                "there. They go with a loss of differences alone: no weight of the chosen error (`sft_coefficient`, "
                "`sft_weight`), no `win_gap_penalty`, `gap='raw'`."
            )
