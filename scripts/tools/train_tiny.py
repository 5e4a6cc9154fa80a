"""Train `assets/tiny-python`, a 5.6 M-parameter Qwen3 model of Python source, from scratch on a CPU.

The corpus is the standard library of the running interpreter, outside test folders; a document is one
top-level definition, terse unless asked otherwise: without comment lines and functions' docstrings, so that
the model gets to the code. The learning rate follows elapsed time, not steps: whatever the
machine's speed, the run is fully annealed when `--minutes` have passed. A run that was stopped goes on where
its last state was saved.

    scripts/dev train_tiny --out .scratch/whole --work .scratch/train --minutes 100 --documents whole
    scripts/dev train_tiny --out assets/tiny-python --work .scratch/tune --minutes 75 \\
                           --start-from .scratch/whole
    scripts/dev train_tiny --eval assets/tiny-python
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import math
import os
import random
import signal
import sysconfig
import time
import tokenize
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

EOS = "<|endoftext|>"
VOCAB_SIZE = 4096
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
HELD_OUT_PER_MILLE = 40
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# A line break keeps the indentation after it, so a block costs one token a line. Brackets never join a word:
# a prompt that ends in "(" or ":" then splits as it does in the corpus.
SPLIT = r"\s*[\r\n]+[ \t]*|[ ._]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[ \t]+"
CHAT_TEMPLATE = (
    "{%- set ns = namespace(text='') -%}"
    "{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
    "{%- set ns.text = message['content'] -%}"
    "{%- endif -%}{%- endfor -%}"
    "{%- for line in ns.text.strip().split('\\n') -%}{{- ('# ' + line).rstrip() + '\\n' -}}{%- endfor -%}"
    "{{- '\\ndef' -}}"
)


# ----------------------------------------------------------------------------------------------------- corpus


@dataclass(frozen=True)
class Document:
    text: str
    topic: str  # what a user might have asked for to get this definition
    held_out: bool


def terse(text: str) -> str:
    """`text` without comment lines and functions' docstrings; a class's docstring is cut to its first line.

    As it is where that would not be Python.
    """
    lines: list[str | None] = [*text.split("\n")]
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, DEFINITIONS) or not ast.get_docstring(node):
            continue
        docstring = node.body[0]
        first, end = docstring.lineno - 1, docstring.end_lineno or docstring.lineno
        if first == node.lineno - 1 or (len(node.body) > 1 and node.body[1].lineno <= end):
            continue  # shares a line with other code
        if isinstance(node, ast.ClassDef) or len(node.body) == 1:
            if end > first + 1:
                lines[first] = " " * docstring.col_offset + f'"""{_summary(node)}"""'
                lines[first + 1 : end] = [None] * (end - first - 1)
        else:
            while end < len(lines) and lines[end] == "":
                end += 1
            lines[first:end] = [None] * (end - first)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            lines[token.start[0] - 1] = None
    short = "\n".join(line for line in lines if line is not None)
    return short if parses(short) else text


def _summary(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    line = (ast.get_docstring(node) or "").strip().split("\n")[0].rstrip()
    return line.replace("\\", "").replace('"', "'")


def read_corpus(form: str) -> list[Document]:
    """Every top-level function and class of the standard library, decorators included, in a stable order.

    `form` is `whole` or `terse`; which documents are held out does not depend on it.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents: list[Document] = []
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):  # a few files are broken or Latin-1 on purpose
            continue
        lines = source.split("\n")
        for node in tree.body:
            if not isinstance(node, DEFINITIONS):
                continue
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            text = "\n".join(line.rstrip() for line in lines[first - 1 : node.end_lineno]) + "\n"
            if text in seen:  # a copy in the training part would make the held-out figure a lie
                continue
            seen.add(text)
            key = hashlib.sha256(f"{relative.as_posix()}:{node.name}".encode()).digest()
            held_out = int.from_bytes(key[:4], "big") % 1000 < HELD_OUT_PER_MILLE
            if form == "terse":
                text = terse(text)
            documents.append(Document(text, topic_of(node), held_out))
    return documents


