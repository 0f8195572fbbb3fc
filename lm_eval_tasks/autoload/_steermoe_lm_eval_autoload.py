"""Tells lm-eval of this package; run at every start of the interpreter by steermoe_lm_eval.pth.

lm-eval 0.4.13 looks for no plugins, so this waits until one of its two modules is imported
and adds ours to it. Until then it costs one lookup per import; nothing but `sys` is imported.
"""

import sys


class _Hook:
    """A finder that finds nothing itself: it adds a call behind the import of some modules."""

    def __init__(self):  # type: ignore[no-untyped-def]  # noqa: ANN204
        self.waiting = {"lm_eval.models": "add_model", "lm_eval.tasks.manager": "add_tasks"}

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        # Taken out at once: the lookup below comes by here again.
        function = self.waiting.pop(name, None)
        if function is None:
            return None
        if not self.waiting:
            sys.meta_path.remove(self)
        try:
            from importlib.util import find_spec

            spec = find_spec(name)
            execute = spec.loader.exec_module

            def exec_module(module):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
                execute(module)
                _call(function)

            spec.loader.exec_module = exec_module
        except Exception as error:  # noqa: BLE001 - whatever it is, lm-eval itself must go on
            _complain(function, error)
            return None
        return spec


def _call(function):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    try:
        from importlib import import_module

        getattr(import_module("lm_eval_tasks.register"), function)()
    except Exception as error:  # noqa: BLE001
        _complain(function, error)


def _complain(function, error):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    print(f"steermoe: lm_eval_tasks.register.{function} failed, so lm_eval does not know it: {error!r}", file=sys.stderr)  # noqa: T201


sys.meta_path.insert(0, _Hook())
