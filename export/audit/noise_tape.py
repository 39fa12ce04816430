"""A tape of one forward: it records where random numbers are applied to the data.

At torch's dispatcher every dropout is a mask, made of draws and constants, and one operator that
applies it to the data. This holds for torch's own dropouts, also inside attention and recurrent
layers, and for hand-written ones. The tape finds that operator and reads the mask. In a further
forward it can set every element of the mask to one number.

An obstacle is what it cannot follow: a draw whose probabilities depend on the data, or noise that
is combined with the data in no linear way. A random choice of Python's, such as a branch that is
taken or not, is not visible here at all.
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

_ATEN = torch.ops.aten
_SCALINGS = {
    overload
    for packet in (_ATEN.mul, _ATEN.mul_, _ATEN.div, _ATEN.div_)
    for overload in (packet.Tensor, packet.Scalar)
}
_PRODUCTS = ("mul", "bmm", "mm", "mv", "matmul", "dot")
_SUMS = ("add", "sub")


@dataclass
class Application:
    """One operator that applies noise to data; its result is linear in the noise.

    `noise` is float64, made of the draws whose numbers are in `draws`. `step` is the relative
    rounding step of its original dtype. `additive` says that it is added, not multiplied.
    `replaces` says that a dropped element becomes a learned vector, not 0.

    `before` and `after` are plain numbers: the forward multiplies the data by them just before the
    noise, and the result just after.
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
    """What one forward showed: the applications in order, the obstacles, the non-torch tensors.

    `draws` counts torch's draws. `may_choose_path` says that a random tensor became a number of
    Python's, which may choose the path of the forward.
    """

    applications: list[Application] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    non_torch: list[Tensor] = field(default_factory=list)
    draws: int = 0
    may_choose_path: bool = False

    @property
    def reaches_data(self) -> bool:
        """Whether noise reached the data, in a way that the tape can follow or in another."""
        return bool(self.applications or self.obstacles)


