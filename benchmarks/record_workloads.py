"""The workloads of the recording benchmark: a classifier of texts, and how many texts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from peers.record_tasks import RecordTask
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from workloads import BERT_BASE, LABELS, Place, Setting, encoder, minilm

import synapse as syn

PEERS = ("bare forward", "pipeline", "nnsight", "captum", "NeuroX", "NeuroX, JSON")

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Workload:
    """A classifier and the number of texts, in full and with `--quick`.

    With `growth` peak memory is measured on that many times as many texts too.
    """

    name: str
    setting: Callable[[Place, int], Setting]
    examples: tuple[int, int]
    peers: tuple[str, ...] = PEERS
    growth: int = 1

    def build(self, folder: Path, *, quick: bool) -> RecordTask:
        """Return the largest task there is: all texts that are recorded in any run."""
        n = self.growth * self.examples[1 if quick else 0]
        setting = with_texts(self.setting(Place(quick=quick), n))
        classifier = setting.classifier
        if classifier.anatomy.readout != "first":
            raise ValueError(f"The benchmark compares row 0; this head reads {classifier.anatomy.readout!r}.")
        return RecordTask(
            setting.description,
            classifier.module,
            classifier,
            setting.examples,
            classifier.preprocess.tokenizer,
            buckets_of(classifier, setting.examples),
            folder,
        )

    def first(self, task: RecordTask) -> RecordTask:
        """Return the task that is timed: every `growth`-th text, with the reference of its states."""
        examples = task.examples.take(np.arange(0, len(task.examples), self.growth))
        timed = replace(task, examples=examples, buckets=buckets_of(task.classifier, examples))
        return replace(timed, reference=timed.by_hooks())


def buckets_of(classifier: syn.Classifier, examples: syn.Examples) -> tuple[np.ndarray, ...]:
    """Return the positions of the texts that synapse runs together."""
    return tuple(np.asarray(batch.index) for batch in classifier.batches(examples.inputs))


def with_texts(setting: Setting) -> Setting:
    """Return a setting whose inputs are texts: token ids become words of a tokenizer that gives these ids again."""
    if isinstance(setting.examples.inputs[0], str):
        return setting
    module = setting.classifier.module
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), module.config.vocab_size))]
    classifier = syn.Classifier.from_module(module, preprocess=word_tokenizer(words), labels=LABELS)
    texts = tuple(" ".join(words[token] for token in ids) for ids in setting.examples.inputs)
    return Setting(classifier, syn.Examples(texts, setting.examples.labels, "benchmark"), setting.description)


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows these words, and puts [CLS] before a text and [SEP] behind it."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    framing = [(token, words.index(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=framing)
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **names)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("record-minilm", minilm, (1024, 96)),
        Workload("record-bert-base", partial(encoder, BERT_BASE), (256, 96)),
        Workload("record-memory", minilm, (4000, 100), peers=(), growth=10),
    )
}
