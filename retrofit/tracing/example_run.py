"""The calls a model makes, read off one real run: for models that torch.fx cannot follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from retrofit.errors import RetrofitError
from retrofit.running.batch_checks import explained
from retrofit.running.call_arguments import ForwardFn, arguments_of, home
from retrofit.running.nested import tensors
from retrofit.running.random_numbers import seeded
from retrofit.running.shared_copy import shared_copy
from retrofit.tracing.attribute_reads import Reads, watched_layers
from retrofit.tracing.calls import Call, Trace, is_alone
from retrofit.tracing.contractions import SCALINGS, SUMS, drops_weights
from retrofit.tracing.operations import (
    AFFINE_FUNCTIONS,
    PRODUCTS,
    READ_OUT,
    called_name,
    factors,
    function_name,
    is_affine,
    is_leaf,
    keeps_dim,
    module_name,
    with_values,
)

EXAMPLES = 2  # samples that are run; one alone may lose its batch axis to a squeeze


def watch(
    model: nn.Module, batch: Any, forward_fn: ForwardFn | None = None, *, training: bool = False
) -> Trace:
    """Run a copy of `model` on a batch, in eval mode by default, and note what it does.

    Two samples of the batch are run if the model takes so few, else the whole of it. Random
    generators start from the same seed each time, and are afterwards as they were.

    Raises RetrofitError with the model's own message when it does not run.
    """
    if forward_fn is None:
        try:
            return _watched(model, lambda m: _run_on(m, batch, EXAMPLES), training=training)
        except RetrofitError:  # a model for batches of one size, or pictures without a batch axis
            return _watched(model, lambda m: _run_on(m, batch, None), training=training)
    return _watched(model, lambda m: forward_fn(m, batch), training=training)


def _run_on(model: nn.Module, batch: Any, most: int | None) -> Any:
    arguments = arguments_of(model, batch).head(most).to(home(model), copy=True)
    with explained(model, arguments):
        return model(*arguments.args, **arguments.kwargs)


def _watched(model: nn.Module, run: Callable[[nn.Module], Any], *, training: bool) -> Trace:
    watched = shared_copy(model)
    for module in watched.modules():
        module.training = training
    watcher = _Watcher(watched)
    with seeded(device=home(watched)), torch.no_grad():
        try:
            with watcher.watching():
                result = run(watched)
        except RetrofitError:  # which says what is wrong with the example
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            raise RetrofitError(
                f"{type(model).__name__} does not run on the example: "
                f"{type(error).__name__}: {text}"
            ) from error
    watcher.returned(result)
    called = any(call.module is not None for call in watcher.calls)
    if not called and any(
        is_affine(module) for module in watched.modules() if module is not watched
    ):
        raise RetrofitError(
            f"the run on the example called nothing of this {type(model).__name__}: its forward, "
            "or forward_fn, runs another object (a closure over the original, say)"
        )
    return Trace(
        watcher.linked(dict(model.named_modules())),
        "run",
        reads=watcher.reads.frozen(),
        asks_mode=watcher.reads.mode,
        changed=frozenset(watcher.reads.changed),
        outputs=tensors(result, "output"),
    )


class _Watcher(TorchFunctionMode):
    """Notes the functions called, and the modules, by standing in for nn.Module.__call__.

    Attributes:
        calls: those made so far, without their users.
        users: for each call, the numbers of those that it feeds (the keys, in order).
        returns: numbers of the calls whose results the model returned (the keys).
        made: the number of the call that each tensor still alive came from.
        constants: parameters, buffers, and what was made of these alone (the keys); and whether
            there are parameters among them.
        scaled: the shape of the parameter that each tensor was last multiplied by.
        stack: paths of the modules whose forward is running, outermost first.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.reads = Reads(model, watched_layers(model))
        self.calls: list[Call] = []
        self.users: list[dict[int, None]] = []
        self.returns: dict[int, None] = {}
        self.made = WeakIdKeyDictionary()
        self.constants = WeakIdKeyDictionary()
        plain = (value for module in model.modules() for value in vars(module).values())
        for tensor in (*model.parameters(), *model.buffers(), *plain):
            if isinstance(tensor, Tensor):
                self.constants[tensor] = isinstance(tensor, nn.Parameter)
        self.scaled = WeakIdKeyDictionary()
        self.stack: list[str] = []

    def linked(self, modules: Mapping[str, nn.Module]) -> tuple[Call, ...]:
        """Return the calls, the output last, with their users, and with `modules` by path."""
        output = Call("output", "")
        after: list[Call] = [output]  # from the last call to the first
        for number in reversed(range(len(self.calls))):
            call = self.calls[number]
            users = [after[len(self.calls) - user] for user in self.users[number]]
            ends = (output,) if number in self.returns else ()
            module = None if call.module is None else modules[call.path]
            after.append(replace(call, module=module, users=(*users, *ends)))
        return tuple(reversed(after))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note calls for the length of the block."""

        def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            path = self.paths.get(id(module))
            if path is None or self.reads.muted:
                return original(module, *args, **kwargs)
            if path and is_leaf(module):
                return self._leaf(original, module, path, args, kwargs)
            self.stack.append(path)
            try:
                result = original(module, *args, **kwargs)
            finally:
                self.stack.pop()
            if not path:  # whatever a forward_fn then makes of it
                self.returned(result)
            return result

        with self.reads.noted(), self:
            original = nn.Module.__call__
            nn.Module.__call__ = called  # type: ignore[method-assign]
            try:
                yield
            finally:
                nn.Module.__call__ = original  # type: ignore[method-assign]

    def _leaf(
        self,
        original: Callable[..., Any],
        module: nn.Module,
        path: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        self.reads.note_call(module)
        alone = is_alone(args, kwargs)
        call = Call(module_name(module), path, module, tuple(self.stack), alone)
        feeding = self._feeding(tensors((args, kwargs)).values())
        self.reads.muted = True
        try:
            result = original(module, *args, **kwargs)
        finally:
            self.reads.muted = False
        self._note(call, feeding, result)
        return result

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.reads.muted:
            return func(*args, **kwargs)
        name = function_name(called_name(func), args)
        given = tensors(with_values(name, args, kwargs)).values()
        for tensor in given:
            self.reads.note_use(tensor)
        feeding = self._feeding(given)
        weighted = name in PRODUCTS and self._has_constant(factors(name, args, kwargs))
        weighted |= name in SUMS and self._drops_weights(args, kwargs)
        result = func(*args, **kwargs)
        self._note_scale(name, args, result)
        made = args[0] if name == "setitem" else result  # x[i] = y gives nothing, and changes x
        if isinstance(made, (Tensor, tuple, list)) or name in READ_OUT:
            where = self.stack[-1] if self.stack else ""
            keepdim = keeps_dim(args, kwargs)
            channels = 0
            if name in AFFINE_FUNCTIONS and isinstance(result, Tensor) and result.dim() > 1:
                channels = result.shape[-1 if name == "linear" else 1]
            call = Call(
                name,
                where,
                inside=tuple(self.stack),
                keepdim=keepdim,
                channels=channels,
                weighted=weighted,
            )
            self._note(call, feeding, made)
            if all(tensor in self.constants for tensor in given):  # of none: torch.ones(3)
                learned = any(self.constants.get(t) for t in tensors((args, kwargs)).values())
                for tensor in tensors(made).values():
                    self.constants[tensor] = learned
        return result

    def _note_scale(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        """Note the shape of the parameter in a product; any other operation ends what was known."""
        if not isinstance(result, Tensor):
            return
        self.scaled.pop(result, None)
        learned = [t for t in args if isinstance(t, Tensor) and self.constants.get(t)]
        if name in SCALINGS and learned:
            self.scaled[result] = learned[0].shape

    def _drops_weights(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        shape = self.scaled.get(args[0]) if args else None
        return shape is not None and drops_weights(shape, args[0].dim(), args, kwargs)

    def _has_constant(self, values: Any) -> bool:
        return any(tensor in self.constants for tensor in tensors(values).values())

    def _feeding(self, given: Iterable[Tensor]) -> list[int]:
        """List the calls that these came from. Asked before the call: it may be in place."""
        found = (self.made.get(tensor) for tensor in given)
        return list(dict.fromkeys(number for number in found if number is not None))

    def _note(self, call: Call, feeding: list[int], result: Any) -> None:
        results = list(tensors(result).values())
        if call.module is None and not results and call.name not in READ_OUT:
            return
        if isinstance(result, Tensor):
            call = replace(call, shape=tuple(result.shape))
        number = len(self.calls)
        for earlier in feeding:
            self.users[earlier][number] = None
        for tensor in results:
            self.made[tensor] = number
        self.calls.append(call)
        self.users.append({})

    def returned(self, result: Any) -> None:
        """Mark what the model, or the `forward_fn`, returns."""
        self.returns.update(dict.fromkeys(self._feeding(tensors(result).values())))
