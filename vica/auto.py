"""Makes transformers' Auto classes know model_type "vica", whichever of vica and transformers is imported first.

`AutoConfig.register` and its kind need our classes, and these need torch and transformers, which take seconds to
import: too long for `vica --help`. So `import vica` registers at once only where transformers' Auto classes are
imported already. Otherwise it watches imports and registers as soon as they are there, before the program that imports
them can use them.

The watch waits for the outermost import of a transformers or vica module to end. Inside of it some modules are half
done, and importing ours, which need these, would fail.
"""

import logging
import sys
import threading
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder

log = logging.getLogger(__name__)

AUTO = "transformers.models.auto.configuration_auto"  # comes with every Auto class
WATCHED = ("transformers", "vica")


def register() -> None:
    """Tells the Auto classes our config, model and processor."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from .data.processor import ViCAProcessor
    from .model.llava import ViCAForConditionalGeneration
    from .plan.config import ViCAConfig

    AutoConfig.register(ViCAConfig.model_type, ViCAConfig)
    AutoModelForImageTextToText.register(ViCAConfig, ViCAForConditionalGeneration)
    AutoProcessor.register(ViCAConfig, ViCAProcessor)


def register_when_imported() -> None:
    """Registers now if the Auto classes are there, else when they come."""
    watch = Watch()
    sys.meta_path.insert(0, watch)
    watch.settle()


class Watch(MetaPathFinder):
    """Finds modules as the finders behind it do, and notes when the outermost watched import of a thread ends."""

    def __init__(self):
        self.lock, self.thread = threading.Lock(), threading.local()

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in WATCHED:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((one for one in found if one is not None), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = WatchedLoader(spec.loader, self)
        return spec

    @contextmanager
    def importing(self):
        depth = getattr(self.thread, "depth", 0)
        self.thread.depth = depth + 1
        try:
            yield
        finally:
            self.thread.depth = depth
        if depth == 0:
            self.settle()

    def settle(self) -> None:
        """Registers if it is time to. The lock is never waited for: a thread that holds it imports, and two threads
        that wait for each other's modules would wait for ever."""
        if AUTO not in sys.modules or not self.lock.acquire(blocking=False):
            return
        try:
            if self in sys.meta_path:
                register()
                sys.meta_path.remove(self)
        except Exception as error:  # another library's or thread's import is half done: the next one tries again
            log.info("transformers' Auto classes do not know model_type 'vica' yet: %s", error)
        finally:
            self.lock.release()


class WatchedLoader(Loader):
    """Loads as the loader that it stands for, which the module gets back before its code runs."""

    def __init__(self, loader, watch: Watch):
        self.loader, self.watch = loader, watch

    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        with self.watch.importing():
            self.loader.exec_module(module)
