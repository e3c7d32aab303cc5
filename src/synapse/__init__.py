"""Look inside a Transformer classifier: which neurons carry its decisions, and how little redirects it.

```python
import synapse as syn

classifier = syn.Classifier.from_pretrained("path/or/hub-id")
train, test = syn.read_examples("train.csv"), syn.read_examples("test.csv")
activations = syn.record(classifier, train)
probes = syn.fit_probes(activations)
ranking = syn.rank(activations, probes=probes, method="cumulative-mass")
with classifier.edited(syn.Zero(ranking.top(0.10, layer=4), scope="all")):
    logits = classifier.predict(test)
```

Names are loaded when they are first used, so that `import synapse` is quick. The stages' modules are called recording,
ranking and sweeping, so that `record`, `rank` and `sweep` stay the names of their functions.
"""

from importlib import import_module
from typing import Any

# public name -> module that defines it
_HOMES = {
    "Classifier": "synapse.model.classifier",
    "Examples": "synapse.data.examples",
    "read_examples": "synapse.data.reading",
    "split_examples": "synapse.data.examples",
    "record": "synapse.recording",
    "record_untrained": "synapse.recording",
    "save_safetensors": "synapse.exchange.tensors",
    "load_safetensors": "synapse.exchange.tensors",
    "save_parquet": "synapse.exchange.tables",
    "to_torch": "synapse.exchange.views",
    "to_xarray": "synapse.exchange.views",
    "read_neurox": "synapse.exchange.neurox",
    "fit_probes": "synapse.probe.probe",
    "fit_joint_probes": "synapse.probe.probe",
    "refit_on": "synapse.probe.controls",
    "compare_with_control": "synapse.probe.controls",
    "description_length": "synapse.probe.description",
    "learning_curve": "synapse.probe.description",
    "rank": "synapse.ranking",
    "rank_stability": "synapse.ranking.bootstrap",
    "Ranking": "synapse.ranking",
    "Neurons": "synapse.types",
    "Intervention": "synapse.perturb.base",
    "intervention_from_dict": "synapse.perturb.base",
    **dict.fromkeys(
        (
            *("Zero", "Mean", "ClassMean", "Resample", "Noise", "Scale", "SignFlip"),
            *("Clamp", "Quantise", "Steer", "Patch", "Rotate", "Permute"),
        ),
        "synapse.perturb.activations",
    ),
    "LogitShift": "synapse.perturb.logits",
    "HeadEdit": "synapse.perturb.weights",
    "HeadEdits": "synapse.attack.edits",
    "fit_head_edits": "synapse.attack.edits",
    "WeightNoise": "synapse.perturb.weights",
    "Pruning": "synapse.perturb.weights",
    "RandomFlips": "synapse.perturb.random_bits",
    **dict.fromkeys(("RayExecutor", "SerialExecutor"), "synapse.execute"),
    "sweep": "synapse.sweeping",
    "Grid": "synapse.sweeping",
    "plan": "synapse.sweeping",
    "cumulative": "synapse.sweeping",
    "Cell": "synapse.sweeping",
    "Kind": "synapse.sweeping",
    "what_if": "synapse.whatif",
    "measure": "synapse.measure",
    "run_study": "synapse.study",
    "forecast": "synapse.forecasting",
    "make_settings": "synapse.settings",
    "summary_lines": "synapse.report.findings",
    "SynapseError": "synapse.errors",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'synapse' has no attribute {name!r}")
    home = import_module(_HOMES[name])
    value = home if name == "measure" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
