"""Build of fastbert: what pyproject.toml cannot say, which is the compiled extension ``fastbert._C`` and, where there
is nvcc, the CUDA kernels beside it, ``fastbert/_C_cuda``.

``csrc/*.cpp`` are compiled once; ``csrc/cpu/*.cpp`` once per instruction set that the compiler knows, so that one
binary serves every CPU and chooses at load; ``csrc/cuda/*.cu`` for several generations of GPUs, those in
``csrc/cuda/cutlass`` if the headers of CUTLASS are installed (``pip install nvidia-cutlass``). Objects are kept in
``build/`` and compiled again only when their source, a header of ours, the flags, the compiler or torch has changed.
Environment:

    FASTBERT_BUILD_EXTENSION  auto (default): build if a compiler and torch are there, else install without and say why
                              1: building is a must, fail without a compiler
                              0: leave the extension out
    FASTBERT_BUILD_CUDA       auto (default), 1, 0: the same for the CUDA kernels and nvcc
    FASTBERT_CUDA_ARCHS       compute capabilities of the GPUs to compile for (default: those of 80;90;100 that nvcc
                              knows); the driver compiles for later ones
    FASTBERT_BUILD_ISAS       e.g. avx2: only these beside the baseline (default: all that the compiler knows)
    FASTBERT_SANITIZE         e.g. address,undefined: an instrumented build, in a folder of its own (make sanitize)
    CXX CXXFLAGS LDFLAGS      as everywhere
    CUDACXX                   nvcc, where it is not on the path, in $CUDA_HOME/bin or in /usr/local/cuda/bin
    MAX_JOBS                  how many compilers at once (default: every core, if there are 2 GiB of memory to each)

A compile error in our own sources always fails the installation.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, SetupError

# Every path is relative, on the compiler's command line too: objects stay good when the tree is copied or moved.
os.chdir(Path(__file__).resolve().parent)
CSRC, PACKAGE = Path("csrc"), Path("fastbert")
TORCH_FLOOR = (2, 11)
COMMON_FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2]
CUDA_ARCHS = ("80", "90", "100")
CUTLASS_FLOOR = (4, 2)
X86_ISAS = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}


class LeftOut(Exception):  # noqa: N818
    """The extension cannot be built here, for a reason that lies outside our sources."""


def version() -> str:
    text = (PACKAGE / "_version.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', text, re.M)[1]


def find_torch() -> tuple[Path, str]:
    """Folder and version of the torch to build against, found without the seconds that importing it takes."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise LeftOut("torch is not installed in the environment that builds")
    found = importlib.metadata.version("torch")
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < TORCH_FLOOR:
        raise LeftOut(f"torch {found} is too old: the extension needs torch {'.'.join(map(str, TORCH_FLOOR))} or later")
    return Path(spec.origin).parent, found


def find_cutlass() -> tuple[Path, str]:
    """The headers of CUTLASS, which come with the Python package nvidia-cutlass, and their version."""
    spec = importlib.util.find_spec("cutlass_library")
    include = Path(spec.origin).parent / "source" / "include" if spec is not None and spec.origin else Path()
    if not (include / "cutlass" / "cutlass.h").exists():
        raise LeftOut(
            "the headers of CUTLASS are not installed (pip install nvidia-cutlass) in the environment that builds"
        )
    text = (include / "cutlass" / "version.h").read_text(encoding="utf-8")
    found = tuple(int(re.search(rf"#define CUTLASS_{part} (\d+)", text)[1]) for part in ("MAJOR", "MINOR", "PATCH"))
    if found[:2] < CUTLASS_FLOOR:
        raise LeftOut(
            f"CUTLASS {found[0]}.{found[1]} is too old: {'.'.join(map(str, CUTLASS_FLOOR))} or later is needed"
        )
    return include, ".".join(map(str, found))


