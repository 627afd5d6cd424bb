"""Steps of a program on lists of gradients: `synthesize_`, `synthesize` and `Plan`.

All lists of a program lie in the same memory, so that each one has the addresses of the others. Their dtypes,
shapes and strides may differ. Tensors that a call allocates and frees are made on the heap.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, product
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import sago
from sago.core.checks import check_floor
from tests.fuzz.rules import OTHERS, Name, definition_of, rule_of
from tests.support import inputs, oracle, properties
from tests.support.backends import DTYPES, on_device

SIDES = ("forget", "retain", "out")
ALIGNMENT = 64  # bytes


class Form(NamedTuple):
    """How a tensor lies in memory; `shift` is in elements after an aligned address."""

    dtype: torch.dtype
    order: str = "rows"  # or "columns", "spaced", "expanded"
    shift: int = 0

    def strides(self, shape: Sequence[int]) -> list[int]:
        strides, step = [], 2 if self.order == "spaced" else 1
        for size in shape if self.order == "columns" else reversed(shape):
            strides.append(step)
            step *= max(size, 1)
        strides = strides if self.order == "columns" else strides[::-1]
        return [0, *strides[1:]] if self.order == "expanded" and strides else strides

    def nbytes(self, shape: Sequence[int]) -> int:
        last = sum((max(n, 1) - 1) * s for n, s in zip(shape, self.strides(shape), strict=True))
        return (self.shift + last + 1) * self.dtype.itemsize


class Pair(NamedTuple):
    """A pair of gradients. "forget" and "retain" stand for the same tensor as that of this side."""

    shape: tuple[int, ...]
    forget: Form | None
    retain: Form | str | None
    out: Form | str | None  # used if `out` is a list


class Lists(NamedTuple):
    pairs: tuple[Pair, ...]
    out: str | None  # None, "forget" or "list"


class Values(NamedTuple):
    kind: str
    seed: int


class Weight(NamedTuple):
    value: float
    kind: str = "float"  # or "int", or the dtype of a 0-d tensor

    @property
    def given(self) -> Any:
        if self.kind == "float":
            return self.value
        return (
            int(self.value)
            if self.kind == "int"
            else torch.tensor(self.value, dtype=getattr(torch, self.kind))
        )


class Options(NamedTuple):
    rule: Name
    gamma: Weight = Weight(1.0)
    alpha: Weight = Weight(1.0)
    eps: float = 0.0
    stats: bool = True
    groups: tuple[Any, ...] | None = None
    floor: float = 0.0
    reduces: bool = False

    def checked(self, length: int) -> Options:
        """Without what the rule does not take."""
        rule = rule_of(self.rule)
        groups = self.groups and tuple(self.groups[i % len(self.groups)] for i in range(length))
        found = self._replace(groups=groups, reduces=self.reduces and rule.seed is None)
        if self.rule in OTHERS:
            gamma, alpha = (w._replace(value=abs(w.value)) for w in (self.gamma, self.alpha))
            found = found._replace(gamma=gamma, alpha=alpha)
        try:
            check_floor(rule, self.floor)
        except ValueError:
            found = found._replace(floor=0.0)
        return found

    @property
    def made(self) -> dict[str, Any]:
        """The arguments that a plan takes when it is made."""
        found = {"rule": rule_of(self.rule) if not isinstance(self.rule, str) else self.rule, "eps": self.eps}
        found |= {"stats": self.stats, "groups": self.groups, "retain_floor": self.floor}
        return found | {"reduce_gram": _same if self.reduces else None}

    @property
    def weights(self) -> dict[str, Any]:
        return {"gamma": self.gamma.given, "alpha": self.alpha.given}

    @property
    def known(self) -> dict[str, Any]:
        """The arguments of the oracle and of the reference."""
        weights = {name: float(weight) for name, weight in self.weights.items()}
        return {**weights, "eps": self.eps, "groups": self.groups, "retain_floor": self.floor}


def _same(table: Tensor) -> Tensor:
    return table.clone()


class Call(NamedTuple):
    """A call of `synthesize_`, or of `synthesize` if `new`."""

    lists: int
    values: Values
    options: Options
    on_heap: bool = False
    new: bool = False
    given: str = "list"  # or "tuple", "iterator", "tensor"


class MakePlan(NamedTuple):
    """`moves` says that the tensors then get other data. The plan keeps the memory that it was made for."""

    lists: int
    options: Options
    moves: bool = False


class RunPlan(NamedTuple):
    plan: int
    values: Values
    gamma: Weight
    alpha: Weight


class Mistake(NamedTuple):
    """A call that raises and writes nothing."""

    lists: int
    kind: str
    at: int
    options: Options


class Placed(NamedTuple):
    """The tensors of lists, and all of the memory that they lie in."""

    forget: list[Tensor | None]
    retain: list[Tensor | None]
    out: list[Tensor | None] | str | None
    memories: list[Tensor]

    @property
    def targets(self) -> list[Tensor | None]:
        if isinstance(self.out, list):
            return self.out
        return self.retain if self.out is None else self.forget


class Memory:
    """The memory of the lists of a program, with a slot for each tensor of the longest one."""

    def __init__(self, lists: Sequence[Lists]) -> None:
        forms = [
            form.nbytes(pair.shape)
            for each in lists
            for pair in each.pairs
            for form in pair[1:]
            if isinstance(form, Form)
        ]
        self._size = (max(forms, default=1) // ALIGNMENT + 2) * ALIGNMENT
        self._all = torch.zeros(self._size * 3 * max(len(each.pairs) for each in lists), dtype=torch.uint8)

    def place(self, lists: Lists, on_heap: bool = False) -> Placed:
        """Poisons the outputs, and leaves the gradients to `fill`."""
        memories = [] if on_heap else [self._all]
        sides: list[list[Tensor | None]] = [[], [], []]
        for i, pair in enumerate(lists.pairs):
            for k, form in enumerate(pair[1:]):
                if k == 2 and lists.out != "list":
                    continue
                if isinstance(form, str):
                    sides[k].append(sides[SIDES.index(form)][i])
                elif form is None:
                    sides[k].append(None)
                else:
                    start = 0 if on_heap else (3 * i + k) * self._size
                    if on_heap:
                        size = form.nbytes(pair.shape) + form.dtype.itemsize
                        memories.append(torch.zeros(-(-size // 8) * 8, dtype=torch.uint8))
                    whole = memories[-1].view(form.dtype)
                    offset = start // form.dtype.itemsize + form.shift
                    sides[k].append(whole.as_strided(pair.shape, form.strides(pair.shape), offset))
                    if k == 2:
                        sides[k][-1].fill_(torch.nan)
        return Placed(*sides[:2], sides[2] if lists.out == "list" else lists.out, memories)


def fill(placed: Placed, values: Values) -> None:
    for i, pair in enumerate(zip(placed.forget, placed.retain, strict=True)):
        numel = next((t.numel() for t in pair if t is not None), 0)
        extreme = values.kind == "extreme" and any(t is not None and t.dtype == torch.float16 for t in pair)
        kind = values._replace(kind="normal") if extreme else values
        for t, x in zip(pair, numbers(kind, i, numel), strict=True):
            if t is not None and t.numel():
                stored = x.float().to(t.dtype) if t.dtype.itemsize == 2 else x.to(t.dtype)
                written = t[0] if t.ndim and t.stride(0) == 0 and len(t) > 1 else t
                written.copy_(stored[: written.numel()].view(written.shape))


KINDS = (
    "normal",
    "sparse",
    "opposite",
    "alike",
    "equal",
    "antiparallel",
    "small",
    "large",
    "small retain",
    "zeros",
)
SPECIAL = (0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 6e-8, -6e-8, 3e38, -3e38, 65504.0)


@lru_cache(maxsize=4096)
def numbers(values: Values, i: int, numel: int) -> tuple[Tensor, Tensor]:
    kind = KINDS[(values.seed + i) % len(KINDS)] if values.kind == "mixed" else values.kind
    f, r = inputs.normal(2 * numel, 1000 * values.seed + i).view(2, numel)
    if kind == "special":
        every = torch.tensor(SPECIAL, dtype=torch.float64)
        return tuple(every[(abs(x) * 1e4).long() % len(SPECIAL)] for x in (f, r))
    return {
        "normal": lambda: (f, r),
        "sparse": lambda: (f * (r > 0), r * (f < 0.5)),
        "opposite": lambda: (f, -f.sign() * r.abs()),
        "alike": lambda: (f, f.sign() * r.abs()),
        "equal": lambda: (f, f),
        "antiparallel": lambda: (f, -2 * f),
        "small": lambda: (1e-3 * f, 1e-3 * r),
        "large": lambda: (1e3 * f, 1e3 * r),
        "extreme": lambda: (1e17 * f, 1e17 * r) if values.seed % 2 else (smallest(f), smallest(r)),
        "small retain": lambda: (f, 1e-3 * r),
        "zeros": lambda: (f * (values.seed % 2), r * (values.seed % 3 > 0)),
    }[kind]()


def smallest(x: Tensor) -> Tensor:
    """Numbers down to 1e-18. Squares of smaller ones lose digits in fp32, and no accuracy is promised."""
    return 1e-17 * x.abs().clamp(min=0.1).copysign(x)


class Surroundings:
    """Compares the memory of lists with an earlier state, except for elements that are written."""

    def __init__(self, placed: Placed) -> None:
        self._memories = placed.memories
        self._before = [m.clone() for m in placed.memories]

    def check(self, written: Sequence[Tensor | None] = ()) -> None:
        for memory, before in zip(self._memories, self._before, strict=True):
            now = memory.clone()
            for t in written:
                if t is not None and t.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr():
                    place = t.shape, t.stride(), t.storage_offset()
                    now.view(t.dtype).as_strided(*place).copy_(before.view(t.dtype).as_strided(*place))
            assert torch.equal(now, before), "written outside of an output"


def copies(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Copies with the same strides."""
    return [None if t is None else on_device(t, "cpu") for t in tensors]


