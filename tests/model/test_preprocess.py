import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from scipy.io import wavfile
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from synapse.errors import DataError, ModelError, SettingsError
from synapse.model.preprocess import SAMPLE_TEXTS, preprocess_for

try:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
except ModuleNotFoundError:  # a version of the library in which this is the only kind
    from transformers import ViTImageProcessor as ViTImageProcessorPil

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "slept"]


def word_tokenizer(**options):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"} | options
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{name: value for name, value in names.items() if value is not None},
    )


class Reader(nn.Module):
    """Stands for a classifier: what matters here is which arguments it takes and what its configuration says."""

    main_input_name = "input_ids"

    def __init__(self, **config):
        super().__init__()
        self.config = SimpleNamespace(**config)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        raise NotImplementedError


class MaskOnlyReader(Reader):
    def forward(self, input_ids, attention_mask=None, **options):
        raise NotImplementedError


class PixelReader(nn.Module):
    main_input_name = "pixel_values"

    def __init__(self, num_channels=3, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.config = SimpleNamespace(num_channels=num_channels, image_size=8)

    def forward(self, pixel_values):
        raise NotImplementedError


class SoundReader(nn.Module):
    main_input_name = "input_values"

    def forward(self, input_values, attention_mask=None):
        raise NotImplementedError


# Texts


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_are_what_the_tokenizer_makes_of_them(side):
    tokenizer = word_tokenizer(padding_side=side)
    texts = ["the cat", "the cat sat on a mat"]
    made = preprocess_for(tokenizer, Reader(pad_token_id=0))(texts)
    expected = tokenizer(texts, padding=True, return_tensors="pt")
    assert set(made) == {"input_ids", "attention_mask", "token_type_ids"}
    for name, tensor in made.items():
        assert torch.equal(tensor, expected[name])
    column = 0 if side == "left" else -1
    assert made["attention_mask"][:, column].tolist() == [0, 1]


def test_pairs_are_what_the_tokenizer_makes_of_pairs():
    tokenizer = word_tokenizer()
    pairs = [("the cat", "sat"), ("a mat", "the cat sat on it")]
    preprocess = preprocess_for(tokenizer, Reader(pad_token_id=0))
    made = preprocess(pairs)
    alone = [tokenizer(first, second) for first, second in pairs]
    assert made["input_ids"][1].tolist() == alone[1]["input_ids"] == [2, 8, 9, 3, 4, 5, 6, 7, 12, 3]
    assert made["token_type_ids"][1].tolist() == alone[1]["token_type_ids"] == [0] * 4 + [1] * 6
    assert made["input_ids"][0].tolist() == [*alone[0]["input_ids"], 0, 0, 0, 0]
    assert preprocess.lengths(pairs).tolist() == [len(encoding["input_ids"]) for encoding in alone]


@pytest.mark.parametrize("side", ["left", "right"])
def test_token_ids_are_complete_sequences_that_only_get_padding(side):
    preprocess = preprocess_for(word_tokenizer(padding_side=side), Reader(pad_token_id=0))
    rows = [(2, 4, 3), np.array([2, 4, 5, 6, 3])]
    made = preprocess(rows)
    padded = [0, 0, 2, 4, 3] if side == "left" else [2, 4, 3, 0, 0]
    assert made["input_ids"].tolist() == [padded, [2, 4, 5, 6, 3]]
    assert made["attention_mask"].tolist() == [[int(i != 0) for i in padded], [1] * 5]
    assert preprocess.lengths(rows).tolist() == [3, 5]


def test_texts_and_their_token_ids_are_the_same_input():
    tokenizer = word_tokenizer()
    preprocess = preprocess_for(tokenizer, Reader(pad_token_id=0))
    texts = ["the cat sat", "a mat"]
    from_ids = preprocess([tuple(tokenizer(text)["input_ids"]) for text in texts])
    from_texts = preprocess(texts)
    for name, tensor in from_ids.items():
        assert torch.equal(tensor, from_texts[name])


def test_only_what_the_forward_names_is_passed_on():
    preprocess = preprocess_for(word_tokenizer(), MaskOnlyReader(pad_token_id=0))
    assert set(preprocess(["the cat"])) == {"input_ids", "attention_mask"}


def test_texts_are_cut_at_the_smallest_limit_and_the_reason_is_told():
    text = " ".join(["cat"] * 600)

    def limit(tokenizer, module, **options):
        preprocess = preprocess_for(tokenizer, module, **options)
        assert preprocess.lengths([text, "cat"]).tolist() == [preprocess.max_length, 3]
        return preprocess.notes[-1]

    free = Reader(pad_token_id=0)
    assert limit(word_tokenizer(), free) == (
        "long texts are cut at 512 tokens because neither tokenizer nor model has a limit"
    )
    assert limit(word_tokenizer(), Reader(pad_token_id=0, max_position_embeddings=-1)).startswith(
        "long texts are cut at 512"
    )
    assert limit(word_tokenizer(model_max_length=20), free) == (
        "long texts are cut at 20 tokens because the tokenizer allows no more"
    )
    short = Reader(pad_token_id=0, max_position_embeddings=16)
    assert limit(word_tokenizer(model_max_length=20), short) == (
        "long texts are cut at 16 tokens because the model has no more positions"
    )
    assert limit(word_tokenizer(), short, max_length=7) == "long texts are cut at 7 tokens because max_length says so"
    assert limit(word_tokenizer(), short, max_length=99).startswith("long texts are cut at 16")


def test_positions_that_begin_behind_a_padding_index_leave_room_for_fewer_tokens():
    config = transformers.RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config.max_position_embeddings, config.pad_token_id = 12, 1
    module = transformers.RobertaForSequenceClassification(config).eval()
    # Roberta counts positions from its padding index on: 12 positions leave ten for tokens.
    preprocess = preprocess_for(word_tokenizer(pad_token="[UNK]"), module)
    assert preprocess.max_length == 10
    with torch.inference_mode():
        module(**preprocess(["cat " * 30]))


def test_a_missing_padding_token_is_the_end_token_on_a_copy():
    tokenizer = word_tokenizer(pad_token=None, eos_token="[SEP]")
    preprocess = preprocess_for(tokenizer, Reader(pad_token_id=3))
    assert preprocess(["the cat", "the"])["input_ids"].tolist() == [[2, 4, 5, 3], [2, 4, 3, 3]]
    assert preprocess.notes[0] == "the tokenizer has no padding token; its end token '[SEP]' is used"
    assert tokenizer.pad_token is None


def test_padding_is_what_the_model_takes_for_padding():
    tokenizer = word_tokenizer()
    preprocess = preprocess_for(tokenizer, Reader(pad_token_id=1))
    assert preprocess(["the cat", "the"])["input_ids"][1].tolist() == [2, 4, 3, 1]
    assert preprocess.notes[0] == "the tokenizer pads with '[PAD]'; the model's padding token '[UNK]' is used"
    assert tokenizer.pad_token == "[PAD]"


def test_a_module_without_a_padding_id_is_not_altered_but_refused_with_the_line_to_add():
    module = transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(
            vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=2, eos_token_id=3
        )
    ).eval()
    message = (
        "The configuration of GPT2ForSequenceClassification has pad_token_id None, but texts are padded with '[PAD]'; "
        "add `module.config.pad_token_id = 0` before this call."
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        preprocess_for(word_tokenizer(), module)
    assert module.config.pad_token_id is None
    module.config.pad_token_id = 0
    preprocess = preprocess_for(word_tokenizer(), module)
    with torch.inference_mode():
        together, alone = module(**preprocess(["the cat", "the cat sat on"])), module(**preprocess(["the cat"]))
    torch.testing.assert_close(together.logits[0], alone.logits[0])


def test_a_tokenizer_that_cannot_pad_is_refused():
    with pytest.raises(
        ModelError,
        match=r"has no padding token, and no end token that could stand in; .*`tokenizer\.pad_token = \.\.\.`",
    ):
        preprocess_for(word_tokenizer(pad_token=None), Reader())


@pytest.mark.parametrize(
    ("inputs", "seen"),
    [
        (["the cat", ("the", "cat")], "texts and pairs of texts came in one batch"),
        ([np.zeros((2, 2))], "arrays came in one batch"),
        ([], "nothing came in one batch"),
    ],
)
def test_what_is_no_text_is_refused(inputs, seen):
    with pytest.raises(
        DataError, match=f"^The classifier reads texts, but {seen}; give texts, pairs of texts or tuples"
    ):
        preprocess_for(word_tokenizer(), Reader(pad_token_id=0))(inputs)


def test_token_ids_beyond_the_limit_are_refused_not_cut():
    preprocess = preprocess_for(word_tokenizer(), Reader(pad_token_id=0), max_length=4)
    message = (
        "An input has 5 token ids, but 4 are the most that the classifier takes; token ids are complete sequences and "
        "are not cut, so shorten it with its last token in place."
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        preprocess([(2, 4, 5, 6, 3)])


def test_sample_texts_are_short_and_of_unequal_length():
    words = [len(text.split()) for text in preprocess_for(word_tokenizer(), Reader(pad_token_id=0)).samples()]
    assert len(set(words)) == len(words) == len(SAMPLE_TEXTS) >= 4
    assert max(words) <= 22


# Images


def colour_noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


def image_processor(**options):
    return ViTImageProcessorPil(size={"height": 8, "width": 8}, **options)


def test_images_are_what_the_processor_makes_of_them(tmp_path):
    processor, pixels = image_processor(), colour_noise(12, 20)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    made = preprocess_for(processor, PixelReader())(
        [tmp_path / "noise.png", pixels, Image.fromarray(pixels), pixels / 255]
    )
    expected = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    assert set(made) == {"pixel_values"}
    for row in made["pixel_values"]:
        assert torch.equal(row, expected[0])


def test_pixels_get_the_values_of_the_formula():
    pixels = colour_noise(8, 8)
    made = preprocess_for(image_processor(do_resize=False), PixelReader())([pixels])["pixel_values"]
    np.testing.assert_allclose(made[0].permute(1, 2, 0).numpy(), (pixels / 255 - 0.5) / 0.5, atol=1e-6)


def test_grey_images_get_the_channels_of_the_model():
    grey = colour_noise(8, 8)[..., 0]
    of_colours = preprocess_for(image_processor(do_resize=False), PixelReader())([grey, grey[..., None]])[
        "pixel_values"
    ]
    assert of_colours.shape == (2, 3, 8, 8)
    assert torch.equal(of_colours[0, 0], of_colours[1, 2])
    of_grey = preprocess_for(
        image_processor(do_resize=False, image_mean=[0.5], image_std=[0.5]), PixelReader(num_channels=1)
    )([grey, np.stack([grey] * 3, axis=-1)])["pixel_values"]
    assert of_grey.shape == (2, 1, 8, 8)
    assert torch.equal(of_grey[0], of_grey[1])
    np.testing.assert_allclose(of_grey[0, 0].numpy(), (grey / 255 - 0.5) / 0.5, atol=1e-6)


def test_images_of_sixteen_bits_and_turned_ones_are_read_as_they_are_meant(tmp_path):
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    preprocess = preprocess_for(image_processor(do_resize=False), PixelReader())
    made = preprocess([tmp_path / "deep.png"])["pixel_values"][0, 0]
    np.testing.assert_allclose(made.numpy(), levels / 65535 * 2 - 1, atol=0.005)
    pixels = colour_noise(8, 8)
    turned, orientation = Image.fromarray(np.rot90(pixels)), Image.Exif()
    orientation[0x0112] = 6  # shown turned by a quarter, clockwise
    turned.save(tmp_path / "turned.png", exif=orientation)
    assert torch.equal(preprocess([tmp_path / "turned.png"])["pixel_values"], preprocess([pixels])["pixel_values"])


def test_a_processor_that_does_not_rescale_gets_the_values_as_they_are():
    values = np.random.default_rng(0).normal(size=(8, 8, 3)).astype(np.float32)
    processor = image_processor(do_resize=False, do_rescale=False, do_normalize=False)
    made = preprocess_for(processor, PixelReader())([values])["pixel_values"]
    np.testing.assert_array_equal(made[0].permute(1, 2, 0).numpy(), values)


def test_pixels_come_in_the_type_of_the_weights():
    made = preprocess_for(image_processor(), PixelReader(dtype=torch.bfloat16))([colour_noise(8, 8)])
    assert made["pixel_values"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            np.full((8, 8), 200.0),
            "An image is an array of type float64 with values from 200 to 200; uint8 in 0..255 or floats in [0, 1] "
            "were expected, so scale it.",
        ),
        (
            np.zeros((3, 8, 8), dtype=np.uint8),
            "An image has the shape (3, 8, 8); (height, width) or (height, width, channel) was expected, with 3 "
            "channels.",
        ),
        (
            Image.fromarray(np.zeros((8, 8), dtype=np.float32)),
            "An image is stored in the mode 'F', whose range of values is not known; save it with 8 or 16 bits a "
            "channel.",
        ),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        preprocess_for(image_processor(), PixelReader())([image])


def test_images_cannot_be_cut():
    with pytest.raises(
        SettingsError, match=r"^max_length is 9, but the classifier reads images, which are never cut\.$"
    ):
        preprocess_for(image_processor(), PixelReader(), max_length=9)


def test_sample_images_are_the_same_every_time_and_have_the_models_shape():
    preprocess = preprocess_for(image_processor(), PixelReader())
    first, again = preprocess.samples(), preprocess.samples()
    assert len(first) == 4
    for image, same in zip(first, again, strict=True):
        assert image.shape == (8, 8, 3)
        np.testing.assert_array_equal(image, same)
    assert preprocess(first)["pixel_values"].shape == (4, 3, 8, 8)


# Sounds


def sound_extractor(**options):
    return transformers.Wav2Vec2FeatureExtractor(**{"sampling_rate": 8000, "return_attention_mask": True} | options)


def tone(seconds, rate, frequency=440.0):
    return np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate).astype(np.float32)


def test_sounds_are_what_the_extractor_makes_of_them():
    extractor, sounds = sound_extractor(), [tone(0.1, 8000), tone(0.2, 8000)]
    preprocess = preprocess_for(extractor, SoundReader())
    made = preprocess(sounds)
    assert made["attention_mask"].sum(dim=1).tolist() == preprocess.lengths(sounds).tolist() == [800, 1600]
    alone = extractor(sounds[0], sampling_rate=8000, return_tensors="pt")["input_values"]
    assert torch.equal(made["input_values"][0, :800], alone[0])
    assert preprocess.padding_is_masked
    assert preprocess.notes == ()


@pytest.mark.parametrize(
    ("dtype", "scale"), [(np.int16, 32767), (np.int32, 2147483647), (np.uint8, 127), (np.float32, 1.0)]
)
def test_files_are_scaled_averaged_and_resampled(tmp_path, dtype, scale):
    # Two channels at 12000 samples a second become one at 8000: a ratio of 2 to 3.
    wave = tone(0.5, 12000) * 0.5
    channels = np.stack([wave * 1.5, wave * 0.5], axis=1) * scale
    wavfile.write(tmp_path / "tone.wav", 12000, (channels + (128 if dtype == np.uint8 else 0)).astype(dtype))
    preprocess = preprocess_for(sound_extractor(do_normalize=False), SoundReader())
    made = preprocess([tmp_path / "tone.wav"])["input_values"][0].numpy()
    assert preprocess.lengths([tmp_path / "tone.wav"]).tolist() == [4000]
    inside = slice(50, -50)  # the filter has nothing to go by at the ends
    np.testing.assert_allclose(made[inside], (tone(0.5, 8000) * 0.5)[inside], atol=0.01)


def test_an_extractor_without_a_mask_lets_only_equal_lengths_share_a_batch():
    preprocess = preprocess_for(sound_extractor(return_attention_mask=False), SoundReader())
    assert not preprocess.padding_is_masked
    assert preprocess.notes == (
        "the feature extractor makes no mask of padding, so only sounds of equal length share a batch",
    )


def test_spectra_of_a_fixed_size_need_no_mask_and_no_equal_lengths():
    for extractor in (
        transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=32),
        transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1),
    ):
        preprocess = preprocess_for(extractor, nn.Linear(1, 1))
        assert preprocess.padding_is_masked


