"""The workloads of the attack benchmark: what is attacked, by whom, and when answers agree."""

from functools import partial

import numpy as np
import torch
from peers.attack_tasks import BitTask, EditTask, PairTask
from probe_workloads import Workload
from workloads import Place, minilm

from synapse.perturb.bits import Format, StoredWeight, bit_positions
from synapse.types import Activations

EACH_BIT = 4
"""Flips of every bit that are asked for: few, as in a search, since each is then tried."""

LONGER = 0.25
"""How much longer than the shortest a side's edits may be, on average, to count as an answer to the same question."""

UNCHANGED = 0.1
"""Share of predictions that a side may fail to change: DeepFool need not end on every state within its steps."""

LABELS_OF_PAIRS = ("one", "two", "three", "four", "five", "six")


def bits(number_format: Format, quick: bool) -> BitTask:
    """Return all matrices of MiniLM, and the gradient of its own answers' cross-entropy on a few examples."""
    setting = minilm(Place(quick=quick), 4 if quick else 16)
    module, classifier = setting.classifier.module, setting.classifier
    weights = [weight for weight in module.parameters() if weight.ndim >= 2]
    total = [torch.zeros_like(weight) for weight in weights]
    for batch in classifier.batches(setting.examples.inputs):
        logits = module(**batch.inputs).logits
        loss = torch.nn.functional.cross_entropy(logits, logits.argmax(dim=1), reduction="sum")
        for so_far, part in zip(total, torch.autograd.grad(loss, weights), strict=True):
            so_far.add_(part)
    stored = tuple(StoredWeight.of(weight, number_format) for weight in weights)
    words = f"the {EACH_BIT} best of each bit of all matrices, stored in {number_format}; {setting.description}"
    return BitTask(words, stored, tuple(total), bit_positions(number_format), EACH_BIT)


def pairs(quick: bool) -> PairTask:
    """Return seeded features of six classes, and a head that was fitted to them by least squares."""
    width, n_train, n_test = (32, 300, 150) if quick else (384, 2000, 1000)
    random, n_labels = np.random.default_rng(0), len(LABELS_OF_PAIRS)
    # A few directions carry most of the spread, as in the states of a fine-tuned encoder.
    spread = 3 / np.sqrt(np.arange(1, width + 1))
    centres = (1.0 if quick else 0.2) * random.normal(size=(n_labels, width)) * spread
    targets = np.arange(n_train + n_test) % n_labels
    features = (centres[targets] + random.normal(size=(len(targets), width)) * spread).astype(np.float32)
    aim = 10 * (np.eye(n_labels)[targets[:n_train]] - 1 / n_labels)
    weight = np.linalg.lstsq(features[:n_train], aim, rcond=1e-3)[0].T.astype(np.float32)
    logits = features @ weight.T
    train, test = (
        Activations(features[None, part], logits[part], targets[part], LABELS_OF_PAIRS, name, features=features[part])
        for name, part in (("fitting", slice(n_train)), ("scoring", slice(n_train, None)))
    )
    n_pairs = n_labels * (n_labels - 1)
    words = f"{n_pairs} ordered pairs of 6 synthetic classes, shares 0.5 and 0.95; {width} features"
    return PairTask(f"{words}, fitted on {n_train} examples and judged on {n_test}", train, test, weight)


def edits(quick: bool) -> EditTask:
    """Return a block in the middle of MiniLM."""
    setting = minilm(Place(quick=quick), 8 if quick else 16)
    classifier = setting.classifier
    layer = classifier.n_layers // 2 - 1
    batches = tuple(
        (np.asarray(batch.index), dict(batch.inputs)) for batch in classifier.batches(setting.examples.inputs)
    )
    words = f"[CLS] behind block {layer}; {setting.description}"
    block = classifier.blocks[layer]
    return EditTask(words, classifier, setting.examples, layer, block, batches, classifier.width)


WORKLOADS = {
    workload.name: workload
    for workload in (
        *(
            Workload(
                f"attack-bits-scoring{suffix}",
                partial(bits, number_format),
                "peers.ours_attack:BitScoring",
                ("plain torch",),
                "of a promise, relative",
                1e-4,
                number_format,
            )
            for suffix, number_format in (("", "float32"), ("-int8", "int8"))
        ),
        Workload(
            "attack-head-pairs",
            pairs,
            "peers.ours_attack:HeadPairs",
            ("scipy SLSQP", "scipy L-BFGS-B, dual"),
            "longer than the shortest edits, relative",
            LONGER,
        ),
        Workload(
            "attack-activation-edges",
            edits,
            "peers.ours_attack:SmallestEdits",
            ("DeepFool, plain torch",),
            "of predictions unchanged",
            UNCHANGED,
            "float32",
        ),
    )
}
