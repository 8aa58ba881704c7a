"""What each phase of a step takes of a rank's memory: arithmetic on a model's sizes and a run's layout.

P weights of `item` bytes, of which T are trained, on R ranks (ZeRO-3; with ZeRO-1 weights and gradients are whole):

    held throughout                item P / R + 12 T / R + grad_item T / R      AdamW's master weights, two moments
    a token's keys and values      2 layers kv_heads head_dim item              of the layers with full attention
    kept for the backward pass     layers kept(layer) tokens                   see `kept_bytes`
      with gradient checkpointing  layers item hidden tokens + kept(layer) tokens
    the head                       item V D + 4 N D + a chunk of logits         its weight's gradient, hidden states'
    an update                      8 T / R, of at most a sub-group of T         a float32 gradient, AdamW's temporary

Figures of a GPU are arithmetic alone; those of a CPU are held to measurements (bench/plan.py).
"""

from dataclasses import dataclass, field

from vogue.model.optimizer_state import FILE
from vogue.model.weights import file_count
from vogue.rollout.cache import ROOM
from vogue.run.model_sizes import Blocks, Layout, Sizes

GPU_RUNTIME = 2e9  # CUDA's context, NCCL's buffers, what the allocator can't fill
CPU_RUNTIME = 3e7  # libraries' pools and what malloc can't fill: measured, as are the next two
CPU_GENERATING = 1e7  # the same of transformers' generation, token by token
CPU_FILES = 3e7  # a chunk of a checkpoint's files for its checksum, and their writers' buffers
SYNC = 256 << 20  # gathered at a time, see `vogue.model.weights`
GPU_CHUNK, CPU_CHUNK = 1 << 26, 1 << 21  # logits of a branch at a time, of vogue_kernels' backward passes
HF_SEQUENCES = 512  # see `vogue.rollout.hf`


@dataclass(frozen=True)
class Phase:
    """What a part of a step takes: bytes of each rank's device by what they are for, and of a node's own memory."""

    name: str
    parts: dict[str, float]
    host: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def on_host(self) -> float:
        return sum(self.host.values())


def phases(sizes: Sizes, run: Layout) -> list[Phase]:
    """A run's phases in their order, with what each takes at its highest."""
    held, host, training = _held(sizes, run), _host(sizes, run), _engine_in_training(sizes, run)
    old = held | training | _forward(sizes, run)
    found = [
        Phase("start", held | {"engine": _engine(sizes, run), "working": _starting(sizes, run)}, host),
        Phase("rollout", held | {"engine": _engine(sizes, run), "working": _generating(sizes, run)}, host),
        *([Phase("old", old, host)] if run.updates > 1 else []),
        Phase("training", held | training | _whole_gradients(sizes, run) | _training(sizes, run), host),
        Phase("update", held | training | _summed_gradients(sizes, run) | {"working": _updating(sizes, run)}, host),
        Phase("sync", held | _engine_in_sync(sizes, run) | {"gathered": _gathered_in_sync(sizes, run)}, host),
    ]
    saving = {"gathered": _gathered_in_sync(sizes, run)}
    copy = {"copies": _copied(sizes, run)}
    if run.on_gpu:
        return [*found, Phase("save", held | training | saving, host | copy)]
    return [*found, Phase("save", held | training | saving | copy | {"files": CPU_FILES}, host)]


# ------------------------------------------------------------------------------------------------ held throughout


def _held(sizes: Sizes, run: Layout) -> dict[str, float]:
    parts = {"runtime": GPU_RUNTIME if run.on_gpu else CPU_RUNTIME}
    if not (run.offload_params and run.on_gpu):
        parts["weights"] = run.item * (sizes.weights + sizes.adapters + sizes.reference) / run.shards
    if not (run.offload_optimizer and run.on_gpu):
        parts["optimizer"] = 12 * sizes.trained / run.ranks
        if run.stage == 3 or run.grad_item > run.item:  # else they are gone with the update
            parts["gradients"] = run.grad_item * sizes.trained / run.ranks
    if run.stage == 3:
        parts["bucket"] = _bucket(sizes, run)
    return parts


def _host(sizes: Sizes, run: Layout) -> dict[str, float]:
    """What is held in a node's memory in place of its GPUs'."""
    if not run.on_gpu:
        return {}
    local, parts = run.ranks / run.nodes, {}
    if run.offload_params:
        parts["weights"] = local * run.item * (sizes.weights + sizes.adapters + sizes.reference) / run.shards
    if run.offload_optimizer:  # with a float32 gradient beside the accumulated one
        parts["optimizer"] = local * (16 + run.grad_item) * sizes.trained / run.ranks
    return parts


