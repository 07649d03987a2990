import importlib
import importlib.abc
import importlib.machinery
import importlib.resources
import importlib.util
import inspect
import os
import pickle
import pkgutil
import subprocess
import sys
import textwrap
import threading
import zipfile
from pathlib import Path

import pytest

from dpguard import _import_hook
from dpguard._errors import DPGuardError
from dpguard._import_hook import when_imported

ROOT = Path(__file__).resolve().parent.parent

INIT = """
executions = globals().get("executions", 0) + 1
seen_loader = __loader__, __spec__.loader
from fakehost import part

class Thing:
    "Pickled by reference."
"""


class Host:
    """A package ``fakehost`` that exists for one test, and the calls of a callback."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.calls = []
        self.errors = []
        self._undo = []
        self.write(INIT)

    def write(self, init, **parts):
        package = self.folder / "fakehost"
        package.mkdir(exist_ok=True)
        package.joinpath("__init__.py").write_text(init)
        for name, text in ({"part": "value = 1"} | parts).items():
            package.joinpath(f"{name}.py").write_text(text)
        importlib.invalidate_caches()

    def hook(self, callback=None):
        undo = when_imported("fakehost", callback or self.calls.append, on_error=self.errors.append)
        self._undo.append(undo)
        return undo

    def load(self):
        return importlib.import_module("fakehost")

    def forget(self):
        for name in [n for n in sys.modules if n.partition(".")[0] == "fakehost"]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def close(self):
        for undo in self._undo:
            undo()
        self.forget()


@pytest.fixture
def host(tmp_path, monkeypatch):
    """The package, importable, gone afterwards; and no finder is left behind."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # rewritten within one second
    finders = list(sys.meta_path)
    host = Host(tmp_path)
    yield host
    host.close()
    assert sys.meta_path == finders


class Before(importlib.abc.MetaPathFinder):
    """A finder that finds ``fakehost`` itself and asks nobody."""

    def __init__(self, make_loader=None):
        self.make_loader = make_loader

    def find_spec(self, fullname, path, target=None):
        if fullname != "fakehost":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if self.make_loader is not None:
            spec.loader = self.make_loader(spec.loader)
        return spec


def run(program: str, **environ: str) -> str:
    """Run a program in a fresh interpreter that dpguard does not activate itself in."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "DPGUARD": "off"} | environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_called_after_import(host):
    """The callback gets the module after all of its code has run, once."""
    thing = []
    host.hook(lambda module: thing.append((module, module.Thing, module.part.value)))
    assert thing == []
    module = host.load()
    host.load()
    assert thing == [(module, module.Thing, 1)]


def test_called_at_once_when_imported(host):
    """A module that was imported before is reported before when_imported returns."""
    module = host.load()
    host.hook()
    assert host.calls == [module]


def test_other_modules_are_left_alone(host):
    """Modules with another name, longer names included, do not get a stand-in."""
    (host.folder / "fakehost_two.py").write_text("")
    host.hook()
    spec = importlib.util.find_spec("fakehost_two")
    assert type(spec.loader) is importlib.machinery.SourceFileLoader
    assert host.calls == []


def test_submodule_is_refused():
    """Hooking a submodule could deadlock, so the name has to be a top-level one."""
    for name in ("fakehost.part", ""):
        with pytest.raises(ValueError, match="top-level module name"):
            when_imported(name, print)


def test_importing_the_submodule_first(host):
    """``import fakehost.part`` imports the package on the way and is reported once."""
    host.hook()
    importlib.import_module("fakehost.part")
    assert host.calls == [sys.modules["fakehost"]]


def test_missing_module(host):
    """A module that does not exist stays a ModuleNotFoundError."""
    host.hook()
    (host.folder / "fakehost" / "__init__.py").unlink()
    (host.folder / "fakehost" / "part.py").unlink()
    (host.folder / "fakehost").rmdir()
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="No module named 'fakehost'"):
        host.load()


def test_failed_import_then_good_one(host):
    """The host's exception passes unchanged, nothing is reported, and a later import works."""
    host.hook()
    host.write("raise ZeroDivisionError('the user sees this')")
    with pytest.raises(ZeroDivisionError, match=r"^the user sees this$") as caught:
        host.load()
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None
    assert host.calls == []
    host.write(INIT)
    assert host.calls == [] != [host.load()] == host.calls


