"""What `python -m kernels.bench` compares: for every operation its shapes, the fused code and its rivals.

Shapes at scale "full" are those of the ViT-L and Swin-B presets with 50 images per GPU.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from kernels.attention import attention
from kernels.distillation import Targets, cross_entropy
from kernels.optimizer import AdamWEma, Segment, Shard, Update
from kernels.residual import add_rows, row_positions
from kernels.sinkhorn import sinkhorn

SCALES = ("full", "cpu", "tiny")
OPERATIONS = ("loss", "sinkhorn", "attention", "residual", "norm", "optimizer")
TEMPERATURE, STUDENT_TEMPERATURE = 0.06, 0.1
Contender = Callable[..., Tensor]


@dataclass
class Case:
    """One operation on one set of shapes.

    Attributes:
        name: operation and shapes.
        inputs: makes fresh random arguments of the contenders; those that require a gradient are differentiated.
        contenders: by name; the first is the reference of the others' results and speed.
        forward_bytes: what has to be read and written at least once, forward.
        backward_bytes: the same for the backward pass.
        forward_flops: multiply-adds count as 2.
        backward_flops: the same for the backward pass.
    """

    name: str
    inputs: Callable[[], tuple[Tensor, ...]]
    contenders: dict[str, Contender]
    forward_bytes: float
    backward_bytes: float = 0
    forward_flops: float = 0
    backward_flops: float = 0
    missing: dict[str, str] = field(default_factory=dict)


def cases(operation: str, scale: str, device: torch.device, dtype: torch.dtype) -> list[Case]:
    """The cases of one of `OPERATIONS` at one of `SCALES`."""
    builders: dict[str, Callable[..., Case]] = {
        "loss": _loss,
        "sinkhorn": _sinkhorn,
        "attention": _attention,
        "residual": _residual,
        "norm": _norm,
        "optimizer": _optimizer,
    }
    found = [builders[operation](*shape, device, dtype) for shape in SHAPES[operation][scale]]
    for case in found:
        if device.type != "cuda" and "triton" in case.contenders:
            del case.contenders["triton"]
            case.missing["triton"] = "no GPU"
    return found


# student rows, target rows, prototypes, target rows per student row
LOSS_FULL = [
    ("local crops", 400, 100, 65536, 2),
    ("global crops", 100, 100, 65536, 1),
    ("masked patches", 2940, 2940, 65536, 1),
    ("local crops", 400, 100, 8192, 2),
]
# B, N, h, d, windows of the mask, bias
ATTENTION_FULL = [
    ("ViT 224", 100, 197, 16, 64, 0, False),
    ("ViT 96", 400, 37, 16, 64, 0, False),
    ("ViT 224, patches of 14", 100, 257, 16, 64, 0, False),
    ("ViT 112", 400, 50, 16, 64, 0, False),
    ("Swin windows", 6400, 49, 6, 16, 0, True),
    ("Swin shifted windows", 6400, 49, 6, 16, 64, True),
]
SHAPES: dict[str, dict[str, list]] = {
    "loss": {
        "full": LOSS_FULL,
        "cpu": [
            ("local crops", 64, 16, 65536, 2),
            ("masked patches", 64, 64, 65536, 1),
            ("local crops", 64, 16, 8192, 2),
        ],
        "tiny": [("local crops", 8, 2, 256, 2)],
    },
    "sinkhorn": {
        "full": [("4 heads", (100, 2940), (8192, 16384, 32768, 65536)), ("1 head", (2940,), (65536,))],
        "cpu": [("1 head", (16, 128), (65536,)), ("1 head", (16, 128), (8192,))],
        "tiny": [("2 heads", (4, 6), (64, 128))],
    },
    "attention": {
        "full": ATTENTION_FULL,
        "cpu": [("ViT 224", 8, 197, 6, 64, 0, False), ("ViT 96", 32, 37, 6, 64, 0, False)],
        "tiny": [("Swin shifted windows", 4, 9, 2, 16, 2, True)],
    },
    # tokens, of them kept, channels, LayerScale, a factor per row
    "residual": {
        "full": [("ViT-L", 34500, 27600, 1024, True, False), ("Swin-B stage 3", 34000, 27200, 512, False, False)],
        "cpu": [("ViT-S", 3450, 2760, 384, True, False)],
        "tiny": [("ViT", 12, 9, 16, True, True)],
    },
    # tokens, channels of the sub-network, of the largest network
    "norm": {
        "full": [("ViT-L", 27600, 640, 1024), ("ViT-L", 27600, 640, 640)],
        "cpu": [("ViT-S", 2760, 256, 384), ("ViT-S", 2760, 256, 256)],
        "tiny": [("ViT", 9, 16, 24)],
    },
    "optimizer": {"full": [(1 << 28,)], "cpu": [(1 << 23,)], "tiny": [(1 << 10,)]},
}


def _loss(name: str, r: int, m: int, k: int, p: int, device: torch.device, dtype: torch.dtype) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        student = _cosines(r, k, device, dtype).requires_grad_()
        logits, col = _cosines(m, k, device, dtype), torch.randn(k, device=device)
        row = -(logits.float() / TEMPERATURE + col).logsumexp(-1)
        first = torch.arange(r, device=device) * m // r // p * p
        return student, logits, row, col, first[:, None] + torch.arange(p, device=device)

    def written_out(student: Tensor, logits: Tensor, row: Tensor, col: Tensor, rows: Tensor) -> Tensor:
        target = (logits.float() / TEMPERATURE + row[:, None] + col).exp()
        log_p = torch.log_softmax(student.float() / STUDENT_TEMPERATURE, -1)
        return -torch.stack([(target[rows[:, i]] * log_p).sum(-1) for i in range(p)]).sum(0)

    def factored(impl: str) -> Contender:
        def run(student: Tensor, logits: Tensor, row: Tensor, col: Tensor, rows: Tensor) -> Tensor:
            return cross_entropy(student, Targets(logits, row, col, TEMPERATURE), rows, STUDENT_TEMPERATURE, impl=impl)

        return run

    def liger(student: Tensor, logits: Tensor, row: Tensor, col: Tensor, rows: Tensor) -> Tensor:
        loss = importlib.import_module("liger_kernel.transformers").LigerKLDIVLoss(reduction="sum")
        target = (logits.float() / TEMPERATURE + row[:, None] + col).exp()
        log_p = torch.log_softmax(student.float() / STUDENT_TEMPERATURE, -1)
        return torch.stack([loss(log_p, target[rows[:, i]]) for i in range(p)]).sum()

    contenders = {
        "eager, targets written out": written_out,
        "torch.compile": torch.compile(written_out, dynamic=False),
        "eager, factored": factored("eager"),
        "triton": factored("triton"),
    }
    missing = _add_liger(contenders, "Liger KLDiv", liger, device)
    size = torch.empty((), dtype=dtype).element_size()
    reads = (r + m) * k * size
    return Case(f"{name} R={r} M={m} K={k} P={p}", inputs, contenders, reads, reads + r * k * size, missing=missing)


def _add_liger(contenders: dict[str, Contender], name: str, liger: Contender, device: torch.device) -> dict[str, str]:
    """Add a rival from Liger-Kernel, or return it with the reason why it is missing."""
    if device.type == "cpu":
        return {name: "no GPU"}
    if not importlib.util.find_spec("liger_kernel"):
        return {name: "liger_kernel is not installed"}
    contenders[name] = liger
    return {}


def _sinkhorn(
    name: str, rows: tuple[int, ...], prototypes: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        return tuple(_cosines(m, k, device, dtype) for m in rows for k in prototypes)

    def matrices(*logits: Tensor) -> Tensor:
        return torch.cat([_matrix_sinkhorn(x)[:, 0] for x in logits])

    def scalings(impl: str) -> Contender:
        def run(*logits: Tensor) -> Tensor:
            found = zip(logits, sinkhorn(logits, TEMPERATURE, impl=impl), strict=True)
            return torch.cat([(x[:, 0].float() / TEMPERATURE + row + col[0]).exp() for x, (row, col) in found])

        return run

    contenders = {
        "eager, matrix": matrices,
        "torch.compile": torch.compile(matrices, dynamic=False),
        "eager, factored": scalings("eager"),
        "triton": scalings("triton"),
    }
    size = torch.empty((), dtype=dtype).element_size()
    reads = 6 * sum(rows) * sum(prototypes) * size
    shapes = f"{'+'.join(map(str, rows))} rows, K={'+'.join(map(str, prototypes))}"
    return Case(f"{name} {shapes}", inputs, contenders, reads)


def _attention(
    name: str,
    b: int,
    n: int,
    h: int,
    d: int,
    windows: int,
    with_bias: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        qkv = torch.randn(b, n, 3, h, d, device=device, dtype=dtype, requires_grad=True)
        bias = torch.randn(h, n, n, device=device, dtype=dtype, requires_grad=True)
        mask = torch.where(torch.rand(max(windows, 1), n, n, device=device) < 0.3, -100.0, 0.0).to(dtype)
        return (qkv, bias, mask)[: 1 + with_bias + (windows > 0)]

    def offset(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
        if bias is None or mask is None:
            return bias
        return (bias + mask[:, None]).repeat(b // windows, 1, 1, 1)

    def plain(qkv: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        q, k, v = _heads(qkv)
        scores = q @ k.mT * d**-0.5
        added = offset(bias, mask)
        p = (scores if added is None else scores + added).softmax(-1)
        return (p @ v).transpose(1, 2).flatten(2)

    def sdpa(backend: SDPBackend) -> Contender:
        def run(qkv: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
            with sdpa_kernel(backend):
                q, k, v = _heads(qkv)
                out = scaled_dot_product_attention(q, k, v, attn_mask=offset(bias, mask))
            return out.transpose(1, 2).flatten(2)

        return run

    def fused(qkv: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return attention(qkv, bias=bias, mask=mask, impl="triton")

    contenders: dict[str, Contender] = {"eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}
    backends = ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
    contenders |= {f"SDPA {name}": sdpa(getattr(SDPBackend, name)) for name in backends}
    contenders["FlexAttention"] = _flex(windows)
    contenders["triton"] = fused
    values = b * n * h * d * torch.empty((), dtype=dtype).element_size()
    flops = 4 * b * h * n * n * d
    shapes = f"{name} B={b} N={n} h={h} d={d}{' bias' if with_bias else ''}{' mask' if windows else ''}"
    return Case(shapes, inputs, contenders, 4 * values, 7 * values, flops, 2.5 * flops)


def _heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views `[B, h, N, d]` of queries, keys and values."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return q, k, v


def _flex(windows: int) -> Contender:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def run(qkv: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        def add(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if bias is not None:
                score = score + bias[h, i, j]
            return score if mask is None else score + mask[b % windows, i, j]

        q, k, v = _heads(qkv)
        out = compiled(q, k, v, score_mod=None if bias is None and mask is None else add)
        return out.transpose(1, 2).flatten(2)

    return run


def _residual(
    name: str, t: int, r: int, c: int, scaled: bool, per_row: bool, device: torch.device, dtype: torch.dtype
) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        x, branch = (torch.randn(n, c, device=device).to(dtype).requires_grad_() for n in (t, r))
        rows = torch.randperm(t, device=device)[:r].sort().values
        gamma = torch.randn(c, device=device).to(dtype).requires_grad_(scaled)
        factor = torch.linspace(1.2, 1.3, r, device=device)[:, None]
        return x, branch, rows, row_positions(rows, t), factor, gamma

    def named(impl: str) -> Contender:
        def run(x: Tensor, branch: Tensor, rows: Tensor, positions: Tensor, factor: Tensor, gamma: Tensor) -> Tensor:
            chosen = factor if per_row else 1.25
            return add_rows(x, branch, rows, positions, chosen, gamma if scaled else None, impl=impl)

        return run

    def gather(x: Tensor, branch: Tensor, rows: Tensor, positions: Tensor, factor: Tensor, gamma: Tensor) -> Tensor:
        added = branch * (factor.to(dtype) if per_row else 1.25) * (gamma if scaled else 1)
        return x + torch.where(positions[:, None] < 0, 0, added[positions.clamp_min(0)])

    plain = named("eager")
    contenders = {
        "eager": plain,
        "eager, gather": gather,
        "torch.compile": torch.compile(plain, dynamic=False),
        "torch.compile, gather": torch.compile(gather, dynamic=False),
        "triton": named("triton"),
    }
    row_bytes = c * torch.empty((), dtype=dtype).element_size()
    shapes = f"{name} T={t} R={r} C={c}{' LayerScale' if scaled else ''}"
    # backward: the gradient of x is that of the sum, no copy; that of LayerScale needs the branch once more
    return Case(shapes, inputs, contenders, (2 * t + r) * row_bytes, (2 + scaled) * r * row_bytes)


def _norm(name: str, t: int, width: int, full: int, device: torch.device, dtype: torch.dtype) -> Case:
    """LayerNorm over the first channels of its parameters; `full` = `width` is the same without slicing."""

    def inputs() -> tuple[Tensor, ...]:
        x = torch.randn(t, width, device=device).to(dtype).requires_grad_()
        weight, bias = (torch.randn(full, device=device).to(dtype).requires_grad_() for _ in range(2))
        return x, weight, bias

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(x, (width,), weight[:width], bias[:width], 1e-6)

    def liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        norm = importlib.import_module("liger_kernel.transformers.functional").liger_layer_norm
        return norm(x, weight[:width], bias[:width], 1e-6)

    contenders: dict[str, Contender] = {"eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}
    missing = _add_liger(contenders, "Liger LayerNorm", liger, device)
    values = t * width * torch.empty((), dtype=dtype).element_size()
    return Case(f"{name} T={t} C={width} of {full}", inputs, contenders, 2 * values, 3 * values, missing=missing)


def _optimizer(size: int, device: torch.device, dtype: torch.dtype) -> Case:
    """AdamW, moving average and both bf16 copies of a shard of so many weights."""
    segments = [
        Segment(start, size // 16, 0, 0.9**i, bool(i % 2)) for i, start in enumerate(range(0, size, size // 16))
    ]
    factors, good = torch.ones(1, device=device), torch.ones((), device=device)

    def inputs() -> tuple[Tensor, ...]:
        copies = (torch.empty(size, device=device, dtype=torch.bfloat16) for _ in range(2))
        return *(torch.randn(size, device=device) for _ in range(3)), *copies

    def plain(kind: str) -> Contender:
        def run(master: Tensor, gradient: Tensor, ema: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
            if id(master) not in kept:
                kept[id(master)] = torch.optim.AdamW(
                    [{"params": [master[s.start : s.stop]]} for s in segments],
                    lr=1e-3,
                    foreach=kind == "foreach",
                    fused=kind == "fused",
                )
            optimizer = kept[id(master)]
            for group, segment in zip(optimizer.param_groups, segments, strict=True):
                group["params"][0].grad = gradient[segment.start : segment.stop]
            optimizer.step()
            ema.lerp_(master, 0.008)
            student.copy_(master)
            return teacher.copy_(ema)

        kept: dict[int, torch.optim.AdamW] = {}
        return run

    def named(impl: str) -> Contender:
        def run(master: Tensor, gradient: Tensor, ema: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
            if id(master) not in kept:  # the moments are made once, as in training
                kept[id(master)] = AdamWEma(Shard.of(master, ema, student, teacher), segments, impl=impl)
            kept[id(master)]([gradient], factors, good, Update(1e-3, 0.04, 0.992))
            return teacher

        kept: dict[int, AdamWEma] = {}
        return run

    contenders = {
        "foreach": plain("foreach"),
        "fused": plain("fused"),
        "eager": named("eager"),
        "triton": named("triton"),
    }
    return Case(f"shard of {size} weights, 16 segments", inputs, contenders, 40 * size)


def _matrix_sinkhorn(logits: Tensor) -> Tensor:
    """Three iterations on a whole matrix, as SwAV's descendants write them."""
    q = (logits.float() / TEMPERATURE).exp().t()
    k, b = q.shape
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True)
        q /= k
        q /= q.sum(0, keepdim=True)
        q /= b
    return q.t() * b


def _cosines(rows: int, prototypes: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return (torch.rand(rows, prototypes, device=device) * 2 - 1).to(dtype)
