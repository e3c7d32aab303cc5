"""The settings of a study: a file (`study.yaml`), command-line options or keyword arguments, checked at the door."""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from synapse.attack.families import FAMILIES
from synapse.attack.noise import DRAWS
from synapse.data.tables import is_elsewhere
from synapse.elsewhere import only_here, place_of
from synapse.errors import SettingsError, near
from synapse.execute import Executor, RayExecutor, SerialExecutor
from synapse.ranking import METHODS
from synapse.sweeping import AUTOCAST, ENGINES, FRACTIONS, KINDS, Grid, Kind
from synapse.types import COMPONENTS, SWEPT_SCOPES, Component, Readout, Scope

Amount = int | Literal["all"]


class Settings(pydantic.BaseModel):
    """Everything that a study can be told; the defaults end in minutes on two cores.

    `synapse run study.yaml` reads the same names from a file.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    model: str = pydantic.Field("", description="folder or hub id of a classifier of texts, images or sounds")
    train: Path | str | None = pydantic.Field(
        None, description="labelled examples that probes and rankings are fitted on: a file, a URL, dataset:NAME:SPLIT"
    )
    test: Path | str | None = pydantic.Field(None, description="labelled examples that everything is measured on")
    text: str | None = pydantic.Field(None, description="column of the texts ('text', unless another kind is named)")
    pair: str | None = pydantic.Field(None, description="column of the second text, where inputs are pairs")
    file: str | None = pydantic.Field(None, description="column of the paths of images or of sounds (wav)")
    signal: str | None = pydantic.Field(
        None, description="columns of numbers: a pattern such as t*, or names with commas"
    )
    ids: str | None = pydantic.Field(None, description="column of token ids")
    label: str = pydantic.Field("label", description="column of the labels")
    labels: tuple[str, ...] | None = pydantic.Field(None, description="class names in the order of the logits")
    max_length: int | None = pydantic.Field(None, ge=2, description="cut texts at this many tokens")
    dtype: Literal["float32", "auto"] = pydantic.Field("float32", description="run in float32, or as the weights are")
    trust_remote_code: bool = pydantic.Field(False, description="run code that comes with the model")
    blocks: str | tuple[str, ...] | None = pydantic.Field(
        None, description="the blocks' module names, or one pattern, where they are not found"
    )
    readout: Readout | None = pydantic.Field(None, description="the rows that the head reads, where not found")
    mlp: str | None = pydantic.Field(None, description="the down projection's name inside a block, where not found")
    attention: str | None = pydantic.Field(None, description="the output projection's name inside a block")
    final: str | None = pydantic.Field(None, description="the linear map that gives the logits, where not found")
    out: Path | str | None = pydantic.Field(
        None, description="run folder to make: a path, or the URL of a place that fsspec knows (s3://bucket/run)"
    )
    overwrite: bool = pydantic.Field(False, description="replace a run that is there")
    cache: Path | None = pydantic.Field(
        None, description="folder where recordings are kept and found again (none: in memory, for this study alone)"
    )
    device: str = pydantic.Field("auto", description="auto, cpu or cuda")
    seed: int = pydantic.Field(0, ge=0, description="seed of every random choice")
    threads: int | None = pydantic.Field(None, ge=1, description="CPU threads (default: all)")
    title: str | None = pydantic.Field(None, description="title of the report")

    executor: Literal["serial", "ray"] = pydantic.Field(
        "serial", description="who runs what takes long: this process, or workers on a Ray cluster"
    )
    workers: int | None = pydantic.Field(None, ge=1, description="Ray: workers at a time (default: one a CPU core)")
    address: str | None = pydantic.Field(
        None, description="Ray: the cluster to join, 'auto' or host:port (default: one on this machine)"
    )
    cpus_per_worker: float = pydantic.Field(1.0, ge=0, description="Ray: CPUs set aside for a worker")
    gpus_per_worker: float = pydantic.Field(0.0, ge=0, description="Ray: GPUs set aside for a worker, fractions too")
    threads_per_worker: int = pydantic.Field(1, ge=1, description="Ray: CPU threads of a worker")
    worker_logs: Path | None = pydantic.Field(
        None, description="Ray: folder for one log file a worker, which all machines share"
    )

    train_examples: Amount = pydantic.Field(2000, description="training examples used, a stratified sample, or 'all'")
    examples: Amount = pydantic.Field(64, description="test examples in the sweep, a stratified sample, or 'all'")
    methods: tuple[str, ...] = pydantic.Field(
        ("cumulative-mass", "linear", "probeless", "random"),
        description="ranking methods; the first is swept in full, the others to judge them beside it",
    )
    rank_draws: int = pydantic.Field(
        100, ge=0, description="draws of the training examples that the first method ranks again; 0: none"
    )
    sites: tuple[Component, ...] = pydantic.Field(
        ("residual",), description="components of the layers that are studied; the report begins with the first"
    )
    scopes: tuple[Scope, ...] = pydantic.Field(SWEPT_SCOPES, description="rows on which interventions act")
    fractions: tuple[float, ...] = pydantic.Field(
        FRACTIONS, description="shares of the width that are edited; 100 % always is"
    )
    kinds: tuple[str, ...] = pydantic.Field(
        tuple(kind.name for kind in KINDS),
        description="interventions; the first is swept over the whole grid",
    )
    scale: float = pydantic.Field(0.5, description="factor of the scale intervention")
    noise: float = pydantic.Field(1.0, gt=0, description="noise, in deviations of the neuron")
    random_sets: int = pydantic.Field(10, ge=10, description="random sets of every size")
    random_sets_per_example: int = pydantic.Field(1, ge=1, description="how many of them each example meets")
    engine: str = pydantic.Field("auto", description=f"how cells are run: {', '.join(ENGINES)}")
    precision: float | None = pydantic.Field(
        None, gt=0, le=0.5, description="stop a cell when its change of accuracy is known to so much (0.005)"
    )
    autocast: str | None = pydantic.Field(None, description="run the sweep in reduced precision: bf16 or fp16")
    attacks: tuple[str, ...] = pydantic.Field(
        ("logits", "head", "weight-noise"), description=f"families of attacks: {', '.join(FAMILIES)}"
    )
    attack_examples: Amount = pydantic.Field(
        32, description="examples of the sweep on which attacks run the model: weight noise, activations"
    )
    noise_draws: int = pydantic.Field(DRAWS, ge=2, description="draws of weight noise of every size")

    @pydantic.field_validator("out", mode="before")
    @classmethod
    def _here_or_elsewhere(cls, out: object) -> object:
        return place_of(out) if isinstance(out, (Path, str)) else out

    @pydantic.field_validator("train_examples", "examples", "attack_examples")
    @classmethod
    def _positive(cls, amount: Amount) -> Amount:
        if amount != "all" and amount < 2:
            raise ValueError("2 or more examples, or 'all', are needed")
        return amount

    @pydantic.field_validator("methods")
    @classmethod
    def _known_methods(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        known = _known(methods, tuple(METHODS), "ranking method")
        if known[0] == "random":
            raise ValueError("the first method is the one that is swept, and random sets are swept beside it anyway")
        return known

    @pydantic.field_validator("rank_draws")
    @classmethod
    def _comparable_draws(cls, draws: int) -> int:
        if draws == 1:
            raise ValueError("two or more rankings can be compared, or 0 to draw none")
        return draws

    @pydantic.field_validator("sites", mode="before")
    @classmethod
    def _known_sites(cls, sites: object) -> object:
        if isinstance(sites, (tuple, list)):
            return _known(tuple(str(site) for site in sites), COMPONENTS, "site")
        return sites

    @pydantic.field_validator("cache", mode="before")
    @classmethod
    def _off_is_none(cls, cache: object) -> object:
        if cache in ("off", False):  # YAML reads `off` as false
            return None
        return only_here(cache, "recordings") if isinstance(cache, (Path, str)) else cache

    @pydantic.field_validator("attacks")
    @classmethod
    def _known_attacks(cls, attacks: tuple[str, ...]) -> tuple[str, ...]:
        return _known(attacks, tuple(FAMILIES), "family of attacks")

    @pydantic.field_validator("engine")
    @classmethod
    def _known_engine(cls, engine: str) -> str:
        return _known((engine,), tuple(ENGINES), "engine")[0]

    @pydantic.field_validator("autocast")
    @classmethod
    def _known_precision(cls, autocast: str | None) -> str | None:
        return None if autocast is None else _known((autocast,), tuple(AUTOCAST), "reduced precision")[0]

    @pydantic.field_validator("kinds")
    @classmethod
    def _known_kinds(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        known = _known(kinds, tuple(kind.name for kind in KINDS), "intervention")
        if known[0] != "zero":
            raise ValueError("zero must come first: headroom and all that is measured against it are made with it")
        return known

    def columns(self) -> dict[str, str | None]:
        """Return the columns that `read_examples` is told of."""
        kinds = ("text", "pair", "file", "signal", "ids")
        return {"label": self.label, **{kind: getattr(self, kind) for kind in kinds}}

    def findings(self) -> dict[str, Any]:
        """Return what is said by hand about the model's anatomy."""
        return {name: getattr(self, name) for name in ("blocks", "readout", "mlp", "attention", "final")}

    @property
    def rivals(self) -> tuple[str, ...]:
        """The methods that are swept beside the first one; random sets are swept anyway."""
        return tuple(method for method in self.methods[1:] if method != "random")

    def opened_executor(self) -> AbstractContextManager[Executor]:
        """Return a context that gives the executor of the study.

        Raises:
            SettingsError: a cluster is named, and not how many of its workers to use.
        """
        if self.executor == "serial":
            return SerialExecutor()
        if self.workers is None and self.address is not None:
            raise SettingsError(
                f"The cluster at {self.address!r} was named, and not how many workers to start there; give --workers."
            )
        return RayExecutor(
            self.workers or max(1, (os.cpu_count() or 1) // self.threads_per_worker),
            address=self.address,
            cpus_per_worker=self.cpus_per_worker,
            gpus_per_worker=self.gpus_per_worker,
            threads_per_worker=self.threads_per_worker,
            logs=self.worker_logs,
        )

    def grid(self) -> Grid:
        """Return the sweep's grid."""
        strength = {"scale": self.scale, "noise": self.noise}
        kinds = tuple(Kind(name, strength.get(name, float("nan"))) for name in self.kinds)
        return Grid(
            scopes=self.scopes,
            fractions=self.fractions,
            kinds=kinds,
            random_sets=self.random_sets,
            random_sets_per_example=self.random_sets_per_example,
        )


def make_settings(**values: object) -> Settings:
    """Return checked settings.

    Raises:
        SettingsError: an unknown name or a value that cannot be; the first problem, in one sentence.
    """
    try:
        return Settings(**values)  # type: ignore[arg-type]
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"][:1]) or "settings"
        if problem["type"] == "extra_forbidden":
            known = Settings.model_fields
            raise SettingsError(f"There is no setting {name!r}.{near(name, known)}") from error
        reason = problem["msg"].removeprefix("Value error, ")
        end = "?" if reason.endswith("?") else "."
        raise SettingsError(f"The setting {name!r} is {problem['input']!r}: {reason.rstrip('.?')}{end}") from error


def read_settings(path: Path) -> dict[str, object]:
    """Return the settings in a study file; paths in it are relative to the file, but for those of other machines.

    Raises:
        SettingsError: no such file, no YAML, or no list of names and values.
    """
    if not path.is_file():
        raise SettingsError(f"There is no study file {str(path)!r}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{str(path)!r} is no readable YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{str(path)!r} holds no settings; lines such as 'model: path/to/model' were expected.")
    for name in ("train", "test", "out", "cache"):
        if values.get(name) not in (None, "off", False) and not is_elsewhere(str(values[name])):
            values[name] = path.parent / str(values[name])
    model = values.get("model")
    if model is not None and (path.parent / str(model)).is_dir():
        values["model"] = str(path.parent / str(model))
    return {str(name): value for name, value in values.items()}


def _known(names: tuple[str, ...], known: tuple[str, ...], what: str) -> tuple[str, ...]:
    if not names or len(set(names)) < len(names):
        raise ValueError(f"one or more different {what}s are needed")
    for name in names:
        if name not in known:
            raise ValueError(f"there is no {what} {name!r}; there are {', '.join(known)}.{near(name, known)}")
    return names