def test_reload(host):
    """Reloading the module reports it again, after the reload."""
    executions = []
    host.hook(lambda module: executions.append(module.executions))
    importlib.reload(host.load())
    assert executions == [1, 2]


def test_reload_of_submodule(host):
    """Reloading a submodule reports the top-level module again: patches in it may be gone."""
    host.hook()
    module = host.load()
    importlib.reload(module.part)
    assert host.calls == [module, module]


def test_submodule_reloaded_during_import(host):
    """A submodule reloaded by the module's own code reports nothing before the module's end."""
    host.write("import importlib\nfrom fakehost import part\nimportlib.reload(part)\nready = 1")
    ready = []
    host.hook(lambda module: ready.append(module.ready))
    host.load()
    assert ready == [1]
    assert host.errors == []


def test_imported_again(host):
    """A module deleted from sys.modules is reported again when it is imported again."""
    host.hook()
    first = host.load()
    host.forget()
    second = host.load()
    assert first is not second
    assert host.calls == [first, second]


def test_loader_and_spec_are_the_hosts(host):
    """The module's own code, and everybody later, sees the original loader and spec."""
    host.hook()
    module = host.load()
    for loader in (module.__loader__, module.__spec__.loader, *module.seen_loader):
        assert type(loader) is importlib.machinery.SourceFileLoader
    assert type(module.__spec__) is importlib.machinery.ModuleSpec
    importlib.reload(module)
    assert type(module.__spec__.loader) is importlib.machinery.SourceFileLoader
    assert type(module.__loader__) is importlib.machinery.SourceFileLoader
    importlib.reload(module.part)
    assert type(module.part.__loader__) is importlib.machinery.SourceFileLoader
    assert type(module.part.__spec__.loader) is importlib.machinery.SourceFileLoader


def test_introspection(host):
    """getsource, pkgutil, importlib.resources and pickling by reference work as without."""
    host.hook()
    module = host.load()
    assert "Pickled by reference" in inspect.getsource(module.Thing)
    assert [info.name for info in pkgutil.iter_modules(module.__path__)] == ["part"]
    assert pkgutil.get_data("fakehost", "part.py") == b"value = 1"
    assert importlib.resources.files("fakehost").joinpath("part.py").read_text() == "value = 1"
    assert type(pickle.loads(pickle.dumps(module.Thing()))) is module.Thing


def test_find_spec_does_not_import(host):
    """find_spec finds, imports nothing, and its loader answers like the original."""
    host.hook()
    spec = importlib.util.find_spec("fakehost")
    assert "fakehost" not in sys.modules
    assert host.calls == []
    assert spec.loader.get_source("fakehost") == INIT
    assert spec.loader.is_package("fakehost")
    assert spec.loader.get_resource_reader("fakehost").files().joinpath("part.py").is_file()
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = spec.loader.no_such_thing
    host.load()
    assert len(host.calls) == 1


def test_private_copy_is_not_reported(host):
    """A copy executed from a spec by hand is not the module everybody imports."""
    host.hook()
    spec = importlib.util.find_spec("fakehost")
    module = host.load()
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert copy.executions == 1
    assert copy is not module
    assert host.calls == [module]
    assert type(copy.__loader__) is importlib.machinery.SourceFileLoader


def test_lazy_loader(host):
    """A module loaded lazily stays lazy, and is reported when it is loaded."""
    host.write("value = 42")
    values = []
    host.hook(lambda module: values.append(module.value))
    spec = importlib.util.find_spec("fakehost")
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fakehost"] = module
    spec.loader.exec_module(module)
    assert values == []
    assert module.value == 42
    assert values == [42]
    assert type(module.__loader__) is importlib.machinery.SourceFileLoader