def _whole_gradients(sizes: Sizes, run: Layout) -> dict[str, float]:
    """Of backward passes where each rank has its gradients whole: those, its share of their sum, and a copy of it.

    They are counted beside all activations, which go as they come: a process keeps the memory that it has freed, and
    what is new seldom fits into it.
    """
    if run.stage == 3:
        return {}
    gradients = (run.item + 2 * run.grad_item / run.ranks) * sizes.trained
    return {"gradients": gradients, "bucket": _bucket(sizes, run)}


def _summed_gradients(sizes: Sizes, run: Layout) -> dict[str, float]:
    """Of an update, where they were whole before: a rank's share of them, and a flat copy of it."""
    return {} if run.stage == 3 else {"gradients": 2 * run.grad_item * sizes.trained / run.ranks}


def _bucket(sizes: Sizes, run: Layout) -> float:
    """DeepSpeed's buffer that gradients are reduced in; a CPU's pages exist once they are written to."""
    return float(run.item * (run.bucket if run.on_gpu else min(run.bucket, sizes.trained)))


# -------------------------------------------------------------------------------------------------------- rollout


def engine_weights(sizes: Sizes, run: Layout) -> float:
    """A rank's share of the rollout engine's weights."""
    return run.item * sizes.weights / run.tensor_parallel


def sequence_bytes(sizes: Sizes, run: Layout) -> float:
    """A longest sequence's keys and values in a rank's engine, where ranks with few heads of keys hold some twice."""
    return run.longest * sizes.token_cache / min(run.tensor_parallel, sizes.text.key_heads)


def _engine(sizes: Sizes, run: Layout) -> float:
    if run.engine == "server":  # whose memory isn't a rank's
        return 0.0
    if run.engine == "hf":  # it generates with the policy's own weights where they are whole
        return 0.0 if run.shards == 1 else float(run.item * sizes.weights)
    return run.engine_share * run.memory if run.on_gpu else engine_weights(sizes, run) + run.kv_cache


def _engine_in_training(sizes: Sizes, run: Layout) -> dict[str, float]:
    asleep = run.sleep and run.engine == "vllm"
    return {} if asleep else {"engine": _engine(sizes, run)}


def _engine_in_sync(sizes: Sizes, run: Layout) -> dict[str, float]:
    asleep = run.sleep and run.engine == "vllm"
    return {"engine": engine_weights(sizes, run) if asleep else _engine(sizes, run)}