class Compiler:
    """A C++ compiler with the command line of GCC and Clang, tried out before it is trusted."""

    def __init__(self) -> None:
        if os.name == "nt":
            raise LeftOut("building the extension is supported on Linux and macOS only")
        named = os.environ.get("CXX")
        configured = (sysconfig.get_config_var("CXX") or "c++").split()[0]
        candidates = [shlex.split(named)] if named else [[c] for c in (configured, "c++", "g++", "clang++")]
        self.command = next((c for c in candidates if shutil.which(c[0])), [])
        if not self.command:
            wanted = f"CXX={named}" if named else "a C++ compiler (c++, g++ or clang++; set CXX to name one)"
            raise LeftOut(f"{wanted} was not found")
        self.python_include = sysconfig.get_paths()["include"]
        error = self.try_out(["-std=c++17"], "#include <vector>\nint f() { return std::vector<int>(3).size(); }\n")
        if error:
            raise LeftOut(f"{shlex.join(self.command)} cannot compile a small C++17 program:\n{error}")
        error = self.try_out(["-std=c++17", f"-I{self.python_include}"], "#include <Python.h>\n")
        if error:
            raise LeftOut(f"Python's headers are missing (python3-dev or python3-devel brings them):\n{error}")
        told = subprocess.run([*self.command, "--version"], capture_output=True, text=True)
        self.version = (told.stdout.splitlines() or ["unknown"])[0]

    def try_out(self, flags: list[str], source: str) -> str:
        """Empty if ``source`` compiles with ``flags``, else what the compiler said."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "probe.cpp")
            file.write_text(source)
            command = [*self.command, *flags, "-Werror", "-c", str(file), "-o", str(Path(folder, "probe.o"))]
            done = subprocess.run(command, capture_output=True, text=True)
        return "" if done.returncode == 0 else (done.stderr.strip() or f"exit status {done.returncode}")

    def isas(self) -> dict[str, list[str]]:
        """Instruction sets to build for, with their flags."""
        found: dict[str, list[str]] = {"baseline": []}
        if platform.machine().lower() in ("x86_64", "amd64"):
            found |= {name: flags for name, flags in X86_ISAS.items() if not self.try_out(flags, "int x;\n")}
        wanted = os.environ.get("FASTBERT_BUILD_ISAS", ",".join(found)).split(",")
        if missing := set(wanted) - set(found):
            raise SystemExit(f"FASTBERT_BUILD_ISAS: {', '.join(sorted(missing))}: allowed here are {', '.join(found)}")
        return {name: flags for name, flags in found.items() if name in ("baseline", *wanted)}


compiler = functools.cache(Compiler)


class Build:
    """One build of the extension: its objects and its library, below a folder of ``build/`` of their own."""

    def __init__(self, compiler: Compiler, torch: Path, torch_version: str) -> None:
        self.compiler, self.torch, self.torch_version = compiler, torch, torch_version
        self.sanitize = os.environ.get("FASTBERT_SANITIZE", "")
        kind = re.sub(r"\W+", "-", f"ext-{self.sanitize}" if self.sanitize else "ext")
        self.folder = Path("build") / f"{kind}-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        self.jobs = jobs()
        self.compilers = compiler.version

    @functools.cached_property
    def isas(self) -> dict[str, list[str]]:
        return self.compiler.isas()

    def info(self) -> dict[str, object]:
        return {
            "compiler": self.compiler.version,
            "torch": self.torch_version,
            "isas": list(self.isas),
            "sanitize": self.sanitize,
        }

    def units(self) -> Iterator[tuple[Path, Path, list[str]]]:
        """Every translation unit: source, object, and the flags that are its own. The kernels know nothing of torch."""
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            for isa, flags in self.isas.items():
                yield source, self.folder / isa / f"{source.stem}.o", [f"-DFASTBERT_ISA={isa}", *flags]
        about = {"FASTBERT_VERSION": version(), "FASTBERT_TORCH_VERSION": self.torch_version}
        host = [f"-DFASTBERT_HAVE_{isa.upper()}" for isa in self.isas]
        host += [f'-D{name}="{text}"' for name, text in about.items()]
        host += ["-isystem", str(self.torch / "include"), "-isystem", self.compiler.python_include]
        for source in sorted(CSRC.glob("*.cpp")):
            yield source, self.folder / f"{source.stem}.o", host

    def command(self, source: Path, flags: list[str]) -> list[str]:
        """What compiles one unit, but for the names of what it writes."""
        mode = ["-O1", "-g", f"-fsanitize={self.sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
        mode = mode if self.sanitize else ["-O3"]
        user = shlex.split(os.environ.get("CXXFLAGS", ""))
        return [*self.compiler.command, *mode, *COMMON_FLAGS, f"-I{CSRC}", *flags, *user, "-c", str(source)]

    def compile(self, source: Path, target: Path, flags: list[str]) -> bool:
        """Compile one unit if it is not up to date. Returns whether it had to."""
        command = [*self.command(source, flags), "-MMD", "-MF", str(target.with_suffix(".d"))]
        signature = f"{self.compilers}\n{shlex.join(command)}\n"
        if up_to_date(target, signature):
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_suffix(".cmd").unlink(missing_ok=True)  # written again when the object is whole
        print(f"compiling {source} -> {target}\n", end="", flush=True)  # one write, which another thread cannot divide
        started = time.time_ns()
        self.note(target, run([*command, "-o", str(target)], f"compiling {source}"))
        os.utime(target, ns=(started, started))  # a source that is edited while it compiles is newer than this
        target.with_suffix(".cmd").write_text(signature)
        return True

    def note(self, target: Path, said: str) -> None:
        """What to do with what a compiler said that succeeded: pass it on."""
        if said:
            print(said, flush=True)

    def link_command(self, objects: list[str]) -> list[str]:
        user = shlex.split(os.environ.get("LDFLAGS", ""))
        return [*self.compiler.command, "-pthread", *objects, *self.link_flags(), *user]

    def library(self, name: str) -> Path:
        """Bring the library called ``name`` up to date and return where it is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "lock"):
            units = list(self.units())
            if not units:
                raise SetupError("csrc/ holds no C++ source: this source tree is incomplete")
            with ThreadPoolExecutor(self.jobs) as pool:
                list(pool.map(lambda unit: self.compile(*unit), units))
            objects = [str(target) for _, target, _ in units]
            library = self.folder / name
            command = self.link_command(objects)
            stamp = library.with_suffix(".cmd")
            newest = max(Path(o).stat().st_mtime_ns for o in objects)
            fresh = library.exists() and stamp.exists() and stamp.read_text() == shlex.join(command)
            if not fresh or library.stat().st_mtime_ns < newest:
                print(f"linking {library}", flush=True)
                stamp.unlink(missing_ok=True)
                self.note(library, run([*command, "-o", str(library)], f"linking {name}"))
                self.try_loading(library)
                stamp.write_text(shlex.join(command))
            return library

    def try_loading(self, library: Path) -> None:
        """A shared library links without complaint when one of our own functions is missing: find that here."""
        if self.sanitize:  # would need the sanitizers' libraries loaded before Python
            return
        torch = self.torch / "lib" / ("libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so")
        load = (
            "import ctypes, os, sys\nfor name in sys.argv[1:]: ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL | os.RTLD_NOW)"
        )
        run([sys.executable, "-c", load, str(torch), str(library.absolute())], "loading the library")

    def link_flags(self) -> list[str]:
        """torch is imported, and with it its libraries loaded, before ``fastbert._C``: the loader takes those, wherever
        they are. The search path is for whoever imports ``_C`` first with torch beside it."""
        flags = [f"-L{self.torch / 'lib'}", "-ltorch_cpu", *([f"-fsanitize={self.sanitize}"] if self.sanitize else [])]
        if sys.platform == "darwin":
            return ["-bundle", "-undefined", "dynamic_lookup", "-Wl,-rpath,@loader_path/../torch/lib", *flags]
        return ["-shared", "-Wl,-rpath,$ORIGIN/../torch/lib", *flags]


