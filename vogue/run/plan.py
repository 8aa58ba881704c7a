"""What fits where: a run's memory phase by phase, what is the most that fits, and what to change if it doesn't.

Nothing is loaded and no weight is read: a model is planned on from its config.json, by `vogue.run.phase_memory`.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from vogue import distributed
from vogue.config import Config, flatten
from vogue.model.files import configured_model
from vogue.model.lora import add_adapters
from vogue.model.optimizer import deepspeed_settings
from vogue.run.memory import GB, check_length, shown
from vogue.run.model_sizes import BUCKET, LIVE, Layout, Sizes, sizes_of
from vogue.run.phase_memory import Phase, engine_weights, phases, sequence_bytes
from vogue.settings import ConfigError, check
from vogue.step.groups import reads_other

DTYPES = {"fp32": 4, "fp16": 2, "bf16": 2, "float32": 4, "float16": 2, "bfloat16": 2}  # as DeepSpeed says them
COLUMNS = {  # of the table, and the parts of a phase that each one sums
    "weights": ("weights", "gathered", "copies"),
    "AdamW": ("optimizer", "gradients", "bucket"),
    "engine": ("engine",),
    "layers": ("activations", "working"),
    "head": ("head",),
    "other": ("images", "files", "runtime"),
}
# What makes a run smaller, in the order in which it is worth trying: what costs least of the run comes first.
CHANGES: tuple[tuple[str, Any], ...] = (
    ("model.gradient_checkpointing", True),
    ("lora.rank", 32),
    ("rollout.tensor_parallel", 4),
    ("rollout.sleep", True),
    ("trainer.offload_optimizer", True),
    ("trainer.offload_params", True),
)


@dataclass(frozen=True)
class Change:
    """What other settings would change: the largest phase's bytes with them, and whether the run fits then."""

    settings: str  # key=value, with blanks between them
    largest: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """A run's memory and what follows of it. The most that fits is None where not even one token does."""

    sizes: Sizes
    run: Layout
    phases: list[Phase]
    problems: list[str]  # empty: it fits
    longest_completion: int | None
    largest_micro_batch: int | None
    changes: list[Change]  # none where it fits

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)


