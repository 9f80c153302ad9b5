"""Stage b: every kernel on the shapes of the presets against fp64, with fresh memory poisoned.

Measured is |result - reference| / |reference| over whole tensors. On these shapes a fault of indexing, of alignment or
of a missing wait shows that small ones hide; precision bit by bit is what `tests/kernels` look at.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from kernels.attention import attention
from kernels.colours import REACH, Column, Normalisation, colour, table
from kernels.distillation import Targets, column_sum, cross_entropy, row_logsumexp
from kernels.optimizer import AdamWEma, Segment, Shard, Update
from kernels.residual import add_rows, row_positions
from kernels.sinkhorn import sinkhorn
from pipeline.bench.gpu.stage import Stage

ROUNDED, SUMMED = 1e-2, 1e-5  # limits of what is stored in bf16, and of fp32 sums
TEACHER, STUDENT = 0.06, 0.1  # temperatures
_ROWS = 64  # of fp64 at once
_NEEDED = 5.0  # seconds that a case may take
_SHRUNK = 16  # in a rehearsal, by this


@dataclass
class Checks:
    """Comparisons so far, on one device."""

    stage: Stage
    errors: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=self.stage.device).to(dtype)

    def cosines(self, rows: int, prototypes: int, dtype: torch.dtype) -> Tensor:
        return (torch.rand(rows, prototypes, device=self.stage.device) * 2 - 1).to(dtype)

    def compare(self, name: str, result: Tensor, reference: Tensor, limit: float) -> None:
        error = float((result.detach().double() - reference).norm() / reference.norm())
        self.errors[name] = error
        if not error <= limit:  # NaN too
            self.wrong.append(f"{name} {error:.1e}")

    def run(self, name: str, check: Callable[["Checks"], None]) -> None:
        """A case that fails is told, and the next one goes on."""
        if self.stage.left() < _NEEDED:
            self.wrong.append(f"{name}: no time left")
            return
        began = time.perf_counter()
        try:
            check(self)
        except Exception as error:
            self.wrong.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
        self.stage.found |= {"errors": self.errors, "wrong": self.wrong}
        self.stage.found.setdefault("seconds", {})[name] = time.perf_counter() - began
        self.stage.save()


def run(stage: Stage) -> None:
    """All cases; fails if one is beyond its limit."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    warnings.filterwarnings("ignore", message=".*deterministic")
    checks = Checks(stage)
    for name, check in cases(_SHRUNK if stage.tiny else 1):
        checks.run(name, check)
    stage.say(f"{len(checks.errors)} comparisons, {len(checks.wrong)} wrong")
    for wrong in checks.wrong:
        stage.say(wrong)
    if checks.wrong:
        raise SystemExit(1)


