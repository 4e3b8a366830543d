"""Every place of a source file that would run what it reads, found in its syntax: unpickling, shells, eval."""

import ast
from collections.abc import Iterator

_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "marshal.load", "marshal.loads", "shelve.open",
    "torch.load", "joblib.load", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load",
    "subprocess.getoutput", "subprocess.getstatusoutput", "builtins.eval", "builtins.exec",
}  # fmt: skip
_PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "jsonpickle", "shelve", "marshal"}
_KEYWORDS = {("weights_only", "False"), ("trust_remote_code", "True"), ("shell", "True"), ("allow_pickle", "True")}


def unsafe(source: str) -> list[str]:
    """What is unsafe in a file, as it stands there."""
    return list(_unsafe(ast.parse(source)))


def _unsafe(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=func, keywords=keywords):
                if ast.unparse(func) in _CALLS and not _is_safe_torch(node):
                    yield ast.unparse(node)
                for keyword in keywords:
                    if (keyword.arg, ast.unparse(keyword.value)) in _KEYWORDS:
                        yield ast.unparse(node)
            case ast.Import(names=names) if any(name.name.split(".")[0] in _PICKLES for name in names):
                yield ast.unparse(node)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in _PICKLES or module == "ray.cloudpickle":
                yield ast.unparse(node)
            case ast.AnnAssign(target=ast.Name(id="trust_remote_code"), value=ast.Constant(value=True)):
                yield ast.unparse(node)  # a default of a setting


def _is_safe_torch(node: ast.Call) -> bool:
    """torch.load is safe when it is told to take weights only, and nothing else."""
    told = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "weights_only"]
    return ast.unparse(node.func) == "torch.load" and told == ["True"]
