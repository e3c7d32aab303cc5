import inspect
import json
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from tiny_models import (
    SMALL,
    ast,
    bart,
    bert,
    gpt2,
    masked_sounds,
    module_of,
    small_images,
    spectra,
    t5,
    vit,
    wav2vec2,
    whisper,
    word_tokenizer,
)

from synapse.errors import ModelError, SettingsError
from synapse.model.pretrained import load_classifier

TEXTS = ["the cat sat", "a mat", "the cat sat on a mat and then it slept"]
SOUNDS = [np.random.default_rng(seed).normal(size=1600).astype(np.float32) for seed in range(2)]
IMAGES = [np.random.default_rng(seed).integers(0, 256, size=(20, 12, 3), dtype=np.uint8) for seed in range(2)]


@pytest.fixture(autouse=True)
def quiet_saving():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def seconds():
    return transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)


def saved(folder, *parts):
    for part in parts:
        part.save_pretrained(folder)
    return folder


def edit_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refused(model, **options):
    with pytest.raises(ModelError) as caught:
        load_classifier(model, **options)
    return str(caught.value)


# What is loaded


@pytest.mark.parametrize(
    ("module", "processor", "inputs", "options"),
    [
        (bert, word_tokenizer, TEXTS, {"padding": True}),
        (t5, word_tokenizer, TEXTS, {"padding": True}),
        (bart, word_tokenizer, TEXTS, {"padding": True}),
        (vit, small_images, IMAGES, {}),
        (wav2vec2, masked_sounds, SOUNDS, {"sampling_rate": 16000}),
        (ast, spectra, SOUNDS, {"sampling_rate": 16000}),
        (whisper, seconds, SOUNDS, {"sampling_rate": 16000}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_classifier_of_any_kind_gives_the_librarys_own_logits(tmp_path, module, processor, inputs, options):
    original = module()
    loaded = load_classifier(saved(tmp_path, original, processor()))
    made = processor()(inputs, return_tensors="pt", **options)
    taken = inspect.signature(original.forward).parameters  # some versions make segment ids for every model
    with torch.inference_mode():
        expected = original(**{name: value for name, value in made.items() if name in taken}).logits
        logits = loaded.module(**loaded.preprocess(inputs)).logits
        on_samples = loaded.module(**loaded.preprocess(loaded.preprocess.samples())).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert on_samples.isfinite().all()
    assert len(on_samples) >= 4
    assert loaded.labels == ("good", "bad", "ugly")
    assert type(loaded.module) is type(original)
    assert not loaded.module.training


def test_pairs_of_texts_give_the_librarys_own_logits(tmp_path):
    original, tokenizer = bert(), word_tokenizer()
    loaded = load_classifier(saved(tmp_path, original, tokenizer))
    first, second = ["the cat", "a mat"], ["sat on it", "and then the cat slept"]
    with torch.inference_mode():
        expected = original(**tokenizer(first, second, padding=True, return_tensors="pt")).logits
        logits = loaded.module(**loaded.preprocess(list(zip(first, second, strict=True)))).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_a_decoder_whose_tokenizer_cannot_pad_gives_the_librarys_logits_of_each_text_alone(tmp_path):
    original, tokenizer = gpt2(), word_tokenizer(framed=False, pad_token=None, eos_token="[SEP]")
    loaded = load_classifier(saved(tmp_path, original, tokenizer))
    with torch.inference_mode():
        alone = [original(**tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS]
        together = loaded.module(**loaded.preprocess(TEXTS)).logits
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-6)
    assert loaded.notes == (
        "the model's configuration names no padding token; '[SEP]' (3) is used",
        "the tokenizer has no padding token; its end token '[SEP]' is used",
        "long texts are cut at 32 tokens because the model has no more positions",
    )


def test_padding_ids_that_stand_for_none_are_replaced(tmp_path):
    folder = saved(tmp_path, gpt2(), word_tokenizer())
    edit_config(folder, pad_token_id=-1)
    loaded = load_classifier(folder)
    assert loaded.module.config.pad_token_id == 0
    assert loaded.notes[0] == "the model's configuration names token -1 as padding, which is none; '[PAD]' (0) is used"


def test_notes_say_what_was_done_and_nothing_else(tmp_path):
    loaded = load_classifier(saved(tmp_path, bert(), word_tokenizer(model_max_length=128)))
    assert loaded.notes == ("long texts are cut at 128 tokens because the tokenizer allows no more",)


def test_the_head_that_the_model_was_saved_with_is_the_one_that_is_loaded(tmp_path):
    original = module_of("DeiTForImageClassificationWithTeacher", image_size=8, patch_size=4, **SMALL)
    assert type(load_classifier(saved(tmp_path, original, small_images())).module) is type(original)


def test_weights_without_a_place_are_named(tmp_path):
    pretraining = bert("BertForPreTraining", architectures=None)
    classifier = bert()
    pretraining.classifier = classifier.classifier
    pretraining.save_pretrained(tmp_path)
    edit_config(saved(tmp_path, word_tokenizer()), architectures=None)
    notes = load_classifier(tmp_path).notes
    assert re.match(
        r"\d+ weights of the checkpoint have no place in BertForSequenceClassification and are left out \(cls\.",
        notes[0],
    )


# Types of the weights


def test_half_precision_runs_in_full_unless_it_is_to_stay(tmp_path):
    original = vit().to(torch.bfloat16)
    folder = saved(tmp_path, original, small_images())
    full, kept = load_classifier(folder), load_classifier(folder, dtype="auto")
    assert full.module.dtype == torch.float32
    assert full.notes == ("the weights are stored as bfloat16 and run as float32",)
    assert kept.module.dtype == torch.bfloat16
    assert kept.notes == ("the weights run as bfloat16, as they are stored",)
    assert torch.equal(full.module.classifier.weight, original.classifier.weight.float())
    with torch.inference_mode():
        logits = kept.module(**kept.preprocess(IMAGES)).logits
    torch.testing.assert_close(logits.float(), full.module(**full.preprocess(IMAGES)).logits, rtol=0.05, atol=0.02)


def test_the_stored_type_is_read_from_the_weights_not_from_the_configuration(tmp_path):
    folder = saved(tmp_path, vit().half(), small_images())
    edit_config(folder, dtype="float32")
    assert load_classifier(folder).notes == ("the weights are stored as float16 and run as float32",)


def test_a_type_that_is_none_is_refused(tmp_path):
    with pytest.raises(
        SettingsError,
        match=r"^dtype is 'float8'; one of float32, auto, bfloat16, float16, float64 was expected\. Did you mean "
        r"'float",
    ):
        load_classifier(tmp_path, dtype="float8")


# What is refused


def test_pickled_weights_are_refused_and_the_line_that_converts_them_works(tmp_path):
    original = bert()
    folder = saved(tmp_path / "model", original.config, word_tokenizer())
    torch.save(original.state_dict(), folder / "pytorch_model.bin")
    edit_config(folder, architectures=["BertForSequenceClassification"])
    line = (
        "from transformers import AutoModelForSequenceClassification as Model; "
        f"Model.from_pretrained('{folder}', use_safetensors=False).save_pretrained('{folder}')"
    )
    assert refused(folder) == (
        f"'{folder}' holds pickled weights only (pytorch_model.bin), and a pickle can run code as it is read; if you "
        f'trust the file, convert it once: `python -c "{line}"`.'
    )
    exec(line)
    converted = load_classifier(folder).module.state_dict()
    assert all(torch.equal(converted[name], weight) for name, weight in original.state_dict().items())


def test_pickled_weights_of_other_programs_are_sent_back_there(tmp_path):
    folder = saved(tmp_path, bert().config, word_tokenizer())
    (folder / "best.pt").write_bytes(b"")
    assert refused(folder) == (
        f"'{folder}' holds pickled weights only (best.pt), and a pickle can run code as it is read; load it in the "
        f"program that wrote it and save it with `model.save_pretrained('{folder}')`, which writes safetensors."
    )


CONFIGURATION = """
from transformers import BertConfig

class OwnConfig(BertConfig):
    model_type = "own"
"""
MODELING = """
from transformers import BertForSequenceClassification
from .configuration_own import OwnConfig

class OwnClassifier(BertForSequenceClassification):
    config_class = OwnConfig
"""


def folder_with_own_code(tmp_path):
    folder = saved(tmp_path, bert(), word_tokenizer())
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    edit_config(
        folder,
        model_type="own",
        architectures=["OwnClassifier"],
        auto_map={
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForSequenceClassification": "modeling_own.OwnClassifier",
        },
    )
    return folder


def test_code_of_the_model_runs_only_where_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = folder_with_own_code(tmp_path / "model")
    assert refused(folder) == (
        f"'{folder}' needs code of its own, which is not run unasked; read the code, and if you trust it pass "
        "`trust_remote_code=True`."
    )
    assert not (tmp_path / "modules").exists()
    loaded = load_classifier(folder, trust_remote_code=True)
    assert type(loaded.module).__name__ == "OwnClassifier"
    assert loaded.notes[0] == "code of the model folder was run, as trust_remote_code allows"


def test_code_that_the_library_can_do_without_is_not_run(tmp_path):
    folder = saved(tmp_path, bert(), word_tokenizer())
    edit_config(folder, auto_map={"AutoModelForSequenceClassification": "modeling_own.OwnClassifier"})
    assert load_classifier(folder).notes[0] == (
        "the model folder has code of its own, which is not run; the library's BertForSequenceClassification is used"
    )


def test_a_model_without_a_head_is_refused(tmp_path):
    folder = saved(tmp_path, bert("BertModel"), word_tokenizer())
    assert refused(folder) == (
        f"'{folder}' has no classification head: the weights classifier.bias, classifier.weight are not in the "
        "checkpoint (it was saved as BertModel). Fine-tune it for classification first, then give its folder."
    )


def test_a_head_for_another_task_is_refused_even_if_its_weights_fit(tmp_path):
    original = bert("BertForTokenClassification")
    original.bert = bert("BertModel")  # with the pooler, every weight of a sequence classifier is there
    folder = saved(tmp_path, original, word_tokenizer())
    assert refused(folder) == (
        f"'{folder}' was saved as BertForTokenClassification, whose head is for another task; a model saved as "
        "BertForSequenceClassification was expected, so fine-tune it for classification first."
    )


def test_a_model_that_the_library_cannot_classify_with_is_refused(tmp_path):
    folder = saved(tmp_path, transformers.InformerConfig())
    edit_config(folder, architectures=["InformerForPrediction"])
    assert refused(folder) == (
        f"'{folder}' is a InformerForPrediction (model type 'informer'), for which transformers "
        f"{transformers.__version__} has no classifier; a model for one of AutoModelForSequenceClassification, "
        "AutoModelForImageClassification, AutoModelForAudioClassification was expected."
    )


def test_a_model_that_reads_something_else_is_refused(tmp_path):
    sizes = {"num_latents": 4, "d_latents": 8, "d_model": 8, "num_blocks": 1, "num_self_attends_per_block": 1}
    sizes |= {"num_self_attention_heads": 1, "num_cross_attention_heads": 1, "vocab_size": 20}
    folder = saved(tmp_path, module_of("PerceiverForSequenceClassification", max_position_embeddings=16, **sizes))
    assert refused(folder) == (
        f"'{folder}' (PerceiverForSequenceClassification) reads 'inputs'; a model that reads one of input_ids, "
        "pixel_values, input_values, input_features was expected. Give the module and a preprocessing of your own to "
        "`Classifier.from_module`."
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"problem_type": "regression"},
            "is a regression model; a single-label classifier (one class for each example) was expected, so train one "
            "on classes, such as ranges of the values.",
        ),
        (
            {"problem_type": "multi_label_classification"},
            "is a multi label classification model; a single-label classifier (one class for each example) was "
            "expected, so study it label by label: wrap it in a module that returns (0, logit of the label) and give "
            "that to `Classifier.from_module`.",
        ),
        (
            {"id2label": {0: "yes"}},
            "has one output, so it is a regression model; two or more classes were expected. If the output is the "
            "logit of a yes, wrap the model in a module that returns (0, logit) and give that to "
            "`Classifier.from_module`.",
        ),
    ],
)
def test_what_is_no_choice_of_one_class_is_refused(tmp_path, settings, message):
    folder = saved(tmp_path, bert(**settings), word_tokenizer())
    assert refused(folder) == f"'{folder}' {message}"