def test_zipimport(host):
    """A package in a zip file is reported, with its zipimporter in place."""
    host.close()
    archive = host.folder / "host.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("fakehost/__init__.py", "inside = 1")
    sys.path.insert(0, str(archive))
    try:
        host.hook()
        module = host.load()
    finally:
        sys.path.remove(str(archive))
    assert host.calls == [module]
    assert module.inside == 1
    assert type(module.__loader__).__name__ == "zipimporter"


def test_namespace_package(host):
    """A namespace package (a folder of that name) imports as ever and is not reported."""
    (host.folder / "fakehost" / "__init__.py").unlink()
    importlib.invalidate_caches()
    host.hook()
    module = host.load()
    host.hook()
    assert list(module.__path__) == [str(host.folder / "fakehost")]
    assert host.calls == []


def test_loader_without_create_module(host):
    """A loader that only has exec_module fails as it does without the hook."""

    class Odd:
        def __init__(self, inner):
            self.exec_module = inner.exec_module

    finder = Before(Odd)
    sys.meta_path.insert(0, finder)
    host.hook()
    try:
        with pytest.raises(ImportError, match=r"must also define create_module\(\)"):
            host.load()
    finally:
        sys.meta_path.remove(finder)


@pytest.mark.skipif(sys.version_info >= (3, 15), reason="load_module is gone from 3.15")
@pytest.mark.filterwarnings("ignore::ImportWarning", "ignore::DeprecationWarning")
def test_loader_without_exec_module(host):
    """A loader that only has load_module is left in charge, and reported."""

    class Old:
        def __init__(self, inner):
            self.load_module = inner.load_module

    finder = Before(Old)
    sys.meta_path.insert(0, finder)
    host.hook()
    try:
        module = host.load()
        assert importlib.reload(module) is module
    finally:
        sys.meta_path.remove(finder)
    assert host.calls == [module, module]
    assert type(module.__spec__.loader) in (Old, importlib.machinery.SourceFileLoader)


def test_module_that_replaces_itself(host):
    """A module that puts another object into sys.modules: that object is reported."""
    host.write("import sys\nclass Other: pass\nsys.modules[__name__] = Other")
    host.hook()
    assert host.load().__name__ == "Other"
    assert host.calls == [sys.modules["fakehost"]]


def test_finder_in_front_that_asks_nobody(host):
    """A package imported past the hook is noticed by its submodules, and reported at its end."""
    host.write(INIT + "ready = 1")
    ready = []
    host.hook(lambda module: ready.append(module.ready))
    finder = Before()
    sys.meta_path.insert(0, finder)
    try:
        module = host.load()
    finally:
        sys.meta_path.remove(finder)
    assert ready == [1]
    assert type(module.__spec__) is importlib.machinery.ModuleSpec
    assert "_dpguard_watchers" not in vars(module.__spec__)


def test_finder_behind_that_asks_everybody(host):
    """A finder that finds by asking all finders (as wrapt's does) causes no second report."""

    class Everybody:
        busy = False

        def find_spec(self, fullname, _path, _target=None):
            if fullname != "fakehost" or self.busy:
                return None
            self.busy = True
            try:
                return importlib.util.find_spec(fullname)
            finally:
                self.busy = False

    finder = Everybody()
    sys.meta_path.insert(0, finder)
    host.hook()
    try:
        module = host.load()
    finally:
        sys.meta_path.remove(finder)
    assert host.calls == [module]


def test_finders_in_front_are_not_asked_twice(host):
    """A finder in front that declines has been asked, and is not asked again."""
    asked = []

    class Declines:
        def find_spec(self, fullname, _path, _target=None):
            asked.append(fullname)

    host.hook()
    finder = Declines()
    sys.meta_path.insert(0, finder)
    try:
        host.load()
    finally:
        sys.meta_path.remove(finder)
    assert asked.count("fakehost") == 1


def test_import_between_registering_and_looking(host):
    """An import by another thread at that very moment is reported by its loader only."""
    host.hook()
    finder = sys.meta_path[0]
    module = host.load()
    finder.catch_up()
    assert host.calls == [module]


