"""Every wait of a source file that has no deadline of its own, found in its syntax.

What may be awaited is a closed list: `within(...)`, a sleep, a coroutine of our own (which is looked at itself), and
what is made of these. Everything else that is awaited, and every blocking call that is known and given no time limit,
is found. Whether somebody further out keeps a deadline cannot be seen here: the test lists those, each with its reason.
"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_BOUNDED = {"within", "sleep", "timeout"}
"""Called by these names: what they are given ends by a deadline, or they end by themselves."""
_TASKS = ("create_task", "asyncio.ensure_future", "asyncio.gather", "asyncio.shield")
"""They await what they are given."""
# Methods that wait when they are given nothing, and where a time limit stands when it has no name.
_METHODS = {
    "get": 0, "join": 0, "result": 0, "exception": 0, "wait": 0, "acquire": 1, "communicate": 1, "wait_for": 1,
    "recv": 1, "accept": 0, "poll": 0,
}  # fmt: skip
# Functions that wait, and where their time limit stands.
_FUNCTIONS = {
    "ray.get": 9, "ray.wait": 9, "asyncio.wait": 9, "asyncio.wait_for": 1, "futures.wait": 1, "wait": 1,
    "as_completed": 1, "futures.as_completed": 1, "subprocess.run": 9, "subprocess.call": 9,
    "subprocess.check_call": 9, "subprocess.check_output": 9, "urlopen": 2, "request.urlopen": 2,
    "socket.create_connection": 1, "select.select": 3, "os.wait": 9,
}  # fmt: skip
# What makes a process group, and where its time limit stands: the limit of all that the group does.
_GROUPS = {
    "init_process_group": 2, "new_group": 1, "new_subgroups": 2, "init_distributed": 4, "init_device_mesh": 9,
    "TCPStore": 4, "ProcessGroupGloo": 3, "ProcessGroupNCCL": 3, "NcclCommunicator": 9, "init_collective_group": 9,
}  # fmt: skip
# What all ranks of a group must call, by any library's name for it; none of these has a time limit of its own.
_COLLECTIVES = {
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single",
    "allGather", "allReduce", "allgather", "allreduce", "alltoall", "barrier", "bcast", "broadcast",
    "broadcast_object_list", "monitored_barrier", "reduceScatter", "reduce_scatter", "reduce_scatter_tensor",
}  # fmt: skip
_NAMESAKES = {"gather", "gather_object", "recv", "recv_object_list", "reduce", "scatter", "send", "send_object_list"}
"""Collectives in torch.distributed, and something else elsewhere."""
_NO_LIMIT = ("None", "-1")
_FLAGS = {"os.waitid": "WNOHANG", "os.waitpid": "WNOHANG", "fcntl.flock": "LOCK_NB"}
_POOLS = {"ThreadPoolExecutor", "ProcessPoolExecutor"}


@dataclass(frozen=True, slots=True)
class Wait:
    """One wait, by the function that it is in and its own text."""

    function: str
    text: str
    line: int


def coroutines(sources: Iterable[str]) -> set[str]:
    """Names of all async functions and methods that the sources define."""
    trees = map(ast.parse, sources)
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef)}


def _keepers(tree: ast.AST) -> set[str]:
    """Async functions of a file that keep a deadline for what they are given: `within` is all that they await."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncFunctionDef):
            awaited = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Await)]
            given = {argument.arg for argument in node.args.args}
            kept = [one for one in awaited if _last_of_call(one) == "within" and given & _words(one)]
            if awaited and len(kept) == len(awaited):
                found.add(node.name)
    return found


def waits_without_deadline(source: str, ours: set[str]) -> list[Wait]:
    """All of a file, in order; `ours` are the names of our own coroutines."""
    tree = ast.parse(source)
    finder = _Finder(ours | coroutines([source]), _BOUNDED | _keepers(tree), _names_of_distributed(tree))
    finder.visit(tree)
    return finder.found


