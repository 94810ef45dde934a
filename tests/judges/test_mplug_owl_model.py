"""The network against its formulas written out, and the published state dicts that it has to load."""

import math

import pytest
import torch

from tests.support import rounding
from tests.support.judges.tiny_owl import CONFIG, published_state_dict, tiny_model, write_checkpoint
from video_trl.judges.answer_logprobs import answer_logprobs
from video_trl.judges.mplug_owl_loading import convert_state_dict, load_mplug_owl
from video_trl.judges.mplug_owl_model import VIDEO_TOKEN, LayerNorm32, MplugOwlSizes, MplugOwlVideo


CPU = torch.device("cpu")
MODEL = tiny_model()
STATE = MODEL.state_dict()


def _norm(x, name, eps):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * STATE[f"{name}.weight"] + STATE[f"{name}.bias"]


def _linear(x, name):
    return x @ STATE[f"{name}.weight"].T + STATE[f"{name}.bias"]


def _quick_gelu(x):
    return x / (1 + torch.exp(-1.702 * x))


def _attention(query, key, value):
    """One head: (n, d), (m, d), (m, d) -> (n, d)."""
    return torch.softmax(query @ key.T / math.sqrt(query.shape[1]), dim=1) @ value


def _temporal(x, name):
    """(T, 1 + N, D): a bottleneck, and between its two halves a kernel of three over time, patch by patch."""
    out = x.clone()  # the class token stays what it is
    for n in range(1, x.shape[1]):
        inner = _linear(_norm(x[:, n], f"{name}.ln", 1e-5), f"{name}.down_proj")
        kernel, mixed = STATE[f"{name}.conv.weight"], torch.zeros_like(inner)
        for t in range(len(inner)):
            for k in range(3):
                if 0 <= t + k - 1 < len(inner):
                    mixed[t] += kernel[:, 0, k] * inner[t + k - 1]
        out[:, n] = _linear(_quick_gelu(mixed + STATE[f"{name}.conv.bias"]), f"{name}.up_proj")
    return out


