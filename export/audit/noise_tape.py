"""Watching where random numbers meet the data inside a forward, and putting a constant in their
place.

At the dispatcher every dropout, torch's own (also inside attention and recurrent layers) and a
hand-written one, is a mask that was made of draws and constants, and one operator that brings it to
the data. The tape finds that operator, reads the mask, and can run the forward again with every
element of the mask set to one number. Does not know randomness that steers Python itself, nor draws
whose probabilities depend on the data; it names them as obstacles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from evalmode.export.audit.tensor_roles import Role, Roles, is_draw, is_factory, tensors_in, writes


@dataclass
class Application:
    """One operator that brings noise to data: the noise, by which its result is linear, and the
    draws behind it.

    `additive`: the noise is added, not multiplied. `replaces`: what is dropped becomes a learned
    vector, or another number than 0. `step` is the relative rounding of the noise's
    dtype. `before` and `after` are the numbers by which Python multiplies the data just before, and
    the result just after.
    """

    noise: Tensor
    additive: bool
    draws: frozenset[int]
    step: float
    before: float = 1.0
    after: float = 1.0
    replaces: bool = False


@dataclass
class Reading:
    """What one forward showed: the applications in order, what could not be reduced to one, and
    foreign tensors.

    `draws` counts torch's draws, and `steers` says that one became a number of Python's, which may
    choose the path.
    """

    applications: list[Application] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    foreign: list[Tensor] = field(default_factory=list)
    draws: int = 0
    steers: bool = False


@dataclass(frozen=True)
class _Meeting:
    """How an operator combines noise and data: what it is linear in, and what it gives for a
    constant there.
    """

    noise: Tensor
    additive: bool
    at: Callable[[float], Any]
    replaces: bool = False


class NoiseTape(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch does not annotate it
    """A dispatch mode for one forward. `constants` replace the noise of those applications, by
    index.
    """

    def __init__(self, roles: Roles, constants: Mapping[int, float] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reading = Reading(foreign=roles.foreign)
        self._roles = roles
        self._constants = constants or {}
        self._scales: dict[
            int, float
        ] = {}  # by what number Python has multiplied a tensor, by identity
        self._made_by: dict[
            int, int
        ] = {}  # the application that a tensor is the (scaled) result of
        self._kept: list[Any] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        operands = tensors_in((args, kwargs)) if kwargs else tensors_in(args)
        if func is torch.ops.aten.native_dropout.default and args[2] is not False:
            return self._unfused(*args)
        if is_draw(func):
            return self._drawn(func, args, kwargs, operands)
        if is_factory(func):
            return self._made(func(*args, **kwargs), Role.CONSTANT)
        roles = [self._roles.of(operand) for operand in operands]
        copies = func is torch.ops.aten.copy_.default  # what was there before does not matter
        if not copies and Role.NOISE in roles and (Role.WEIGHT in roles or Role.DATA in roles):
            return self._met(func, args, kwargs, operands)
        if func is torch.ops.aten._local_scalar_dense.default and Role.NOISE in roles:
            self.reading.steers = True
        result = func(*args, **kwargs)
        made = [*tensors_in(result), *(operands[:1] if writes(func) else ())]
        self._roles.pass_on(operands[copies:], roles[copies:], made)
        self._follow_scale(func, args, result)
        return result

    def _drawn(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operands: list[Tensor]
    ) -> Any:
        # bernoulli(x, p) and in-place draws read no more of their first operand than its shape.
        blank = (
            1
            if func.overloadpacket.__name__.endswith("_") or func is torch.ops.aten.bernoulli.p
            else 0
        )
        read = (
            []
            if is_factory(func) or func.overloadpacket.__name__.startswith("rand")
            else operands[blank:]
        )
        self.reading.draws += 1
        result = func(*args, **kwargs)
        if any(self._roles.of(operand) is Role.DATA for operand in read):
            self._obstacle(
                f"{func.overloadpacket.__name__} draws with probabilities that depend on the data"
            )
            return self._made(result, Role.DATA)
        return self._made(result, Role.NOISE, self._roles.draw())

    def _unfused(self, x: Tensor, p: float, _train: bool | None) -> tuple[Tensor, Tensor]:
        """`native_dropout`, as CUDA and nested tensors have it, in the two steps that it fuses."""
        self.reading.draws += 1
        mask = torch.rand_like(x, dtype=torch.float32) >= p
        noise = mask.to(x.dtype).div_(1 - p if p < 1 else 1.0)
        self._made((mask, noise), Role.NOISE, self._roles.draw())
        result: Tensor = self._met(torch.ops.aten.mul.Tensor, (x, noise), {}, [x, noise])
        return result, mask

    def _met(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operands: list[Tensor]
    ) -> Any:
        meeting = _meeting(func, args, kwargs, self._roles)
        if meeting is None:
            self._obstacle(
                f"{func.overloadpacket.__name__} combines random numbers with the data in no"
                " linear way"
            )
            return self._made(
                func(*args, **kwargs), Role.DATA, written=args[0] if writes(func) else None
            )
        index = len(self.reading.applications)
        data = next(operand for operand in operands if self._roles.of(operand) is not Role.NOISE)
        application = Application(
            noise=meeting.noise.to(torch.float64, copy=True),
            additive=meeting.additive,
            draws=self._roles.draws_of(operands),
            step=torch.finfo(meeting.noise.dtype).eps if meeting.noise.is_floating_point() else 0.0,
            before=self._scales.get(id(data), 1.0),
            replaces=meeting.replaces,
        )
        self.reading.applications.append(application)
        result = (
            meeting.at(self._constants[index])
            if index in self._constants
            else func(*args, **kwargs)
        )
        self._made(result, Role.DATA, written=args[0] if writes(func) else None)
        self._made_by[id(result)] = index
        return result

    def _obstacle(self, sentence: str) -> None:
        if sentence not in self.reading.obstacles:
            self.reading.obstacles.append(sentence)

    def _made(
        self,
        result: Any,
        role: Role,
        draws: frozenset[int] = frozenset(),
        *,
        written: Tensor | None = None,
    ) -> Any:
        self._kept.append(result)
        for tensor in (*tensors_in(result), *([] if written is None else [written])):
            self._roles.set(tensor, role, draws)
        return result

    def _follow_scale(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Remember by what number a product or quotient with a plain number scales a tensor."""
        if func not in _SCALINGS or len(args) != 2 or not isinstance(args[0], Tensor):
            return
        self._kept.append(result)
        name = func.overloadpacket.__name__.rstrip("_")
        factor = args[1]
        if isinstance(factor, Tensor):
            if factor.numel() != 1 or self._roles.of(factor) is not Role.CONSTANT:
                return
            factor = factor.item()
        if not factor:
            return
        scale = float(factor) if name == "mul" else 1 / float(factor)
        self._scales[id(result)] = self._scales.get(id(args[0]), 1.0) * scale
        made_by = self._made_by.get(id(args[0]))
        if made_by is not None:
            self.reading.applications[made_by].after *= scale
            self._made_by[id(result)] = made_by


