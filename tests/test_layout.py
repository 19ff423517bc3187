"""The algebra of layouts, held to brute-force enumeration of positions.

Every dim gets a tag for each position: the unit of each axis that takes part there. Whatever the
algebra does to compositions must do to the tags what the operation does to positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphgrow.ir import layout
from graphgrow.ir.layout import (
    CUT_THROUGH,
    ONE,
    Atom,
    Composition,
    Layout,
    Misaligned,
    bind,
    cut,
    expand,
    freeze,
    fresh,
    join,
    leaves,
    settle,
    size_of,
    split,
    unify,
)

# A tag says which unit of which axis takes part at one position, of every axis that does.
Tag = tuple[tuple[int, int], ...]


def tags(parts: Composition) -> list[Tag]:
    """Return the tag of every position, by enumeration; axes of width one say nothing."""
    out: list[Tag] = []
    for term in parts:
        factors = [_atom_tags(atom) for atom in term]
        out.extend(tuple(itertools.chain(*picked)) for picked in itertools.product(*factors))
    return out


def _atom_tags(atom: Atom) -> list[Tag]:
    if atom.bound is not None:
        return tags(atom.bound)
    return [((id(atom), unit),) if atom.size > 1 else () for unit in range(atom.size)]


def table(dims: list[Composition]) -> np.ndarray:
    """Return the tags of a tensor's entries, in its shape."""
    found = [tags(parts) for parts in dims]
    entries = np.empty([len(t) for t in found], dtype=object)
    for places in np.ndindex(*entries.shape):
        entries[places] = tuple(
            itertools.chain(*(t[i] for t, i in zip(found, places, strict=True)))
        )
    return entries


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and all(x == y for x, y in zip(a.flat, b.flat, strict=True))


# ------------------------------------------------------------------------------ what is drawn

widths = st.integers(1, 4)


@st.composite
def atoms(draw: st.DrawFn, depth: int = 1) -> Atom:
    """Return axes, some of them bound to a sum or a product, some frozen."""
    if depth and draw(st.integers(0, 3)) == 0:
        parts = draw(compositions(depth=depth - 1))
        return Atom(size_of(parts), bound=parts)
    return Atom(draw(widths), frozen=draw(st.sampled_from([None, None, None, "is frozen"])))


@st.composite
def compositions(draw: st.DrawFn, depth: int = 1) -> Composition:
    """Return sums of products; axes may repeat between terms, never inside one."""
    pool = draw(st.lists(atoms(depth), min_size=1, max_size=3))
    one = st.lists(st.sampled_from(pool), max_size=2, unique_by=id).map(tuple)
    return tuple(draw(st.lists(one, min_size=1, max_size=3)))


@st.composite
def groupings(draw: st.DrawFn, factors: list[int]) -> list[int]:
    """Return sizes that group consecutive factors."""
    ends = sorted(draw(st.sets(st.integers(1, max(len(factors) - 1, 1)))))
    places = [0, *[e for e in ends if e < len(factors)], len(factors)]
    return [math.prod(factors[a:b]) for a, b in itertools.pairwise(places)]


factors = st.lists(st.integers(2, 3), min_size=1, max_size=5)


def cuts(size: int) -> st.SearchStrategy[list[int]]:
    """Return sizes of consecutive pieces, empty ones too."""
    inner = st.lists(st.integers(0, size), max_size=3).map(sorted)
    return inner.map(lambda at: [b - a for a, b in itertools.pairwise([0, *at, size])])


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Composition, Composition]:
    """Return two compositions of one size, the smaller one with an axis more to be so."""
    pair = [draw(compositions()), draw(compositions())]
    small = 0 if size_of(pair[0]) < size_of(pair[1]) else 1
    missing = size_of(pair[1 - small]) - size_of(pair[small])
    more = fresh(missing) if missing else ()
    pair[small] = more + pair[small] if draw(st.booleans()) else pair[small] + more
    return pair[0], pair[1]


@st.composite
def sums(draw: st.DrawFn, size: int) -> Composition:
    """Return sums of single axes, some of them frozen."""
    sizes = [n for n in draw(cuts(size)) if n]
    return tuple((Atom(n, frozen=draw(st.sampled_from([None, "is frozen"]))),) for n in sizes)


def free(parts: Composition) -> list[Atom]:
    """Return the axes of a composition that may change, each once."""
    return list({id(a): a for a in leaves(parts) if a.frozen is None}.values())