class NoiseTape(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch does not annotate it
    """A dispatch mode for one forward.

    `constants` replace the noise of applications, by their index in the order of the forward:

        tape = NoiseTape(Roles(weights, inputs, frozenset()), {0: 1.0})
        with torch.no_grad(), tape:
            output = module(*inputs)
        tape.reading.applications[0].noise
    """

    def __init__(self, roles: Roles, constants: Mapping[int, float] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reading = Reading(non_torch=roles.non_torch)
        self._roles = roles
        self._constants = constants or {}
        # Two tables by the identity of a tensor: the plain number by which it was multiplied, and
        # the index of the application that it is the result of, scaled or not.
        self._scales: dict[int, float] = {}
        self._application_of: dict[int, int] = {}
        # Keeps the tensors alive: another tensor may get the identity of one that was freed.
        self._alive: list[Any] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator, give its results their roles, and record where noise meets data."""
        kwargs = kwargs or {}
        operands = tensors_in((args, kwargs)) if kwargs else tensors_in(args)
        if func is _ATEN.native_dropout.default and args[2] is not False:
            return self._native_dropout(*args)
        if is_draw(func):
            return self._draw(func, args, kwargs, operands)
        if is_factory(func):
            return self._assign(func(*args, **kwargs), Role.CONSTANT)

        roles = [self._roles.of(operand) for operand in operands]
        # A copy overwrites its target, so that the role of the target does not matter.
        is_copy = func is _ATEN.copy_.default
        has_noise = Role.NOISE in roles
        if not is_copy and has_noise and (Role.WEIGHT in roles or Role.DATA in roles):
            return self._apply(func, args, kwargs, operands)

        if func is _ATEN._local_scalar_dense.default and has_noise:
            self.reading.may_choose_path = True
        result = func(*args, **kwargs)
        results = tensors_in(result)
        if writes(func):
            results += operands[:1]
        if is_copy:
            operands, roles = operands[1:], roles[1:]
        self._roles.pass_on(operands, roles, results)
        self._follow_scale(func, args, result)
        return result

    def _draw(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operands: list[Tensor]
    ) -> Any:
        """Run an operator that draws. Its result is noise, unless its probabilities are data."""
        name = func.overloadpacket.__name__
        if is_factory(func) or name.startswith("rand"):
            parameters = []
        elif name.endswith("_") or func is _ATEN.bernoulli.p:
            # bernoulli(x, p) and in-place draws read only the shape of their first operand.
            parameters = operands[1:]
        else:
            parameters = operands
        self.reading.draws += 1
        result = func(*args, **kwargs)
        if any(self._roles.of(parameter) is Role.DATA for parameter in parameters):
            self._add_obstacle(f"{name} draws with probabilities that depend on the data")
            return self._assign(result, Role.DATA)
        return self._assign(result, Role.NOISE, self._roles.new_draw())

    def _native_dropout(self, x: Tensor, p: float, _train: bool | None) -> tuple[Tensor, Tensor]:
        """`native_dropout`, which CUDA and nested tensors use, as a mask and a product."""
        self.reading.draws += 1
        mask = torch.rand_like(x, dtype=torch.float32) >= p
        noise = mask.to(x.dtype).div_(1 - p if p < 1 else 1.0)
        self._assign((mask, noise), Role.NOISE, self._roles.new_draw())
        result: Tensor = self._apply(_ATEN.mul.Tensor, (x, noise), {}, [x, noise])
        return result, mask

    def _apply(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operands: list[Tensor]
    ) -> Any:
        """Run an operator that combines noise with data or weights. Its result is data."""
        written = [args[0]] if writes(func) else []
        combination = _combination(func, args, kwargs, self._roles)
        if combination is None:
            self._add_obstacle(
                f"{func.overloadpacket.__name__} combines random numbers with the data in no"
                " linear way"
            )
            return self._assign(func(*args, **kwargs), Role.DATA, written=written)

        index = len(self.reading.applications)
        noise = combination.noise
        step = torch.finfo(noise.dtype).eps if noise.is_floating_point() else 0.0
        data = next(operand for operand in operands if self._roles.of(operand) is not Role.NOISE)
        application = Application(
            noise=noise.to(torch.float64, copy=True),
            additive=combination.additive,
            draws=self._roles.draws_of(operands),
            step=step,
            before=self._scales.get(id(data), 1.0),
            replaces=combination.replaces,
        )
        self.reading.applications.append(application)
        if index in self._constants:
            result = combination.with_constant(self._constants[index])
        else:
            result = func(*args, **kwargs)
        self._assign(result, Role.DATA, written=written)
        self._application_of[id(result)] = index
        return result

    def _follow_scale(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Record the number by which a product or a quotient scales a tensor."""
        if func not in _SCALINGS or len(args) != 2 or not isinstance(args[0], Tensor):
            return
        self._alive.append(result)
        tensor, factor = args
        if isinstance(factor, Tensor):
            if factor.numel() != 1 or self._roles.of(factor) is not Role.CONSTANT:
                return
            factor = factor.item()
        if not factor:
            return
        scale = float(factor)
        if func.overloadpacket.__name__.rstrip("_") == "div":
            scale = 1 / scale
        self._scales[id(result)] = self._scales.get(id(tensor), 1.0) * scale
        index = self._application_of.get(id(tensor))
        if index is not None:
            self.reading.applications[index].after *= scale
            self._application_of[id(result)] = index

    def _assign(
        self,
        result: Any,
        role: Role,
        draws: frozenset[int] = frozenset(),
        *,
        written: list[Tensor] | None = None,
    ) -> Any:
        """Give a role to an operator's result and to the tensors that it has written to."""
        self._alive.append(result)
        for tensor in (*tensors_in(result), *(written or [])):
            self._roles.set(tensor, role, draws)
        return result

    def _add_obstacle(self, sentence: str) -> None:
        if sentence not in self.reading.obstacles:
            self.reading.obstacles.append(sentence)


@dataclass(frozen=True)
class _Combination:
    """How an operator combines noise and data: its result is linear in `noise`.

    `with_constant(c)` is the result for noise that is c everywhere. The other fields are those of
    `Application`.
    """

    noise: Tensor
    with_constant: Callable[[float], Any]
    additive: bool = False
    replaces: bool = False


def _combination(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], roles: Roles
) -> _Combination | None:
    """How an operator combines its operands; None where it is not linear in one noise operand."""
    name = func.overloadpacket.__name__.rstrip("_")
    if name in _SUMS and len(args) == 2:
        # `alpha`, the factor of the second operand, is the only keyword.
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
        # Elements of the data that become a learned vector, as masked speech features do.
        if _is_learned(args[2], roles) and len(args) == 3 and roles.of(args[0]) is Role.DATA:
            return _fill(func, args[0], args[1][0], roles, replaces=True)
    return None


def _arithmetic(
    func: Any, args: tuple[Any, ...], roles: Roles, *, additive: bool = False, writing: bool = False
) -> _Combination | None:
    """A sum, product or quotient of noise with floating point tensors."""
    noise_indices, others = [], []
    for index, arg in enumerate(args):
        if isinstance(arg, Tensor) and roles.of(arg) is Role.NOISE:
            noise_indices.append(index)
        else:
            others.append(arg)
    if len(noise_indices) != 1:
        return None
    for arg in others:
        if not isinstance(arg, Tensor) or not arg.is_floating_point():
            return None
    noise_index = noise_indices[0]
    noise = args[noise_index]

    def with_constant(value: float) -> Any:
        if writing and noise_index == 0:
            # The result is written into the noise, which has to stay the same tensor.
            return func(noise.fill_(value), *args[1:])
        # A boolean mask takes the dtype of the data: it could not hold the value.
        dtype = noise.dtype if noise.is_floating_point() else others[0].dtype
        operands = list(args)
        operands[noise_index] = torch.full_like(noise, value, dtype=dtype)
        return func(*operands)

    return _Combination(noise, with_constant, additive=additive)


def _where(condition: Tensor, first: Tensor, second: Tensor, roles: Roles) -> _Combination | None:
    """`torch.where` with a random condition, between data and zeros or a learned vector."""
    if roles.of(condition) is not Role.NOISE or Role.NOISE in (roles.of(first), roles.of(second)):
        return None

    # A learned vector replaces the data.
    first_is_learned = _is_learned(first, roles)
    if first_is_learned or _is_learned(second, roles):
        data = second if first_is_learned else first
        if roles.of(data) is Role.DATA:
            shape = torch.where(condition, first, second).shape
            keeps = ~condition if first_is_learned else condition
            return _Combination(
                keeps.to(torch.float64),
                lambda value: (data * value).expand(shape),
                replaces=True,
            )

    # Zeros replace the data.
    first_is_blank = _is_blank(first, roles)
    values = second if first_is_blank else first
    if not values.is_floating_point() or not (first_is_blank or _is_blank(second, roles)):
        return None
    mask = ~condition if first_is_blank else condition
    return _Combination(
        mask, lambda value: values * torch.full_like(mask, value, dtype=values.dtype)
    )


def _fill(
    func: Any, data: Tensor, dropped: Tensor, roles: Roles, *, replaces: bool = False
) -> _Combination | None:
    """`masked_fill`, or an assignment by a boolean index, of 0 to the dropped elements.

    With `replaces`, of a learned vector. A constant leaves the vector out: 1 stands for data of
    which nothing was replaced.
    """
    if dropped.dtype != torch.bool or roles.of(data) is Role.NOISE or not data.is_floating_point():
        return None
    if "index" in str(func):
        # A boolean index may cover the leading axes only.
        dropped = dropped.reshape(dropped.shape + (1,) * (data.dim() - dropped.dim()))
    return _Combination(
        (~dropped).to(torch.float64),
        lambda value: data.mul_(value) if writes(func) else data * value,
        replaces=replaces,
    )


def _is_learned(value: Any, roles: Roles) -> bool:
    """Whether a value is made of weights alone, and is not zero unless it is a parameter."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and roles.of(value) is Role.WEIGHT
        and (isinstance(value, nn.Parameter) or bool(value.any()))
    )


def _is_blank(value: Tensor, roles: Roles) -> bool:
    """Whether a tensor is zero by design: a single 0, or zeros that are no data."""
    if value.numel() == 1:
        return _is_zero(value)
    return roles.of(value) is not Role.DATA and not bool(value.any())


def _is_zero(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.item() == 0
    return bool(value == 0)
