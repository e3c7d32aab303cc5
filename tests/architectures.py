"""Tiny random models of many architectures, with what a reader of their source code says about each.

Every row is an oracle: block names, readout rows, down projections and the rest were written down from the source of
the model library and of torch, and `test_architecture_table.py` confirms them with plain forward hooks. Nothing here
knows how the package under test finds the same things.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

WIDTH, INNER, HEADS, VOCABULARY, N_LABELS, N_BLOCKS = 32, 48, 4, 100, 3, 3
PAD, BEGIN, END = 0, 1, 2
FIRST_WORD = 5  # below it: padding, the two marks, and two ids that some configurations want for a mask token

Inputs = dict[str, Tensor]
Readout = Literal["first", "last", "first-two", "mean", "mean-but-first", "first-and-mean"]
Family = Literal["text encoder", "causal decoder", "encoder-decoder", "vision", "audio", "plain module"]


# -------------------------------------------------------------------------------------------- raw inputs, preprocessing


def texts(n: int, seed: int) -> list[str]:
    """Return `n` strings of 3 to 11 blank-separated token ids, of unequal lengths and free of special ids."""
    draw = np.random.default_rng(seed)
    lengths = 3 + draw.permutation(np.arange(n) % 9)
    return [" ".join(map(str, draw.integers(FIRST_WORD, VOCABULARY, size=length))) for length in lengths]


def long_texts(n: int, seed: int) -> list[str]:
    """Return `n` strings of 17 to 28 token ids, long enough for sparse attention in blocks of two."""
    draw = np.random.default_rng(seed)
    lengths = 17 + draw.permutation(np.arange(n) % 12)
    return [" ".join(map(str, draw.integers(FIRST_WORD, VOCABULARY, size=length))) for length in lengths]


def waveforms(n: int, seed: int) -> list[np.ndarray]:
    """Return `n` arrays of 120 to 240 samples, of unequal lengths."""
    draw = np.random.default_rng(seed)
    lengths = 120 + 15 * draw.permutation(np.arange(n) % 9)
    return [
        (np.sin(np.arange(length) * draw.uniform(0.05, 1.5)) + draw.normal(scale=0.5, size=length)).astype(np.float32)
        for length in lengths
    ]


def series(n: int, seed: int) -> list[np.ndarray]:
    """Return `n` arrays of shape (time, 4) with 5 to 13 time steps."""
    draw = np.random.default_rng(seed)
    lengths = 5 + draw.permutation(np.arange(n) % 9)
    return [draw.normal(size=(length, 4)).astype(np.float32) for length in lengths]


def arrays(*shape: int) -> Callable[[int, int], list[np.ndarray]]:
    """Return a function (n, seed) -> `n` normal arrays of `shape`."""
    return lambda n, seed: list(np.random.default_rng(seed).normal(size=(n, *shape)).astype(np.float32))


@dataclass(frozen=True)
class TokenPreprocess:
    """From strings of token ids to padded ids and a mask (1 = real token)."""

    before: tuple[int, ...] = ()
    """Ids put in front of every text, as a tokenizer puts [CLS]."""
    after: tuple[int, ...] = ()
    """Ids put behind every text, as a tokenizer puts the end mark."""
    left: bool = False
    """Whether padding stands in front of the text."""
    ids: str = "input_ids"
    """The model's name for the ids."""
    mask: str | None = "attention_mask"
    """The model's name for the mask; None where it takes none."""

    def _encode(self, text: str) -> list[int]:
        return [*self.before, *map(int, text.split()), *self.after]

    def lengths(self, inputs: Sequence[str]) -> np.ndarray:
        """Return the number of rows that each text fills, padding aside."""
        return np.array([len(self._encode(text)) for text in inputs])

    def __call__(self, inputs: Sequence[str]) -> Inputs:
        rows = [self._encode(text) for text in inputs]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), PAD)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for example, row in enumerate(rows):
            where = slice(longest - len(row), None) if self.left else slice(len(row))
            ids[example, where] = torch.tensor(row)
            mask[example, where] = 1
        return {self.ids: ids} if self.mask is None else {self.ids: ids, self.mask: mask}


