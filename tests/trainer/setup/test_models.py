"""What can be passed as model, data and adapter, and what is refused before anything expensive."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from peft import LoKrConfig, LoraConfig, get_peft_model

from tests.support.tiny import (
    tiny_encoded_group,
    tiny_encoded_video,
    tiny_group_dataset,
    tiny_transformer,
    tiny_wan_pipeline,
)
from tests.support.trainer.runs import config, trained_weights, trainer
from video_trl import VideoGroupDPOTrainer, VideoSFTConfig, VideoSFTTrainer
from video_trl.trainer.callbacks import LogVideosCallback


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline on disk, in diffusers layout."""
    directory = tmp_path_factory.mktemp("pipeline")
    tiny_wan_pipeline().save_pretrained(directory)
    return directory


@pytest.fixture
def broken(saved, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(saved, tmp_path / "broken")


def test_a_path_is_loaded_and_trained(saved, tmp_path):
    made = trainer(config(tmp_path, max_steps=1), model=str(saved))
    assert isinstance(made.pipeline, DiffusionPipeline) and made.model is made.pipeline.transformer
    assert made.checkpointer.base_model == str(saved) and made.timestep_shift == 1.0
    made.train()
    made.save_model()
    assert f"`{saved}`" in (tmp_path / "README.md").read_text()


def test_a_pipeline_loaded_from_a_path_object_can_be_saved(saved, tmp_path):
    made = trainer(config(tmp_path), model=DiffusionPipeline.from_pretrained(saved))
    made.save_model()  # writes the name of the base model, as JSON
    assert made.checkpointer.base_model == str(saved) and f"`{saved}`" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("use_peft", "bf16", "expected"),
    [(True, True, torch.bfloat16), (True, False, torch.float32), (False, True, torch.float32)],
)
def test_the_precision_of_a_loaded_model_fits_its_use(saved, tmp_path, use_peft, bf16, expected):
    made = trainer(config(tmp_path, use_peft=use_peft, bf16=bf16), model=str(saved))
    assert made.model.blocks[0].ffn.net[2].weight.dtype == expected
    assert made.pipeline.vae.dtype == torch.float32
    assert {weight.dtype for weight in trained_weights(made).values()} == {torch.float32}


def test_model_init_kwargs_reach_from_pretrained(saved, tmp_path):
    made = trainer(config(tmp_path, model_init_kwargs={"dtype": torch.bfloat16}), model=str(saved))
    assert made.pipeline.vae.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="`model_init_kwargs` is used when the model is named by a string"):
        trainer(config(tmp_path, model_init_kwargs={"revision": "main"}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nobody/no-such-model",
            "cannot be reached .offline mode.*Check the spelling.*hf download nobody/no-such-model",
        ),
        ("./no/such/folder", "No folder './no/such/folder', and it is not a valid repository id"),
        ("a/b/c", "not a valid repository id"),
    ],
)
def test_an_unknown_name_is_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        trainer(config(tmp_path), model=name)


def test_a_folder_in_another_layout_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="without model_index.json .it holds .'config.json'.*folder above"):
        trainer(config(tmp_path), model=str(saved / "transformer"))


def test_a_file_as_a_model_is_told_where_it_belongs(tmp_path):
    (tmp_path / "wan.safetensors").touch()
    with pytest.raises(ValueError, match="wan.safetensors is a file; expected a folder.*file as `transformer_file`"):
        trainer(config(tmp_path), model=str(tmp_path / "wan.safetensors"))


def test_a_missing_subfolder_is_named(broken, tmp_path):
    shutil.rmtree(broken / "text_encoder")
    with pytest.raises(ValueError, match=r"lacks the subfolder\(s\) \['text_encoder'\]"):
        trainer(config(tmp_path), model=str(broken))


def test_missing_weights_are_named(broken, tmp_path):
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="Could not load the pipeline .*broken"):
        trainer(config(tmp_path), model=str(broken))


def test_a_broken_index_is_named(broken, tmp_path):
    (broken / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="model_index.json is not valid JSON"):
        trainer(config(tmp_path), model=str(broken))


def test_a_pipeline_of_another_family_is_refused_before_its_weights_are_read(broken, tmp_path):
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="holds a FluxPipeline; supported pipelines: WanPipeline"):
        trainer(config(tmp_path), model=str(broken))