def cases(shrunk: int) -> Iterator[tuple[str, Callable[[Checks], None]]]:
    """By name; counts of rows and columns are divided by `shrunk`."""

    def less(size: int) -> int:
        return max(2 * (size // shrunk // 2), 2)

    for name, batch, tokens, heads, dim, bias, windows in (
        ("ViT, 224 pixels", 80, 197, 16, 64, False, 0),
        ("ViT, 96 pixels", 320, 37, 16, 64, False, 0),
        ("ViT, 257 tokens", 16, 257, 16, 64, False, 0),
        ("Swin", 640, 49, 8, 16, True, 0),
        ("Swin, shifted", 640, 49, 8, 16, True, 8),
        ("Swin, local", 320, 9, 8, 16, True, 0),
    ):
        sequences = less(batch) if not windows else max(less(batch) // windows, 1) * windows
        yield f"attention {name}", partial(_attention, sequences, tokens, less(heads), dim, bias, windows)
    for name, rows, targets, prototypes, met, centred, dtype in (
        ("local crops", 400, 100, 65536, 2, True, torch.float16),
        ("global crops", 100, 100, 65536, 1, True, torch.float16),
        ("masked patches", 2940, 2940, 65536, 1, True, torch.float16),
        ("intact", 400, 400, 8192, 1, False, torch.bfloat16),
    ):
        yield f"loss {name}", partial(_loss, less(rows), less(targets), less(prototypes), met, centred, dtype)
    yield "sinkhorn", partial(_sinkhorn, [less(100), less(1000)], [less(8192), less(65536)])
    for name, tokens, kept, channels, scaled, per_row in (
        ("ViT-L", 34500, 27600, 1024, True, False),
        ("704 channels, a factor per row", 34500, 27600, 704, True, True),
        ("Swin", 34000, 27200, 512, False, False),
    ):
        yield f"residual {name}", partial(_residual, less(tokens), less(kept), channels, scaled, per_row)
    for name, crops, size in (("global", 100, 224), ("local", 400, 96)):
        yield f"colours of {name} crops", partial(_colours, less(crops), max(size // shrunk, 2 * REACH))
    yield "optimizer", partial(_optimizer, less(1 << 26) + 3)


def _attention(batch: int, tokens: int, heads: int, dim: int, biased: bool, windows: int, checks: Checks) -> None:
    device = checks.stage.device
    qkv = checks.random(batch, tokens, 3, heads, dim).requires_grad_()
    bias = checks.random(heads, tokens, tokens).requires_grad_() if biased else None
    hidden = torch.rand(windows, tokens, tokens, device=device) < 0.3
    mask = torch.where(hidden, -100.0, 0.0).to(qkv.dtype) if windows else None
    above = checks.random(batch, tokens, heads * dim)
    out = attention(qkv, bias=bias, mask=mask, impl=checks.stage.impl)
    out.backward(above)
    wide = qkv.detach().double().requires_grad_()
    wide_bias = None if bias is None else bias.detach().double().requires_grad_()
    outs, share = [], max(windows, 1) * max(_ROWS // max(windows, 1), 1)  # whole images
    for part, gradient in zip(wide.split(share), above.split(share), strict=True):
        q, k, v = part.permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * dim**-0.5
        if wide_bias is not None:
            scores = scores + wide_bias
        if mask is not None:
            scores = scores + mask.double().repeat(len(part) // windows, 1, 1)[:, None]
        reference = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        reference.backward(gradient.double())
        outs.append(reference.detach())
    name = f"attention {batch}x{tokens}x{heads}x{dim}{' bias' if biased else ''}{' mask' if windows else ''}"
    checks.compare(name, out, torch.cat(outs), ROUNDED)
    assert qkv.grad is not None
    assert wide.grad is not None
    checks.compare(f"{name}, gradient", qkv.grad, wide.grad, ROUNDED)
    if bias is not None and wide_bias is not None:
        assert bias.grad is not None
        assert wide_bias.grad is not None
        checks.compare(f"{name}, gradient of the bias", bias.grad, wide_bias.grad, ROUNDED)


def _loss(
    rows: int, targets: int, prototypes: int, met: int, centred: bool, dtype: torch.dtype, checks: Checks
) -> None:
    device = checks.stage.device
    student, logits = checks.cosines(rows, prototypes, torch.bfloat16), checks.cosines(targets, prototypes, dtype)
    col = torch.randn(prototypes, device=device) if centred else None
    row = -torch.cat([_exponents(part, col).logsumexp(-1) for part in logits.split(_ROWS)]).float()
    first = torch.arange(rows, device=device) * targets // rows // met * met
    index = first[:, None] + torch.arange(met, device=device)
    weights = torch.linspace(0.5, 1.5, rows, device=device)
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    for here in torch.arange(rows, device=device).split(_ROWS):
        x = student[here].double().requires_grad_()
        each = [(_exponents(logits[i], col) + row[i, None]).exp() for i in index[here].unbind(1)]
        loss = -(torch.stack(each).sum(0) * torch.log_softmax(x / STUDENT, -1)).sum(-1)
        losses.append(loss.detach())
        gradients += torch.autograd.grad((loss * weights[here]).sum(), x)
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        out = cross_entropy(
            leaf * 1,
            Targets(logits, row, col, TEACHER),
            index,
            STUDENT,
            impl=checks.stage.impl,
            inplace_backward=inplace,
        )
        (gradient,) = torch.autograd.grad((out * weights).sum(), leaf)
        name = f"loss {rows}x{targets}x{prototypes}{', in place' if inplace else ''}"
        checks.compare(name, out, torch.cat(losses), SUMMED)
        checks.compare(f"{name}, gradient", gradient, torch.cat(gradients), ROUNDED)


def _exponents(logits: Tensor, col: Tensor | None) -> Tensor:
    scaled = logits.double() / TEACHER
    return scaled if col is None else scaled + col


def _colours(crops: int, size: int, checks: Checks) -> None:
    """Against the eager twin, which DALI's operators are compared with; a level may differ where a half is rounded."""
    device = checks.stage.device
    pixels = torch.randint(0, 256, (crops, size, size, 3), dtype=torch.uint8, device=device)
    drawn = torch.rand(crops, len(Column))
    drawn[:, Column.SOLARIZE :] = drawn[:, Column.SOLARIZE :].round()
    drawn[:, [Column.CONTRAST, Column.BRIGHTNESS]] += 0.5
    levels = Normalisation((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
    for hue in ("yiq", "hsv"):
        drawn[:, Column.HUE] = 60 * torch.rand(crops) - 30
        looked_up = table(drawn, hue).to(device)
        found, expected = (
            colour(pixels, looked_up, levels, dtype=torch.float32, impl=impl) for impl in (checks.stage.impl, "eager")
        )
        checks.compare(f"colours {crops}x{size}x{size} {hue}", found, expected.double(), 1e-3)


def _sinkhorn(rows: list[int], prototypes: list[int], checks: Checks) -> None:
    impl = checks.stage.impl
    entries = [checks.cosines(b, k, torch.float16) for b in rows for k in prototypes]
    for logits, (row, col) in zip(entries, sinkhorn(entries, TEACHER, impl=impl), strict=True):
        exponentials = _exponents(logits, None).exp()
        b, k = logits.shape
        v = torch.full((b,), 1 / b, dtype=torch.float64, device=logits.device)
        for _ in range(3):
            u = 1 / (k * (v @ exponentials))
            v = 1 / (b * (exponentials @ u))
        name = f"sinkhorn {b}x{k}"
        checks.compare(f"{name}, rows", row.double().exp(), b * v, 1e-4)
        checks.compare(f"{name}, columns", col.double().exp(), u, 1e-4)
        checks.compare(
            f"{name}, log-sum-exp", row_logsumexp(logits, TEACHER, impl=impl), exponentials.sum(-1).log(), SUMMED
        )
        checks.compare(f"{name}, column sums", column_sum(logits, impl=impl), logits.double().sum(0), 1e-3)


def _residual(tokens: int, kept: int, channels: int, scaled: bool, per_row: bool, checks: Checks) -> None:
    device = checks.stage.device
    x, branch = (checks.random(n, channels).requires_grad_() for n in (tokens, kept))
    rows = torch.randperm(tokens, device=device)[:kept].sort().values
    gamma = checks.random(channels).requires_grad_() if scaled else None
    factor = torch.linspace(1.2, 1.3, kept, device=device)[:, None] if per_row else 1.25
    above = checks.random(tokens, channels)
    out = add_rows(x, branch, rows, row_positions(rows, tokens), factor, gamma, impl=checks.stage.impl)
    out.backward(above)
    wide_factor = factor.double() if isinstance(factor, Tensor) else factor
    wide_gamma = 1.0 if gamma is None else gamma.detach().double()
    wide_branch, gradient = branch.detach().double(), above.double()[rows] * wide_factor
    name = f"residual {tokens}x{kept}x{channels}{' LayerScale' if scaled else ''}"
    reference = x.detach().double().index_add(0, rows, wide_branch * wide_gamma * wide_factor)
    checks.compare(name, out, reference, ROUNDED)
    assert branch.grad is not None
    checks.compare(f"{name}, gradient of the branch", branch.grad, gradient * wide_gamma, ROUNDED)
    if gamma is not None:
        assert gamma.grad is not None
        checks.compare(f"{name}, gradient of LayerScale", gamma.grad, (gradient * wide_branch).sum(0), ROUNDED)


def _optimizer(size: int, checks: Checks) -> None:
    """Two steps, between them one that is not to be."""
    masters, averages, gradients = (checks.random(size, dtype=torch.float32) for _ in range(3))
    segments = [Segment(0, size // 3, 0, 1.0, True), Segment(size // 3, size - size // 3, 1, 0.5, False)]
    factors = torch.tensor([0.5, 1.0], device=checks.stage.device)
    update = Update(1e-3, 0.1, 0.992)
    copies = (torch.empty(size, device=checks.stage.device, dtype=torch.bfloat16) for _ in range(2))
    shard = Shard.of(masters, averages, *copies)
    wide = [masters[s.start : s.stop].double() for s in segments]
    average = averages.double()
    reference = torch.optim.AdamW(
        [
            {"params": [weights], "lr": lr, "weight_decay": decay}
            for weights, (lr, decay) in zip(wide, map(update.of, segments), strict=True)
        ]
    )
    one_pass = AdamWEma(shard, segments, impl=checks.stage.impl)
    for good in (1.0, 0.0, 1.0):
        one_pass([gradients], factors, torch.tensor(good, device=checks.stage.device), update)
        if good:
            for weights, segment in zip(wide, segments, strict=True):
                weights.grad = gradients[segment.start : segment.stop].double() * factors[segment.part]
            reference.step()
            average.lerp_(torch.cat(wide), 1 - update.momentum)
    checks.compare(f"weights of {size}", shard.master, torch.cat(wide), 1e-6)
    checks.compare(f"moving average of {size}", shard.ema, average, 1e-6)
    for name, copy, exact in (("student", shard.student, torch.cat(wide)), ("teacher", shard.teacher, average)):
        assert copy is not None
        checks.compare(f"{name} of {size}", copy, exact, ROUNDED)