def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path):
    folder = saved(tmp_path, bert(), word_tokenizer())
    edit_config(folder, id2label=dict(enumerate("abcde")), label2id={})
    # Some versions of the library do not say which shape is stored.
    assert refused(folder).replace("another shape", "the shape (3,)") == (
        f"The weight classifier.bias of '{folder}' has the shape (3,), but (5,) follows from its config.json; put back "
        "the config.json that was saved with the weights."
    )


def test_class_names_without_an_order_are_refused(tmp_path):
    folder = saved(tmp_path, bert(), word_tokenizer())
    edit_config(folder, id2label={1: "good", 2: "bad", 3: "ugly"}, label2id={"good": 1, "bad": 2, "ugly": 3})
    assert refused(folder) == (
        f"The id2label of '{folder}' has the keys [1, 2, 3]; 0 to 2, in the order of the logits, were expected, so "
        "correct it in config.json."
    )


@pytest.mark.parametrize(
    ("module", "what"), [(bert, "tokenizer"), (t5, "tokenizer"), (vit, "image processor"), (ast, "feature extractor")]
)
def test_a_model_without_what_reads_its_inputs_is_refused(tmp_path, module, what):
    folder = saved(tmp_path, module())
    assert refused(folder) == (
        f"There is no {what} in the folder '{folder}'; save the one that the model was trained with there, with its "
        "`save_pretrained`."
    )


