"""Every key of a recipe, its type and its default. What is not here, and not an option of a method, is an error.

Methods (encoders, connectors, pruners, cache policies, mitigators, objectives, benchmarks, data makers) are named by
``use``; their options are the signature of the one class in the file of that name and are checked by ``vlm.create``.
Values are frozen. Keys that may be null say so; null anywhere else means "as if never written".
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from vlm.recipe import units
from vlm.recipe.errors import unknown
from vlm.recipe.section import Method, Section, problem
from vlm.recipe.tree import dump

Bool = Annotated[bool, BeforeValidator(units.parse_bool)]
Float = Annotated[float, BeforeValidator(units.parse_float)]
Int = Annotated[int, BeforeValidator(units.parse_int)]
Name = Annotated[str, BeforeValidator(units.parse_str), Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Ratio = Annotated[float, BeforeValidator(units.parse_ratio)]
Str = Annotated[str, BeforeValidator(units.parse_str), Field(min_length=1)]

AtLeastOne = Annotated[Int, Field(ge=1)]
NotNegative = Annotated[Int, Field(ge=0)]
Positive = Annotated[Float, Field(gt=0)]
Beta = Annotated[Float, Field(ge=0, lt=1)]
StepsOrRatio = Annotated[int | float, BeforeValidator(units.parse_steps_or_ratio)]


def _without_nulls(value: Any) -> Any:
    """A table loses the entries that an heir cleared with null."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else value


def _as_list(value: Any) -> Any:
    return [] if value is None else value if isinstance(value, list | tuple) else [value]


def _resume(value: Any) -> Any:
    """``true`` is another word for ``auto``, ``false`` for ``never``; all else is the path of a checkpoint."""
    words = {"true": "auto", "false": "never"}
    return words.get(str(value).lower() if isinstance(value, bool) else value, value)


Nulls = BeforeValidator(_without_nulls)
OneOrMore = BeforeValidator(_as_list)


class KeepSchedule(Section):
    """The kept share falls from ``from`` to the pruner's ``keep`` over the first ``over`` of the training."""

    start: Ratio = Field(default=1.0, alias="from")
    over: Ratio


class Prune(Method):
    schedule: KeepSchedule | None = None


class Language(Section):
    """The language model: an existing one (``hf``) or a new one from a Transformers config (``config``)."""

    use: Literal["hf", "config"]
    name: Str | None = None
    config: Annotated[Mapping[str, Any] | None, BeforeValidator(units.natural)] = None
    tokenizer: Str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        needed = "name" if self.use == "hf" else "config"
        if getattr(self, needed) is None:
            raise problem(f"uses '{self.use}' and so needs '{needed}'")
        return self


class Image(Section):
    """What an encoder sees of a picture: the whole, and with ``anyres`` up to ``max_tiles`` tiles of a large one.

    resize: how the whole becomes a square: ``stretch``, ``pad`` with the mean colour (as in LLaVA-1.5), or ``crop``.
    newline: a learned token ends every row of the tiles (LLaVA-NeXT); it trains with the connector.
    """

    resize: Literal["stretch", "pad", "crop"] = "stretch"
    tiling: Literal["none", "anyres"] = "none"
    max_tiles: AtLeastOne = 4
    newline: Bool = False

    @model_validator(mode="after")
    def _rows_of_tiles(self) -> Self:
        if self.newline and self.tiling == "none":
            raise problem("has newlines, which end rows of tiles, and so needs tiling: anyres")
        return self

    @property
    def tiles(self) -> int:
        """Tiles that a picture may be cut into, 0 without tiling."""
        return self.max_tiles if self.tiling == "anyres" else 0


class Pretrained(Section):
    """A whole vision-language model of Hugging Face: a hub name or a folder."""

    use: Literal["hf"]
    name: Str