class _Finder(ast.NodeVisitor):
    """Walks a file, and does not go into what a deadline holds."""

    def __init__(self, ours: set[str], keepers: set[str], distributed: set[str]) -> None:
        self._ours = ours
        self._keepers = keepers
        self._distributed = distributed
        self._scope: list[str] = []
        self._functions: list[ast.AST] = []
        self.found: list[Wait] = []

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._inside(node, node.name)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._functions.append(node)
        self._inside(node, node.name)
        self._functions.pop()

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._functions.append(node)
        self._inside(node, node.name)
        self._functions.pop()

    def visit_Await(self, node: ast.Await) -> None:
        if not self._is_bounded(node.value):
            self._tell(node)
        elif isinstance(node.value, ast.Call) and _last(node.value.func) not in self._keepers:
            self.generic_visit(node.value)

    def visit_AsyncFor(self, node: ast.AsyncFor) -> None:
        if not self._is_bounded(node.iter):
            self._tell(node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        if node.is_async and not self._is_bounded(node.iter):
            self._tell(node.iter)
        self.generic_visit(node)

    def visit_AsyncWith(self, node: ast.AsyncWith) -> None:
        contexts = [item.context_expr for item in node.items]
        for context in contexts:
            if not (self._is_bounded(context) or _last_of_call(context) == "TaskGroup"):
                self._tell(context)
        if any(_last_of_call(context) == "timeout" for context in contexts) or self._is_timeout(contexts):
            return  # all of the body has that deadline
        for statement in node.body:
            self.visit(statement)

    def visit_With(self, node: ast.With) -> None:
        """A lock waits when it is entered, a pool of threads when it is left."""
        for item in node.items:
            context = item.context_expr
            if isinstance(context, ast.Name | ast.Attribute) or _last_of_call(context) in _POOLS:
                self._tell(context)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        """To ask again and again is a wait as well; it needs a clock in its condition."""
        asks = any(_last_of_call(inner) == "sleep" for inner in ast.walk(node))
        if asks and not {"monotonic", "deadline", "give_up"} & _names(node):
            self._tell(node.test)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name, dotted = _last(node.func), ast.unparse(node.func)
        if name in self._keepers and name != "sleep":
            return
        if self._waits(node, name, dotted):
            self._tell(node)
        self.generic_visit(node)

    def _waits(self, node: ast.Call, name: str, dotted: str) -> bool:
        limited = any(map(_is_limit, node.keywords))
        args = _given(node)
        if dotted in _FLAGS:
            return _FLAGS[dotted] not in ast.unparse(node)
        if dotted in _FUNCTIONS:
            return not limited and len(args) <= _FUNCTIONS[dotted]
        if name in _GROUPS:
            return not limited and len(args) <= _GROUPS[name]
        if self._is_collective(name, dotted):
            return not limited and not any(word.arg == "async_op" for word in node.keywords)
        if dotted.endswith(_TASKS):
            return not all(self._is_bounded(argument) for argument in node.args)
        if name in ("to_thread", "run_in_executor"):
            return True  # no deadline ends a thread; awaited under one, it is not found
        if name == "shutdown" and dotted != "ray.shutdown":
            return not any(word.arg == "wait" and ast.unparse(word.value) == "False" for word in node.keywords)
        if not isinstance(node.func, ast.Attribute) or name not in _METHODS or name in self._ours:
            return False
        return not limited and len(args) <= _METHODS[name] and not _is_namesake(args, name)

    def _is_collective(self, name: str, dotted: str) -> bool:
        if name in _NAMESAKES:
            return dotted == name in self._distributed or dotted.removesuffix(f".{name}") in self._distributed
        return name in _COLLECTIVES and name not in self._ours

    def _is_bounded(self, value: ast.expr, depth: int = 0) -> bool:
        """Whether it ends by a deadline, or is a coroutine of ours."""
        match value:
            case ast.Call(func=func, args=args):
                name, dotted = _last(func), ast.unparse(func)
                if dotted.endswith(_TASKS):
                    return all(self._is_bounded(argument, depth) for argument in args)
                if dotted in ("asyncio.wait", "asyncio.wait_for"):
                    return not self._waits(value, name, dotted)
                return name in self._keepers or name in self._ours
            case ast.Starred(value=inner):
                return self._is_bounded(inner, depth)
            case ast.GeneratorExp(elt=elt) | ast.ListComp(elt=elt):
                return self._is_bounded(elt, depth)
            case ast.List(elts=elts) | ast.Tuple(elts=elts):
                return bool(elts) and all(self._is_bounded(elt, depth) for elt in elts)
            case ast.Name(id=name) if depth < 4:
                given = list(self._assigned(name))
                return bool(given) and all(self._is_bounded(one, depth + 1) for one in given)
            case _:
                return False

    def _is_timeout(self, contexts: list[ast.expr]) -> bool:
        """`deadline = asyncio.timeout(...)`, entered by its name."""
        names = [context.id for context in contexts if isinstance(context, ast.Name)]
        return any(_last_of_call(given) == "timeout" for name in names for given in self._assigned(name))

    def _assigned(self, name: str) -> Iterator[ast.expr]:
        for node in ast.walk(self._functions[-1]) if self._functions else ():
            match node:
                case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                    yield value
                case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value) if target == name:
                    yield value

    def _inside(self, node: ast.AST, name: str) -> None:
        self._scope.append(name)
        self.generic_visit(node)
        self._scope.pop()

    def _tell(self, node: ast.expr) -> None:
        self.found.append(Wait(".".join(self._scope) or "module", ast.unparse(node), node.lineno))


