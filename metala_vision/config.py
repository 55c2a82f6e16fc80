"""The configuration of a training run: four sections, one YAML file, flags that override it.

A key of a section is also a flag of the command line, `optim: {lr: 1e-3}` is `--lr 1e-3`: no key
stands in two sections. timm's names wherever timm has one. Both ways are checked by one schema;
an unknown key is an error that names the nearest.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from typing_extensions import Self

from .config_values import (
    Channels,
    ClassWeights,
    CropShare,
    DatasetName,
    Places,
    Probability,
    Range,
    Rate,
    Seed,
    Share,
    Sides,
    UserPath,
)

# Of timm.create_model, arguments that are not the model's: what is loaded, and from where.
LOADING = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict",
    "checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit", "features_only",
    "out_indices", "device", "dtype",
)  # fmt: skip


class Section(BaseModel):
    """Base of the sections: unknown keys are refused, docstrings become the help.

    NEEDS: for keys that others turn on, those others; set without them it would do nothing.
    """

    NEEDS: ClassVar[dict[str, tuple[str, ...]]] = {}

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _no_boolean_for_another_type(cls, values: Any) -> Any:
        """YAML reads `no` as false: right for mixed_precision, a mistake for a number or a name."""
        if not isinstance(values, dict):
            return values
        for key, value in values.items():
            field = cls.model_fields.get(key)
            if field is None or field.annotation is bool or not isinstance(value, bool):
                continue
            if key == "mixed_precision" and value is False:
                values = {**values, key: "no"}
            else:
                raise ValueError(f"{key} takes no {value} (YAML reads yes, no, on, off as that)")
        return values

    @model_validator(mode="after")
    def _no_key_without_effect(self) -> Self:
        fields = type(self).model_fields
        for key, switches in self.NEEDS.items():
            value = getattr(self, key)
            if value == fields[key].default:
                continue
            if all(getattr(self, name) == fields[name].default for name in switches):
                raise ValueError(f"{key}={value} has no effect without {' or '.join(switches)}")
        return self


class ModelConfig(Section):
    """Which model, how it differs from its default, what it begins from and what is trained."""

    NEEDS = {"lora_alpha": ("lora_rank",), "lora_target": ("lora_rank",)}

    model: str = "metala_tiny"
    """Any model registered with timm."""
    img_size: PositiveInt | None = None
    """Side of the images; null is the model's own."""
    patch_size: PositiveInt | None = None
    """Side of a patch; null is the model's own."""
    in_chans: Channels = 3
    """Channels of the images: 3 colour, 1 grey."""
    num_classes: PositiveInt | None = None
    """Classifier outputs; null counts the classes of the data."""
    pretrained: bool = False
    """Begin from the model's pretrained weights; MODEL.TAG names one of several."""
    pretrained_path: UserPath | None = None
    """Begin from these: a checkpoint's folder, as RUN/best, or a safetensors file."""
    freeze_layers: NonNegativeInt = 0
    """Leave as many layers as they are: 1 the stem, 2 the first block too, ..."""
    linear_probe: bool = False
    """Train the classifier alone."""
    lora_rank: PositiveInt | None = None
    """Train the classifier, and of linear layers only an addition of this rank (LoRA)."""
    lora_alpha: PositiveFloat | None = None
    """Strength of the addition, alpha / rank; null is the rank."""
    lora_target: str | None = None
    """Pattern of the names of those layers; null is all."""
    drop_path_rate: Rate | None = None
    """Stochastic depth at the last block; null is the model's own."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    channels_last: bool = False
    """Keep images with their channels last in memory: faster for convolutions on many devices."""
    torchcompile: Literal["no", "model", "blocks"] = "no"
    """Compile the whole model, or each block."""
    model_kwargs: dict[str, Any] = {}
    """Further arguments of the model, as key=value."""

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        for keys in (("pretrained", "pretrained_path"),
                     ("freeze_layers", "linear_probe", "lora_rank")):  # fmt: skip
            given = [f"{key}={getattr(self, key)}" for key in keys if getattr(self, key)]
            if len(given) > 1:
                raise ValueError(
                    f"{' and '.join(given)} are given, one of them is accepted; a flag turns off "
                    f"what a file has, as --{keys[0].replace('_', '-')} "
                    f"{'false' if keys[0] == 'pretrained' else '0'}"
                )
        return self


class DataConfig(Section):
    """Which images, how they are split, and the augmentation of the training part."""

    NEEDS = {
        "mixup_prob": ("mixup", "cutmix", "cutmix_minmax"),
        "mixup_switch_prob": ("mixup", "cutmix", "cutmix_minmax"),
        "mixup_mode": ("mixup", "cutmix", "cutmix_minmax"),
        "mixup_off_epoch": ("mixup", "cutmix", "cutmix_minmax"),
        "on_device_size": ("on_device",),
    }

    dataset: DatasetName = "folder"
    """folder: class folders; tar: of class folders or one a class; wds: WebDataset shards; hfds or
    hfds/NAME: a Hugging Face data set; digits: scikit-learn's 1,797 handwritten digits; cifar10,
    cifar100, flowers102, oxford_pets: the files that their authors publish, unpacked."""
    data_dir: UserPath | None = None
    """Holds the parts, as train/ and val/ with one folder per class; default $METALA_VISION_DATA.
    """
    train_split: str = "train"
    """Name of the training part; of flowers102 also train+val."""
    val_split: str | None = None
    """Name of the held-out part; null is val or validation; of cifar and oxford_pets test."""
    input_key: str | None = None
    """Of wds: endings of an image, jpg;jpeg;png;webp; of hfds: its column, image."""
    target_key: str | None = None
    """Of wds: ending of a label, cls; of hfds: its column, label."""
    val_fraction: Share | None = None
    """Hold out this fraction of each class where there is no val/, or instead of the authors' part.
    """
    val_file: UserPath | None = None
    """Hold out the images that this file lists, CLASS/name.jpg a line, of one tree of classes."""
    split_seed: Seed = 0
    """Draws the held-out part; another seed of the run leaves it as it is."""
    class_range: Places | None = None
    """Only the classes from this place in the data's order up to, not with, that one: 0 150."""
    batch_size: PositiveInt = 256
    """Images of a batch on one process."""
    workers: NonNegativeInt = 4
    """Processes that decode images; 0 decodes in the training process."""
    on_device: bool = False
    """Decode all images once, keep them in the memory of the device, and crop, mirror, colour and
    erase them there; for data sets of small images. Takes no auto_augment."""
    on_device_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Side of the square that each training image is resized and cut to before it is kept; null
    keeps them as they are, which must be all of one size."""
    scale: Range = (0.08, 1.0)
    """Area range of the random resized crop."""
    ratio: Range = (0.75, 4 / 3)
    """Aspect range of the random resized crop."""
    hflip: Probability = 0.5
    """Probability of a horizontal flip."""
    color_jitter: NonNegativeFloat = 0.0
    """Strength of brightness, contrast and saturation jitter; alone or beside auto_augment 3a."""
    auto_augment: str | None = None
    """timm's policy name, such as rand-m9-mstd0.5-inc1; 3a is three-augment."""
    reprob: Probability = 0.0
    """Probability of random erasing."""
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"
    """Of the training crop; evaluation takes the model's own."""
    aug_repeats: PositiveInt = 1
    """Repeated augmentation: samples of each image that an epoch draws."""
    mixup: NonNegativeFloat = 0.0
    """alpha of mixup; 0 does not mix."""
    cutmix: NonNegativeFloat = 0.0
    """alpha of CutMix; 0 does not mix."""
    cutmix_minmax: Sides | None = None
    """Range of CutMix's side instead of alpha."""
    mixup_prob: Probability = 1.0
    """Probability of mixing a batch, pair or image."""
    mixup_switch_prob: Probability = 0.5
    """Probability of CutMix where both are on."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """One draw for each batch, pair or image."""
    mixup_off_epoch: NonNegativeInt | None = None
    """Mix no images from this epoch on, counted from 0."""
    max_unreadable: Rate = 0.001
    """Share of images that may be unreadable; they are reported, and replaced in training."""
    crop_pct: CropShare | None = None
    """Centre crop of the evaluation; null is the model's own."""
    mean: tuple[float, ...] | None = None
    """Normalisation; null is the model's own."""
    std: tuple[PositiveFloat, ...] | None = None
    """Normalisation; null is the model's own."""

    @model_validator(mode="after")
    def _jitter_is_applied(self) -> Self:
        if self.color_jitter and self.auto_augment and "3a" not in self.auto_augment:
            raise ValueError(
                f"color_jitter={self.color_jitter} has no effect beside "
                f"auto_augment={self.auto_augment}, which timm takes instead; 3a takes both"
            )
        return self

    @model_validator(mode="after")
    def _augmentation_is_on_the_device(self) -> Self:
        if self.on_device and self.auto_augment:
            raise ValueError(
                f"on_device takes no auto_augment={self.auto_augment}; crop, hflip, color_jitter, "
                "reprob, mixup and cutmix are accepted"
            )
        return self