class Model(Section):
    """Vision encoder, connector and language model; or all of them ``from`` one checkpoint, with its own processor and
    chat template.

    weights: what another run of a composed model has learned (its folder, or one checkpoint), which this one begins
    with.
    """

    origin: Pretrained | None = Field(default=None, alias="from")
    vision: Method | None = None
    connector: Method | None = None
    language: Language | None = None
    image: Image = Image()
    template: Str | None = None
    max_tokens: AtLeastOne | None = None
    weights: Str | None = None

    @model_validator(mode="before")
    @classmethod
    def _template(cls, data: Any) -> Any:
        """A composed model writes its turns ``plain`` unless told otherwise; a checkpoint brings a template."""
        composed = isinstance(data, Mapping) and data.get("from") is None and data.get("template") is None
        return {**data, "template": "plain"} if composed else data

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        parts = {"vision": self.vision, "connector": self.connector, "language": self.language}
        if self.origin is None:
            if missing := [role for role, part in parts.items() if part is None]:
                other = "a model has vision, connector and language, or is `from` a checkpoint"
                raise problem(f"is missing; {other}", missing[0])
            return self
        image = None if self.image == Image() else self.image
        own = {"template": self.template, "weights": self.weights, "image": image}
        for key, given in (parts | own).items():
            if given is not None:
                raise problem("stands beside model.from, which brings its own; set it to null or leave it out", key)
        return self


class Source(Section):
    shards: Annotated[tuple[Str, ...], OneOrMore, Field(min_length=1)]
    reader: Str = "chat-v1"


class BadSamples(Section):
    """How much bad data is survived: a share of all samples read, and so many in a row."""

    skip: Ratio = 0.001
    consecutive: AtLeastOne = 16


class Data(Section):
    make: Method | None = None
    workers: NotNegative = 1
    sources: Annotated[Mapping[Name, Source], Nulls] = {}
    on_bad_sample: BadSamples = BadSamples()


class Training(Section):
    """How one part of the model is trained in one stage: its weights, or with ``lora`` adapters of that rank."""

    lr: Positive
    weight_decay: Annotated[Float, Field(ge=0)] = 0.0
    lora: AtLeastOne | None = None
    alpha: Positive | None = None
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _adapters(self) -> Self:
        if self.lora is None and (self.alpha is not None or self.dropout):
            key = "dropout" if self.alpha is None else "alpha"
            raise problem("is of an adapter; give its rank with lora", key)
        return self

    @property
    def adapter(self) -> tuple[int, float, float] | None:
        """Rank, alpha (twice the rank unless given, as LLaVA has it) and dropout; None: the weights train."""
        return None if self.lora is None else (self.lora, self.alpha or 2.0 * self.lora, self.dropout)


class Schedule(Section):
    """The learning rate's course: ``warmup`` in steps or as a share, ``final`` as a share of the peak."""

    use: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: StepsOrRatio = 0
    final: Ratio = 0.0


class Pack(Section):
    """Samples share sequences of ``tokens`` tokens of the language model, visual ones counted as they are after
    pruning.

    The batch then counts packs. patches: of the vision encoder, in a pack at most. buffer: how many samples ahead a
    pack chooses from; age: after how many packs without it a sample goes first.
    """

    tokens: AtLeastOne
    patches: AtLeastOne | None = None
    buffer: AtLeastOne = 64
    age: AtLeastOne = 16


class Stage(Section):
    name: Name
    objective: Method = Method(use="chat")
    mix: Annotated[Mapping[str, Float], Nulls]
    train: Annotated[Mapping[Literal["vision", "connector", "language", "head"], Training], Nulls]
    steps: AtLeastOne | None = None
    samples: AtLeastOne | None = None
    tokens: AtLeastOne | None = None
    global_batch: AtLeastOne | None = None
    drop_image: Ratio = 0.0
    pack: Pack | None = None
    repeat: Annotated[Mapping[str, AtLeastOne] | None, Nulls] = None
    schedule: Schedule = Schedule()
    clip: Positive | None = 1.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)

    @model_validator(mode="before")
    @classmethod
    def _repeats(cls, data: Any) -> Any:
        """``repeat: {a: 3, b: 1}`` stands in place of a mix: one round reads a three times and b once."""
        if not isinstance(data, Mapping) or not isinstance(data.get("repeat"), Mapping):
            return data
        if data.get("mix") not in (None, data["repeat"]):
            raise problem("stands beside mix; give shares (mix) or how often each source is read (repeat)", "repeat")
        return {**data, "mix": data["repeat"]}

    @model_validator(mode="after")
    def _complete(self) -> Self:
        lengths = [key for key in ("steps", "samples", "tokens") if getattr(self, key) is not None]
        if len(lengths) > 1:
            raise problem(f"stands beside {lengths[0]}; give only one of steps, samples, tokens", lengths[1])
        if not lengths and self.repeat is None:
            raise problem("has no length; give one of steps, samples, tokens")
        if not self.train:
            raise problem("is empty, so nothing would train; name vision, connector or language", "train")
        if "head" in self.train and self.train["head"].lora is not None:
            raise problem("is for parts of the model; the objective's head trains its weights", "train", "head", "lora")
        if not self.mix:
            raise problem("is empty; give at least one source and its weight", "mix")
        for source, weight in self.mix.items():
            if weight <= 0:
                raise problem(f"must be a weight above 0, found {weight:g}", "mix", source)
        return self


