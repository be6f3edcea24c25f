"""Memory of the host as a process in a container may use it."""

import tempfile
import unittest
from pathlib import Path
from unittest import mock

import psutil

from sglang.srt.platforms import cpu
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")

MIB = 1 << 20


class TestContainerMemory(CustomTestCase):
    def setUp(self) -> None:
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def write(self, folder: Path, **files: str) -> None:
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("_", ".", 1)).write_text(text)

    def info(self) -> tuple[int, int]:
        with mock.patch.object(cpu, "CONTROL_GROUP", self.root):
            return cpu.CpuPlatform().memory_info(0)

    def test_version_2(self) -> None:
        stat = f"anon {30 * MIB}\ninactive_file {10 * MIB}\n"
        self.write(self.root, memory_max=f"{64 * MIB}\n", memory_current=f"{44 * MIB}\n", memory_stat=stat)
        self.assertEqual(self.info(), (30 * MIB, 64 * MIB))
        self.write(self.root, memory_current=f"{90 * MIB}\n")
        self.assertEqual(self.info()[0], 0)

    def test_version_1(self) -> None:
        stat = f"cache 1\ntotal_inactive_file {5 * MIB}\n"
        self.write(
            self.root / "memory", memory_limit_in_bytes=f"{64 * MIB}", memory_usage_in_bytes=f"{25 * MIB}",
            memory_stat=stat,
        )  # fmt: skip
        self.assertEqual(self.info(), (44 * MIB, 64 * MIB))

    def test_no_limit(self) -> None:
        total = psutil.virtual_memory().total
        self.assertEqual(self.info()[1], total)
        self.write(self.root, memory_max="max\n", memory_current="5", memory_stat="")
        self.assertEqual(self.info()[1], total)
        # Version 1 writes a number past any memory.
        self.write(
            self.root / "memory", memory_limit_in_bytes=str((1 << 63) - 4096), memory_usage_in_bytes="5",
            memory_stat="",
        )  # fmt: skip
        free, whole = self.info()
        self.assertEqual(whole, total)
        self.assertGreater(free, 0)


if __name__ == "__main__":
    unittest.main()
