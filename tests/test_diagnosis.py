"""What is reported of a machine. The command that shows it is in tests/cli/test_model_commands.py."""

from __future__ import annotations

from mlx_codellama.diagnosis import chip, os_name
from mlx_codellama.memory import Readings


def test_the_chip_and_the_system_are_read_where_each_system_keeps_them() -> None:
    files = {
        "/proc/cpuinfo": "processor : 0\nmodel name\t: Some CPU: 3 GHz\nflags : x\nmodel name : another\n",
        "/etc/os-release": 'NAME=x\nPRETTY_NAME="Some Linux 12"\n',
    }
    linux = Readings("Linux", lambda argv: None, files.get)
    assert chip(linux) == "Some CPU: 3 GHz"
    assert os_name(linux).startswith("Some Linux 12, Linux")
    assert chip(Readings("Linux", lambda argv: None, {"/proc/cpuinfo": "Model\t\t: Some Board\n"}.get)) == "Some Board"
    mac = Readings("Darwin", lambda argv: "Apple M9\n" if argv[-1] == "machdep.cpu.brand_string" else None, files.get)
    assert chip(mac) == "Apple M9"