class OnLists:
    """Runs steps on lists, and checks what they write."""

    def __init__(self, lists: Sequence[Lists], backend: str | None) -> None:
        self._lists, self._backend = lists, backend
        self._memory = Memory(lists)
        self._plans: list[tuple[sago.Plan, Placed, Options, list[Tensor]]] = []

    def call(self, step: Call) -> None:
        lists = self._lists[step.lists % len(self._lists)]
        placed = self._memory.place(lists, step.on_heap)
        options = step.options.checked(len(lists.pairs))
        values = allowed(step.values, options)
        fill(placed, values)
        forget, retain = copies(placed.forget), copies(placed.retain)
        around = Surroundings(placed)
        sides = given(placed, step.given if len(lists.pairs) == 1 or step.given != "tensor" else "list")
        rest = {**options.made, **options.weights, "backend": self._backend}
        if step.new:
            updates, report = sago.synthesize(*sides[:2], **rest)
            updates = [updates] if isinstance(updates, Tensor) else updates
            around.check()
            like = [f if r is None else r for f, r in zip(forget, retain, strict=True)]
            like = [None if t is None else torch.empty_like(t) for t in like]
        else:
            report = sago.synthesize_(*sides[:2], out=sides[2], **rest)
            updates = like = placed.targets
            around.check(updates)
        check(updates, report, forget, retain, like, options, values)

    def make_plan(self, step: MakePlan) -> None:
        lists = self._lists[step.lists % len(self._lists)]
        options = step.options.checked(len(lists.pairs))
        if rule_of(options.rule).seed is not None:
            options = options._replace(rule="sago").checked(len(lists.pairs))
        placed = self._memory.place(lists)
        around = Surroundings(placed)
        plan = sago.Plan(placed.forget, placed.retain, out=placed.out, backend=self._backend, **options.made)
        around.check()
        moved = []
        if step.moves:
            every = chain(placed.forget, placed.retain, placed.targets)
            moved = list({id(t): t for t in every if t is not None}.values())
            placed = self._memory.place(lists)
            for t in moved:
                t.data = torch.full_like(t, 7.0)
        self._plans.append((plan, placed, options, moved))

    def run_plan(self, step: RunPlan) -> None:
        if not self._plans:
            self.make_plan(MakePlan(step.plan, Options("sago")))
        plan, placed, options, moved = self._plans[step.plan % len(self._plans)]
        options = options._replace(gamma=step.gamma, alpha=step.alpha).checked(len(placed.forget))
        values = allowed(step.values, options)
        for t in placed.out if isinstance(placed.out, list) else ():
            if t is not None:
                t.fill_(torch.nan)
        fill(placed, values)
        forget, retain = copies(placed.forget), copies(placed.retain)
        around = Surroundings(placed)
        report = plan.synthesize_(**options.weights)
        around.check(placed.targets)
        assert all((t == 7.0).all() for t in moved), "a plan has written to other memory"
        check(placed.targets, report, forget, retain, placed.targets, options, values)

    def mistake(self, step: Mistake) -> None:
        lists = self._lists[step.lists % len(self._lists)]
        options = step.options.checked(len(lists.pairs))
        placed = self._memory.place(lists)
        fill(placed, Values("normal", step.at))
        arguments = {"forget": placed.forget, "retain": placed.retain, "out": placed.out, **options.made}
        arguments |= options.weights | {"backend": self._backend}
        if not spoil(arguments, step.kind, step.at):
            return
        around = Surroundings(placed)
        error = (KeyError,) if step.kind == "reduce_gram" else (ValueError, TypeError)
        with raises(*error):
            sago.synthesize_(**arguments)
        around.check()