@dataclass(frozen=True)
class PaddedArrays:
    """From arrays that differ in their first axis to one padded with zeros, and a mask (1 = real) where it is named."""

    values: str
    """The model's name for the values."""
    mask: str | None = "attention_mask"
    """The model's name for the mask; None where it takes none."""

    def lengths(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Return the size of each array's first axis."""
        return np.array([len(array) for array in inputs])

    def __call__(self, inputs: Sequence[np.ndarray]) -> Inputs:
        lengths = torch.from_numpy(self.lengths(inputs))
        values = nn.utils.rnn.pad_sequence([torch.from_numpy(array) for array in inputs], batch_first=True)
        if self.mask is None:
            return {self.values: values}
        return {self.values: values, self.mask: (torch.arange(int(lengths.max())) < lengths[:, None]).long()}


@dataclass(frozen=True)
class StackedArrays:
    """From arrays of one shape to a tensor with the example first."""

    values: str
    """The model's name for the values."""

    def __call__(self, inputs: Sequence[np.ndarray]) -> Inputs:
        return {self.values: torch.from_numpy(np.stack(inputs))}


# -------------------------------------------------------------------------------------------------------------- one row


def masked_rows(inputs: Inputs, n_rows: int) -> Tensor:
    """Return which rows are no padding, by the mask among the inputs; all of them where there is none."""
    mask = next((value for name, value in inputs.items() if "mask" in name), None)
    if mask is None:
        return torch.ones(len(next(iter(inputs.values()))), n_rows, dtype=torch.bool)
    return nn.functional.pad(mask.bool(), (0, n_rows - mask.shape[1]))


@dataclass(frozen=True)
class Architecture:
    """A tiny random model, and what is known about it from its source code."""

    name: str
    """As it stands in the documentation."""
    family: Family
    build: Callable[[], nn.Module]
    """The seeded model, in evaluation mode, its weights large enough for logits that answer to the input."""
    preprocess: Callable[[Any], Inputs]
    """From raw inputs to tensors, example first; `.lengths(inputs)` where inputs vary in length."""
    inputs: Callable[[int, int], Sequence[Any]]
    """(n, seed) -> n raw inputs."""
    n_blocks: int
    """As configured; the blocks that the head stands on (the decoder's, the last stage's)."""
    block_names: tuple[str, ...]
    """Module names in call order; a shared block is named once for each call."""
    readout: Readout
    """Which rows of the last block's output the head reads."""
    width: int = WIDTH
    mlp: tuple[str, ...] | None = None
    """The feed-forward's down projection in each block; None where no module is one."""
    mlp_width: int | None = None
    """The size of the down projection's input."""
    attention: tuple[str, ...] | None = None
    """The module whose output is what (self-)attention adds, in each block: as a rule its output projection."""
    attention_width: int = WIDTH
    n_heads: int | None = HEADS
    """As configured; None where the attention's projection gets no heads side by side."""
    final: str | None = None
    """The linear module whose output, at the readout row, is the logits; None where no single one is."""
    hidden_states: Callable[[nn.Module, Inputs], tuple[Tensor, ...]] | None = None
    """The library's own states after each block, without the embedding; asks a copy, for the library leaves hooks."""
    n_comparable: int = 0
    """How many of the leading ones are the plain block outputs."""
    hidden_states_note: str = ""
    row_first: bool = False
    """Whether blocks see (row, example, unit) in place of (example, row, unit)."""
    real_rows: Callable[[Inputs, int], Tensor] = masked_rows
    """(inputs, rows of the last block) -> which rows are no padding: (example, row)."""
    padding_changes_answers: bool = False
    """Whether an example's logits depend on how much padding its batch brings."""
    refused: str | None = None
    """Words that the refusal should contain; such a row states nothing about blocks."""
    note: str = ""
    """A remark for the documentation."""

    def readout_rows(self, inputs: Inputs, n_rows: int) -> Tensor:
        """Return which rows of the last block's output move the logits: (example, row), boolean."""
        real = self.real_rows(inputs, n_rows)
        index = torch.arange(n_rows)
        if self.readout == "first":
            return (index == 0).expand_as(real)
        if self.readout == "first-two":
            return (index < 2).expand_as(real)
        if self.readout == "last":
            return index == (index * real).amax(dim=1, keepdim=True)
        if self.readout == "mean-but-first":
            return real & (index > 0)
        return real


def logits_of(output: Any) -> Tensor:
    """Return the logits of a library's output object, or the tensor itself."""
    return output if isinstance(output, Tensor) else output.logits


def library_states(key: str = "hidden_states") -> Callable[[nn.Module, Inputs], tuple[Tensor, ...]]:
    """Return a function that asks a copy of a library model for its states after each block."""

    def states(module: nn.Module, inputs: Inputs) -> tuple[Tensor, ...]:
        with torch.no_grad():
            output = copy.deepcopy(module)(**inputs, output_hidden_states=True)
        return tuple(output[key][1:])

    return states


def library_model(
    name: str,
    *,
    config: str,
    scale: float,
    wrapped: Callable[[nn.Module], nn.Module] = lambda module: module,
    **settings: Any,
) -> Callable[[], nn.Module]:
    """Return a function that builds the library's class `name`, seeded, its weight matrices multiplied by `scale`.

    The library draws weights so small that a random tiny model answers nearly the same to every input. A test that
    builds a class which the installed version lacks is skipped.
    """

    def build() -> nn.Module:
        if not hasattr(transformers, name):
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
        torch.manual_seed(0)
        module = wrapped(getattr(transformers, name)(getattr(transformers, config)(num_labels=N_LABELS, **settings)))
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(scale)
        return module.eval()

    return build


def numbered(prefix: str) -> tuple[str, ...]:
    """Return the names `prefix`.0, `prefix`.1, ..., one for each block."""
    return tuple(f"{prefix}.{block}" for block in range(N_BLOCKS))


def inside(blocks: tuple[str, ...], module: str | None) -> tuple[str, ...] | None:
    """Return the names of a module that every block holds; None where there is none."""
    return None if module is None or not blocks else tuple(f"{block}.{module}" for block in blocks)


def present(build: Callable[[], nn.Module], *candidates: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the first names that are all modules of the built model: versions of the library differ in some."""
    modules = dict(build().named_modules())
    return next(names for names in candidates if names is not None and all(name in modules for name in names))


PADDING_IS_READ = "padding changes the answers"
LAST_IS_NORMED = "the last entry is after the final normalisation, so it is not the last block's output"
LAST_VARIES = "the last entry is after the final normalisation in some versions of the library, and before it in others"
ALL_PLAIN = "every entry is a plain block output"

TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
}
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": N_BLOCKS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
}
POSITIONS: dict[str, Any] = {"max_position_embeddings": 64}
T5_SIZES: dict[str, Any] = TOKENS | {"d_model": WIDTH, "d_kv": 8, "d_ff": INNER, "num_heads": HEADS}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}


def text_encoder(
    name: str,
    library_name: str,
    *,
    blocks: tuple[str, ...],
    settings: dict[str, Any] | None = None,
    scale: float = 8.0,
    mlp: str | None = "output.dense",
    mlp_width: int = INNER,
    attention: str | None = "attention.output.dense",
    final: str | None = "classifier",
    readout: Readout = "first",
    preprocess: TokenPreprocess = TokenPreprocess(before=(BEGIN,), after=(END,)),
    inputs: Callable[[int, int], Sequence[Any]] = texts,
    n_comparable: int = N_BLOCKS,
    hidden_states_note: str = ALL_PLAIN,
    **rest: Any,
) -> Architecture:
    """Return the row of the library's `<library_name>ForSequenceClassification`, by default laid out as BERT is."""
    return Architecture(
        name=name,
        family="text encoder",
        build=library_model(
            f"{library_name}ForSequenceClassification",
            config=f"{library_name}Config",
            scale=scale,
            **(TOKENS | SIZES | POSITIONS if settings is None else settings),
        ),
        preprocess=preprocess,
        inputs=inputs,
        n_blocks=N_BLOCKS,
        block_names=blocks,
        readout=readout,
        mlp=inside(blocks, mlp),
        mlp_width=None if mlp is None else mlp_width,
        attention=inside(blocks, attention),
        final=final,
        hidden_states=library_states(),
        n_comparable=n_comparable,
        hidden_states_note=hidden_states_note,
        **rest,
    )


def causal_decoder(
    name: str,
    library_name: str,
    *,
    blocks: tuple[str, ...] = numbered("model.layers"),
    settings: dict[str, Any] | None = None,
    scale: float = 3.0,
    mlp: str | None = "mlp.down_proj",
    mlp_width: int = INNER,
    attention: str = "self_attn.o_proj",
    left: bool = False,
    **rest: Any,
) -> Architecture:
    """Return the row of the library's `<library_name>ForSequenceClassification`, by default laid out as Llama is."""
    return Architecture(
        name=f"{name}, left padding" if left else name,
        family="causal decoder",
        build=library_model(
            f"{library_name}ForSequenceClassification",
            config=f"{library_name}Config",
            scale=scale,
            **(TOKENS | SIZES | POSITIONS | (settings or {})),
        ),
        preprocess=TokenPreprocess(before=(BEGIN,), left=left),
        inputs=texts,
        n_blocks=N_BLOCKS,
        block_names=blocks,
        readout="last",
        mlp=inside(blocks, mlp),
        mlp_width=None if mlp is None else mlp_width,
        attention=inside(blocks, attention),
        final="score",
        hidden_states=library_states(),
        n_comparable=N_BLOCKS - 1,
        hidden_states_note=LAST_IS_NORMED,
        **rest,
    )


def vision(
    name: str,
    library_name: str,
    *,
    prefix: str,
    model: str | None = None,
    settings: dict[str, Any] | None = None,
    scale: float = 3.0,
    mlp_width: int = INNER,
    readout: Readout = "first",
    final: str | None = "classifier",
    **rest: Any,
) -> Architecture:
    """Return the row of the library's `<library_name>ForImageClassification`, by default laid out as ViT is."""
    build = library_model(
        model or f"{library_name}ForImageClassification",
        config=f"{library_name}Config",
        scale=scale,
        **({"image_size": 12, "patch_size": 4} | SIZES if settings is None else settings),
    )
    blocks = present(build, numbered(f"{prefix}.layers"), numbered(f"{prefix}.encoder.layer"))
    return Architecture(
        name=name,
        family="vision",
        build=build,
        preprocess=StackedArrays("pixel_values"),
        inputs=arrays(3, 12, 12),
        n_blocks=N_BLOCKS,
        block_names=blocks,
        readout=readout,
        mlp=present(build, inside(blocks, "mlp.fc2"), inside(blocks, "output.dense")),
        mlp_width=mlp_width,
        attention=present(build, inside(blocks, "attention.o_proj"), inside(blocks, "attention.output.dense")),
        final=final,
        hidden_states=library_states(),
        n_comparable=N_BLOCKS,
        hidden_states_note=ALL_PLAIN,
        **rest,
    )


SPEECH_KERNELS, SPEECH_STRIDES = (10, 3), (5, 2)


def speech_frames(inputs: Inputs, n_rows: int) -> Tensor:
    """Return which frames are no padding: (example, frame), by the output sizes of convolutions without padding."""
    if "attention_mask" not in inputs:
        return torch.ones(len(inputs["input_values"]), n_rows, dtype=torch.bool)
    lengths = inputs["attention_mask"].sum(dim=1)
    for kernel, stride in zip(SPEECH_KERNELS, SPEECH_STRIDES, strict=True):
        lengths = (lengths - kernel) // stride + 1
    return torch.arange(n_rows) < lengths[:, None]


def speech(name: str, library_name: str, *, prefix: str, masked: bool) -> Architecture:
    """Return the row of a waveform model; with a mask, the large kind that normalises each convolution's output."""
    blocks = numbered(f"{prefix}.encoder.layers")
    return Architecture(
        name=name,
        family="audio",
        build=library_model(
            f"{library_name}ForSequenceClassification",
            config=f"{library_name}Config",
            scale=6.0,
            **(TOKENS | SIZES),
            conv_dim=(16, 16),
            conv_kernel=SPEECH_KERNELS,
            conv_stride=SPEECH_STRIDES,
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            classifier_proj_size=16,
            mask_time_prob=0.0,
            feat_extract_norm="layer" if masked else "group",
            do_stable_layer_norm=masked,
        ),
        preprocess=PaddedArrays("input_values", mask="attention_mask" if masked else None),
        inputs=waveforms,
        n_blocks=N_BLOCKS,
        block_names=blocks,
        readout="mean",
        real_rows=speech_frames,
        mlp=inside(blocks, "feed_forward.output_dense"),
        mlp_width=INNER,
        attention=inside(blocks, "attention.out_proj"),
        final="classifier",
        hidden_states=library_states(),
        n_comparable=N_BLOCKS - 1 if masked else N_BLOCKS,
        hidden_states_note=LAST_VARIES if masked else ALL_PLAIN,
        padding_changes_answers=not masked,
        note="the library leaves hooks of its own in the model at its first pass; "
        + (
            "rows are frames, fewer than samples" if masked else f"without a mask the mean reads all: {PADDING_IS_READ}"
        ),
    )


# ------------------------------------------------------------------------------------------ modules of nobody's library


class MeanPooledEncoder(nn.Module):
    """An encoder of the library under a linear head on the mean of the rows that are no padding."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(WIDTH, N_LABELS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(masked_mean(hidden, attention_mask))


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the rows where the mask is 1: (example, unit)."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def torch_encoder(**settings: Any) -> nn.TransformerEncoder:
    """Return torch's own encoder; `nested`, `norm` and what `nn.TransformerEncoderLayer` takes can be set."""
    nested, norm = settings.pop("nested", False), settings.pop("norm", None)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, **({"batch_first": True} | settings))
    return nn.TransformerEncoder(layer, N_BLOCKS, norm=norm, enable_nested_tensor=nested)


class TokenEncoder(nn.Module):
    """Token ids to logits, read at row 0 or at the mean of the rows that are no padding."""

    def __init__(self, *, mean: bool = False, **settings: Any) -> None:
        super().__init__()
        self.mean = mean
        self.rows_first = not settings.get("batch_first", True)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH, padding_idx=PAD)
        self.positions = nn.Embedding(64, WIDTH)
        self.encoder = torch_encoder(**settings)
        self.head = nn.Linear(WIDTH, N_LABELS)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        if self.rows_first:
            hidden = self.encoder(hidden.transpose(0, 1), src_key_padding_mask=mask == 0).transpose(0, 1)
        else:
            hidden = self.encoder(hidden, src_key_padding_mask=mask == 0)
        return self.head(masked_mean(hidden, mask) if self.mean else hidden[:, 0])