def make_plan(config: Config, ranks: int, memory: float, *, on_gpu: bool, nodes: int = 1) -> Plan:
    """The plan of a run on `ranks` GPUs of `memory` bytes each, of `nodes` machines; or of CPUs, `memory` a rank.

    Raises `ConfigError` for a model that isn't on this disk, and for sequences that it has no positions for.
    """
    model = adapted(config)
    check_length(model.config.get_text_config(), config)
    sizes = sizes_of(model, config)
    run = layout_of(config, sizes, ranks, memory, on_gpu=on_gpu, nodes=nodes)
    problems = problems_of(sizes, run)
    positions = model.config.get_text_config().max_position_embeddings

    def with_completion(tokens: int) -> Layout:
        return replace(run, completion=tokens)

    def with_budget(tokens: int) -> Layout:
        return replace(run, budget=tokens)

    update = -(-run.prompts // run.updates) * (run.prompt + run.trained * run.completion)
    return Plan(
        sizes=sizes,
        run=run,
        phases=phases(sizes, run),
        problems=problems,
        longest_completion=most(
            run.completion, positions - run.prompt, lambda n: not problems_of(sizes, with_completion(n))
        ),
        largest_micro_batch=most(
            run.budget, max(update, run.longest), lambda n: not problems_of(sizes, with_budget(n))
        ),
        changes=list(_changes(config, run, {config.lora.rank: sizes})) if problems else [],
    )


def adapted(config: Config) -> PreTrainedModel:
    """The configured model on the meta device, with the adapters of `lora`."""
    model = configured_model(config.model.path)
    if config.lora.on:
        add_adapters(model, config.lora, config.seed)
    return model


def problems_of(sizes: Sizes, run: Layout) -> list[str]:
    """Why a run doesn't fit, a sentence for each reason; none where it does."""
    found = []
    if run.engine == "vllm":
        weights, sequence = engine_weights(sizes, run), sequence_bytes(sizes, run)
        name = "rollout.memory" if run.on_gpu else "rollout.kv_cache_gb"
        given, needed = (run.engine_share * run.memory, weights + sequence) if run.on_gpu else (run.kv_cache, sequence)
        if needed > given:
            found.append(
                f"{name} gives vLLM {shown(given)}, less than {shown(needed)} for "
                + (f"weights of {shown(weights)} and " if run.on_gpu else "")
                + f"one longest sequence of {shown(sequence)}"
            )
    largest = max(phases(sizes, run), key=lambda phase: phase.total)
    if largest.total > run.memory:
        found.append(f"{largest.name} takes {shown(largest.total)} of {shown(run.memory)}")
    return found


def most(start: int, limit: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number up to `limit` that fits, looked for from `start` on; None where neither it nor a part does.

    Smaller numbers may not fit where larger ones do: short completions leave room for prompts with their images.
    """
    start = min(start, limit)
    low = start
    while low and not fits(low):
        low //= 2
    if not low:
        return None
    high = limit + 1 if low == start else 2 * low + 2  # past what fits
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def layout_of(config: Config, sizes: Sizes, ranks: int, memory: float, *, on_gpu: bool, nodes: int = 1) -> Layout:
    """A run's layout on so many `ranks`, of all `nodes`, with `memory` bytes each.

    Every prompt is taken for as long as it may be, and all of it for one image, as large as `data.max_pixels` allows.
    """
    deepspeed = deepspeed_settings(config, ranks)
    zero, item = deepspeed["zero_optimization"], getattr(torch, config.model.dtype).itemsize
    accumulated = deepspeed.get("data_types", {}).get("grad_accum_dtype")
    data, rollout, trainer = config.data, config.rollout, config.trainer
    pixels = data.max_pixels or data.max_prompt_tokens * sizes.token_pixels
    return Layout(
        ranks=ranks,
        nodes=nodes,
        on_gpu=on_gpu,
        memory=memory,
        item=item,
        grad_item=DTYPES[accumulated] if accumulated else item,
        stage=zero["stage"],
        offload_optimizer=_offloads(zero, "offload_optimizer"),
        offload_params=_offloads(zero, "offload_param"),
        adapters=config.lora.on,
        save_merged=config.lora.save_merged,
        checkpointing=config.model.gradient_checkpointing,
        repeats_keys=not on_gpu or config.model.attention in ("sdpa", "eager"),
        liger=config.model.liger,
        kept_logits=config.model.keep_logits_gb * GB,
        engine=rollout.engine,
        engine_share=rollout.memory,
        kv_cache=rollout.kv_cache_gb * GB,
        tensor_parallel=rollout.tensor_parallel,
        sleep=rollout.sleep,
        prompts=-(-rollout.prompts // ranks),
        updates=trainer.updates,
        n=rollout.n,
        replayed=config.replay.n if config.replay.size else 0,
        compares=reads_other(config) or config.compares or trainer.measure_every > 0,
        refers=config.kl.coef > 0,
        moving=config.moving_views,
        prompt=data.max_prompt_tokens,
        image=min(data.max_prompt_tokens, max(sizes.least_image, -(-pixels // sizes.token_pixels))),
        completion=rollout.max_tokens,
        budget=trainer.micro_batch_tokens,
        shared_prefix=trainer.shared_prefix and sizes.shares_prompt,
        steps=trainer.steps,
        keep=trainer.keep + (trainer.save_best is not None),
        bucket=int(zero.get("reduce_bucket_size", BUCKET)),
        sub_group=int(zero["sub_group_size"]),
        live=int(zero.get("stage3_max_live_parameters", LIVE)),
    )


def _offloads(zero: dict[str, Any], part: str) -> bool:
    return (zero.get(part) or {}).get("device", "none") != "none"


def _changes(config: Config, run: Layout, known: dict[int, Sizes]) -> Iterator[Change]:
    """Each of `CHANGES` that the run doesn't have yet, by itself; where none is enough, several together.

    Together they are taken in their order, each only where the largest phase becomes smaller, until the run fits.
    `known`: the model's sizes by `lora.rank`, on which alone of these settings they depend.
    """
    fewer = "trainer.micro_batch_tokens" if run.budget > run.longest else "rollout.max_tokens"
    half = (run.budget if run.budget > run.longest else run.completion) // 2
    given, alone = flatten(config), []
    for key, value in (*CHANGES, (fewer, half)):
        if key in given and given[key] not in (value, None) and not (key == "lora.rank" and config.lora.on):
            alone.append((key, value))
            yield (change := _change(config, run, known, [(key, value)]))
            if change.fits:
                return
    taken, best = [], float("inf")
    for item in alone:
        change = _change(config, run, known, [*taken, item])
        if change.fits or change.largest < best:
            taken, best = [*taken, item], change.largest
        if change.fits:
            break
    if len(taken) > 1:
        yield _change(config, run, known, taken)


def _change(config: Config, run: Layout, known: dict[int, Sizes], settings: list[tuple[str, Any]]) -> Change:
    values = config.model_dump(mode="json")
    for key, value in settings:
        section, _, name = key.partition(".")
        values[section][name] = value
    changed = check(Config, values, "vogue plan")
    rank = changed.lora.rank
    if rank not in known:
        known[rank] = sizes_of(adapted(changed), changed)
    sizes = known[rank]
    laid = layout_of(changed, sizes, run.ranks, run.memory, on_gpu=run.on_gpu, nodes=run.nodes)
    told = (f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings)
    largest = max(phase.total for phase in phases(sizes, laid))
    return Change(" ".join(told), largest, not problems_of(sizes, laid))


# --------------------------------------------------------------------------------------------------------- output


def machine(gpus: int | None, memory: float | None) -> tuple[int, float, bool]:
    """Ranks of a node, bytes of memory of each, and whether they have GPUs, where --gpus and --memory may say so.

    Unset, it is this machine: its GPUs, or one rank with all of its memory. Raises `ConfigError` where --gpus is given
    alone and no GPU is here to ask.
    """
    if memory is not None:
        return gpus or 1, memory * GB, True
    if torch.cuda.is_available():
        return gpus or torch.cuda.device_count(), float(torch.cuda.get_device_properties(0).total_memory), True
    if gpus is not None:
        raise ConfigError(f"--gpus {gpus}: there is no GPU here; --memory says how many GB each of them has")
    return 1, float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), False


def told_of(model: PreTrainedModel, config: Config) -> str:
    """What the largest phase of a run on this machine takes, of a model with its adapters."""
    _, memory, on_gpu = machine(None, None)
    ranks = distributed.rank_count()
    sizes = sizes_of(model, config)
    run = layout_of(config, sizes, ranks, memory if on_gpu else memory / ranks, on_gpu=on_gpu)
    largest = max(phases(sizes, run), key=lambda phase: phase.total)
    return (
        f"{largest.name} takes most, about {shown(largest.total)} of a rank's {shown(run.memory)}; `vogue plan` has all"
    )


def show(plan: Plan, console: Console) -> None:
    """Print a plan: each phase's memory by what it is for, whether all fits, and what to change where it doesn't."""
    run, sizes = plan.run, plan.sizes
    where = f"{run.ranks} GPU{'s' * (run.ranks > 1)}" if run.on_gpu else f"{run.ranks} rank of CPUs"
    kind = f"LoRA, {sizes.adapters / 1e6:.3g} M weights of adapters" if run.adapters else "all weights"
    title = f"{sizes.weights / 1e9:.3g} B weights; trained: {kind}; ZeRO-{run.stage} on {where} of {shown(run.memory)}"
    there = {part for phase in plan.phases for part in phase.parts}
    names = [name for name, parts in COLUMNS.items() if there & {*parts}]
    hosted = any(phase.host for phase in plan.phases)
    table = Table("GB", *names, "all", *(["host"] if hosted else []), title=title, show_edge=False)
    for phase in plan.phases:
        sums = [sum(phase.parts.get(part, 0.0) for part in COLUMNS[name]) for name in names]
        host = [_gb(phase.on_host)] if hosted else []
        style = "bold" if phase is plan.largest else ""
        table.add_row(phase.name, *map(_gb, sums), _gb(phase.total), *host, style=style)
    console.print(table)
    for text in sentences(plan):
        console.print(text, soft_wrap=True)


def sentences(plan: Plan) -> list[str]:
    """What follows of a plan, a line each."""
    run, largest = plan.run, plan.largest
    rows, completions = run.rows
    verdict = f"it fits: {largest.name} is the largest phase, {shown(largest.total)} of {shown(run.memory)}"
    told = [f"it doesn't fit: {text}" for text in plan.problems] or [verdict]
    told += [f"  {_tried(change)}" for change in plan.changes]
    update, step = run.prompts * run.trained // run.updates, run.prompts * run.ranks * run.n
    told += [
        f"largest micro-batch: {run.tokens} tokens, {rows} rows of {run.prompt} + {completions} x {run.completion}",
        f"most that fits, the rest as it is: rollout.max_tokens={plan.longest_completion or 'none'}, "
        f"trainer.micro_batch_tokens={plan.largest_micro_batch or 'none'}",
        f"a step: {step} completions, at most {step * run.completion} tokens; an update: {update} completions a rank",
        f"the run: {run.steps} steps, {run.steps * run.updates} optimizer updates"
        if run.steps
        else "the run: as many steps as trainer.epochs makes of data.train, which isn't read here",
        f"a checkpoint: {shown(plan.sizes.checkpoint)}; disk for {run.keep} that are kept, and the one that is "
        f"written: {shown((run.keep + 1) * plan.sizes.checkpoint)}",
    ]
    return [*told, *(["figures of GPUs are arithmetic; none has been measured"] if run.on_gpu else [])]


def as_json(plan: Plan) -> str:
    """A plan for scripts: bytes and tokens."""
    found = {
        "fits": not plan.problems,
        "problems": plan.problems,
        "phases": [{"name": p.name, "bytes": p.total, "parts": p.parts, "host": p.host} for p in plan.phases],
        "largest": plan.largest.name,
        "longest_completion": plan.longest_completion,
        "largest_micro_batch": plan.largest_micro_batch,
        "changes": [asdict(change) for change in plan.changes],
        "updates": plan.run.steps * plan.run.updates or None,  # trainer.epochs takes the data to know
        "checkpoint_bytes": plan.sizes.checkpoint,
        "disk_bytes": (plan.run.keep + 1) * plan.sizes.checkpoint,
        "sizes": asdict(plan.sizes),
        "layout": asdict(plan.run),
    }
    return json.dumps(found, indent=1)


def _tried(change: Change) -> str:
    return f"{change.settings}: {'it fits, ' if change.fits else 'not enough, '}{shown(change.largest)} at most"


def _gb(size: float) -> str:
    return f"{size / GB:.1f}" if size >= GB / 20 or not size else f"{size / GB:.2f}"
