"""A reward function that cannot be loaded, or that cannot be called as TRL calls it, is found before the run starts.

`load` and `checked_scores` run in the child process (child.py), where user code may do what it likes;
`check_reward` runs in the parent. Nothing here imports more than the standard library, so a child starts at once.
"""

import difflib
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

KEYWORDS = ("prompts", "completions", "completion_ids")
"""Every reward function is called with these keywords, and with one more for each column of the data set."""

JUDGED = ("prompts", "pairs")
"""A judge is called with these, and with the columns that it has parameters for."""

CLASSIFIER = "sequence-classifier:"
"""What is written before the path of a reward model, in place of a function's name; no module can be called so."""

JUDGE = "pairwise-judge:"
"""The same before the name of a function that compares two completions."""

MEMORY = "memory"
"""The cause of a failure: the function took more than the process may have."""

TRL_ONLY = ("trainer_state", "log_extra", "log_metric", "environments")
"""Objects of TRL's trainer, which no function in another process can hold; with a default of None they are optional."""


class RewardError(ValueError):
    """A reward function that cannot be used, and why; the message names the function and the fix."""


def check_reward(
    function: str,
    columns: Collection[str] | None = None,
    timeout_s: float = 120.0,
    max_memory_gb: float | None = None,
) -> None:
    """Returns when the function loads and can be called; else ValueError. It is loaded in a process of its own.

    With `columns` (those of the data set) the function's parameters are checked against them, too.
    """
    # The process imports what is above, so it is imported where it is used.
    from actors.rewards.process import ChildError, RewardProcess

    process = RewardProcess((function,), None if columns is None else tuple(columns), max_memory_gb)
    try:
        process.start(timeout_s)
    except ChildError as error:
        raise ValueError(str(error)) from error
    finally:
        process.kill()


def name_of(function: str) -> str:
    """The name under which the scores of `file.py:name`, `package.module:name` or a reward model are logged."""
    if function.startswith(CLASSIFIER):
        parts = Path(function.removeprefix(CLASSIFIER)).parts
        return next((part for part in reversed(parts) if part != "model"), "model")
    return function.rpartition(":")[2]


def load(function: str, columns: Collection[str] | None = None) -> Callable[..., Any]:
    """The function that `path/to/file.py:name` or `package.module:name` names; RewardError says what is wrong."""
    if function.startswith(CLASSIFIER):
        return _classifier(function.removeprefix(CLASSIFIER))
    judges, function = function.startswith(JUDGE), function.removeprefix(JUDGE)
    place, separator, name = function.rpartition(":")
    if not (separator and place and name.isidentifier()):
        raise RewardError(f"rewards.functions: '{function}' must read 'path/to/file.py:name' or 'package.module:name'")
    module = _module(function, place)
    if not hasattr(module, name):
        raise RewardError(f"rewards.functions: {function}: {place} defines no '{name}'{_did_you_mean(name, module)}")
    found: Callable[..., Any] = getattr(module, name)
    if not callable(found):
        raise RewardError(
            f"rewards.functions: {function}: '{name}' is a {type(found).__name__}, which cannot be called; "
            "name a function"
        )
    problem = _signature_problem(found, columns, JUDGED if judges else KEYWORDS, judges)
    if problem:
        raise RewardError(f"rewards.functions: {function}: {problem}")
    return _judge(found) if judges else found


def _judge(function: Callable[..., Any]) -> Callable[..., Any]:
    from actors.rewards.judge import as_reward  # only where there is one

    return as_reward(function)


def _classifier(path: str) -> Callable[..., Any]:
    from actors.rewards.classifier import reward_model  # which imports torch: only where there is such a model

    try:
        return reward_model(path)
    except ValueError as error:
        raise RewardError(str(error)) from error