def test_sounds_are_cut_at_the_length_that_is_asked_for():
    preprocess = preprocess_for(sound_extractor(), SoundReader(), max_length=1000)
    assert preprocess.lengths([tone(0.2, 8000)]).tolist() == [1000]
    assert preprocess([tone(0.2, 8000)])["input_values"].shape == (1, 1000)


@pytest.mark.parametrize("sound", [np.zeros((2, 9)), np.zeros(9, dtype=np.int16), np.zeros(0), np.array([0.0, np.nan])])
def test_what_is_no_sound_is_refused(sound):
    with pytest.raises(
        DataError,
        match=re.escape(
            f"A sound is an array of shape {sound.shape} and type {sound.dtype}; the path of a wav file, or one row of "
            "finite floats in [-1, 1] at 8000 samples a second, was expected."
        ),
    ):
        preprocess_for(sound_extractor(), SoundReader())([sound])


def test_sample_sounds_are_the_same_every_time_and_of_unequal_length():
    preprocess = preprocess_for(sound_extractor(), SoundReader())
    lengths = preprocess.lengths(preprocess.samples())
    assert lengths.tolist() == [1600, 3200, 2000, 2400]
    np.testing.assert_array_equal(preprocess.samples()[0], preprocess.samples()[0])


# Which of them