@contextmanager
def raises(*errors: type[Exception], text: str = "") -> Iterator[None]:
    """Like `pytest.raises`, whose failure is no exception that hypothesis knows."""
    found = None
    try:
        yield
    except errors as error:
        found = error
    assert found is not None, f"none of {errors} was raised"
    assert re.search(text, str(found)), found


def given(placed: Placed, form: str) -> list[Any]:
    """Forget, retain and out in the form in which a caller gives them."""
    convert = {"list": list, "tuple": tuple, "iterator": iter, "tensor": lambda x: x[0]}[form]
    if form == "tensor" and (placed.forget[0] is None or placed.retain[0] is None):
        convert = list
    sides = [placed.forget, placed.retain, placed.out]
    return [convert(side) if isinstance(side, list) else side for side in sides]


def allowed(values: Values, options: Options) -> Values:
    """NaN and inf are compared with the reference bit for bit, so the rule has to be elementwise."""
    special = values.kind == "special"
    element = rule_of(options.rule).scope == "element" and options.floor == 0.0
    return values._replace(kind="normal") if special and not element else values


def check(
    updates: Sequence[Tensor | None],
    report: sago.SynthesisReport,
    forget: Sequence[Tensor | None],
    retain: Sequence[Tensor | None],
    like: Sequence[Tensor | None],
    options: Options,
    values: Values,
) -> None:
    """Compares the updates with the oracle, and with the bits of the reference if the rule is elementwise."""
    for u, t in zip(updates, like, strict=True):
        assert (u is None) == (t is None)
        assert u is None or (u.dtype, u.shape) == (t.dtype, t.shape)
    known, definition = options.known, definition_of(options.rule)
    expected = None
    if definition is not None and values.kind != "special":
        expected = oracle.expect(forget, retain, definition, **known)
        if not expected.certain:
            return
    if rule_of(options.rule).scope == "element":
        poisoned = [None if t is None else on_device(t, "cpu").fill_(torch.nan) for t in like]
        same = sago.reference.synthesize_(forget, retain, options.made["rule"], out=poisoned, **known)
        properties.assert_equal_bits(updates, poisoned)
        if expected is None and options.stats:
            for field in ("conflict_fraction", *properties.COUNTS):
                assert torch.equal(getattr(report, field), getattr(same, field)), field
    if expected is not None:
        properties.assert_expected(updates, expected)
        if options.stats:
            properties.assert_expected_report(report, expected)