def checked_scores(output: Any, num_completions: int) -> tuple[list[float | None], str]:
    """One finite float or None per completion, and what was wrong with the output ('' when nothing was).

    A list of the wrong shape makes every score None; a bad item makes its own score None. numpy arrays, torch tensors
    and their scalars are taken as the numbers they hold; bool, str, NaN and infinities are no scores.
    """
    nothing: list[float | None] = [None] * num_completions
    if hasattr(output, "tolist"):
        output = output.tolist()
    if not isinstance(output, (list, tuple)):
        return nothing, f"returned {type(output).__name__}, not a list with one float per completion"
    if len(output) != num_completions:
        return nothing, f"returned {len(output)} scores for {num_completions} completions"
    scores, problem = nothing, ""
    for index, item in enumerate(output):
        value = item.item() if hasattr(item, "item") else item
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            problem = problem or f"returned {type(value).__name__} as score {index}, not a float"
        elif abs(value) > sys.float_info.max or not math.isfinite(value):
            problem = problem or f"returned a number that is not finite as score {index}"
        else:
            scores[index] = float(value)
    return scores, problem


def describe(error: BaseException, file: str | None = None) -> str:
    """`file, line n: Type: message` of where the error was raised, in at most 500 characters, whatever it holds.

    With `file`, the line is the last one in that file: where the user's own code was when a library raised.
    """
    try:
        text = f"{type(error).__name__}: {str(error).strip()[:400]}".rstrip(": ")
        # What a model has written may hold lone surrogates as JSON escapes, and they have no bytes: not to be printed,
        # nor saved with the group.
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
        if isinstance(error, SyntaxError):
            return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"[:500]
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == file] or frames
        return (f"{own[-1].filename}, line {own[-1].lineno}: {text}" if own else text)[:500]
    except BaseException:  # noqa: BLE001 - the error's own __str__ is user code as well
        return type(error).__name__


def _module(function: str, place: str) -> ModuleType:
    """Import the file or module; whatever it raises becomes a RewardError with the line number."""
    is_file = place.endswith(".py") or "/" in place
    path = Path(place).expanduser().absolute()
    if is_file and not path.is_file():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise RewardError(
            f"rewards.functions: {function}: there is no file {place}{hint} (working directory: {Path.cwd()})"
        )
    try:
        return _import_file(path) if is_file else importlib.import_module(place)
    except BaseException as error:
        # An import runs user code: its SystemExit is no exit of ours.
        if isinstance(error, ModuleNotFoundError) and error.name and place.split(".")[0] == error.name.split(".")[0]:
            raise RewardError(
                f"rewards.functions: {function}: there is no module '{error.name}'; check its name, install its "
                "package, or name a file: 'path/to/file.py:name'"
            ) from error
        where = describe(error, str(path) if is_file else None)
        raise RewardError(f"rewards.functions: {function}: importing {place} fails: {where}") from error


def _import_file(path: Path) -> ModuleType:
    name = f"reward_file:{path}"
    if name in sys.modules:
        return sys.modules[name]
    # Files next to it can be imported, as when Python runs the file; last, so that they hide nothing.
    sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _did_you_mean(name: str, module: ModuleType) -> str:
    """What the module defines itself, the nearest name first."""
    defined = [
        key
        for key, value in vars(module).items()
        if callable(value) and not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    close = difflib.get_close_matches(name, defined, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{hint}; it defines {', '.join(sorted(defined)) or 'no functions'}"


def _signature_problem(
    function: Callable[..., Any], columns: Collection[str] | None, keywords: Sequence[str], chooses: bool
) -> str:
    """Why `function(prompts=..., completions=..., completion_ids=..., **columns)` would fail; '' when it would not."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ""  # a builtin without a signature: the first call will tell
    by_keyword = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [p.name for p in by_keyword if p.default is p.empty]
    accepted = {p.name for p in by_keyword}
    given = {*keywords, *(columns or ())}
    asked = {*keywords} if chooses else given  # a judge is given the columns that it names, and no others
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if positional:
        return f"its parameter '{positional[0]}' is positional-only; reward functions are called with keywords"
    if not any(p.kind is p.VAR_KEYWORD for p in parameters) and not asked <= accepted:
        missing = ", ".join(sorted(asked - accepted))
        return f"it cannot take the keywords {missing}; add **kwargs to its parameters: f(completions, **kwargs)"
    absent = [name for name in required if name not in given and (columns is not None or name in TRL_ONLY)]
    if absent and absent[0] in TRL_ONLY:
        return f"its parameter '{absent[0]}' is one that TRL passes and Paceline does not; give it the default None"
    if absent and columns is not None:
        return (
            f"its parameter '{absent[0]}' is no column of the data set, whose columns are "
            f"{', '.join(sorted(columns)) or 'none'}; rename the parameter or the column, or give it a default"
        )
    return ""
