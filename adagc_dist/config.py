"""The configuration: a tree of frozen, typed dataclasses, checked when built.

A recipe (YAML) names any of these keys; dotted overrides name them as ``section.key``. Reading recipes is
``launch.recipe``'s work.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "CHANGEABLE",
    "Config",
    "DataConfig",
    "DetectorConfig",
    "EngineConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "ScheduleConfig",
    "SpmlConfig",
]

CHANGEABLE = (
    "method.gc_weight",
    "method.mixup_alpha",
    "method.prediction_momentum",
    "method.pseudo_threshold",
    "method.teacher_lag",
    "method.teacher_momentum",
    "method.teacher_weight",
    "optim.lr",
)
"""What may change within a run (``schedule.changes``): numbers that no state depends on."""

_EVERY = re.compile(r"epoch|(?P<count>[1-9]\d*) ?(?P<unit>step|minute)s?")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    shards: str = ""
    """Folder made by `adagc shard` or `adagc index` (required), or its URL: http(s)://, s3://, whatever fsspec has."""
    bands: tuple[str, ...] | None = None
    """Bands by name, in the order in which the student sees them; only these are read. null: all of the shards, in
    their order (reBEN: B02 B03 B04 B08, B05 B06 B07 B8A B11 B12, B01 B09)."""
    size: int | None = None
    """Side of the student's input in pixels; bands of other sizes are resampled to it (bilinear) on the device. null:
    that of the largest band (reBEN: 120)."""
    workers: int = 2
    """Reading processes per rank; 0 reads in the training process."""
    prefetch: int = 2
    """Micro-batches that each reading process holds ready."""
    reader: Literal["indexed", "webdataset"] = "indexed"
    """indexed: byte ranges of the manifest's index; webdataset: whole streams through the webdataset library, for
    comparison and for sources that cannot seek (every rank reads all of each window)."""
    window_shards: int | None = None
    """Rows are permuted within windows of so many shuffled shards; 0 is one window over the whole split. null: the
    whole split where shards are local, 16 where they are fetched, staged or streamed."""
    check_digests: bool = True
    """Compare every member that is read whole with the digest it was written with."""
    on_error: Literal["stop", "skip"] = "stop"
    """A row whose bytes cannot be read: stop, naming shard, key and offset; or skip: it is left out of loss and
    averages, counted and reported, and nothing else shifts."""
    max_bad_fraction: float = 0.001
    """With on_error=skip: more rows than this share of the split in an epoch, and the run stops."""
    stage: bool = False
    """Shards on a shared file system are copied to the node's own disk (data.cache), this window and the next, in the
    background; what is not there is read where it lies. Remote shards are in any case."""
    cache: str = ""
    """Node-local folder in which remote and staged shards are kept; ~ and $NAMES are expanded. Empty: adagc-cache in
    the system's temporary folder."""
    cache_gb: float = 0.0
    """Limit of each shard folder in the cache, in 10^9 bytes; the least recently used go. 0 is no limit."""
    augment: bool = True
    """Train on a random one of the eight symmetries of the square, drawn per patch and epoch."""

    def __post_init__(self) -> None:
        _check(self.size is None or self.size > 0, f"data.size={self.size} must be positive, or null")
        _check(self.workers >= 0, f"data.workers={self.workers} must not be negative")
        _check(self.prefetch >= 1, f"data.prefetch={self.prefetch} must be at least 1")
        _check(self.window_shards is None or self.window_shards >= 0, "data.window_shards must be null, 0 or more")
        _check(0 <= self.max_bad_fraction <= 1, f"data.max_bad_fraction={self.max_bad_fraction} must lie in [0, 1]")
        _check(
            not (self.stage and self.reader == "webdataset"),
            "data.stage=true needs data.reader=indexed: webdataset streams shards from where they lie",
        )
        _check(self.cache_gb >= 0, f"data.cache_gb={self.cache_gb} must not be negative")