class Comparison(Section):
    """One row of the evaluation: the model with this pruner, cache policy and mitigators; what is absent is off.

    decode: how this row chooses tokens, as ``evaluate.decode`` says where it is absent.
    """

    prune: Method | None = None
    kv: Method | None = None
    mitigate: Annotated[tuple[Method, ...], OneOrMore] = ()
    decode: Method | None = None
    label: Str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nothing is switched on."""
        return not (self.prune or self.kv or self.mitigate or self.decode)

    @property
    def title(self) -> str:
        """The label, or what is switched on, or ``plain``."""
        methods = [method for method in (self.prune, self.kv, *self.mitigate, self.decode) if method]
        return self.label or " + ".join(method.title for method in methods) or "plain"


class During(Section):
    """Benchmarks while training: ``limit`` questions of each, or of those named, every so many steps of a stage."""

    every: AtLeastOne
    limit: AtLeastOne = 64
    benchmarks: Annotated[tuple[Name, ...], OneOrMore] = ()


class Evaluate(Section):
    benchmarks: Annotated[Mapping[Name, Method], Nulls] = {}
    compare: tuple[Comparison, ...] = ()
    decode: Method | None = None
    batch: AtLeastOne = 64
    pictures: NotNegative = 6
    during: During | None = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        for number, label in enumerate(self.during.benchmarks if self.during else ()):
            if label not in self.benchmarks:
                raise problem(unknown(label, self.benchmarks), "during", "benchmarks", number)
        if self.during and not self.benchmarks:
            raise problem("asks benchmarks, but evaluate.benchmarks names none", "during")
        return self


class Save(Section):
    """A checkpoint every so many steps, of which the newest ``keep`` of a stage stay.

    background: write while training goes on, from a copy of weights and optimizer in the first rank's host memory.
    """

    every: AtLeastOne = 500
    keep: AtLeastOne = 3
    background: Bool = False


class Run(Section):
    """How and where it runs. Nothing here but ``global_batch`` and ``precision`` changes what is learned.

    weights: what another run of the same identity has learned (its folder, or one checkpoint) is evaluated into this
    run's own folder, and nothing is trained here.
    """

    dir: Str
    global_batch: AtLeastOne = 32
    micro_batch: AtLeastOne | None = None
    devices: AtLeastOne = 1
    nodes: AtLeastOne = 1
    parallel: Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "single"
    precision: Literal["fp32", "bf16"] = "fp32"
    save: Save = Save()
    resume: Annotated[Str, BeforeValidator(_resume)] = "auto"
    weights: Str | None = None
    trace_samples: Bool = False
    log_every: AtLeastOne = 10
    log: Annotated[tuple[Literal["tensorboard", "wandb"], ...], OneOrMore] = ()
    checkpoint_activations: Bool = False
    compile: Bool = False
    threads: AtLeastOne | None = None

    @property
    def world(self) -> int:
        """Devices of all nodes together."""
        return self.devices * self.nodes


class Recipe(Section):
    """A whole recipe: everything that determines a run. Without stages a model ``from`` a checkpoint is evaluated."""

    recipe: Annotated[Literal[1], BeforeValidator(units.parse_int)] = 1
    name: Name
    seed: NotNegative = 0
    model: Model
    prune: Prune | None = None
    kv: Method | None = None
    mitigate: Annotated[tuple[Method, ...], OneOrMore] = ()
    data: Data = Data()
    stages: tuple[Stage, ...] = ()
    evaluate: Evaluate = Evaluate()
    run: Run

    @model_validator(mode="before")
    @classmethod
    def _run_folder(cls, data: Any) -> Any:
        """``run.dir`` is ``runs/<name>`` unless given."""
        run = data.get("run") if isinstance(data, Mapping) else None
        if isinstance(data, Mapping) and "name" in data and isinstance(run, Mapping | None):
            run = run or {}
            return {**data, "run": run if run.get("dir") else {**run, "dir": f"runs/{data['name']}"}}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.stages and self.model.origin is None:
            given = "stages" in self.model_fields_set
            raise problem("is empty; give at least one" if given else "is missing", "stages")
        self._check_adapters()
        names: list[str] = []
        for index, stage in enumerate(self.stages):
            if stage.name in names:
                raise problem(f"is '{stage.name}', the name of an earlier stage", "stages", index, "name")
            names.append(stage.name)
            for source in stage.mix:
                if source not in self.data.sources:
                    raise problem(unknown(source, self.data.sources), "stages", index, "mix", source)
            _check_batch(self.run, self.run.global_batch if stage.global_batch is None else stage.global_batch)
        if self.run.parallel == "single" and self.run.world > 1:
            key = "devices" if self.run.devices > 1 else "nodes"
            raise problem(f"is single, but run.{key} is {self.run.world}; use ddp or fsdp2", "run", "parallel")
        return self

    def _check_adapters(self) -> None:
        """A part has one adapter, which every stage that trains it with lora goes on with."""
        first: dict[str, Stage] = {}
        for index, stage in enumerate(self.stages):
            for role, training in stage.train.items():
                if training.adapter is None:
                    continue
                before = first.setdefault(role, stage)
                if before.train[role].adapter != training.adapter:
                    message = f"is another adapter than that of stage {before.name}; lora, alpha and dropout must agree"
                    raise problem(message, "stages", index, "train", role, "lora")

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """The rows of the evaluation: those of ``evaluate.compare``, or the recipe's own methods."""
        return self.evaluate.compare or (self.own,)

    @property
    def own(self) -> Comparison:
        """What the recipe itself switches on, as a row of a comparison."""
        return Comparison(prune=self.prune, kv=self.kv, mitigate=self.mitigate)

    def methods(self) -> Iterator[tuple[str, Method]]:
        """Every method that the recipe names, with its kind (see ``vlm.create``)."""
        yield from (("vision", vision) for vision in [self.model.vision] if vision)
        yield from (("connector", connector) for connector in [self.model.connector] if connector)
        yield from (("objective", stage.objective) for stage in self.stages)
        yield from (("make", make) for make in [self.data.make] if make)
        yield from (("benchmark", method) for method in self.evaluate.benchmarks.values())
        yield from (("decode", decode) for decode in [self.evaluate.decode] if decode)
        for row in [self, *self.evaluate.compare]:
            yield from (("prune", prune) for prune in [row.prune] if prune)
            yield from (("kv", kv) for kv in [row.kv] if kv)
            yield from (("mitigate", mitigate) for mitigate in row.mitigate)
        yield from (("decode", row.decode) for row in self.evaluate.compare if row.decode)

    def identity(self) -> dict[str, Any]:
        """What determines the trained weights, with JSON's types: no folder, no hardware, no logging, no evaluation.

        Two recipes with equal identity may continue each other's checkpoints.
        """
        whole = units.natural(self.plain())
        whole["run"] = {key: whole["run"][key] for key in ("global_batch", "precision")}
        del whole["data"]["workers"], whole["name"], whole["evaluate"]
        if self.model.weights is None:
            del whole["model"]["weights"]  # as in checkpoints from before there was such a key
        for stage in whole["stages"]:
            for key in [key for key in ("pack", "repeat") if stage[key] is None]:
                del stage[key]
        return whole

    def hash(self) -> str:
        """sha256 of the resolved recipe; order of keys, comments and spelling of shorthands do not matter."""
        return _digest(units.natural(self.plain()))

    def identity_hash(self) -> str:
        """sha256 of ``identity()``."""
        return _digest(self.identity())

    def to_yaml(self) -> str:
        """The resolved recipe, defaults included, as a file that loads to an equal recipe."""
        return dump(self.plain())


def _check_batch(run: Run, global_batch: int) -> None:
    if global_batch % run.world:
        legal = ", ".join(map(str, _divisors(global_batch)))
        found = f"{run.devices}" if run.nodes == 1 else f"{run.devices} on each of {run.nodes} nodes"
        message = f"is {found}, which does not divide global_batch {global_batch}; legal in all: {legal}"
        raise problem(message if run.nodes > 1 else message.replace(" in all", ""), "run", "devices")
    share = global_batch // run.world
    if run.micro_batch and share % run.micro_batch:
        legal = ", ".join(map(str, _divisors(share)))
        message = f"is {run.micro_batch}, which does not divide global_batch / devices = {share}; legal: {legal}"
        raise problem(message, "run", "micro_batch")


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _digest(plain: dict[str, Any]) -> str:
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