def held(parts: Composition) -> list[bool]:
    """Return for every position of a sum of axes whether its axis is frozen."""
    return [a.frozen is not None for (a,) in expand(parts) for _ in range(a.size)]


# ------------------------------------------------------------------------------ expand, leaves


@given(compositions())
def test_expanding_keeps_every_position(parts: Composition) -> None:
    before = tags(parts)
    assert tags(expand(parts)) == before
    assert size_of(expand(parts)) == size_of(parts) == len(before)


@given(compositions())
def test_expanding_twice_is_expanding_once(parts: Composition) -> None:
    once = expand(parts)
    assert expand(once) == once


@given(compositions())
def test_leaves_are_all_the_axes_there_are(parts: Composition) -> None:
    found = list(leaves(parts))
    assert all(atom.bound is None for atom in found)
    sizes = {id(a) for a in found if a.size > 1}
    assert {axis for tag in tags(parts) for axis, _ in tag} <= sizes


@given(compositions())
def test_freezing_reaches_all_axes_and_keeps_the_first_reason(parts: Composition) -> None:
    reasons = {id(atom): atom.frozen or "is held" for atom in leaves(parts)}
    freeze(parts, "is held")
    freeze(parts, "is held again")
    assert {id(atom): atom.frozen for atom in leaves(parts)} == reasons


def test_an_axis_bound_to_itself_is_refused() -> None:
    (((a,),), ((b,),)) = fresh(4), fresh(2)
    with pytest.raises(Misaligned, match="contain itself"):
        bind(a, ((a, b),))


def test_a_frozen_axis_freezes_what_it_is_bound_to() -> None:
    (((a,),), ((b,),)) = fresh(4, "is held"), fresh(4)
    bind(a, ((b,),))
    assert b.frozen == "is held"


# ------------------------------------------------------------------------------ unify


@given(pairs())
def test_what_is_unified_is_the_same_at_every_position(
    pair: tuple[Composition, Composition],
) -> None:
    a, b = pair
    try:
        unify(a, b)
    except Misaligned:
        return
    assert tags(a) == tags(b)


@given(pairs())
def test_what_is_unified_is_free_in_both_or_in_none(pair: tuple[Composition, Composition]) -> None:
    a, b = pair
    try:
        unify(a, b)
    except Misaligned:
        return
    assert set(free(a)) == set(free(b))


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(sums(n), sums(n))))
def test_what_was_frozen_stays_frozen(pair: tuple[Composition, Composition]) -> None:
    before = [x or y for x, y in zip(*map(held, pair), strict=True)]
    unify(*pair)
    for parts in pair:
        assert all(now for was, now in zip(before, held(parts), strict=True) if was)


@given(factors.flatmap(lambda f: st.tuples(groupings(f), groupings(f))))
def test_products_of_one_refinement_always_unify(sizes: tuple[list[int], list[int]]) -> None:
    a, b = (join([fresh(n) for n in some]) for some in sizes)
    unify(a, b)
    assert tags(a) == tags(b)
    assert not any(atom.frozen for atom in leaves(a))


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(cuts(n), cuts(n))))
def test_sums_always_unify(sizes: tuple[list[int], list[int]]) -> None:
    a, b = (tuple(term for n in some if n for term in fresh(n)) for some in sizes)
    unify(a, b)
    assert tags(a) == tags(b)
    ends = [set(itertools.accumulate(n for n in some if n)) for some in sizes]
    assert {leaf.size for leaf in leaves(a)} == {
        y - x for x, y in itertools.pairwise(sorted({0} | ends[0] | ends[1]))
    }


@given(compositions())
def test_unifying_with_itself_changes_nothing(parts: Composition) -> None:
    before = tags(parts), free(parts)
    unify(parts, parts)
    assert (tags(parts), free(parts)) == before


@given(compositions())
def test_unifying_twice_is_unifying_once(parts: Composition) -> None:
    other = fresh(size_of(parts))
    unify(parts, other)
    before = tags(parts), tags(other), free(parts)
    unify(other, parts)
    assert (tags(parts), tags(other), free(parts)) == before


