"""What trainers do alike for every family: checkpointed activations, resuming, and planning without weights."""

import pytest

from tests.support.cells import CELLS, later_ones_slow
from tests.support.tiny import TINY_FAMILIES, tiny_latents_shape, tiny_pipeline
from tests.support.trainer.runs import (
    RecordGradients,
    StopAfter,
    assert_equal_weights,
    disturb_adapter,
    trained_weights,
)
from tests.trainer.test_families import make
from video_trl.cli.dry_run import empty_models, latents_shape
from video_trl.trainer.planning.counter import count_step


@pytest.mark.parametrize("family", later_ones_slow(CELLS["checkpointed"]))
def test_checkpointed_activations_change_no_bit(family, tmp_path):
    steps = []
    for name in ("on", "off"):
        recorder = RecordGradients()
        changes = {"max_steps": 1, "activation_checkpointing": name == "on"}
        made = make(family, "DPO", tmp_path / name, extra={"callbacks": [recorder]}, **changes)
        disturb_adapter(made)
        made.train()
        steps.append(recorder.steps[0])
    assert_equal_weights(*steps)


@pytest.mark.parametrize("family", later_ones_slow(CELLS["resumed"]))
def test_a_stopped_run_goes_on_to_the_same_weights(family, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    whole = make(family, "DPO", tmp_path / "whole", **saving)
    whole.train()
    make(family, "DPO", tmp_path / "parts", extra={"callbacks": [StopAfter(1)]}, **saving).train()
    resumed = make(family, "DPO", tmp_path / "parts", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_weights(trained_weights(resumed), trained_weights(whole))


@pytest.mark.parametrize("name", later_ones_slow(CELLS["dry run"]))
def test_a_run_is_planned_without_weights(name, tmp_path):
    """Shapes and trained weights as those of a real trainer, and the memory of its weights."""
    pipeline, tiny = tiny_pipeline(name), TINY_FAMILIES[name]
    pipeline.save_pretrained(tmp_path / "pipeline")
    family, transformer, vae = empty_models(str(tmp_path / "pipeline"), None)
    assert transformer.device.type == "meta" and type(pipeline).__name__ in family.pipeline_classes
    assert latents_shape(family, vae, (tiny.frames, tiny.side, tiny.side)) == tiny_latents_shape(name)
    made = make(name, "DPO", tmp_path / "run", extra={"model": pipeline})
    work = made.workload()
    cost = count_step(
        work.config,
        work.latents_shape,
        num_videos=work.num_videos,
        reference="adapter",
        lora_rank=4,
        bf16=False,
        prompt_tokens=work.prompt_tokens,
    )
    weights = sum(weight.nbytes for weight in made.model.parameters())
    trained = sum(weight.numel() for weight in made.model.parameters() if weight.requires_grad)
    assert (cost.weights, cost.trained) == (weights, trained) and cost.flops > 0