_ATEN = torch.ops.aten
_SCALINGS = {
    overload
    for packet in (_ATEN.mul, _ATEN.mul_, _ATEN.div, _ATEN.div_)
    for overload in (packet.Tensor, packet.Scalar)
}
_PRODUCTS = ("mul", "bmm", "mm", "mv", "matmul", "dot")
_SUMS = ("add", "sub")


def _meeting(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], roles: Roles
) -> _Meeting | None:
    """How an operator brings its noise to its data; None where its result is not linear in one
    noise operand.
    """
    name = func.overloadpacket.__name__.rstrip("_")
    if name in _SUMS and len(args) == 2:
        return _arithmetic(
            partial(func, **kwargs), args, roles, additive=True, writing=writes(func)
        )
    if kwargs:
        return None
    if name in _PRODUCTS:
        return _arithmetic(func, args, roles, writing=writes(func))
    if name == "addmm" and len(args) == 3 and roles.of(args[0]) is not Role.NOISE:
        return _arithmetic(func, args, roles)
    if name == "div" and len(args) == 2 and roles.of(args[0]) is Role.NOISE:
        return _arithmetic(func, args, roles)
    if name == "where" and len(args) == 3:
        return _where(*args, roles)
    if name == "masked_fill" and _is_zero(args[2]):
        return _fill(func, args[0], args[1], roles)
    if name == "index_put" and len(args[1]) == 1 and args[1][0] is not None:
        if _is_zero(args[2]):
            return _fill(func, args[0], args[1][0], roles)
        if _is_learned(args[2], roles) and len(args) == 3:
            return _exchange(func, args[0], args[1][0], roles)
    return None


