"""A small processor, and tokenizers with the quirks that real ones have."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from valley.media.sampling import Sampling
from valley.model.processing import ValleyProcessor
from valley.model.templates import TEMPLATES
from valley.model.tokenizer import prepare_tokenizer, tiny_tokenizer
from valley.model.video_processing import ValleyVideoProcessor

SIZE_PX = 16
NUM_PATCHES = 4


@pytest.fixture
def processor() -> ValleyProcessor:
    tokenizer = prepare_tokenizer(tiny_tokenizer(), TEMPLATES["valley"])
    return ValleyProcessor(
        tokenizer, ValleyVideoProcessor(SIZE_PX), num_patches=NUM_PATCHES, system="Be brief.", sampling=Sampling()
    )


@pytest.fixture
def sentencepiece() -> Callable[[str], PreTrainedTokenizerFast]:
    """Makes a tokenizer like LLaMA's: a BOS before every prompt, and a space before the first word of every text."""

    def make(prepend_scheme: str) -> PreTrainedTokenizerFast:
        letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:?#\\\n<>/_|"
        words = ["▁Human", "▁Assistant", "▁You", "You", "▁red", "red", "###", "▁"]
        pieces = [(piece, -1.0) for piece in (*letters, *words)]
        backend = Tokenizer(models.Unigram([("<unk>", 0.0), *pieces], unk_id=0, byte_fallback=False))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
        backend.add_special_tokens(["<unk>", "<s>", "</s>"])
        backend.post_processor = processors.TemplateProcessing(
            "<s> $A", "<s> $A $B", [("<s>", backend.token_to_id("<s>"))]
        )
        return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")

    return make
