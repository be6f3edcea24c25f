"""The sockets' folders: the next launch deletes those of killed servers, and no others."""

import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from sglang.srt.managers.io_struct import FlushCacheReqInput
from sglang.srt.managers.ipc import IpcNames, Receiver
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=2, suite="stage-a-test-cpu")

SERVE = "from sglang.srt.managers.ipc import IpcNames as I; print(I.create().directory, flush=True); input()"


class TestFolders(CustomTestCase):
    def setUp(self):
        holder = self.enterContext(tempfile.TemporaryDirectory())
        self.folder = Path(holder)
        self.enterContext(mock.patch.object(tempfile, "tempdir", holder))

    def server(self):
        """Another process that owns a folder, until it is killed; and the folder."""
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE],
            env={"PYTHONPATH": ":".join(sys.path), "TMPDIR": str(self.folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

        def end():
            process.kill()
            process.communicate()

        self.addCleanup(end)
        folder = Path(process.stdout.readline().strip())
        self.assertEqual(folder.parent, self.folder)
        return end, folder

    def test_only_what_a_killed_server_left_is_removed(self):
        own = IpcNames.create()
        (kill, left), (_, live) = self.server(), self.server()
        # Folders that are not known to be a server's: another program's, and one that is just being made.
        others = [self.folder / "sglang-bench", self.folder / "sglang-new" / "lock.new"]
        for other in others:
            other.mkdir(parents=True)
        (left / "tokenizer").touch()
        kill()
        self.assertTrue(left.exists())
        newest = IpcNames.create()
        self.assertFalse(left.exists())
        for path in (live, *others, Path(own.directory), Path(newest.directory)):
            self.assertTrue(path.exists(), path)
        own.remove()
        newest.remove()
        self.assertFalse(Path(own.directory).exists() or Path(newest.directory).exists())

    def test_sockets_whose_paths_would_be_too_long_are_in_tmp(self):
        for length, fits in ((76, True), (77, False)):
            folder = self.folder / ("x" * (length - len(f"{self.folder}/")))
            folder.mkdir()
            with self.subTest(length), mock.patch.object(tempfile, "tempdir", str(folder)):
                names = IpcNames.create(100_000)
                self.addCleanup(names.remove)
                self.assertEqual(Path(names.directory).parent, folder if fits else Path("/tmp"))
                Receiver(names.schedulers[-1], FlushCacheReqInput).close()


if __name__ == "__main__":
    unittest.main()
