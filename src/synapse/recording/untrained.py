"""A classifier that has learned nothing: the control of what training put into a state."""

from copy import deepcopy
from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel

from synapse.errors import SettingsError
from synapse.model.classifier import Classifier


def untrained(classifier: Classifier, seed: int) -> Classifier:
    """Return the classifier with random weights, as `synapse.recording.record_untrained` says.

    Raises:
        SettingsError: a block holds quantised weights only, which cannot be drawn anew.
    """
    for name, block in zip(classifier.anatomy.blocks, classifier.blocks, strict=True):
        if not any(weight.ndim >= 2 and weight.is_floating_point() for weight in block.parameters()):
            raise SettingsError(
                f"The block {name!r} holds quantised weights, or none, so it cannot be given random ones; load the "
                "model as it was before quantisation."
            )
    fresh = Classifier(
        reinitialised(classifier.module, seed).to(classifier.device),
        classifier.preprocess,
        classifier.labels,
        classifier.anatomy,
        name=f"{classifier.name}, untrained",
        device=classifier.device,
        longest_sample=classifier.longest_sample,
        notes=classifier.notes,
    )
    fresh.max_tokens = classifier.max_tokens
    return fresh


def reinitialised(module: nn.Module, seed: int) -> nn.Module:
    """Return a copy of a module, on the CPU, with random weights, as `record_untrained` says."""
    fresh = deepcopy(module).cpu()
    for part in chain(fresh.modules(), fresh.parameters(), fresh.buffers()):
        # The model library marks what it has loaded, and leaves that alone.
        vars(part).pop("_is_hf_initialized", None)
    learned = dict(module.named_parameters())
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for part in _library_models(fresh):
            part.init_weights()
        for name, weight in fresh.named_parameters():
            if torch.equal(weight, learned[name].cpu()):
                weight.copy_(weight.flatten()[torch.randperm(weight.numel())].view_as(weight))
    return fresh


def _library_models(module: nn.Module) -> list[PreTrainedModel]:
    """Return the outermost models of the model library: each initialises all that is in it."""
    if isinstance(module, PreTrainedModel):
        return [module]
    return [model for child in module.children() for model in _library_models(child)]