@given(factors.flatmap(lambda f: st.tuples(groupings(f), groupings(f))))
def test_unifying_is_the_same_either_way(sizes: tuple[list[int], list[int]]) -> None:
    shapes = []
    for order in (1, -1):
        pair = [join([fresh(n) for n in some]) for some in sizes]
        unify(*pair[::order])
        shapes.append([[atom.size for atom in leaves(parts)] for parts in pair])
    assert shapes[0] == shapes[1]


def test_different_sizes_do_not_unify() -> None:
    with pytest.raises(Misaligned, match="sizes 3 and 4 differ"):
        unify(fresh(3), fresh(4))


def test_a_frozen_axis_freezes_what_it_is_unified_with() -> None:
    a, b = fresh(6, "is held"), join([fresh(2), fresh(3)])
    unify(a, b)
    assert [atom.frozen for atom in leaves(b)] == ["is held", "is held"]


def test_factors_of_a_frozen_axis_are_frozen() -> None:
    dims = split(fresh(6, "is held"), [2, 3])
    assert [atom.frozen for d in dims for atom in leaves(d)] == ["is held", "is held"]


def test_an_axis_that_is_unified_with_size_one_is_frozen() -> None:
    for pair in ((fresh(1), ONE), (ONE, fresh(1))):
        unify(*pair)
        assert [atom.frozen for parts in pair for atom in leaves(parts)] == [layout.ONE_ONLY]


def test_terms_that_repeat_an_axis_are_cut_alike() -> None:
    a = fresh(4)
    parts, other = (*a, *a), (*fresh(1), *fresh(3), *fresh(4))
    unify(parts, other)
    assert tags(parts) == tags(other) == tags(a) * 2


def test_twelve_as_three_by_four_and_as_two_by_six_has_no_refinement() -> None:
    a, b = join([fresh(3), fresh(4)]), join([fresh(2), fresh(6)])
    with pytest.raises(Misaligned):
        unify(a, b)


@given(st.sampled_from([(2, 6), (3, 4), (4, 3), (6, 2)]), st.sampled_from([(2, 6), (4, 3)]))
def test_two_views_of_one_axis_agree_or_are_refused(
    first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    parts = fresh(12)
    whole = split(parts, first)
    try:
        other = split(parts, second)
    except Misaligned:
        assert first[0] % second[0] and second[0] % first[0]
        return
    assert same(table(whole).reshape(-1), table(other).reshape(-1))


def test_twelve_as_two_by_six_and_as_four_by_three_is_two_by_two_by_three() -> None:
    parts = fresh(12)
    split(parts, [2, 6])
    split(parts, [4, 3])
    assert [atom.size for atom in leaves(parts)] == [2, 2, 3]
    assert not any(atom.frozen for atom in leaves(parts))


# ------------------------------------------------------------------------------ join and split


@given(st.lists(compositions(), min_size=1, max_size=3))
def test_joining_enumerates_positions_row_major(dims: list[Composition]) -> None:
    before = table(dims)
    assert same(table([join(dims)]), before.reshape(-1))


@given(compositions(), compositions(), compositions())
def test_joining_is_associative(a: Composition, b: Composition, c: Composition) -> None:
    wanted = tags(join([a, b, c]))
    assert tags(join([join([a, b]), c])) == wanted
    assert tags(join([a, join([b, c])])) == wanted


@given(factors.flatmap(lambda f: st.tuples(groupings(f), groupings(f))))
def test_splitting_enumerates_positions_row_major(sizes: tuple[list[int], list[int]]) -> None:
    before, after = sizes
    whole = join([fresh(n) for n in before])
    dims = split(whole, after)
    assert [size_of(d) for d in dims] == after
    assert same(table(dims).reshape(-1), table([whole]))


@given(compositions(), st.data())
def test_a_split_of_a_sum_is_right_or_refused(parts: Composition, data: st.DataObject) -> None:
    sizes: list[int] = []
    left = size_of(parts)
    for _ in range(data.draw(st.integers(1, 2))):
        sizes.append(data.draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0])))
        left //= sizes[-1]
    sizes.append(left)
    try:
        dims = split(parts, sizes)
    except Misaligned:
        return
    assert [size_of(d) for d in dims] == sizes
    assert same(table(dims).reshape(-1), table([parts]))


@given(st.lists(compositions(), min_size=2, max_size=3))
def test_splitting_undoes_joining(dims: list[Composition]) -> None:
    try:
        after = split(join(dims), [size_of(d) for d in dims])
    except Misaligned:
        return
    assert same(table(after), table(dims))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_splitting_a_product_gives_its_factors(sizes: list[int]) -> None:
    dims = [fresh(n) for n in sizes]
    parts = split(join(dims), sizes)
    assert [tags(p) for p in parts] == [tags(d) for d in dims]


