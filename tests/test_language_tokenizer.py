"""Tokenizers made here survive saving, and batches encode as single texts do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from unified_rl.envs.language import ChainMod, Codec, Segment, character_tokenizer, load_tokenizer, train_bpe
from unified_rl.envs.language.chain_mod import ALPHABET
from unified_rl.errors import ConfigError

CORPUS = ["Tom has 48 apples and 7 pears.\n#### 55", "Ann sold 12 of her 30 clips, née 18.\n"] * 20


def test_characters_are_one_token_each_and_survive_saving(tmp_path: Path) -> None:
    made = character_tokenizer("ab \n+")
    made.save_pretrained(tmp_path)
    read = load_tokenizer(tmp_path)
    text = "a + b\nab  b"
    for tokenizer in (made, read):
        ids = tokenizer(text)["input_ids"]
        assert ids == [4, 6, 8, 6, 5, 7, 4, 5, 6, 6, 5]
        assert tokenizer.decode(ids) == text
    assert [read.pad_token_id, read.bos_token_id, read.eos_token_id, read.unk_token_id] == [0, 1, 2, 3]
    assert read.padding_side == "left"


def test_byte_pairs_round_trip_text_they_never_saw_and_keep_digits_single(tmp_path: Path) -> None:
    train_bpe(CORPUS, 300).save_pretrained(tmp_path)
    read = load_tokenizer(tmp_path)
    text = "Zoë's  1234 pears\n\t= ∑"
    ids = read(text)["input_ids"]
    assert read.decode(ids) == text
    tokens = [read.decode([i]) for i in ids]
    assert not any(sum(c.isdigit() for c in t) > 1 for t in tokens)


def test_byte_pair_training_repeats_exactly() -> None:
    assert train_bpe(CORPUS, 300).get_vocab() == train_bpe(CORPUS, 300).get_vocab()


def _without(folder: Path, *names: str) -> Path:
    character_tokenizer(ALPHABET).save_pretrained(folder)
    for file in folder.glob("*.json"):
        content = json.loads(file.read_text())
        if isinstance(content, dict):
            for name in names:
                content.pop(name, None)
            file.write_text(json.dumps(content))
    return folder


def test_a_tokenizer_without_pad_pads_with_end_of_text_and_masks_stay_right(tmp_path: Path) -> None:
    env = ChainMod(terms=3, tokenizer=str(_without(tmp_path, "pad_token")))
    assert env.tokenizer.pad_token_id == env.tokenizer.eos_token_id
    rows = env.demonstrations(8, torch.Generator().manual_seed(0), "direct")
    assert rows["token_mask"].sum(-1).tolist() == [6 + 2 + 1] * 8  # prompt 1+2+3=, answer >6, end of text
    assert rows["mask"].sum(-1).tolist() == [3] * 8


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eos_token"):
        load_tokenizer(_without(tmp_path, "eos_token"))


def test_hub_names_and_empty_folders_are_refused_without_a_look_at_any_network(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a folder"):
        load_tokenizer("gpt2")
    with pytest.raises(ConfigError, match="no readable tokenizer"):
        load_tokenizer(tmp_path)


def test_batch_encoding_is_the_tokenizer_itself() -> None:
    texts = ["1+2=", "", ">3,4é", "="]
    for tokenizer in (character_tokenizer(ALPHABET), train_bpe(CORPUS, 300)):
        codec = Codec(tokenizer)
        expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        assert codec.encode(texts) == expected
        assert codec.decode([*expected[0], tokenizer.eos_token_id, tokenizer.pad_token_id]) == "1+2="


def test_the_character_table_is_used_for_characters_only() -> None:
    assert Codec(character_tokenizer(ALPHABET))._table is not None
    assert Codec(train_bpe(CORPUS, 300))._table is None


def test_stop_ids_hold_end_of_text_and_tokens_that_end_a_turn() -> None:
    tokenizer = character_tokenizer("12;")
    assert Codec(tokenizer).stop_ids() == [2]
    assert Codec(tokenizer).stop_ids(";") == [2, 6]
    with pytest.raises(ConfigError, match="'!'"):
        Codec(tokenizer).stop_ids("!")


def test_rows_lay_segments_out_and_train_on_marked_ones() -> None:
    codec = Codec(character_tokenizer("ab?"))
    rows = codec.rows(
        [[Segment("ab"), Segment("b", trained=True), Segment("?"), Segment("a", True, True)], [Segment("b")]], 7
    )
    assert rows["tokens"].tolist() == [[4, 5, 5, 6, 4, 2, 0], [5, 0, 0, 0, 0, 0, 0]]
    assert rows["mask"].int().tolist() == [[0, 0, 1, 0, 1, 1, 0], [0] * 7]
    assert rows["token_mask"].sum(-1).tolist() == [6, 1]
    with pytest.raises(ConfigError, match="row 0"):
        codec.rows([[Segment("abab")]], 3)
