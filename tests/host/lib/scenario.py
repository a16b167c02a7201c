"""What a scenario is, and the process that runs one.

A scenario is a file scenarios/NAME.py. Its first docstring line says what it shows. It has `run(host)`, which returns when
all is well and raises otherwise, and may have

    LIMIT_S = 120                what it may take, on a loaded machine
    SHAPES = ("5900x",)          only on these shapes
    SUITES = ("trixie",)         only on these suites
    NEEDS = ("qmpin", "kvm")     only where these are there
"""

import faulthandler
import importlib.util
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import qtest

FOLDER = Path("/job/scenarios")
EXIT_OF_SKIPPED = 77
LIMIT_S = 120


@dataclass(frozen=True)
class Scenario:
    name: str
    module: ModuleType

    @property
    def limit_s(self) -> float:
        return getattr(self.module, "LIMIT_S", LIMIT_S)

    def why_not(self, host: qtest.Host) -> str | None:
        """Why it does not run on this host; None when it does."""
        shapes = getattr(self.module, "SHAPES", None)
        if shapes and host.shape["name"] not in shapes:
            return f"for shape {' or '.join(shapes)} only"
        suites = getattr(self.module, "SUITES", None)
        if suites and host.suite not in suites:
            return f"for suite {' or '.join(suites)} only"
        for need in getattr(self.module, "NEEDS", ()):
            why = host.lacks(need)
            if why:
                return why
        return None


def load(name: str) -> Scenario:
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "run"):
        raise AttributeError(f"scenarios/{name}.py has no run(host)")
    return Scenario(name, module)


def main(name: str) -> int:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    why = Path("/run/qtest/why")
    try:
        load(name).module.run(qtest.Host.from_job())
    except qtest.Skip as skip:
        why.write_text(str(skip))
        return EXIT_OF_SKIPPED
    except BaseException as error:
        traceback.print_exc()
        text = " ".join(str(error).split("\n")[0].split())
        why.write_text(f"{type(error).__name__}: {text}"[:300])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
