"""NeuroX: `extract_representations`, which reads a file of texts and writes a file of activations."""

import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

from neurox.data.extraction import transformers_extractor as neurox

from peers.record_tasks import Recording, RecordSide, RecordTask


class NeuroxExtract(RecordSide):
    """It runs one text at a time and writes the states of the last piece of every word, of all layers.

    It takes [CLS] out, so there is nothing to compare. The model is loaded beforehand; what it prints is thrown away.
    """

    name: ClassVar[str] = "NeuroX"
    package: ClassVar[str] = "neurox"
    output = "hdf5"

    def __init__(self, task: RecordTask) -> None:
        super().__init__(task)
        self.saved = task.folder.parent / "neurox-model"
        task.module.save_pretrained(self.saved)
        task.tokenizer.save_pretrained(self.saved)
        self.loaded: Any = None

    @property
    def setting(self) -> str:
        """What it writes."""
        return f"one text at a time, as {self.output.upper()}"

    def prepare(self, task: RecordTask) -> None:
        """Load the model, and warm up."""
        self.loaded = neurox.get_model_and_tokenizer(str(self.saved))
        super().prepare(task)

    def run(self, task: RecordTask) -> Recording:
        """Return nothing that could be compared."""
        folder = task.new_folder()
        corpus, found = folder / "texts.txt", folder / f"states.{self.output}"
        corpus.write_text("".join(" ".join(text.split()) + "\n" for text in task.examples.inputs))
        loaded = self.loaded or neurox.get_model_and_tokenizer(str(self.saved))
        with (
            mock.patch.object(neurox, "get_model_and_tokenizer", return_value=loaded),
            Path(os.devnull).open("w") as nowhere,
            redirect_stdout(nowhere),
        ):
            neurox.extract_representations(str(self.saved), str(corpus), str(found), output_type=self.output)
        return Recording()


class NeuroxJson(NeuroxExtract):
    """The same, as JSON: its default."""

    name: ClassVar[str] = "NeuroX, JSON"
    output = "json"
