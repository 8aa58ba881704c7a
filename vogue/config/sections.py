"""The settings of a run, section by section, with their units and defaults; `vogue.config` puts them together.

Here are model, data, reward, rollout and replay; `vogue.config.method_sections` has those of the methods,
`vogue.config.training_sections` adapters, optimizer and trainer.
"""

# pydantic's defaults stand first in Field, where pyright doesn't look for them; a Literal may be of a table's keys.
# pyright: reportCallIssue=false, reportInvalidTypeForm=false

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vogue.config.presets import COMPONENTS, DESIGNS, JUDGING
from vogue.settings import Count, Finite, NonNegative, Positive, PositiveShare, Section, Share

FUNCTION = r"^(.+\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*$"
ALL_TOKENS: dict[str, float] = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}  # values that leave no token out


class ModelConfig(Section):
    """The model that is trained."""

    path: str = Field(description="Hugging Face model folder or hub name", min_length=1)
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="dtype of the weights, in training and in rollouts"
    )
    attention: Literal["auto", "flex_attention", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="attention of the text model; with auto, flex_attention and sdpa a group shares its prompt. auto "
        "takes flash attention without a mask, on CPUs and on GPUs (there for bfloat16; else sdpa); flex_attention "
        "compiles anew for new shapes",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass instead of keeping them"
    )
    keep_logits_gb: NonNegative = Field(
        0.0,
        description="memory in GB within which the head keeps a micro-batch's logits for its backward pass, which then "
        "needs three matrix products where it needs four; it pays where memory is left over and the head takes a large "
        "share of a step (a small model, a large vocabulary). All logits are tokens x vocabulary x 2 bytes in bfloat16 "
        "(1.06 on a CPU)",
    )
    liger: bool = Field(
        False,
        description="Liger's Triton kernels for norms, MLPs and rotations of the text model, on GPUs, for Qwen2-VL, "
        "Qwen2.5-VL and Qwen3-VL",
    )
    freeze_vision: bool = Field(False, description="don't train the vision tower")


class DataConfig(Section):
    """Samples to train and evaluate on, and their prompts."""

    train: str | None = Field(
        None,
        description="samples to train on, see docs/data.md: parquet, JSON, JSONL, CSV, folder, folder@split, or "
        "hub:owner/name@split",
    )
    test: str | None = Field(
        None, description="samples to evaluate on, during training and in `vogue eval`; of the same kinds as data.train"
    )
    test_limit: Count | None = Field(None, description="use only the first so many samples of data.test")
    limit: Count | None = Field(None, description="use only the first so many samples of data.train")
    skip: str | None = Field(
        None, description="file of row numbers of data.train to leave out, one a line, as `vogue data check` writes it"
    )
    problem_key: str | None = Field(
        None, description="column of the question: text or messages; unset: found by its name, see docs/data.md"
    )
    answer_key: str | None = Field(
        None,
        description="column of the right answer, with dots into a record (reward_model.ground_truth); unset: found by "
        "its name",
    )
    images_key: str | None = Field(
        None, description="column of the image or images; empty: there are none; unset: found by its name"
    )
    videos_key: str | None = Field(
        None, description="column of the video or videos; empty: there are none; unset: found by its name"
    )
    image_folder: Path | None = Field(
        None, description="folder that images' and videos' relative paths start from; unset: the one of the data file"
    )
    format_prompt: str | None = Field(
        None,
        description="Jinja template, or path of one, that makes the problem of {{ content }}, the question, and the "
        "row's other columns; unset: the question is the problem",
    )
    system_prompt: str | None = Field(
        None,
        description="system prompt of every sample; empty: none; unset: the row's own system message, else the one of "
        "reward.design, or none with data.format_prompt",
    )
    min_pixels: Count | None = Field(
        None, description="least pixels of an image, smaller ones are enlarged; unset: what the model's processor does"
    )
    max_pixels: Count | None = Field(
        None,
        description="most pixels of an image, larger ones are made smaller for trainer, engine and evaluation alike; "
        "unset: what the model's processor does",
    )
    video_fps: Positive = Field(
        2.0, description="frames a second that are taken of a video; also the rate of a list of frames that says none"
    )
    video_max_frames: int = Field(
        768, ge=2, description="most frames that are taken of a video, evenly from its first to its last"
    )
    video_min_pixels: Count | None = Field(
        None, description="least pixels of a video's frame, as data.min_pixels is of an image"
    )
    video_max_pixels: Count | None = Field(
        None, description="most pixels of a video's frame, as data.max_pixels is of an image"
    )
    max_prompt_tokens: Count = Field(
        2048, description="most tokens of a prompt with its images and videos; none is ever cut"
    )
    overlong: Literal["refuse", "drop"] = Field(
        "refuse",
        description="samples of more than data.max_prompt_tokens end the run before its start (refuse), or are left "
        "out and counted (drop)",
    )
    broken: Literal["refuse", "skip"] = Field(
        "refuse",
        description="an image that turns out broken in the middle of a run ends it, with a checkpoint (refuse), or the "
        "next sample takes its place and it is counted (skip)",
    )


