"""Generate with a pipeline whose VAE has another dtype than its other networks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor
from transformers import PreTrainedModel


@contextmanager
def inputs_cast_for_vae(pipeline: DiffusionPipeline) -> Iterator[None]:
    """
    Cast what the VAE of a pipeline is given to its own dtype, in this context.

    VAEs are loaded in float32, whatever the others are, and the pipelines of CogVideoX and of LTX-Video from an image
    hand theirs videos and latents in the dtype of the prompt's embeddings.
    """
    vae = pipeline.components.get("vae")
    others = [part.dtype for part in pipeline.components.values() if isinstance(part, ModelMixin | PreTrainedModel)]
    if vae is None or set(others) == {vae.dtype}:
        yield
        return
    own = {name: method for name, method in vars(vae).items() if name in ("encode", "decode")}  # of a context outside
    vars(vae).update(encode=_casting(vae, vae.encode), decode=_casting(vae, vae.decode))
    try:
        yield
    finally:
        del vars(vae)["encode"], vars(vae)["decode"]
        vars(vae).update(own)


def _casting(vae: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        return method(sample.to(vae.dtype), *args, **kwargs)

    return call