def _is_limit(keyword: ast.keyword) -> bool:
    """`timeout=None` and `blocking=True` are none."""
    if keyword.arg in ("block", "blocking"):
        return ast.unparse(keyword.value) == "False"
    return keyword.arg in ("timeout", "timeout_s") and not _is_none(keyword.value)


def _given(node: ast.Call) -> list[ast.expr]:
    """The positional arguments that say more than the call without them: no limit, written out, is none."""
    args = list(node.args)
    while args and _is_none(args[-1]):
        args.pop()
    blocks = _last(node.func) == "get" and args and ast.unparse(args[0]) == "True"
    return args[1:] if blocks else args


def _is_none(limit: ast.expr) -> bool:
    """Whether it is no limit, or may be none."""
    if isinstance(limit, ast.IfExp):
        return _is_none(limit.body) or _is_none(limit.orelse)
    return ast.unparse(limit) in _NO_LIMIT


def _is_namesake(args: list[ast.expr], name: str) -> bool:
    """Not the wait, but what is called like it or does not block: `"".join(parts)`, `mapping.get(key)`."""
    if name == "acquire":
        return bool(args) and ast.unparse(args[0]) == "False"
    return name in ("get", "join", "result", "exception", "wait") and bool(args)


def _names_of_distributed(tree: ast.AST) -> set[str]:
    """By which the file knows torch.distributed, and what it imports from there."""
    found = {"torch.distributed", "dist"}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found |= {name.asname for name in names if name.name == "torch.distributed" and name.asname}
            case ast.ImportFrom(module="torch", names=names):
                found |= {name.asname or name.name for name in names if name.name == "distributed"}
            case ast.ImportFrom(module="torch.distributed", names=names):
                found |= {name.asname or name.name for name in names}
    return found


def _last(func: ast.expr) -> str:
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""


def _last_of_call(node: ast.AST) -> str:
    return _last(node.func) if isinstance(node, ast.Call) else ""


def _words(node: ast.AST) -> set[str]:
    return {word.id for word in ast.walk(node) if isinstance(word, ast.Name)}


def _names(node: ast.AST) -> set[str]:
    """Every word in the loop's condition, and in what its `if`s ask."""
    asked = [node.test] if isinstance(node, ast.While) else []
    asked += [inner.test for inner in ast.walk(node) if isinstance(inner, ast.If)]
    words = (word for test in asked for word in ast.walk(test))
    return {word.attr if isinstance(word, ast.Attribute) else getattr(word, "id", "") for word in words}
