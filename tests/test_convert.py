"""Models converted to GGUF, read by llama.cpp itself, and to other types in Hugging Face layout."""

import json
import os
import random
import subprocess
import sys
import unicodedata
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE, TINY, mesh_of, random_params, text_run

from lacuna import checkpoint, cli, weights
from lacuna.apps.configs import ConvertConfig
from lacuna.checkpoint import OpenedModel
from lacuna.config import ModelKeys, SamplingKeys, UserError
from lacuna.model import (
    Lora,
    ModelConfig,
    embed,
    forward,
    head_of,
    logits_of,
    read_model_config,
    shape_of,
    trained_table,
)
from lacuna.sampler import Request, Sampler
from lacuna.tokenizer import Tokenizer, encode, load_tokenizer, render

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed: uv sync --extra gguf")
llama_cpp = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("xllamacpp"),
    reason="NOTHING IS PROVEN IN LLAMA.CPP: there is no wheel of xllamacpp for this machine",
)
# Of each type of file, how far llama.cpp's log-probabilities may be from ours, which are of the float32 weights
BOUNDS = {"f32": 1e-5, "f16": 0.03, "bf16": 0.05, "q8_0": 0.2}
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "torch_dtype": "float32",
}  # fmt: skip
FAMILIES = {
    "qwen2": "qwen2.5", "qwen3": "qwen3", "llama3": "llama-3.2", "mistral": "tinyllama-1.1b-chat", "smollm2": "gpt2",
}  # fmt: skip
ALL = [
    "qwen2", "qwen2_untied", "qwen3", "qwen3_yarn", "llama2", "llama3", "llama3_new", "mistral", "smollm2", "smollm3",
    "olmo2",
]  # fmt: skip
PIECES = [
    "0", "7", "42", "1234567", "3.14", "1,000", "1e-9", "٣٤", "²", "½", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n",
    " \n ", "'s", "'LL", "don't", "I'd've", "''", "’s", "é", "naïve", "ÅNGSTRÖM", "ß", "ﬁ", "你好", "日本語", "한국어",
    "ไทย", "हिन्दी", "العربية", "עברית", "👍", "🇩🇪", "🏳️‍🌈", "👩‍👩‍👧", "…", "—", "«»", "\u00a0", "\u200b", "\u3000", "_",
    "__init__", "CamelCase", "snake_case", "x+=1;", "{[(<>)]}", "http://a.b/c?d=e&f", "#!/bin/sh", "\\n", '"', "`",
    "$$", "%d", "@", "~", "the", " The", " hello", "World", "a", "zzzzzzzz", "......", "!!!", "?!", "-", "--", "=====",
]  # fmt: skip


def texts(tokenizer: Tokenizer) -> list[str]:
    """Two hundred awkward texts: the pieces alone and mixed, with the tokens that were added to a vocabulary."""
    draw = random.Random(0)
    added = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()][:8]
    mixed = ["".join(draw.choices([*PIECES, *added], k=draw.randint(2, 12))) for _ in range(200 - len(PIECES))]
    return [unicodedata.normalize("NFC", text) for text in [*PIECES, *mixed]]


# Of a process of its own, as it brings its own threads; its cache is in float32 and flash attention off
SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.port, params.verbosity = sys.argv[1], 2048, 1, 0, -1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.warmup, params.cpuparams.n_threads, params.cpuparams_batch.n_threads = False, 1, 1
server = xllamacpp.Server(params)
print("address", server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_server(path: Path) -> Generator[Any]:
    """llama.cpp with a model: what posts to one of its routes."""
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SERVER, str(path)], **pipes) as process:
        assert process.stdout and process.stdin and process.stderr
        address = next((line.split()[1] for line in process.stdout if line.startswith("address ")), "")
        assert address, process.stderr.read()

        def post(route: str, **fields: Any) -> Any:
            body, kind = json.dumps(fields).encode(), {"Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(address + route, body, kind)) as answer:
                return json.load(answer)

        try:
            yield post
        finally:
            process.kill()


def make_model(directory: Path, family: str, tokenizer: Path, seed: int = 0, **changes: Any) -> Path:
    """A random model of a family with a tokenizer, whose vocabulary has five rows that are no tokens."""
    directory.mkdir(parents=True)
    for path in tokenizer.iterdir():
        if path.name != "config.json" and path.suffix in (".json", ".jinja"):
            (directory / path.name).write_bytes(path.read_bytes())
    raw = json.loads((REFERENCE / family / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | SIZES | {"vocab_size": 1, "eos_token_id": None} | changes))
    raw |= SIZES | {"eos_token_id": None, "vocab_size": load_tokenizer(directory).vocabulary_size + 5} | changes
    (directory / "config.json").write_text(json.dumps(raw))
    model = read_model_config(directory)
    params = random_params(model, seed)
    draw = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: leaf + 0.07 * draw.standard_normal(leaf.shape, np.float32), params)
    weights.write_weights(directory, params, model, {})
    return directory


