"""Training the demo classifiers: the same weights from the same seed, and a tokenizer that loses nothing."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from synapse.demo.http_requests import generate
from synapse.demo.train import MAX_TOKENS, RECIPES, main, request_tokenizer, train_healthcare


def weights_after(folder, *, seed):
    train_healthcare(folder, replace(RECIPES["healthcare"], epochs=1, seed=seed))
    return load_file(folder / "model.safetensors")


def test_training_twice_from_a_seed_gives_the_same_weights_to_the_last_bit(tmp_path):
    first, again, other = (weights_after(tmp_path / n, seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_training_leaves_the_random_numbers_of_the_caller_alone(tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    weights_after(tmp_path, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_tokenizer_keeps_percent_codes_whole_and_knows_every_text():
    requests = [r.text for r in generate("train", per_label=200)]
    tokenizer = request_tokenizer(requests)

    tokens = tokenizer.tokenize("GET /a?q=%27%2527 or\u00e9")

    assert [token for token in tokens if "%" in token] == ["%27", "%2527"]
    assert tokenizer.unk_token_id not in tokenizer("\u00e9\u4e2d\x00 %").input_ids
    for text in (r.text for r in generate("test", per_label=20)):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text.lower()


def test_nearly_all_requests_fit_into_the_model():
    requests = [r.text for r in generate("train", per_label=200)]
    lengths = [len(ids) for ids in request_tokenizer(requests)(requests).input_ids]
    assert sum(n > MAX_TOKENS for n in lengths) < 0.01 * len(lengths)


def test_an_unknown_domain_is_refused_on_the_command_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--only", "finance"])
    assert "invalid choice: 'finance'" in capsys.readouterr().err
