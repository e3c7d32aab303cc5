"""What is recorded, in memory and into a folder: compared with plain hooks and numpy."""

import numpy as np
import pytest
import torch
from planted import (
    LABELS,
    PlantedClassifier,
    hidden_classifier,
    planted_classifier,
    planted_examples,
    random_classifier,
    random_examples,
)
from recorder import counted_calls, small_windows

from synapse.data.examples import Examples
from synapse.errors import ModelError, ResourceError, RunFolderError, SettingsError
from synapse.model.classifier import Classifier
from synapse.recording import record, record_components


@pytest.fixture(autouse=True)
def windows_of_a_few(monkeypatch):
    small_windows(monkeypatch)


class MeanClassifier(PlantedClassifier):
    """The planted model, whose head reads the mean of the rows."""

    def forward(self, ids):
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean(dim=1))


def mean_classifier():
    module = MeanClassifier().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    return Classifier.from_module(
        module,
        preprocess=lambda ids: {"ids": torch.as_tensor(np.asarray(ids))},
        labels=LABELS,
        sample=planted_examples(4, seed=99).inputs,
    )


SUBJECTS = {
    "bert, first": (lambda: random_classifier("bert"), random_examples),
    "distilbert, first": (lambda: random_classifier("distilbert"), random_examples),
    "deberta, first": (lambda: random_classifier("deberta"), random_examples),
    "gpt2, last": (lambda: random_classifier("gpt2"), random_examples),
    "planted, first": (planted_classifier, planted_examples),
    "planted, mean": (mean_classifier, planted_examples),
}


@pytest.fixture(params=SUBJECTS)
def subject(request):
    """A classifier and its examples: more than three windows, the last of them smaller."""
    make, examples = SUBJECTS[request.param]
    return make(), examples(29, seed=4)


def states_of_blocks(classifier, one):
    """Return what the blocks return for one input, alone: an array (token, unit) a block."""
    found = []
    handles = [
        block.register_forward_hook(
            lambda _module, _given, output: found.append((output[0] if isinstance(output, tuple) else output)[0])
        )
        for block in classifier.blocks
    ]
    with torch.no_grad():
        classifier.module(**classifier.preprocess(one))
    for handle in handles:
        handle.remove()
    return [each.detach().numpy() for each in found]


def ones(examples):
    return [examples.inputs[i : i + 1] for i in range(len(examples))]


def assert_same(a, b, **tolerance):
    """Assert that two recordings hold the same; bitwise, unless a tolerance is given."""
    compare = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
    for name in ("values", "logits", "features", "row_mean", "row_deviation"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None), name
        if one is not None:
            compare(np.asarray(one), np.asarray(other), err_msg=name, **tolerance)
    np.testing.assert_array_equal(a.targets, b.targets)
    np.testing.assert_array_equal(a.class_moments.count, b.class_moments.count)
    compare(a.class_moments.mean, b.class_moments.mean, **tolerance)
    compare(a.class_moments.deviation, b.class_moments.deviation, **tolerance)
    known = ("labels", "source", "component", "reads_several_rows", "n_layers", "width")
    assert [getattr(a, name) for name in known] == [getattr(b, name) for name in known]


def test_states_are_those_that_plain_hooks_see(subject, tmp_path):
    classifier, examples = subject
    kept = record(classifier, examples, keep=tmp_path)
    readout = {"first": lambda rows: rows[0], "last": lambda rows: rows[-1], "mean": lambda rows: rows.mean(axis=0)}
    for i, one in enumerate(ones(examples)):
        for layer, rows in enumerate(states_of_blocks(classifier, one)):
            expected = readout[classifier.anatomy.readout](rows)
            np.testing.assert_allclose(kept.values[layer, i], expected, atol=2e-5, rtol=1e-5)
        with torch.no_grad():
            logits = classifier.module(**classifier.preprocess(one))
        logits = getattr(logits, "logits", logits)
        np.testing.assert_allclose(kept.logits[i], logits[0], atol=1e-4, rtol=1e-5)


def test_features_are_what_the_final_map_reads(subject, tmp_path):
    classifier, examples = subject
    kept, final = record(classifier, examples, keep=tmp_path), classifier.final
    bias = 0 if final.bias is None else final.bias.detach().numpy()
    expected = np.asarray(kept.features) @ final.weight.detach().numpy().T + bias
    np.testing.assert_allclose(kept.logits, expected, atol=1e-4, rtol=1e-5)