def spoil(arguments: dict[str, Any], kind: str, at: int) -> bool:
    """Makes one argument wrong. Returns False if these lists cannot be wrong in this way."""
    sides = {name: list(arguments[name]) for name in ("forget", "retain")}
    at %= len(sides["forget"])
    f, r = sides["forget"][at], sides["retain"][at]
    rule = sago.rules.resolve(arguments["rule"])
    if kind in ("rule", "backend"):
        arguments[kind] = "none of these"
    elif kind in ("gamma", "alpha"):
        arguments[kind] = torch.ones(2)
    elif kind in ("eps", "retain_floor"):
        arguments[kind] = float("nan") if at else -1.0
    elif kind == "groups":
        arguments[kind] = list(range(len(sides["forget"]) + 1))
    elif kind == "length":
        arguments["forget"] = sides["forget"][:-1]
    elif kind == "shape" and f is not None and r is not None:
        sides["retain"][at] = torch.zeros(*r.shape, 2)
        arguments["retain"] = sides["retain"]
    elif kind == "dtype" and f is not None:
        sides["forget"][at] = torch.zeros(f.shape, dtype=torch.int64)
        arguments["forget"] = sides["forget"]
    elif kind == "overlap" and len(sides["forget"]) > 1:
        if isinstance(arguments["out"], list):
            sides["out"] = list(arguments["out"])
        written = sides["out" if "out" in sides else arguments["out"] or "retain"][at]
        if written is None or written.numel() == 0:
            return False
        for side in sides.values():  # a pair twice
            side[at - 1] = side[at]
        arguments |= sides
    elif kind == "reduce_gram" and rule.seed is None and (arguments["stats"] or rule.scope != "element"):
        arguments[kind] = _raise
    else:
        return False
    return True


