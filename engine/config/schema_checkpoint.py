"""The options of `checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """State in and out, as logical tensors in safetensors: independent of the layout that wrote them."""

    initial_weights: str | None = None
    """Start from these weights instead of random ones: of a run (`runs/mine`, or its `weights` or a checkpoint), or a
    Hugging Face folder (config.json, safetensors) of a GPT-2, GPT-NeoX, Llama, Mistral, Qwen2 or BERT. Any layout."""
    load: str | None = None
    """Go on from this state, with optimizer, step and place in the data: a run, whose newest whole checkpoint is
    taken, or a checkpoint. Any layout. Results go to this run's own folder; see `run.resume` for going on in place."""
    every: int = 1000
    """Steps between checkpoints of the whole state, in `checkpoints/` of the run; 0: none. Runs of at least so many
    steps have one after their last step too."""
    asynchronous: bool = True
    """Write checkpoints in the background: a step waits for a copy to host memory only, which is as large as what the
    rank writes and kept for the next. Otherwise a step waits for the disk, and the copy is dropped."""
    keep_last: int = 3
    """Checkpoints that stay; older ones are removed when a new one is complete."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of it stay as well. 0: none."""
    keep_best: int = 1
    """As many checkpoints as this with the lowest validation loss stay as well."""
    mirror: str | None = None
    """Copy each checkpoint there as well, when it is complete: a URL of fsspec, such as s3://bucket/run. Nothing is
    removed there. With `run.resume`, the newest one there is fetched where the run's folder has none."""
    allow_changed_data: bool = False
    """Go on with another corpus, tokenizer or split than the state was trained on."""
    save_final: bool = True
    """Write the fp32 weights into `weights/` in the run folder when training ends."""