def _generating(sizes: Sizes, run: Layout) -> float:
    """What transformers generates in, beside its weights; vLLM's is in its share, or its cache, or a server's."""
    if run.engine != "hf":
        return 0.0
    sequences = min(run.prompts, max(1, HF_SEQUENCES // run.n)) * run.n
    # With room for tokens to come; while a layer takes more, it has its keys and values twice.
    cache = sequences * (run.longest + ROOM) * sizes.token_cache * (1 + 1 / sizes.text.layers)
    # One layer's keys and values, repeated for every head of the queries.
    repeated = 2 * sequences * run.longest * sizes.text.query * run.item if run.repeats_keys else 0
    # Two float32 log-probabilities, and a float64 sum, of a token's logits.
    rest = 0 if run.on_gpu else CPU_GENERATING
    return cache + repeated + sequences * sizes.vocabulary * (run.item + 16) + rest


# ------------------------------------------------------------------------------------------------------- training


def kept_bytes(layer: Blocks, run: Layout, trained: bool) -> int:
    """What autograd keeps of a token in one layer: inputs of norms, products and attention, by transformers' operators.

    An RMSNorm has its input in float32, its normalised input where its weight is trained, and its result.
    """
    item, trains_norms = run.item, trained and not run.adapters
    norm = 4 + item * trains_norms + item if layer.rms and not run.liger else 2 * item
    keys = layer.query if run.repeats_keys else layer.key
    attention = item * (2 * layer.query + 2 * keys)
    inner = (3 if run.liger else 4) if layer.gated else 2
    of_heads = norm * (layer.query + layer.key) if layer.head_norms else 0
    of_experts = 2 * item * layer.routed * layer.hidden  # what goes into each and comes out of it
    return layer.norms * norm * layer.hidden + attention + of_heads + of_experts + item * inner * layer.inner


def _training(sizes: Sizes, run: Layout) -> dict[str, float]:
    """A forward with gradient and its backward pass, of the largest micro-batch."""
    return {
        "activations": _activations(sizes, run),
        "head": _head(sizes, run),
        "working": _working(sizes, run),
        "gathered": _gathered_and_kept(sizes, run),
        "images": _pixels(sizes, run),
    }


def _forward(sizes: Sizes, run: Layout) -> dict[str, float]:
    """A forward without gradient."""
    return {"working": _working(sizes, run), "gathered": _gathered(sizes, run), "images": _pixels(sizes, run)}


def _patches(run: Layout, sizes: Sizes) -> int:
    rows, _ = run.rows
    return rows * run.image * sizes.patches


def _activations(sizes: Sizes, run: Layout) -> float:
    text, tower = sizes.text, sizes.tower
    seen = _patches(run, sizes) if sizes.vision_trained else 0
    of_text, of_tower = kept_bytes(text, run, True) * run.tokens, kept_bytes(tower, run, True) * seen
    if run.checkpointing:
        inputs = run.item * (text.layers * text.hidden * run.tokens + tower.layers * tower.hidden * seen)
        return (1 + run.moving) * inputs + max(of_text, of_tower)
    return (1 + run.moving) * (text.layers * of_text + tower.layers * of_tower)


def _head(sizes: Sizes, run: Layout) -> float:
    """Of the fused operator: hidden states and their float32 gradient, the weight's gradient, a chunk, kept logits."""
    hidden = run.predicted * sizes.text.hidden
    views, chunk = 1 + run.compares + run.refers + run.moving, GPU_CHUNK if run.on_gpu else 2 * CPU_CHUNK
    weight = 0 if run.adapters else sizes.vocabulary * sizes.text.hidden * run.item
    # A processor keeps eight bits of bfloat16 and twenty of float32.
    logit = run.item if run.on_gpu else 1 if run.item == 2 else 2.5
    kept = min(run.kept_logits, run.predicted * sizes.vocabulary * logit)
    return hidden * (views * run.item + 4) + weight + views * chunk * run.item + kept


def _working(sizes: Sizes, run: Layout) -> float:
    """Temporaries of one layer: the residual stream, norms in float32, and the MLP's gradients."""
    text, tower = sizes.text, sizes.tower
    of_text = run.tokens * (3 * run.item * text.inner + (4 + 2 * run.item) * text.hidden)
    of_tower = _patches(run, sizes) * (3 * run.item * tower.inner + (4 + 2 * run.item) * tower.hidden)
    return float(max(of_text, of_tower))


def _gathered(sizes: Sizes, run: Layout) -> float:
    """Whole weights at a time under ZeRO-3, and the largest one's gradient, before it is divided."""
    if run.shards == 1:
        return 0.0
    return float(run.item * min(sizes.weights, max(run.live, sizes.largest)))


def _gathered_and_kept(sizes: Sizes, run: Layout) -> float:
    """The same where a backward pass follows: autograd keeps views of experts' weights, which so stay whole."""
    if run.shards > 1 and sizes.text.routed and not run.checkpointing:
        return float(run.item * sizes.weights)
    return _gathered(sizes, run)


def _pixels(sizes: Sizes, run: Layout) -> float:
    """Patches in float32 and as the tower takes them; without a GPU of all prompts of two steps, one loaded ahead."""
    views, values = 1 + run.compares + run.moving, sizes.patches * run.image * sizes.patch
    if run.on_gpu:
        return float(run.rows[0] * values * (4 * views + run.item))
    return float(2 * run.prompts * values * 4 * views)


# --------------------------------------------------------------------------------------- start, update, sync, save


def _starting(sizes: Sizes, run: Layout) -> float:
    """DeepSpeed's copies as it begins: a flat one of the weights, or under ZeRO-3 an update of nothing."""
    return _updating(sizes, run) if run.stage == 3 else float(run.item * sizes.trained)


def _copied(sizes: Sizes, run: Layout) -> float:
    """What is copied to be written: of a node's ranks on GPUs, of the first rank elsewhere.

    First the weights of a rank's own files of `hf`, then, from a GPU, its optimizer's state, by at most a file of it.
    """
    files = file_count(sizes.saved, run.ranks)
    of_rank = sizes.saved * -(-files // run.ranks) / files
    if not run.on_gpu:
        return of_rank
    local = run.ranks / run.nodes
    return max(min(local * of_rank, sizes.saved), local * min(12 * sizes.trained / run.ranks, FILE))


def _updating(sizes: Sizes, run: Layout) -> float:
    """A float32 gradient of what is updated at once, and AdamW's root of the second moment."""
    if run.offload_optimizer and run.on_gpu:
        return 0.0
    share = sizes.trained / run.ranks
    at_once = min(share, run.sub_group) if run.stage == 3 else share
    return 8 * at_once


def _gathered_in_sync(sizes: Sizes, run: Layout) -> float:
    """Weights on their way, at least the largest one; an adapted one is merged in float32."""
    at_once = 0 if run.shards == 1 else max(SYNC, run.item * sizes.largest)
    return at_once + (8 * sizes.text.hidden * sizes.text.inner if run.adapters else 0)