def test_a_function_and_what_was_made_before_come_back_as_they_are():
    def own(inputs):
        return {"ids": torch.as_tensor(inputs)}

    assert preprocess_for(own, Reader()) is own
    made = preprocess_for(word_tokenizer(), Reader(pad_token_id=0), max_length=5)
    assert preprocess_for(made, Reader(pad_token_id=0)) is made


def test_a_processor_of_several_inputs_stands_for_the_part_that_the_model_reads():
    extractor = sound_extractor()
    both = transformers.Wav2Vec2Processor(extractor, word_tokenizer())
    assert preprocess_for(both, SoundReader()).extractor is extractor
    assert preprocess_for(both, Reader(pad_token_id=0)).lengths(["the cat"]).tolist() == [4]


def test_the_processor_is_not_altered():
    tokenizer = word_tokenizer(pad_token=None, eos_token="[SEP]")
    before = copy.deepcopy(tokenizer.special_tokens_map)
    preprocess_for(tokenizer, Reader(pad_token_id=3))(["the cat", "a"])
    assert tokenizer.special_tokens_map == before


def test_what_cannot_be_called_is_refused():
    message = (
        "The preprocessing is a Tokenizer; a tokenizer, an image processor, a feature extractor or a function from raw "
        "inputs to tensors was expected."
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        preprocess_for(word_tokenizer().backend_tokenizer, Reader())
    with pytest.raises(SettingsError, match=r"^max_length is 0; 1 or more was expected\.$"):
        preprocess_for(word_tokenizer(), Reader(), max_length=0)