def test_two_hooks(host):
    """Two registrations for one module are both called; each step-in leaves no trace."""
    host.hook()
    host.hook()
    module = host.load()
    assert host.calls == [module, module]
    assert type(module.__loader__) is importlib.machinery.SourceFileLoader
    assert type(module.__spec__.loader) is importlib.machinery.SourceFileLoader


def test_circular_import(host):
    """Registered by the module's own code: called at the end of the import, not before."""
    ready = []
    host.write("import sys; sys.start_hook()\nready = 1")
    sys.start_hook = lambda: host.hook(lambda module: ready.append(module.ready))
    try:
        module = host.load()
    finally:
        del sys.start_hook
    assert ready == [1]
    assert type(module.__spec__) is importlib.machinery.ModuleSpec
    assert "_dpguard_watchers" not in vars(module.__spec__)


def test_circular_import_that_fails(host):
    """Registered by the module's own code, which then fails: not called, a later import is."""
    host.write("import sys; sys.start_hook()\nraise KeyError('x')")
    sys.start_hook = host.hook
    try:
        with pytest.raises(KeyError):
            host.load()
    finally:
        del sys.start_hook
    assert host.calls == []
    host.write(INIT)
    assert [host.load()] == host.calls


def test_circular_import_refused(host):
    """A DPGuardError at the end of a circular import fails that import."""

    def refuse(_module):
        raise DPGuardError("no")

    host.write("import sys; sys.start_hook()")
    sys.start_hook = lambda: host.hook(refuse)
    try:
        with pytest.raises(DPGuardError, match=r"^no$"):
            host.load()
    finally:
        del sys.start_hook
    assert "fakehost" not in sys.modules


def test_dpguard_error_fails_the_import(host):
    """A DPGuardError of the callback reaches the importer, each time."""

    def refuse(_module):
        raise DPGuardError("not with this version")

    undo = host.hook(refuse)
    for _ in range(2):
        with pytest.raises(DPGuardError, match="not with this version"):
            host.load()
        assert "fakehost" not in sys.modules
    assert host.errors == []
    undo()
    host.forget()
    host.load()


def test_dpguard_error_at_registration(host):
    """For a module imported before, the error is the registration's, which then is undone."""

    def refuse(_module):
        raise DPGuardError("no")

    host.load()
    finders = list(sys.meta_path)
    with pytest.raises(DPGuardError, match=r"^no$"):
        when_imported("fakehost", refuse)
    assert sys.meta_path == finders


def test_other_errors_do_not_fail_the_import(host):
    """Any other exception of the callback goes to on_error; the import succeeds."""
    host.hook(lambda _module: 1 / 0)
    module = host.load()
    assert module.executions == 1
    assert [type(error) for error in host.errors] == [ZeroDivisionError]


def test_default_report(host, capsys):
    """Without on_error there is one line on stderr, whatever the exception's text."""
    undo = when_imported("fakehost", lambda _module: {}["a\nb"])
    host.load()
    undo()
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "dpguard: internal error, dpguard is not active: KeyError: 'a\\nb'\n"


def test_default_report_without_stderr(host, monkeypatch):
    """A closed or missing stderr does not break the import."""
    undo = when_imported("fakehost", lambda _module: 1 / 0)
    monkeypatch.setattr(sys, "stderr", None)
    host.load()
    undo()


def test_undo_is_exact(host):
    """Undo takes out this finder only, once; finders put in before and after stay."""

    class Equal:
        """Is equal to everything."""

        def __eq__(self, other):
            return True

        __hash__ = None

        def find_spec(self, *_args):
            return None

    before, after = Equal(), Equal()
    saved = list(sys.meta_path)
    the_list = sys.meta_path
    try:
        sys.meta_path.insert(0, before)
        undo = host.hook()
        sys.meta_path.insert(0, after)
        undo()
        undo()
        assert sys.meta_path is the_list
        assert [id(f) for f in sys.meta_path] == [id(f) for f in (after, before, *saved)]
    finally:
        sys.meta_path[:] = saved
    host.load()
    assert host.calls == []