@given(st.lists(st.integers(1, 3), min_size=2, max_size=4))
def test_an_axis_of_width_one_is_frozen_where_a_reshape_loses_it(sizes: list[int]) -> None:
    dims = [fresh(n) for n in sizes]
    joined = join(dims)
    for n, dim in zip(sizes, dims, strict=True):
        (atom,) = leaves(dim)
        assert (atom.frozen is not None) == (n == 1)
        assert n == 1 or atom in list(leaves(joined))


def test_an_axis_of_width_one_is_frozen_where_a_split_loses_it() -> None:
    ((atom,),) = parts = fresh(1)
    assert split(parts, [1, 1]) == [ONE, ONE]
    assert atom.frozen is not None


def test_a_view_of_equal_terms_ties_them() -> None:
    a, b = fresh(3), fresh(3)
    lead, rest = split((*a, *b), [2, 3])
    assert lead == ((), ())
    assert tags(a) == tags(b) == tags(rest)


# ------------------------------------------------------------------------------ cut


@given(compositions().flatmap(lambda p: st.tuples(st.just(p), cuts(size_of(p)))))
def test_pieces_together_are_the_dim(drawn: tuple[Composition, list[int]]) -> None:
    parts, sizes = drawn
    try:
        pieces = cut(parts, sizes)
    except Misaligned:
        return
    assert [size_of(p) for p in pieces] == sizes
    assert [tag for p in pieces for tag in tags(p)] == tags(parts)


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), cuts(n))))
def test_an_axis_is_cut_into_axes_of_the_pieces(drawn: tuple[int, list[int]]) -> None:
    size, sizes = drawn
    parts = fresh(size)
    pieces = cut(parts, sizes)
    assert [[a.size for a in leaves(p)] for p in pieces] == [[n] if n else [] for n in sizes]
    assert [a for p in pieces for a in leaves(p)] == list(leaves(parts))
    assert not any(a.frozen for a in leaves(parts))


def test_the_unit_that_a_cut_goes_through_is_frozen() -> None:
    a, b = fresh(4), fresh(3)
    pieces = cut(join([a, b]), [5, 7])
    assert [size_of(p) for p in pieces] == [5, 7]
    assert [(atom.size, atom.frozen) for atom in leaves(a)] == [
        (1, None),
        (1, CUT_THROUGH),
        (2, None),
    ]


def test_pieces_of_a_frozen_axis_are_frozen() -> None:
    pieces = cut(fresh(5, "is held"), [2, 3])
    assert {a.frozen for p in pieces for a in leaves(p)} == {"is held"}


# ------------------------------------------------------------------------------ layouts

NAMES = ("a", "b", "c")
sizes_of_axes = st.fixed_dictionaries({name: st.integers(0, 3) for name in NAMES})


def layouts(depth: int = 2) -> st.SearchStrategy[Layout]:
    """Return layouts over a few axes, numbers and inner layouts."""
    factor: st.SearchStrategy = st.one_of(st.sampled_from(NAMES), st.integers(0, 3))
    if depth:
        factor = factor | layouts(depth - 1)
    term = st.lists(factor, max_size=3).map(tuple)
    return st.lists(term, max_size=3).map(lambda terms: Layout(tuple(terms)))


Place = tuple[tuple[str | int, int], ...]


def places(dim: Layout, sizes: dict[str, int], path: tuple[int, ...] = ()) -> Iterator[Place]:
    """Yield what is at every position, by enumeration: the unit of each axis in each factor."""
    for term in dim.terms:
        yield from map(_flat, itertools.product(*(_units(f, sizes) for f in term)))


def _units(factor: str | int | Layout, sizes: dict[str, int]) -> list[Place]:
    if isinstance(factor, Layout):
        return list(places(factor, sizes))
    width = factor if isinstance(factor, int) else sizes[factor]
    return [((factor, unit),) for unit in range(width)]


def _flat(many: tuple[Place, ...]) -> Place:
    return tuple(itertools.chain(*many))


@given(layouts(), sizes_of_axes)
def test_the_size_of_a_layout_counts_its_positions(dim: Layout, sizes: dict[str, int]) -> None:
    assert dim.size(sizes) == len(list(places(dim, sizes)))


