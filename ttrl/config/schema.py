"""The recipe vocabulary as pydantic models. `ttrl recipes schema` exports it as JSON schema for editors.

Three batch sizes and no more: `data.prompts_per_step`, `rollout.votes_per_prompt` / `train_per_prompt` and
`trainer.tokens_per_microbatch`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

# Strict: `true` is not 1 and "16" is not 16
Positive = Annotated[int, Strict(), Field(ge=1)]
NonNegative = Annotated[int, Strict(), Field(ge=0)]
Beta = Annotated[float, Strict(), Field(ge=0.0, lt=1.0)]
Fraction = Annotated[float, Strict(), Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Unknown keys are errors and values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class Plug(Section):
    """A plug-in and its options: `{use: name, with: {...}}`, or just `name`."""

    use: str = Field(min_length=1, description="registry name, entry point, package.module:Name or ./file.py:Name")
    options: dict[str, Any] = Field(default_factory=dict, alias="with", description="keyword arguments of the plug-in")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"use": value} if isinstance(value, str) else value


def _plug(name: str) -> Any:
    return Field(default_factory=lambda: Plug(use=name))


class ModelSection(Section):
    """The model to adapt."""

    path: str = Field(min_length=1, description="folder, hub name (org/name) or bundled:NAME")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of sampling and the forward pass; trained weights stay float32 (float16 would need loss scaling)",
    )
    threads: Positive | None = Field(None, description="CPU threads of torch; tiny models are fastest with 1")
    device: Annotated[
        str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto takes a GPU when there is one")
    ] = "auto"


class DataSection(Section):
    """The unlabelled prompts."""

    prompts: str = Field(
        min_length=1, description="file (.jsonl .json .csv .parquet), hub:NAME[#SPLIT] or bundled:NAME"
    )
    template: str = Field("chat", description="chat, boxed, choice, raw, or a text file with {prompt} in it")
    prompt_field: str = "prompt"
    id_field: str = "id"
    images_field: str | None = Field(
        "images",
        description="column with a path or paths of pictures, relative to the prompts file; null: none is read",
    )
    keep: tuple[str, ...] = Field(
        (), description="other columns that rewards and evaluation may see, such as image_size; never answers"
    )
    limit: Positive | None = Field(None, description="use only the first N prompts")
    prompts_per_step: Positive = 8
    source: Plug = _plug("epoch")
    max_prompt_tokens: Positive | None = Field(None, description="longer prompts are an error, never cut silently")


class RolloutSection(Section):
    """How votes are drawn."""

    engine: Plug = _plug("hf")
    sampler: Plug = _plug("flat")
    votes_per_prompt: Annotated[int, Strict(), Field(ge=2)] = Field(
        16, description="rollouts that vote on the pseudo-label"
    )
    train_per_prompt: Annotated[int, Strict(), Field(ge=2)] | None = Field(
        None, description="rollouts of the group that are trained on, drawn by seed; default: all"
    )
    max_new_tokens: Positive = 256
    temperature: Annotated[float, Strict(), Field(gt=0.0, le=10.0)] = 1.0
    top_p: Annotated[float, Strict(), Field(gt=0.0, le=1.0)] = 1.0
    top_k: NonNegative = 0
    min_p: Annotated[float, Strict(), Field(ge=0.0, lt=1.0)] = 0.0
    allow_truncated_sampling: bool = Field(
        False, description="accept top_p, top_k or min_p in training although they bias the ratio"
    )
    ahead: Annotated[int, Strict(), Field(ge=0, le=8)] = Field(
        0, description="steps that sampling may run ahead of training; 0: every rollout is from the current weights"
    )

    @property
    def trained(self) -> int:
        """Rollouts per prompt that are trained on."""
        return self.train_per_prompt or self.votes_per_prompt

    @model_validator(mode="after")
    def _consistent(self) -> RolloutSection:
        if self.train_per_prompt and self.train_per_prompt > self.votes_per_prompt:
            raise ValueError(
                f"train_per_prompt ({self.train_per_prompt}) is larger than votes_per_prompt ({self.votes_per_prompt}); "
                "only rollouts that voted can be trained on"
            )
        truncated = self.top_p < 1 or self.top_k > 0 or self.min_p > 0
        if truncated and not self.allow_truncated_sampling:
            raise ValueError(
                "top_p, top_k and min_p change the distribution that was sampled and bias the policy ratio; remove them, "
                "or set rollout.allow_truncated_sampling: true"
            )
        return self


class TrainerSection(Section):
    """How the weights move."""

    backend: Plug = _plug("torch")
    parameters: Plug = _plug("full")
    lr: Annotated[float, Strict(), Field(gt=0.0)] = Field(1e-6, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Fraction = Field(0.03, description="share of all updates with a rising learning rate")
    min_lr_ratio: Fraction = Field(0.0, description="last learning rate divided by the peak")
    weight_decay: Annotated[float, Strict(), Field(ge=0.0)] = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    grad_clip: Annotated[float, Strict(), Field(gt=0.0)] = 1.0
    tokens_per_microbatch: Positive = 8192
    updates_per_step: Positive = Field(
        1, description="optimizer updates made from the groups of one step, each on its own share"
    )
    gradient_checkpointing: bool = False
    zero: Annotated[int, Strict(), Field(ge=0, le=3)] | None = Field(
        None, description="deepspeed: ZeRO stage; default 2"
    )
    offload: Literal["none", "optimizer", "all"] | None = Field(
        None, description="deepspeed: what lives in CPU memory; all: parameters too, with zero 3"
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="deepspeed: raw configuration merged over ours; what it overrides is reported"
    )

    @model_validator(mode="after")
    def _belongs_to_backend(self) -> TrainerSection:
        if self.backend.use == "torch":
            given = [name for name in ("zero", "offload") if getattr(self, name) is not None]
            given += ["deepspeed"] if self.deepspeed else []
            if given:
                raise ValueError(
                    f"{', '.join(given)}: only backend deepspeed knows this; set trainer.backend: deepspeed"
                )
        if self.offload == "all" and self.zero != 3:
            raise ValueError("offload: all moves parameters to CPU memory, which needs zero: 3")
        return self


class ClusterSection(Section):
    """Where rollout workers and trainer ranks run. `local` is one process; everything else goes through Ray."""

    backend: Literal["local", "ray"] = "local"
    address: str = Field(
        "auto",
        min_length=1,
        description="auto: the running cluster ($RAY_ADDRESS, or ray start on this machine), else one of our own; "
        "local: always one of our own, on this machine; HOST:PORT: that cluster or an error",
    )
    placement: Literal["colocated", "split"] = Field(
        "colocated", description="colocated: workers and ranks share GPUs in turns; split: each has its own"
    )
    workers: Positive = Field(1, description="rollout workers, each with an engine")
    ranks: Positive = Field(1, description="data-parallel trainer ranks (backend deepspeed)")
    cpus_per_actor: Annotated[float, Strict(), Field(gt=0.0)] = 1.0
    transport: Literal["auto", "shared_memory", "object_store", "gloo", "nccl", "ipc"] = Field(
        "auto",
        description="how weights reach the workers; auto: on CPU shared_memory, and object_store between machines; on GPU ipc when "
        "colocated and nccl when split, if the recipe allows it (docs/cluster.md)",
    )
    bucket_mb: Positive = Field(256, description="weights in flight at once; two buckets exist at most")
    start_seconds: Positive = Field(600, description="deadline of starting a worker or rank, model load included")
    call_seconds: Positive = Field(3600, description="deadline of one remote call or collective")
    replacements: NonNegative = Field(3, description="rollout workers replaced in a run before it fails")
    dashboard: bool = False

    @model_validator(mode="after")
    def _needs_ray(self) -> ClusterSection:
        if self.backend == "local" and (self.workers > 1 or self.ranks > 1):
            raise ValueError("more than one worker or rank needs cluster.backend: ray")
        return self


class PromptSet(Section):
    """Prompts that are only evaluated on, to see whether a gain carries over."""

    prompts: str = Field(min_length=1)
    labels: str | None = None


class EvalSection(Section):
    """Before and after (and, with `every`, in between). Only this part of a run may open labels."""

    labels: str | None = Field(
        None, description="file with {id, answer}; without it only label-free numbers are reported"
    )
    heldout: PromptSet | None = None
    extractor: str | None = Field(
        None, description="how answers are read; default: as the reward reads them, else math"
    )
    extractor_options: dict[str, Any] = Field(default_factory=dict)
    truncated_votes: bool = Field(False, description="with `extractor`: text cut at the length limit may answer")
    every: NonNegative = Field(0, description="steps between evaluations; 0: before and after only")
    samples: Annotated[int, Strict(), Field(ge=1, le=512)] = 16
    temperature: Annotated[float, Strict(), Field(ge=0.0, le=10.0)] = 1.0
    top_p: Annotated[float, Strict(), Field(gt=0.0, le=1.0)] = 1.0
    max_new_tokens: Positive | None = Field(None, description="default: rollout.max_new_tokens")
    k: tuple[Positive, ...] = (1, 8, 16)
    limit: Positive | None = Field(None, description="evaluate only the first N prompts")
    by: tuple[str, ...] = Field((), description="columns of data.keep: results are also given per combination of them")

    @field_validator("k")
    @classmethod
    def _some_k(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value:
            raise ValueError("name at least one k, for example [1, 8, 16]")
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _enough_samples(self) -> EvalSection:
        if max(self.k) > self.samples:
            raise ValueError(
                f"pass@{max(self.k)} needs at least {max(self.k)} samples per prompt, eval.samples is {self.samples}"
            )
        return self


class LogSection(Section):
    """Where numbers go besides the console and metrics.jsonl."""

    tensorboard: bool = False
    wandb: str | None = Field(None, description="project name")
    groups_per_step: NonNegative = Field(1, description="groups written to groups.jsonl per step, drawn by seed")


class CheckpointSection(Section):
    """A checkpoint is also written at the end and when the run is stopped."""

    every: NonNegative = Field(20, description="steps between checkpoints; 0: only at the end")
    keep: Positive = 2


class Recipe(Section):
    """One run, complete."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    description: str = ""
    seed: NonNegative = 0
    steps: Positive
    model: ModelSection
    data: DataSection
    rollout: RolloutSection = RolloutSection()
    reward: Plug = _plug("majority_vote")
    allow_labels: bool = Field(
        False, description="let a reward such as gold train on eval.labels; the run is marked and is not label-free"
    )
    gates: tuple[Plug, ...] = ()
    objective: Plug = _plug("grpo")
    stabilizers: tuple[Plug, ...] = ()
    guards: tuple[Plug, ...] = Field((), description="watch the run without labels; see docs/guards.md")
    trainer: TrainerSection = TrainerSection()
    eval: EvalSection = EvalSection()
    log: LogSection = LogSection()
    checkpoint: CheckpointSection = CheckpointSection()
    cluster: ClusterSection = ClusterSection()
    max_empty_steps: Positive = Field(
        5, description="end the run after this many steps in a row without anything to train on"
    )
    output: str = Field("", description="run folder; default runs/NAME")

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        unkept = [column for column in self.eval.by if column not in self.data.keep]
        if unkept:
            raise ValueError(f"eval.by names columns that data.keep does not: {', '.join(unkept)}")
        if self.rollout.ahead and self.cluster.backend == "ray" and self.cluster.placement == "colocated":
            raise ValueError(
                "rollout.ahead samples while training runs, so both need their own: cluster.placement: split"
            )
        if self.cluster.ranks > 1 and self.trainer.backend.use == "torch":
            raise ValueError("cluster.ranks above 1 needs trainer.backend: deepspeed; torch is one process")
        return self

    @model_validator(mode="before")
    @classmethod
    def _default_output(cls, value: Any) -> Any:
        if isinstance(value, dict) and not value.get("output") and isinstance(value.get("name"), str):
            return {**value, "output": f"runs/{value['name']}"}
        return value
