"""Jinja templates as hostile input: a sandbox in which a rendering has a budget of steps, text and CPU time."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from sglang.srt.utils.limits import MAX_TEMPLATE_CPU_S, MAX_TEMPLATE_STEPS, MAX_TEMPLATE_TEXT_CHARS

# Filters that make no text of their input, so what they are given need not be weighed first.
_SEQUENCE_FILTERS = frozenset(
    "abs attr batch count d default dictsort first float groupby int items last length list map max min reject "
    "rejectattr reverse round select selectattr slice sort sum unique".split()
)
_ANY_INTEGER = ("attr", "d", "default", "first", "float", "int", "items", "map", "select", "selectattr", "sum")
# Filters and methods whose cost no look at the arguments bounds, and that chat templates have no use for.
_REMOVED_FILTERS = ("center", "filesizeformat", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
_REMOVED_METHODS = frozenset({"encode", "expandtabs", "maketrans", "translate"})
_MAX_INT_BITS = 1024
_MAX_INT_ARGUMENT = 100_000
_MAX_INDENT = 100
# Widths of five digits, widths taken from arguments, and widths that are themselves formatted.
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{5})")
_WIDE_BRACES = re.compile(r"\d{5}|\{[^}]*\{")
_CONTAINERS: tuple[Any, ...] = (list, tuple, dict, set, frozenset)
# Names that no template can spell.
_TICK, _CONCAT, _WEIGH = " tick", " concat", " weigh"


class TemplateLimitError(Exception):
    """A rendering asks for more than its budget."""


class _Budget:
    """What one rendering has used. Every method raises TemplateLimitError past a limit.

    Containers are weighed: about the characters of their text, counted once for every place where a value stands in
    them. A weight is known by the object's identity, and the object is kept, as long as the rendering runs.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._chars = 0
        self._deadline = time.thread_time() + MAX_TEMPLATE_CPU_S
        self._weights: dict[int, tuple[Any, int]] = {}

    def charge(self, num_chars: int, num_steps: int = 1) -> None:
        before = self._steps
        self._steps += num_steps
        self._chars += num_chars
        if self._steps > MAX_TEMPLATE_STEPS:
            raise TemplateLimitError(f"it takes more than {MAX_TEMPLATE_STEPS} steps")
        if self._chars > MAX_TEMPLATE_TEXT_CHARS:
            raise TemplateLimitError(f"it creates more than {MAX_TEMPLATE_TEXT_CHARS} characters of text")
        if before >> 6 != self._steps >> 6 and time.thread_time() > self._deadline:
            raise TemplateLimitError(f"it takes more than {MAX_TEMPLATE_CPU_S:g} s of CPU time")

    def charge_text(self, value: Any, times: int = 1) -> None:
        """Charge for the text of ``value``, made ``times`` over."""
        self.charge(self.weight(value) * times)

    def made(self, value: Any) -> Any:
        """Charge for a value that the template has made; returns it."""
        if isinstance(value, (str, bytes)):
            self.charge(len(value))
        elif isinstance(value, _CONTAINERS):
            self.charge(2 * len(value))
            self.weight(value)
        return value

    def sum_of(self, left: Any, right: Any, value: Any) -> Any:
        """``made`` for ``value = left + right``, whose weight is that of its parts."""
        if isinstance(value, _CONTAINERS):
            self._keep(value, self.weight(left) + self.weight(right))
        return self.made(value)

    def _keep(self, value: Any, weight: int) -> int:
        if weight > MAX_TEMPLATE_TEXT_CHARS:
            raise TemplateLimitError(f"it builds a value of more than {MAX_TEMPLATE_TEXT_CHARS} characters")
        self._weights[id(value)] = (value, weight)
        return weight

    def weight(self, value: Any) -> int:
        if isinstance(value, (str, bytes)):
            return len(value)
        if not isinstance(value, _CONTAINERS):
            return 16
        known = self._weights.get(id(value))
        if known is not None:
            return known[1]
        total, left = 0, [value]
        while left:
            item = left.pop()
            known = self._weights.get(id(item))
            if known is not None:
                total += known[1]
            elif isinstance(item, (str, bytes)):
                total += len(item) + 4
            elif isinstance(item, _CONTAINERS):
                total += 2
                left.extend(item)
                left.extend(item.values() if isinstance(item, dict) else ())
                self.charge(0, 1 + len(item))
            else:
                total += 16
        return self._keep(value, total)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks assistant text for training; here its body is rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Instrument(NodeTransformer):
    """Adds a charge to every turn of a loop and call of a macro, to ``~``, and to lists that the template builds."""

    def _visit_body(self, node: Any) -> nodes.Node:
        num_chars = _data_chars(node.body)
        self.generic_visit(node)
        tick = _filter(nodes.Const(num_chars, lineno=node.lineno), _TICK)
        if getattr(node, "test", None) is not None:  # of a loop: turns that it skips count too
            node.test = nodes.And(tick, node.test, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node  # type: ignore[no-any-return]

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _visit_body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _CONCAT)

    def _visit_literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load" or not node.items:
            return node  # type: ignore[no-any-return]
        return _filter(node, _WEIGH)

    visit_List = visit_Tuple = visit_Dict = _visit_literal


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _data_chars(body: list[nodes.Node]) -> int:
    """Characters of literal text in a body, without that of bodies which charge for themselves."""
    total, left = 0, list(body)
    while left:
        node = left.pop()
        if isinstance(node, nodes.TemplateData):
            total += len(node.data)
        elif not isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)):
            left.extend(node.iter_child_nodes())
    return total


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, in which each rendering is bounded."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
        self._local = threading.local()
        self.finalize = self._print
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.globals.pop("lipsum")
        self.filters["tojson"] = _tojson
        for name in _REMOVED_FILTERS:
            self.filters.pop(name)
        for name, function in list(self.filters.items()):
            self.filters[name] = self._bounded_filter(name, function)
        self.filters[_TICK] = jinja2.pass_context(lambda _, num_chars: self._tick(num_chars))
        self.filters[_CONCAT] = jinja2.pass_context(lambda _, parts: self._join(parts, ""))
        self.filters[_WEIGH] = jinja2.pass_context(lambda _, value: self._local.budget.made(value))

    def load(self, source: str) -> jinja2.Template:
        """Compile ``source``. Raises what jinja2 and Python's compiler raise for what they cannot compile."""
        with self.budget():
            tree = _Instrument().visit(self.parse(source))
            tree.set_environment(self)
            return self.from_string(tree)

    @contextmanager
    def budget(self) -> Iterator[None]:
        """What this thread renders inside shares one budget."""
        self._local.budget = _Budget()
        try:
            yield
        finally:
            del self._local.budget

    def _tick(self, num_chars: int) -> bool:
        self._local.budget.charge(num_chars)
        return True

    def _join(self, parts: Any, glue: str) -> str:
        budget = self._local.budget
        if not isinstance(parts, (str, list, tuple)):
            parts = budget.made(list(parts))
        budget.charge(len(glue) * len(parts))
        budget.charge_text(parts)
        text = glue.join(map(str, parts))
        budget.charge(max(0, len(text) - budget.weight(parts)))
        return text

    @jinja2.pass_context
    def _print(self, _: Context, value: Any) -> Any:
        """What every ``{{ }}`` passes through."""
        budget = self._local.budget
        if isinstance(value, str):
            budget.charge(len(value))
            return value
        budget.charge_text(value)
        return budget.made(str(value))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = self._local.budget
        if operator == "+":
            return budget.sum_of(left, right, super().call_binop(context, operator, left, right))
        if operator == "*":
            self._check_product(left, right)
        elif operator == "**":
            bits = left.bit_length() if isinstance(left, int) else 1
            if isinstance(right, int) and bits * abs(right) > _MAX_INT_BITS:
                raise TemplateLimitError("it computes a power that is too large")
        elif isinstance(left, (str, bytes)):
            self._check_format(_WIDE_PERCENT, str(left), "%", right)
        return budget.made(super().call_binop(context, operator, left, right))

    def _check_product(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            if left.bit_length() + right.bit_length() > _MAX_INT_BITS:
                raise TemplateLimitError("it computes a number that is too large")
        else:
            for value, count in ((left, right), (right, left)):
                if isinstance(count, int) and count > 0:
                    self._local.budget.charge_text(value, count)

    def _check_format(self, too_wide: re.Pattern[str], text: str, sign: str, values: Any) -> None:
        if too_wide.search(text):
            raise TemplateLimitError("it formats a value to a width of more than 9,999 characters")
        self._local.budget.charge_text(values, 1 + text.count(sign))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            self._check_format(_WIDE_BRACES, str(value.__self__), "{", [args, kwargs])
            return wrapped(*args, **kwargs)

        return bounded

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        __self._local.budget.charge(0)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes)):
            __self._check_integers(args, kwargs)
            name = __obj.__name__
            if name in _REMOVED_METHODS:
                raise TemplateLimitError(f"it calls the method {name!r}, which templates may not call here")
            if name == "join" and args:
                return __self._join(args[0], str(owner))
            if name == "replace" and len(args) > 1:
                __self._check_replace(owner, args[0], args[1])
        return __self._local.budget.made(super().call(__context, __obj, *args, **kwargs))

    def _check_integers(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, int) and abs(value) > _MAX_INT_ARGUMENT:
                raise TemplateLimitError(f"it passes {value!r:.40} where at most {_MAX_INT_ARGUMENT} is allowed")

    def _check_replace(self, text: Any, old: Any, new: Any) -> None:
        found = text.count(old) if old else len(text) + 1
        self._local.budget.charge(len(text) + found * _length(new))

    def _bounded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` behind a check of what it would cost; pass_context keeps it from running while compiling."""
        wants = getattr(getattr(function, "jinja_pass_arg", None), "name", "")

        @jinja2.pass_context
        def bounded(context: Context, value: Any = None, *args: Any, **kwargs: Any) -> Any:
            value = self._check_filter(name, value, args, kwargs)
            extra = {"context": (context,), "eval_context": (context.eval_ctx,), "environment": (self,)}
            return self._local.budget.made(function(*extra.get(wants, ()), value, *args, **kwargs))

        return bounded

    def _text(self, value: Any) -> str:
        """``str(value)``, charged for before it is made."""
        self._local.budget.charge_text(value)
        return str(value)

    def _check_filter(self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Charge what filter ``name`` makes of ``value`` beyond a copy; returns the value to give to it."""
        budget = self._local.budget
        if name not in _ANY_INTEGER:
            self._check_integers(args, kwargs)
        if name in _SEQUENCE_FILTERS:
            budget.charge(0)
            return value
        times = 1
        if name == "join":
            value = value if isinstance(value, (str, list, tuple)) else budget.made(list(value))
            budget.charge(_length(kwargs.get("d", args[0] if args else "")) * len(value))
        elif name == "replace" and (len(args) > 1 or "new" in kwargs):
            old = kwargs.get("old", args[0] if args else kwargs.get("s", ""))
            self._check_replace(self._text(value), str(old), str(kwargs.get("new", args[-1] if args else "")))
        elif name == "format":
            self._check_format(_WIDE_PERCENT, self._text(value), "%", [args, kwargs])
        elif name in ("indent", "tojson"):
            width = kwargs.get("indent", kwargs.get("width", args[0] if args else 4 if name == "indent" else 0))
            width = len(width) if isinstance(width, str) else width or 0
            if not isinstance(width, int) or width > _MAX_INDENT:
                raise TemplateLimitError(f"it indents by more than {_MAX_INDENT} characters")
            times = 1 + width
        budget.charge_text(value, times)
        return value


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 16


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