def test_undo_in_flight(host):
    """A spec found before the undo and used after it imports, and reports nothing."""
    undo = host.hook()
    spec = importlib.util.find_spec("fakehost")
    undo()
    sys.modules["fakehost"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.executions == 1
    assert host.calls == []


def test_two_threads_import_at_once(host):
    """Two threads importing: one report, and neither thread sees the module before it."""
    host.write("import time\ntime.sleep(0.1)\nfrom fakehost import part")
    host.hook(lambda module: (host.calls.append(module), setattr(module, "patched", True)))
    patched = []
    barrier = threading.Barrier(2)

    def work():
        barrier.wait()
        import fakehost

        patched.append(getattr(fakehost, "patched", False))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "deadlock"
    assert patched == [True, True]
    assert len(host.calls) == 1


def test_registering_waits_for_another_thread(host):
    """While another thread imports the module, registering waits and then reports once."""
    entered, go_on = threading.Event(), threading.Event()
    sys.rendezvous = (entered, go_on)
    host.write("import sys\nsys.rendezvous[0].set()\nsys.rendezvous[1].wait(20)\nready = 1")
    try:
        thread = threading.Thread(target=host.load, daemon=True)
        thread.start()
        assert entered.wait(20)
        threading.Timer(0.1, go_on.set).start()
        ready = []
        host.hook(lambda module: ready.append(module.ready))
        assert ready == [1]
        thread.join(20)
        assert not thread.is_alive(), "deadlock"
        assert ready == [1]
    finally:
        del sys.rendezvous


def test_registering_while_another_thread_fails(host):
    """The other thread's import fails: registering neither raises nor reports."""
    entered, go_on = threading.Event(), threading.Event()
    sys.rendezvous = (entered, go_on)
    host.write(
        "import sys\nsys.rendezvous[0].set()\nsys.rendezvous[1].wait(20)\nraise KeyError('theirs')"
    )
    caught = []

    def work():
        try:
            host.load()
        except KeyError as error:
            caught.append(error)

    try:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        assert entered.wait(20)
        threading.Timer(0.1, go_on.set).start()
        host.hook()
        thread.join(20)
    finally:
        del sys.rendezvous
    assert len(caught) == 1
    assert host.calls == []
    host.write(INIT)
    assert [host.load()] == host.calls


def test_callback_may_import_submodules(host):
    """The callback may import parts of the module, and other modules, without a deadlock."""
    host.write("import time\ntime.sleep(0.05)", late="value = 2")
    host.hook(lambda _module: host.calls.append(importlib.import_module("fakehost.late")))
    threads = [threading.Thread(target=host.load, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "deadlock"
    assert [module.value for module in host.calls] == [2]


def test_registering_is_light():
    """The module imports nothing but what an interpreter has at hand."""
    allowed = {
        "sys",
        "importlib",
        "types",
        "typing",
        "collections",
        "_thread",
        "__future__",
        "dpguard",
    }
    source = Path(_import_hook.__file__).read_text()
    found = {
        line.split()[1].partition(".")[0]
        for line in source.splitlines()
        if line.startswith(("import ", "from "))
    }
    assert found <= allowed


@pytest.mark.slow
def test_real_opacus():
    """The real Opacus, in a fresh process: one report, at the end, loaders untouched."""
    out = run(
        """
        import sys, warnings
        warnings.simplefilter("ignore")
        from dpguard._import_hook import when_imported
        calls = []
        when_imported("opacus", lambda m: calls.append(m.PrivacyEngine.__name__))
        assert "torch" not in sys.modules and "opacus" not in sys.modules
        import opacus
        import opacus.utils.batch_memory_manager
        print(calls, type(opacus.__loader__).__name__, type(opacus.__spec__.loader).__name__)
        """
    )
    assert out == "['PrivacyEngine'] SourceFileLoader SourceFileLoader"