def topic_of(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    doc = (ast.get_docstring(node) or "").strip()
    line = doc.split("\n")[0].strip()
    if 8 <= len(line) <= 100:
        return line
    return node.name.strip("_").replace("_", " ")


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def pack(documents: list[np.ndarray], width: int, rng: random.Random) -> np.ndarray:
    """Rows of `width` tokens. Each starts at the start of a document, or goes on with one longer than a row.

    Generation starts without an EOS before it, so position 0 has to look like a document's start here too.
    """
    rows: list[list[np.ndarray]] = []
    pieces: list[np.ndarray] = []
    room: dict[int, list[int]] = {}

    def leave(row: int, free: int) -> None:
        room.setdefault(free, []).append(row)

    for ids in documents:
        start = 0
        if len(ids) > width:
            start = rng.randint(width // 2, width)
            pieces.append(ids[:start])
            start -= 1  # the last token of a chunk is the first context of the next
            while len(ids) - start > width:
                rows.append([ids[start : start + width]])
                start += width - 1
            rows.append([ids[start:]])
            leave(len(rows) - 1, width - len(rows[-1][0]))
        else:
            pieces.append(ids)
    num_fixed = len(rows)
    pieces.sort(key=len, reverse=True)
    for piece in pieces:
        size = len(piece)
        best = min((free for free, members in room.items() if free >= size and members), default=None)
        if best is None:
            rows.append([piece])
            leave(len(rows) - 1, width - size)
        else:
            row = room[best].pop()
            rows[row].append(piece)
            leave(row, best - size)
    packed = np.empty((len(rows), width), dtype=np.int64)
    for index, members in enumerate(rows):
        if index >= num_fixed:
            rng.shuffle(members)
        free = width - sum(map(len, members))
        while free > 0:  # the hole at the end takes the head of some other document
            members.append(rng.choice(documents)[:free])
            free -= len(members[-1])
        cut = [
            m for m in members if m[-1] != 0
        ]  # without EOS at its end: only the last place of a row may hold it
        whole = [m for m in members if m[-1] == 0]
        if index < num_fixed:
            packed[index] = np.concatenate(members)
        else:
            packed[index] = np.concatenate(whole + cut)
    order = list(range(len(rows)))
    rng.shuffle(order)
    return packed[order]


class Batches:
    """Packed rows, epoch after epoch; an epoch is a pure function of the seed and its number."""

    def __init__(self, documents: list[Document], tokenizer: Tokenizer, epoch: int, seed: int) -> None:
        self.documents = documents
        self.tokenizer = tokenizer
        self.epoch = epoch
        self.seed = seed
        plain = tokenizer.encode_batch([d.text for d in documents])
        asked = tokenizer.encode_batch([f"# {d.topic}\n\n{d.text}" for d in documents])
        self.plain = [np.array([*e.ids, 0], dtype=np.int64) for e in plain]
        self.asked = [np.array([*e.ids, 0], dtype=np.int64) for e in asked]
        self.num_tokens = sum(map(len, self.plain))
        self.width = 0
        self.rows = np.empty((0, 0), dtype=np.int64)
        self.next = 0

    def take(self, num_tokens: int, context: int) -> Tensor:
        count = max(1, num_tokens // context)
        if self.width != context + 1 or self.next + count > len(self.rows):
            if self.width:
                self.epoch += 1
            rng = random.Random(f"{self.seed}:{self.epoch}")
            chosen = [a if rng.random() < 0.2 else p for p, a in zip(self.plain, self.asked, strict=True)]
            rng.shuffle(chosen)
            self.width = context + 1
            self.rows = pack(chosen, self.width, rng)
            self.next = 0
        rows = self.rows[self.next : self.next + count]
        self.next += count
        return torch.from_numpy(rows)


# ------------------------------------------------------------------------------------------------------ model


def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bf16 matrices in hardware; elsewhere fp32 is 20 times as fast."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@dataclass(frozen=True)
class Shape:
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 768
    vocab: int = VOCAB_SIZE
    eps: float = 1e-6
    theta: float = 10000.0


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q_proj = nn.Linear(s.hidden, s.heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)
        self.q_norm = RMSNorm(s.head_dim, s.eps)
        self.k_norm = RMSNorm(s.head_dim, s.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s, (batch, length, _) = self.s, x.shape
        q = self.q_norm(self.q_proj(x).view(batch, length, s.heads, s.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, length, s.kv_heads, s.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, s.kv_heads, s.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        groups = s.heads // s.kv_heads
        k = k[:, :, None].expand(-1, -1, groups, -1, -1).reshape(q.shape)
        v = v[:, :, None].expand(-1, -1, groups, -1, -1).reshape(q.shape)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        return attended


class MLP(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden, s.intermediate, bias=False)
        self.up_proj = nn.Linear(s.hidden, s.intermediate, bias=False)
        self.down_proj = nn.Linear(s.intermediate, s.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(s.hidden, s.eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = RMSNorm(s.hidden, s.eps)
        self.mlp = MLP(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Body(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.embed_tokens = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = RMSNorm(s.hidden, s.eps)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        inverse = self.s.theta ** (
            -torch.arange(0, self.s.head_dim, 2, dtype=torch.float32) / self.s.head_dim
        )
        angles = torch.outer(torch.arange(ids.shape[1], dtype=torch.float32), inverse).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        hidden: Tensor = self.norm(x)
        return hidden


class Qwen3(nn.Module):
    """Qwen3 with Hugging Face's tensor names; the head is the embedding."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.model = Body(s)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 if "embed" in name else p.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(p)  # each layer starts as the identity

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.model(ids), self.model.embed_tokens.weight)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(ids).float().flatten(0, 1), targets.flatten())


# -------------------------------------------------------------------------------------------------- optimizer


def orthogonalize(grads: Tensor) -> Tensor:
    """Newton-Schulz iteration on a stack of matrices (Muon, Jordan et al. 2024)."""
    x = grads
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        b = -4.7750 * a + 2.0315 * a @ a
        x = 3.4445 * x + b @ x
    orthogonal: Tensor = (x.mT if tall else x).float()
    return orthogonal


class Optimizer:
    """Muon for the matrices of the layers, AdamW for the rest; fp32 masters of the weights in `dtype`."""

    def __init__(self, model: Qwen3, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.params = dict(model.named_parameters())
        self.master = {n: p.detach().float().clone() for n, p in self.params.items()}
        self.first = {n: torch.zeros_like(m) for n, m in self.master.items()}
        self.second = {n: torch.zeros_like(m) for n, m in self.master.items() if not self.is_muon(n)}
        self.by_shape: dict[torch.Size, list[str]] = {}
        for n, m in self.master.items():
            if self.is_muon(n):
                self.by_shape.setdefault(m.shape, []).append(n)

    @staticmethod
    def is_muon(name: str) -> bool:
        return name.endswith("_proj.weight")

    def tensors(self) -> dict[str, Tensor]:
        groups = {"master": self.master, "first": self.first, "second": self.second}
        return {f"{g}/{n}": t for g, ts in groups.items() for n, t in ts.items()}

    @torch.no_grad()
    def load(self, saved: dict[str, Tensor]) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        for n, p in self.params.items():
            p.copy_(self.master[n])

    @torch.no_grad()
    def step(self, step: int, muon_lr: float, adam_lr: float, decay: float) -> None:
        momentum = 0.85 + 0.10 * min(1.0, step / 200)
        for shape, names in self.by_shape.items():
            updates = []
            for n in names:
                grad = self.params[n].grad
                assert grad is not None
                grad = grad.float()
                self.first[n].lerp_(grad, 1 - momentum)
                updates.append(grad.lerp(self.first[n], momentum))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for n, update in zip(names, orthogonalize(torch.stack(updates).to(self.dtype)), strict=True):
                self.master[n].mul_(1 - muon_lr * decay).add_(update, alpha=-muon_lr * scale)
        for n, second in self.second.items():
            grad = self.params[n].grad
            assert grad is not None
            grad = grad.float()
            self.first[n].lerp_(grad, 0.1)
            second.lerp_(grad.square(), 0.05)
            update = (self.first[n] / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
            if self.master[n].dim() == 2:
                self.master[n].mul_(1 - adam_lr * decay)
            self.master[n].add_(update, alpha=-adam_lr)
        for p in self.params.values():
            p.grad = None
        self.publish()


def schedule(done: float) -> float:
    """Trapezoid over elapsed time: a short climb, a plateau, then a straight line to nothing."""
    return min(done / 0.01 + 0.05, 1.0, max(0.0, (1.0 - done) / 0.65))


# ------------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def bits_per_byte(model: Qwen3, tokenizer: Tokenizer, texts: list[str], context: int) -> float:
    """Bits the model needs for each document and its EOS, over the documents' UTF-8 bytes.

    Each document stands alone after one EOS that is not counted; one longer than the context is read in
    windows that overlap by half, and each token is counted once.
    """
    windows: list[tuple[list[int], int]] = []  # ids, and how many of its last predictions count
    for text in texts:
        tokens = [0, *tokenizer.encode(text).ids, 0]
        scored = 1
        while scored < len(tokens):
            end = min(len(tokens), scored + (context if scored == 1 else context // 2))
            windows.append((tokens[max(0, end - context - 1) : end], end - scored))
            scored = end
    windows.sort(key=lambda w: len(w[0]))
    nats, at = 0.0, 0
    while at < len(windows):
        count = 1  # as many as fit a budget of tokens after padding
        while at + count < len(windows) and len(windows[at + count][0]) * (count + 1) <= 8192:
            count += 1
        batch = windows[at : at + count]
        at += count
        ids = torch.zeros(count, max(len(w) for w, _ in batch), dtype=torch.int64)
        counts = torch.zeros(count, ids.shape[1] - 1, dtype=torch.bool)
        for row, (window, num) in enumerate(batch):
            ids[row, : len(window)] = torch.tensor(window)
            counts[row, len(window) - 1 - num : len(window) - 1] = True
        hidden = model.model(ids[:, :-1])[counts]
        for h, t in zip(torch.split(hidden, 2048), torch.split(ids[:, 1:][counts], 2048), strict=True):
            logits = F.linear(h, model.model.embed_tokens.weight).float()
            nats += F.cross_entropy(logits, t, reduction="sum").item()
    return nats / math.log(2) / sum(len(t.encode()) for t in texts)


@torch.inference_mode()
def sample(
    model: Qwen3,
    tokenizer: Tokenizer,
    prompt: str,
    count: int,
    seed: int,
    max_tokens: int = 128,
    lines: int = 0,
) -> list[str]:
    """`count` texts at temperature 0.6 and top_p 0.9, cut at EOS; ends early once all have `lines` lines."""
    generator = torch.Generator().manual_seed(seed)
    rows = [tokenizer.encode(prompt).ids] * count
    unfinished = list(range(count))
    for _ in range(max_tokens):
        ids = torch.tensor([rows[i] for i in unfinished])
        hidden = model.model(ids)[:, -1]
        probs = (F.linear(hidden, model.model.embed_tokens.weight).float() / 0.6).softmax(-1)
        ranked, order = probs.sort(dim=-1, descending=True)
        ranked[ranked.cumsum(-1) - ranked >= 0.9] = 0.0
        tokens = order.gather(1, torch.multinomial(ranked, 1, generator=generator))[:, 0].tolist()
        for i, token in zip(unfinished, tokens, strict=True):
            rows[i] = [*rows[i], token]
        unfinished = [i for i in unfinished if not is_over(tokenizer, rows[i], lines)]
        if not unfinished:
            break
    return [tokenizer.decode(row[:-1] if row[-1] == 0 else row) for row in rows]


def is_over(tokenizer: Tokenizer, row: list[int], lines: int) -> bool:
    return row[-1] == 0 or (lines > 0 and tokenizer.decode(row).count("\n") > lines)


def parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def head_parses(text: str) -> bool:
    """Strict: the three leading lines are a module as they stand."""
    return parses("\n".join(text.split("\n")[:3]) + "\n")


def head_completes(text: str) -> bool:
    """Lenient: they are a module once an open block gets a `pass` or an open docstring its quotes."""
    head = "\n".join(text.split("\n")[:3])
    last = head.rstrip().split("\n")[-1]
    indent = len(last) - len(last.lstrip())
    endings = ["", *(f"\n{' ' * n}pass" for n in (indent, indent + 4)), '"""', "'''"]
    return any(parses(head + ending + "\n") for ending in endings)


def count_parsing_heads(model: Qwen3, tokenizer: Tokenizer, show: bool) -> dict[str, int]:
    result = {}
    for prompt in ("def", "class"):
        texts = sample(model, tokenizer, prompt, 40, seed=1, lines=3)
        result[f"{prompt}_strict"] = sum(map(head_parses, texts))
        result[f"{prompt}_completed"] = sum(map(head_completes, texts))
        if show:
            for text in texts[:3]:
                print(text, end="\n---\n")
    return result


# ----------------------------------------------------------------------------------------------------- export


def write_atomically(path: Path, data: bytes) -> None:
    scratch = path.with_name(path.name + ".part")
    scratch.write_bytes(data)
    os.replace(scratch, path)


def write_json(path: Path, value: object) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    scratch = path.with_name(path.name + ".part")
    save_file(tensors, scratch, metadata={"format": "pt"})
    os.chmod(scratch, 0o644)
    os.replace(scratch, path)


def export(model: Qwen3, tokenizer: Tokenizer, out: Path, s: Shape) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_tensors(
        out / "model.safetensors",
        {n: p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters()},
    )
    write_json(
        out / "config.json",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": s.hidden,
            "num_hidden_layers": s.layers,
            "num_attention_heads": s.heads,
            "num_key_value_heads": s.kv_heads,
            "head_dim": s.head_dim,
            "intermediate_size": s.intermediate,
            "vocab_size": s.vocab,
            "hidden_act": "silu",
            "rms_norm_eps": s.eps,
            "rope_theta": s.theta,
            "rope_scaling": None,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": s.layers,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
            "bos_token_id": None,
            "eos_token_id": 0,
            "torch_dtype": "bfloat16",
        },
    )
    write_json(
        out / "generation_config.json",
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 0},
    )
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2048,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    write_atomically(out / "chat_template.jinja", CHAT_TEMPLATE.encode())
    write_atomically(out / "tokenizer.json", tokenizer.to_str(pretty=False).encode())


def load_model(folder: Path) -> tuple[Qwen3, Tokenizer]:
    model = Qwen3(Shape())
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.to(torch.bfloat16 if has_fast_bfloat16() else torch.float32), Tokenizer.from_file(
        str(folder / "tokenizer.json")
    )


# --------------------------------------------------------------------------------------------------- training


@dataclass
class Progress:
    elapsed_s: float = 0.0
    step: int = 0
    tokens: int = 0
    epoch: int = 0


def context_at(done: float) -> int:
    """Attention is a third of a step at 512 already, so only the last part of the run reads further."""
    return 512 if done < 0.8 else 1024


def clocked(start: float) -> Iterator[float]:
    """Seconds since the run began, this process's part and those before it."""
    began = time.monotonic() - start
    while True:
        yield time.monotonic() - began


def train(args: argparse.Namespace) -> None:
    s, out, work = Shape(), Path(args.out), Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    documents = read_corpus(args.documents)
    held_out = [d.text for d in documents if d.held_out]
    training = [d for d in documents if not d.held_out]
    tokenizer_file = work / "tokenizer.json"
    model = Qwen3(s)
    if args.start_from:
        model.load_state_dict(load_file(Path(args.start_from) / "model.safetensors"))
        tokenizer_file = Path(args.start_from) / "tokenizer.json"
    elif not tokenizer_file.exists():
        train_tokenizer([d.text for d in training]).save(str(tokenizer_file), pretty=False)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    dtype = torch.bfloat16 if has_fast_bfloat16() else torch.float32
    optimizer = Optimizer(model, dtype)
    model.to(dtype)
    optimizer.params = dict(model.named_parameters())
    progress = Progress()
    if (work / "progress.json").exists():
        progress = Progress(**json.loads((work / "progress.json").read_text()))
        optimizer.load(load_file(work / "state.safetensors"))
        progress.epoch += 1  # the rest of the epoch that was cut is not read again
    optimizer.publish()
    loss_of = torch.compile(model.loss, dynamic=False) if args.compile else model.loss
    batches = Batches(training, tokenizer, progress.epoch, args.seed)
    bytes_per_token = sum(len(d.text.encode()) for d in training) / batches.num_tokens
    print(
        f"{len(training)} documents, {batches.num_tokens} tokens, {bytes_per_token:.3f} bytes a token; "
        f"{len(held_out)} held out, {sum(len(t.encode()) for t in held_out)} bytes; "
        f"{sum(p.numel() for p in model.parameters())} parameters",
        flush=True,
    )

    def save() -> None:
        save_tensors(work / "state.safetensors", optimizer.tensors())
        write_json(work / "progress.json", asdict(progress))

    budget = args.minutes * 60
    next_export = progress.elapsed_s + args.export_minutes * 60
    next_save = progress.elapsed_s + 120
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    mean_loss = 0.0
    bar = tqdm(total=int(budget), initial=int(progress.elapsed_s), unit="s", mininterval=args.bar_seconds)
    began_tokens, began_s = progress.tokens, progress.elapsed_s
    for elapsed in clocked(progress.elapsed_s):
        progress.elapsed_s = elapsed
        done = elapsed / budget
        if stopped:
            save()
            print("stopped; the same command goes on from here", flush=True)
            return
        if done >= 1 or (args.max_steps and progress.step >= args.max_steps):
            break
        rows = batches.take(args.batch_tokens, context_at(done))
        loss = loss_of(rows[:, :-1], rows[:, 1:])
        torch.autograd.backward(loss)
        progress.step += 1
        progress.tokens += rows[:, 1:].numel()
        progress.epoch = batches.epoch
        rate = schedule(done)
        optimizer.step(progress.step, args.muon_lr * rate, args.adam_lr * rate, args.decay)
        mean_loss += (loss.item() - mean_loss) * max(0.02, 1 / (progress.step + 1))
        bar.set_postfix_str(
            f"step={progress.step} epoch={progress.epoch} loss={mean_loss:.3f} "
            f"bits/byte={mean_loss / math.log(2) / bytes_per_token:.3f} "
            f"tok/s={(progress.tokens - began_tokens) / (elapsed - began_s + 1e-9):.0f} lr={rate:.2f}",
            refresh=False,
        )
        bar.update(int(elapsed) - bar.n)
        if elapsed >= next_save:
            next_save = elapsed + 120
            save()
        if elapsed >= next_export:
            next_export = elapsed + args.export_minutes * 60
            save()
            export(model, tokenizer, out, s)
            bits = bits_per_byte(model, tokenizer, held_out, 512)
            heads = count_parsing_heads(model, tokenizer, show=False)
            print(
                f"\n[{done:.0%}] step {progress.step} tokens {progress.tokens} bits/byte {bits:.4f} {heads}",
                flush=True,
            )
    bar.close()
    save()
    export(model, tokenizer, out, s)
    print(f"done: {asdict(progress)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--documents",
        choices=["whole", "terse"],
        default="terse",
        help="terse: without comment lines and functions' docstrings",
    )
    parser.add_argument("--start-from", metavar="DIR", help="begin with a model's weights and tokenizer")
    parser.add_argument("--out", default="assets/tiny-python", help="folder that gets the model")
    parser.add_argument("--work", default=".scratch/train", help="folder of the resumable state")
    parser.add_argument(
        "--minutes", type=float, default=100.0, help="length of the whole run, all its parts together"
    )
    parser.add_argument("--export-minutes", type=float, default=15.0, help="time between exports on the way")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--batch-tokens", type=int, default=6144)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay, times the learning rate")
    parser.add_argument("--max-steps", type=int, default=0, help="stop early, to time a step")
    parser.add_argument(
        "--bar-seconds", type=float, default=1.0, help="least time between two states of the bar"
    )
    parser.add_argument("--compile", action="store_true", help="fuse the step with torch.compile")
    parser.add_argument("--eval", metavar="DIR", help="measure the model in DIR instead of training")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.eval:
        train(args)
        return
    model, tokenizer = load_model(Path(args.eval))
    for form in ("whole", "terse"):
        held_out = [d.text for d in read_corpus(form) if d.held_out]
        size = sum(len(t.encode()) for t in held_out)
        bits = bits_per_byte(model, tokenizer, held_out, 1024)
        print(
            f"bits per byte, {form} documents: {bits:.4f} "
            f"({len(held_out)} held-out documents, {size} bytes, context 1024, EOS counted)"
        )
    figures = count_parsing_heads(model, tokenizer, show=True)
    for prompt in ("def", "class"):
        print(
            f"40 samples of {prompt!r} (temperature 0.6, top_p 0.9): the three leading lines parse as they "
            f"stand in {figures[prompt + '_strict']:.0f}, with an open block or docstring closed in "
            f"{figures[prompt + '_completed']:.0f}"
        )


if __name__ == "__main__":
    main()