class OwnReward(Section):
    """A reward function of your own: one of `reward.functions`."""

    function: str = Field(
        pattern=FUNCTION, description="path/to/file.py:name or an importable package.module:name, see docs/rewards.md"
    )
    options: dict[str, Any] = Field({}, description="further arguments of the function, by their names")


class RewardConfig(Section):
    """What a completion is asked for, and what it earns."""

    design: Literal[*DESIGNS] = Field(
        "verifiable", description=f"system prompt and sum of weight * score, see docs/rewards.md: {', '.join(DESIGNS)}"
    )
    weights: dict[str, Finite] = Field(
        {},
        description="weight of each score in the sum, by its name: the design's scores, unset the design's weight "
        "(0.9 accuracy and 0.1 format in verifiable), and your own functions, unset 1",
    )
    function: str | None = Field(
        None,
        pattern=FUNCTION,
        description="path/to/file.py:name, or an importable package.module:name, of a reward function of your own, in "
        "place of the design's sum: def name(completions: list[str], samples: list[dict]) -> list[float]",
    )
    functions: dict[str, OwnReward] = Field(
        {},
        description="reward functions of your own by name, each {function: FILE.py:NAME, options: {}}, whose values "
        "times their weights are added to the design's sum; see docs/rewards.md",
    )
    scorer: OwnReward | None = Field(
        None,
        description="what measures how well a description fits its image, with reward.design=pebr_perception: a "
        "function as in reward.functions, whose samples have the paths of their images as `images`; for a model of "
        "CLIP's kind {function: 'vogue.rewards.similarity:clip', options: {model: FOLDER}}",
    )
    similar_enough: Positive = Field(
        0.4, description="value of reward.scorer from which on a description has the whole score of similarity"
    )
    expected_length: Count = Field(
        512, description="tokens up to which a completion has the whole score of length, with pebr_perception"
    )
    wrong: Annotated[float, Field(le=0, allow_inf_nan=False)] = Field(
        0.0,
        description="value of a wrong answer in the design's sum, where a right one has 1 and one with partial credit "
        "stands between them; -1 in CDE",
    )
    overlong_buffer: Share = Field(
        0.0,
        description="a completion that ends in this last share of rollout.max_tokens loses up to 1 of its reward "
        "(DAPO); 0: none",
    )
    timeout: Positive = Field(
        60.0,
        description="seconds that a call of a reward function may take, and importing its file; a call is of all "
        "completions of a step",
    )
    pass_env: list[str] = Field(
        [],
        description="environment variables that reward functions of your own get although their names say that they "
        "are secrets (*_KEY, *_TOKEN, *_SECRET, *_PASSWORD, AWS_* and the like, which are withheld): [OPENAI_API_KEY]",
    )

    def unweighed(self) -> "RewardConfig":
        """The same where accuracy alone is read: what a completion earns isn't worked out, and costs nothing."""
        return self.model_copy(update={"weights": dict.fromkeys(self.functions, 0.0)})

    @model_validator(mode="before")
    @classmethod
    def _fill_weights(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("function"):
            return values
        given, functions = values.get("weights") or {}, values.get("functions") or {}
        if not isinstance(given, dict) or not isinstance(functions, dict):
            return values  # as the check of each setting will say
        weights = DESIGNS.get(str(values.get("design", "verifiable")), {}) | dict.fromkeys(functions, 1.0)
        return values | {"weights": weights | {name: weight for name, weight in given.items() if weight is not None}}

    @model_validator(mode="after")
    def _scores_have_names(self) -> "RewardConfig":
        if self.function and (self.functions or self.weights):
            raise ValueError(f"reward.function={self.function} takes the place of all weights and of reward.functions")
        if self.scorer and (self.function or self.design != "pebr_perception"):
            raise ValueError(f"reward.scorer={self.scorer.function}: only reward.design=pebr_perception reads it")
        if self.weights.get("similarity") and self.design == "pebr_perception" and self.scorer is None:
            weight = self.weights["similarity"]
            raise ValueError(
                f"reward.scorer is not set: what measures the similarity of reward.weights.similarity={weight}"
            )
        if self.wrong and (self.function or self.design not in JUDGING):
            where = f"reward.function={self.function}" if self.function else f"reward.design={self.design}"
            raise ValueError(f"reward.wrong={self.wrong}: {where} has no score of right and wrong answers")
        for name in self.functions:
            if name in (*COMPONENTS, *DESIGNS[self.design], "accuracy", "format", "overlong"):
                raise ValueError(f"reward.functions.{name}: this is the name of a score of the designs")
        scores = [*DESIGNS[self.design], *self.functions]
        for name, weight in self.weights.items():
            if name not in scores:
                raise ValueError(f"reward.weights.{name}={weight}: the scores are {', '.join(scores)}")
            if weight < 0 and name not in self.functions:
                raise ValueError(f"reward.weights.{name}={weight}: a score of the design has a weight of 0 or more")
        return self


class RolloutConfig(Section):
    """How completions are generated."""

    engine: Literal["vllm", "server", "hf"] = Field(
        "vllm",
        description="what generates completions: vLLM in the trainer's process, vLLM in servers of its own (server), "
        "or transformers (hf)",
    )
    servers: list[Annotated[str, Field(pattern=r"^https?://[^/]+/?$")]] = Field(
        [],
        description="servers of vLLM to ask, each started by `vogue serve`: [http://10.0.0.7:8000]; the key that they "
        "ask for is the environment variable VLLM_API_KEY. Unset: with rollout.engine=server the run starts its own",
    )
    server_count: Count = Field(1, description="servers that the run starts on this machine, and ends")
    server_gpus: list[Annotated[int, Field(ge=0)]] = Field(
        [],
        description="numbers of the GPUs of the servers that the run starts, rollout.tensor_parallel for each: [6, 7]; "
        "the training has the others",
    )
    server_timeout: Positive = Field(600.0, description="seconds that servers may take until they are up")
    weight_transfer: Literal["auto", "nccl", "folder"] = Field(
        "auto",
        description="how weights reach servers: by NCCL from GPU to GPU, or through a folder of files; auto: nccl "
        "where the trainer has a GPU",
    )
    weight_folder: Path | None = Field(
        None,
        description="folder that trainer and servers share, for weight_transfer=folder; unset: this machine's memory, "
        "/dev/shm",
    )
    prompts: Count = Field(32, description="prompts a step, of all ranks together")
    rounds: Count = Field(
        1,
        description="most rollouts a step: new prompts are taken until enough groups have right and wrong answers "
        "(DAPO's "
        "dynamic sampling); 1: none of that",
    )
    n: int = Field(8, ge=2, description="completions a prompt: the group's size G")
    ahead: int = Field(
        0,
        ge=0,
        le=1,
        description="steps that rollouts are ahead of the training: with 1 a step's completions are generated while "
        "the step before trains, by a policy that is one step older, with rollout.engine=server; see docs/rollouts.md",
    )
    noisy_share: Share = Field(
        0.0,
        description="share of each group's completions that are generated from T(x), yet trained on x (NoisyRollout)",
    )
    max_tokens: Count = Field(1024, description="most tokens of a completion")
    temperature: Positive = Field(
        1.0, description="sampling temperature of rollouts; the policy's logits are divided by it in training too"
    )
    top_p: PositiveShare = Field(
        1.0,
        description="sample from the likeliest tokens alone whose probabilities sum to this; 1: from all. What is "
        "trained stays the whole distribution, see docs/rollouts.md",
    )
    top_k: int = Field(0, ge=0, description="sample from so many of the likeliest tokens alone; 0: from all")
    min_p: Share = Field(
        0.0, description="sample from tokens alone that are at least this times as likely as the likeliest; 0: from all"
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="strings that end a completion, which counts as finished and keeps the string, in rollouts and "
        "evaluations: [</answer>]",
    )
    latent_steps: int = Field(
        0,
        ge=0,
        description="states of its own that the model reads in place of tokens wherever it says <|lvr_start|>, with "
        "rollout.engine=hf and a model that knows that token; 0: none (Latent Visual Reasoning 8)",
    )
    latent: Literal["hidden", "noise", "zero"] = Field(
        "hidden",
        description="what is read there: the step before's last hidden state, normal noise of its length, or zeros",
    )
    memory: Share = Field(0.4, description="share of a GPU's memory that vLLM takes")
    kv_cache_gb: Positive = Field(1.0, description="size of vLLM's KV cache on a CPU, in GB a rank")
    tensor_parallel: Count = Field(
        1,
        description="ranks that share one engine of vLLM, each with its part of every layer (tensor parallelism); "
        "divides the number of ranks. With rollout.engine=server, GPUs of one server",
    )
    sleep: bool = Field(
        False,
        description="while the policy trains, vLLM gives the memory of its weights and KV cache away, and takes it "
        "back for the next rollout; on GPUs only",
    )
    engine_args: dict[str, Any] = Field(
        {},
        description="further arguments of vLLM's engine, by its own names: {max_num_seqs: 64, enforce_eager: true}",
    )

    @model_validator(mode="after")
    def _arguments_have_an_engine(self) -> "RolloutConfig":
        if self.engine_args and self.engine == "hf":
            raise ValueError(f"rollout.engine_args are vLLM's, but rollout.engine={self.engine}")
        if self.tensor_parallel > 1 and self.engine == "hf":
            raise ValueError(
                f"rollout.tensor_parallel={self.tensor_parallel} is vLLM's, but rollout.engine={self.engine}"
            )
        if self.sleep and self.engine != "vllm":
            raise ValueError(f"rollout.sleep=true is vLLM's, but rollout.engine={self.engine}")
        return self

    @model_validator(mode="after")
    def _servers_are_asked_for(self) -> "RolloutConfig":
        for name in ("servers", "server_count", "server_gpus", "weight_transfer", "weight_folder"):
            value = getattr(self, name)
            given = value != type(self).model_fields[name].default
            if given and self.engine != "server":
                raise ValueError(f"rollout.{name}={value}: only rollout.engine=server reads it, not {self.engine}")
            if given and self.servers and name in ("server_count", "server_gpus"):
                raise ValueError(f"rollout.{name}={value}: rollout.servers names servers that are started elsewhere")
        needed = self.server_count * self.tensor_parallel
        if self.server_gpus and len(set(self.server_gpus)) != needed:
            raise ValueError(
                f"rollout.server_gpus={self.server_gpus}: rollout.server_count={self.server_count} servers of "
                f"rollout.tensor_parallel={self.tensor_parallel} take {needed} GPUs"
            )
        if self.weight_folder and self.weight_transfer == "nccl":
            raise ValueError(
                f"rollout.weight_folder={self.weight_folder}: rollout.weight_transfer=nccl writes no files"
            )
        if len(set(self.servers)) < len(self.servers):
            raise ValueError(f"rollout.servers={self.servers}: one of them stands twice")
        return self

    @model_validator(mode="after")
    def _states_can_be_read(self) -> "RolloutConfig":
        steps, told = self.latent_steps, f"rollout.latent_steps={self.latent_steps}"
        if not steps and self.latent != "hidden":
            raise ValueError(f"rollout.latent={self.latent}: with {told} no state is read")
        if steps and self.engine != "hf":
            raise ValueError(f"{told}: only rollout.engine=hf gives hidden states back, not {self.engine}")
        if steps and steps + 2 > self.max_tokens:
            raise ValueError(f"{told}: rollout.max_tokens={self.max_tokens} has no room for a token behind so many")
        if steps and self.noisy_share:
            raise ValueError(
                f"{told} with rollout.noisy_share={self.noisy_share}: states that were read with T(x) aren't those of "
                "the policy on x, and no ratio tells"
            )
        return self

    @property
    def truncation(self) -> list[str]:
        """The settings that keep unlikely tokens from being sampled, as key=value; none where every token may be."""
        given = {
            name: getattr(self, name) for name, all_tokens in ALL_TOKENS.items() if getattr(self, name) != all_tokens
        }
        return [f"rollout.{name}={value}" for name, value in given.items()]

    @property
    def noisy_count(self) -> int:
        """Completions of each group that are generated from T(x), yet trained on x."""
        return round(self.noisy_share * self.n)


class ReplayConfig(Section):
    """A buffer of completions of earlier steps, some of which are trained on beside a step's own (AVATAR)."""

    size: int = Field(
        0, ge=0, description="completions in the replay buffer, of all ranks together; 0: there is none (AVATAR 10,000)"
    )
    n: Count = Field(
        4, description="stored completions of its prompt that join the rollout.n generated ones of a group, at most"
    )
    share: Share = Field(
        0.5,
        description="share of each step's prompts that are drawn from those with stored completions, by tiers; the "
        "others come in the data's order, and are joined by what is stored of them. 0: all in the data's order",
    )
    tiers: tuple[Share, Share, Share] = Field(
        (0.25, 0.35, 0.4),
        description="shares of easy, medium and hard prompts, by their mean reward, among those with stored "
        "completions: of the prompts, of the buffer's room, and of the prompts that are drawn",
    )
    window: Count = Field(
        20, description="latest generated completions of a prompt whose mean reward is its replayed ones' baseline"
    )
    weight: Positive = Field(1.0, description="factor of the advantages of replayed completions")
    max_age: Count | None = Field(
        None, description="steps after which a stored completion isn't replayed any more; unset: no limit"
    )

    @model_validator(mode="after")
    def _is_read(self) -> "ReplayConfig":
        for name, field in type(self).model_fields.items():
            if not self.size and getattr(self, name) != field.default:
                raise ValueError(f"replay.{name}={getattr(self, name)}: with replay.size=0 nothing is stored")
        if abs(sum(self.tiers) - 1) > 1e-6:
            raise ValueError(f"replay.tiers={list(self.tiers)} sum to {sum(self.tiers):g}, not to 1")
        return self

    def drawn(self, prompts: int) -> int:
        """How many of a step's prompts are drawn from the buffer's: the share, rounded down."""
        return int(self.share * prompts + 1e-9) if self.size else 0

    def fresh_enough(self, age: int) -> bool:
        """Whether a completion of so many steps ago may be replayed."""
        return self.max_age is None or age <= self.max_age
