"""Tells lm-eval of this package; run at every start of the interpreter by steermoe_lm_eval.pth.

lm-eval 0.4.13 looks for no plugins, so this waits until one of two of its modules is
imported and adds ours to it. Otherwise it costs one lookup per import.
"""

import sys


class _Hook:
    """A finder that finds nothing itself: it puts a call behind the import of some modules."""

    def __init__(self) -> None:
        self.waiting = {"lm_eval.models": "add_model", "lm_eval.tasks.manager": "add_tasks"}

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        # Taken out at once: the lookup in `_with_call` comes by here again.
        function = self.waiting.pop(name, None)
        if function is None:
            return None
        try:
            return _with_call(name, function)
        except Exception as error:  # noqa: BLE001 - whatever it is, lm-eval itself must go on
            _complain(function, error)
            return None


def _with_call(name: str, function: str) -> object:
    from importlib.util import find_spec

    spec = find_spec(name)
    loader = spec.loader if spec is not None else None
    if loader is None:
        return spec
    execute = loader.exec_module

    def exec_module(module: object) -> None:
        execute(module)  # type: ignore[arg-type]
        _call(function)

    loader.exec_module = exec_module  # type: ignore[method-assign]
    return spec


def _call(function: str) -> None:
    try:
        from importlib import import_module

        getattr(import_module("lm_eval_tasks.register"), function)()
    except Exception as error:  # noqa: BLE001 - as above
        _complain(function, error)


def _complain(function: str, error: Exception) -> None:
    message = f"steermoe: lm_eval_tasks.register.{function} failed, so lm_eval will not know of it: {error!r}"
    print(message, file=sys.stderr)  # noqa: T201


sys.meta_path.insert(0, _Hook())  # type: ignore[arg-type]
