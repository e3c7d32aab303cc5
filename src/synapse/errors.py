"""What can go wrong, sorted by whose fault it is.

```text
SynapseError
├── DataError            the examples: a file, a column, a row
│   ├── LabelError       labels that cannot be matched to the classifier's
│   └── SplitError       one split used where another one is needed
├── SettingsError        an option or a study file that asks for what cannot be done
├── ModelError           the classifier: no model there, no classification head
│   ├── AnatomyError     its blocks, readout row or head could not be found or proved
│   └── RestoreError     it did not come back as it was (never expected; nothing measured after it counts)
├── ResourceError        the machine or the cluster: memory or workers that cannot be had
├── ConvergenceError     a probe that did not reach its optimum
└── RunFolderError       a run folder that is missing, incomplete or of another format
```

Every message says what was seen, what was expected and what to do, in one or two sentences.
"""

import difflib
from collections.abc import Iterable


class SynapseError(Exception):
    """Base of all errors that SYNAPSE raises on purpose."""


class DataError(SynapseError):
    """The examples cannot be used as they are."""


class LabelError(DataError):
    """The labels of the examples do not match those of the classifier."""


class SplitError(DataError):
    """Neurons were to be measured on the examples that chose them, or the like."""


class SettingsError(SynapseError):
    """An option, an argument or a study file asks for something that cannot be done."""


class ModelError(SynapseError):
    """The model cannot be loaded or is no classifier."""


class AnatomyError(ModelError):
    """Blocks, readout row or head could not be found, or a finding failed its proof."""


class RestoreError(ModelError):
    """The model is not bit for bit what it was before."""


class ResourceError(SynapseError):
    """The machine has not enough memory for what was asked."""


class ConvergenceError(SynapseError):
    """A probe's solver stopped before its optimality certificate was met."""


class RunFolderError(SynapseError):
    """A run folder is missing, incomplete or written in a format that is not known."""


def near(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean ...?` for the names closest to `name`, or nothing if none is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