@dataclass(frozen=True, kw_only=True)
class SpmlConfig:
    policy: Literal["random", "dominant", "file", "full"] = "random"
    """The one positive each patch keeps: random (uniform over its labels), dominant (largest area), file (spml.file has
    it); full keeps all (the upper bound).
    """
    file: str = ""
    """With policy=file: CSV, TSV or parquet with columns patch_id and label, a label for each patch of train and
    validation."""
    seed: int = 0
    """Seed of the random choice: a function of (seed, patch key) alone."""

    def __post_init__(self) -> None:
        _check(
            (self.policy == "file") == bool(self.file),
            f"spml.policy={self.policy} and spml.file={self.file!r}: the file goes with spml.policy=file",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: str = "resnet50"
    """Any timm model, e.g. resnet18, convnextv2_base, or vit_base_patch16_224 with data.size=112
    model.kwargs.img_size=112 (patches of 16 pixels do not divide 120)."""
    pretrained: str | None = None
    """Weights to start from: null (random), `timm` (the model's own), a Hugging Face hub name `org/name`, or a local
    file.
    """
    prior_bias: bool = True
    """Start the head's bias at the log odds of each class among the observed labels, so that the first predictions,
    which the prediction averages remember longest, say "rare" and not 0.5."""
    head: Literal["linear", "boostlu"] = "linear"
    """linear: the model's own; boostlu: the same weights on the feature map, where positive values are multiplied by
    boost before they are averaged (for networks that end in average pooling and a linear layer)."""
    boost: float = 5.0
    """Factor of head=boostlu; 1 is linear."""
    views: Literal["whole", "quarters"] = "whole"
    """What `adagc evaluate`, `recover` and `predict` show the teacher of a patch; training and its curves do not depend
    on it. quarters: the whole, and its four quarters, of which each class has the best; twice the time."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model, e.g. {drop_path_rate: 0.1}."""

    def __post_init__(self) -> None:
        _check(self.boost > 0, f"model.boost={self.boost} must be positive (1 is model.head=linear)")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    name: Literal[
        "adagc", "adagc_levels", "an", "an_ls", "wan", "epr", "role", "em", "em_apl", "ll_r", "ll_ct", "ll_cp", "gr",
        "hill", "splc", "focal", "asl", "elr", "sat", "softmax",
    ] = "adagc"  # fmt: skip
    """adagc: gradient calibration after the trigger; adagc_levels: ours, unobserved labels that reach a level of their
    class are left out instead; an: assume-negative BCE throughout. Further baselines: an_ls: an
    with smoothed labels; wan: with light negatives; epr: positives alone, and their expected number; role: and
    estimated labels; em: unobserved labels held uncertain; em_apl: and low scores become soft negatives; ll_r, ll_ct,
    ll_cp: the largest losses left out, corrected, or corrected for good; gr: generalised robust loss; hill: large
    scores pushed less; splc: large scores become positives; focal, asl: focus on hard labels, alike or asymmetric; elr:
    held near earlier predictions; sat: labels that move to the predictions; softmax: which class a draw would show."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Numbers of a method, e.g. {epsilon: 0.2}. adagc_levels: quantile, quarters; an_ls: epsilon; wan: gamma; epr:
    expected_positives (required: the mean number of labels per patch); role: expected_positives (required), lr_factor;
    em: alpha; em_apl: alpha, beta, share, warmup_epochs; ll_r, ll_ct, ll_cp: delta_rel; gr: w_first, w_last, b_first,
    b_last, mu_first, mu_last, sigma_first, sigma_last, q2, q3; hill: lamb, margin, gamma; splc: tau, change_epoch,
    margin, gamma; focal: gamma; asl: gamma_neg, gamma_pos, clip; elr: weight, momentum; sat: momentum, warmup_epochs.
    """
    teacher_momentum: float | None = None
    """Momentum of the teacher's weights per step; null: from teacher_lag."""
    teacher_lag: float = 1.5
    """Time constant of the teacher's weights in epochs, where teacher_momentum is null."""
    prediction_momentum: float = 0.9
    """Momentum of each sample's prediction average per epoch (beta)."""
    averages_of: Literal["student", "teacher"] = "student"
    """Whose predictions it follows after the trigger: the student's, or the teacher's, which with Mixup saves the
    student's pass over the clean images, a fifth of the step.
    """
    teacher_weight: float = 0.5
    """Weight w of the teacher's prediction in the pseudo-label; 1 is teacher only, 0 the prediction average only."""
    combine: Literal["mean", "max", "product"] = "mean"
    """How teacher and prediction average make a pseudo-label: w pT + (1-w) pS, the larger, or pT^w pS^(1-w)."""
    pseudo_threshold: float = 0.0
    """Pseudo-labels below it are set to 0; 0 is off."""
    gc_weight: float = 3.0
    """Weight of the calibration term; both terms are means over samples and classes. In self-consistency accepts above
    1/(weight-1).
    """
    mixup_alpha: float = 1.0
    """Beta(alpha, alpha) of Mixup after the trigger; 0 is no Mixup."""

    def __post_init__(self) -> None:
        for name in ("prediction_momentum", "teacher_weight", "pseudo_threshold"):
            value = getattr(self, name)
            _check(0.0 <= value <= 1.0, f"method.{name}={value} must lie in [0, 1]")
        momentum = self.teacher_momentum
        _check(
            momentum is None or 0.0 <= momentum < 1.0,
            f"method.teacher_momentum={momentum} must lie in [0, 1) or be null",
        )
        _check(self.teacher_lag > 0, f"method.teacher_lag={self.teacher_lag} must be positive (epochs)")
        _check(
            self.gc_weight >= 0,
            f"method.gc_weight={self.gc_weight} must not be negative: the term is added with this weight",
        )
        _check(self.mixup_alpha >= 0, f"method.mixup_alpha={self.mixup_alpha} must not be negative (0 is no Mixup)")


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    rule: Literal["plateau", "fixed", "never"] = "plateau"
    """plateau: noisy validation mAP stopped rising; fixed: after min_epochs; never: warm-up to the end."""
    min_epochs: int = 3
    """Warm-up lasts at least so many epochs, or max_epochs if that is less (rule fixed: exactly so many)."""
    max_epochs: int | None = None
    """The trigger is forced after so many epochs; null: 0.4 of optim.epochs, which it may not exceed."""
    patience: int = 3
    """Epochs without an improvement of the smoothed noisy mAP by more than its standard error, before the plateau is
    called.
    """
    rewind: bool = True
    """Go back to the best epoch's weights, optimiser and prediction averages at the trigger."""

    def __post_init__(self) -> None:
        _check(self.min_epochs >= 1, f"detector.min_epochs={self.min_epochs} must be at least 1")
        _check(self.patience >= 1, f"detector.patience={self.patience} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    epochs: int = 60
    """Epochs in all, warm-up and calibration."""
    lr: float = 1e-3
    """Peak learning rate of AdamW: linear warm-up, constant to the trigger, cosine to 0 after it."""
    weight_decay: float = 0.01
    """AdamW's decay of weight matrices; biases and normalisation weights are not decayed."""
    global_batch: int = 512
    """Rows of a step over all ranks and micro-batches, whatever their number."""
    accumulation: int = 1
    """Micro-batches per step and rank."""
    warmup_steps: int = 100
    """Steps of the learning rate's linear warm-up."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 is off."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of forward passes; weights, averages and losses stay float32."""

    def __post_init__(self) -> None:
        for name in ("epochs", "global_batch", "accumulation"):
            _check(getattr(self, name) >= 1, f"optim.{name}={getattr(self, name)} must be at least 1")
        for name in ("lr", "weight_decay", "warmup_steps", "clip_norm"):
            _check(getattr(self, name) >= 0, f"optim.{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    changes: dict[int, dict[str, float]] = field(default_factory=dict)
    """Numbers that change in mid-run: {8: {optim.lr: 0.001}} holds after 8 epochs. They are optim.lr, and of the method
    gc_weight, mixup_alpha, prediction_momentum, pseudo_threshold, teacher_lag, teacher_momentum, teacher_weight."""

    def __post_init__(self) -> None:
        _check(
            isinstance(self.changes, Mapping), f"schedule.changes={self.changes} must be like {{8: {{optim.lr: 1}}}}"
        )
        for epoch, changes in self.changes.items():
            _check(epoch >= 1, f"schedule.changes: {epoch} must be at least 1, the epochs that are done by then")
            for key in changes:
                _check(
                    key in CHANGEABLE,
                    f"schedule.changes: {key} cannot change in mid-run; {', '.join(CHANGEABLE)} can",
                )

    def at(self, epoch: int) -> dict[str, float]:
        """What has changed by the time that so many epochs are done."""
        found: dict[str, float] = {}
        for start in sorted(self.changes):
            if start <= epoch:
                found |= self.changes[start]
        return found


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    name: Literal["ddp", "deepspeed"] = "ddp"
    """ddp: DistributedDataParallel; deepspeed: DeepSpeed with ZeRO. Both use gloo on CPU and NCCL on GPU, write the
    same checkpoints and go on from each other's."""
    zero_stage: int = 1
    """What DeepSpeed shards over the ranks: 0 nothing, 1 the optimiser's state, 2 gradients too."""
    deepspeed_json: str | None = None
    """A DeepSpeed configuration whose settings join those that follow from the recipe; what the recipe states itself is
    refused there."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU per rank where there is one."""
    row_exchange: Literal["all_gather", "all_to_all"] = "all_gather"
    """How the prediction averages move between epochs: all_gather, every rank sees all rows; all_to_all, each row goes
    to its next rank only (fewer bytes; pays on many ranks with a slow network)."""
    batchnorm: Literal["local", "sync"] = "local"
    """local: a rank normalises by its own slot, running statistics are averaged over ranks; sync: by the whole step
    (exact, slower).
    """
    timeout_minutes: float = 10.0
    """How long a rank waits for the others in a collective before it ends, naming what it waited in."""
    channels_last: bool | None = None
    """Student and teacher keep the features of a pixel side by side in memory, as tensor cores want them; the same to
    rounding. null: on GPUs only (not measured there). On a CPU a step of ResNet-18 takes 0.9 of the time at 120 pixels
    and 1.2 at 64, a pass without gradient 0.75. Under deepspeed the images of training only."""
    compile: bool = False
    """Student and teacher through torch.compile (a C++ compiler or Triton, a minute at the first start; the same to
    rounding). Off: on a CPU a step takes 1.1 times as long; not measured on GPUs."""

    def __post_init__(self) -> None:
        _check(self.timeout_minutes > 0, f"engine.timeout_minutes={self.timeout_minutes} must be positive")
        _check(
            self.zero_stage != 3,
            "engine.zero_stage=3 is not supported: the teacher averages and runs all weights at every step, and ZeRO 3 "
            "leaves each rank a part of them. Set engine.zero_stage=2, which shards optimiser and gradients",
        )
        _check(self.zero_stage in (0, 1, 2), f"engine.zero_stage={self.zero_stage} must be 0, 1 or 2")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    dir: str = ""
    """The run's folder (required): configuration, status, metrics, checkpoints, teacher, TensorBoard events."""
    seed: int = 0
    """Seed of initial weights, order, augmentation and Mixup."""
    log_every: int = 10
    """Steps between TensorBoard points of losses and rates."""
    panels_every: int = 5
    """Epochs between TensorBoard's pictures of validation patches and its precision-recall curves, which the last epoch
    has in any case; 0 is off."""
    eval_student: bool = False
    """Validate the student beside the teacher (one more pass over validation an epoch)."""
    eval_block: int = 256
    """Patches per evaluation batch; results do not depend on the number of ranks, but on this in the last digits."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, beside the one that a rewind may need."""
    checkpoint_every: str = "15 minutes"
    """Between the checkpoints at each epoch's end: `500 steps`, `15 minutes`, or `epoch` for no more than those."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """A checkpoint that cannot be written (disk full): stop the run, or tell and go on; the last good one stays."""
    resume: Literal["auto", "never"] = "auto"
    """auto: the same command again continues from the newest checkpoint; never: refuse a folder that holds one."""
    max_epochs: int | None = None
    """Save and stop once so many epochs are done, as if asked to; null trains to the last one."""
    max_minutes: float | None = None
    """Save and stop so long after this start, e.g. shortly before a job's time limit; null is no limit."""
    stop_seconds: float = 120.0
    """After a stop is asked for: end by force if the ranks do not agree within so long, or the save then lasts longer.
    """
    sanity_every: int = 500
    """Steps between checks that student and teacher are finite and equal on all ranks; 0 is off."""

    def __post_init__(self) -> None:
        for name in ("log_every", "eval_block", "keep_checkpoints"):
            _check(getattr(self, name) >= 1, f"run.{name}={getattr(self, name)} must be at least 1")
        _check(
            _EVERY.fullmatch(self.checkpoint_every) is not None,
            f"run.checkpoint_every={self.checkpoint_every} must be like `500 steps`, `15 minutes` or `epoch`",
        )
        _check(self.max_epochs is None or self.max_epochs >= 1, f"run.max_epochs={self.max_epochs} must be at least 1")
        _check(self.max_minutes is None or self.max_minutes > 0, f"run.max_minutes={self.max_minutes} must be positive")
        _check(self.stop_seconds > 0, f"run.stop_seconds={self.stop_seconds} must be positive")
        _check(self.panels_every >= 0, f"run.panels_every={self.panels_every} must not be negative (0 is off)")
        _check(self.sanity_every >= 0, f"run.sanity_every={self.sanity_every} must not be negative (0 is off)")

    def has_panels(self, epoch: int, epochs: int) -> bool:
        """Whether ``epoch``, from 0, of ``epochs`` has pictures and precision-recall curves."""
        return self.panels_every > 0 and ((epoch + 1) % self.panels_every == 0 or epoch + 1 == epochs)

    @property
    def checkpoint_steps(self) -> int | None:
        """Steps between checkpoints, if they are counted in steps."""
        return self._every("step")

    @property
    def checkpoint_minutes(self) -> int | None:
        """Minutes between checkpoints, if they are counted in minutes."""
        return self._every("minute")

    def _every(self, unit: str) -> int | None:
        found = _EVERY.fullmatch(self.checkpoint_every)
        return int(found["count"]) if found and found["unit"] == unit else None


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run. Built by ``launch.recipe.load_config``; written to RUN/config.yaml, which is a recipe itself."""

    data: DataConfig = field(default_factory=DataConfig)
    spml: SpmlConfig = field(default_factory=SpmlConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _check(
            bool(self.data.shards),
            "data.shards is not set: the folder that `adagc shard` wrote, e.g. data.shards=shards/reben",
        )
        _check(bool(self.run.dir), "run.dir is not set: a folder for this run, e.g. run.dir=runs/first")
        bound, named = self._latest_trigger, self.detector.max_epochs
        _check(
            self.detector.rule != "plateau" or named is None or named <= bound,
            f"detector.max_epochs={named} is more than 0.4 of optim.epochs={self.optim.epochs}: "
            f"set it to {bound} or less, or null",
        )
        fixed = self.detector.rule == "fixed"
        _check(
            not fixed or self.detector.min_epochs < self.optim.epochs,
            f"detector.min_epochs={self.detector.min_epochs} of rule fixed must be less than "
            f"optim.epochs={self.optim.epochs}, or it never fires (that is detector.rule=never)",
        )
        self._check_schedule()

    def at(self, epoch: int) -> "Config":
        """The settings that hold in ``epoch``, from 0."""
        changes = self.schedule.at(epoch)
        return replace(
            self,
            method=replace(self.method, **_of_section("method", changes)),
            optim=replace(self.optim, **_of_section("optim", changes)),
            schedule=ScheduleConfig(),
        )

    def _check_schedule(self) -> None:
        for epoch in self.schedule.changes:
            _check(
                epoch < self.optim.epochs,
                f"schedule.changes: {epoch} comes to no effect within optim.epochs={self.optim.epochs}",
            )
            try:
                method = self.at(epoch).method
            except ValueError as error:
                raise ValueError(f"schedule.changes after {epoch} epochs: {error}") from error
            _check(
                method.teacher_momentum is None or "method.teacher_lag" not in self.schedule.changes[epoch],
                "schedule.changes: method.teacher_lag has no effect beside method.teacher_momentum: change that one",
            )

    @property
    def shortest_warmup(self) -> int:
        """Epochs before which the trigger does not fire."""
        return min(self.detector.min_epochs, self.longest_warmup)

    @property
    def longest_warmup(self) -> int:
        """Epochs after which the trigger is forced."""
        named = self.detector.max_epochs
        return named if named is not None else self._latest_trigger

    @property
    def _latest_trigger(self) -> int:
        """0.4 of the epochs: later, too few are left for calibration."""
        return max(1, int(0.4 * self.optim.epochs))

    @property
    def run_path(self) -> Path:
        return Path(self.run.dir)


def _of_section(section: str, values: Mapping[str, float]) -> dict[str, Any]:
    """By the section's own names."""
    parts = ((key.partition("."), value) for key, value in values.items())
    return {name: value for (head, _, name), value in parts if head == section}