def test_a_processor_that_cannot_be_read_is_refused_with_the_reason(tmp_path):
    folder = saved(tmp_path, vit(), small_images())
    (folder / "preprocessor_config.json").write_text("{")
    assert refused(folder).startswith(f"There is no image processor in the folder '{folder}': It looks like")


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path):
    folder = saved(tmp_path, gpt2(), word_tokenizer(pad_token=None))
    assert refused(folder) == (
        f"The tokenizer ({transformers.PreTrainedTokenizerFast.__name__}) has no padding token, and no end token that "
        "could stand in; name one that occurs in no text, `tokenizer.pad_token = ...`, and save the tokenizer with the "
        "model."
    )


def test_an_end_token_that_closes_every_text_cannot_be_padding(tmp_path):
    folder = saved(tmp_path, gpt2(), word_tokenizer(pad_token=None, eos_token="[SEP]"))
    assert refused(folder) == (
        f"The tokenizer ({transformers.PreTrainedTokenizerFast.__name__}) has no padding token, and its end token "
        "'[SEP]' closes every text; name one that occurs in no text, `tokenizer.pad_token = ...`, and save the "
        "tokenizer with the model."
    )


def test_quantised_weights_need_their_package(tmp_path):
    folder = saved(tmp_path, bert(), word_tokenizer())
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert re.fullmatch(
        re.escape(
            f"'{folder}' is quantised by 'bitsandbytes', and a package for it is not installed: Using `bitsandbytes` "
            "8-bit quantization requires "
        )
        + r"[Aa]ccelerate: `pip install 'accelerate>=[\d.]+'`\. Install it, then try again\.",
        refused(folder),
    )


