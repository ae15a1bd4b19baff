"""New words: the tokenizer, the rows they begin with, the rows that pad them, and what is exported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, chat_run, mesh_of, outcome, random_params

from lacuna import checkpoint, cli, weights
from lacuna.config import DataSource, SftConfig, UserError
from lacuna.data import load_dataset
from lacuna.model import read_model_config
from lacuna.optimizer import starting_state
from lacuna.tokenizer import decode, encode, load_tokenizer, read_words

WORDS = ["<a_1>", "<a_2>", "<b_17>", "<c_0>", "<c_9>"]


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("".join(f"{word}\n" for word in WORDS))
    return path


@pytest.fixture
def trained(small: Path) -> Path:
    """The small model with weights, the rows of its vocabulary around 0.3."""
    model = read_model_config(small)
    params = random_params(model, 1)
    params["embedding"] += 0.3
    weights.write_weights(small, params, model, {})
    return small


def grown(small: Path, words: Path, **changes: Any) -> SftConfig:
    settings: dict[str, Any] = {"new_tokens": str(words), "from_scratch": False, "steps": 2, "eval_data": ()}
    return chat_run(small, **settings | changes)


def test_words_become_tokens_and_all_other_ids_stay() -> None:
    before, after = load_tokenizer(TINY), load_tokenizer(TINY, words=WORDS)
    count = before.vocabulary_size
    assert (after.vocabulary_size, after.new_words) == (count + 5, tuple(WORDS))
    text = "Sam has <a_1><b_17> and <c_9>\n"
    ids = encode(after, text, add_special_tokens=False).tolist()
    assert decode(after, ids) == decode(after, ids, skip_special_tokens=True) == text
    assert [each for each in ids if each >= count] == [count, count + 2, count + 4]
    pieces = ["Sam has ", " and ", "\n"]
    plain = [encode(before, piece, add_special_tokens=False).tolist() for piece in pieces]
    assert [each for each in ids if each < count] == sum(plain, [])
    known = load_tokenizer(TINY, words=["<|im_end|>", "<a_1>", "<a_1>"])
    assert known.new_words == ("<a_1>",)  # neither those that are tokens already nor one twice


@pytest.mark.parametrize("text", ["", "a\n\nb\n", " a\n", "a\tb\n", "\n"])
def test_a_line_that_is_no_word_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "words.txt").write_text(text)
    with pytest.raises(UserError, match="line"):
        read_words(tmp_path / "words.txt")
    with pytest.raises(UserError, match="No such file"):
        read_words(tmp_path / "none.txt")


@pytest.mark.parametrize("is_tied", [True, False])
def test_rows_of_new_words_begin_like_old_ones(trained: Path, words: Path, is_tied: bool) -> None:
    """On one device, and on four that pad the vocabulary."""
    model = read_model_config(trained)
    if not is_tied:
        raw = json.loads((trained / "config.json").read_text())
        (trained / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": False}))
        model = read_model_config(trained)
        weights.write_weights(trained, random_params(model, 2), model, {})
    words.write_text("".join(f"<x_{n}>\n" for n in range(401)))
    old, found = model.vocabulary_size, {}
    for shape in ((1, 1, 1), (1, 2, 4)):
        config = grown(trained, words)
        opened = checkpoint.open_model(config, mesh_of(*shape))
        state = starting_state(config, opened)
        assert opened.model.vocabulary_size == old + 401
        for name in ("embedding", *([] if is_tied else ["head"])):
            table = np.asarray(state.params[name])
            stored = np.asarray(
                weights.model_tensors(trained)["model.embed_tokens.weight" if name == "embedding" else "lm_head.weight"]
            )
            np.testing.assert_array_equal(table[:old], stored)
            assert not table[old + 401 :].any() and len(table) == old + (401 if shape[2] == 1 else 404)
            rows = table[old : old + 401]
            np.testing.assert_allclose(rows.mean(0), stored.mean(0), atol=5 * stored.std() / 20)
            np.testing.assert_allclose(rows.std(0), stored.std(0), rtol=0.25)
            np.testing.assert_allclose(found.setdefault(name, rows), rows, rtol=1e-5, atol=1e-6)
    normal = starting_state(grown(trained, words, new_token_init="normal"), opened)
    rows = np.asarray(normal.params["embedding"])[old : old + 401]
    assert abs(rows.mean()) < 0.001 and rows.std() == pytest.approx(0.02, rel=0.05)


def test_words_take_the_rows_that_a_table_has_unused(trained: Path, words: Path) -> None:
    """As Qwen's does: the first words lie on rows that exist, and begin like the others."""
    raw, tokens = json.loads((trained / "config.json").read_text()), load_tokenizer(trained).vocabulary_size
    (trained / "config.json").write_text(json.dumps(raw | {"vocab_size": tokens + 2}))
    model = read_model_config(trained)
    params = random_params(model, 1)
    weights.write_weights(trained, params | {"embedding": params["embedding"].at[tokens:].set(99.0)}, model, {})
    config = grown(trained, words)
    opened = checkpoint.open_model(config, mesh_of(1, 1, 1))
    table = np.asarray(starting_state(config, opened).params["embedding"])
    assert opened.model.vocabulary_size == len(table) == tokens + 5
    assert np.abs(table).max() < 1
    words.write_text("<a_1>\n")
    assert checkpoint.open_model(config, mesh_of(1, 1, 1)).model.vocabulary_size == tokens + 2


