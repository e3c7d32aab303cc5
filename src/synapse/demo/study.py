"""Study the embedded domains one after the other."""

from pathlib import Path

from synapse.demo.domains import Domain, ModuleDomain, domains
from synapse.execute import Executor
from synapse.model.classifier import Classifier
from synapse.settings import Settings, make_settings
from synapse.study import StageProgress, run_study


def run_demo(out: Path, *, seed: int, progress: StageProgress, executor: Executor | None = None) -> list[Path]:
    """Study every embedded domain and return the run folders; runs of an earlier demo are replaced."""
    return [_run_domain(domain, out / domain.name, seed, progress, executor) for domain in domains()]


def load_domain(domain: Domain) -> Classifier:
    """Return the classifier of an embedded domain."""
    if isinstance(domain, ModuleDomain):
        return Classifier.from_module(
            domain.module(),
            preprocess=domain.preprocess,
            labels=domain.labels,
            sample=domain.examples("test").inputs[:4],
            name=domain.name,
        )
    return Classifier.from_pretrained(domain.folder)


def demo_settings(domain: Domain, *, seed: int) -> Settings:
    """Return the settings of a domain's study: the defaults."""
    return make_settings(title=f"{domain.title} ({domain.name})", seed=seed, overwrite=True)


def _run_domain(domain: Domain, out: Path, seed: int, progress: StageProgress, executor: Executor | None) -> Path:
    return run_study(
        load_domain(domain),
        domain.examples("train"),
        domain.examples("test"),
        settings=demo_settings(domain, seed=seed),
        out=out,
        executor=executor,
        progress=lambda stage, done, total: progress(f"{domain.name}: {stage}", done, total),
        command="synapse demo",
    )
