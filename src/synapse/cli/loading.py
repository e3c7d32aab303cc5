"""What the settings of a study name, loaded."""

from typing import Any

import torch

from synapse.data.examples import Examples, split_examples
from synapse.data.reading import read_examples
from synapse.errors import SettingsError
from synapse.model.classifier import Classifier
from synapse.settings import Settings


def check_named(settings: Settings) -> None:
    """Refuse settings that name no model or no examples."""
    if not settings.model:
        raise SettingsError("No model is named; 'model: path/to/model' was expected in the study file.")
    if settings.train is None and settings.test is None:
        raise SettingsError("No examples are given; pass --train FILE and --test FILE (or one of them, to be split).")


def load_study(settings: Settings) -> tuple[Classifier, Examples, Examples]:
    """Return the classifier, the training examples and the test examples of a study.

    Raises:
        SettingsError: no model or no examples are named.
        LabelError: the examples' labels are not those of the classifier.
    """
    check_named(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    columns: dict[str, Any] = settings.columns()
    parts = [read_examples(file, **columns) for file in (settings.train, settings.test) if file is not None]
    train, test = parts if len(parts) == 2 else split_examples(parts[0], seed=settings.seed)
    classifier = Classifier.from_pretrained(
        settings.model,
        labels=settings.labels,
        device=settings.device,
        max_length=settings.max_length,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        **settings.findings(),
    )
    for part in (train, test):
        part.targets(classifier.labels)
    return classifier, train, test