def test_weights_that_are_quantised_in_an_unknown_way_are_refused(tmp_path):
    folder = saved(tmp_path, bert(), word_tokenizer())
    edit_config(folder, quantization_config={"quant_method": "sorcery"})
    assert refused(folder) == (
        f"'{folder}' is quantised by 'sorcery', which transformers {transformers.__version__} does not know; give the "
        "model that it was made from."
    )


def test_weights_that_are_cut_off_are_refused(tmp_path):
    folder = saved(tmp_path, bert(), word_tokenizer())
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert refused(folder).startswith(
        f"There is no BertForSequenceClassification in safetensors in the folder '{folder}': "
    )


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert refused(tmp_path) == (
        f"'{tmp_path}' holds an adapter to another model, and no model; merge the two with `merge_and_unload()`, save "
        "the result with `save_pretrained`, and give that folder."
    )


# Folders and names


def test_what_is_no_model_folder_is_refused(tmp_path):
    saved(tmp_path / "minilm", bert().config)
    assert refused(tmp_path / "minilmm") == (
        f"There is no model folder '{tmp_path / 'minilmm'}'. Did you mean 'minilm'?"
    )
    assert refused(tmp_path / "minilm" / "config.json") == (
        f"'{tmp_path / 'minilm' / 'config.json'}' is a file; the folder with config.json and model.safetensors was "
        "expected."
    )
    assert refused(tmp_path) == (
        f"The folder '{tmp_path}' is no model: it has no config.json. Give one that `save_pretrained` wrote."
    )
    assert refused(tmp_path / "minilm").startswith(
        f"There is no BertForSequenceClassification in safetensors in the folder '{tmp_path / 'minilm'}': "
    )


def test_a_hub_id_is_found_in_the_cache_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path), raising=False)  # before version 5
    repository = tmp_path / "models--someone--tiny"
    saved(repository / "snapshots" / "abc", bert().half(), word_tokenizer())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    loaded = load_classifier("someone/tiny")
    assert loaded.labels == ("good", "bad", "ugly")
    assert loaded.notes[0] == "the weights are stored as float16 and run as float32"
    shutil.rmtree(repository)
    assert refused("someone/tiny").startswith(
        "There is no readable config.json of a Transformer locally or on the hub for 'someone/tiny': "
    )


def test_the_librarys_settings_are_as_they_were(tmp_path):
    library = transformers.utils.logging
    library.enable_progress_bar()
    level = library.get_verbosity()
    load_classifier(saved(tmp_path, bert(), word_tokenizer()))
    assert library.is_progress_bar_enabled()
    assert library.get_verbosity() == level
