"""Names of Wan's layers in its original code and in diffusers, and as other tools write the former."""

import re
from collections.abc import Mapping


_IN_BLOCK = {  # names of layers in `blocks.N`, there and in diffusers
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_OUTSIDE = {  # of other layers
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "head.head": "proj_out",
}


def original_name(name: str) -> str | None:
    """Name of a layer in Wan's original code, from that in diffusers; `None` where it has none."""
    in_block, outside = ({ours: theirs for theirs, ours in names.items()} for names in (_IN_BLOCK, _OUTSIDE))
    return _renamed_layer(name, in_block, outside)


def diffusers_name(name: str) -> str | None:
    """Name of a layer in diffusers, from that in Wan's original code; `None` where it has none."""
    return _renamed_layer(name, _IN_BLOCK, _OUTSIDE)


def _renamed_layer(name: str, in_block: Mapping[str, str], outside: Mapping[str, str]) -> str | None:
    block = re.match(r"blocks\.\d+\.", name)
    if block is None:
        return outside.get(name)
    inner = in_block.get(name[block.end() :])
    return None if inner is None else block[0] + inner


def layer_with_underscores(name: str) -> str | None:
    """Name of a layer in diffusers, from that of the original code with an underscore for each dot."""
    block = re.match(r"blocks_(\d+)_", name)
    names, inner = (_OUTSIDE, name) if block is None else (_IN_BLOCK, name[block.end() :])
    found = next((ours for theirs, ours in names.items() if theirs.replace(".", "_") == inner), None)
    return found if found is None or block is None else f"blocks.{block[1]}.{found}"