class OptimConfig(Section):
    """Optimizer, schedule and length."""

    NEEDS = {
        "bce_target_thresh": ("bce_loss",),
        "model_ema_decay": ("model_ema",),
        "model_ema_warmup": ("model_ema",),
        "distill_kwargs": ("distill_teacher",),
        "distill_type": ("distill_teacher",),
        "distill_share": ("distill_teacher",),
        "distill_temperature": ("distill_teacher",),
        "decay_epochs": ("sched",),
        "decay_rate": ("sched",),
    }

    opt: str = "adamw"
    """timm's optimizer name."""
    lr: PositiveFloat | None = None
    """Peak learning rate; null is lr_base * global batch / lr_base_size."""
    lr_base: PositiveFloat = 6e-4
    """Learning rate at a batch of lr_base_size."""
    lr_base_size: PositiveInt = 512
    """Batch that lr_base belongs to."""
    betas: tuple[Rate, Rate] = (0.9, 0.98)
    """Momenta, for optimizers that have two."""
    opt_kwargs: dict[str, Any] = {}
    """Further arguments of the optimizer, as key=value."""
    weight_decay: NonNegativeFloat = 0.05
    """Not on biases, norms and what the model excludes."""
    layer_decay: CropShare | None = None
    """Factor of the learning rate from a layer to the one before it; null is 1."""
    clip_grad: PositiveFloat | None = None
    """Largest gradient norm; null does not clip."""
    grad_accum_steps: PositiveInt = 1
    """Batches of an optimizer step."""
    smoothing: Rate = 0.0
    """Label smoothing."""
    class_weights: ClassWeights = None
    """Of the loss of an image, by its class: balanced (all classes alike), or a number for each."""
    bce_loss: bool = False
    """A binary cross entropy for each class."""
    bce_target_thresh: Rate | None = None
    """For bce_loss: labels above it count as 1, others as 0."""
    model_ema: bool = False
    """Average the weights over the steps; evaluated and saved instead of the last ones."""
    model_ema_decay: Rate = 0.9999
    """Share of the average that a step keeps."""
    model_ema_warmup: bool = True
    """Begin with a shorter average."""
    distill_teacher: str | None = None
    """A timm model, or local-dir:FOLDER, whose answers are learned too."""
    distill_kwargs: dict[str, Any] = {}
    """Further arguments of the teacher, as key=value."""
    distill_type: Literal["soft", "hard"] = "soft"
    """Learn the teacher's distribution, or its first choice."""
    distill_share: Probability = 0.5
    """Of the teacher's part in the loss."""
    distill_temperature: PositiveFloat = 1.0
    """Of both distributions, soft."""
    sched: Literal["cosine", "tanh", "poly", "step"] = "cosine"
    """timm's schedule behind the warm-up."""
    decay_epochs: PositiveFloat = 90
    """For sched step: epochs between two decays."""
    decay_rate: CropShare = 0.1
    """For sched step: factor of a decay."""
    epochs: PositiveInt = 300
    """Length of the run and of the cosine."""
    max_steps: PositiveInt | None = None
    """Shorter run: stop, and end the cosine, after this many steps."""
    warmup_epochs: NonNegativeFloat = 5
    """Linear warm-up, part of the run's length."""
    warmup_lr: NonNegativeFloat = 0.0
    """Learning rate at the first step of the warm-up."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end."""


class RunConfig(Section):
    """Where the run is kept and how it is executed."""

    output: UserPath = Path("runs")
    """Folder under which a new run folder is made."""
    run_dir: UserPath | None = None
    """This run's folder instead; new or empty, unless the run is resumed."""
    seed: Seed = 0
    """Of weights, order and augmentation."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Type of the products; fp16 needs a GPU."""
    resume: str | None = None
    """A run's folder to go on with; auto: this run_dir, where it was begun."""
    checkpoint_minutes: PositiveFloat = 15
    """Save every so many minutes, besides each evaluation."""
    checkpoint_hist: PositiveInt = 1
    """Best checkpoints kept, besides the last two."""
    max_skipped: NonNegativeInt = 10
    """Steps in a row whose loss or gradient may be infinite or nan; they are skipped."""
    eval_interval: PositiveInt = 1
    """Evaluate and save every so many epochs, and at the end."""
    patience: PositiveInt | None = None
    """Stop after as many evaluations in a row without a better top-1; null goes on to the end."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Write the metrics there too; wandb takes its settings from its own variables."""
    log_interval: PositiveInt = 10
    """Write the loss every so many steps."""


class Config(Section):
    """A training run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "run": RunConfig,
}
