"""Tokenizers made or read on this machine: characters, byte-pair encoding, a local folder. Never a hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from unified_rl.errors import ConfigError

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNK)


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """One token a character of ``alphabet``, after pad, bos, eos and unk (ids 0 to 3).

    Raises:
        ConfigError: an empty alphabet.
    """
    if not alphabet:
        raise ConfigError("a character tokenizer needs an alphabet of at least one character")
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *dict.fromkeys(alphabet)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return _wrap(backend)


def train_bpe(texts: Iterable[str], vocabulary_size: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding trained on ``texts``; digits stay single, so that numbers have one spelling.

    Raises:
        ConfigError: ``vocabulary_size`` below the 256 bytes and the special tokens.
    """
    least = 256 + len(SPECIAL)
    if vocabulary_size < least:
        raise ConfigError(f"vocabulary_size={vocabulary_size} is below the {least} bytes and special tokens; raise it")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _wrap(backend)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder (``save_pretrained`` writes one); runs no code from it.

    Raises:
        ConfigError: not a folder, nothing readable in it, or a tokenizer without an end-of-text token.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"tokenizer={path} is not a folder here; give a local folder (hub names are not looked up)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers each raise their own kinds
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{folder} holds no readable tokenizer: {first}") from error
    return with_padding(tokenizer)


def choose_tokenizer(path: str | None, alphabet: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the folder ``path``, or one of the characters of ``alphabet`` where no folder is given."""
    return character_tokenizer(alphabet) if path is None else load_tokenizer(path)


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with a pad token: the end-of-text token stands in where there is none.

    Records carry ``token_mask``, so nothing depends on the pad id being unused elsewhere.

    Raises:
        ConfigError: no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
