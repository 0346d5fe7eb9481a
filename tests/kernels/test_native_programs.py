"""The native kernels without MLX (csrc/tests), under sanitisers and for another processor.

`address,undefined`: no access outside a buffer, no undefined arithmetic. `thread`: no race. `neon`: the kernels of
arm64, cross-compiled and run by qemu-user.
"""

import platform
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the native kernels are for Linux"),
    pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs cmake and c++"),
]
NEON = {
    "CMAKE_SYSTEM_NAME": "Linux",
    "CMAKE_SYSTEM_PROCESSOR": "aarch64",
    "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++",
    "CMAKE_EXE_LINKER_FLAGS": "-static",
    "CMAKE_CROSSCOMPILING_EMULATOR": "qemu-aarch64",
}
COUNT = {"x86_64": 4, "aarch64": 2}  # instruction sets of a processor


def run(build, settings, isas):
    """Configure, build, run: every program once per instruction set, none of them skipped for want of one."""
    options = [f"-D{name}={value}" for name, value in settings.items()]
    for command in (
        ["cmake", "-S", str(ROOT / "csrc" / "tests"), "-B", str(build), *options],
        ["cmake", "--build", str(build), "--parallel", "2"],
        ["ctest", "--test-dir", str(build), "--output-on-failure"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"100% tests passed, 0 tests failed out of {5 * isas}" in done.stdout
    return done.stdout


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_kernels_are_clean_under(sanitizer, tmp_path):
    out = run(tmp_path, {"SANITIZE": sanitizer}, COUNT[platform.machine()])
    assert "elementwise-portable" in out


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64") is None,
    reason="needs g++-aarch64-linux-gnu and qemu-user",
)
def test_the_kernels_of_arm64_agree_under_qemu(tmp_path):
    out = run(tmp_path, NEON, COUNT["aarch64"])
    assert "quant_matmul-neondot" in out
    assert "Skipped" not in out
