"""A named tuple of arrays, handed on by its address.

Numba passes a tuple by value: a call with an engine, two ports, frames and a client pushes all their arrays, about 500 words.
That measured 300 ns a call and most of the compile time. `by_reference`, once in the outermost compiled function, puts the tuple
on its stack; what it calls gets one pointer, and `engine.control` reads the one array it names. A reference must not outlive
the function that made it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import impl_ret_borrowed
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, lower_getattr_generic, models, register_model

from datastore.compiled import INTERPRETED


class Reference(types.Type):
    """The type of a reference to a tuple of type `target`."""

    def __init__(self, target: types.NamedTuple) -> None:
        self.target = target
        super().__init__(name=f"Reference({target})")


@register_model(Reference)
class _ReferenceModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Reference) -> None:
        super().__init__(manager, kind, ir.IntType(8).as_pointer())


@infer_getattr
class _ReferenceAttributes(AttributeTemplate):
    key = Reference

    def generic_resolve(self, reference: Reference, name: str) -> Any:
        target = reference.target
        return target.types[target.fields.index(name)] if name in target.fields else None


@lower_getattr_generic(Reference)
def _load_member(context: Any, builder: Any, kind: Reference, value: Any, name: str) -> Any:
    index = kind.target.fields.index(name)
    place = builder.bitcast(value, context.get_value_type(kind.target).as_pointer())
    member = builder.load(cgutils.gep_inbounds(builder, place, 0, index))
    return impl_ret_borrowed(context, builder, kind.target.types[index], member)


@intrinsic
def by_reference(typingctx, target):  # type: ignore[no-untyped-def]
    """Return a reference to a named tuple; a reference stays what it is."""
    if isinstance(target, Reference):
        return target(target), lambda context, builder, signature, arguments: arguments[0]

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        place = cgutils.alloca_once_value(builder, arguments[0])
        return builder.bitcast(place, ir.IntType(8).as_pointer())

    return Reference(target)(target), generate


if INTERPRETED:
    by_reference = lambda target: target  # noqa: E731