def _vision_layer(x, index):
    """(T, 1 + N, D) of one video."""
    name, heads, size = f"vision_model.encoder.layers.{index}", 2, 8
    x = x + _temporal(x, f"{name}.temporal") if len(x) > 1 else x
    frames = []
    for frame in x:
        normed = _norm(frame, f"{name}.input_layernorm", 1e-6)
        mixed = _linear(normed, f"{name}.self_attn.query_key_value")
        outputs = []
        for head in range(heads):  # query, key and value of a head stand next to each other
            q, k, v = (mixed[:, (3 * head + i) * size : (3 * head + i + 1) * size] for i in range(3))
            outputs.append(_attention(q, k, v))
        frame = frame + _linear(torch.cat(outputs, dim=1), f"{name}.self_attn.dense")
        normed = _norm(frame, f"{name}.post_attention_layernorm", 1e-6)
        frame = frame + _linear(_quick_gelu(_linear(normed, f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        frames.append(frame)
    return torch.stack(frames)


def _vision(frames):
    """(T, 3, 28, 28) -> (T, 5, 16)."""
    kernel, tokens = STATE["vision_model.embeddings.patch_embed.weight"], []
    for frame in frames:
        patches = [
            torch.einsum("chw,dchw->d", frame[:, 14 * row : 14 * row + 14, 14 * col : 14 * col + 14], kernel)
            for row in range(2)
            for col in range(2)
        ]
        tokens.append(torch.stack([STATE["vision_model.embeddings.cls_token"][0, 0], *patches]))
    x = torch.stack(tokens) + STATE["vision_model.embeddings.position_embedding"]
    x = _norm(x, "vision_model.embeddings.pre_layernorm", 1e-6)
    for index in range(2):
        x = _vision_layer(x, index)
    return _norm(x, "vision_model.post_layernorm", 1e-6)


def _abstract(video):
    """(M, 16) -> (4, 16): 3 queries and the end token."""
    x = torch.cat([STATE["query_tokens"][0], STATE["temporal_query_tokens"][0]])
    for index in range(2):
        name = f"abstractor.encoder.layers.{index}.crossattention"
        x = _norm(x, f"{name}.norm1", 1e-5)  # and the residual starts here
        context = torch.cat([x, _norm(video, f"{name}.normk", 1e-5)])
        q, k, v = (
            _linear(y, f"{name}.attention.{part}") for part, y in (("query", x), ("key", context), ("value", context))
        )
        heads = [_attention(*(y[:, 8 * head : 8 * head + 8] for y in (q, k, v))) for head in range(2)]
        x = x + _linear(torch.cat(heads, dim=1), f"{name}.output.out_proj")
        mlp, normed = f"{name}.output.mlp", _norm(x, f"{name}.output.norm2", 1e-5)
        gate = _linear(normed, f"{mlp}.w1")
        inner = gate * torch.sigmoid(gate) * _linear(normed, f"{mlp}.w3")
        x = x + _linear(_norm(inner, f"{mlp}.ffn_ln", 1e-6), f"{mlp}.w2")
    tokens = _linear(x[:3], "abstractor.visual_fc") + _linear(x[3:], "abstractor.temporal_visual_fc")
    return torch.cat([tokens, STATE["abstractor.vit_eos"][0]])


@pytest.fixture(scope="module")
def frames():
    return torch.randn(2, 5, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def test_vision_encoder_is_the_formulas(frames):
    expected = torch.stack([_vision(video).flatten(0, 1) for video in frames])
    torch.testing.assert_close(MODEL.vision_model(frames), expected, rtol=1e-4, atol=1e-4)


def test_a_single_frame_skips_the_temporal_adapter(frames):
    expected = _vision(frames[0, :1]).flatten(0, 1)
    torch.testing.assert_close(MODEL.vision_model(frames[:1, :1])[0], expected, rtol=1e-4, atol=1e-4)


def test_abstractor_is_the_formulas(frames):
    expected = torch.stack([_abstract(_vision(video).flatten(0, 1)) for video in frames])
    torch.testing.assert_close(MODEL.encode_video(frames), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("num_frames", "factor"), [(1, 1.0), (3, 4.0)])
def test_the_class_token_doubles_in_every_layer_of_a_video(num_frames, factor):
    model = tiny_model()
    silent = ("up_proj", "self_attn.dense", "mlp.fc2")
    with torch.no_grad():
        for name, parameter in model.vision_model.named_parameters():
            if any(part in name for part in silent):
                parameter.zero_()
    x = torch.randn(1, num_frames, 5, 16)
    y = x
    for layer in model.vision_model.encoder.layers:
        y = layer(y)
    torch.testing.assert_close(y[:, :, 0], factor * x[:, :, 0])
    torch.testing.assert_close(y[:, :, 1:], x[:, :, 1:])


def test_layer_norms_compute_in_float32_whatever_the_dtype():
    norm = LayerNorm32(16).to(torch.bfloat16)
    x = (torch.randn(4, 16) * 1e4 + 3e4).to(torch.bfloat16)
    expected = torch.nn.functional.layer_norm(x.float(), (16,), norm.weight.float(), norm.bias.float(), norm.eps)
    assert torch.equal(norm(x), expected.to(torch.bfloat16))


def test_the_video_takes_its_place_in_the_text():
    ids = torch.tensor([[1, 5, *[VIDEO_TOKEN] * 4, 7], [1, *[VIDEO_TOKEN] * 4, 8, 9]])
    video = torch.randn(2, 4, 16)
    table = MODEL.language_model.get_input_embeddings().weight
    expected = torch.stack(
        [torch.cat([table[[1, 5]], video[0], table[[7]]]), torch.cat([table[[1]], video[1], table[[8, 9]]])]
    )
    assert torch.equal(MODEL.embed(ids, video), expected)


# ---- answers --------------------------------------------------------------------------------------------------------


def _logprob_by_hand(prompt, video, answer):
    """The whole sequence at once, without cache or padding: sum of the answer's token log-probabilities."""
    ids = torch.tensor([[*prompt, *answer]])
    logits = MODEL.language_model(inputs_embeds=MODEL.embed(ids, video[None])).logits[0].double()
    start = len(prompt) - 1
    return sum(logits[start + i].log_softmax(0)[token].item() for i, token in enumerate(answer))


PROMPTS = [
    [1, 9, *[VIDEO_TOKEN] * 4, 20, 21],
    [1, *[VIDEO_TOKEN] * 4, 30, 31, 32, 33, 34, 35],
    [1, *[VIDEO_TOKEN] * 4, 40],
]


@pytest.mark.parametrize(
    "answers", [[[3], [4]], [[50, 51, 2], [50, 52, 2]], [[3], [50, 51], [60, 61, 62, 2]]], ids=["one", "same", "mixed"]
)
def test_candidates_score_as_the_whole_sequence_would(answers):
    video = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(2))
    found = answer_logprobs(MODEL, video, PROMPTS, answers)
    expected = [[_logprob_by_hand(p, v, a) for a in answers] for p, v in zip(PROMPTS, video, strict=True)]
    assert found.dtype == torch.float32
    rounding.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rounding.SINGLE)


def test_a_prompt_scores_the_same_in_any_batch():
    video = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(3))
    answers = [[50, 51, 2], [3]]
    together = answer_logprobs(MODEL, video, PROMPTS, answers)
    alone = torch.cat([answer_logprobs(MODEL, video[i : i + 1], [PROMPTS[i]], answers) for i in range(3)])
    rounding.assert_close(together, alone, rounding.SINGLE)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_state_dict_survives_the_published_layout(tmp_path):
    published = published_state_dict(MODEL)
    folded = {name: tensor for name, tensor in published.items() if tensor.ndim == 5}
    assert sorted({name.split(".temporal.")[1] for name in folded}) == [
        "conv.weight",
        "down_proj.weight",
        "up_proj.weight",
    ]
    converted = convert_state_dict(published, torch.float32)
    assert converted.keys() == STATE.keys()  # nothing renamed; the rotary tables are gone
    assert all(torch.equal(converted[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("shards", [1, 3])
def test_loading_gives_the_same_numbers(tmp_path, frames, shards):
    loaded = load_mplug_owl(write_checkpoint(tmp_path, MODEL, shards), torch.float32, CPU)
    assert torch.equal(loaded.encode_video(frames), MODEL.encode_video(frames))
    ids = torch.tensor([PROMPTS[0]])
    video = torch.randn(1, 4, 16)
    ours, theirs = (m.language_model(inputs_embeds=m.embed(ids, video)).logits for m in (loaded, MODEL))
    assert torch.equal(ours, theirs)  # the rotary table, which no file holds, is right
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())


def test_bfloat16_is_for_the_weights_only(tmp_path, frames):
    loaded = load_mplug_owl(write_checkpoint(tmp_path, MODEL), torch.bfloat16, CPU)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    video = loaded.encode_video(frames.bfloat16())
    assert video.dtype == torch.bfloat16
    assert answer_logprobs(loaded, video[:1], PROMPTS[:1], [[3], [4]]).dtype == torch.float32


def test_defaults_are_the_sizes_of_the_published_model():
    with torch.device("meta"):
        model = MplugOwlVideo(MplugOwlSizes.from_config({"model_type": "mplug-owl"}))
    millions = {
        name: sum(p.numel() for p in module.parameters()) / 1e6
        for name, module in (("vision", model.vision_model), ("llm", model.language_model), ("all", model))
    }
    assert millions == pytest.approx({"vision": 328.5, "llm": 6738.4, "all": 7152.6}, abs=0.06)
    assert model.sizes.num_video_tokens == 65


@pytest.mark.parametrize(("written", "width"), [(2816, 2816), (4096, 2816), (24, 256)])
def test_width_of_the_gated_layers_follows_the_original_rounding(written, width):
    config = CONFIG | {"visual_abstractor_config": CONFIG["visual_abstractor_config"] | {"intermediate_size": written}}
    assert MplugOwlSizes.from_config(config).abstractor_ff == width


def test_another_models_config_is_refused():
    with pytest.raises(ValueError, match="'qwen2_5_vl'"):
        MplugOwlSizes.from_config({"model_type": "qwen2_5_vl"})
    with pytest.raises(ValueError, match="'bloom'"):
        MplugOwlSizes.from_config({"model_type": "mplug-owl", "text_config": {"model_type": "bloom"}})