def _raise(table: Tensor) -> None:
    raise KeyError("reduce_gram")


MISTAKES = (
    *("rule", "backend", "gamma", "alpha", "eps", "retain_floor", "groups", "length", "shape", "dtype"),
    *("overlap", "overlap", "overlap", "reduce_gram", "reduce_gram"),
)
SMALL = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 130, 257)
LARGE = (*SMALL, 2047, 2049, 32767, 32768, 32769, 65537, 70001)


PLACES = list(product((*["rows"] * 3, "columns", "spaced"), (0, 0, 0, 1, 3)))
PECULIARITIES = (
    *[None] * 6,
    *("aligned", "aligned", "no forget", "no retain", "neither", "same", "expanded"),
)


class Space:
    """The lists that are drawn. Few draws of many values are quick, and the first value is the simplest."""

    def __init__(
        self, sizes: Sequence[int] = SMALL, length: int = 5, dtypes: Sequence[torch.dtype] = DTYPES
    ) -> None:
        shapes = [(n,) for n in sizes] * 4 + [shape for n in sizes for shape in ((n // 2, 2), (2, n // 2))]
        self.shapes = st.sampled_from([*shapes, (0, 3), ()])
        self.dtypes = st.sampled_from(list(product(dtypes, repeat=3)))
        self.lists = st.sampled_from(
            list(product((None, None, "forget", "list", "list"), [None, *dtypes], range(1, length + 1)))
        )


PLACES_OF_PAIRS = st.sampled_from(list(product(PLACES, repeat=3)))
KINDS_OF_PAIRS = st.sampled_from(list(product(PECULIARITIES, (None, None, "forget", "retain"))))


def _pair(draw: Any, space: Space, out: str | None, dtype: torch.dtype | None) -> Pair:
    shape, places, (peculiar, alias) = draw(space.shapes), draw(PLACES_OF_PAIRS), draw(KINDS_OF_PAIRS)
    dtypes = draw(space.dtypes) if dtype is None else [dtype] * 3
    forget, retain, written = (Form(d, *place) for d, place in zip(dtypes, places, strict=True))
    if peculiar == "aligned":
        forget, retain = (form._replace(order="rows", shift=0) for form in (forget, retain))
    elif peculiar == "same":
        return Pair(shape, forget, "forget", alias or written)
    elif peculiar == "neither":
        return Pair(shape, None, None, None)
    elif peculiar == "no forget" and out != "forget":
        return Pair(shape, None, retain, "retain" if alias else written)
    elif peculiar == "no retain" and out is not None:
        return Pair(shape, forget, None, "forget" if alias else written)
    elif peculiar == "expanded" and out == "list":
        if alias == "retain":
            return Pair(shape, forget._replace(order="expanded"), retain, alias)
        return Pair(shape, forget, retain._replace(order="expanded"), alias or written)
    return Pair(shape, forget, retain, alias or written)


def draw_lists(draw: Any, space: Space) -> Lists:
    out, dtype, length = draw(space.lists)
    return Lists(tuple(_pair(draw, space, out, dtype) for _ in range(length)), out)


def draw_changed(draw: Any, space: Space, found: Lists) -> Lists:
    """Lists that differ from these in one respect, most often at the same addresses."""
    how, side, i = draw(CHANGES)
    pairs, i = found.pairs, i % len(found.pairs)
    pair = pairs[i]
    written = [form for pair in pairs for form in pair[1:3]]
    if how == "out" and all(isinstance(form, Form) and form.order != "expanded" for form in written):
        return found._replace(out={None: "forget", "forget": None}.get(found.out, "forget"))
    if how == "reversed":
        return found._replace(pairs=pairs[::-1])
    if how == "shorter" and len(pairs) > 1:
        return found._replace(pairs=pairs[:i] + pairs[i + 1 :])
    form = getattr(pair, side)
    if how == "shape":
        pair = pair._replace(shape=draw(space.shapes))
    elif how == "dtype" and isinstance(form, Form):
        pair = pair._replace(**{side: form._replace(dtype=draw(space.dtypes)[0])})
    elif how == "order" and isinstance(form, Form) and form.order != "expanded":
        pair = pair._replace(**{side: form._replace(order="columns" if form.order == "rows" else "rows")})
    else:
        pair = _pair(draw, space, found.out, None)
    return found._replace(pairs=(*pairs[:i], pair, *pairs[i + 1 :]))


RESPECTS = (*["shape", "dtype", "order", "out"] * 2, "pair", "shorter", "reversed")
CHANGES = st.sampled_from(list(product(RESPECTS, SIDES, range(4))))


VALUES = [Values(*x) for x in product(("mixed", "normal", "mixed", "special", "extreme", "zeros"), range(50))]
WEIGHTS = [
    Weight(float(int(value)) if kind == "int" else value, kind)
    for kind in ("float", "float", "float64", "float32", "bfloat16", "int")
    for value in (1.0, 1.0, 2.0, 0.75, 1 / 3, 0.0, -1.5, 1e-3)
]
PAIRS_OF_WEIGHTS = st.sampled_from(list(product(WEIGHTS, WEIGHTS)))
FLAGS = st.sampled_from(
    list(
        product(
            (0.0, 0.0, 0.0, 1e-10, 1.0),
            (True, False),
            (None, None, None, (0,), (0, 1), ("a", "b", "a"), (1, 0, 0, 2)),
            (0.0, 0.0, 0.0, 0.7, 1e-3, 1.9),
            (False, False, False, True),
        )
    )
)
AT = range(4)
CALLS = st.sampled_from(list(product(AT, VALUES)))
FORMS = st.sampled_from(
    list(
        product(
            (False, False, True), (False, False, False, True), ("list", "list", "tuple", "iterator", "tensor")
        )
    )
)
PLANS = st.sampled_from(list(product(AT, (False, True))))
WRONG = st.sampled_from(list(product(AT, MISTAKES, AT)))
STEPS = ("call", *["again"] * 4, "make", "run", "run", "mistake", "mistake")


def draw_options(draw: Any, rules: st.SearchStrategy[Name]) -> Options:
    return Options(draw(rules), *draw(PAIRS_OF_WEIGHTS), *draw(FLAGS))


def draw_step(draw: Any, kind: str, rules: st.SearchStrategy[Name], before: Sequence[Any]) -> Any:
    """A step of this kind. "again" is an earlier call on other lists or with other values."""
    calls = [step for step in before if isinstance(step, Call)]
    if kind == "again" and calls:
        at, values = draw(CALLS)
        return calls[-1]._replace(lists=calls[-1].lists + at, values=values)
    if kind == "run":
        return RunPlan(*draw(CALLS), *draw(PAIRS_OF_WEIGHTS))
    options = draw_options(draw, rules)
    if kind in ("call", "again"):
        return Call(*draw(CALLS), options, *draw(FORMS))
    if kind == "make":
        at, moves = draw(PLANS)
        return MakePlan(at, options, moves)
    return Mistake(*draw(WRONG), options)
