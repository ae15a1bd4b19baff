"""A model as one GGUF file, the format of llama.cpp and of all that is built on it.

llama.cpp knows how a tokenizer splits text only by name. The name is derived from the rules in tokenizer.json, and a
tokenizer whose rules have none is refused: a wrong name gives other ids and no error.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import quant_shape_to_byte_shape, quantize
from gguf.tensor_mapping import get_tensor_name_map
from jaxtyping import PyTree
from tokenizers.pre_tokenizers import ByteLevel

from lacuna.config import UserError
from lacuna.documents import progress
from lacuna.model import ModelConfig, Parameter, parameter_table, rotary_frequencies
from lacuna.tokenizer import Tokenizer, has_bos, read_json, read_keys, render
from lacuna.weights import file_names, file_shape, file_tensor

ARCHITECTURES = {"mistral": "llama"}  # llama.cpp's names where they are not the families'
PERMUTED = ("llama", "mistral", "smollm3")  # families whose rotary pairs llama.cpp has side by side
BIASED = ("llama", "qwen2")  # families whose biases of config.json llama.cpp reads
UNROTATED_EVERY = 4  # layers, as llama.cpp has it for SmolLM3
TYPE, FILE = GGMLQuantizationType, LlamaFileType
# By type of file: its number there, the type of matrices, and that of embedding and head
TYPES = {
    "f32": (FILE.ALL_F32, TYPE.F32, TYPE.F32), "f16": (FILE.MOSTLY_F16, TYPE.F16, TYPE.F16),
    "bf16": (FILE.MOSTLY_BF16, TYPE.BF16, TYPE.BF16), "q8_0": (FILE.MOSTLY_Q8_0, TYPE.Q8_0, TYPE.Q8_0),
    "q4_0": (FILE.MOSTLY_Q4_0, TYPE.Q4_0, TYPE.Q8_0),
}  # fmt: skip
QUANTIZATION_VERSION = 2
YARN_BETAS = {"beta_fast": (float, 32.0), "beta_slow": (float, 1.0)}
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's name by how a byte-level tokenizer splits text, and by whether it looks for whole words before it merges
SPLITTERS = {
    (("words of gpt-2",), False): "gpt-2",
    (("digits", "words of gpt-2"), False): "smollm",
    ((WORDS % "", "bytes"), False): "qwen2",
    ((WORDS % "{1,3}", "bytes"), True): "llama-bpe",
    ((WORDS % "{1,3}", "bytes"), False): "dbrx",
}
SPACE = "▁"  # what SentencePiece writes for a space
PREPENDED, REPLACED = (
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
)

Merges = list[tuple[str, str]]


class Vocabulary(NamedTuple):
    """A tokenizer as keys of a GGUF file, and in words where llama.cpp will differ from it."""

    keys: dict[str, Any]
    notes: list[str]


def vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The tokenizer of a model whose embedding has `size` rows.

    Raises:
        UserError: llama.cpp has no name for how it splits text, or can't do what it does.
    """
    where, raw = tokenizer.directory / "tokenizer.json", json.loads(tokenizer.backend.to_str())
    ids, added = tokenizer.backend.get_vocab(with_added_tokens=True), tokenizer.backend.get_added_tokens_decoder()
    if len(ids) > size or max(ids.values()) >= size:
        raise UserError(f"{where}: it has {len(ids)} tokens, and config.json's vocab_size is {size}")
    model = raw["model"]
    refused = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if model["type"] != "BPE" or refused:
        raise UserError(f"{where}: llama.cpp's tokenizers have no {', '.join(refused) or model['type']}; use --to hf")
    merges: Merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    keys, notes = (sentence_piece if model.get("byte_fallback") else byte_level)(raw, merges, where)
    tokens, types = [f"[PAD{id}]" for id in range(size)], [int(TokenType.UNUSED)] * size
    for token, id in ids.items():
        is_byte = "scores" in keys and re.fullmatch("<0x[0-9A-F]{2}>", token)
        tokens[id], types[id] = token, int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for id, token in added.items():
        types[id] = int(TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
        if token.lstrip or token.rstrip or token.single_word or (token.normalized and raw["normalizer"]):
            notes.append(
                f"{token.content!r} is found as it is written; its rules about spaces and normalising are lost"
            )
    if "scores" in keys:
        keys["scores"] = [keys["scores"].get(token, 0.0) for token in tokens]
        if (unknown := ids.get(model.get("unk_token"))) is not None:
            types[unknown], keys["unknown_token_id"] = int(TokenType.UNKNOWN), unknown
    keys |= {"tokens": tokens, "token_type": types} | special_ids(tokenizer, notes)
    if tokenizer.template_source:
        keys["chat_template"] = tokenizer.template_source
    if tokenizer.tool_source != tokenizer.template_source:
        keys |= {"chat_template.tool_use": tokenizer.tool_source, "chat_templates": ["tool_use"]}
    prefix = {key: key if key.startswith("chat_template") else f"ggml.{key}" for key in keys}
    return Vocabulary({f"tokenizer.{prefix[key]}": value for key, value in keys.items()}, notes)


def special_ids(tokenizer: Tokenizer, notes: list[str]) -> dict[str, Any]:
    """The keys of the tokens that begin, end and pad, with whether BOS and EOS are added to a text."""
    backend, ends = tokenizer.backend, sorted(tokenizer.ends, key=lambda end: end != tokenizer.eos_id)
    bare, whole = (backend.encode("a", add_special_tokens=each).ids for each in (False, True))
    adds_bos, adds_eos = whole[:1] != bare[:1], whole[-1:] != bare[-1:]
    if [*[tokenizer.bos_id] * adds_bos, *bare, *[tokenizer.eos_id] * adds_eos] != whole:
        raise UserError(f"{tokenizer.directory}: encoding puts {whole} around {bare}, which is not just BOS and EOS")
    named: dict[str, Any] = {"bos": tokenizer.bos_id} | dict(zip(("eos", "eot", "eom"), ends, strict=False))
    named["padding"] = backend.token_to_id(tokenizer.special_tokens.get("pad_token", ""))
    if len(ends) > 3:
        lost = ", ".join(repr(backend.id_to_token(end)) for end in ends[3:])
        notes.append(f"answers also end at {lost}, which llama.cpp knows only by its own list of names")
    if adds_bos and not chats_begin_with_bos(tokenizer):
        adds_bos = False
        notes.append("plain text gets no BOS, as chats have none by this template and llama.cpp would add it to them")
    if "strftime_now" in tokenizer.template_source + tokenizer.tool_source:
        notes.append("the chat template writes the day, which is today's there")
    ids = {f"{name}_token_id": id for name, id in named.items() if id is not None}
    return ids | {"add_bos_token": adds_bos, "add_eos_token": adds_eos}


def chats_begin_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether the chat template writes BOS; true if there is none, or it refuses so short a chat."""
    try:
        return tokenizer.template is None or has_bos(tokenizer, render(tokenizer, [{"role": "user", "content": "?"}]))
    except ValueError:
        return True


def byte_level(raw: Mapping[str, Any], merges: Merges, where: Path) -> Vocabulary:
    """What only a tokenizer over bytes has."""
    splitter, normalizer = raw["pre_tokenizer"] or {}, (raw["normalizer"] or {}).get("type")
    rules = tuple(splitting(part) for part in splitter.get("pretokenizers", [splitter]))
    is_whole_first = bool(raw["model"].get("ignore_merges"))
    name = SPLITTERS.get((rules, is_whole_first))
    if name is None or normalizer not in (None, "NFC"):
        found = "; ".join([*rules, f"normalizer {normalizer}", f"ignore_merges {is_whole_first}"])
        raise UserError(f"{where}: llama.cpp has no name for how it splits text, and a wrong one errs unseen: {found}")
    if raw["model"].get("unk_token") and set(ByteLevel.alphabet()) - raw["model"]["vocab"].keys():
        raise UserError(f"{where}: bytes that are no tokens become unk_token, which llama.cpp leaves out; use --to hf")
    notes = ["text is not composed (Unicode NFC) before it is encoded"] * (normalizer is not None)
    return Vocabulary({"model": "gpt2", "pre": name, "merges": [" ".join(pair) for pair in merges]}, notes)


def splitting(part: Mapping[str, Any]) -> str:
    """How a step of a pre-tokenizer splits text: a regular expression, or the name of what it does."""
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return "words of gpt-2" if part["use_regex"] else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return pattern
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}:
            return pattern  # what matches is kept, and everything matches
    return json.dumps(part, ensure_ascii=False)


def sentence_piece(raw: Mapping[str, Any], merges: Merges, where: Path) -> Vocabulary:
    """What only a SentencePiece tokenizer has; the order of its merges is that of its scores."""
    vocab, pairs = raw["model"]["vocab"], set(merges)
    made = [token for token, _ in groupby("".join(pair) for pair in merges)]
    splits = ((token[:at], token[at:]) for token in vocab for at in range(1, len(token)))
    lost = [pair for pair in splits if pair not in pairs and vocab.keys() >= {*pair}]
    if lost or len(set(made)) < len(made):
        raise UserError(
            f"{where}: its merges are not those of SentencePiece, as which llama.cpp would read it; use --to hf"
        )
    if not vocab.keys() >= {f"<0x{code:02X}>" for code in range(256)}:
        raise UserError(f"{where}: not all of the 256 bytes are tokens, which llama.cpp needs; use --to hf")
    has_prefix, notes = False, list[str]()
    match (raw["normalizer"] or {}).get("normalizers", [raw["normalizer"]]), raw["pre_tokenizer"]:
        case steps, None if steps == [PREPENDED, REPLACED]:
            has_prefix = True
        case steps, None if steps == [REPLACED]:
            pass
        case [None], {"type": "Metaspace", "prepend_scheme": "first" | "never" as scheme, "split": False}:
            first = "text that does not begin with a special token, as chats do, lacks the space before it"
            notes += [first] * (scheme == "first")
        case steps, splitter:
            found = json.dumps([*steps, splitter], ensure_ascii=False)
            raise UserError(f"{where}: llama.cpp can't do what precedes the merges, {found}; use --to hf")
    scores = {token: -float(rank) for rank, token in enumerate(made)}
    return Vocabulary({"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": has_prefix}, notes)


def architecture(model: ModelConfig, described: Path) -> tuple[str, dict[str, Any]]:
    """llama.cpp's name of a model's family, and the keys that describe the model, without the name before them.

    Raises:
        UserError: llama.cpp computes something else for this model.
    """
    path, heads = described / "config.json", model.kv_heads * model.group
    refused = {
        f"attention_bias in a {model.family}": model.has_bias and model.family not in BIASED,
        f"no_rope_layers = {model.unrotated_layers}": model.family == "smollm3"
        and model.unrotated_layers != tuple(range(UNROTATED_EVERY - 1, model.layers, UNROTATED_EVERY)),
    }
    keys: dict[str, Any] = {
        "block_count": model.layers, "context_length": model.capacity(model.max_positions),
        "embedding_length": model.embed, "feed_forward_length": model.feedforward, "attention.head_count": heads,
        "attention.head_count_kv": model.kv_heads, "attention.key_length": model.head,
        "attention.value_length": model.head, "attention.layer_norm_rms_epsilon": model.norm_epsilon,
        "rope.dimension_count": model.head, "rope.freq_base": model.rope_theta, "vocab_size": model.vocabulary_size,
    }  # fmt: skip
    if model.rope_type == "yarn":
        raw = read_json(path)
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        factor, _, _, magnitude = model.rope_scaling
        original = rope.get("original_max_position_embeddings") or raw["max_position_embeddings"]
        refused["truncate = false"] = rope.get("truncate") is False
        refused["an attention_factor of its own"] = not np.isclose(magnitude, 0.1 * np.log(max(factor, 1.0)) + 1)
        scaling = {"type": "yarn", "factor": factor, "original_context_length": int(original)}
        scaling |= {f"yarn_{name}": value for name, value in read_keys(rope, YARN_BETAS, str(path)).items()}
        keys |= {f"rope.scaling.{name}": value for name, value in scaling.items()}
    for name, is_refused in refused.items():
        if is_refused:
            raise UserError(f"{path}: llama.cpp has no {name}; use --to hf")
    return ARCHITECTURES.get(model.family, model.family), keys


def kind_keys(kind: str) -> dict[str, int]:
    """The keys that say of what type a file is."""
    return {"general.file_type": int(TYPES[kind][0]), "general.quantization_version": QUANTIZATION_VERSION}


def gguf_tensors(
    params: PyTree, model: ModelConfig, name: str, kind: str
) -> Iterator[tuple[str, GGMLQuantizationType, tuple[int, ...], Any]]:
    """Of each tensor its name and type in a GGUF file of this kind, its shape, and a function that reads it."""
    known = get_tensor_name_map(next(key for key, value in MODEL_ARCH_NAMES.items() if value == name), model.layers)
    _, matrix, vocab = TYPES[kind]
    if model.rope_type == "llama3":
        plain = model.rope_theta ** -(np.arange(0, model.head, 2) / model.head)
        factors = (plain / rotary_frequencies(model)).astype(np.float32)
        yield "rope_freqs.weight", TYPE.F32, factors.shape, lambda: factors

    def read(leaf: Any, row: Parameter, layer: int) -> np.ndarray:
        values = file_tensor(leaf, row, layer, model, np.float32)
        if model.family in PERMUTED and row.file_name.startswith(("self_attn.q_proj", "self_attn.k_proj")):
            values = values.reshape(-1, 2, model.head // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        return values

    table = parameter_table(model)
    for row, leaf in zip(jax.tree.leaves(table), jax.tree.structure(table).flatten_up_to(params), strict=True):
        shape = file_shape(row, model)
        chosen = TYPE.F32 if row.role in ("norm", "bias") else vocab if row.axes.startswith("vocab") else matrix
        try:
            quant_shape_to_byte_shape(shape, chosen)
        except ValueError:  # a row that does not fill its blocks
            chosen = TYPE.F16
        for layer, file_name in enumerate(file_names(row, model)):
            named = known.get_name(file_name, try_suffixes=(".weight", ".bias"))
            assert named, file_name
            yield named, chosen, shape, (lambda leaf=leaf, row=row, layer=layer: read(leaf, row, layer))


def write_gguf(
    path: Path, params: PyTree, model: ModelConfig, keys: Mapping[str, Any], name: str, kind: str
) -> dict[str, int]:
    """Write a GGUF file, tensor by tensor; how many tensors have each type. A file of its name is whole.

    Raises:
        UserError: values that are not finite, or not in this type, or no room on the disk.
    """
    scratch = path.with_name(path.name + ".tmp")
    writer, tensors = GGUFWriter(scratch, name), list(gguf_tensors(params, model, name, kind))
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            (writer.add_string if isinstance(value, str) else writer.add_array)(key, value)
    for named, chosen, shape, _ in tensors:
        size = quant_shape_to_byte_shape(shape, chosen)
        writer.add_tensor_info(named, size, np.dtype(np.uint8), int(np.prod(size)), chosen)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress() as line, np.errstate(over="ignore"):
            for named, chosen, _, read in line.track(tensors, description="Writing tensors"):
                values = np.ascontiguousarray(read())
                packed = quantize(values, chosen)
                if not np.isfinite(packed if packed.dtype == np.float16 else values).all():
                    raise UserError(f"{named} has values that {chosen.name} can't hold; take --type bf16 or f32")
                writer.write_tensor_data(packed.view(np.uint8))
        writer.flush()
        for file in writer.fout or ():
            os.fsync(file.fileno())
        writer.close()
        os.replace(scratch, path)
    finally:
        writer.close()
        scratch.unlink(missing_ok=True)
    counts = [chosen.name for _, chosen, *_ in tensors]
    return {each: counts.count(each) for each in dict.fromkeys(counts)}