@partial(jax.jit, static_argnames="model")
def our_logits(params: Any, model: ModelConfig, token: Any) -> jax.Array:
    position = jnp.broadcast_to(jnp.arange(token.shape[1]), token.shape)
    hidden = forward(params, embed(params, token, jnp.float32), jnp.ones_like(token), position, model)
    return logits_of(hidden, head_of(params, model), model.vocabulary_size)


def convert(source: Path, output: Path, **keys: Any) -> Path:
    cli.run(ConvertConfig(model_name=str(source), output=str(output), **keys))
    return output


Prompts = list[tuple[list[int], np.ndarray]]


def prompts_of(directory: Path) -> Prompts:
    """Random prompts of three lengths after which a plain token is likeliest, each with our log-probabilities."""
    model, tokenizer = read_model_config(directory), load_tokenizer(directory)
    params = weights.load_params(directory, model, mesh_of(1, 1, 1))
    draw, found = random.Random(1), Prompts()
    for length in (1, 7, 60):
        while len(found) == 0 or len(found[-1][0]) != length:
            ids = [draw.randrange(tokenizer.vocabulary_size) for _ in range(length)]
            logits = np.asarray(our_logits(params, model, np.array([ids + [0] * (60 - length)])), np.float64)
            ours = logits[0, length - 1] - np.log(np.sum(np.exp(logits[0, length - 1])))
            if is_plain(tokenizer, int(np.argmax(ours))):
                found.append((ids, ours))
    return found


def is_plain(tokenizer: Tokenizer, id: int) -> bool:
    """Whether a token is whole characters; llama.cpp states no log-probabilities with an end, or a part of one."""
    token = tokenizer.backend.id_to_token(id)
    return token is not None and token.isascii() and token.isprintable() and "<" not in token


def largest_difference(post: Any, prompts: Prompts) -> float:
    """Of the log-probabilities of the 100 likeliest next tokens, ours from llama.cpp's."""
    found = []
    for ids, ours in prompts:
        answer = post("/completion", prompt=ids, n_predict=1, n_probs=100, temperature=0)
        likeliest = answer["completion_probabilities"][0]["top_logprobs"]
        assert len(likeliest) == 100
        found += [abs(ours[each["id"]] - each["logprob"]) for each in likeliest]
    return max(found)


CHAT = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "  What's 12×3?\n"},
    {"role": "assistant", "content": "36 — easy 👍"}, {"role": "user", "content": 'And "x" & <y>?'},
]  # fmt: skip


@llama_cpp
@pytest.mark.reference
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_has_our_ids_probabilities_and_chats_with_real_tokenizers(
    family: str, shelf: Path, tmp_path: Path
) -> None:
    source = make_model(tmp_path / "model", family, shelf / "tokenizers" / FAMILIES[family])
    tokenizer = load_tokenizer(source)
    with llama_server(convert(source, tmp_path / "model.gguf", to="gguf")) as post:
        for text in texts(tokenizer):
            found = post("/tokenize", content=text, parse_special=True)["tokens"]
            assert found == tokenizer.backend.encode(text, add_special_tokens=False).ids, text
        assert largest_difference(post, prompts_of(source)) < BOUNDS["f32"]
        if tokenizer.template is not None:
            day = {"date_string": "26 Jul 2024"}  # Llama's template would write today's
            chat = post("/apply-template", messages=CHAT, chat_template_kwargs=day)["prompt"]
            ours = render(tokenizer, CHAT, add_generation_prompt=True)
            assert chat == (ours.removeprefix("<|begin_of_text|>"))  # which it adds as it encodes
            ids = post("/tokenize", content=chat, add_special=True, parse_special=True)["tokens"]
            assert ids == encode(tokenizer, ours, add_special_tokens=False).tolist()