@given(layouts())
def test_the_axes_of_a_layout_are_those_written(dim: Layout) -> None:
    assert list(dim.axes()) == [c for c in str(dim) if c in NAMES]


@given(layouts(), sizes_of_axes, st.sampled_from(NAMES))
def test_units_are_those_enumerated(dim: Layout, sizes: dict[str, int], axis: str) -> None:
    enumerated = [
        max([unit for name, unit in place if name == axis], default=-1)
        for place in places(dim, sizes)
    ]
    assert dim.units(sizes, axis).tolist() == enumerated


@given(layouts(), sizes_of_axes, st.sampled_from(NAMES), st.data())
def test_origins_are_those_enumerated(
    dim: Layout, sizes: dict[str, int], axis: str, data: st.DataObject
) -> None:
    units = data.draw(st.lists(st.integers(-1, sizes[axis] - 1), max_size=4))
    grown = {**sizes, axis: len(units)}
    old = _numbered(dim, sizes)
    wanted = [_old_place(place, axis, units, old) for place in _numbered(dim, grown)]
    found = dim.origin(sizes, {axis: np.array(units, dtype=np.int64)})
    assert found.tolist() == wanted


def _numbered(dim: Layout, sizes: dict[str, int]) -> dict[tuple, int]:
    """Return the position of every place, places told apart by the terms that they are in."""
    return {place: i for i, place in enumerate(_paths(dim, sizes))}


def _paths(dim: Layout, sizes: dict[str, int]) -> Iterator[tuple]:
    for k, term in enumerate(dim.terms):
        lists = [
            [("in", p) for p in _paths(f, sizes)] if isinstance(f, Layout) else _units(f, sizes)
            for f in term
        ]
        for picked in itertools.product(*lists):
            yield (k, *picked)


def _old_place(place: tuple, axis: str, units: list[int], old: dict[tuple, int]) -> int:
    moved = _moved(place, axis, units)
    return -1 if moved is None else old[moved]


def _moved(place: tuple, axis: str, units: list[int]) -> tuple | None:
    """Return a new place as an old one, None where a new unit takes part."""
    out: list = [place[0]]
    for part in place[1:]:
        if part[0] == "in":
            inner = _moved(part[1], axis, units)
            if inner is None:
                return None
            out.append(("in", inner))
        else:
            ((name, unit),) = part
            unit = units[unit] if name == axis else unit
            if unit < 0:
                return None
            out.append(((name, unit),))
    return tuple(out)


@given(compositions())
def test_a_settled_layout_has_the_positions_of_its_composition(parts: Composition) -> None:
    names = {atom: f"x{i}" for i, atom in enumerate(dict.fromkeys(leaves(parts)))}
    numbers = {id(atom): name for atom, name in names.items()}
    sizes = {name: atom.size for atom, name in names.items()}
    dim = settle(parts, names.__getitem__)
    assert dim.size(sizes) == size_of(parts)
    for name in sizes:
        units = [
            max([u for axis, u in tag if numbers[axis] == name], default=-1) for tag in tags(parts)
        ]
        if sizes[name] > 1:
            assert dim.units(sizes, name).tolist() == units


@given(compositions())
def test_axes_without_a_name_settle_as_numbers(parts: Composition) -> None:
    dim = settle(parts, lambda atom: atom.size)
    assert list(dim.axes()) == []
    assert dim.size({}) == size_of(parts)


@pytest.mark.parametrize(
    ("dim", "text"),
    [
        (Layout((("a",),)), "a"),
        (Layout((("a", 7, 7),)), "(a 7 7)"),
        (Layout((("a",), ("b",))), "(a + b)"),
        (Layout(((),)), "1"),
        (Layout(((2, Layout((("a",), ("b",)))),)), "(2 (a + b))"),
    ],
)
def test_layouts_print_as_patterns(dim: Layout, text: str) -> None:
    assert str(dim) == text


def test_module_has_no_other_public_names() -> None:
    """What is tested here is all there is: a new function of the algebra needs its property."""
    public = {n for n, f in vars(layout).items() if callable(f) and f.__module__ == layout.__name__}
    tested = "Misaligned Atom fresh term_size size_of expand leaves freeze bind unify join split "
    assert {n for n in public if not n.startswith("_")} == set(
        (tested + "cut Layout settle").split()
    )
