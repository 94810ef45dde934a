"""Log-probabilities that a language model gives to a few fixed answers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .mplug_owl_model import MplugOwlVideo


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids -> `(B, L)` int64 ids, 0 behind short rows, and a `(B, L)` int64 mask of what is real."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return ids, mask


@torch.inference_mode()
def answer_logprobs(
    model: MplugOwlVideo, video_tokens: Tensor, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> Tensor:
    """
    Log-probability that the model continues each prompt with each answer, over the whole vocabulary, in float32.

    A prompt is read once; the answers share its cache. Padding stands on the right, where causal attention never
    looks at it, so that a row scores the same in any batch.

    Args:
        model: the network.
        video_tokens: `(B, V, D)`, from `model.encode_video`.
        prompts: B rows of token ids, each with the places of its video.
        answers: K answers of at least one token id each.

    Returns:
        `(B, K)` float32.
    """
    language = model.language_model
    ids, mask = pad_right(prompts, video_tokens.device)
    lengths = mask.sum(dim=1)
    outputs = language.model(
        inputs_embeds=model.embed(ids, video_tokens),
        attention_mask=mask,
        position_ids=torch.arange(ids.shape[1], device=ids.device).expand_as(ids),
        use_cache=True,
    )
    last = outputs.last_hidden_state[torch.arange(len(ids), device=ids.device), lengths - 1]
    first = torch.tensor([answer[0] for answer in answers], device=ids.device)
    logprobs = model.logits(last).log_softmax(dim=-1)[:, first]
    if max(map(len, answers)) == 1:
        return logprobs

    inputs, _ = pad_right([answer[:-1] for answer in answers], ids.device)  # (K, n)
    targets, real = pad_right([answer[1:] for answer in answers], ids.device)
    num_prompts, num_answers, steps = len(ids), len(answers), inputs.shape[1]
    outputs.past_key_values.batch_repeat_interleave(num_answers)
    ones = mask.new_ones(num_prompts * num_answers, steps)
    hidden = language.model(
        input_ids=inputs.repeat(num_prompts, 1),
        attention_mask=torch.cat([mask.repeat_interleave(num_answers, dim=0), ones], dim=1),
        position_ids=lengths.repeat_interleave(num_answers)[:, None] + torch.arange(steps, device=ids.device),
        past_key_values=outputs.past_key_values,
    ).last_hidden_state.unflatten(0, (num_prompts, num_answers))
    rest = model.logits(hidden).log_softmax(dim=-1)  # (B, K, n, V)
    rest = rest.gather(-1, targets.expand(num_prompts, -1, -1).unsqueeze(-1)).squeeze(-1)
    return logprobs + (rest * real).sum(dim=-1)
