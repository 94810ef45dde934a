"""CogVideoX's attention, over the tokens of prompt and video together, on the attention back ends of diffusers."""

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor


class JointAttentionProcessor:
    """
    What diffusers' own processor computes, but through its dispatcher of back ends: that one has a fixed kernel.

    A subclass may have a part of the video's tokens, and exchange tokens for heads around the attention.
    """

    _attention_backend = None  # diffusers writes the chosen one here

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Outputs for the video's tokens `(B, N, D)` and the prompt's `(B, L, D)`."""
        assert attention_mask is None, "CogVideoX has none"
        length = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # (B, L + N, D)
        query, key, value = (
            projection(tokens).unflatten(2, (attn.heads, -1)) for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if image_rotary_emb is not None:
            cos, sin = (self.own_positions(table) for table in image_rotary_emb)
            query, key = (
                torch.cat([x[:, :length], apply_rotary_emb(x[:, length:], (cos, sin), sequence_dim=1)], dim=1)
                for x in (query, key)
            )
        tokens = self.attend(query, key, value, length).flatten(2)
        for layer in attn.to_out:
            tokens = layer(tokens)
        return tokens[:, length:], tokens[:, :length]

    def own_positions(self, table: Tensor) -> Tensor:
        """Of a table of rotary embeddings of all tokens of the video, the part of those at hand."""
        return table

    def attend(self, query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
        """Attention `(B, L + N, H, .)`, of which the first `length` tokens are the prompt's."""
        return dispatch_attention_fn(query, key, value, backend=self._attention_backend)
