"""What runs a stage's work: this process, its threads, or workers on a cluster behind the same `Executor.map`.

```python
with RayExecutor(workers=4) as executor:
    for outcome in executor.map(logits_of, batches, shared=recipe):
        ...
```
"""

from synapse.execute.base import Counts, Done, Executor, Failed, Recipe, unreported
from synapse.execute.ray import RayExecutor
from synapse.execute.serial import SerialExecutor, ThreadExecutor, for_models

__all__ = [
    "Counts",
    "Done",
    "Executor",
    "Failed",
    "RayExecutor",
    "Recipe",
    "SerialExecutor",
    "ThreadExecutor",
    "for_models",
    "unreported",
]
