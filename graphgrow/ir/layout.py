"""Axes and the algebra of layouts: how a dim is composed of axes, and what edits of axes do to it.

While a graph is analysed, an axis is an `Atom`: a union-find cell that may be bound to another
layout of the same size. A `Composition` is a sum (concatenation) of terms, a term a product
(row-major flattening) of atoms: `((a, b), (c,))` is `(a b) + c`, `((),)` is a dim of size one.
A sum that is not the leading factor of its product stays inside an atom of its own.
When the analysis is done, `settle` turns compositions into `Layout` values over axis names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


class Misaligned(Exception):
    """Two compositions have no common refinement; the message says where."""


@dataclass(eq=False, slots=True)
class Atom:
    """An axis under construction. `bound` is the composition that it turned out to be."""

    size: int
    bound: Composition | None = None
    frozen: str | None = None


Term = tuple[Atom, ...]
Composition = tuple[Term, ...]
ONE: Composition = ((),)
CUT_THROUGH = "has a unit that a reshape cuts through"
ONE_ONLY = "has width one where a dim always has size one"


def fresh(size: int, frozen: str | None = None) -> Composition:
    """Return a new axis of `size` units as a composition."""
    return ((Atom(size, frozen=frozen),),)


def term_size(term: Term) -> int:
    """Return the number of positions of a product."""
    return math.prod(atom.size for atom in term)


def size_of(parts: Composition) -> int:
    """Return the number of positions of a sum of products."""
    return sum(term_size(term) for term in parts)


def expand(parts: Composition) -> Composition:
    """Return `parts` over unbound atoms, except for sums that are not leading factors."""
    out: list[Term] = []
    for term in parts:
        out.extend(_expand_term(term))
    return tuple(out)


def _expand_term(term: Term) -> list[Term]:
    terms: list[Term] = [()]
    for atom in term:
        inner = _inside(atom)
        if len(inner) == 1:
            terms = [t + inner[0] for t in terms]
        elif all(not t for t in terms):
            terms = [t + i for t in terms for i in inner]
        else:
            terms = [(*t, atom) for t in terms]
    return terms


def _inside(atom: Atom) -> Composition:
    """Return what `atom` stands for, with chains of bindings shortened."""
    chain: list[Atom] = []  # of atoms that stand for one atom, in a loop: they can be long
    while (after := _only(atom.bound)) is not None and after.bound is not None:
        chain.append(atom)
        atom = after
    if atom.bound is None:
        return ((atom,),)
    if any(a.bound is not None for term in atom.bound for a in term):
        atom.bound = expand(atom.bound)
    for earlier in chain:
        earlier.bound = atom.bound
    return atom.bound


def _only(parts: Composition | None) -> Atom | None:
    """Return the atom that is all of `parts`, None where there is more or less."""
    return parts[0][0] if parts is not None and len(parts) == len(parts[0]) == 1 else None


def leaves(parts: Composition) -> Iterator[Atom]:
    """Yield every unbound atom of `parts`, those inside inner sums too."""
    for term in expand(parts):
        for atom in term:
            if atom.bound is None:
                yield atom
            else:
                yield from leaves(atom.bound)


def freeze(parts: Composition, reason: str) -> None:
    """Mark every axis of `parts` as unchangeable; the first reason given stays."""
    for atom in leaves(parts):
        atom.frozen = atom.frozen or reason


def bind(atom: Atom, parts: Composition) -> None:
    """Let `atom` stand for `parts`, which has the same size."""
    if any(leaf is atom for leaf in leaves(parts)):
        raise Misaligned(f"an axis of {atom.size} units would contain itself")
    if atom.frozen:
        freeze(parts, atom.frozen)
    atom.bound = parts


def unify(a: Composition, b: Composition) -> None:
    """Make `a` and `b` the same layout by binding atoms; raises Misaligned where impossible."""
    left, right = list(reversed(expand(a))), list(reversed(expand(b)))
    if size_of(a) != size_of(b):
        raise Misaligned(f"sizes {size_of(a)} and {size_of(b)} differ")
    if _whole(left, right) or _whole(right, left):
        return
    while left and right:
        x, y = left.pop(), right.pop()
        if x == y:
            continue
        if term_size(x) == term_size(y):
            _unify_terms(x, y)
        elif term_size(x) > term_size(y):
            left.extend(reversed(_cut_term(x, term_size(y))))
            right.append(y)
        else:
            right.extend(reversed(_cut_term(y, term_size(x))))
            left.append(x)
        left, right = _again(left), _again(right)
    for term in left + right:
        freeze((term,), "is one of several empty or equal parts")


def _again(stack: list[Term]) -> list[Term]:
    """Return a stack of terms with its next term expanded, since bindings may have changed it."""
    if not stack or all(atom.bound is None for atom in stack[-1]):
        return stack
    return [*stack[:-1], *reversed(_expand_term(stack[-1]))]


def _whole(single: list[Term], other: list[Term]) -> bool:
    """Bind a side that is one unbound atom to the whole other side; return whether it was."""
    if len(single) != 1 or len(single[0]) != 1 or single[0][0].bound is not None:
        return False
    atom, parts = single[0][0], tuple(reversed(other))
    if parts == ((),):
        freeze(((atom,),), ONE_ONLY)
    elif parts != ((atom,),):
        bind(atom, parts)
    return True


def _cut_term(term: Term, size: int) -> Composition:
    """Return `term` as a sum of terms with a boundary after `size` positions."""
    if not term:
        raise Misaligned("a dim of size one cannot be cut")
    head, tail = term[0], term[1:]
    if head.bound is not None:
        (expanded,) = _expand_tail(term)
        terms = _expand_term(expanded)
        return _cut_sum(terms, size)
    whole, inside = divmod(size, term_size(tail))
    sizes = [whole, 1, head.size - whole - 1] if inside else [whole, head.size - whole]
    if head.size > 1:
        parts = [Atom(n, frozen=head.frozen) for n in sizes]
        if inside:
            freeze(((parts[1],),), CUT_THROUGH)
        head.bound = tuple((p,) for p in parts if p.size)
    else:
        freeze(((head,),), CUT_THROUGH)
        parts = [Atom(0), head, Atom(0)]
    if not inside:
        return tuple((p, *tail) for p in parts)
    middle = _cut_sum(list(expand((tail,))), inside)
    return tuple(
        t for t in ((parts[0], *tail), *middle, (parts[2], *tail)) if all(atom.size for atom in t)
    )


def _cut_sum(terms: list[Term], size: int) -> Composition:
    """Return a sum with a boundary after `size` positions, which may fall inside a term."""
    out: list[Term] = []
    for term in terms:
        room = size - size_of(tuple(out))
        out.extend(_cut_term(term, room) if 0 < room < term_size(term) else (term,))
    return tuple(out)


def _unify_terms(x: Term, y: Term) -> None:
    """Make two products of the same size equal, factor by factor."""
    left, right = _factors(x), _factors(y)
    while left and right:
        a, b = left.pop(), right.pop()
        if a is b:
            continue
        if a.size == b.size:
            _unify_atoms(a, b)
        elif a.size > b.size:
            left.extend(reversed(_factor(a, b)))
            right.append(b)
        else:
            right.extend(reversed(_factor(b, a)))
            left.append(a)
        left, right = _refresh(left), _refresh(right)
    if left or right:
        raise Misaligned("factors are left over")


def _factors(term: Term) -> list[Atom]:
    """Return the factors of `term`, last first; those of width one are frozen and left out."""
    for atom in term:
        if atom.size == 1:
            freeze(((atom,),), "has width one and is multiplied away by a reshape")
    return [atom for atom in reversed(term) if atom.size != 1]


def _refresh(stack: list[Atom]) -> list[Atom]:
    """Return a stack of factors with bound products replaced by their factors."""
    if all(atom.bound is None for atom in stack):
        return stack
    (term,) = _expand_tail(tuple(reversed(stack)))
    return [atom for atom in reversed(term) if atom.size != 1]


def _expand_tail(term: Term) -> list[Term]:
    """Return a product with inner products expanded and inner sums kept, leading ones too."""
    out: Term = ()
    for atom in term:
        inner = _inside(atom)
        out += inner[0] if len(inner) == 1 else (atom,)
    return [out]


def _unify_atoms(a: Atom, b: Atom) -> None:
    if a.bound is None:
        bind(a, ((b,),))
    elif b.bound is None:
        bind(b, ((a,),))
    else:
        unify(a.bound, b.bound)


def _factor(big: Atom, small: Atom) -> Term:
    """Return `big` as a product that begins with as many units as `small` has."""
    if big.size % small.size:
        raise Misaligned(f"{big.size} is not a multiple of {small.size}")
    pair = split(((big,),), [small.size, big.size // small.size])
    return tuple(_as_atom(p) for p in pair)


def _as_atom(parts: Composition) -> Atom:
    """Return one atom that stands for `parts`."""
    parts = expand(parts)
    if len(parts) == 1 and len(parts[0]) == 1:
        return parts[0][0]
    return Atom(size_of(parts), bound=parts)


def join(dims: Sequence[Composition]) -> Composition:
    """Return the layout of several dims flattened into one, row-major."""
    kept = [d for d in (expand(d) for d in dims) if not _drop_one(d, len(dims))]
    if not kept:
        return ONE
    tail = tuple(_as_atom(d) for d in kept[1:])
    return expand(tuple(term + tail for term in kept[0]))


def _drop_one(parts: Composition, dims: int) -> bool:
    """Return whether a dim of size one is to be left out of a product, its axis frozen."""
    if size_of(parts) != 1 or dims == 1:
        return False
    freeze(parts, "has width one and is flattened into another dim")
    return True


def split(parts: Composition, sizes: Sequence[int]) -> list[Composition]:
    """Return the layouts of one dim viewed as dims of `sizes`, row-major."""
    terms, tail = expand(parts), math.prod(sizes[1:])
    if len(terms) == 1:
        return _split_term(terms[0], sizes)
    if any(term_size(term) % tail for term in terms):
        return _split_pieces(terms, sizes)
    lead: list[Term] = []
    rest: list[Composition] | None = None
    for term in terms:
        first, *others = _split_term(term, [term_size(term) // tail, *sizes[1:]])
        lead.extend(first)
        for a, b in zip(rest or others, others, strict=True):
            unify(a, b)
        rest = rest or others
    return [tuple(lead), *(rest or [])]


def _split_pieces(terms: Composition, sizes: Sequence[int]) -> list[Composition]:
    """Return a sum viewed as equal pieces, each of which may be a sum again."""
    pieces = cut(terms, [math.prod(sizes[1:])] * sizes[0])
    for piece in pieces[1:]:
        unify(pieces[0], piece)
    rest = split(pieces[0], sizes[1:]) if len(sizes) > 2 else [pieces[0]]
    return [((),) * sizes[0], *rest]


def _split_term(term: Term, sizes: Sequence[int]) -> list[Composition]:
    if len(sizes) == 1:
        return [(term,)]
    left = _factors(term)
    out: list[Composition] = []
    for size in sizes:
        taken: Term = ()
        while term_size(taken) < size:
            left = _take(left, size // term_size(taken))
            taken += (left.pop(),)
        if term_size(taken) != size:
            raise Misaligned(f"a product cannot be viewed as {list(sizes)}")
        out.append((taken,))
    return out


def _take(stack: list[Atom], need: int) -> list[Atom]:
    """Return the stack with its next factor no larger than `need`, refined where it was."""
    if not stack:
        raise Misaligned("a view has more positions than its product")
    atom = stack[-1]
    if need % atom.size == 0:
        return stack
    if atom.size % need:
        raise Misaligned(f"a factor of {atom.size} cannot be viewed in steps of {need}")
    return [*stack[:-1], *reversed(_halve(atom, need))]


def _halve(atom: Atom, size: int) -> Term:
    """Return `atom` as a product of `size` and the rest."""
    if atom.bound is not None:
        return tuple(_as_atom(p) for p in split(atom.bound, [size, atom.size // size]))
    pair = (Atom(size, frozen=atom.frozen), Atom(atom.size // size, frozen=atom.frozen))
    atom.bound = (pair,)
    return pair


def cut(parts: Composition, sizes: Sequence[int]) -> list[Composition]:
    """Return the layouts of consecutive pieces of a dim, of the given sizes."""
    stack = list(reversed(expand(parts)))
    pieces: list[Composition] = []
    for size in sizes:
        piece: list[Term] = []
        while size_of(tuple(piece)) < size:
            stack = _again(stack)
            term, room = stack.pop(), size - size_of(tuple(piece))
            if term_size(term) > room:
                stack.extend(reversed(_cut_term(term, room)))
                continue
            piece.append(term)
        pieces.append(tuple(piece))
    return pieces


@dataclass(frozen=True)
class Layout:
    """How a dim is composed: a sum of products of axis names, numbers and inner layouts."""

    terms: tuple[tuple[str | int | Layout, ...], ...]

    def size(self, widths: Mapping[str, int]) -> int:
        """Return the number of positions, for axes of the given widths."""
        return sum(math.prod(_width(f, widths) for f in term) for term in self.terms)

    def axes(self) -> Iterator[str]:
        """Yield the axis at each of its places, in order."""
        for term in self.terms:
            for factor in term:
                if isinstance(factor, str):
                    yield factor
                elif isinstance(factor, Layout):
                    yield from factor.axes()

    def origin(self, widths: Mapping[str, int], moved: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the old position of every new position, −1 where a new unit takes part.

        `moved` has the old unit of every new unit for the axes that change; `widths` are the old
        ones.
        """
        pieces, offset = [], 0
        for term in self.terms:
            found = np.zeros(1, dtype=np.int64)
            for factor in term:
                step, inner = _width(factor, widths), _origin(factor, widths, moved)
                mixed = found[:, None] * step + inner[None, :]
                new = (found[:, None] < 0) | (inner[None, :] < 0)
                found = np.where(new, -1, mixed).reshape(-1)
            pieces.append(np.where(found < 0, -1, found + offset))
            offset += math.prod(_width(f, widths) for f in term)
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)

    def units(self, widths: Mapping[str, int], axis: str) -> np.ndarray:
        """Return the unit of `axis` at every position, −1 where the axis takes no part."""
        pieces = [np.full(0, -1, dtype=np.int64)]
        for term in self.terms:
            found = np.full(1, -1, dtype=np.int64)
            for factor in term:
                inner = _units(factor, widths, axis)
                found = np.maximum(found[:, None], inner[None, :]).reshape(-1)
            pieces.append(found)
        return np.concatenate(pieces)

    def apart(self) -> tuple[tuple[str | int, ...], ...]:
        """Return the terms with sums inside products multiplied out: a (b + c) is a b and a c."""
        found: list[tuple[str | int, ...]] = []
        for term in self.terms:
            products: list[tuple[str | int, ...]] = [()]
            for factor in term:
                inner = factor.apart() if isinstance(factor, Layout) else ((factor,),)
                products = [p + i for p in products for i in inner]
            found += products
        return tuple(found)

    def parts(self, widths: Mapping[str, int], counted_by: str) -> np.ndarray:
        """Return the unit of an axis at every position; of "", which of `apart` lies there."""
        if counted_by:
            return self.units(widths, counted_by)
        pieces, count = [np.zeros(0, dtype=np.int64)], 0
        for term in self.terms:
            found, products = np.zeros(1, dtype=np.int64), 1
            for factor in term:
                inner, choices = np.zeros(_width(factor, widths), dtype=np.int64), 1
                if isinstance(factor, Layout):
                    inner, choices = factor.parts(widths, ""), len(factor.apart())
                found = (found[:, None] * choices + inner[None, :]).reshape(-1)
                products *= choices
            pieces.append(found + count)
            count += products
        return np.concatenate(pieces)

    def __str__(self) -> str:
        text = " + ".join(" ".join(str(f) for f in term) or "1" for term in self.terms)
        plain = len(self.terms) == 1 and len(self.terms[0]) <= 1
        return text if plain else f"({text})"


def _width(factor: str | int | Layout, widths: Mapping[str, int]) -> int:
    if isinstance(factor, Layout):
        return factor.size(widths)
    return factor if isinstance(factor, int) else widths[factor]


def _origin(
    factor: str | int | Layout, widths: Mapping[str, int], moved: Mapping[str, np.ndarray]
) -> np.ndarray:
    if isinstance(factor, Layout):
        return factor.origin(widths, moved)
    if isinstance(factor, str) and factor in moved:
        return moved[factor]
    return np.arange(_width(factor, widths))


def _units(factor: str | int | Layout, widths: Mapping[str, int], axis: str) -> np.ndarray:
    if isinstance(factor, Layout):
        return factor.units(widths, axis)
    size = _width(factor, widths)
    return np.arange(size) if factor == axis else np.full(size, -1, dtype=np.int64)


def settle(parts: Composition, name: Callable[[Atom], str | int]) -> Layout:
    """Return `parts` as a value, each axis written as `name` says: a name, or a plain number."""

    def factor(atom: Atom) -> str | int | Layout:
        return name(atom) if atom.bound is None else settle(atom.bound, name)

    return Layout(tuple(tuple(factor(a) for a in term) for term in expand(parts)))