class CudaBuild(Build):
    """The library of the CUDA kernels. It needs neither Python nor a GPU nor CUDA's libraries to be loaded: CUDA's
    runtime is linked into it, PyTorch's side of CUDA is looked up when an op runs.
    """

    def __init__(self, compiler: Compiler, torch: Path, torch_version: str) -> None:
        super().__init__(compiler, torch, torch_version)
        if self.sanitize:
            raise LeftOut("an instrumented build has the CPU kernels only")
        if not list((CSRC / "cuda").glob("*.cu")):
            raise LeftOut("this source tree has no csrc/cuda/*.cu")
        self.nvcc = self.find_nvcc()
        told = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True)
        if told.returncode:
            raise LeftOut(f"{self.nvcc} does not run:\n{told.stderr.strip()}")
        self.nvcc_version = re.search(r"V([\d.]+)", told.stdout)[1]
        self.compilers += f" nvcc {self.nvcc_version}"
        self.archs = self.choose_archs()
        self.cutlass: tuple[Path, str] | None = None
        self.cutlass_reason = ""
        try:
            self.cutlass = find_cutlass()
        except LeftOut as why:
            self.cutlass_reason = str(why)

    @staticmethod
    def find_nvcc() -> str:
        named = os.environ.get("CUDACXX")
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        found = shutil.which(named) if named else shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
        if found is None:
            raise LeftOut(f"CUDACXX={named} was not found" if named else "nvcc was not found")
        return found

    def choose_archs(self) -> list[str]:
        listed = subprocess.run([self.nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
        known = re.findall(r"sm_(\d+)", listed)
        wish = os.environ.get("FASTBERT_CUDA_ARCHS", "")
        archs = re.split(r"[;,\s]+", wish.strip()) if wish.strip() else [a for a in CUDA_ARCHS if a in known]
        allowed = [a for a in known if int(a) >= 80]
        if not all(re.fullmatch(r"\d+[af]?", a) and a.rstrip("af") in allowed for a in archs):
            raise SystemExit(
                f"FASTBERT_CUDA_ARCHS={wish}: allowed with nvcc {self.nvcc_version} are {' '.join(allowed)}"
            )
        return sorted(set(archs), key=lambda a: (int(a.rstrip("af")), a))

    def info(self) -> dict[str, object]:
        cutlass = {"cutlass": self.cutlass and self.cutlass[1], "cutlass_reason": self.cutlass_reason}
        return {"nvcc": self.nvcc_version, "cuda_archs": self.archs, **cutlass}

    def units(self) -> Iterator[tuple[Path, Path, list[str]]]:
        with_cutlass = [f"-DFASTBERT_CUTLASS={self.cutlass[1]}"] if self.cutlass else []
        for source in sorted((CSRC / "cuda").glob("*.cpp")):
            flags = [*with_cutlass, "-isystem", str(self.torch / "include")]
            yield source, self.folder / "cuda" / f"{source.stem}.cpp.o", flags
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        if self.archs[-1].isdigit():  # what is bound to one GPU cannot be carried to a later one
            codes.append(f"-gencode=arch=compute_{self.archs[-1]},code=compute_{self.archs[-1]}")
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            yield source, self.folder / "cuda" / f"{source.stem}.o", codes
        if self.cutlass is None:
            return
        sm90 = any(arch.startswith("90") for arch in self.archs)
        for source in sorted((CSRC / "cuda" / "cutlass").glob("*.cu")):
            # Without NDEBUG a kernel calls the function that reports a failed assert, and the call serialises wgmma.
            flags = [*with_cutlass, "-DNDEBUG", "-isystem", str(self.cutlass[0])]
            flags += ["-DFASTBERT_SM90"] if sm90 else []
            if source.stem.endswith("_sm90"):  # wgmma and TMA: for this GPU alone
                if not sm90:
                    continue
                flags.append("-gencode=arch=compute_90a,code=sm_90a")
            else:
                flags += codes
            yield source, self.folder / "cuda" / f"{source.stem}.o", flags

    def command(self, source: Path, flags: list[str]) -> list[str]:
        if source.suffix != ".cu":
            return super().command(source, flags)
        host = ["-ccbin", self.compiler.command[0], "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
        return [self.nvcc, "-std=c++17", "-O3", *host, "-Xptxas=-v", f"-I{CSRC}", *flags, "-c", str(source)]

    def note(self, target: Path, said: str) -> None:
        """Keep the assembler's report of registers and spills (`tests/cuda/test_resources.py`)."""
        if target.suffix == ".o" and not target.stem.endswith(".cpp"):
            target.with_suffix(".ptxas").write_text(said)
            said = "\n".join(line for line in said.splitlines() if re.search(r"\b(warning|error)\b", line))
        super().note(target, said)

    def link_command(self, objects: list[str]) -> list[str]:
        flags = [f"-L{self.torch / 'lib'}", "-ltorch_cpu", "-Xlinker=-rpath,$ORIGIN/../torch/lib"]
        return [self.nvcc, "-ccbin", self.compiler.command[0], "-shared", "-cudart=static", *objects, *flags]


def jobs() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 31
    except (ValueError, OSError):
        memory = cores
    return int(os.environ.get("MAX_JOBS") or max(1, min(cores, memory)))


def run(command: list[str], what: str) -> str:
    """Run a compiler; raise with its errors; return what else it said."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout.rstrip(), flush=True)
        raise CompileError(f"{what} failed with exit status {done.returncode}: {shlex.join(command)}")
    return done.stdout.rstrip()


def up_to_date(target: Path, signature: str) -> bool:
    """Whether ``target`` was made by this very command from files that have not changed since."""
    stamp, depends = target.with_suffix(".cmd"), target.with_suffix(".d")
    if not (target.exists() and stamp.exists() and depends.exists() and stamp.read_text() == signature):
        return False
    _, _, listed = depends.read_text().replace("\\\n", " ").partition(": ")
    made = target.stat().st_mtime_ns
    try:
        names = [name.replace("\0", " ") for name in listed.replace("\\ ", "\0").split()]
        return all(os.stat(name).st_mtime_ns <= made for name in names)
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One build at a time in a checkout."""
    import fcntl  # not on Windows, where nothing is built

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def install_file(source: Path, target: Path) -> None:
    """Copy so that a process which has the old library mapped keeps it, and none ever sees half of the new one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", suffix=".tmp", delete=False) as file:
        partial = Path(file.name)
    shutil.copyfile(source, partial)
    partial.chmod(0o755)
    partial.replace(target)


def write_note(package: Path) -> None:
    """Tell the installed package how it was built, or why it has no extension; ``fastbert info`` shows it."""
    note = {"extension": BUILD is not None, "reason": REASON, **(BUILD.info() if BUILD else {})}
    note |= {"cuda": CUDA_BUILD is not None, "cuda_reason": CUDA_REASON, **(CUDA_BUILD.info() if CUDA_BUILD else {})}
    (package / "_build.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def remove_stale(libraries: Iterable[Path]) -> None:
    for stale in libraries:
        print(f"fastbert: removing {stale.name} of an earlier build")
        stale.unlink()


class BuildExtension(build_ext):
    """``build_ext`` with the compilation above in place of distutils'."""

    def run(self) -> None:
        if BUILD is not None and BUILD.sanitize and self.inplace:
            raise SetupError("FASTBERT_SANITIZE is for a build of its own: use `make sanitize`")
        super().run()
        if self.inplace:
            write_note(PACKAGE)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        build = CUDA_BUILD if ext.name == CUDA_EXTENSION else BUILD
        install_file(build.library(target.name), target)

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            name = Path(self.get_ext_filename(ext.name)).name
            install_file(BUILD.folder / name, PACKAGE / name)


class BuildPython(build_py):
    """``build_py`` that starts from an empty folder, so that nothing stale is packaged."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / PACKAGE, ignore_errors=True)
        super().run()
        folder = PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE
        folder.mkdir(parents=True, exist_ok=True)
        if self.editable_mode and BUILD is None:
            remove_stale(folder.glob("_C.*"))
        if self.editable_mode and CUDA_BUILD is None:
            remove_stale(folder.glob("_C_cuda.*"))
        write_note(folder)


def plan(kind: type[Build], variable: str, what: str) -> tuple[Build | None, str]:
    """The build to make, or None and why there is none."""
    wish = os.environ.get(variable, "auto")
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"{variable}={wish}: allowed are 0, 1 and auto")
    try:
        if wish == "0":
            raise LeftOut(f"{variable}=0 was set when fastbert was installed")
        if kind is CudaBuild and BUILD is None and wish != "1":
            raise LeftOut(REASON)
        return kind(compiler(), *find_torch()), ""
    except LeftOut as why:
        if wish == "1":
            raise SystemExit(f"{variable}=1, but {what} cannot be built: {why}") from None
        return None, str(why)


CUDA_EXTENSION = "fastbert._C_cuda"  # no Python module: fastbert.dispatch loads it as a library of PyTorch ops
# sdist and egg_info build nothing: they must not depend on a compiler.
BUILDS = bool({"build", "build_ext", "build_py", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv))
BUILD, REASON = plan(Build, "FASTBERT_BUILD_EXTENSION", "the extension") if BUILDS else (None, "")
CUDA_BUILD, CUDA_REASON = plan(CudaBuild, "FASTBERT_BUILD_CUDA", "the CUDA kernels") if BUILDS else (None, "")
EXTENSIONS = [Extension("fastbert._C", [])] * (BUILD is not None or not BUILDS)
EXTENSIONS += [Extension(CUDA_EXTENSION, [])] * (CUDA_BUILD is not None)
if REASON:
    rule = "-" * 100
    left_out = "fastbert: the C++ kernels are LEFT OUT of this installation; it will run on the PyTorch reference."
    print(rule, left_out, f"reason: {REASON}", rule, sep="\n", file=sys.stderr, flush=True)

setup(
    packages=[
        *find_packages(include=["fastbert", "fastbert.*"]),
        "fastbert.kernels",
        "fastbert.kernels.configs",
        "fastbert.bench",
        *(f"fastbert.bench.{name}" for name in find_packages("bench")),
    ],
    package_dir={"fastbert": "fastbert", "fastbert.bench": "bench", "fastbert.kernels": "kernels/triton"},
    package_data={"fastbert": ["py.typed", "preferred.json"], "fastbert.kernels.configs": ["*.json"]},
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
)