class Hub(BaseHTTPRequestHandler):
    """Answers as huggingface.co does when it refuses: the name of the repository says how."""

    answers = {
        "private": (401, "RepoNotFound"),
        "gated": (403, "GatedRepo"),
        "moved": (404, "RevisionNotFound"),
        "weights-only": (404, "EntryNotFound"),
    }

    def do_HEAD(self):
        status, code = self.answers[self.path.split("/")[2]]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """huggingface_hub talks to a server in this process instead of being offline."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    template = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("private", "no repository of that id on the Hub.*private repository needs `hf auth login`"),
        ("gated", "is gated: accept its terms"),
        ("moved", "has no revision 'v9'"),
        ("weights-only", "has no model_index.json: it is not in diffusers layout"),
    ],
)
def test_what_the_hub_refuses_is_told_apart(hub, tmp_path, name, message):
    with pytest.raises(ValueError, match=f"'someone/{name}'.*{message}"):
        trainer(config(tmp_path, model_init_kwargs={"revision": "v9"}), model=f"someone/{name}")


def test_objects_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`model` must be 'sandbox', a repository id.*got Linear"):
        trainer(config(tmp_path), model=torch.nn.Linear(1, 1))
    wrapped = get_peft_model(tiny_transformer(), LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ValueError, match="is a `PeftModel`.*as `peft_config`"):
        trainer(config(tmp_path), model=wrapped)
    pipeline = tiny_wan_pipeline()
    pipeline.register_modules(transformer_2=tiny_transformer(1))
    with pytest.raises(ValueError, match="got one with .*transformer_2"):
        trainer(config(tmp_path), model=pipeline)


def test_a_bare_transformer_needs_encoded_data(tmp_path):
    with pytest.raises(ValueError, match="bare transformer and the dataset holds videos"):
        trainer(config(tmp_path), model=tiny_transformer(), train_dataset=tiny_group_dataset(1, 1))
    with pytest.raises(ValueError, match="needs a shift.*Set `timestep_shift`"):
        trainer(config(tmp_path, timestep_sampling="shifted"), model=tiny_transformer())
    with pytest.raises(ValueError, match="`evaluator` generates with the trainer's pipeline.*bare transformer"):
        trainer(config(tmp_path), model=tiny_transformer(), evaluator=lambda pipeline, **kwargs: {})
    with pytest.raises(ValueError, match="given a bare transformer"):
        trainer(config(tmp_path), model=tiny_transformer(), callbacks=[LogVideosCallback(["a ball"])])
    made = trainer(config(tmp_path, max_steps=1, max_sequence_length=16), model=tiny_transformer())
    made.train()
    assert made.state.global_step == 1


@pytest.mark.parametrize(
    ("peft_config", "message"),
    [
        (LoraConfig(target_modules=["to_q"], init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (LoraConfig(target_modules=["to_q"], modules_to_save=["proj_out"]), "`modules_to_save` must be empty"),
        (LoraConfig(target_modules=["to_q"], bias="all"), "`bias` must be 'none'"),
        (LoKrConfig(target_modules=["to_q"]), "must be a `peft.LoraConfig`, got LoKrConfig"),
        (LoraConfig(target_modules=["to_q", "no_such_layer"]), r"got \['no_such_layer'\], which match none.*to_q"),
        (LoraConfig(target_modules="no_such.*"), r"got \['no_such\.\*'\], which match none"),
        (LoraConfig(), "got None, which match none"),
    ],
)
def test_unsupported_adapters_are_refused(tmp_path, peft_config, message):
    with pytest.raises(ValueError, match=message):
        trainer(config(tmp_path), peft_config=peft_config)


def test_adapters_that_are_there_already_must_be_unambiguous(tmp_path):
    pipeline = tiny_wan_pipeline()
    pipeline.transformer.add_adapter(LoraConfig(target_modules=["attn1.to_q"]), "one")
    with pytest.raises(ValueError, match="already carries the adapter 'one' and `peft_config`"):
        trainer(config(tmp_path), model=pipeline, peft_config=LoraConfig(target_modules=["attn1.to_q"]))
    with pytest.raises(ValueError, match="trains all weights, but the transformer carries the adapters"):
        trainer(config(tmp_path, use_peft=False), model=pipeline)
    pipeline.transformer.add_adapter(LoraConfig(target_modules=["attn1.to_k"]), "two")
    with pytest.raises(ValueError, match=r"carries the adapters \['one', 'two'\]; which one to train is unclear"):
        trainer(config(tmp_path), model=pipeline)


def test_arguments_that_do_not_fit_are_refused(tmp_path):
    pipeline = tiny_wan_pipeline()
    args = config(tmp_path)
    with pytest.raises(ValueError, match="`args` must be a `VideoGroupDPOConfig`, got a `VideoSFTConfig`"):
        VideoGroupDPOTrainer(pipeline, VideoSFTConfig(output_dir=str(tmp_path)), tiny_encoded_group(1))
    with pytest.raises(ValueError, match="Expected a `train_dataset`"):
        VideoGroupDPOTrainer(pipeline, args)
    with pytest.raises(ValueError, match="`ref_model` is the very transformer that is trained"):
        trainer(args, model=pipeline, ref_model=pipeline)
    with pytest.raises(ValueError, match="num_layers: 2 / 1"):
        trainer(args, ref_model=tiny_transformer(num_layers=1))
    with pytest.raises(ValueError, match="`ref_model` must be of the class of the model"):
        trainer(args, ref_model=tiny_wan_pipeline().vae)
    with pytest.raises(ValueError, match="`use_peft=False` trains all weights. Drop one"):
        trainer(config(tmp_path, use_peft=False), peft_config=LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ValueError, match="VideoSFTTrainer has no reference"):
        args = VideoSFTConfig(output_dir=str(tmp_path))
        VideoSFTTrainer(pipeline, args, tiny_encoded_video(1), ref_model=tiny_transformer())


def test_a_refused_model_is_left_as_it_was(tmp_path):
    """In a notebook the second, corrected attempt must not find traces of the first one."""
    pipeline = tiny_wan_pipeline()
    before = set(vars(pipeline.transformer))
    bad_video = tiny_group_dataset(1, 1, num_frames=6)
    for arguments in ({"ref_model": pipeline}, {"train_dataset": bad_video}, {"peft_config": LoKrConfig()}):
        with pytest.raises(ValueError):
            trainer(config(tmp_path, cache_dir=str(tmp_path)), model=pipeline, **arguments)
    assert set(vars(pipeline.transformer)) == before
    assert not any("lora" in name for name, _ in pipeline.transformer.named_parameters())


def without(rows, *names):
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "zero rows"),
        (without(tiny_encoded_group(2), "prompt_embeds"), "needs the columns"),
        (without(tiny_encoded_group(2), "rejected_scores"), "`physics_rewarding` needs the column 'rejected_scores'"),
        (
            [{**row, "rejected_scores": row["rejected_scores"] + 1} for row in tiny_encoded_group(2)],
            r"expected a number in",
        ),
        (
            [{**row, "rejected_latents": row["rejected_latents"][:0]} for row in tiny_encoded_group(2)],
            "got an empty list",
        ),
        (tiny_encoded_group(1, 2) + tiny_encoded_group(1, 3), "Row 1: expected 2 rejected videos as in row 0, got 3"),
        (tiny_encoded_group(2, latents_shape=(5, 2, 4, 4)), "must have 4 channels for this transformer, got 5"),
        (tiny_encoded_group(2, latents_shape=(4, 2, 3, 4)), "must be divisible by the patch"),
    ],
)
def test_data_that_does_not_fit_is_refused_when_the_trainer_is_made(tmp_path, dataset, message):
    for arguments in ({"train_dataset": dataset}, {"eval_dataset": dataset}):
        with pytest.raises(ValueError, match=message):
            trainer(config(tmp_path), **arguments)


def test_a_frame_count_that_the_vae_cannot_encode_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"4 \* k \+ 1 frames for this VAE, got 6.*Set `num_frames` to 5 or 9"):
        trainer(config(tmp_path, cache_dir=str(tmp_path)), train_dataset=tiny_group_dataset(1, 1, num_frames=6))


def test_the_row_whose_latents_do_not_fit_is_named(tmp_path):
    rows = tiny_encoded_group(1) + tiny_encoded_group(1, latents_shape=(5, 2, 4, 4))
    with pytest.raises(ValueError, match="Row 1: .*must have 4 channels"):
        trainer(config(tmp_path), train_dataset=rows)
    rows[0]["rejected_latents"] = rows[0]["rejected_latents"][..., :2]
    with pytest.raises(ValueError, match=r"Row 0: expected latents of one shape.*4, 4\)\]"):
        trainer(config(tmp_path), train_dataset=rows)


def test_wrong_sizes_and_target_modules_are_refused_before_a_video_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "video_trl.data.encoding.encode.take_inventory", lambda *args, **options: pytest.fail("read the videos")
    )
    arguments = {"train_dataset": tiny_group_dataset(1, 1)}
    with pytest.raises(ValueError, match="got 6.*Set `num_frames` to 5 or 9"):
        trainer(config(tmp_path, num_frames=6), **arguments)
    with pytest.raises(ValueError, match="must be divisible by 8.*got 36x32"):
        trainer(config(tmp_path, height=36, width=32), **arguments)
    with pytest.raises(ValueError, match="no_such_layer"):
        trainer(config(tmp_path), peft_config=LoraConfig(target_modules=["no_such_layer"]), **arguments)
