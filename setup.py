"""Builds the extension `bldm_kernels._native`: C++ kernels where there is a C++ compiler, CUDA kernels where there is nvcc.

Neither PyTorch nor a GPU is needed. Environment: CXX; BLDM_BUILD_CPU and BLDM_BUILD_CUDA = auto (default: build what can be
built), 0 (leave out) or 1 (fail when it cannot be built); BLDM_CUDA_ARCHS, for example "80;90" (default "90", the last one also
as PTX); CUDA_HOME.
"""

import functools
import json
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PYTHON_INCLUDE = sysconfig.get_paths()["include"]
# -ffp-contract=off: a fused multiply-add only where the random stream's definition has one.
CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math "
    "-Wall -Wextra -Wno-psabi"
)
ISA_FLAGS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c -mbmi2 -mpopcnt",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mbmi2 -mpopcnt -Wno-uninitialized",
}
# Warpgroup products: no other architecture has them.
# Warpgroup products: no other architecture has them.
ONLY_SM90A = {"attention.cu", "layer_stack.cu", "product.cu", "stream_attention.cu"}
SM90A = "-gencode=arch=compute_90a,code=sm_90a"
NVCC_FLAGS = "-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden -Werror all-warnings"


class Unavailable(Exception):
    """Why a part cannot be built here."""


def wanted(part: str) -> str:
    value = os.environ.get(f"BLDM_BUILD_{part}", "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"BLDM_BUILD_{part}: expected auto, 0 or 1, got {value!r}")
    return value


def cpu_isas() -> list[str]:
    """Instruction sets to build for, the portable one first."""
    return list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["portable"]


@functools.cache
def find_cxx() -> str:
    """A C++ compiler that takes our flags, and the headers of this Python."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    cxx = next((path for name in names if (path := shutil.which(name))), None)
    if cxx is None:
        raise Unavailable(f"no C++ compiler found (looked for {', '.join(names)})")
    if not Path(PYTHON_INCLUDE, "Python.h").exists():
        raise Unavailable(f"no Python headers in {PYTHON_INCLUDE} (Debian: python3-dev)")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <cmath>\n#include <omp.h>\nint main() { return omp_get_max_threads() < 0; }\n")
        for isa in cpu_isas():
            command = [cxx, *CXX_FLAGS.split(), *ISA_FLAGS[isa].split(), str(source), "-o", str(source.with_suffix(""))]
            probe = subprocess.run(command, capture_output=True, text=True)
            if probe.returncode:
                reason = (probe.stderr.strip().splitlines() or ["no message"])[0]
                raise Unavailable(f"{cxx} cannot build C++17 with OpenMP for {isa} ({reason})")
    return cxx


def find_nvcc() -> str:
    if not (ROOT / "csrc/cuda/bindings.cpp").exists():
        raise Unavailable("no CUDA sources")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")
    if nvcc is None:
        raise Unavailable(f"nvcc not found (looked in {'CUDA_HOME ' + home if home else 'PATH, CUDA_HOME is not set'})")
    return nvcc


def cuda_archs() -> list[str]:
    archs = [arch.strip() for arch in os.environ.get("BLDM_CUDA_ARCHS", "90").split(";") if arch.strip()]
    if not archs or not all(arch[:2].isdigit() for arch in archs):
        raise SystemExit(f"BLDM_CUDA_ARCHS: expected a list like '80;90', got {os.environ['BLDM_CUDA_ARCHS']!r}")
    return archs


def gencode(archs: list[str]) -> str:
    """SASS for every architecture, and PTX of the last one for what comes after it."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return " ".join([*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"])


def find_part(part: str) -> tuple[str | None, str]:
    """(the compiler of part "CPU" or "CUDA", or None; why not)."""
    if wanted(part) == "0":
        return None, f"BLDM_BUILD_{part}=0"
    try:
        host = find_cxx()  # nvcc needs one too
        return (host if part == "CPU" else find_nvcc()), ""
    except Unavailable as error:
        if wanted(part) == "1":
            raise SystemExit(f"BLDM_BUILD_{part}=1, but {error}") from None
        return None, str(error)


def escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class Ninja:
    """A build.ninja: compile edges, then one link."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.lines: list[str] = []
        self.objects: list[str] = []

    def header(self, name: str, macros: dict[str, bool | str]) -> None:
        """A header of macros, 0 or 1 or a text; left alone when it is the same, so that nothing is compiled again."""
        values = {m: json.dumps(v) if isinstance(v, str) else int(v) for m, v in macros.items()}
        text = "".join(f"#define {macro} {value}\n" for macro, value in values.items())
        path = self.folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)

    def rule(self, name: str, command: str, depfile: bool = True) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        self.lines += ["  depfile = $out.d", "  deps = gcc"] if depfile else []

    def compile(self, rule: str, source: Path, flags: str = "", variant: str = "") -> None:
        stem = "-".join([*source.relative_to(ROOT / "csrc").parts, *([variant] if variant else [])])
        self.lines += [f"build {escape(stem)}.o: {rule} {escape(source)}", f"  flags = {flags}"]
        self.objects.append(f"{escape(stem)}.o")

    def link(self, target: Path) -> None:
        self.lines.append(f"build {escape(target)}: link {' '.join(self.objects)}")

    def run(self) -> None:
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        import ninja  # a build requirement; setup.py must also load without it, to say what it requires

        subprocess.run([os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(self.folder)], check=True)


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        (cxx, no_cpu), (nvcc, no_cuda) = find_part("CPU"), find_part("CUDA")
        cpu_line = f"CPU kernels ({', '.join(cpu_isas())}; {cxx})" if cxx else f"no CPU kernels: {no_cpu}"
        cuda_line = f"CUDA kernels (sm_{', sm_'.join(cuda_archs())}; {nvcc})" if nvcc else f"no CUDA kernels: {no_cuda}"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)  # nothing of an earlier build goes into the wheel
        if cxx or nvcc:
            self.write_and_run(target, cxx, nvcc, no_cpu, no_cuda)
        print(f"bldm-kernels: {cpu_line}; {cuda_line}", flush=True)

    def write_and_run(self, target: Path, cxx: str | None, nvcc: str | None, no_cpu: str, no_cuda: str) -> None:
        import pybind11

        target.parent.mkdir(parents=True, exist_ok=True)
        host = cxx or find_cxx()
        archs = gencode(cuda_archs()) if nvcc else ""
        has_sm90 = nvcc is not None and bool({"90", "90a"} & set(cuda_archs()))
        include = f"-I{escape(ROOT / 'csrc')}"
        python = f"-isystem {escape(pybind11.get_include())} -isystem {escape(PYTHON_INCLUDE)}"

        build = Ninja(Path(self.build_temp).resolve())
        # What bindings.cpp is told: each part is either there or says why not.
        told = {
            "BLDM_X86": len(cpu_isas()) > 1,
            "BLDM_WITH_CPU": cxx is not None,
            "BLDM_WITH_CUDA": nvcc is not None,
            "BLDM_SM90": has_sm90,
            "BLDM_NO_CPU": no_cpu,
            "BLDM_NO_CUDA": no_cuda,
            "BLDM_CUDA_ARCHS": ";".join(cuda_archs()) if nvcc else "",
        }
        build.header("build_info.h", told)
        build.rule("cxx", f"{escape(host)} {CXX_FLAGS} {include} $flags -MMD -MF $out.d -c $in -o $out")
        build.rule("nvcc", f"{nvcc} -ccbin {escape(host)} {NVCC_FLAGS} {include} $flags -MMD -MF $out.d -c $in -o $out")
        linker = f"{nvcc} -ccbin {escape(host)} {archs} -cudart static" if nvcc else host
        passed = "-Xcompiler " if nvcc else ""
        build.rule("link", f"{linker} -shared {passed}-fopenmp {'-Xlinker ' if nvcc else '-Wl,'}-s $in -o $out", False)

        cuda = ROOT / "csrc/cuda"
        if nvcc:  # first: the slowest
            for source in sorted(cuda.glob("*.cu")):
                if source.name not in ONLY_SM90A:
                    build.compile("nvcc", source, archs)
                elif has_sm90:
                    build.compile("nvcc", source, SM90A)
            for source in sorted(cuda.glob("*.cpp")):
                build.compile("nvcc", source, f"{python} -I.")
        build.compile("cxx", ROOT / "csrc/bindings.cpp", f"{python} -I. -O1")
        if cxx:
            cpu = ROOT / "csrc/cpu"
            build.compile("cxx", cpu / "bindings.cpp", f"{python} -I. -O1")
            # The portable objects come first: of an inline function that several objects hold, the linker keeps the first.
            for isa in cpu_isas():
                for source in sorted(set(cpu.glob("*.cpp")) - {cpu / "bindings.cpp"}):
                    build.compile("cxx", source, f"-DBLDM_ISA={isa} {ISA_FLAGS[isa]}", isa)
        build.link(target)
        build.run()


# optional: a machine without a compiler installs all the same.
setup(
    ext_modules=[Extension("bldm_kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
