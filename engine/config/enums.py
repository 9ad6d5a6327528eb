"""Closed choices. A member's name is what one types on the command line."""

from __future__ import annotations

from enum import StrEnum


class Family(StrEnum):
    """`gpt`: causal decoder, norms before each sublayer. `bert`: encoder, norms after each residual sum."""

    gpt = "gpt"
    bert = "bert"


class SentenceHead(StrEnum):
    """BERT's second loss: does B follow A (arXiv 1810.04805), or are A and B swapped (ALBERT, arXiv 1909.11942)."""

    none = "none"
    next_sentence = "next_sentence"
    sentence_order = "sentence_order"


class Norm(StrEnum):
    """Kind of normalisation."""

    layernorm = "layernorm"
    rmsnorm = "rmsnorm"


class Activation(StrEnum):
    """Feed-forward nonlinearity. `swiglu` has a gate and an up projection, the others one projection."""

    gelu = "gelu"
    gelu_tanh = "gelu_tanh"
    swiglu = "swiglu"


class Positions(StrEnum):
    """How positions enter: a learned table added to the embeddings, or rotary angles applied to queries and keys."""

    learned = "learned"
    rotary = "rotary"


class DType(StrEnum):
    """Dtype of parameters and activations in forward and backward. Optimizer state is fp32 in all."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Fp8(StrEnum):
    """`tensorwise`: the blocks' linears multiply in fp8, each tensor scaled by its largest magnitude of the moment."""

    none = "none"
    tensorwise = "tensorwise"


class OptimizerName(StrEnum):
    """Update rule. All but adamw, lion and sgd look at whole matrices, in every layout at the logical ones."""

    adamw = "adamw"
    lamb = "lamb"
    lion = "lion"
    muon = "muon"
    adafactor = "adafactor"
    sgd = "sgd"


class ScheduleName(StrEnum):
    """Shape of the learning rate after warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    inverse_sqrt = "inverse_sqrt"
    wsd = "wsd"


class TpOverlap(StrEnum):
    """How collectives of tensor-parallel layers run: one after the other with the products, or beside them.

    `chunked` with NCCL, `symmetric` with copy engines through memory that GPUs of one host map of each other.
    """

    auto = "auto"
    none = "none"
    chunked = "chunked"
    symmetric = "symmetric"


class PipelineSchedule(StrEnum):
    """Order of the forward and backward passes of a step on the pipeline's stages."""

    one_f_one_b = "one_f_one_b"
    interleaved = "interleaved"
    dualpipev = "dualpipev"


class Transport(StrEnum):
    """How numbers travel between ranks: by NCCL's kernels (on CPUs gloo's), or by copy engines.

    Copy engines move them between GPUs of one host and take no multiprocessors, also while a message waits.
    """

    auto = "auto"
    nccl = "nccl"
    copy_engine = "copy_engine"


class Recompute(StrEnum):
    """Activations that are computed again in the backward pass: none, the attention core's, or whole blocks'."""

    none = "none"
    selective = "selective"
    full = "full"


class Tiles(StrEnum):
    """What a block computes tile by tile: nothing, the feed-forward with its norm, or all but the attention core."""

    none = "none"
    mlp = "mlp"
    block = "block"


class Offload(StrEnum):
    """Where a ZeRO optimizer keeps its state, or ZeRO-3 its parameters, when not on the GPU."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OffloadStrategy(StrEnum):
    """How offloaded optimizer steps run: `plain` as DeepSpeed's, `streamed` from sums on the device, chunk by chunk,
    overlapped as DeepSpeed's ZenFlow and SuperOffload. `auto`: streamed where it can be, else plain.
    """

    auto = "auto"
    plain = "plain"
    streamed = "streamed"
    zenflow = "zenflow"
    superoffload = "superoffload"


class LaunchTarget(StrEnum):
    """Who starts the ranks that `launch/submit.py` asks for."""

    local = "local"
    slurm = "slurm"
    kubernetes = "kubernetes"


class Balance(StrEnum):
    """Which cost the pipeline stages share evenly."""

    parameters = "parameters"
    flops = "flops"


class Device(StrEnum):
    """`auto` takes CUDA when a GPU is visible, otherwise the CPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Switch(StrEnum):
    """`auto` is on where it pays (GPUs), off elsewhere."""

    auto = "auto"
    on = "on"
    off = "off"


class Attention(StrEnum):
    """Attention implementation; `auto` takes the fastest that can run here, as far as that was measured."""

    auto = "auto"
    flash_attn_4 = "flash_attn_4"
    sdpa_cudnn = "sdpa_cudnn"
    flash_attn = "flash_attn"
    sdpa = "sdpa"
    triton = "triton"
    sdpa_flash = "sdpa_flash"
    flex = "flex"
    reference = "reference"


class Kernel(StrEnum):
    """Who computes an operation: a kernel of Octant in Triton, or torch. `auto`: whichever is quicker here."""

    auto = "auto"
    triton = "triton"
    torch = "torch"


class Fp8Kernel(StrEnum):
    """Who multiplies in fp8: tensor cores, or fp32 arithmetic on numbers rounded to fp8, which is slow."""

    auto = "auto"
    scaled_mm = "scaled_mm"
    emulated = "emulated"


class WandbMode(StrEnum):
    disabled = "disabled"
    offline = "offline"
    online = "online"


class SampleKind(StrEnum):
    """What a record of the corpus is."""

    text = "text"
    """A document to model."""
    completion = "completion"
    """A prompt and a completion; only the completion is predicted."""
    rows = "rows"
    """One or two texts with a class or a score."""


class BadFiles(StrEnum):
    """What to do about files that are unreadable, empty or not UTF-8."""

    skip = "skip"
    """Leave them out and list them."""
    stop = "stop"
    """Refuse to build."""


class SearchMethod(StrEnum):
    """`grid`: every combination. `coarse_to_fine`: Optuna, short runs first, longer ones around the best."""

    grid = "grid"
    coarse_to_fine = "coarse_to_fine"


class Direction(StrEnum):
    """Which values of the metric are better."""

    minimize = "minimize"
    maximize = "maximize"