def test_what_is_kept_is_bitwise_what_is_recorded_in_memory(subject, tmp_path):
    classifier, examples = subject
    components = list(classifier.anatomy.sites)
    memory = record_components(classifier, examples, components)
    kept = record_components(classifier, examples, components, keep=tmp_path)
    assert list(memory) == list(kept) == components
    for component in components:
        assert_same(memory[component], kept[component])
        assert isinstance(memory[component].values, np.ndarray)
        assert not isinstance(kept[component].values, np.ndarray)
        assert isinstance(kept[component].loaded().values, np.ndarray)


@pytest.mark.parametrize("component", ["mlp", "attention", "heads", "pooler"])
def test_one_component_is_recorded_as_it_is_among_several(component, tmp_path):
    classifier, examples = random_classifier("bert"), random_examples(20, seed=1)
    several = record_components(classifier, examples, ["residual", component])
    assert_same(record(classifier, examples, component=component, keep=tmp_path), several[component])


def test_a_component_that_is_named_twice_is_recorded_once(tmp_path):
    classifier, examples = random_classifier("bert"), random_examples(9, seed=1)
    assert list(record_components(classifier, examples, ["mlp", "mlp"], keep=tmp_path)) == ["mlp"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_states_are_rounded_as_torch_rounds_them_and_nothing_else_is(subject, tmp_path, dtype):
    classifier, examples = subject
    exact = record(classifier, examples)
    kept = record(classifier, examples, keep=tmp_path, dtype=dtype)
    expected = torch.from_numpy(exact.values).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(np.asarray(kept.values), expected)
    assert kept.values[0].dtype == np.float32
    assert not np.array_equal(expected, exact.values)
    for name in ("logits", "features", "row_mean", "row_deviation"):
        np.testing.assert_array_equal(np.asarray(getattr(kept, name)), getattr(exact, name))
    np.testing.assert_array_equal(kept.class_moments.squares, exact.class_moments.squares)


def test_moments_are_those_of_numpy_in_double_precision(subject, tmp_path):
    classifier, examples = subject
    kept = record(classifier, examples, keep=tmp_path)
    by_example = [states_of_blocks(classifier, one) for one in ones(examples)]
    targets = examples.targets(classifier.labels)
    for layer in range(kept.n_layers):
        rows = np.concatenate([states[layer] for states in by_example]).astype(np.float64)
        np.testing.assert_allclose(kept.row_mean[layer], rows.mean(axis=0), atol=2e-5, rtol=1e-5)
        np.testing.assert_allclose(kept.row_deviation[layer], rows.std(axis=0), atol=2e-5, rtol=1e-5)
        values = kept.values[layer].astype(np.float64)
        for label in range(len(LABELS)):
            mine = values[targets == label]
            assert kept.class_moments.count[layer, label] == len(mine)
            np.testing.assert_allclose(kept.class_moments.mean[layer, label], mine.mean(axis=0), rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(
                kept.class_moments.deviation[layer, label], mine.std(axis=0), rtol=1e-10, atol=1e-10
            )


def test_deviations_stand_where_the_mean_is_ten_thousand_times_as_large(tmp_path):
    classifier, examples = planted_classifier(), planted_examples(60, seed=5)
    with torch.no_grad():
        noise = torch.randn(classifier.module.embedding.weight.shape, generator=torch.Generator().manual_seed(1))
        classifier.module.embedding.weight.copy_(1e4 + noise)
    kept = record(classifier, examples, keep=tmp_path)
    by_example = [states_of_blocks(classifier, one) for one in ones(examples)]
    for layer in (0, 1):
        rows = np.concatenate([states[layer] for states in by_example]).astype(np.float64)
        np.testing.assert_allclose(kept.row_mean[layer], rows.mean(axis=0), rtol=3e-7)
        np.testing.assert_allclose(kept.row_deviation[layer], rows.std(axis=0), rtol=1e-5)
        values, targets = kept.values[layer].astype(np.float64), kept.targets
        for label in range(3):
            np.testing.assert_allclose(
                kept.class_moments.deviation[layer, label], values[targets == label].std(axis=0), rtol=1e-8
            )


@pytest.mark.parametrize("max_tokens", [1, 30, 10_000])
@pytest.mark.parametrize("most", [3, 1000])
def test_neither_batch_size_nor_window_nor_padding_moves_anything(subject, monkeypatch, tmp_path, max_tokens, most):
    classifier, examples = subject
    expected = record(classifier, examples)
    classifier.max_tokens = max_tokens
    small_windows(monkeypatch, most)
    assert_same(record(classifier, examples, keep=tmp_path), expected, atol=3e-5, rtol=1e-5)


def test_the_order_of_the_examples_moves_nothing_but_the_order(subject, tmp_path):
    classifier, examples = subject
    order = np.random.default_rng(1).permutation(len(examples))
    straight, mixed = record(classifier, examples), record(classifier, examples.take(order), keep=tmp_path)
    for name in ("values", "logits", "features"):
        one = np.asarray(getattr(straight, name))
        one = one[:, order] if name == "values" else one[order]
        np.testing.assert_allclose(np.asarray(getattr(mixed, name)), one, atol=3e-5, rtol=1e-5)
    np.testing.assert_array_equal(mixed.targets, straight.targets[order])
    np.testing.assert_allclose(mixed.row_deviation, straight.row_deviation, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(mixed.class_moments.mean, straight.class_moments.mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [0, 1, 8, 9])
def test_few_examples_and_none_are_recorded(n, tmp_path):
    classifier, examples = random_classifier("bert"), random_examples(n, seed=1)
    kept, memory = record(classifier, examples, keep=tmp_path), record(classifier, examples)
    assert_same(kept, memory)
    assert np.asarray(kept.values).shape == (3, n, 32)
    assert_same(record(classifier, examples, keep=tmp_path), memory)  # found again


def test_a_class_without_examples_has_no_moments(tmp_path):
    classifier, examples = random_classifier("bert"), random_examples(9, seed=1, labels=("a", "c"))
    moments = record(classifier, examples, keep=tmp_path).class_moments
    assert moments.count.tolist() == [[5, 0, 4]] * 3
    assert not moments.deviation[:, 1].any()


def hooks_of(module):
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return sum(len(getattr(part, name)) for part in module.modules() for name in names)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "deberta"])
@pytest.mark.parametrize("depth", [1, 2, None])
def test_without_logits_a_pass_ends_at_the_deepest_layer_that_is_wanted(architecture, depth, tmp_path):
    classifier, examples = random_classifier(architecture), random_examples(20, seed=1)
    whole = record(classifier, examples)
    with (
        counted_calls(classifier.blocks[0]) as first,
        counted_calls(classifier.blocks[1]) as second,
        counted_calls(classifier.blocks[2]) as third,
        counted_calls(classifier.final) as head,
    ):
        found = record(classifier, examples, depth=depth, logits=False)
    assert sum(first) == 20
    assert sum(second) == (0 if depth == 1 else 20)
    assert sum(third) == (20 if depth is None else 0)
    assert head == []
    assert found.n_layers == (depth or 3)
    np.testing.assert_array_equal(found.values, whole.values[:depth])
    np.testing.assert_array_equal(found.row_deviation, whole.row_deviation[:depth])
    assert (found.logits, found.features) == (None, None)
    assert_same(record(classifier, examples, depth=depth, logits=False, keep=tmp_path), found)


def test_the_other_components_end_the_pass_too():
    classifier, examples = random_classifier("bert"), random_examples(12, seed=1)
    down = classifier.module.get_submodule("bert.encoder.layer.0.output")
    with counted_calls(classifier.blocks[1]) as second, counted_calls(down) as after_hidden_units:
        record_components(classifier, examples, ["attention", "mlp"], depth=1, logits=False)
    assert (second, len(after_hidden_units)) == ([], len(after_hidden_units))
    with counted_calls(classifier.blocks[0]) as first:
        record(classifier, examples, component="pooler", logits=False)
    assert sum(first) == 12


def test_depth_with_logits_runs_the_whole_model():
    classifier, examples = random_classifier("bert"), random_examples(12, seed=1)
    found, whole = record(classifier, examples, depth=1), record(classifier, examples)
    np.testing.assert_array_equal(found.values, whole.values[:1])
    np.testing.assert_array_equal(found.logits, whole.logits)


def test_what_needs_logits_says_that_there_are_none():
    found = record(random_classifier("bert"), random_examples(6, seed=1), logits=False)
    with pytest.raises(SettingsError, match="no logits"):
        _ = found.predictions


@pytest.mark.parametrize("options", [{}, {"depth": 1, "logits": False}, {"logits": False}])
def test_the_model_comes_back_bitwise_and_no_hook_stays(subject, tmp_path, options):
    classifier, examples = subject
    before, predicted = classifier.weights_hash(), classifier.predict(examples)
    modes = [part.training for part in classifier.module.modules()]
    record(classifier, examples, keep=tmp_path, **options)
    assert classifier.weights_hash() == before
    np.testing.assert_array_equal(classifier.predict(examples), predicted)
    assert hooks_of(classifier.module) == 0
    assert [part.training for part in classifier.module.modules()] == modes
    assert all(parameter.grad is None for parameter in classifier.module.parameters())


@pytest.mark.parametrize("where", ["block", "preprocess"])
@pytest.mark.parametrize("keep", [True, False])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(monkeypatch, tmp_path, where, keep):
    classifier, examples = random_classifier("bert"), random_examples(29, seed=1)
    before, expected = classifier.weights_hash(), record(classifier, examples)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 6:
            raise ZeroDivisionError("on purpose")

    if where == "block":
        handle = classifier.blocks[1].register_forward_hook(fail)
        undo = handle.remove
    else:
        own = classifier.preprocess
        classifier.preprocess = lambda texts: (fail(), own(texts))[1]
        undo = lambda: setattr(classifier, "preprocess", own)  # noqa: E731
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        for _ in range(3):
            record(classifier, examples, keep=tmp_path if keep else None)
            (tmp_path / "again").mkdir(exist_ok=True)
            tmp_path = tmp_path / "again"
    undo()

    assert hooks_of(classifier.module) == 0
    assert classifier.weights_hash() == before
    assert_same(record(classifier, examples, keep=tmp_path if keep else None), expected)


def test_memory_that_runs_out_halves_the_batch_and_says_so(caplog, tmp_path):
    classifier, examples = random_classifier("bert"), random_examples(29, seed=1)
    expected = record(classifier, examples)

    def refuse(_module, _given, named):
        if len(named["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = classifier.module.register_forward_pre_hook(refuse, with_kwargs=True)
    memory, kept = record(classifier, examples), record(classifier, examples, keep=tmp_path)
    handle.remove()

    assert "Memory ran out with 8 examples in a pass; it goes on with half of them." in caplog.messages
    assert_same(kept, memory)
    assert_same(memory, expected, atol=1e-5, rtol=1e-5)


def test_memory_that_does_not_suffice_for_one_example_ends_it(tmp_path):
    classifier, examples = random_classifier("bert"), random_examples(9, seed=1)

    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = classifier.blocks[0].register_forward_pre_hook(refuse)
    with pytest.raises(ResourceError, match="Memory ran out with a single example"):
        record(classifier, examples)
    handle.remove()
    assert hooks_of(classifier.module) == 0


def test_the_first_example_that_is_not_finite_is_named_by_its_place_among_all(tmp_path):
    classifier, examples = planted_classifier(), planted_examples(29, seed=1)
    ids = np.where(examples.inputs == 10, 11, examples.inputs)
    ids[[13, 20], 5] = 10
    with torch.no_grad():
        classifier.module.embedding.weight[10] = torch.nan
    with pytest.raises(ModelError, match="for 1 examples, the first of them example 13;"):
        record(classifier, Examples(ids, examples.labels, "broken"), keep=tmp_path)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


def test_progress_counts_every_example_once_and_ends_at_all(tmp_path):
    classifier, examples = random_classifier("bert"), random_examples(29, seed=1)
    for keep in (None, tmp_path, tmp_path):  # the last finds what is there
        seen = []
        record(classifier, examples, keep=keep, progress=lambda *each, seen=seen: seen.append(each))
        assert [total for _, total in seen] == [29] * len(seen)
        assert [done for done, _ in seen] == sorted({done for done, _ in seen})
        assert seen[-1] == (29, 29)
    assert seen == [(29, 29)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "There is no type 'float8' to store; one of float32, float16, bfloat16. Did you mean"),
        (
            {"dtype": "float16"},
            "States are held in memory as float32; to store them as float16, give a folder: `keep=`.",
        ),
        ({"depth": 0}, "depth is 0; a number of layers from 1 to 3 was expected."),
        ({"depth": 4}, "depth is 4; a number of layers from 1 to 3 was expected."),
        ({"depth": -1}, "depth is -1; a number of layers from 1 to 3 was expected."),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(SettingsError) as caught:
        record(random_classifier("bert"), random_examples(6, seed=1), **options)
    assert str(caught.value).startswith(message)


def test_a_component_that_is_not_there_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(SettingsError, match="heads"):
        record(hidden_classifier(), planted_examples(6, seed=1), component="heads", keep=tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("below", "message"),
    [
        ("", "'{}' is a file; a folder for recordings was expected."),
        ("/x", "'{}' cannot be made (Not a directory); a folder for recordings was expected."),
    ],
)
def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path, below, message):
    (tmp_path / "file").write_text("mine")
    keep = str(tmp_path / "file") + below
    with pytest.raises(RunFolderError) as caught:
        record(random_classifier("bert"), random_examples(6, seed=1), keep=keep)
    assert str(caught.value) == message.format(keep)
    assert (tmp_path / "file").read_text() == "mine"