@llama_cpp
@pytest.mark.parametrize("family", ALL)
def test_llama_cpp_computes_our_log_probabilities_in_every_type(family: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", family, TINY)
    prompts = prompts_of(source)
    for kind, bound in BOUNDS.items():
        with llama_server(convert(source, tmp_path / f"{kind}.gguf", to="gguf", type=kind)) as post:
            assert largest_difference(post, prompts) < bound, kind


@pytest.mark.parametrize("kind", ["bf16", "f16", "auto"])
def test_a_model_in_another_type_states_it_and_has_its_values_rounded_once(kind: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", "qwen3", TINY)
    directory = convert(source, tmp_path / "out", type=kind)
    dtype = {"bf16": "bfloat16", "f16": "float16", "auto": "float32"}[kind]
    described = json.loads((source / "config.json").read_text()) | {"torch_dtype": dtype}
    assert json.loads((directory / "config.json").read_text()) == described
    for name, tensor in weights.model_tensors(directory).items():
        wanted = np.asarray(weights.model_tensors(source)[name]).astype(jnp.dtype(dtype)).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(tensor), wanted)
    assert {path.name for path in directory.iterdir()} == {path.name for path in source.iterdir()}


@pytest.mark.parametrize("family", ["qwen3", "llama2", "olmo2"])
@pytest.mark.parametrize("adapter", ["all_linear", "query_value"])
def test_an_adapter_merged_into_its_base_has_the_logits_of_peft(family: str, adapter: str, tmp_path: Path) -> None:
    place, base = REFERENCE / "adapters" / family, str(REFERENCE / family)
    merged = convert(place / adapter, tmp_path / "merged", base_name=base, type="f32")
    model, expected = read_model_config(merged), np.load(place / "expected.npz")
    logits = our_logits(weights.load_params(merged, model, mesh_of(1, 1, 1)), model, expected["input_ids"])
    np.testing.assert_allclose(logits, expected[adapter], rtol=1e-5, atol=1e-5)
    assert np.max(np.abs(expected[adapter] - expected["base"])) > 0.1
    again = convert(place / adapter, tmp_path / "again", base_name=base, to="peft")
    written, stated = weights.open_tensors([again / weights.ADAPTER_WEIGHTS]), place / adapter / weights.ADAPTER_WEIGHTS
    for name, tensor in weights.open_tensors([stated]).items():
        assert tensor.equals(written.pop(name))
    assert not written and weights.read_lora(again) == weights.read_lora(place / adapter)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama3"])
def test_a_model_saved_by_bitsandbytes_is_dequantised(family: str, tmp_path: Path) -> None:
    place = REFERENCE / "quantised" / family
    plain = convert(place, tmp_path / "plain", type="f32")
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    model, expected = read_model_config(plain), np.load(place / "expected.npz")
    assert model.file_bits == 0
    ours = our_logits(weights.load_params(plain, model, mesh_of(1, 1, 1)), model, expected["input_ids"])
    np.testing.assert_allclose(ours, expected["logits"], rtol=2e-5, atol=2e-5)


def test_an_adapter_is_merged_into_the_base_that_it_was_trained_on(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "qwen3", TINY, head_dim=32, intermediate_size=128)
    lora = Lora(4, 8.0, True, ("q_proj", "down_proj"))
    model = replace(read_model_config(base), lora=lora)
    (described := tmp_path / "described").mkdir()
    (described / "adapter_config.json").write_text(weights.adapter_config(model, str(base)))
    draw = np.random.default_rng(5)
    factors = jax.tree.map(
        lambda row: 0.3 * draw.standard_normal(shape_of(row, model.sizes), np.float32), trained_table(model)
    )
    facts = {checkpoint.BASE: weights.files_digest(weights.weight_files(base)), checkpoint.BITS: "4"}
    checkpoint.save_model(tmp_path / "adapter", factors, model, described, facts, base)
    ids = np.arange(24).reshape(2, 12)
    opened = checkpoint.open_model(ModelKeys(model_name=str(tmp_path / "adapter")), mesh_of(1, 1, 1))
    assert opened.model.bits == 4
    wanted, found = our_logits(checkpoint.opened_params(opened), opened.model, ids), {}
    for onto in ("trained", "original"):
        merged = convert(tmp_path / "adapter", tmp_path / onto, onto=onto)
        plain = read_model_config(merged)
        found[onto] = our_logits(weights.load_params(merged, plain, mesh_of(1, 1, 1)), plain, ids)
    np.testing.assert_allclose(found["trained"], wanted, rtol=1e-5, atol=1e-5)
    assert np.max(np.abs(found["original"] - wanted)) > 0.01
    make_model(tmp_path / "changed", "qwen3", TINY, seed=9, head_dim=32, intermediate_size=128)
    (tmp_path / "changed" / "model.safetensors").replace(base / "model.safetensors")
    with pytest.raises(UserError, match="not the weights that the adapter .* was trained on"):
        convert(tmp_path / "adapter", tmp_path / "other")


def test_a_checkpoint_becomes_the_same_file_as_the_model_it_was_saved_from(small: Path, tmp_path: Path) -> None:
    cli.run(config := text_run(small, steps=1, save_every=1))
    run = config.run_directory
    files = [
        convert(place, tmp_path / f"{number}.gguf", to="gguf", type="q8_0", name="same").read_bytes()
        for number, place in enumerate((run, run / "model", checkpoint.checkpoint_directory(run, 1)))
    ]
    assert len({*files}) == 1


def test_a_file_states_what_it_is(tmp_path: Path) -> None:
    source = make_model(tmp_path / "acme", "llama3", TINY, max_position_embeddings=99)
    (source / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# Acme\n")
    for kind, types in {"q8_0": {"Q8_0", "F32"}, "q4_0": {"Q4_0", "Q8_0", "F32"}, "bf16": {"BF16", "F32"}}.items():
        read = gguf.GGUFReader(convert(source, tmp_path / f"{kind}.gguf", to="gguf", type=kind))
        assert {tensor.tensor_type.name for tensor in read.tensors} == types
    found = {key: field.contents() for key, field in read.fields.items()}
    raw, tokenizer = json.loads((source / "config.json").read_text()), load_tokenizer(source)
    wanted = {
        "general.architecture": "llama", "general.name": "acme", "general.license": "apache-2.0",
        "llama.context_length": 99, "llama.rope.freq_base": raw["rope_theta"], "llama.attention.head_count_kv": 2,
        "llama.vocab_size": tokenizer.vocabulary_size + 5, "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id, "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": tokenizer.template_source,
    }  # fmt: skip
    assert {key: found.get(key) for key in wanted} == wanted
    assert "output.weight" not in {tensor.name for tensor in read.tensors}  # its head is the embedding
    assert found["tokenizer.ggml.token_type"] == [3] * 3 + [1] * (tokenizer.vocabulary_size - 3) + [5] * 5


UNKNOWN = [
    ({"pre_tokenizer": {"type": "Digits", "individual_digits": False}}, "no name for how it splits text.*Digits"),
    ({"pre_tokenizer": None}, "no name for how it splits text"),
    ({"normalizer": {"type": "Lowercase"}}, "no name for how it splits text.*normalizer Lowercase"),
    ({"model.ignore_merges": True}, "no name for how it splits text.*ignore_merges True"),
    ({"model.dropout": 0.5}, "have no dropout; use --to hf"),
    ({"model.byte_fallback": True}, "merges are not those of SentencePiece"),
]


@pytest.mark.parametrize(("changed", "message"), UNKNOWN)
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = make_model(tmp_path / "model", "qwen3", TINY)
    raw = json.loads((source / "tokenizer.json").read_text())
    for key, value in changed.items():
        *outer, name = key.split(".")
        (raw[outer[0]] if outer else raw)[name] = value
    (source / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "model.gguf", to="gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_what_would_be_lost_or_overwritten_is_refused(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", "qwen3", TINY)
    with pytest.raises(UserError, match="is there already"):
        convert(source, source)
    with pytest.raises(ValueError, match="q8_0 is only for GGUF"):
        ConvertConfig(model_name=str(source), output="x", type="q8_0")
    with pytest.raises(UserError, match="is no low-rank adapter, so there is nothing for --to peft"):
        convert(source, tmp_path / "adapter", to="peft")
    with pytest.raises(UserError, match="onto = original, but no adapter is merged"):
        convert(source, tmp_path / "plain", onto="original")
    with pytest.raises(ValueError, match="name is only for GGUF"):
        ConvertConfig(model_name=str(source), output="x", name="mine")
    values = weights.model_tensors(source)
    huge = {name: np.asarray(tensor) * (1e6 if "q_proj" in name else 1) for name, tensor in values.items()}
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in huge.items()}
    weights.write_safetensors(source / "model.safetensors", shapes, huge.values())
    with pytest.raises(UserError, match="attn_q.weight has values that F16 can't hold; take --type bf16 or f32"):
        convert(source, tmp_path / "model.gguf", to="gguf", type="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    bias = make_model(tmp_path / "bias", "qwen3", TINY, attention_bias=True)
    with pytest.raises(UserError, match="config.json: llama.cpp has no attention_bias in a qwen3; use --to hf"):
        convert(bias, tmp_path / "model.gguf", to="gguf")


def test_a_file_whose_writer_was_killed_does_not_have_its_name(tmp_path: Path) -> None:
    source, output = make_model(tmp_path / "model", "qwen3", TINY), tmp_path / "model.gguf"
    program = f"""
import os, signal, sys
import gguf
from lacuna import cli
from lacuna.apps.configs import ConvertConfig
from lacuna.checkpoint import OpenedModel
from lacuna.config import ModelKeys, SamplingKeys, UserError
write, count = gguf.GGUFWriter.write_tensor_data, 0
def killed(*arguments):
    global count
    count += 1
    write(*arguments)
    if count == 9:
        arguments[0].flush()
        os.kill(os.getpid(), signal.SIGKILL)
gguf.GGUFWriter.write_tensor_data = killed
cli.run(ConvertConfig(model_name={str(source)!r}, output={str(output)!r}, to="gguf"))
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    left = tmp_path / "model.gguf.tmp"
    assert left.stat().st_size > 0 and not output.exists()
    assert convert(source, output, to="gguf").is_file() and not left.exists()


# A real model: LACUNA_SMOLLM2=DIRECTORY uv run pytest -n 0 -s -m slow tests/test_convert.py


@pytest.fixture(scope="module")
def real() -> OpenedModel:
    if "LACUNA_SMOLLM2" not in os.environ:
        pytest.skip("LACUNA_SMOLLM2 names no directory with SmolLM2-135M-Instruct")
    config = ModelKeys(model_name=os.environ["LACUNA_SMOLLM2"], compute_dtype="float32")
    return checkpoint.open_model(config, mesh_of(1, 1, 1))


@llama_cpp
@pytest.mark.slow
@pytest.mark.reference
def test_a_real_model_gives_the_same_greedy_answers_in_llama_cpp(
    real: OpenedModel, shelf: Path, tmp_path: Path
) -> None:
    rows = (shelf / "chat" / "oasst_en_threads.jsonl").read_text().splitlines()
    firsts = dict.fromkeys(json.loads(row)["messages"][0]["content"] for row in rows)
    chats = [render(real.tokenizer, [{"role": "user", "content": text}], None, True) for text in [*firsts][:20]]
    prompts = [encode(real.tokenizer, chat, add_special_tokens=False).tolist() for chat in chats]
    rules = SamplingKeys(temperature=0.0, max_tokens=64)
    sampler = Sampler(checkpoint.opened_params(real), real, slots=20, capacity=1024, dtype="float32")
    ends = tuple(real.tokenizer.ends)
    ours = sampler.generate([Request(tuple(prompt), rules, stop_ids=ends) for prompt in prompts])
    source = Path(os.environ["LACUNA_SMOLLM2"])
    with llama_server(convert(source, tmp_path / "f32.gguf", to="gguf", type="f32")) as post:
        for chat, prompt, answer in zip(chats, prompts, ours, strict=True):
            assert post("/tokenize", content=chat, add_special=True, parse_special=True)["tokens"] == prompt
            found = post("/completion", prompt=prompt, n_predict=64, temperature=0, return_tokens=True)["tokens"]
            assert [id for id in found if id not in ends] == [id for id in answer.tokens if id not in ends], chat


@llama_cpp
@pytest.mark.slow
@pytest.mark.reference
def test_a_real_models_perplexity_in_llama_cpp_is_ours(real: OpenedModel, shelf: Path, tmp_path: Path) -> None:
    text = (shelf / "shakespeare" / "input.txt").read_text()[:8000]
    ids = encode(real.tokenizer, text, add_special_tokens=False).tolist()
    rows = [ids[start : start + 512] for start in range(0, 2048, 512)]
    params, model = checkpoint.opened_params(real), real.model
    position, ours, theirs = jnp.arange(512)[None], list[float](), list[float]()
    for row in rows:
        token = jnp.array([row])
        hidden = forward(params, embed(params, token, jnp.float32), jnp.ones_like(token), position, model)
        logits = jax.nn.log_softmax(logits_of(hidden, head_of(params, model), model.vocabulary_size)[0])
        ours += [float(logits[place - 1, row[place]]) for place in range(1, 512)]
    with llama_server(
        convert(Path(os.environ["LACUNA_SMOLLM2"]), tmp_path / "f16.gguf", to="gguf", type="f16")
    ) as post:
        for row in rows:
            for place in range(1, 512):  # the bias makes it sample the next token, whose own probability it states
                answer = post(
                    "/completion", prompt=row[:place], n_predict=1, n_probs=1, logit_bias=[[row[place], 1000.0]]
                )
                (stated,) = answer["completion_probabilities"]
                assert stated["id"] == row[place]
                theirs.append(stated["logprob"])
    here, there = (float(np.exp(-np.mean(each))) for each in (ours, theirs))
    print(
        f"perplexity of {len(ours)} tokens: {here:.4f} here, {there:.4f} in llama.cpp (F16), ratio {there / here:.6f}"
    )
    assert abs(there / here - 1) < 1e-3