def _arithmetic(
    func: Any, args: tuple[Any, ...], roles: Roles, *, additive: bool = False, writing: bool = False
) -> _Meeting | None:
    at = [
        index
        for index, arg in enumerate(args)
        if isinstance(arg, Tensor) and roles.of(arg) is Role.NOISE
    ]
    data = [arg for index, arg in enumerate(args) if index not in at]
    if len(at) != 1 or not all(isinstance(arg, Tensor) and arg.is_floating_point() for arg in data):
        return None
    noise = args[at[0]]

    def with_constant(value: float) -> Any:
        if writing and at[0] == 0:
            return func(noise.fill_(value), *args[1:])
        dtype = noise.dtype if noise.is_floating_point() else data[0].dtype
        constant = torch.full_like(noise, value, dtype=dtype)
        return func(*(constant if index == at[0] else arg for index, arg in enumerate(args)))

    return _Meeting(noise, additive, with_constant)


def _where(condition: Tensor, kept: Tensor, other: Tensor, roles: Roles) -> _Meeting | None:
    if roles.of(condition) is not Role.NOISE or Role.NOISE in (roles.of(kept), roles.of(other)):
        return None
    learned = _is_learned(kept, roles), _is_learned(other, roles)
    data = other if learned[0] else kept
    if any(learned) and roles.of(data) is Role.DATA:
        shape = torch.where(condition, kept, other).shape
        mask = (~condition if learned[0] else condition).to(torch.float64)
        return _Meeting(mask, False, lambda value: (data * value).expand(shape), replaces=True)
    swapped = _is_blank(kept, roles)
    data = other if swapped else kept
    if not data.is_floating_point() or not (swapped or _is_blank(other, roles)):
        return None
    mask = ~condition if swapped else condition
    return _Meeting(
        mask, False, lambda value: data * torch.full_like(mask, value, dtype=data.dtype)
    )


def _fill(func: Any, data: Tensor, dropped: Tensor, roles: Roles) -> _Meeting | None:
    if dropped.dtype != torch.bool or roles.of(data) is Role.NOISE or not data.is_floating_point():
        return None
    # index_put_'s mask may span the leading axes only.
    mask = (
        dropped.reshape(dropped.shape + (1,) * (data.dim() - dropped.dim()))
        if "index" in str(func)
        else dropped
    )
    return _Meeting(
        (~mask).to(torch.float64),
        False,
        lambda value: data.mul_(value) if writes(func) else data * value,
    )


def _exchange(func: Any, data: Tensor, dropped: Tensor, roles: Roles) -> _Meeting | None:
    """Positions of the data that become a learned vector, as masked speech features do.

    A constant leaves the vector out: 1 is data of which nothing was exchanged.
    """
    if (
        dropped.dtype != torch.bool
        or roles.of(data) is not Role.DATA
        or not data.is_floating_point()
    ):
        return None
    mask = (~dropped).to(torch.float64)
    mask = mask.reshape(mask.shape + (1,) * (data.dim() - mask.dim()))

    return _Meeting(
        mask,
        False,
        lambda value: data.mul_(value) if writes(func) else data * value,
        replaces=True,
    )


def _is_learned(value: Any, roles: Roles) -> bool:
    """Whether a value is made of weights alone. Zeros are where they are a parameter."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and roles.of(value) is Role.WEIGHT
        and (isinstance(value, nn.Parameter) or bool(value.any()))
    )


def _is_blank(value: Tensor, roles: Roles) -> bool:
    """Whether a tensor is nothing but zeros, and not because the data happens to be."""
    if value.numel() == 1:
        return _is_zero(value)
    return roles.of(value) is not Role.DATA and not bool(value.any())


def _is_zero(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.item() == 0
    return bool(value == 0)