def test_a_run_with_new_words_exports_them_and_resumes(
    trained: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trained / "rows.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"Next of <a_1><b_17>, {n}?\n", "completion": "<a_2><c_0>\n"}) + "\n"
            for n in range(40)
        )
    )
    source = {"path": str(trained / "rows.jsonl"), "prompt_format": "text", "encode_apart": True}
    whole = grown(trained, words, data=(source,), run_name="whole", steps=4, batch_size=8, save_every=2)
    cli.run(whole)
    model_directory = whole.run_directory / "model"
    exported, model = load_tokenizer(model_directory), read_model_config(model_directory)
    before = load_tokenizer(trained).vocabulary_size
    assert exported.vocabulary_size == model.vocabulary_size == before + 5 and not exported.new_words
    assert encode(exported, "<c_9> <a_1>", add_special_tokens=False).tolist()[0] == before + 4
    tensors = weights.model_tensors(model_directory)
    assert tensors["model.embed_tokens.weight"].shape[0] == before + 5
    again = chat_run(trained, model_name=str(whole.run_directory / "best"), new_tokens=str(words))
    opened = checkpoint.open_model(
        again.model_copy(update={"model_name": str(whole.run_directory / "checkpoints" / "step_00000004")}),
        mesh_of(1, 1, 1),
    )
    assert not opened.tokenizer.new_words  # it has them already
    np.testing.assert_array_equal(
        np.asarray(checkpoint.opened_params(opened)["embedding"]), np.asarray(tensors["model.embed_tokens.weight"])
    )
    halved = whole.model_copy(update={"run_name": "halved"})
    with monkeypatch.context() as patch:
        patch.setattr("lacuna.trainer.Stop.is_due", lambda self, step: step == 2)
        cli.run(halved)
    cli.run(halved.model_copy(update={"resume": True}))
    assert outcome(halved) == outcome(whole)
    words.write_text("<a_1>\n")
    with pytest.raises(UserError, match="was .* and is|has changed since"):
        cli.run(halved.model_copy(update={"resume": True}))


@pytest.mark.parametrize("is_tied", [True, False])
def test_only_the_rows_of_new_words_train_where_asked(trained: Path, words: Path, is_tied: bool) -> None:
    raw = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": is_tied}))
    weights.write_weights(trained, random_params(read_model_config(trained), 2), read_model_config(trained), {})
    rows = "".join(json.dumps({"prompt": f"{n} <a_1>\n", "completion": "<a_2><c_0>\n"}) + "\n" for n in range(16))
    (trained / "rows.jsonl").write_text(rows)
    source = {"path": str(trained / "rows.jsonl"), "prompt_format": "text", "encode_apart": True}
    changes: dict[str, Any] = {"data": (source,), "steps": 3, "batch_size": 8, "weight_decay": 0.5}
    config = grown(trained, words, train_only="new_tokens", **changes)
    cli.run(config)
    before, after = (weights.model_tensors(each) for each in (trained, config.run_directory / "model"))
    old = load_tokenizer(trained).vocabulary_size
    for name, tensor in before.items():
        now = np.asarray(after[name])
        np.testing.assert_array_equal(now[: len(np.asarray(tensor))], np.asarray(tensor))
    opened = checkpoint.open_model(config, mesh_of(1, 1, 1))
    begun = starting_state(config, opened, checkpoint.frozen_params(opened)).params
    for name in ("embedding", *([] if is_tied else ["head"])):
        now = np.asarray(after["model.embed_tokens.weight" if name == "embedding" else "lm_head.weight"])[old:]
        assert begun[name].shape == (5, now.shape[1]) and (now != np.asarray(begun[name])).any(axis=1).all()
    figures = [json.loads(line) for line in (config.run_directory / "metrics.jsonl").read_text().splitlines()]
    assert figures[-1]["loss"] < figures[0]["loss"]
    again = grown(config.run_directory / "model", words, train_only="new_tokens")
    for text, ids in ((None, range(old, old + 5)), ("<a_1>\n<c_9>\n", (old, old + 4))):  # they are its words by now
        words.write_text(text or words.read_text())
        rows = dict(checkpoint.open_model(again, mesh_of(1, 1, 1)).model.trained_rows)
        assert rows["embedding"] == rows.get("head", rows["embedding"]) == tuple(ids)
    with pytest.raises(ValueError, match="train_only = new_tokens needs new_tokens"):
        chat_run(trained, train_only="new_tokens")


