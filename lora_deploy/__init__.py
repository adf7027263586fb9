"""From a trained LoRA adapter to a merged, replayed, resumable checkpoint.

The public Python API is the verbs below, each a function of ``lora_deploy.pipeline``:

    import lora_deploy
    lora_deploy.merge(...)

Promise: importing this package imports neither torch nor numpy; the first use of a verb does.

A verb and the subpackage that does its work share a name (``merge`` and ``lora_deploy.merge``). The attribute is always
the verb, whatever was imported before; what is inside the subpackage is imported from there, as in
``from lora_deploy.merge.plan import …``.
"""

import sys
from importlib import import_module
from types import ModuleType

__all__ = ["__version__", "export", "merge", "pull", "push", "release", "validate", "verify"]

__version__: str


def _verb(name: str) -> property:
    """Make the attribute that resolves to a function of the pipeline, and stays it."""

    def resolve(_: ModuleType) -> object:
        return getattr(import_module("lora_deploy.pipeline"), name)

    def keep(_: ModuleType, value: object) -> None:
        # The import system sets a submodule on its parent once it is loaded: that must not hide the verb.
        if not isinstance(value, ModuleType):
            raise TypeError(f"lora_deploy.{name} is not to be replaced")

    return property(resolve, keep)


class _Package(ModuleType):
    """This package: its attributes come on demand, and the verbs win over subpackages of the same name.

    A module-level ``__getattr__`` would do for the first, but not for the second: it is not asked for a name that the
    import system has set.
    """

    export = _verb("export")
    merge = _verb("merge")
    pull = _verb("pull")
    push = _verb("push")
    release = _verb("release")
    validate = _verb("validate")
    verify = _verb("verify")

    @property
    def __version__(self) -> str:
        from importlib.metadata import version

        return version("lora-deploy")


sys.modules[__name__].__class__ = _Package
