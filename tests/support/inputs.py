"""Named input families: each makes a list of gradient pairs in the two dtypes asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Gradients = list[Tensor | None]
Pairs = tuple[Gradients, Gradients]
Family = Callable[[torch.dtype, torch.dtype], Pairs]

BLOCK, CHUNK = 1024, 32768
TAILS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33)


def normal(numel: int, seed: int, scale: float = 1.0) -> Tensor:
    """fp64, so that all dtypes round the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(numel, generator=generator, dtype=torch.float64)


def pair(numel: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A pair whose inner product <f,r> is negative: about half of -<f,f>."""
    f = normal(numel, 2 * seed)
    return f, normal(numel, 2 * seed + 1) - f / 2


def _cast(pairs: list[tuple[Tensor, Tensor]], forget: torch.dtype, retain: torch.dtype) -> Pairs:
    # Through fp32, as both torch and the kernels go from fp64 to 16 bits.
    return [_to(f, forget) for f, _ in pairs], [_to(r, retain) for _, r in pairs]


def _to(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.float().to(dtype) if dtype.itemsize == 2 else t.to(dtype)


def _of(*pairs: tuple[Tensor, Tensor]) -> Family:
    return lambda forget, retain: _cast(list(pairs), forget, retain)


def _scaled(scale: float, retain_scale: float | None = None) -> Family:
    f, r = normal(50, 1, scale), normal(50, 2, scale if retain_scale is None else retain_scale)
    return _of((f, r), (normal(17, 3, scale), -normal(17, 3, scale)))


def _grid(values: list[float]) -> tuple[Tensor, Tensor]:
    x = torch.tensor(values, dtype=torch.float64)
    return x.repeat_interleave(len(values)), x.repeat(len(values))


def signed_zeros(forget: torch.dtype, retain: torch.dtype) -> Pairs:
    return _cast([_grid([0.0, -0.0, 1.0, -1.0])], forget, retain)


def specials(forget: torch.dtype, retain: torch.dtype) -> Pairs:
    """Every value against every other: zeros, subnormals, extremes, inf and NaN of the dtype."""

    def values(dtype: torch.dtype) -> Tensor:
        info = torch.finfo(dtype)
        tiny, smallest = info.tiny, info.smallest_normal * info.eps
        positive = [
            0.0,
            smallest,
            3 * smallest,
            tiny - smallest,
            tiny,
            1 / 3,
            1.0,
            info.max / 2,
            info.max,
            torch.inf,
        ]
        x = torch.tensor([*positive, torch.nan], dtype=torch.float64)
        return torch.cat([x, -x]).to(dtype)

    f, r = values(forget), values(retain)
    return [f.repeat_interleave(len(r))], [r.repeat(len(f))]


def subnormals(forget: torch.dtype, retain: torch.dtype) -> Pairs:
    """The smallest ones in every combination of signs, then any."""

    def values(dtype: torch.dtype, seed: int, signs: list[float]) -> Tensor:
        info = torch.finfo(dtype)
        steps = normal(40, seed, 1.0 / info.eps).clamp(-1 / info.eps, 1 / info.eps).round()
        steps[: len(signs)] = torch.tensor(signs)
        return (steps * (info.smallest_normal * info.eps)).to(dtype)

    return [values(forget, 4, [1, 1, -1, -1])], [values(retain, 5, [1, -1, 1, -1])]


def all_conflict(forget: torch.dtype, retain: torch.dtype) -> Pairs:
    f = normal(40, 6)
    return _cast([(f, -f.sign() * normal(40, 7).abs())], forget, retain)


def no_conflict(forget: torch.dtype, retain: torch.dtype) -> Pairs:
    f = normal(40, 8)
    return _cast([(f, f.sign() * normal(40, 9).abs())], forget, retain)


def orthogonal(forget: torch.dtype, retain: torch.dtype) -> Pairs:
    """Pairs with conflicts whose inner product is exactly 0, because the products cancel."""
    f = torch.tensor([1.0, 1.0, 2.0, -3.0], dtype=torch.float64).repeat(5)
    r = torch.tensor([1.0, -1.0, 3.0, 2.0], dtype=torch.float64).repeat(5)
    return _cast([(f, r)], forget, retain)


def antiparallel(forget: torch.dtype, retain: torch.dtype) -> Pairs:
    f = normal(33, 10)
    return _cast([(_to(f, forget).double(), -2 * _to(f, forget).double())], forget, retain)


def one_element(forget: torch.dtype, retain: torch.dtype) -> Pairs:
    f, r = _grid([0.5, -2.0, 0.0])
    pairs = _cast([(x.view(1), y.view(1)) for x, y in zip(f, r, strict=True)], forget, retain)
    scalar = (torch.tensor(-1.5, dtype=forget), torch.tensor(2.0, dtype=retain))
    return [*pairs[0], scalar[0]], [*pairs[1], scalar[1]]


def empty(forget: torch.dtype, retain: torch.dtype) -> Pairs:
    """A list in which some tensors have no elements, as on a rank of a sharded model."""
    f, r = pair(5, 11)
    fs, rs = _cast([(f[:0], r[:0]), (f, r), (f[:0].view(0, 3), r[:0].view(0, 3))], forget, retain)
    return fs, rs


def missing(forget: torch.dtype, retain: torch.dtype) -> Pairs:
    """None in forget only, in retain only, in both and in neither."""
    fs, rs = _cast([pair(20, seed) for seed in (12, 13, 14, 15)], forget, retain)
    return [None, fs[1], None, fs[3]], [rs[0], None, None, rs[3]]


def transposed(forget: torch.dtype, retain: torch.dtype) -> Pairs:
    """Dense pairs in another order of dimensions, both in the same one."""
    f, r = pair(60, 16)
    fs, rs = _cast([(f, r), (f, r)], forget, retain)
    return (
        [fs[0].view(6, 10).t(), fs[1].view(3, 4, 5).permute(2, 0, 1)],
        [rs[0].view(6, 10).t(), rs[1].view(3, 4, 5).permute(2, 0, 1)],
    )


def mixed_strides(forget: torch.dtype, retain: torch.dtype) -> Pairs:
    """Pairs of which one tensor is transposed, is a column slice, or is expanded."""
    f, r = pair(60, 17)
    (f,), (r,) = _cast([(f, r)], forget, retain)
    f, r = f.view(6, 10), r.view(6, 10)
    return [f.t(), f, f[:, ::3], f[:1].expand(6, 10)], [r.view(10, 6), r.view(10, 6).t(), r[:, 1:5], r]


def sliced(forget: torch.dtype, retain: torch.dtype) -> Pairs:
    f, r = pair(60, 18)
    (f,), (r,) = _cast([(f, r)], forget, retain)
    return [f[::2], f.view(6, 10)[:, 2:7], f.view(6, 10)[1::2]], [
        r[::2],
        r.view(6, 10)[:, 2:7],
        r.view(6, 10)[1::2],
    ]


def unaligned(forget: torch.dtype, retain: torch.dtype) -> Pairs:
    """Tensors that start one element after an aligned address: both gradients, one of them, none."""
    f, r = pair(80, 19)
    (f,), (r,) = _cast([(f, r)], forget, retain)
    return [f[1:], f[1:70], f[:40]], [r[1:], r[:69], r[:40]]


def flat_views(forget: torch.dtype, retain: torch.dtype) -> Pairs:
    """Neighbours in one buffer a side, as engines keep their gradients; most starts are unaligned."""
    f, r = pair(sum(TAILS), 20)
    (f,), (r,) = _cast([(f, r)], forget, retain)
    return list(f.split(TAILS)), list(r.split(TAILS))


def tails(forget: torch.dtype, retain: torch.dtype) -> Pairs:
    """Sizes around the 16 elements that the last vector of a tensor is masked by."""
    return _cast([pair(n, 21 + n) for n in TAILS], forget, retain)


def around_a_block(forget: torch.dtype, retain: torch.dtype) -> Pairs:
    return _cast([pair(BLOCK + d, 60 + d) for d in (-1, 0, 1)], forget, retain)


def around_a_chunk(forget: torch.dtype, retain: torch.dtype) -> Pairs:
    return _cast([pair(CHUNK + d, 70 + d) for d in (-1, 0, 1, 17)], forget, retain)


def three_chunks(forget: torch.dtype, retain: torch.dtype) -> Pairs:
    return _cast([pair(2 * CHUNK + 1, 80)], forget, retain)


IN_RANGE: dict[str, Family] = {
    "scale_1e-18": _scaled(1e-18),
    "scale_1e-8": _scaled(1e-8),
    "scale_1": _scaled(1.0),
    "scale_1e8": _scaled(1e8),
    "scale_1e18": _scaled(1e18),
    "scales_apart": _scaled(1e-10, 1e10),
    "zeros": _of(
        (torch.zeros(20), torch.zeros(20)),
        (torch.zeros(20), normal(20, 30)),
        (normal(20, 31), torch.zeros(20)),
    ),
    "signed_zeros": signed_zeros,
    "all_conflict": all_conflict,
    "no_conflict": no_conflict,
    "orthogonal": orthogonal,
    "antiparallel": antiparallel,
    "one_element": one_element,
    "empty": empty,
    "missing": missing,
    "transposed": transposed,
    "mixed_strides": mixed_strides,
    "sliced": sliced,
    "unaligned": unaligned,
    "flat_views": flat_views,
    "tails": tails,
    "around_a_block": around_a_block,
}
OUT_OF_RANGE: dict[str, Family] = {
    "scale_1e-30": _scaled(1e-30),
    "scale_1e30": _scaled(1e30),
    "specials": specials,
    "subnormals": subnormals,
}
LARGE: dict[str, Family] = {"around_a_chunk": around_a_chunk, "three_chunks": three_chunks}
FAMILIES = {**IN_RANGE, **OUT_OF_RANGE, **LARGE}