# Prompts and completions apart


def rows_of(tmp_path: Path, rows: list[tuple[str, str]], train_on: str = "assistant", **columns: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in rows))
    config = chat_run(tmp_path / "small", packing=False, train_on=train_on)
    source = DataSource(path=str(path), prompt_format="text", **columns)
    return load_dataset([source], load_tokenizer(TINY), config, is_stream=False, is_shuffled=False)


def test_prompt_and_completion_are_encoded_apart_where_asked(small: Path) -> None:
    tokenizer, pairs = load_tokenizer(TINY), [("Sam has 1", "2 apples"), ("x", "y")]
    whole, apart = (rows_of(small.parent, pairs, encode_apart=value).documents[0] for value in (False, True))
    parts = [[encode(tokenizer, text, add_special_tokens=False) for text in pair] for pair in pairs]
    expected = np.array([id for prompt, completion in parts for id in (*prompt, *completion, tokenizer.eos_id)])
    np.testing.assert_array_equal(apart.token, expected)
    supervised = np.concatenate([[False] * len(a) + [True] * (len(b) + 1) for a, b in parts])
    np.testing.assert_array_equal(apart.supervised, supervised)
    assert len(whole.token) <= len(apart.token)
    everything = rows_of(small.parent, pairs, encode_apart=True, train_on="all").documents[0]
    assert everything.supervised.all() and everything.token.tolist() == apart.token.tolist()


def test_apart_is_refused_where_a_template_writes_the_prompt(small: Path) -> None:
    path = small / "heldout.jsonl"
    source = DataSource(path=str(path), encode_apart=True)
    with pytest.raises(UserError, match="encode_apart is for prompts with completions as text"):
        load_dataset([source], load_tokenizer(TINY), chat_run(small), is_stream=False, is_shuffled=False)


@pytest.mark.reference
def test_the_recipes_three_pieces_have_the_same_ids_on_all_rows(shelf: Path, tmp_path: Path) -> None:
    """Instruction, user input and target by Qwen2.5's tokenizer itself, for each row of valid and test."""
    out = tmp_path / "industrial"
    data = ["--data", str(shelf / "minionerec"), "--category", "Industrial_and_Scientific"]
    cli.start("recommend", ["prepare", *data, "--train", "train_recovered", "--out", str(out)])
    new = read_words(out / "new_tokens.txt")
    tokenizer = load_tokenizer(shelf / "tokenizers" / "qwen2.5", words=new)
    assert tokenizer.vocabulary_size == 151_665 + 560
    end = "### User Input: \n"
    titles = tmp_path / "titles.jsonl"
    lines = "".join((out / "test" / f"{task}.jsonl").read_text() for task in ("title_to_title", "fusion_seq_rec"))
    titles.write_text("".join(lines.splitlines(keepends=True)[::20]))
    for path in (out / "valid" / "sid_next_item.jsonl", out / "test" / "sid_next_item.jsonl", titles):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        config = chat_run(tmp_path / "small", packing=False, sequence_length=4096)
        source = DataSource(path=str(path), prompt_format="text", encode_apart=True)
        documents = load_dataset([source], tokenizer, config, is_stream=False, is_shuffled=False).documents[0]
        pieces = [
            text
            for row in rows
            for text in (
                row["prompt"].partition(end)[0], end + row["prompt"].partition(end)[2], row["completion"]
            )
        ]  # fmt: skip
        ids = [each.ids for each in tokenizer.backend.encode_batch(pieces)]
        three = zip(ids[::3], ids[1::3], ids[2::3], strict=True)
        expected = [id for i, p, c in three for id in (*i, *p, *c, tokenizer.eos_id)]
        assert documents.token.tolist() == expected
        assert documents.supervised.sum() == sum(len(completion) + 1 for completion in ids[2::3])