class SeriesEncoder(nn.Module):
    """Float time series (example, time, channel) to logits, read at the mean of the rows that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, WIDTH)
        self.positions = nn.Parameter(torch.randn(64, WIDTH))
        self.encoder = torch_encoder()
        self.head = nn.Linear(WIDTH, N_LABELS)

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        hidden = self.project(values) + self.positions[: values.shape[1]]
        return self.head(masked_mean(self.encoder(hidden, src_key_padding_mask=mask == 0), mask))


class TabularEncoder(nn.Module):
    """Eight float features to logits: a row for each feature behind a learned [CLS], which no input holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, WIDTH))
        self.bias = nn.Parameter(torch.randn(8, WIDTH))
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.encoder = torch_encoder()
        self.head = nn.Linear(WIDTH, N_LABELS)

    def forward(self, features: Tensor) -> Tensor:
        rows = features.unsqueeze(-1) * self.weight + self.bias
        hidden = self.encoder(torch.cat([self.cls.expand(len(rows), -1, -1), rows], dim=1))
        return self.head(hidden[:, 0])


def plain(
    name: str,
    module: Callable[[], nn.Module],
    *,
    preprocess: Callable[[Any], Inputs] = TokenPreprocess(before=(BEGIN,), ids="ids", mask="mask"),
    inputs: Callable[[int, int], Sequence[Any]] = texts,
    readout: Readout = "first",
    **rest: Any,
) -> Architecture:
    """Return the row of a module around torch's own encoder."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return module().eval()

    blocks = numbered("encoder.layers")
    return Architecture(
        name=name,
        family="plain module",
        build=build,
        preprocess=preprocess,
        inputs=inputs,
        n_blocks=N_BLOCKS,
        block_names=blocks,
        readout=readout,
        mlp=inside(blocks, "linear2"),
        mlp_width=INNER,
        # torch's attention uses the weights of its out_proj without calling it: the attention module gives the output.
        attention=inside(blocks, "self_attn"),
        n_heads=None,  # torch multiplies by the output projection's weights without calling it
        final="head",
        **rest,
    )


SWIN = library_model(
    "SwinForImageClassification",
    config="SwinConfig",
    scale=3.0,
    image_size=16,
    patch_size=2,
    embed_dim=16,
    depths=[2, N_BLOCKS],
    num_heads=[2, HEADS],
    window_size=2,
    mlp_ratio=1.5,
)
SWIN_BLOCKS = numbered("swin.encoder.layers.1.blocks")

SPECTROGRAM = library_model(
    "ASTForAudioClassification",
    config="ASTConfig",
    scale=3.0,
    **SIZES,
    patch_size=4,
    frequency_stride=4,
    time_stride=4,
    max_length=16,
    num_mel_bins=8,
)
SPECTROGRAM_BLOCKS = present(
    SPECTROGRAM,
    numbered("audio_spectrogram_transformer.layers"),
    numbered("audio_spectrogram_transformer.encoder.layer"),
)


# ------------------------------------------------------------------------------------------------------------ the table

TABLE: tuple[Architecture, ...] = (
    text_encoder("BERT", "Bert", blocks=numbered("bert.encoder.layer")),
    text_encoder(
        "DistilBERT",
        "DistilBert",
        blocks=numbered("distilbert.transformer.layer"),
        settings=TOKENS | POSITIONS | {"dim": WIDTH, "n_layers": N_BLOCKS, "n_heads": HEADS, "hidden_dim": INNER},
        mlp="ffn.lin2",
        attention="attention.out_lin",
    ),
    text_encoder("RoBERTa", "Roberta", blocks=numbered("roberta.encoder.layer"), final="classifier.out_proj"),
    text_encoder("XLM-RoBERTa", "XLMRoberta", blocks=numbered("roberta.encoder.layer"), final="classifier.out_proj"),
    text_encoder("CamemBERT", "Camembert", blocks=numbered("roberta.encoder.layer"), final="classifier.out_proj"),
    text_encoder(
        "ALBERT",
        "Albert",
        blocks=("albert.encoder.albert_layer_groups.0",) * N_BLOCKS,
        settings=TOKENS | SIZES | POSITIONS | {"embedding_size": 16},
        mlp="albert_layers.0.ffn_output",
        attention="albert_layers.0.attention.dense",
        note="one block called once for each layer: its weights are shared",
    ),
    text_encoder(
        "ELECTRA",
        "Electra",
        blocks=numbered("electra.encoder.layer"),
        settings=TOKENS | SIZES | POSITIONS | {"embedding_size": 16},
        final="classifier.out_proj",
    ),
    text_encoder(
        "DeBERTa",
        "Deberta",
        blocks=numbered("deberta.encoder.layer"),
        settings=TOKENS | SIZES | POSITIONS | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    text_encoder(
        "DeBERTa-v2",
        "DebertaV2",
        blocks=numbered("deberta.encoder.layer"),
        settings=TOKENS
        | SIZES
        | POSITIONS
        | {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
        },
    ),
    text_encoder(
        "MPNet",
        "MPNet",
        blocks=numbered("mpnet.encoder.layer"),
        attention="attention.attn.o",
        final="classifier.out_proj",
    ),
    text_encoder(
        "ModernBERT",
        "ModernBert",
        blocks=numbered("model.layers"),
        settings=TOKENS
        | SIZES
        | POSITIONS
        | {"local_attention": 4, "cls_token_id": BEGIN, "sep_token_id": END, "classifier_pooling": "cls"},
        mlp="mlp.Wo",
        attention="attn.Wo",
        n_comparable=N_BLOCKS - 1,
        hidden_states_note=LAST_VARIES,
    ),
    text_encoder(
        "ModernBERT, mean pooling",
        "ModernBert",
        blocks=numbered("model.layers"),
        settings=TOKENS
        | SIZES
        | POSITIONS
        | {"local_attention": 4, "cls_token_id": BEGIN, "sep_token_id": END, "classifier_pooling": "mean"},
        mlp="mlp.Wo",
        attention="attn.Wo",
        readout="mean",
        n_comparable=N_BLOCKS - 1,
        hidden_states_note=LAST_VARIES,
    ),
    text_encoder(
        "NomicBERT",
        "NomicBert",
        blocks=numbered("nomic_bert.layers"),
        mlp="mlp.down_proj",
        attention="self_attn.o_proj",
    ),
    text_encoder(
        "Longformer",
        "Longformer",
        blocks=numbered("longformer.encoder.layer"),
        settings=TOKENS | SIZES | POSITIONS | {"attention_window": 8},
        final="classifier.out_proj",
        note="blocks see more rows than the input has: it is padded to a multiple of the attention window",
    ),
    text_encoder(
        "BigBird",
        "BigBird",
        blocks=numbered("bert.encoder.layer"),
        settings=TOKENS | SIZES | POSITIONS | {"attention_type": "original_full"},
        final="classifier.out_proj",
        note="with full attention, as the library gives it for short texts",
    ),
    text_encoder(
        "BigBird, block-sparse",
        "BigBird",
        blocks=numbered("bert.encoder.layer"),
        settings=TOKENS
        | SIZES
        | POSITIONS
        | {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1},
        inputs=long_texts,
        final="classifier.out_proj",
        padding_changes_answers=True,
        note="blocks see more rows than the input has: it is padded to a multiple of the attention's block; which "
        f"rows attend to which depends on the padded length: {PADDING_IS_READ}; after one short batch the library "
        "replaces the attention modules by full ones, for good",
    ),
    text_encoder(
        "FNet",
        "FNet",
        blocks=numbered("fnet.encoder.layer"),
        settings=TOKENS | POSITIONS | {"hidden_size": WIDTH, "num_hidden_layers": N_BLOCKS, "intermediate_size": INNER},
        preprocess=TokenPreprocess(before=(BEGIN,), after=(END,), mask=None),
        attention=None,
        n_heads=None,
        padding_changes_answers=True,
        note=f"Fourier mixing in place of attention, and no mask: {PADDING_IS_READ}",
    ),
    text_encoder(
        "XLNet",
        "XLNet",
        n_heads=None,  # its projection is a bare parameter
        blocks=numbered("transformer.layer"),
        settings=TOKENS | {"d_model": WIDTH, "n_layer": N_BLOCKS, "n_head": HEADS, "d_inner": INNER},
        preprocess=TokenPreprocess(after=(END, BEGIN), left=True),
        readout="last",
        mlp="ff.layer_2",
        attention=None,
        final="logits_proj",
        row_first=True,
        note="its [CLS] is the last row, behind left padding; blocks see (row, example, unit); the projection of its "
        "attention is a bare parameter, and `rel_attn` gives the normalised sum with its input",
    ),
    text_encoder(
        "ConvBERT",
        "ConvBert",
        n_heads=None,  # heads and convolution share the projection's input
        blocks=numbered("convbert.encoder.layer"),
        settings=TOKENS | SIZES | POSITIONS | {"embedding_size": WIDTH, "head_ratio": 2, "conv_kernel_size": 3},
        final="classifier.out_proj",
        padding_changes_answers=True,
        note="half of the heads are convolutions, which read padding: " + PADDING_IS_READ,
    ),
    text_encoder(
        "RemBERT",
        "RemBert",
        blocks=numbered("rembert.encoder.layer"),
        settings=TOKENS | SIZES | POSITIONS | {"input_embedding_size": 16, "output_embedding_size": 16},
    ),
    text_encoder(
        "ESM",
        "Esm",
        blocks=numbered("esm.encoder.layer"),
        settings=TOKENS | SIZES | POSITIONS | {"position_embedding_type": "rotary", "mask_token_id": 4},
        final="classifier.out_proj",
        n_comparable=N_BLOCKS - 1,
        hidden_states_note=LAST_IS_NORMED,
    ),
    text_encoder(
        "Nystromformer",
        "Nystromformer",
        blocks=numbered("nystromformer.encoder.layer"),
        settings=TOKENS | SIZES | POSITIONS | {"conv_kernel_size": 5},
        final="classifier.out_proj",
        padding_changes_answers=True,
        note="a convolution over the values reads padding: " + PADDING_IS_READ,
    ),
    text_encoder(
        "YOSO",
        "Yoso",
        n_heads=None,  # there is no softmax whose heads could be weakened one by one
        blocks=numbered("yoso.encoder.layer"),
        final="classifier.out_proj",
        padding_changes_answers=True,
        note=f"the library (5.23) hands it a mask of the wrong kind, which then masks nothing: {PADDING_IS_READ}",
    ),
    text_encoder(
        "RoFormer",
        "RoFormer",
        blocks=numbered("roformer.encoder.layer"),
        settings=TOKENS | SIZES | POSITIONS | {"embedding_size": WIDTH},
        final="classifier.out_proj",
    ),
    text_encoder(
        "data2vec text", "Data2VecText", blocks=numbered("data2vec_text.encoder.layer"), final="classifier.out_proj"
    ),
    text_encoder(
        "MobileBERT",
        "MobileBert",
        blocks=numbered("mobilebert.encoder.layer"),
        settings=TOKENS
        | SIZES
        | POSITIONS
        | {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2},
        attention_width=16,
        note="a block works at a smaller width inside; of its several feed-forwards the last one is the site",
    ),
    text_encoder(
        "SqueezeBERT",
        "SqueezeBert",
        blocks=(),
        settings=TOKENS | SIZES | POSITIONS | {"embedding_size": WIDTH},
        refused="blocks",
        note="its encoder calls the blocks' `forward` past their hooks, and each gives a dictionary of (example, unit, "
        "row): no block can be tapped",
    ),
    causal_decoder(
        "GPT-2",
        "GPT2",
        blocks=numbered("transformer.h"),
        settings={"n_inner": INNER},
        mlp="mlp.c_proj",
        attention="attn.c_proj",
        note="its linear maps are the library's own transposed class",
    ),
    causal_decoder(
        "GPT-2",
        "GPT2",
        blocks=numbered("transformer.h"),
        settings={"n_inner": INNER},
        mlp="mlp.c_proj",
        attention="attn.c_proj",
        left=True,
        padding_changes_answers=True,
        note="positions count padding unless they are given: " + PADDING_IS_READ,
    ),
    causal_decoder(
        "GPT-NeoX",
        "GPTNeoX",
        blocks=numbered("gpt_neox.layers"),
        mlp="mlp.dense_4h_to_h",
        attention="attention.dense",
        note="attention and feed-forward side by side on the same input",
    ),
    causal_decoder(
        "OPT",
        "OPT",
        blocks=numbered("model.decoder.layers"),
        settings={"ffn_dim": INNER, "word_embed_proj_dim": WIDTH},
        mlp="fc2",
        attention="self_attn.out_proj",
        note="its feed-forward sees the rows of all examples in one axis: (example x row, unit)",
    ),
    causal_decoder(
        "BLOOM",
        "Bloom",
        blocks=numbered("transformer.h"),
        mlp="mlp.dense_4h_to_h",
        mlp_width=4 * WIDTH,
        attention="self_attention.dense",
    ),
    causal_decoder("Llama", "Llama", settings=GROUPED),
    causal_decoder("Llama", "Llama", settings=GROUPED, left=True),
    causal_decoder("Mistral", "Mistral", settings=GROUPED | {"sliding_window": 4}),
    causal_decoder("Qwen2", "Qwen2", settings=GROUPED),
    causal_decoder("Qwen3", "Qwen3", settings=GROUPED | {"head_dim": 8}),
    causal_decoder("Gemma", "Gemma", settings={"num_key_value_heads": 1, "head_dim": 8}),
    causal_decoder("Phi", "Phi", mlp="mlp.fc2", attention="self_attn.dense"),
    causal_decoder(
        "Mixtral",
        "Mixtral",
        settings=GROUPED | {"num_local_experts": 4},
        mlp=None,
        note="a mixture of experts held in fused weights: no module is a down projection",
    ),
    causal_decoder(
        "Qwen2-MoE",
        "Qwen2Moe",
        settings=GROUPED | {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": INNER},
        mlp="mlp.shared_expert.down_proj",
        note="the down projection is that of the expert every token shares; the others are held in fused weights; "
        "the feed-forward sees the rows of all examples in one axis: (example x row, unit)",
    ),
    Architecture(
        name="BART",
        family="encoder-decoder",
        build=library_model(
            "BartForSequenceClassification",
            config="BartConfig",
            scale=3.0,
            **(TOKENS | POSITIONS),
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=N_BLOCKS,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=INNER,
            decoder_ffn_dim=INNER,
            decoder_start_token_id=END,
            forced_eos_token_id=None,
        ),
        preprocess=TokenPreprocess(before=(BEGIN,), after=(END,)),
        inputs=texts,
        n_blocks=N_BLOCKS,
        block_names=numbered("model.decoder.layers"),
        readout="last",
        mlp=inside(numbered("model.decoder.layers"), "fc2"),
        mlp_width=INNER,
        attention=inside(numbered("model.decoder.layers"), "self_attn.out_proj"),
        final="classification_head.out_proj",
        hidden_states=library_states("decoder_hidden_states"),
        n_comparable=N_BLOCKS,
        hidden_states_note=ALL_PLAIN,
        note="the decoder's blocks, which also attend to the encoder; read where the input has its end mark",
    ),
    Architecture(
        name="T5",
        family="encoder-decoder",
        build=library_model(
            "T5ForSequenceClassification",
            config="T5Config",
            scale=1.0,
            **T5_SIZES,
            num_layers=2,
            num_decoder_layers=N_BLOCKS,
            decoder_start_token_id=PAD,
        ),
        preprocess=TokenPreprocess(after=(END,)),
        inputs=texts,
        n_blocks=N_BLOCKS,
        block_names=numbered("transformer.decoder.block"),
        readout="last",
        mlp=inside(numbered("transformer.decoder.block"), "layer.2.DenseReluDense.wo"),
        mlp_width=INNER,
        attention=inside(numbered("transformer.decoder.block"), "layer.0.SelfAttention.o"),
        final="classification_head.out_proj",
        hidden_states=library_states("decoder_hidden_states"),
        n_comparable=N_BLOCKS - 1,
        hidden_states_note=LAST_IS_NORMED,
        note="the decoder's blocks; encoder and decoder have blocks of one class and width",
    ),
    Architecture(
        name="T5 encoder, mean pooling",
        family="encoder-decoder",
        build=library_model(
            "T5EncoderModel", config="T5Config", scale=1.0, wrapped=MeanPooledEncoder, **T5_SIZES, num_layers=N_BLOCKS
        ),
        preprocess=TokenPreprocess(after=(END,)),
        inputs=texts,
        n_blocks=N_BLOCKS,
        block_names=numbered("encoder.encoder.block"),
        readout="mean",
        mlp=inside(numbered("encoder.encoder.block"), "layer.1.DenseReluDense.wo"),
        mlp_width=INNER,
        attention=inside(numbered("encoder.encoder.block"), "layer.0.SelfAttention.o"),
        final="head",
        note="the encoder alone, under a head of the user's own",
    ),
    vision("ViT", "ViT", prefix="vit"),
    vision("DeiT", "DeiT", prefix="deit", note="row 1 is the distillation token, which nothing reads"),
    vision(
        "DeiT with its distillation head",
        "DeiT",
        prefix="deit",
        model="DeiTForImageClassificationWithTeacher",
        readout="first-two",
        final=None,
        note="two linear heads, on [CLS] and on the distillation token, are averaged",
    ),
    vision(
        "BEiT",
        "Beit",
        prefix="beit",
        settings={"image_size": 12, "patch_size": 4}
        | SIZES
        | {"vocab_size": VOCABULARY, "use_relative_position_bias": True},
        readout="mean-but-first",
    ),
    vision(
        "DINOv2",
        "Dinov2",
        prefix="dinov2",
        settings={
            "image_size": 12,
            "patch_size": 4,
            "hidden_size": WIDTH,
            "num_hidden_layers": N_BLOCKS,
            "num_attention_heads": HEADS,
            "mlp_ratio": 2,
        },
        mlp_width=2 * WIDTH,
        readout="first-and-mean",
        note="the head sees [CLS] beside the mean of the patches",
    ),
    Architecture(
        name="Swin",
        family="vision",
        build=SWIN,
        preprocess=StackedArrays("pixel_values"),
        inputs=arrays(3, 16, 16),
        n_blocks=N_BLOCKS,
        block_names=SWIN_BLOCKS,
        readout="mean",
        mlp=present(SWIN, inside(SWIN_BLOCKS, "mlp.fc2"), inside(SWIN_BLOCKS, "output.dense")),
        mlp_width=INNER,
        n_heads=None,
        final="classifier",
        hidden_states_note="one state for each stage, not for each block",
        note="the last stage's blocks: earlier stages have other widths; attention works on windows, so its output is "
        "(window, row, unit)",
    ),
    Architecture(
        name="ConvNeXt",
        family="vision",
        build=library_model(
            "ConvNextForImageClassification",
            config="ConvNextConfig",
            scale=3.0,
            num_stages=2,
            hidden_sizes=[16, WIDTH],
            depths=[2, N_BLOCKS],
            patch_size=2,
        ),
        preprocess=StackedArrays("pixel_values"),
        inputs=arrays(3, 16, 16),
        n_blocks=N_BLOCKS,
        block_names=(),
        readout="mean",
        n_heads=None,
        refused="blocks",
        note="a convolutional network: its blocks give (example, unit, height, width)",
    ),
    Architecture(
        name="Audio Spectrogram Transformer",
        family="audio",
        build=SPECTROGRAM,
        preprocess=StackedArrays("input_values"),
        inputs=arrays(16, 8),
        n_blocks=N_BLOCKS,
        block_names=SPECTROGRAM_BLOCKS,
        readout="first-two",
        mlp=present(SPECTROGRAM, inside(SPECTROGRAM_BLOCKS, "mlp.fc2"), inside(SPECTROGRAM_BLOCKS, "output.dense")),
        mlp_width=INNER,
        attention=present(
            SPECTROGRAM,
            inside(SPECTROGRAM_BLOCKS, "attention.o_proj"),
            inside(SPECTROGRAM_BLOCKS, "attention.output.dense"),
        ),
        final="classifier.dense",
        hidden_states=library_states(),
        n_comparable=N_BLOCKS - 1,
        hidden_states_note=LAST_VARIES,
        note="the mean of [CLS] and of the distillation token",
    ),
    speech("Wav2Vec2", "Wav2Vec2", prefix="wav2vec2", masked=False),
    speech("Wav2Vec2 with a mask", "Wav2Vec2", prefix="wav2vec2", masked=True),
    speech("HuBERT", "Hubert", prefix="hubert", masked=False),
    speech("HuBERT with a mask", "Hubert", prefix="hubert", masked=True),
    plain(
        "nn.TransformerEncoder",
        lambda: TokenEncoder(nested=True),
        note="as torch builds it: without gradients its fast path passes the modules inside a block by, and with a "
        "padding mask hands nested tensors from block to block, without the rows of padding",
    ),
    plain(
        "nn.TransformerEncoder, mean pooling",
        lambda: TokenEncoder(mean=True),
        readout="mean",
        note="without nested tensors; the fast path remains",
    ),
    plain("nn.TransformerEncoder, rows before examples", lambda: TokenEncoder(batch_first=False), row_first=True),
    plain(
        "nn.TransformerEncoder, normalisation first",
        lambda: TokenEncoder(norm_first=True, norm=nn.LayerNorm(WIDTH)),
    ),
    plain(
        "nn.TransformerEncoder on a time series",
        SeriesEncoder,
        preprocess=PaddedArrays("values", mask="mask"),
        inputs=series,
        readout="mean",
    ),
    plain(
        "nn.TransformerEncoder on a table's rows",
        TabularEncoder,
        preprocess=StackedArrays("features"),
        inputs=arrays(8),
    ),
)
